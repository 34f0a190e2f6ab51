"""Terms of the divergences, which the kernels that make scores and those that read them share."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def weighted(p, values):
    """p * values, 0 where p is exactly 0."""
    return tl.where(p == 0.0, 0.0, p * values)


@triton.jit
def to_middle(difference):
    """log p_s - log m and log p_t - log m, of difference = log p_t - log p_s, m their mean.

    With y the difference these are -max(y, 0) - g and min(y, 0) - g for g = log((1 + e^-|y|) / 2);
    near 0 the series of log cosh(y / 2) = g + |y| / 2 keeps the digits of y.
    """
    size = tl.abs(difference)
    z = difference * difference
    series = tl.fma(z, -17.0 / 645120, 1.0 / 2880)
    series = z * tl.fma(z, tl.fma(z, series, -1.0 / 192), 0.125)
    far = tl.log2(tl.fma(tl.exp2(size * -LOG2_E), 0.5, 0.5)) * LN_2
    g = tl.where(size < 0.5, series - 0.5 * size, far)
    return -(tl.maximum(difference, 0.0) + g), tl.minimum(difference, 0.0) - g
