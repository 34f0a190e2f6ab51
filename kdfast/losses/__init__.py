"""Distillation losses as nn.Modules over the operators of kdfast.ops."""

from kdfast.losses.attention import AttentionKLLoss, RelationKLLoss
from kdfast.losses.hidden import CosineLoss, HiddenMSELoss
from kdfast.losses.projection import LayerProjectionLoss
from kdfast.losses.soft_labels import SoftLabelLoss
from kdfast.losses.structure import CKALoss

__all__ = [
    "AttentionKLLoss",
    "CKALoss",
    "CosineLoss",
    "HiddenMSELoss",
    "LayerProjectionLoss",
    "RelationKLLoss",
    "SoftLabelLoss",
]
