"""Distillation losses as nn.Modules over the operators of kdfast.ops."""

from kdfast.losses.annealing import AnnealingLoss, annealing_factor
from kdfast.losses.attention import AttentionKLLoss, RelationKLLoss
from kdfast.losses.distributed import gather_batch
from kdfast.losses.hidden import CosineLoss, HiddenMSELoss
from kdfast.losses.memory import (
    CentroidFit,
    ClusteredMemoryLoss,
    fit_centroids,
    flat_states,
    memory_bytes,
)
from kdfast.losses.projection import LayerProjectionLoss
from kdfast.losses.relational import RKDLoss
from kdfast.losses.scores import AttentionScoreLoss
from kdfast.losses.soft_labels import SoftLabelLoss
from kdfast.losses.structure import CKALoss

__all__ = [
    "AnnealingLoss",
    "AttentionKLLoss",
    "AttentionScoreLoss",
    "CKALoss",
    "CentroidFit",
    "ClusteredMemoryLoss",
    "CosineLoss",
    "HiddenMSELoss",
    "LayerProjectionLoss",
    "RKDLoss",
    "RelationKLLoss",
    "SoftLabelLoss",
    "annealing_factor",
    "fit_centroids",
    "flat_states",
    "gather_batch",
    "memory_bytes",
]
