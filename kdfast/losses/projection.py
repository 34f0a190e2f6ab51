"""Layer projection: each student layer against its own mixture of all teacher layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kdfast.losses.layers import (
    LAYER_REDUCTIONS,
    UNITS,
    Layers,
    LearnedProjections,
    as_layers,
    choose,
    of_one_dtype,
)
from kdfast.ops import arguments
from kdfast.ops.layer_projection import layer_projection_loss


class LayerProjectionLoss(nn.Module):
    """Distance of every student layer to its attention-weighted mixture of the teacher's layers.

    α_ij = softmax_j(scale·⟨h_i, g_j⟩), C_i = Σ_j α_ij g_j, loss = Σ_i distance(h_i, C_i).

    Args:
        objective: "mse" (ALP-KD), "cosine" or "kl" (states are logits, Universal-KD).
        attend: "states", or "losses" for the ablation of Universal-KD.
        scale: of the dot products; 1 as both papers' implementations have it.
        temperature: of objective="kl".
        student_width, teacher_width, pairs: give them where widths differ; one projection per
            student layer (`pairs` of them) is learned.
        layers: "sum" (ALP-KD) or "mean" over student layers.
        unit: what the leading dimensions of the states are, "samples" (pooled states, logits) or
            "tokens": the loss is their mean. For whoever weighs micro-batches; changes nothing.
        backend: see kdfast.layer_projection_loss.

    couples_samples: False.

    Source: ALP-KD (Passban et al. 2021); Universal-KD (Wu et al. 2021).
    """

    couples_samples = False

    def __init__(
        self,
        *,
        objective: str = "mse",
        attend: str = "states",
        scale: float = 1.0,
        temperature: float = 1.0,
        student_width: int | None = None,
        teacher_width: int | None = None,
        pairs: int = 1,
        layers: str = "sum",
        unit: str = "samples",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.unit = choose("unit", unit, UNITS)
        self.objective = choose("objective", objective, ("mse", "cosine", "kl"))
        self.attend = choose("attend", attend, ("states", "losses"))
        self.scale = arguments.finite("LayerProjectionLoss", "scale", scale)
        self.temperature = arguments.positive("LayerProjectionLoss", "temperature", temperature)
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)
        self.projections = LearnedProjections(student_width, teacher_width, pairs)
        self.backend = backend

    def forward(
        self,
        layers_s: Layers,
        layers_t: Layers,
        mask: torch.Tensor | None = None,
        which: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """
        layers_s: L_s tensors [..., D]; layers_t: L_t tensors [..., D]; mask [...], 1 = token.
        which: where only some student layers are given, their numbers (from 0).
        Returns a scalar.
        """
        students = of_one_dtype(self.projections(layers_s, which))
        teachers = of_one_dtype(as_layers(layers_t))
        loss = layer_projection_loss(
            students,
            teachers,
            objective=self.objective,
            scale=self.scale,
            temperature=self.temperature,
            mask=mask,
            attend=self.attend,
            backend=self.backend,
        )
        return loss * len(students) if self.layers == "sum" else loss
