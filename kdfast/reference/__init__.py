"""The operators in plain dense PyTorch: the definition of "right" for every faster backend.

Same names, same signatures and same defaults as the public operators, without `backend`. Statistics
(log-sum-exp, means, norms, losses) are float32, float64 for float64 input. Arguments are taken as
already checked by `kdfast.ops`.
"""

from kdfast.reference.attention_kl import attention_kl
from kdfast.reference.attention_map_kl import attention_map_kl
from kdfast.reference.cka import cka, cka_matrix, gram_distance, hsic, hsic_matrix
from kdfast.reference.layer_projection import layer_projection, layer_projection_loss
from kdfast.reference.procrustes import procrustes_distance

__all__ = [
    "attention_kl",
    "attention_map_kl",
    "cka",
    "cka_matrix",
    "gram_distance",
    "hsic",
    "hsic_matrix",
    "layer_projection",
    "layer_projection_loss",
    "procrustes_distance",
]
