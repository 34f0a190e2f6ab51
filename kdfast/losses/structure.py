"""Feature structure distillation: kernel alignment between teacher and student states."""

from __future__ import annotations

import torch
from torch import nn

from kdfast.losses.layers import LAYER_REDUCTIONS, Layers, as_pairs, choose, over_layers
from kdfast.ops.cka import MINIMUM_ROWS, cka

FORMS = ("one_minus", "neg_log")


class CKALoss(nn.Module):
    """1 − CKA or −log CKA between hidden states; widths may differ, no projection is needed.

    Args:
        rows: what the kernel compares. "tokens": the tokens within one sample, one problem a
            sample, mean over samples (FSD's intra-feature structure, Eq. 6). "samples": the samples
            of the batch, each with its token states side by side, padded positions zero (FSD's
            local inter-feature structure, Eq. 7).
        estimator: "biased" (FSD's) or "unbiased". At n = 32 rows of 768 features the biased CKA of
            independent data is near 1, almost flat as a loss; the unbiased one is near 0 there.
        form: "neg_log" (FSD's −log|CKA|; biased only, the unbiased estimate may be negative) or
            "one_minus".
        kernel, bandwidth: see kdfast.cka.
        layers: "mean" (FSD's layer-wise mode) or "sum" over layer pairs.
        backend: see kdfast.cka.

    A problem without enough valid rows (fewer than 2, or 4 unbiased), or with equal ones, adds
    nothing; a last batch with too few samples gives 0.

    Source: Jung et al. 2023, Eq. 6 (mean of the logarithms) and Eq. 7.
    """

    def __init__(
        self,
        rows: str = "tokens",
        *,
        estimator: str = "biased",
        form: str = "neg_log",
        kernel: str = "linear",
        bandwidth: float | None = None,
        layers: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.rows = choose("rows", rows, ("tokens", "samples"))
        self.estimator = choose("estimator", estimator, tuple(MINIMUM_ROWS))
        self.form = choose("form", form, FORMS)
        if form == "neg_log" and estimator == "unbiased":
            raise ValueError(
                'form="neg_log" needs estimator="biased": the unbiased estimate may be negative; '
                'use form="one_minus"'
            )
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)
        self.backend = backend

    def forward(
        self, hidden_s: Layers, hidden_t: Layers, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        hidden_s: [B, N, D_s]; hidden_t: [B, N, D_t]; or sequences of them, one per layer pair.
        attention_mask: [B, N], 1 = token. Returns a scalar.
        """
        pairs = as_pairs(hidden_s, hidden_t)
        sides, mask = [list(side) for side in zip(*pairs, strict=True)], attention_mask
        if self.rows == "samples":
            if mask is not None:
                padded = ~mask.bool()[..., None]
                sides = [[x.masked_fill(padded, 0) for x in side] for side in sides]
            sides, mask = [[x.flatten(1) for x in side] for side in sides], None
        first = sides[0][0]
        if first.shape[-2] < MINIMUM_ROWS[self.estimator]:
            nothing = torch.stack([(x * 0).sum() for x in sides[0]]).sum()
            return nothing.to(torch.promote_types(first.dtype, torch.float32))
        alignment = cka(
            *sides,
            mask=mask,
            kernel=self.kernel,
            bandwidth=self.bandwidth,
            estimator=self.estimator,
            backend=self.backend,
        ).view(len(pairs), -1)
        # Exactly 0 says that CKA is undefined there: too few valid rows, or all of them equal. Such
        # problems leave before the logarithm, since 0 · ∞ in backward would be NaN.
        defined = alignment.detach() != 0
        losses = self._loss(torch.where(defined, alignment, torch.ones_like(alignment)))
        means = losses.masked_fill(~defined, 0).sum(1) / defined.sum(1).clamp(min=1)
        return over_layers(means, self.layers)

    def _loss(self, alignment: torch.Tensor) -> torch.Tensor:
        return 1 - alignment if self.form == "one_minus" else -alignment.abs().log()
