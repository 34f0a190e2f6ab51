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
    of_one_dtype,
    statistics,
)
from kdfast.ops.layer_projection import MAXIMUM_LAYERS, layer_projection_loss

ROWS = ("cls", "tokens")


class _HiddenLoss(nn.Module):
    """Rows of each layer pair, projected where widths differ, compared by `objective`.

    It is layer projection without weights, on whose kernels it runs: on a CPU loss and gradient in
    one sweep, on a GPU all pairs in one launch. unit: what its mean runs over; no sample is coupled
    with another.
    """

    couples_samples = False
    objective = ""

    def __init__(
        self,
        rows: str,
        student_width: int | None,
        teacher_width: int | None,
        pairs: int,
        layers: str,
        backend: str,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.rows = choose("rows", rows, ROWS)
        self.unit = "samples" if rows == "cls" else "tokens"
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)
        self.projections = LearnedProjections(student_width, teacher_width, pairs)

    def compared(self, states: torch.Tensor) -> torch.Tensor:
        """States [..., D] as they are compared."""
        return states

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
        pairs = as_pairs(hidden_s, hidden_t)
        if self.rows == "cls":
            pairs = [(s[:, :1], t[:, :1]) for s, t in pairs]
            attention_mask = None
        projected = self.projections([s for s, _ in pairs], which)
        for student, (_, teacher) in zip(projected, pairs, strict=True):
            check_widths(student, teacher)
        students = of_one_dtype(self.compared(x) for x in projected)
        teachers = of_one_dtype(self.compared(x) for _, x in pairs)
        together = len(pairs) <= MAXIMUM_LAYERS and len({x.shape for x in students}) == 1
        step = len(pairs) if together else 1
        losses = [
            step
            * layer_projection_loss(
                students[k : k + step],
                teachers[k : k + step],
                objective=self.objective,
                mask=attention_mask,
                attend="pairs",
                backend=self.backend,
            )
            for k in range(0, len(pairs), step)
        ]
        total = losses[0] if together else torch.stack(losses).sum()
        return total if self.layers == "sum" else total / len(pairs)


class CosineLoss(_HiddenLoss):
    """1 − cos(h_s, h_t), mean over rows, of the [CLS] state or of all tokens.

    Args:
        rows: "cls" (token 0) or "tokens" (every valid token).
        student_width, teacher_width: give both where they differ; one projection a pair is learned.
        pairs: number of layer pairs.
        layers: "sum" (the paper's reading) or "mean" over pairs.
        backend: see kdfast.layer_projection_loss.

    unit: "samples" with rows="cls", "tokens" otherwise; couples_samples: False.

    Source: Aguilar et al. 2020, L_cos; DistilBERT's cosine loss with rows="tokens".
    """

    objective = "cosine"

    def __init__(
        self,
        rows: str = "cls",
        *,
        student_width: int | None = None,
        teacher_width: int | None = None,
        pairs: int = 1,
        layers: str = "sum",
        backend: str = "auto",
    ) -> None:
        super().__init__(rows, student_width, teacher_width, pairs, layers, backend)


class HiddenMSELoss(_HiddenLoss):
    """Mean squared error between hidden states, mean over rows and features.

    Args: as CosineLoss, and
        normalize: divide each state by its Euclidean norm first, as PKD does.

    unit: "samples" with rows="cls", "tokens" otherwise; couples_samples: False.

    Source: TinyBERT's hidden loss (rows="tokens"); PKD's L_PT (rows="cls", normalize=True).
    """

    objective = "mse"

    def __init__(
        self,
        rows: str = "tokens",
        *,
        normalize: bool = False,
        student_width: int | None = None,
        teacher_width: int | None = None,
        pairs: int = 1,
        layers: str = "sum",
        backend: str = "auto",
    ) -> None:
        super().__init__(rows, student_width, teacher_width, pairs, layers, backend)
        self.normalize = normalize

    def compared(self, states: torch.Tensor) -> torch.Tensor:
        return F.normalize(statistics(states), dim=-1) if self.normalize else states
