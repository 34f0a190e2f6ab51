"""KL divergence between two attentions, from their queries and keys.

Each side's map is p = softmax(scale Q K^T / temperature) over the keys that a row may see; the
divergence of two rows and its gradient dS are those of `attention_map_kl`, and then
dQ = (scale / temperature) dS K and dK = (scale / temperature) dS^T Q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.reference.attention_map_kl import reduce_rows, row_divergence
from kdfast.reference.product import product


def attention_kl(
    query_s: Tensor | Sequence[Tensor],
    key_s: Tensor | Sequence[Tensor],
    query_t: Tensor | Sequence[Tensor],
    key_t: Tensor | Sequence[Tensor],
    *,
    attention_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale_s: float | Sequence[float] | None = None,
    scale_t: float | Sequence[float] | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
    reduction: str = "mean",
    relation_heads: int | None = None,
    match_heads: str | None = None,
    teacher_grad: bool = False,
) -> Tensor | list[Tensor]:
    """Reference of `kdfast.ops.attention_kl`: one dense map per side and layer pair.

    Memory grows with Nq x Nk, for packed sequences with the square of their total.
    """
    arguments: tuple[Any, ...] = (query_s, key_s, query_t, key_t, scale_s, scale_t)
    pairs = 1 if isinstance(query_s, Tensor) else len(query_s)
    columns = [x if isinstance(x, Sequence) else [x] * pairs for x in arguments]
    packed = cu_seqlens is not None
    length = 0 if packed else 2
    visible, takes_part = _visibility(
        columns[0][0].shape[length],
        columns[1][0].shape[length],
        attention_mask=attention_mask,
        query_mask=query_mask[None] if packed and query_mask is not None else query_mask,
        causal=causal,
        window=window,
        cu_seqlens=cu_seqlens,
        device=columns[0][0].device,
    )
    # Where all rows see the same keys, a hidden score belongs to a key or a row that is zeroed, and
    # adding -inf hides it; a key hidden from some rows only may hold NaN, which must be replaced.
    alike = not causal and window is None and not packed
    counted = seen = elsewhere = takes_part  # torch.compile reads also the cells that nothing uses
    if visible is not None:
        counted = visible & takes_part[..., None]
        seen = counted.any(-2)[..., None]
        # A row without keys gets equal scores rather than -inf, whose softmax would be NaN.
        elsewhere = torch.where(takes_part, -torch.inf, 0.0)[..., None].expand_as(counted)
        elsewhere = elsewhere.to(torch.promote_types(columns[0][0].dtype, torch.float32))
        elsewhere = elsewhere.masked_fill(counted, 0.0)

    def scores(query: Tensor, key: Tensor, scale: float | None) -> Tensor:
        if visible is None:
            return _scores(query, key, scale, temperature, relation_heads)
        differentiable = query.requires_grad or key.requires_grad
        if differentiable:
            # What padding holds (NaN, say) must not reach a gradient as 0 * NaN.
            query, key = torch.where(takes_part[..., None], query, 0.0), torch.where(seen, key, 0.0)
        values = _scores(query, key, scale, temperature, relation_heads)
        if differentiable and alike:
            return values.add_(elsewhere)
        return torch.where(counted, values, elsewhere)

    def divergence(
        query_s: Tensor,
        key_s: Tensor,
        query_t: Tensor,
        key_t: Tensor,
        scale_s: float | None,
        scale_t: float | None,
    ) -> Tensor:
        tensors = [query_s, key_s, *(x if teacher_grad else x.detach() for x in (query_t, key_t))]
        if packed:  # [total, H, d]: one batch element whose sequences do not see each other
            tensors = [x.transpose(0, 1).unsqueeze(0) for x in tensors]
        query_s, key_s, query_t, key_t = tensors
        log_t = torch.log_softmax(scores(query_t, key_t, scale_t), dim=-1)
        if match_heads == "mean":
            log_t = _log_mean_over_heads(log_t)
        rows = row_divergence(scores(query_s, key_s, scale_s), log_t, direction)
        losses = reduce_rows(rows, takes_part, reduction)
        return losses.squeeze(0) if packed and reduction == "none" else losses

    losses = [divergence(*pair) for pair in zip(*columns, strict=True)]
    if isinstance(query_s, Tensor):
        return losses[0]
    return losses if reduction == "none" else torch.stack(losses)


def _visibility(
    queries: int,
    keys: int,
    *,
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    device: torch.device,
) -> tuple[Tensor | None, Tensor]:
    """Which keys each query sees [B | 1, 1, Nq, Nk], and which rows take part [B | 1, 1, Nq].

    None for the former when every row takes part and sees every key.
    """
    given = (attention_mask, query_mask, window, cu_seqlens)
    if not causal and all(option is None for option in given):
        return None, torch.ones(1, 1, queries, dtype=torch.bool, device=device)
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    row = torch.arange(queries, device=device)[:, None] + (keys - queries)  # bottom-right aligned
    column = torch.arange(keys, device=device)[None, :]
    if causal:
        visible = visible & (column <= row)
    if window is not None:
        visible = visible & ((row - column).abs() <= window)
    if cu_seqlens is not None:
        position = torch.arange(keys, device=device)
        sequence = torch.bucketize(position, cu_seqlens[1:].to(position.dtype), right=True)
        packed = position < cu_seqlens[-1]
        visible = visible & (sequence[:, None] == sequence[None, :]) & packed[:, None]
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    takes_part = visible.any(-1)
    if query_mask is None and queries == keys:
        query_mask = attention_mask
    if query_mask is not None:
        takes_part = takes_part & query_mask.bool()[:, None, :]
    return visible, takes_part


def _scores(
    query: Tensor,
    key: Tensor,
    scale: float | None,
    temperature: float,
    relation_heads: int | None,
) -> Tensor:
    """scale Q K^T / temperature [B, H, Nq, Nk], in float32 or better."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    if relation_heads is not None:  # MiniLMv2: concatenate the heads, cut into relation heads
        query, key = (
            x.transpose(1, 2).flatten(2).unflatten(2, (relation_heads, -1)).transpose(1, 2)
            for x in (query, key)
        )
    if scale is None:
        scale = query.shape[-1] ** -0.5
    # The factor goes to the smaller side of the product.
    return product(query * (scale / temperature), key)


def _log_mean_over_heads(log_p: Tensor) -> Tensor:
    """log of the average map [B, 1, Nq, Nk]; keys that no head sees stay at -inf."""
    nowhere = (log_p == -torch.inf).all(dim=1, keepdim=True)
    # logsumexp of nothing but -inf has NaN for a gradient, so these are put back afterwards.
    log_mean = log_p.masked_fill(nowhere, 0.0).logsumexp(dim=1, keepdim=True)
    return (log_mean - math.log(log_p.shape[1])).masked_fill(nowhere, -torch.inf)
