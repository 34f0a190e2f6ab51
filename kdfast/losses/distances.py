"""Distances of all pairs of rows, without a difference per pair in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

# Inner products of the same rows differ by so many units in the last place of their norms.
ROUNDING = 8


def squared_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """‖x_i − y_j‖² = ‖x_i‖² + ‖y_j‖² − 2 ⟨x_i, y_j⟩: [B, F] and [C, F] to [B, C].

    Rows are shifted by the mean of x first (distances do not change): states whose features lie far
    from zero would lose their digits in the difference. What is 0 up to rounding is exactly 0, with
    zero gradient.
    """
    shift = x.detach().mean(0)
    x, y = x - shift, y - shift
    return _squared(x.square().sum(1), y.square().sum(1), x @ y.T)


def _squared(norms_x: torch.Tensor, norms_y: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    norms = norms_x[:, None] + norms_y
    squared = norms - 2 * inner
    return squared.masked_fill(squared <= ROUNDING * torch.finfo(norms.dtype).eps * norms, 0)


def root(squared: torch.Tensor) -> torch.Tensor:
    """Square root with zero gradient at 0, where that of the root is infinite."""
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


# Of a block of features of all rows, on a CPU: what is shifted stays in a core's cache.
BLOCK_BYTES = 1 << 20


class _Products(torch.autograd.Function):
    """x [B, N], memory [C, F ≥ N], shift s [N], with m the first N features of memory, m' = m − s:
    x m'^T [B, C], |m'|², <m', s>, |m|², and the squares of the features beyond N; [C] each.

    Block by block of features, so that of the memory's size nothing is made but its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, memory: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        inner = x.new_zeros(len(x), len(memory))
        shifted, along, own = (x.new_zeros(len(memory)) for _ in range(3))
        for block, met in _shifted(x, memory, shift):
            inner.addmm_(x[:, block], met.T)
            shifted += _squares(met)
            along.addmv_(met, shift[block])
            own += _squares(memory[:, block])
        ctx.save_for_backward(x, memory, shift)
        return inner, shifted, along, own, _squares(memory[:, x.shape[1] :]).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        inner: torch.Tensor,
        shifted: torch.Tensor,
        along: torch.Tensor,
        own: torch.Tensor,
        beyond: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        x, memory, shift = ctx.saved_tensors
        of_x, of_memory, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if of_x else None
        grad = torch.empty_like(memory) if of_memory else None
        of_met, of_shift = 2 * (shifted + own)[:, None], (along + 2 * own)[:, None]
        for block, met in _shifted(x, memory, shift):
            if grad_x is not None:
                torch.mm(inner, met, out=grad_x[:, block])
            if grad is not None:
                met.mul_(of_met).addcmul_(shift[block], of_shift).addmm_(inner.T, x[:, block])
                grad[:, block] = met
        if grad is not None and grad.shape[1] > x.shape[1]:
            last = slice(x.shape[1], None)
            torch.mul(memory[:, last], 2 * beyond[:, None].to(grad.dtype), out=grad[:, last])
        return grad_x, grad, None


def _shifted(
    x: torch.Tensor, memory: torch.Tensor, shift: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor]]:
    """m − s of a block of features, in the dtype of x; the next one takes its place."""
    width = x.shape[1]
    if x.device.type == "cpu":
        width = max(64, BLOCK_BYTES // (x.element_size() * (len(x) + len(memory))) // 64 * 64)
    room = x.new_empty(len(memory), min(width, x.shape[1]))
    for start in range(0, x.shape[1], max(width, 1)):
        block = slice(start, min(start + width, x.shape[1]))
        met = room[:, : block.stop - start]
        yield block, torch.sub(memory[:, block], shift[block], out=met)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row's squares, which takes no room."""
    return torch.linalg.vector_norm(x, dim=1).square()


@dataclass
class SamplesAndMemory:
    """What distances and cosines of B samples h_i and C memories m_j are made of. A sample may have
    fewer features than the memories: then they are zeros.

    inner: <h_i − s, m_j − s> [B, C], s being the mean sample, see squared_distances.
    """

    inner: torch.Tensor
    shifted_x: torch.Tensor
    shifted_m: torch.Tensor
    along_x: torch.Tensor
    along_m: torch.Tensor
    own_x: torch.Tensor
    own_m: torch.Tensor
    beyond: torch.Tensor
    shift: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, memory: torch.Tensor) -> SamplesAndMemory:
        """x: [B, N]; memory: [C, F], F ≥ N; float32 or float64. Once differentiable in both."""
        mean = x.detach().mean(0)
        shifted = x - mean
        inner, shifted_m, along_m, own_m, beyond = _Products.apply(shifted, memory, mean)
        return cls(
            inner,
            shifted.square().sum(1),
            shifted_m,
            shifted @ mean,
            along_m,
            x.square().sum(1),
            own_m,
            beyond,
            mean.square().sum(),
        )

    def distances(self, eps: float) -> torch.Tensor:
        """√(|h_i − m_j|² + eps) [B, C]."""
        squared = _squared(self.shifted_x, self.shifted_m, self.inner) + self.beyond
        return root(squared + eps)

    def cosines(self) -> torch.Tensor:
        """cos(h_i, m_j) [B, C], 0 where a side is 0."""
        inner = self.inner + self.along_x[:, None] + self.along_m + self.shift
        norms = root(self.own_x)[:, None] * root(self.own_m + self.beyond)
        return (inner / norms.clamp(min=1e-8)).masked_fill(norms == 0, 0)
