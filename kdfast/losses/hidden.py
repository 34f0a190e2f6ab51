"""Losses that compare hidden states state by state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.losses.layers import (
    LAYER_REDUCTIONS,
    Layers,
    LearnedProjections,
    as_pairs,
    check_widths,
    choose,
    masked_mean,
    over_layers,
    statistics,
)

ROWS = ("cls", "tokens")


class _HiddenLoss(nn.Module):
    """Rows of each layer pair, projected where widths differ, compared by `distance`.

    unit: what its mean runs over; no sample is coupled with another.
    """

    couples_samples = False

    def __init__(
        self,
        rows: str,
        student_width: int | None,
        teacher_width: int | None,
        pairs: int,
        layers: str,
    ) -> None:
        super().__init__()
        self.rows = choose("rows", rows, ROWS)
        self.unit = "samples" if rows == "cls" else "tokens"
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)
        self.projections = LearnedProjections(student_width, teacher_width, pairs)

    def distance(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """[..., D] and [..., D] to [...]."""
        raise NotImplementedError

    def forward(
        self,
        hidden_s: Layers,
        hidden_t: Layers,
        attention_mask: torch.Tensor | None = None,
        which: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """
        hidden_s, hidden_t: [B, N, D] each, or a sequence of them, one per layer pair.
        attention_mask: [B, N], 1 = token; padded tokens leave the mean. Unused with rows="cls".
        which: where only some layer pairs are given, their numbers (from 0).
        Returns a scalar; raises ValueError when shapes disagree.
        """
        # The [CLS] slice is taken before the projection, which then maps B rows and not B·N.
        if self.rows == "cls":
            pairs = [(s[:, :1], t[:, :1]) for s, t in as_pairs(hidden_s, hidden_t)]
            attention_mask = None
        else:
            pairs = as_pairs(hidden_s, hidden_t)
        projected = self.projections([s for s, _ in pairs], which)
        losses = []
        for student, (_, teacher) in zip(projected, pairs, strict=True):
            check_widths(student, teacher)
            losses.append(
                masked_mean(self.distance(statistics(student), statistics(teacher)), attention_mask)
            )
        return over_layers(torch.stack(losses), self.layers)


class CosineLoss(_HiddenLoss):
    """1 − cos(h_s, h_t), mean over rows, of the [CLS] state or of all tokens.

    Args:
        rows: "cls" (token 0) or "tokens" (every valid token).
        student_width, teacher_width: give both where they differ; one projection a pair is learned.
        pairs: number of layer pairs.
        layers: "sum" (the paper's reading) or "mean" over pairs.

    unit: "samples" with rows="cls", "tokens" otherwise; couples_samples: False.

    Source: Aguilar et al. 2020, L_cos; DistilBERT's cosine loss with rows="tokens".
    """

    def __init__(
        self,
        rows: str = "cls",
        *,
        student_width: int | None = None,
        teacher_width: int | None = None,
        pairs: int = 1,
        layers: str = "sum",
    ) -> None:
        super().__init__(rows, student_width, teacher_width, pairs, layers)

    def distance(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        return 1 - F.cosine_similarity(student, teacher, dim=-1)


class HiddenMSELoss(_HiddenLoss):
    """Mean squared error between hidden states, mean over rows and features.

    Args: as CosineLoss, and
        normalize: divide each state by its Euclidean norm first, as PKD does.

    unit: "samples" with rows="cls", "tokens" otherwise; couples_samples: False.

    Source: TinyBERT's hidden loss (rows="tokens"); PKD's L_PT (rows="cls", normalize=True).
    """

    def __init__(
        self,
        rows: str = "tokens",
        *,
        normalize: bool = False,
        student_width: int | None = None,
        teacher_width: int | None = None,
        pairs: int = 1,
        layers: str = "sum",
    ) -> None:
        super().__init__(rows, student_width, teacher_width, pairs, layers)
        self.normalize = normalize

    def distance(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        if self.normalize:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        return (student - teacher).square().mean(-1)
