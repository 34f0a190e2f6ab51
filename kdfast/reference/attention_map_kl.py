"""KL divergence between attention maps that already exist.

For one row with student probabilities p_s and teacher probabilities p_t, with 0 log 0 = 0,

    forward  KL(t || s) = sum_j p_t (log p_t - log p_s)
    reverse  KL(s || t) = sum_j p_s (log p_s - log p_t)
    js       (KL(t || m) + KL(s || m)) / 2,   m = (p_s + p_t) / 2

From scores S (p = softmax S) the student's gradient has a closed form, g being the row's upstream
gradient:

    forward  dS = g (p_s - p_t)
    reverse  dS = g p_s (log p_s - log p_t - KL_row)
    js       dS = g p_s (log p_s - log m - KL(s || m)_row) / 2

It is written out rather than left to autograd because it is exactly zero for equal maps, where
differentiating through log_softmax leaves the rounding error of sum_j p_j = 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def attention_map_kl(
    map_s: Tensor,
    map_t: Tensor,
    *,
    inputs: str = "probabilities",
    attention_mask: Tensor | None = None,
    direction: str = "forward",
    reduction: str = "mean",
    teacher_grad: bool = False,
) -> Tensor:
    """Reference of `kdfast.ops.attention_map_kl`."""
    if not teacher_grad:
        map_t = map_t.detach()
    map_s = map_s.to(torch.promote_types(map_s.dtype, torch.float32))
    map_t = map_t.to(map_s.dtype)
    queries, keys = map_s.shape[-2:]

    # A key is absent when it is padding, or when neither map gives it any mass; a row without keys
    # has no distribution to compare.
    absent = 0.0 if inputs == "probabilities" else -torch.inf
    visible = (map_s != absent) | (map_t != absent)
    takes_part = visible.any(-1)
    if attention_mask is not None:
        between = (1,) * (map_s.dim() - 3)
        key_mask = attention_mask.bool().view(map_s.shape[0], *between, 1, keys)
        visible = visible & key_mask
        takes_part = visible.any(-1)
        if queries == keys:
            takes_part = takes_part & key_mask.squeeze(-2)

    if inputs == "scores":
        hidden, idle = ~visible, ~takes_part[..., None]
        map_s, map_t = (
            scores.masked_fill(hidden, -torch.inf).masked_fill(idle, 0.0)
            for scores in (map_s, map_t)
        )
        rows = row_divergence(map_s, torch.log_softmax(map_t, dim=-1), direction)
    else:
        hidden = ~(visible & takes_part[..., None])
        p_s, p_t = map_s.masked_fill(hidden, 0.0), map_t.masked_fill(hidden, 0.0)
        rows = _divergence_of_probabilities(p_s, p_t, direction)
    return reduce_rows(rows, takes_part, reduction)


def _divergence_of_probabilities(p_s: Tensor, p_t: Tensor, direction: str) -> Tensor:
    if direction == "forward":
        return _weighted_log_ratio(p_t, p_s).sum(-1)
    if direction == "reverse":
        return _weighted_log_ratio(p_s, p_t).sum(-1)
    # A zero entry is on the boundary of the simplex, where d(p log p) is -inf; it stays at zero
    # under any softmax, so it gets no gradient (the mean must not give it one either).
    p_s, p_t = (torch.where(p == 0, torch.zeros_like(p), p) for p in (p_s, p_t))
    both = p_s + p_t  # twice the middle, half of which may round to 0
    return (_weighted_log_ratio(2 * p_t, both) + _weighted_log_ratio(2 * p_s, both)).sum(-1) / 4


def _weighted_log_ratio(p: Tensor, q: Tensor) -> Tensor:
    """p (log p - log q) with 0 log 0 = 0, and no gradient to either side where p = 0."""
    present = p != 0  # true for NaN, which must come out again
    p, q = (torch.where(present, value, torch.ones_like(value)) for value in (p, q))
    return p * (p.log() - q.log())


def row_divergence(scores_s: Tensor, log_t: Tensor, direction: str) -> Tensor:
    """Divergence of softmax(scores_s) [..., N] and exp(log_t) [..., N] along the last dimension.

    `log_t` are normalised log-probabilities: their gradient is given up to multiples of p_t that
    are constant along a row, which the normalisation removes.
    """
    rows: Tensor = _RowDivergence.apply(scores_s, log_t.expand_as(scores_s), direction)
    return rows


class _RowDivergence(torch.autograd.Function):
    """Backward scales the gradient made in forward, while the maps it needs are at hand."""

    @staticmethod
    def forward(ctx: Any, scores_s: Tensor, log_t: Tensor, direction: str) -> Tensor:
        log_s = torch.log_softmax(scores_s, dim=-1)
        p_s, p_t = log_s.exp(), log_t.exp()
        grad_s: Tensor | None = None
        grad_t: Tensor | None = None
        if direction == "forward":
            grad_t = _expectation(p_t, log_t - log_s)
            rows = grad_t.sum(-1)
            if ctx.needs_input_grad[0]:
                grad_s = p_s.sub_(p_t)
        elif direction == "reverse":
            terms = _expectation(p_s, log_s - log_t)
            rows = terms.sum(-1)
            if ctx.needs_input_grad[1]:
                grad_t = p_t - p_s
            if ctx.needs_input_grad[0]:
                grad_s = terms.sub_(p_s.mul_(rows.unsqueeze(-1)))
        else:
            grad_t = _expectation(p_t, _log_ratio_to_middle(log_t, log_s)).div_(2)
            terms = _expectation(p_s, _log_ratio_to_middle(log_s, log_t)).div_(2)
            from_s = terms.sum(-1)
            rows = grad_t.sum(-1) + from_s
            if ctx.needs_input_grad[0]:
                grad_s = terms.sub_(p_s.mul_(from_s.unsqueeze(-1)))
        ctx.save_for_backward(grad_s, grad_t if ctx.needs_input_grad[1] else None)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        upstream = grad_rows.unsqueeze(-1)
        grad_s, grad_t = (None if x is None else upstream * x for x in ctx.saved_tensors)
        return grad_s, grad_t, None


def _expectation(p: Tensor, values: Tensor) -> Tensor:
    """p * values, the terms of an expectation, with 0 * (anything) = 0 where p is exactly zero."""
    return values.masked_fill_(p == 0, 0.0).mul_(p)


def _log_ratio_to_middle(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p - log((p + q) / 2), exactly 0 where p = q, without overflow on either side."""
    x = log_q - log_p
    return -(x.clamp(min=0) + torch.log1p(torch.expm1(-x.abs()) / 2))


def reduce_rows(rows: Tensor, takes_part: Tensor, reduction: str) -> Tensor:
    """Rows that take no part are 0 and leave the mean; the mean of no rows is 0."""
    rows = torch.where(takes_part, rows, torch.zeros_like(rows))
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / takes_part.expand_as(rows).sum().clamp(min=1)
