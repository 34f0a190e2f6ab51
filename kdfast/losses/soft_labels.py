"""Soft labels: the teacher's output distribution as the student's target."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.losses.layers import UNITS, choose, masked_mean, statistics

DIVERGENCES = ("kl", "cross_entropy")
REDUCTIONS = ("rows", "elements")


class SoftLabelLoss(nn.Module):
    """τ² · KL(softmax(t/τ) ‖ softmax(s/τ)), mean over rows; mean squared error for regression.

    Args:
        temperature: τ > 0. The factor τ² keeps the gradient's size independent of it.
        regression: the logits are values, not classes (one-logit rerankers, STS-B); the loss is
            their mean squared difference, and the options below say nothing.
        divergence: "kl", or "cross_entropy" −Σ p_t log p_s (TinyBERT): the same gradient, and a
            value that is the teacher's entropy higher.
        normalize: "rows": mean over rows; "elements": over rows and classes, as PKD's and
            TinyBERT's codes have it, which is 1/C of the other.
        rescale: multiply by τ²; TinyBERT does not.
        unit: what a row of the logits is, "samples" or "tokens": the loss is their mean. For
            whoever weighs micro-batches; changes nothing.

    PKD: normalize="elements". TinyBERT: divergence="cross_entropy", normalize="elements",
    rescale=False. couples_samples: False.

    Source: Hinton et al. 2015; Jung et al. 2023, Eq. 1 (whose code has τ², the equation not).
    """

    couples_samples = False

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        regression: bool = False,
        divergence: str = "kl",
        normalize: str = "rows",
        rescale: bool = True,
        unit: str = "samples",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, was {temperature}")
        self.temperature = temperature
        self.regression = regression
        self.divergence = choose("divergence", divergence, DIVERGENCES)
        self.normalize = choose("normalize", normalize, REDUCTIONS)
        self.rescale = rescale
        self.unit = choose("unit", unit, UNITS)

    def forward(
        self,
        logits_s: torch.Tensor,
        logits_t: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        logits_s, logits_t: [..., C], as [B, C], or [B, N, C] of a token classifier.
        mask: [...], as [B, N], 1 = a row that takes part; None: all.
        Returns a scalar, 0 without any row. Raises ValueError when shapes disagree.
        """
        if logits_s.shape != logits_t.shape:
            raise ValueError(
                f"student logits {list(logits_s.shape)} and teacher logits {list(logits_t.shape)} "
                "must have the same shape"
            )
        student, teacher = statistics(logits_s), statistics(logits_t)
        if self.regression:
            return masked_mean((student - teacher).square().mean(-1), mask)
        if logits_s.shape[-1] == 1:
            raise ValueError(
                "logits have one class, whose softmax is constant: use regression=True"
            )
        log_s = F.log_softmax(student / self.temperature, dim=-1)
        log_t = F.log_softmax(teacher / self.temperature, dim=-1)
        if self.divergence == "kl":
            rows = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
        else:
            rows = -(log_t.exp() * log_s).sum(-1)
        loss = masked_mean(rows, mask)
        if self.normalize == "elements":
            loss = loss / logits_s.shape[-1]
        return loss * self.temperature**2 if self.rescale else loss
