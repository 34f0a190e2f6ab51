"""Students that are no transformers, configured, saved and loaded in the manner of transformers.

Importing this registers them: AutoConfig, AutoModel and their like then load a saved one.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from kdfast.students.bilstm import (
    BiLSTMConfig,
    BiLSTMForSequenceClassification,
    BiLSTMForTokenClassification,
    BiLSTMModel,
)
from kdfast.students.encoder import initialise_embeddings
from kdfast.students.gated_cnn import (
    GatedCNNConfig,
    GatedCNNForSequenceClassification,
    GatedCNNForTokenClassification,
    GatedCNNModel,
)

__all__ = [
    "BiLSTMConfig",
    "BiLSTMForSequenceClassification",
    "BiLSTMForTokenClassification",
    "BiLSTMModel",
    "GatedCNNConfig",
    "GatedCNNForSequenceClassification",
    "GatedCNNForTokenClassification",
    "GatedCNNModel",
    "initialise_embeddings",
]

for _config, _model, _classifier, _tagger in (
    (
        BiLSTMConfig,
        BiLSTMModel,
        BiLSTMForSequenceClassification,
        BiLSTMForTokenClassification,
    ),
    (
        GatedCNNConfig,
        GatedCNNModel,
        GatedCNNForSequenceClassification,
        GatedCNNForTokenClassification,
    ),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForSequenceClassification.register(_config, _classifier, exist_ok=True)
    AutoModelForTokenClassification.register(_config, _tagger, exist_ok=True)
