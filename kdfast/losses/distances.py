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


# Of a block of features of all rows: what is shifted stays in a core's cache, and on a GPU small.
BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


class _Products(torch.autograd.Function):
    """x [B, N], memory [C, F ≥ N], shift s [N], with m the first N features of memory:
    x m^T and (x − s) (m − s)^T [B, C]; |m|², |m − s|² and the squares of the features beyond N [C].

    Block by block of features, so that of the memory's size nothing is made but its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, memory: torch.Tensor, shift: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        product, inner = (x.new_zeros(len(x), len(memory)) for _ in range(2))
        own, shifted = (x.new_zeros(len(memory)) for _ in range(2))
        for block, met, moved in _blocks(x, memory, shift):
            product.addmm_(x[:, block], met.T)
            inner.addmm_(x[:, block] - shift[block], moved.T)
            own += _squares(met)
            shifted += _squares(moved)
        ctx.save_for_backward(x, memory, shift)
        beyond = _squares(memory[:, x.shape[1] :].to(x.dtype))
        return product, inner, own, shifted, beyond

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        product: torch.Tensor,
        inner: torch.Tensor,
        own: torch.Tensor,
        shifted: torch.Tensor,
        beyond: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        x, memory, shift = ctx.saved_tensors
        of_x, of_memory, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if of_x else None
        grad = torch.empty_like(memory) if of_memory else None
        # (product + inner)^T x + 2 (own + shifted) m, less what of it s takes away.
        both, squares = product + inner, 2 * (own + shifted)[:, None]
        less = -(2 * shifted + inner.sum(0))[:, None]
        for block, met, _ in _blocks(x, memory, shift, moved=False):
            if grad_x is not None:
                taken = torch.outer(inner.sum(1), shift[block])
                grad_x[:, block] = (both @ met).sub_(taken)
            if grad is not None:
                part = (both.T @ x[:, block]).addcmul_(met, squares)
                grad[:, block] = part.addcmul_(shift[block], less)
        if grad is not None and grad.shape[1] > x.shape[1]:
            last = slice(x.shape[1], None)
            grad[:, last] = memory[:, last] * (2 * beyond[:, None]).to(grad.dtype)
        return grad_x, grad, None


def _blocks(
    x: torch.Tensor, memory: torch.Tensor, shift: torch.Tensor, *, moved: bool = True
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Of each block of features m and m − s, in the dtype of x; the next m − s takes its place."""
    size = BLOCK_BYTES.get(x.device.type, BLOCK_BYTES["cuda"])
    width = max(64, size // (x.element_size() * (len(x) + len(memory))) // 64 * 64)
    # Where tensors are traced, none may be written into a part of another.
    room = None if torch.compiler.is_compiling() else x.new_empty(len(memory) * width)
    for start in range(0, x.shape[1], width):
        block = slice(start, min(start + width, x.shape[1]))
        met = memory[:, block].to(x.dtype)
        if not moved:
            yield block, met, met
        elif room is None:
            yield block, met, met - shift[block]
        else:
            out = room[: met.numel()].view(met.shape)
            yield block, met, torch.sub(met, shift[block], out=out)


def _squares(x: torch.Tensor) -> torch.Tensor:
    """The sum of each row's squares, which takes no room."""
    return torch.linalg.vector_norm(x, dim=1).square()


@dataclass
class SamplesAndMemory:
    """What distances and cosines of B samples h_i and C memories m_j are made of. A sample may have
    fewer features than the memories: then they are zeros.

    product: <h_i, m_j> [B, C]; inner: <h_i − s, m_j − s>, s being the mean sample, see
    squared_distances; own_x, own_m: |h_i|² [B] and |m_j|² [C]; shifted_x, shifted_m: |h_i − s|² and
    |m_j − s|²; these of the features that samples have, and beyond: the squares of the others [C].
    """

    product: torch.Tensor
    inner: torch.Tensor
    own_x: torch.Tensor
    own_m: torch.Tensor
    shifted_x: torch.Tensor
    shifted_m: torch.Tensor
    beyond: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, memory: torch.Tensor) -> SamplesAndMemory:
        """x: [B, N], float32 or float64; memory: [C, F], F ≥ N, read in the dtype of x. Once
        differentiable in both."""
        shift = x.detach().mean(0)
        product, inner, own_m, shifted_m, beyond = _Products.apply(x, memory, shift)
        own_x, shifted_x = x.square().sum(1), (x - shift).square().sum(1)
        return cls(product, inner, own_x, own_m, shifted_x, shifted_m, beyond)

    def distances(self, eps: float) -> torch.Tensor:
        """√(|h_i − m_j|² + eps) [B, C]."""
        squared = _squared(self.shifted_x, self.shifted_m, self.inner) + self.beyond
        return root(squared + eps)

    def cosines(self) -> torch.Tensor:
        """cos(h_i, m_j) [B, C], 0 where a side is 0."""
        norms = root(self.own_x)[:, None] * root(self.own_m + self.beyond)
        return self.product / norms.clamp(min=1e-8)
