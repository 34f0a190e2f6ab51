"""kdfast: distil transformers from their internal representations, fast.

Operators and losses need torch alone; the training side (DistillationTrainer,
DistillationArguments) imports transformers when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdfast.errors import InputError
from kdfast.losses import (
    AttentionKLLoss,
    CKALoss,
    CosineLoss,
    HiddenMSELoss,
    LayerProjectionLoss,
    RelationKLLoss,
    SoftLabelLoss,
)
from kdfast.ops import (
    CKATeacher,
    MinibatchCKA,
    attention_kl,
    attention_map_kl,
    cka,
    cka_matrix,
    gram_distance,
    hsic,
    hsic_matrix,
    layer_projection,
    layer_projection_loss,
    procrustes_distance,
)

if TYPE_CHECKING:
    from kdfast.distill.trainer import DistillationArguments, DistillationTrainer

__all__ = [
    "AttentionKLLoss",
    "CKALoss",
    "CKATeacher",
    "CosineLoss",
    "DistillationArguments",
    "DistillationTrainer",
    "HiddenMSELoss",
    "InputError",
    "LayerProjectionLoss",
    "MinibatchCKA",
    "RelationKLLoss",
    "SoftLabelLoss",
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


def __getattr__(name: str) -> Any:
    if name in ("DistillationArguments", "DistillationTrainer"):
        try:
            from kdfast.distill import trainer
        except ModuleNotFoundError as error:
            raise ImportError(
                f"kdfast.{name} needs {error.name}: pip install {error.name}"
            ) from error
        return getattr(trainer, name)
    raise AttributeError(f"module 'kdfast' has no attribute '{name}'")
