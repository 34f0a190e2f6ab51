"""Losses that couple samples see the whole batch: the rows of all ranks, with gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def gather_batch(x: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, in rank order: [B_r, ...] of each to [Σ B_r, ...].

    Every rank then computes the same loss L of the whole batch. In backward each takes its own rows
    of dL/dx, times the number of ranks and without communication: averaging the parameters'
    gradients over ranks, as DistributedDataParallel does, turns that into the gradient of L.

    Args:
        x: [B], [B, N] or [B, N, ...], any dtype. B and N may differ between ranks: dim 1 is
            extended by zeros to the longest (a mask stays a mask), the other sizes agree.

    Returns:
        [Σ B, ...], dim 1 the longest; x itself without torch.distributed or on a single rank.

    Every rank of the default group must call it, as often and in the same order.
    """
    if alone():
        return x
    gathered: torch.Tensor = _Gather.apply(x)
    return gathered


def alone() -> bool:
    """Whether there is no other rank."""
    started = distributed.is_available() and distributed.is_initialized()
    return not started or distributed.get_world_size() == 1


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ranks = distributed.get_world_size()
        sizes = _all_gather(torch.tensor(x.shape[:2], device=x.device))
        shapes = torch.stack(sizes).tolist()
        longest = [max(column) for column in zip(*shapes, strict=True)]
        # Not every backend moves booleans.
        padded = x.new_zeros(*longest, *x.shape[2:], dtype=_moved(x.dtype))
        padded[tuple(slice(size) for size in x.shape[:2])] = x
        rows = [shape[0] for shape in shapes]
        first = sum(rows[: distributed.get_rank()])
        ctx.own = (slice(first, first + len(x)), *(slice(size) for size in x.shape[1:2]))
        ctx.ranks = ranks
        parts = _all_gather(padded)
        return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)]).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad[ctx.own] * ctx.ranks


def _all_gather(x: torch.Tensor) -> list[torch.Tensor]:
    parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, x)
    return parts


def _moved(dtype: torch.dtype) -> torch.dtype:
    return torch.uint8 if dtype == torch.bool else dtype
