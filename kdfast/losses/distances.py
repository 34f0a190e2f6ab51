"""Squared Euclidean distances of all pairs of rows, without a difference per pair in memory."""

from __future__ import annotations

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
    norms = x.square().sum(1, keepdim=True) + y.square().sum(1)
    squared = norms - 2 * x @ y.T
    return squared.masked_fill(squared <= ROUNDING * torch.finfo(x.dtype).eps * norms, 0)


def root(squared: torch.Tensor) -> torch.Tensor:
    """Square root with zero gradient at 0, where that of the root is infinite."""
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
