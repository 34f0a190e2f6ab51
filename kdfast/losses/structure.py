"""Feature structure distillation: kernel alignment between teacher and student states."""

from __future__ import annotations

import torch
from torch import nn

from kdfast.losses.distributed import alone, gather_batch, gather_batches
from kdfast.losses.layers import (
    LAYER_REDUCTIONS,
    PADDINGS,
    Layers,
    as_pairs,
    choose,
    of_one_dtype,
    over_layers,
)
from kdfast.ops.cka import MINIMUM_ROWS, cka

FORMS = {
    "neg_log": lambda alignment: -alignment.abs().log(),
    "one_minus": lambda alignment: 1 - alignment,
    "one_minus_root": lambda alignment: 1 - alignment.sqrt(),
}
LOG_OF_MEAN = "neg_log_of_mean"
ROWS = ("tokens", "samples", "all_tokens")


def alignment_loss(alignment: torch.Tensor, form: str) -> torch.Tensor:
    """The loss of each alignment [...], 0 with zero gradient where CKA is undefined."""
    return FORMS[form](_defined(alignment, form))


def _defined(alignment: torch.Tensor, form: str) -> torch.Tensor:
    """1, the alignment without loss, in place of what is undefined.

    Exactly 0 says that CKA is: too few valid rows, or all of them equal. Such problems leave before
    the logarithm or root, since 0 · ∞ in backward would be NaN; the root takes a rounded −0 along.
    """
    value = alignment.detach()
    undefined = value <= 0 if form == "one_minus_root" else value == 0
    return alignment.masked_fill(undefined, 1)


class CKALoss(nn.Module):
    """1 − CKA or −log CKA between hidden states; widths may differ, no projection is needed.

    Args:
        rows: what the kernel compares. "tokens": the tokens within one sample, one problem a
            sample, mean over samples (FSD's intra-feature structure, Eq. 6). "samples": the samples
            of the batch, each with its token states side by side (FSD's local inter-feature
            structure, Eq. 7). "all_tokens": the tokens of the whole batch (hidden state matching).
        estimator: "biased" (FSD's) or "unbiased". At n = 32 rows of 768 features the biased CKA of
            independent data is near 1, almost flat as a loss; the unbiased one is near 0 there.
        form: "neg_log" (default: FSD's −log|CKA|, mean of the logarithms, Eq. 6), "neg_log_of_mean"
            (−log(mean|CKA| + 1e-8), what FSD's code does), "one_minus", or "one_minus_root"
            (1 − √CKA, the ratio of norms of hidden state matching). Only "one_minus" goes with
            the unbiased estimate, which may be negative.
        padding: "masked" (default: padding says nothing of a sample): padded tokens are no rows,
            and zero within rows="samples". "counted": they are as any other, FSD's unmasked form.
        kernel, bandwidth: see kdfast.cka.
        layers: "mean" (FSD's layer-wise mode) or "sum" over layer pairs.
        backend: see kdfast.cka.

    A problem without enough valid rows (fewer than 2, or 4 unbiased), or with equal ones, counts as
    a loss of 0 in the mean over all samples; a last batch with too few samples gives 0.

    unit: "samples". couples_samples: True for rows "samples" and "all_tokens", and for
    form="neg_log_of_mean": micro-batches do not add up to the joined batch there. Under
    torch.distributed these see the batch of all ranks (gather_batch), so that every rank must call
    them. Tokens within a sample (rows="tokens", other forms) couple nothing.

    Source: Jung et al. 2023, Eq. 6 and 7; Dasgupta and Cohn 2025 ("all_tokens", "one_minus_root").
    """

    unit = "samples"

    def __init__(
        self,
        rows: str = "tokens",
        *,
        estimator: str = "biased",
        form: str = "neg_log",
        padding: str = "masked",
        kernel: str = "linear",
        bandwidth: float | None = None,
        layers: str = "mean",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.rows = choose("rows", rows, ROWS)
        self.estimator = choose("estimator", estimator, tuple(MINIMUM_ROWS))
        self.form = choose("form", form, (*FORMS, LOG_OF_MEAN))
        if form != "one_minus" and estimator == "unbiased":
            raise ValueError(
                f'form="{form}" needs estimator="biased": the unbiased estimate may be negative; '
                'use form="one_minus"'
            )
        self.padding = choose("padding", padding, PADDINGS)
        self.couples_samples = rows != "tokens" or form == LOG_OF_MEAN
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
        sides = [of_one_dtype(side) for side in zip(*pairs, strict=True)]
        mask = attention_mask if self.padding == "masked" else None
        if self.rows == "samples":
            sides, mask = self._samples(sides, mask), None
        elif self.rows == "all_tokens":
            sides, mask = self._all_tokens(sides, mask)
        first = sides[0][0]
        if first.shape[-2] < MINIMUM_ROWS[self.estimator]:
            alignment = torch.stack([(x * 0).sum((-2, -1)) for x in sides[0]])
            alignment = alignment.to(torch.promote_types(first.dtype, torch.float32))
        else:
            alignment = cka(
                *sides,
                mask=mask,
                kernel=self.kernel,
                bandwidth=self.bandwidth,
                estimator=self.estimator,
                backend=self.backend,
            )
        alignment = alignment.view(len(pairs), -1)
        if self.form == LOG_OF_MEAN:
            alignment = _defined(alignment, self.form).abs()
            if self.rows == "tokens":
                alignment = gather_batch(alignment.T).T
            losses = -(alignment.mean(1) + 1e-8).log()
        else:
            losses = alignment_loss(alignment, self.form).mean(1)
        return over_layers(losses, self.layers)

    def _samples(
        self, sides: list[list[torch.Tensor]], mask: torch.Tensor | None
    ) -> list[list[torch.Tensor]]:
        """[ΣB, N·D] of each layer: shorter batches of other ranks are extended by zeros."""
        if mask is not None:
            padded = ~mask.bool()[..., None]
            sides = [[x.masked_fill(padded, 0) for x in side] for side in sides]
        gathered = [x.flatten(1) for x in gather_batches([x for side in sides for x in side])]
        return [gathered[: len(sides[0])], gathered[len(sides[0]) :]]

    def _all_tokens(
        self, sides: list[list[torch.Tensor]], mask: torch.Tensor | None
    ) -> tuple[list[list[torch.Tensor]], torch.Tensor | None]:
        """[1, ΣB·N, D] of each layer and the mask [1, ΣB·N]."""
        if mask is None and not alone():  # batches of other ranks may be longer
            mask = sides[0][0].new_ones(sides[0][0].shape[:2], dtype=torch.bool)
        tensors = [x for side in sides for x in side]
        if mask is not None:
            mask, *tensors = gather_batches([mask.bool(), *tensors])
            mask = mask.flatten()[None]
        tokens = [x.flatten(0, 1)[None] for x in tensors]
        return [tokens[: len(sides[0])], tokens[len(sides[0]) :]], mask
