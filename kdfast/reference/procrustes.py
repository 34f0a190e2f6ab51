"""Orthogonal Procrustes distance: how far two feature sets are apart, up to rotation and scale.

With X, Y the centred valid rows, each divided by its Frobenius norm, and the narrower one padded
with zeros, the squared distance after the best rotation is

    min_R |X - Y R|^2 = 2 - 2 |X^T Y|_*          (Schoenemann 1966),

|.|_* being the sum of singular values. With X^T Y = U S V^T, that is <X^T Y, Q> for Q = U V^T,
which is constant in backward since it is the best of all rotations (the envelope theorem): no
difference of singular values is divided by, so that equal ones are as good as any. Where some are
zero, Q leaves their directions out, the smallest of the subgradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdfast.reference.cka import Layers, _centre_features, _Rows, _unit_scale, _valid_rows
from kdfast.reference.product import product


def procrustes_distance(
    x_s: Layers, x_t: Layers, *, mask: Tensor | None = None, teacher_grad: bool = False
) -> Tensor:
    """Reference of `kdfast.ops.procrustes_distance`."""
    layers_s, layers_t = ([x] if isinstance(x, Tensor) else list(x) for x in (x_s, x_t))
    if not teacher_grad:
        layers_t = [y.detach() for y in layers_t]
    rows = _valid_rows(layers_s[0], mask)
    values = []
    for x, y in zip(layers_s, layers_t, strict=True):
        (x, norm_x), (y, norm_y) = _normalised(x, rows), _normalised(y, rows)
        undefined = norm_x * norm_y <= 0  # false for NaN, which must come out again
        values.append((2 - 2 * _nuclear_norm(x, y)).masked_fill(undefined, 0.0))
    return values[0] if isinstance(x_s, Tensor) else torch.stack(values)


def _normalised(x: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """The centred features over their norm, and that norm; both 0 where valid rows are equal."""
    x = _unit_scale(_centre_features(x, rows))
    squared = x.square().sum((-2, -1), keepdim=True)
    nothing = squared <= 0
    norm = squared.masked_fill(nothing, 1.0).sqrt()
    return x / norm, norm.masked_fill(nothing, 0.0)[..., 0, 0]


def _nuclear_norm(x: Tensor, y: Tensor) -> Tensor:
    """|X^T Y|_* [...]: singular values of a d_s x d_t matrix, or n x n where that is smaller."""
    if x.shape[-2] < min(x.shape[-1], y.shape[-1]):
        x, y = _in_own_basis(x), _in_own_basis(y)
    norm: Tensor = _NuclearNorm.apply(product(x.mT, y.mT), x.shape[-2])
    return norm


def _in_own_basis(x: Tensor) -> Tensor:
    """[..., n, n]: the rows' coordinates in an orthonormal basis of what they span.

    The basis is part of the rotation, and as constant in backward. (Singular values of X^T Y could
    be had from the Gram matrices alone, but as roots, with half of the digits.)
    """
    with torch.no_grad():
        basis = torch.linalg.qr(x.mT).Q
    return product(x, basis.mT)


class _NuclearNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, rows: int) -> Tensor:
        # LAPACK refuses all problems for NaN in one: that one is taken out, and put in again.
        broken = ~a.isfinite().all(-1).all(-1)[..., None, None]
        a = a.masked_fill(broken, 0.0)
        u, s, vh = torch.linalg.svd(a, full_matrices=False)
        # Sums over the rows err by about the root of their number, in units of the largest.
        rank = s > 4 * torch.finfo(s.dtype).eps * rows**0.5 * s[..., :1]
        rotation = (u * rank.unsqueeze(-2)) @ vh
        ctx.save_for_backward(rotation.masked_fill(broken, torch.nan))
        # <A, U V^T> rather than the sum of S, which the rounding of small ones makes too large.
        norm = (a * (u @ vh)).sum((-2, -1))
        return norm.masked_fill(broken[..., 0, 0], torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rotation,) = ctx.saved_tensors
        return grad[..., None, None] * rotation, None
