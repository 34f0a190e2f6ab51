"""The operators: argument checks and choice of backend over one definition of what is right."""

from kdfast.ops.attention_kl import attention_kl
from kdfast.ops.attention_map_kl import attention_map_kl
from kdfast.ops.cka import (
    CKATeacher,
    MinibatchCKA,
    cka,
    cka_matrix,
    gram_distance,
    hsic,
    hsic_matrix,
)
from kdfast.ops.dispatch import explain
from kdfast.ops.layer_projection import layer_projection, layer_projection_loss
from kdfast.ops.procrustes import procrustes_distance

__all__ = [
    "CKATeacher",
    "MinibatchCKA",
    "attention_kl",
    "attention_map_kl",
    "cka",
    "cka_matrix",
    "explain",
    "gram_distance",
    "hsic",
    "hsic_matrix",
    "layer_projection",
    "layer_projection_loss",
    "procrustes_distance",
]
