"""Losses that couple samples see the whole batch: the rows of all ranks, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed

# Of each default group, the one whose processes tell each other sizes without their devices.
_HOSTS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


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

    Every rank of the default group must call it, as often and in the same order. Sizes are told
    from host to host (by gloo, beside nccl), so that none waits for its device.
    """
    return gather_batches([x])[0]


def gather_batches(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """gather_batch of each, as many on every rank; sizes are told once for all of them."""
    if alone():
        return list(tensors)
    sizes = torch.tensor([_size(x) for x in tensors])
    of_ranks = [torch.empty_like(sizes) for _ in range(distributed.get_world_size())]
    distributed.all_gather(of_ranks, sizes, group=_hosts())
    shapes = torch.stack(of_ranks, dim=1).tolist()
    return [_Gather.apply(x, of_x) for x, of_x in zip(tensors, shapes, strict=True)]


def alone() -> bool:
    """Whether there is no other rank."""
    started = distributed.is_available() and distributed.is_initialized()
    return not started or distributed.get_world_size() == 1


class _Gather(torch.autograd.Function):
    """shapes: [B, N] of each rank's x; N = 1 where it has none."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, shapes: list[list[int]]) -> torch.Tensor:
        rows = [size for size, _ in shapes]
        own = _size(x)
        longest = [max(column) for column in zip(*shapes, strict=True)]
        first = sum(rows[: distributed.get_rank()])
        ctx.own = (slice(first, first + len(x)), *(slice(size) for size in x.shape[1:2]))
        ctx.ranks = len(shapes)
        # Not every backend moves booleans.
        moved = x.contiguous().view(torch.uint8) if x.dtype == torch.bool else x.contiguous()
        if own != longest:
            padded = moved.new_zeros(*longest[: x.dim()], *x.shape[2:])
            padded[tuple(slice(size) for size in x.shape[:2])] = moved
            moved = padded
        gathered = moved.new_empty(ctx.ranks * longest[0], *moved.shape[1:])
        # Its older name warns that it will go.
        gather = getattr(distributed, "all_gather_single", None)
        (gather or distributed.all_gather_into_tensor)(gathered, moved)
        if min(rows) < longest[0]:
            parts = gathered.split(longest[0])
            gathered = torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])
        return gathered.view(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad[ctx.own] * ctx.ranks, None


def _size(x: torch.Tensor) -> list[int]:
    return [len(x), x.shape[1] if x.dim() > 1 else 1]


def _hosts() -> Any:
    """The default group where gloo moves its tensors of the CPU, else one of gloo, made once."""
    default = distributed.group.WORLD
    if "cpu:gloo" in distributed.get_backend_config(default):
        return default
    if default not in _HOSTS:
        _HOSTS[default] = distributed.new_group(backend="gloo")
    return _HOSTS[default]
