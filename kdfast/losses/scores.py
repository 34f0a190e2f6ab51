"""TinyBERT's attention loss: squared error between attention scores before the softmax."""

from __future__ import annotations

import torch
from torch import nn

from kdfast.losses.layers import (
    LAYER_REDUCTIONS,
    PADDINGS,
    Layers,
    as_pairs,
    choose,
    of_one_dtype,
    over_layers,
    statistics,
)


class AttentionScoreLoss(nn.Module):
    """Mean squared error between scale · Q Kᵀ of teacher and student, masked entries 0 in both.

    Args:
        match_heads: None (head counts agree), or "mean": every student head against the average of
            the teacher's scores.
        padding: "counted" (default: the official code): the mean runs over all B·H·N·N entries, of
            which masked keys add 0, and padded queries do take part. It depends on how far a batch
            is padded. "masked": the mean over valid queries and the keys they see, per sample, then
            over samples.
        layers: "sum" (TinyBERT) or "mean" over layer pairs.

    unit: "samples" (with padding="counted" exact where micro-batches are padded to one length);
    couples_samples: False.

    Memory: scores are formed, 4·B·H·N² bytes a tensor, some four of them per layer pair while
    training. AttentionKLLoss forms none.

    Source: Jiao et al., "TinyBERT", Findings of EMNLP 2020, Eq. 7, and its official code.
    """

    couples_samples = False
    unit = "samples"

    def __init__(
        self,
        *,
        match_heads: str | None = None,
        padding: str = "counted",
        layers: str = "sum",
    ) -> None:
        super().__init__()
        self.match_heads = match_heads and choose("match_heads", match_heads, ("mean",))
        self.padding = choose("padding", padding, PADDINGS)
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)

    def forward(
        self,
        query_s: Layers,
        key_s: Layers,
        query_t: Layers,
        key_t: Layers,
        attention_mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
        window: int | None = None,
        scale_s: float | None = None,
        scale_t: float | None = None,
    ) -> torch.Tensor:
        """
        query_*: [B, H, N, d]; key_*: [B, H_kv, N, d]; or sequences of them, one per layer pair.
        attention_mask: [B, N], 1 = token. causal, window (|i − j| ≤ window): further masks.
        scale_*: of the scores; None: d^-½. Returns a scalar, float32, float64 for float64.
        Raises ValueError when head counts or shapes disagree.
        """
        queries, keys = as_pairs(query_s, query_t), as_pairs(key_s, key_t)
        losses = []
        for query, key in zip(queries, keys, strict=True):
            student, teacher = zip(query, key, strict=True)
            # Scores of a half-precision product would lose the digits that are compared.
            with torch.autocast(student[0].device.type, enabled=False):
                scores_s = _scores(*student, scale_s)
                scores_t = _scores(*teacher, scale_t)
                if self.match_heads == "mean":
                    scores_t = scores_t.mean(1, keepdim=True)
                elif scores_s.shape != scores_t.shape:
                    raise ValueError(
                        f"student scores {list(scores_s.shape)} and teacher scores "
                        f"{list(scores_t.shape)} must agree in heads: set match_heads='mean'"
                    )
                seen, valid = _seen(scores_s, attention_mask, causal, window)
                squares = (scores_s - scores_t).square().masked_fill(~seen, 0)
                if self.padding == "counted":
                    losses.append(squares.mean())
                    continue
                pairs = (seen & valid[:, None, :, None]).expand(len(squares), 1, *seen.shape[2:])
                totals = squares.masked_fill(~pairs, 0).sum((1, 2, 3))
                counts = pairs.sum((1, 2, 3)).clamp(min=1) * squares.shape[1]
                losses.append((totals / counts).mean())
        return over_layers(torch.stack(losses), self.layers)


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """scale · Q Kᵀ [B, H, N, N]; query head h uses key head h // (H / H_kv)."""
    query, key = of_one_dtype((statistics(query), statistics(key)))
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key heads must divide query heads, were {key.shape[1]} and {query.shape[1]}"
        )
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query * scale) @ key.transpose(-1, -2)


def _seen(
    scores: torch.Tensor, attention_mask: torch.Tensor | None, causal: bool, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which keys a query sees [B, 1, N, N] (or broadcastable), and which queries are tokens."""
    batch, _, length, _ = scores.shape
    if attention_mask is None:
        valid = scores.new_ones(batch, length, dtype=torch.bool)
    else:
        valid = attention_mask.bool()
    place = torch.arange(length, device=scores.device)
    apart = place[:, None] - place
    seen = torch.ones_like(apart, dtype=torch.bool)
    if causal:
        seen &= apart >= 0
    if window is not None:
        seen &= apart.abs() <= window
    return valid[:, None, None, :] & seen, valid
