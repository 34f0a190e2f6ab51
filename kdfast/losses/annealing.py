"""Annealing-KD, stage 1: the student's logits follow the teacher's, which grow to full size."""

from __future__ import annotations

import torch
from torch import nn

from kdfast.losses.layers import UNITS, choose, masked_mean, statistics
from kdfast.ops import arguments


def annealing_factor(progress: float, max_temperature: int) -> float:
    """φ = 1 − (T − 1)/T_max, T stepping from T_max down to 1 in equal shares of the stage.

    Args:
        progress: share of the stage that is over, 0 to 1.
        max_temperature: T_max ≥ 1; φ takes the values 1/T_max, 2/T_max, …, 1.

    Source: Jafari et al., "Annealing Knowledge Distillation", EACL 2021, as restated by
    Continuation-KD (2022).
    """
    steps = arguments.integer("annealing_factor", "max_temperature", max_temperature, at_least=1)
    if not 0 <= progress <= 1:
        raise ValueError(f"annealing_factor: progress is {progress}, should be between 0 and 1")
    return min(int(progress * steps) + 1, steps) / steps


class AnnealingLoss(nn.Module):
    """Mean squared error between z_s and φ·z_t, over rows and classes.

    Args:
        unit: what a row of the logits is, "samples" or "tokens": the loss is their mean. For
            whoever weighs micro-batches; changes nothing.

    couples_samples: False.

    Source: Jafari et al. 2021, stage 1; stage 2 is cross-entropy on the labels.
    """

    couples_samples = False

    def __init__(self, *, unit: str = "samples") -> None:
        super().__init__()
        self.unit = choose("unit", unit, UNITS)

    def forward(
        self,
        logits_s: torch.Tensor,
        logits_t: torch.Tensor,
        factor: float,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        logits_s, logits_t: [B, C], or [B, N, C] with mask [B, N], 1 = token.
        factor: φ, see annealing_factor. Returns a scalar. Raises ValueError when shapes disagree.
        """
        if logits_s.shape != logits_t.shape:
            raise ValueError(
                f"student logits {list(logits_s.shape)} and teacher logits {list(logits_t.shape)} "
                "must have the same shape"
            )
        errors = statistics(logits_s) - factor * statistics(logits_t)
        return masked_mean(errors.square().mean(-1), mask)
