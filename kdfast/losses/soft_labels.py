"""Soft labels: the teacher's output distribution as the student's target."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.losses.layers import statistics


class SoftLabelLoss(nn.Module):
    """τ² · KL(softmax(t/τ) ‖ softmax(s/τ)), mean over rows; mean squared error for regression.

    Args:
        temperature: τ > 0. The factor τ² keeps the gradient's size independent of it.
        regression: the logits are values, not classes; the loss is their mean squared difference.

    Source: Hinton et al. 2015; Jung et al. 2023, Eq. 1 (whose code has τ², the equation not).
    """

    def __init__(self, temperature: float = 1.0, *, regression: bool = False) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, was {temperature}")
        self.temperature = temperature
        self.regression = regression

    def forward(self, logits_s: torch.Tensor, logits_t: torch.Tensor) -> torch.Tensor:
        """logits_s, logits_t: [..., C]. Returns a scalar. Raises ValueError when they disagree."""
        if logits_s.shape != logits_t.shape:
            raise ValueError(
                f"student logits {list(logits_s.shape)} and teacher logits {list(logits_t.shape)} "
                "must have the same shape"
            )
        student, teacher = statistics(logits_s), statistics(logits_t)
        if self.regression:
            return F.mse_loss(student, teacher)
        if logits_s.shape[-1] == 1:
            raise ValueError(
                "logits have one class, whose softmax is constant: use regression=True"
            )
        log_s = F.log_softmax(student / self.temperature, dim=-1)
        log_t = F.log_softmax(teacher / self.temperature, dim=-1)
        divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1).mean()
        return divergence * self.temperature**2
