"""Inner products of centred Gram matrices of features, on three sides.

With X_c the centred valid rows of a layer, G = X_c X_cᵀ / |X_c|² (linear) or
(exp(-|x_i - x_j|² / 2σ²) - c) / (1 - c) (rbf), n valid rows, r and R the row sums and total of G,

    biased    <G, G'> - 2/n Σ r r' + R R' / n²
    unbiased  <G, G'> - 2/(n-2) Σ r r' + R R' / ((n-1)(n-2)), everything off the diagonal.

For linear kernels r vanishes, or is minus the diagonal; there G is centred before the product,
which cancels nothing. Backward is dX = 2 M X_c / |X_c|² with M_i = Σ_j c_ij G_j of centred G_j, for
rbf 2 (W - diag(W 1)) X_c / (σ² (1 - c)) with W = M ∘ exp(-|x_i - x_j|² / 2σ²).

    tiles    Linear, up to ON_CHIP rows, every layer in one pair: both Gram matrices of a pair stay
             on chip, all pairs and problems in one launch; backward makes them again. Otherwise
             strips of rows of all Gram matrices pass through a workspace of WORKSPACE bytes.
    gram     Gram matrices, features read once up to ONE_TILE rows, then everything from them.
    feature  <G, G'> = |X_cᵀ X'_c|² / (|X_c|² |X'_c|²); backward dX = Σ_j c_ij X_j (X_jᵀ X_i) and,
             if unbiased, the diagonal's part.

Features are centred in float32 (first by a valid row, which keeps the digits of features far from
zero and makes equal rows exactly zero, then by the mean) and only then rounded for a product: to
their own dtype, and where one kernel multiplies layers of two dtypes, to the wider. All
sums over programs are partial sums, added in a fixed order: results repeat bit by bit, and equal
layers have equal inner products. For the latter no multiplication and addition are contracted
(`enable_fp_fusion`), and what one pair computes as a block and another as its transpose, both
compute the same way round.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.launch import widest

LOG2_E = tl.constexpr(1.4426950408889634)
EPS = tl.constexpr(2.0**-23)


@triton.jit
def _of(values, index):
    """values[index]; the alignment that all have in common survives."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def _valid(mask, problem, row, n):
    """Which rows of a problem take part."""
    inside = row < n
    if mask is not None:
        at = mask + tl.cast(problem, tl.int64) * n + row
        inside = inside & (tl.load(at, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _whole(x, row_stride, first, row, valid, count, column, d):
    """A problem whose rows all lie in the tile: its centred features [rows, BLOCK_D], the means."""
    inside = column < d
    at = x + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    tile = tl.load(at, mask=valid[:, None] & inside[None, :], other=0.0).to(tl.float32)
    at = x + tl.cast(first, tl.int64) * row_stride + column
    start = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    start = tl.where(count > 0.0, start, 0.0)
    shifted = tl.where(valid[:, None], tile - start[None, :], 0.0)
    mean = tl.sum(shifted, 0) / tl.maximum(count, 1.0)
    return tl.where(valid[:, None], shifted - mean[None, :], 0.0), start + mean


@triton.jit
def _centred(x, row_stride, start, mean, row, valid, column, d):
    """Centred features [rows, BLOCK_D] where the means are known, relative to the row `start`."""
    inside = column < d
    at = x + row.to(tl.int64)[:, None] * row_stride + column[None, :]
    inside_tile = valid[:, None] & inside[None, :]
    tile = tl.load(at, mask=inside_tile, other=0.0).to(tl.float32)
    tile -= tl.load(start + column, mask=inside, other=0.0)[None, :]
    tile -= tl.load(mean + column, mask=inside, other=0.0)[None, :]
    return tl.where(inside_tile, tile, 0.0)


@triton.jit
def _gram_on_chip(
    x,
    row_stride,
    first,
    row,
    valid,
    count,
    means,
    begin,
    end,
    d,
    KEEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """X_c X_cᵀ over the features begin..end."""
    gram = tl.zeros([row.shape[0], row.shape[0]], tl.float32)
    for step in range(begin, end, BLOCK_D):
        column = step + tl.arange(0, BLOCK_D)
        tile, mean = _whole(x, row_stride, first, row, valid, count, column, d)
        tile = tile.to(OPERAND)
        gram = tl.dot(tile, tl.trans(tile), gram, input_precision=PRECISION)
        if KEEP:
            tl.store(means + column, mean, mask=column < d)
    return gram


@triton.jit
def _hollow(gram, row, valid, count):
    """Off the diagonal: the sum of squares, and the U-centred matrix; `gram` is symmetric.

    Without `valid`, rows and columns that are dropped hold anything.
    """
    off = row[:, None] != row[None, :]
    if valid is not None:
        off = off & valid[:, None] & valid[None, :]
    gram = tl.where(off, gram, 0.0)
    sums = tl.sum(gram, 0)
    few = tl.maximum(count - 2.0, 1.0)
    total = tl.sum(gram) / (few * tl.maximum(count - 1.0, 1.0))
    centred = gram - sums[:, None] / few - sums[None, :] / few + total
    return tl.sum(gram * gram), tl.where(off, centred, 0.0)


@triton.jit
def _over_unit(gram, unit, norms, row, valid, count, n, KEEP: tl.constexpr, UNBIASED: tl.constexpr):
    """G, centred, and its product with itself; writes unit and diagonal."""
    diagonal = tl.where(row[:, None] == row[None, :], gram, 0.0)
    total = tl.sum(diagonal)
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(unit, total)
    if KEEP:
        tl.store(norms + row, tl.sum(diagonal, 0) / total, mask=row < n)
    gram = gram / total
    if UNBIASED:
        size, gram = _hollow(gram, row, valid, count)
        own = tl.sum(gram * gram)
        own = tl.where(own <= count * EPS * 2.0 * size, 0.0, own)
    else:
        own = tl.sum(gram * gram)
    return gram, own


@triton.jit
def _pairs_forward(
    inner,
    unit,
    means,
    kept,
    x_s,
    x_t,
    mask,
    first,
    counts,
    d_s,
    d_t,
    problem_strides_s,
    problem_strides_t,
    row_strides_s,
    row_strides_t,
    layers_s,
    layers_t,
    means_s,
    means_t,
    rows_cross,
    rows_s,
    rows_t,
    problems,
    n,
    KEEP: tl.constexpr,
    UNBIASED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One problem of one pair: the three inner products; a row of `inner` below 0 is not asked."""
    p, pair = tl.program_id(0) % problems, tl.program_id(0) // problems
    problem = tl.cast(p, tl.int64)
    row = tl.arange(0, BLOCK)
    valid = _valid(mask, p, row, n)
    count = tl.load(counts + p)
    start = 0
    if first is not None:
        start = tl.load(first + p)

    at_means = means + _of(means_s, pair) + problem * _of(d_s, pair)
    at = _of(x_s, pair) + problem * _of(problem_strides_s, pair)
    gram_s = _gram_on_chip(
        at, _of(row_strides_s, pair), start, row, valid, count, at_means, 0, _of(d_s, pair),
        _of(d_s, pair), KEEP, OPERAND, PRECISION, BLOCK_D,
    )  # fmt: skip
    at_layer = tl.cast(_of(layers_s, pair), tl.int64) * problems + p
    gram_s, own_s = _over_unit(
        gram_s, unit + at_layer, kept + at_layer * n, row, valid, count, n, KEEP, UNBIASED
    )
    at_means = means + _of(means_t, pair) + problem * _of(d_t, pair)
    at = _of(x_t, pair) + problem * _of(problem_strides_t, pair)
    gram_t = _gram_on_chip(
        at, _of(row_strides_t, pair), start, row, valid, count, at_means, 0, _of(d_t, pair),
        _of(d_t, pair), KEEP, OPERAND, PRECISION, BLOCK_D,
    )  # fmt: skip
    at_layer = tl.cast(_of(layers_t, pair), tl.int64) * problems + p
    gram_t, own_t = _over_unit(
        gram_t, unit + at_layer, kept + at_layer * n, row, valid, count, n, KEEP, UNBIASED
    )
    cross = tl.sum(gram_s * gram_t)
    to_cross, to_s, to_t = _of(rows_cross, pair), _of(rows_s, pair), _of(rows_t, pair)
    tl.store(inner + tl.cast(to_cross, tl.int64) * problems + p, cross, mask=to_cross >= 0)
    tl.store(inner + tl.cast(to_s, tl.int64) * problems + p, own_s, mask=to_s >= 0)
    tl.store(inner + tl.cast(to_t, tl.int64) * problems + p, own_t, mask=to_t >= 0)


@triton.jit
def _gradient_on_chip(
    out,
    m,
    factor,
    x,
    row_stride,
    first,
    row,
    valid,
    count,
    n,
    d,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """factor m X_c."""
    m = m.to(OPERAND)
    for begin in range(0, d, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        tile, _ = _whole(x, row_stride, first, row, valid, count, column, d)
        gradient = tl.dot(m, tile.to(OPERAND), input_precision=PRECISION) * factor
        gradient = tl.where(valid[:, None], gradient, 0.0).to(out.dtype.element_ty)
        inside = (row < n)[:, None] & (column < d)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * d + column[None, :], gradient, mask=inside)


@triton.jit
def _pairs_backward(
    out,
    grad,
    unit,
    x_s,
    x_t,
    mask,
    first,
    counts,
    d_s,
    d_t,
    problem_strides_s,
    problem_strides_t,
    row_strides_s,
    row_strides_t,
    layers_s,
    layers_t,
    rows_cross,
    rows_s,
    grad_strides,
    problems,
    n,
    UNBIASED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OPERAND_M: tl.constexpr,
    PRECISION_M: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One problem of one pair: the gradient of the first layer."""
    p, pair = tl.program_id(0) % problems, tl.program_id(0) // problems
    problem = tl.cast(p, tl.int64)
    row = tl.arange(0, BLOCK)
    valid = _valid(mask, p, row, n)
    count = tl.load(counts + p)
    start = 0
    if first is not None:
        start = tl.load(first + p)

    grad += problem * grad_strides[1]
    to_cross, to_own = _of(rows_cross, pair), _of(rows_s, pair)
    cross = tl.load(
        grad + tl.cast(to_cross, tl.int64) * grad_strides[0], mask=to_cross >= 0, other=0.0
    )
    own = tl.load(grad + tl.cast(to_own, tl.int64) * grad_strides[0], mask=to_own >= 0, other=0.0)

    width_t = _of(d_t, pair)
    at = _of(x_t, pair) + problem * _of(problem_strides_t, pair)
    gram = _gram_on_chip(
        at, _of(row_strides_t, pair), start, row, valid, count, at, 0, width_t, width_t,
        False, OPERAND, PRECISION, BLOCK_D,
    )  # fmt: skip
    m = gram * (cross / tl.load(unit + tl.cast(_of(layers_t, pair), tl.int64) * problems + p))
    width = _of(d_s, pair)
    at = _of(x_s, pair) + problem * _of(problem_strides_s, pair)
    row_stride = _of(row_strides_s, pair)
    gram = _gram_on_chip(
        at, row_stride, start, row, valid, count, at, 0, width, width,
        False, OPERAND, PRECISION, BLOCK_D,
    )  # fmt: skip
    unit_s = tl.load(unit + tl.cast(_of(layers_s, pair), tl.int64) * problems + p)
    m += gram * (2.0 * own / unit_s)
    if UNBIASED:  # linear, so that one does for both
        _, m = _hollow(m, row, None, count)
    _gradient_on_chip(
        _of(out, pair) + problem * n * width, m, 2.0 / unit_s, at, row_stride, start, row, valid,
        count, n, width, OPERAND_M, PRECISION_M, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _whole_gram(
    out,
    means,
    x,
    mask,
    first,
    counts,
    problem_stride,
    row_stride,
    split_size,
    problems,
    n,
    d,
    KEEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """X_c X_cᵀ [splits, P, n, n] over `split_size` features, of problems of one tile of rows."""
    p, split = tl.program_id(0) % problems, tl.program_id(0) // problems
    problem = tl.cast(p, tl.int64)
    row = tl.arange(0, BLOCK)
    valid = _valid(mask, p, row, n)
    count = tl.load(counts + p)
    start = 0
    if first is not None:
        start = tl.load(first + p)
    begin = split * split_size
    gram = _gram_on_chip(
        x + problem * problem_stride, row_stride, start, row, valid, count, means + problem * d,
        begin, tl.minimum(begin + split_size, d), d, KEEP, OPERAND, PRECISION, BLOCK_D,
    )  # fmt: skip
    out += (tl.cast(split, tl.int64) * problems + p) * n * n
    inside = (row < n)[:, None] & (row < n)[None, :]
    tl.store(out + row[:, None] * n + row[None, :], gram, mask=inside)


@triton.jit
def _column_sums(
    sums,
    start,
    mean,
    weights,
    x,
    mask,
    first,
    problem_stride,
    row_stride,
    split_size,
    problems,
    n,
    d,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums [splits, P, d] over rows: of what a row exceeds the first valid one (which goes to
    `start`), or with weights, of the centred rows."""
    chunks = tl.cdiv(d, BLOCK_D)
    chunk, program = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    p, split = program % problems, program // problems
    problem = tl.cast(p, tl.int64)
    x += problem * problem_stride
    start += problem * d
    column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    if weights is None:
        begin_row = tl.cast(0, tl.int64)
        if first is not None:
            begin_row = tl.load(first + p).to(tl.int64)
        base = tl.load(x + begin_row * row_stride + column, mask=inside, other=0.0).to(tl.float32)
        if mask is not None:
            taken = tl.load(mask + problem * n + begin_row) != 0
            base = tl.where(taken, base, 0.0)
        tl.store(start + column, base, mask=inside & (split == 0))
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for begin in range(split * split_size, tl.minimum((split + 1) * split_size, n), BLOCK):
        row = begin + tl.arange(0, BLOCK)
        valid = _valid(mask, p, row, n)
        if weights is None:
            at = x + row.to(tl.int64)[:, None] * row_stride + column[None, :]
            inside_tile = valid[:, None] & inside[None, :]
            tile = tl.load(at, mask=inside_tile, other=0.0).to(tl.float32)
            total += tl.where(inside_tile, tile - base[None, :], 0.0)
        else:
            at_mean = mean + problem * d
            tile = _centred(x, row_stride, start, at_mean, row, valid, column, d)
            weight = tl.load(weights + problem * n + row, mask=valid, other=0.0)
            total += tile * weight[:, None]
    at = sums + (tl.cast(split, tl.int64) * problems + p) * d + column
    tl.store(at, tl.sum(total, 0), mask=inside)


@triton.jit
def _row_norms(
    norms,
    x,
    start,
    mean,
    mask,
    problem_stride,
    row_stride,
    n,
    d,
    OPERAND: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared norms [P, n] of the centred rows, as they enter a product."""
    tiles = tl.cdiv(n, BLOCK)
    tile, p = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    problem = tl.cast(p, tl.int64)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    valid = _valid(mask, p, row, n)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for begin in range(0, d, BLOCK_D):
        column = begin + tl.arange(0, BLOCK_D)
        features = _centred(
            x + problem * problem_stride, row_stride, start + problem * d, mean + problem * d,
            row, valid, column, d,
        )  # fmt: skip
        features = features.to(OPERAND).to(tl.float32)
        total += features * features
    tl.store(norms + problem * n + row, tl.sum(total, 1), mask=row < n)


@triton.jit
def _exponential_less_one(y):
    """exp(y) - 1 for |y| <= 1/2, by its series."""
    series = y * (1.0 / 362880) + 1.0 / 40320
    series = series * y + 1.0 / 5040
    series = series * y + 1.0 / 720
    series = series * y + 1.0 / 120
    series = series * y + 1.0 / 24
    series = series * y + 1.0 / 6
    series = series * y + 0.5
    return (series * y + 1.0) * y


@triton.jit
def _gram(
    out,
    x,
    start,
    mean,
    mask,
    norms,
    unit,
    sharpness,
    typical,
    problem_stride,
    row_stride,
    first_problem,
    first_row,
    rows,
    split_size,
    problems,
    n,
    d,
    SYMMETRIC: tl.constexpr,
    MIRRORED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of G [splits, P, rows, n] (of X_c X_cᵀ without `unit`), over `split_size` features.

    SYMMETRIC: tiles on and right of the diagonal alone. MIRRORED: those left of it are copies.
    """
    tiles_i, tiles_j = tl.cdiv(rows, BLOCK), tl.cdiv(n, BLOCK)
    j, program = tl.program_id(0) % tiles_j, tl.program_id(0) // tiles_j
    i, program = program % tiles_i, program // tiles_i
    p, split = program % problems, program // problems
    if SYMMETRIC:  # noqa: SIM102
        if j < i + first_row // BLOCK:
            return
    problem = tl.cast(p + first_problem, tl.int64)
    local = i * BLOCK + tl.arange(0, BLOCK)
    row, other = first_row + local, j * BLOCK + tl.arange(0, BLOCK)
    valid, valid_other = _valid(mask, problem, row, n), _valid(mask, problem, other, n)
    x += problem * problem_stride
    start += problem * d
    mean += problem * d
    gram = tl.zeros([BLOCK, BLOCK], tl.float32)
    begin = split * split_size
    for step in range(begin, tl.minimum(begin + split_size, d), BLOCK_D):
        column = step + tl.arange(0, BLOCK_D)
        a = _centred(x, row_stride, start, mean, row, valid, column, d).to(OPERAND)
        b = _centred(x, row_stride, start, mean, other, valid_other, column, d).to(OPERAND)
        gram = tl.dot(a, tl.trans(b), gram, input_precision=PRECISION)
    if sharpness is not None:
        norm = tl.load(norms + problem * n + row, mask=valid, other=0.0)
        norm_other = tl.load(norms + problem * n + other, mask=valid_other, other=0.0)
        distance = norm[:, None] + norm_other[None, :] - 2.0 * gram
        # Not tl.maximum, which loses NaN.
        same = (distance < 0.0) | ((row[:, None] == other[None, :]) & (distance == distance))
        usual = tl.load(typical + problem)
        exponent = tl.where(same, 0.0, distance) * -tl.load(sharpness + problem)
        constant, offset = tl.exp2(usual * LOG2_E), exponent - usual
        close = constant * _exponential_less_one(offset)
        gram = tl.where(tl.abs(offset) < 0.5, close, tl.exp2(exponent * LOG2_E) - constant)
        gram = tl.where(valid[:, None] & valid_other[None, :], gram, 0.0)
    if unit is not None:
        gram = gram / tl.load(unit + problem)
    out += (tl.cast(split, tl.int64) * problems + p) * rows * n
    inside = (row < first_row + rows)[:, None] & (other < n)[None, :]
    at = local.to(tl.int64)[:, None] * n + other[None, :]
    tl.store(out + at, gram, mask=inside & (row < n)[:, None])
    if MIRRORED:
        at = other.to(tl.int64)[None, :] * n + local[:, None]
        tl.store(out + at, gram, mask=inside & (row < n)[:, None] & (j > i))


@triton.jit
def _row_sums(
    sums,
    grams,
    first_problem,
    first_row,
    rows,
    problems,
    all_problems,
    n,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row sums [layers, P, n] of the strips [layers, problems, rows, n]."""
    tiles = tl.cdiv(rows, BLOCK)
    tile, program = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    p, layer = program % problems, tl.cast(program // problems, tl.int64)
    local = tile * BLOCK + tl.arange(0, BLOCK)
    grams += (layer * problems + p) * rows * n
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in range(0, n, BLOCK):
        other = begin + tl.arange(0, BLOCK)
        inside = (local < rows)[:, None] & (other < n)[None, :]
        at = grams + local.to(tl.int64)[:, None] * n + other[None, :]
        values = tl.load(at, mask=inside, other=0.0)
        if UNBIASED:
            values = tl.where((first_row + local)[:, None] == other[None, :], 0.0, values)
        total += values
    at = sums + (layer * all_problems + first_problem + p) * n + first_row + local
    tl.store(at, tl.sum(total, 1), mask=local < rows)


@triton.jit
def _centred_gram(
    own,
    given,
    shifts,
    totals,
    layer,
    made,
    p,
    problem,
    local,
    row,
    other,
    inside,
    rows,
    problems,
    all_problems,
    n,
    CENTRE: tl.constexpr,
):
    """A tile of a layer's G, as it lies in memory, and centred."""
    if given is not None:
        beyond = layer >= made
        strip = tl.where(beyond, given, own)
        layer_in_strip = tl.cast(tl.where(beyond, layer - made, layer), tl.int64)
    else:
        strip = own
        layer_in_strip = tl.cast(layer, tl.int64)
    strip += (layer_in_strip * problems + p) * rows * n
    at = strip + local.to(tl.int64)[:, None] * n + other[None, :]
    raw = tl.load(at, mask=inside, other=0.0)
    centred = raw
    if CENTRE:
        at_layer = tl.cast(layer, tl.int64) * all_problems + problem
        shift = tl.load(shifts + at_layer * n + row, mask=row < n, other=0.0)
        shift_other = tl.load(shifts + at_layer * n + other, mask=other < n, other=0.0)
        centred = raw - shift[:, None] - shift_other[None, :] + tl.load(totals + at_layer)
    return raw, centred


@triton.jit
def _inner(
    partial,
    sizes,
    own,
    given,
    shifts,
    totals,
    mask,
    pairs,
    made,
    first_problem,
    first_row,
    rows,
    problems,
    all_problems,
    n,
    count,
    SYMMETRIC: tl.constexpr,
    CENTRE: tl.constexpr,
    UNBIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile's part of <G_i, G_j> [tiles, pairs, P], and of what it is a difference of."""
    tiles_i, tiles_j = tl.cdiv(rows, BLOCK), tl.cdiv(n, BLOCK)
    j, program = tl.program_id(0) % tiles_j, tl.program_id(0) // tiles_j
    i, program = program % tiles_i, program // tiles_i
    p, pair = program % problems, program // problems
    problem = tl.cast(p + first_problem, tl.int64)
    tile_row = i + first_row // BLOCK
    at = (tl.cast(tile_row, tl.int64) * tiles_j + j) * count + pair
    at = at * all_problems + problem
    weight = 1.0
    if SYMMETRIC:
        weight = tl.where(j > tile_row, 2.0, 1.0)
        if j < tile_row:
            tl.store(partial + at, 0.0)
            tl.store(sizes + at, 0.0)
            return
    local = i * BLOCK + tl.arange(0, BLOCK)
    row, other = first_row + local, j * BLOCK + tl.arange(0, BLOCK)
    inside = (local < rows)[:, None] & (other < n)[None, :]
    used = _valid(mask, problem, row, n)[:, None] & _valid(mask, problem, other, n)[None, :]
    used = used & inside
    if UNBIASED:
        used = used & (row[:, None] != other[None, :])
    raw_a, a = _centred_gram(
        own, given, shifts, totals, tl.load(pairs + 2 * pair), made, p, problem, local, row,
        other, inside, rows, problems, all_problems, n, CENTRE,
    )  # fmt: skip
    raw_b, b = _centred_gram(
        own, given, shifts, totals, tl.load(pairs + 2 * pair + 1), made, p, problem, local, row,
        other, inside, rows, problems, all_problems, n, CENTRE,
    )  # fmt: skip
    tl.store(partial + at, weight * tl.sum(tl.where(used, a, 0.0) * tl.where(used, b, 0.0)))
    raw_a, raw_b = tl.where(used, raw_a, 0.0), tl.where(used, raw_b, 0.0)
    tl.store(sizes + at, weight * tl.sum(raw_a * raw_b))


@triton.jit
def _sum_first(
    out, x, count, length, stride, stride_out, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ_k x[k, m] for every m, all in the same order."""
    m = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK_K, BLOCK], tl.float32)
    for begin in range(0, count, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        at = x + k.to(tl.int64)[:, None] * stride + m[None, :] * stride_out
        total += tl.load(at, mask=(k < count)[:, None] & (m < length)[None, :], other=0.0)
    tl.store(out + m, tl.sum(total, 0), mask=m < length)


@triton.jit
def _apply(
    out,
    own,
    given,
    shifts,
    totals,
    edges,
    grad,
    unit,
    sharpness,
    typical,
    x,
    start,
    mean,
    mask,
    grad_strides,
    problem_stride,
    row_stride,
    layer,
    first_edge,
    degree,
    made,
    first_problem,
    first_row,
    rows,
    problems,
    all_problems,
    n,
    d,
    CENTRE: tl.constexpr,
    UNBIASED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of the gradient of one layer: M X_c, M being made of Gram matrices on load."""
    tiles, chunks = tl.cdiv(rows, BLOCK), tl.cdiv(d, BLOCK_D)
    chunk, program = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    tile, p = program % tiles, program // tiles
    problem = tl.cast(p + first_problem, tl.int64)
    local = tile * BLOCK + tl.arange(0, BLOCK)
    row = first_row + local
    valid = _valid(mask, problem, row, n) & (local < rows)
    column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    x += problem * problem_stride
    start += problem * d
    mean += problem * d
    scale = 2.0 / tl.load(unit + problem)
    if sharpness is not None:
        constant = tl.exp2(tl.load(typical + problem) * LOG2_E)
        scale = 2.0 * scale * tl.load(sharpness + problem)
    gradient = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, n, BLOCK_K):
        other = begin + tl.arange(0, BLOCK_K)
        valid_other = _valid(mask, problem, other, n)
        used = valid[:, None] & valid_other[None, :]
        m = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for edge in range(first_edge, first_edge + degree):
            pair, neighbour = tl.load(edges + 2 * edge), tl.load(edges + 2 * edge + 1)
            at = grad + tl.cast(pair, tl.int64) * grad_strides[0] + problem * grad_strides[1]
            upstream = tl.load(at) * tl.where(neighbour == layer, 2.0, 1.0)
            _, gram = _centred_gram(
                own, given, shifts, totals, neighbour, made, p, problem, local, row, other, used,
                rows, problems, all_problems, n, CENTRE,
            )  # fmt: skip
            m += upstream * gram
        if UNBIASED:
            used = used & (row[:, None] != other[None, :])
        m = tl.where(used, m, 0.0)
        if sharpness is not None:
            gram, _ = _centred_gram(
                own, given, shifts, totals, layer, made, p, problem, local, row, other, used,
                rows, problems, all_problems, n, False,
            )  # fmt: skip
            m = m * (gram * tl.load(unit + problem) + constant)
        m = m.to(OPERAND)
        if sharpness is not None:
            sums += tl.sum(m.to(tl.float32), 1)
        features = _centred(x, row_stride, start, mean, other, valid_other, column, d).to(OPERAND)
        gradient = tl.dot(m, features, gradient, input_precision=PRECISION)
    if sharpness is not None:
        features = _centred(x, row_stride, start, mean, row, valid, column, d).to(OPERAND)
        gradient -= sums[:, None] * features.to(tl.float32)
    gradient = tl.where(valid[:, None], gradient * scale, 0.0).to(out.dtype.element_ty)
    at = out + problem * n * d + row.to(tl.int64)[:, None] * d + column[None, :]
    inside = ((local < rows) & (row < n))[:, None] & (column < d)[None, :]
    tl.store(at, gradient, mask=inside)


@triton.jit
def _feature_products(
    out,
    x,
    y,
    start_x,
    mean_x,
    start_y,
    mean_y,
    mask,
    problem_stride_x,
    problem_stride_y,
    row_stride_x,
    row_stride_y,
    split_size,
    problems,
    n,
    d_x,
    d_y,
    SAME: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A block of X_cᵀ Y_c [splits, P, d_x, d_y] over `split_size` rows.

    Blocks left of the diagonal are made as the transpose of Y_cᵀ X_c, so that features that agree
    have products that do; for a layer with itself (SAME) they are copies.
    """
    tiles_x, tiles_y = tl.cdiv(d_x, BLOCK), tl.cdiv(d_y, BLOCK)
    j, program = tl.program_id(0) % tiles_y, tl.program_id(0) // tiles_y
    i, program = program % tiles_x, program // tiles_x
    p, split = program % problems, program // problems
    if SAME:  # noqa: SIM102
        if j < i:
            return
    problem = tl.cast(p, tl.int64)
    out += (tl.cast(split, tl.int64) * problems + p) * d_x * d_y
    x += problem * problem_stride_x
    y += problem * problem_stride_y
    start_x, mean_x = start_x + problem * d_x, mean_x + problem * d_x
    start_y, mean_y = start_y + problem * d_y, mean_y + problem * d_y
    # a and b are the operands: X and Y, or the other way round; always X and Y of two dtypes, which
    # do not agree and of which one address can not be chosen.
    if x.dtype == y.dtype:
        swapped = j < i
        a, b = tl.where(swapped, y, x), tl.where(swapped, x, y)
    else:
        swapped = False
        a, b = x, y
    start_a, start_b = tl.where(swapped, start_y, start_x), tl.where(swapped, start_x, start_y)
    mean_a, mean_b = tl.where(swapped, mean_y, mean_x), tl.where(swapped, mean_x, mean_y)
    stride_a = tl.where(swapped, row_stride_y, row_stride_x)
    stride_b = tl.where(swapped, row_stride_x, row_stride_y)
    d_a, d_b = tl.where(swapped, d_y, d_x), tl.where(swapped, d_x, d_y)
    column_a = tl.where(swapped, j, i) * BLOCK + tl.arange(0, BLOCK)
    column_b = tl.where(swapped, i, j) * BLOCK + tl.arange(0, BLOCK)
    product = tl.zeros([BLOCK, BLOCK], tl.float32)
    for begin in range(split * split_size, tl.minimum((split + 1) * split_size, n), BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        valid = _valid(mask, problem, row, n)
        tile_a = _centred(a, stride_a, start_a, mean_a, row, valid, column_a, d_a).to(OPERAND)
        tile_b = _centred(b, stride_b, start_b, mean_b, row, valid, column_b, d_b).to(OPERAND)
        product = tl.dot(tl.trans(tile_a), tile_b, product, input_precision=PRECISION)
    stride_first = tl.where(swapped, 1, d_y)
    stride_second = tl.where(swapped, d_y, 1)
    first, second = column_a.to(tl.int64)[:, None], column_b.to(tl.int64)[None, :]
    inside = (column_a < d_a)[:, None] & (column_b < d_b)[None, :]
    tl.store(out + first * stride_first + second * stride_second, product, mask=inside)
    if SAME:
        tl.store(out + second * d_y + first, product, mask=inside & (j > i))


@triton.jit
def _feature_inner(
    partial,
    products,
    unit_x,
    unit_y,
    problems,
    tile_stride,
    d_x,
    d_y,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block's part [blocks, P] of |X_cᵀ Y_c|² over both units; SQUARE: with its transpose."""
    tiles_x, tiles_y = tl.cdiv(d_x, BLOCK), tl.cdiv(d_y, BLOCK)
    j, program = tl.program_id(0) % tiles_y, tl.program_id(0) // tiles_y
    i, p = program % tiles_x, program // tiles_x
    problem = tl.cast(p, tl.int64)
    products += problem * d_x * d_y
    scale = tl.sqrt_rn(tl.load(unit_x + problem)) * tl.sqrt_rn(tl.load(unit_y + problem))
    first, second = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    inside = (first < d_x)[:, None] & (second < d_y)[None, :]
    at = products + first.to(tl.int64)[:, None] * d_y + second[None, :]
    values = tl.load(at, mask=inside, other=0.0) / scale
    total = tl.sum(values * values)
    if SQUARE:
        at = products + second.to(tl.int64)[None, :] * d_y + first[:, None]
        values = tl.load(at, mask=inside, other=0.0) / scale
        both = total + tl.sum(values * values)
        total = tl.where(j < i, 0.0, tl.where(j > i, both, total))
    tl.store(partial + (tl.cast(i, tl.int64) * tiles_y + j) * tile_stride + problem, total)


@triton.jit
def _feature_edge(
    x,
    edge,
    starts,
    means,
    kept,
    grad,
    unit,
    layers,
    widths,
    problem_strides,
    row_strides,
    centres,
    products,
    strides_in,
    strides_out,
    rows_of_grad,
    grad_strides,
    root,
    problem,
    row,
    valid,
    column,
    layer,
    problems,
    d,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """c_ij X_j (X_jᵀ X_i) of one neighbour j, whose features are x."""
    neighbour, width = _of(layers, edge), _of(widths, edge)
    at = x + problem * _of(problem_strides, edge)
    centre = _of(centres, edge) + problem * width
    product = kept + _of(products, edge) + problem * width * d
    stride_in, stride_out = _of(strides_in, edge), _of(strides_out, edge)
    root_other = tl.sqrt_rn(tl.load(unit + tl.cast(neighbour, tl.int64) * problems + problem))
    pair = tl.cast(_of(rows_of_grad, edge), tl.int64)
    upstream = tl.load(grad + pair * grad_strides[0] + problem * grad_strides[1])
    upstream = upstream * tl.where(neighbour == layer, 2.0, 1.0) / root_other
    row_stride = _of(row_strides, edge)
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for begin in range(0, width, BLOCK_K):
        inner = begin + tl.arange(0, BLOCK_K)
        features = _centred(
            at, row_stride, starts + centre, means + centre, row, valid, inner, width
        )
        where = inner.to(tl.int64)[:, None] * stride_in
        where += column.to(tl.int64)[None, :] * stride_out
        mask = (inner < width)[:, None] & (column < d)[None, :]
        block = tl.load(product + where, mask=mask, other=0.0)
        block = (block / (root * root_other)).to(OPERAND)
        total = tl.dot(features.to(OPERAND), block, total, input_precision=PRECISION)
    return total * upstream


@triton.jit
def _feature_apply(
    out,
    x,
    others,
    starts,
    means,
    kept,
    grad,
    unit,
    weights,
    columns,
    mask,
    layers,
    widths,
    problem_strides,
    row_strides,
    centres,
    products,
    strides_in,
    strides_out,
    rows_of_grad,
    grad_strides,
    own,
    layer,
    alike,
    degree,
    problems,
    n,
    d,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of the gradient of one layer: Σ_j c_ij X_j (X_jᵀ X_i), over its neighbours j.

    The first `alike` have the layer's dtype and are in `x`, with the layer itself; those of another
    dtype are in `others`.
    """
    tiles, chunks = tl.cdiv(n, BLOCK), tl.cdiv(d, BLOCK_D)
    chunk, program = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    tile, p = program % tiles, program // tiles
    problem = tl.cast(p, tl.int64)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    valid = _valid(mask, problem, row, n)
    column = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    root = tl.sqrt_rn(tl.load(unit + tl.cast(layer, tl.int64) * problems + problem))
    gradient = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for edge in range(alike):
        gradient += _feature_edge(
            _of(x, edge), edge, starts, means, kept, grad, unit, layers, widths, problem_strides,
            row_strides, centres, products, strides_in, strides_out, rows_of_grad, grad_strides,
            root, problem, row, valid, column, layer, problems, d, OPERAND, PRECISION, BLOCK,
            BLOCK_K, BLOCK_D,
        )  # fmt: skip
    if others is not None:
        for edge in range(alike, degree):
            gradient += _feature_edge(
                _of(others, edge - alike), edge, starts, means, kept, grad, unit, layers, widths,
                problem_strides, row_strides, centres, products, strides_in, strides_out,
                rows_of_grad, grad_strides, root, problem, row, valid, column, layer, problems, d,
                OPERAND, PRECISION, BLOCK, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    gradient = gradient * (2.0 / root)
    if weights is not None:
        at = _of(x, len(x) - 1) + problem * _of(problem_strides, own)
        centre = _of(centres, own) + problem * d
        features = _centred(
            at, _of(row_strides, own), starts + centre, means + centre, row, valid, column, d
        )
        weight = tl.load(weights + problem * n + row, mask=valid, other=0.0)
        common = tl.load(columns + problem * d + column, mask=inside, other=0.0)
        gradient += features * weight[:, None] - common[None, :]
    gradient = tl.where(valid[:, None], gradient, 0.0).to(out.dtype.element_ty)
    at = out + problem * n * d + row.to(tl.int64)[:, None] * d + column[None, :]
    tl.store(at, gradient, mask=(row < n)[:, None] & inside[None, :])


# Up to so many rows a Gram matrix stays on chip,
ONE_TILE = 128
# and both of a pair, by bytes of a feature: as many as spill no registers.
ON_CHIP = {2: 128, 4: 64}
ON_CHIP_BY_ARCHITECTURE = {"sm_100": {2: 64, 4: 32}}
# Bytes of the strips of Gram matrices that exist at a time.
WORKSPACE = 1 << 28
# Programs that fill a GPU; problems are split where there are fewer.
PROGRAMS = 512
# Layer pairs of one launch: their addresses are kernel arguments, of which a launch takes 4 KB.
PAIRS = 32
INTERPRETED = bool(triton.knobs.runtime.interpret)

Launch = dict[str, int]


def _blocks(warps: int, stages: int, **sizes: int) -> Launch:
    return {**{name.upper(): size for name, size in sizes.items()}, "num_warps": warps,
            "num_stages": stages}  # fmt: skip


# By kernel, then bytes of a feature; what needs no product (sums) has one entry for both.
DEFAULT: dict[str, dict[int, Launch]] = {
    "pairs_forward": {2: _blocks(8, 5, block_d=64), 4: _blocks(8, 2, block_d=32)},
    "pairs_backward": {2: _blocks(8, 4, block_d=64), 4: _blocks(8, 2, block_d=32)},
    "whole_gram": {2: _blocks(8, 3, block_d=64), 4: _blocks(8, 2, block_d=32)},
    "gram": {2: _blocks(8, 3, block=128, block_d=64), 4: _blocks(4, 2, block=64, block_d=32)},
    "apply": {
        2: _blocks(8, 2, block=128, block_k=32, block_d=128),
        4: _blocks(4, 2, block=64, block_k=32, block_d=64),
    },
    "feature_products": {
        2: _blocks(8, 3, block=128, block_k=64),
        4: _blocks(4, 2, block=64, block_k=32),
    },
    "feature_apply": {
        2: _blocks(8, 2, block=128, block_k=32, block_d=128),
        4: _blocks(4, 2, block=64, block_k=32, block_d=64),
    },
    "column_sums": {size: _blocks(4, 2, block=32, block_d=128) for size in (2, 4)},
    "row_norms": {size: _blocks(4, 2, block=32, block_d=128) for size in (2, 4)},
}
SMALLER = {
    **DEFAULT,
    "pairs_forward": {2: _blocks(8, 3, block_d=32), 4: _blocks(8, 1, block_d=16)},
    "pairs_backward": {2: _blocks(8, 3, block_d=32), 4: _blocks(8, 2, block_d=16)},
    "whole_gram": {**DEFAULT["whole_gram"], 4: _blocks(8, 1, block_d=16)},
    "feature_products": {
        **DEFAULT["feature_products"],
        2: _blocks(4, 2, block=64, block_k=64),
    },
    "feature_apply": {
        2: _blocks(4, 2, block=64, block_k=32, block_d=64),
        4: _blocks(4, 1, block=32, block_k=32, block_d=64),
    },
}
LAUNCH: dict[str, dict[str, dict[int, Launch]]] = {
    "sm_80": SMALLER,
    "sm_90": DEFAULT,
    "sm_100": DEFAULT,
    "gfx942": DEFAULT,
    "sm_86": SMALLER,  # every other NVIDIA GPU; most have 99 KB of shared memory
    "interpreter": DEFAULT,
}


def architecture(device: torch.device) -> str:
    """The entry of LAUNCH for a device."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in LAUNCH else "sm_86"


def compiler_options(name: str, warps: int = 4) -> dict[str, Any]:
    if INTERPRETED:  # which knows neither
        return {}
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if name.startswith("sm_"):  # ptxas may spill to fit one more program on a processor: not here
        options["maxnreg"] = min(255, 65536 // (32 * warps))
    return options


def launch_parameters(kernel: str, x: Tensor) -> dict[str, Any]:
    name = architecture(x.device)
    # Addresses that are not aligned take more registers.
    table = LAUNCH[name] if x.shape[-1] % 16 == 0 or name == "interpreter" else SMALLER
    launch = table[kernel][x.dtype.itemsize]
    return {**launch, **compiler_options(name, launch["num_warps"])}


def operand(x: Tensor, *, gradient: bool = False) -> tuple[Any, str]:
    """What features are rounded to for a product, and its precision.

    Three TF32 products keep float32's digits on NVIDIA's tensor cores; AMD's take float32. In
    backward, float16 has not the range for Gram matrices times an upstream gradient: TF32 has as
    many digits.
    """
    nvidia = architecture(x.device).startswith("sm_")
    if x.dtype == torch.bfloat16 and not INTERPRETED:
        return tl.bfloat16, "ieee"
    if x.dtype == torch.float16 and not gradient:
        return tl.float16, "ieee"
    if x.dtype == torch.float32:
        return tl.float32, "tf32x3" if nvidia else "ieee"
    return tl.float32, "tf32" if nvidia else "ieee"


def _operands(x: Tensor) -> dict[str, Any]:
    kind, precision = operand(x)
    return {"OPERAND": kind, "PRECISION": precision}


def _operands_of_gradient(x: Tensor) -> dict[str, Any]:
    kind, precision = operand(x, gradient=True)
    return {"OPERAND": kind, "PRECISION": precision}


class _Rows(NamedTuple):
    """The rows that take part; none in problems with too few."""

    mask: Tensor | None  # [P, n], bytes
    first: Tensor | None  # [P]
    valid: Tensor  # how many [P], float32


def _rows(x: Tensor, mask: Tensor | None, unbiased: bool) -> _Rows:
    problems, n = x.shape[:2]
    if mask is None:
        return _Rows(None, None, x.new_full((problems,), float(n), dtype=torch.float32))
    count = mask.sum(-1)
    enough = count >= (4 if unbiased else 2)
    mask = (mask & enough[:, None]).contiguous().view(torch.uint8)
    return _Rows(mask, mask.argmax(-1), (count * enough).float())


def _sum(x: Tensor) -> Tensor:
    """Σ over the first dimension of [count, length], of any strides."""
    count, length = x.shape
    out = x.new_empty((length,))
    if length == 0:
        return out
    block_k = min(triton.next_power_of_2(count), 1024)
    block = max(4, 4096 // block_k)
    with torch.cuda.device_of(x):
        _sum_first[(triton.cdiv(length, block),)](
            out, x, count, length, *x.stride(), BLOCK_K=block_k, BLOCK=block,
            **compiler_options(architecture(x.device)),
        )  # fmt: skip
    return out


def _splits(programs: int, steps: int, block: int) -> tuple[int, int]:
    """Into how many parts, and of what size, to split `steps` for so many programs."""
    blocks = triton.cdiv(steps, block)
    splits = max(1, min(triton.cdiv(PROGRAMS, programs), blocks // 4))
    size = triton.cdiv(blocks, splits) * block
    return triton.cdiv(steps, size), size


class _Centre(NamedTuple):
    """The mean of the valid rows is `start` (the first of them) plus `mean`, both [P, d]."""

    start: Tensor
    mean: Tensor


def _column_totals(
    x: Tensor, rows: _Rows, start: Tensor, mean: Tensor | None, weights: Tensor | None
) -> Tensor:
    problems, n, d = x.shape
    launch = launch_parameters("column_sums", x)
    chunks = triton.cdiv(d, launch["BLOCK_D"])
    splits, size = _splits(problems * chunks, n, launch["BLOCK"])
    sums = start.new_empty((splits, problems * d))
    with torch.cuda.device_of(x):
        _column_sums[(chunks * problems * splits,)](
            sums, start, mean, weights, x, rows.mask, rows.first, x.stride(0), x.stride(1), size,
            problems, n, d, **launch,
        )  # fmt: skip
    total = _sum(sums) if splits > 1 else sums
    return total.view(problems, d)


def _centre(x: Tensor, rows: _Rows) -> _Centre:
    start = x.new_empty((x.shape[0], x.shape[2]), dtype=torch.float32)
    total = _column_totals(x, rows, start, None, None)
    return _Centre(start, total / rows.valid.clamp(min=1)[:, None])


def _norms(x: Tensor, centre: _Centre, rows: _Rows) -> Tensor:
    problems, n, d = x.shape
    norms = centre.start.new_empty((problems, n))
    launch = launch_parameters("row_norms", x)
    with torch.cuda.device_of(x):
        _row_norms[(problems * triton.cdiv(n, launch["BLOCK"]),)](
            norms, x, *centre, rows.mask, x.stride(0), x.stride(1), n, d, OPERAND=operand(x)[0],
            **launch,
        )  # fmt: skip
    return norms


def _not_zero(unit: Tensor) -> Tensor:
    return unit.masked_fill(unit == 0, 1.0)


@functools.cache  # for good: a captured graph keeps their addresses
def _on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, because a CUDA graph can not hold the copy."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def _edges(pairs: Sequence[int], layer: int) -> list[tuple[int, int]]:
    """The pairs that a layer is in, and the other layer of each."""
    found = []
    for pair, (i, j) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        if layer in (i, j):
            found.append((pair, j if i == layer else i))
    return found


def _own(pairs: Sequence[int], device: torch.device) -> Tensor:
    """Which pairs are of a layer with itself [pairs, 1]."""
    same = tuple(int(i == j) for i, j in zip(pairs[::2], pairs[1::2], strict=True))
    return _on_device(same, device).bool()[:, None]


def _without_rounding(inner: Tensor, sizes: Tensor, pairs: Sequence[int], rows: _Rows) -> Tensor:
    """0 where a layer's product with itself is no more than the rounding of its terms."""
    vanishes = inner <= 2 * torch.finfo(inner.dtype).eps * rows.valid * sizes
    return inner.masked_fill(_own(pairs, inner.device) & vanishes, 0.0)


def _shifts(sums: Tensor, rows: _Rows, unbiased: bool) -> tuple[Tensor, Tensor]:
    """What centring takes from rows and columns [layers, P, n], and then adds [layers, P]."""
    n = rows.valid
    total = _sum(sums.flatten(0, 1).T).view(sums.shape[:2])
    if unbiased:
        few = (n - 2).clamp(min=1)
        return sums / few[:, None], total / (few * (n - 1).clamp(min=1))
    return sums / n.clamp(min=1)[:, None], total / n.clamp(min=1).square()


def _shifts_of_grams(own: Tensor, given: Tensor | None, rows: _Rows) -> tuple[Tensor, Tensor]:
    diagonals = [g.diagonal(dim1=-2, dim2=-1) for g in (own, given) if g is not None]
    return _shifts(-torch.cat(diagonals), rows, True)


class _Scales(NamedTuple):
    """Of one layer, [P]: what G is divided by; for rbf 1 / 2σ² and -m / 2σ²."""

    unit: Tensor
    sharpness: Tensor | None
    typical: Tensor | None


def _scales(norms: Tensor, rows: _Rows, bandwidth: float | None, unbiased: bool) -> _Scales:
    total = _sum(norms.T)
    if bandwidth is None:
        return _Scales(_not_zero(total), None, None)
    squared = 2 * total / (rows.valid - 1).clamp(min=1)
    variance = _not_zero(squared) if bandwidth == 0 else torch.full_like(squared, bandwidth**2)
    sharpness = 0.5 / variance
    typical = -squared * sharpness
    unit = -torch.expm1(typical)
    if unbiased:
        unit = unit * torch.exp(typical / 2).clamp(min=1e-15)
    return _Scales(_not_zero(unit), sharpness, typical)


def _gram_into(
    out: Tensor,
    x: Tensor,
    centre: _Centre,
    rows: _Rows,
    norms: Tensor | None,
    scales: _Scales | None,
    first: tuple[int, int],
    sizes: tuple[int, int],
    *,
    splits: tuple[int, int] | None = None,
    symmetric: bool,
    mirrored: bool = False,
) -> None:
    """G of `sizes` = (problems, rows) from `first` on, into [splits, problems, rows, n]."""
    _, n, d = x.shape
    launch = launch_parameters("gram", x)
    tiles = triton.cdiv(sizes[1], launch["BLOCK"]) * triton.cdiv(n, launch["BLOCK"])
    count, split_size = splits or (1, d)
    with torch.cuda.device_of(x):
        _gram[(tiles * sizes[0] * count,)](
            out, x, *centre, rows.mask, norms, *(scales or (None, None, None)), x.stride(0),
            x.stride(1), *first, sizes[1], split_size, sizes[0], n, d, SYMMETRIC=symmetric,
            MIRRORED=mirrored, **_operands(x), **launch,
        )  # fmt: skip


def _strip_block(layers: Sequence[Tensor]) -> int:
    """What the rows of strips are a multiple of: the tiles of Gram matrices, of every layer."""
    return max(int(launch_parameters("gram", x)["BLOCK"]) for x in layers)


def _strips(
    layers: int, problems: int, n: int, block: int
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First problem and row, and number of both, of what the workspace holds at a time."""
    line = 4 * layers * n
    height = max(1, WORKSPACE // (line * block)) * block
    if n > 1024:  # never a whole matrix
        height = min(height, triton.cdiv(n, 8 * block) * block)
    at_once = max(1, WORKSPACE // (line * n)) if height >= n else 1
    for problem in range(0, problems, at_once):
        for row in range(0, n, height):
            yield (problem, row), (min(at_once, problems - problem), min(height, n - row))


def _pair_entries(
    layers: Sequence[Tensor], pairs: Sequence[int]
) -> list[tuple[int, int, int, int, int]]:
    """(i, j, row of inner of (i, j), of (i, i), of (j, j)); -1 for those not asked.

    A layer that is in no pair with another is its own partner.
    """
    listed = list(zip(pairs[::2], pairs[1::2], strict=True))
    row = {pair: k for k, pair in enumerate(listed)}
    cross = [(i, j) for i, j in listed if i != j]
    met = {layer for pair in cross for layer in pair}
    entries = [(i, j, row[i, j], row.get((i, i), -1), row.get((j, j), -1)) for i, j in cross]
    alone = [layer for layer in range(len(layers)) if layer not in met]
    return entries + [(i, i, -1, row.get((i, i), -1), -1) for i in alone]


def _on_chip(
    layers: Sequence[Tensor], pairs: Sequence[int], bandwidths: Sequence[float], side: str
) -> bool:
    """Whether `_pairs_forward` and `_pairs_backward` serve these."""
    first = widest(layers)
    most = ON_CHIP_BY_ARCHITECTURE.get(architecture(first.device), ON_CHIP)[first.dtype.itemsize]
    if side != "tiles" or bandwidths or first.shape[1] > most:
        return False
    listed = list(zip(pairs[::2], pairs[1::2], strict=True))
    cross = [layer for i, j in listed if i != j for layer in (i, j)]
    return len(set(cross)) == len(cross) and len(set(listed)) == len(listed)


def inner_block(x: Tensor) -> int:
    """Tile of `_inner`, of which those of `_gram` are multiples."""
    return min(64, *(launch["BLOCK"] for launch in LAUNCH[architecture(x.device)]["gram"].values()))


def _whole_block(n: int) -> int:
    return max(16, triton.next_power_of_2(n))


def _pair_tuples(layers: Sequence[Tensor], entries: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of the kernels on chip that have one value per pair."""
    x_s, x_t = ([layers[entry[side]] for entry in entries] for side in (0, 1))
    names = ("layers_s", "layers_t", "rows_cross", "rows_s", "rows_t")
    arguments: dict[str, Any] = dict(zip(names, zip(*entries, strict=True), strict=True))
    for name, side in (("s", x_s), ("t", x_t)):
        arguments[f"x_{name}"] = tuple(side)
        arguments[f"d_{name}"] = tuple(x.shape[2] for x in side)
        arguments[f"problem_strides_{name}"] = tuple(x.stride(0) for x in side)
        arguments[f"row_strides_{name}"] = tuple(x.stride(1) for x in side)
    return arguments


def _launches(
    layers: Sequence[Tensor], entries: Sequence[tuple[int, ...]]
) -> Iterator[Sequence[tuple[int, ...]]]:
    """Up to PAIRS entries (i, j, ...) at a time, whose first layers share a dtype, and second."""
    of_dtypes: dict[Any, list[tuple[int, ...]]] = {}
    for entry in entries:
        of_dtypes.setdefault(tuple(layers[i].dtype for i in entry[:2]), []).append(entry)
    for alike in of_dtypes.values():
        for begin in range(0, len(alike), PAIRS):
            yield alike[begin : begin + PAIRS]


def _offsets(layers: Sequence[Tensor]) -> list[int]:
    """Where each layer's means begin, and where they end."""
    at = [0]
    for x in layers:
        at.append(at[-1] + x.shape[0] * x.shape[2])
    return at


def forward(
    layers: list[Tensor],
    grams: Tensor | None,
    mask: Tensor | None,
    pairs: list[int],
    bandwidths: list[float],
    side: str,
    unbiased: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inner, unit, means, kept."""
    made = layers if grams is None else layers[: -grams.shape[0]]
    problems, n = layers[0].shape[:2]

    def empty(*shape: int) -> Tensor:
        return layers[0].new_empty(shape, dtype=torch.float32)

    inner, unit = empty(len(pairs) // 2, problems), empty(len(made), problems)
    means = empty(_offsets(made)[-1] * keep)
    if problems == 0:
        return inner, unit, means, empty(0)
    rows = _rows(layers[0], mask, unbiased)
    if _on_chip(made, pairs, bandwidths, side):
        kept = empty(len(made) * problems * n * keep)
        _forward_on_chip(inner, unit, means, kept, made, rows, pairs, unbiased, keep)
        return inner, unit, means, kept

    if side == "gram":
        kept = empty(len(made), problems, n, n)
        for i, x in enumerate(made):
            of_layer = means[_offsets(made)[i] : _offsets(made)[i + 1]]
            _make_gram(kept[i], of_layer, unit[i], x, rows, keep)
        shifts = _shifts_of_grams(kept, grams, rows) if unbiased else (None, None)
        tiles = _inner_of_strip(kept, grams, shifts, rows, pairs, unbiased, (0, 0), None)
        inner, sizes = (_sum(x.flatten(1)).view_as(inner) for x in tiles)
        inner = _without_rounding(inner, sizes, pairs, rows)
        return inner, unit, means, kept.flatten() if keep else empty(0)

    centres = [_centre(x, rows) for x in made]
    if keep:
        means = torch.cat([(start + mean).flatten() for start, mean in centres])
    if side == "feature":
        inner, unit, kept = _forward_feature(made, centres, rows, pairs, unbiased)
        return inner, unit, means, kept if keep else empty(0)

    norms = [_norms(x, centre, rows) for x, centre in zip(made, centres, strict=True)]
    scales = [
        _scales(norms[i], rows, bandwidths[i] if bandwidths else None, unbiased)
        for i in range(len(made))
    ]
    unit = torch.stack([scale.unit for scale in scales])
    sums = empty(len(made), problems, n) if bandwidths else torch.stack(norms) / unit[..., None]
    shifts = (None, None)
    if unbiased and not bandwidths:
        shifts = _shifts(-sums, rows, True)
    block = _strip_block(made)
    tile_count = triton.cdiv(n, inner_block(made[0])) ** 2
    partial = (empty(tile_count, *inner.shape), empty(tile_count, *inner.shape))
    for first, sizes_ in _strips(len(made), problems, n, block):
        strip = empty(len(made), *sizes_, n)
        for i, x in enumerate(made):
            _gram_into(
                strip[i], x, centres[i], rows, norms[i], scales[i], first, sizes_,
                symmetric=not bandwidths,
            )  # fmt: skip
        if bandwidths:
            _sum_rows(sums, strip, first, unbiased)
        _inner_of_strip(
            strip, None, shifts, rows, pairs, unbiased, first, partial, symmetric=not bandwidths
        )
    inner, sizes = (_sum(x.flatten(1)).view_as(inner) for x in partial)
    if bandwidths:
        inner = _centred_from_sums(inner, sums, rows, pairs, unbiased)
    inner = _without_rounding(inner, sizes, pairs, rows)
    return inner, unit, means, sums.flatten() if keep else empty(0)


def _forward_on_chip(
    inner: Tensor,
    unit: Tensor,
    means: Tensor,
    kept: Tensor,
    layers: list[Tensor],
    rows: _Rows,
    pairs: list[int],
    unbiased: bool,
    keep: bool,
) -> None:
    problems, n = layers[0].shape[:2]
    entries = _pair_entries(layers, pairs)
    offsets = _offsets(layers)
    for some in _launches(layers, entries):
        like = widest([layers[i] for i in some[0][:2]])
        with torch.cuda.device_of(unit):
            _pairs_forward[(len(some) * problems,)](
                inner, unit, means, kept, mask=rows.mask, first=rows.first, counts=rows.valid,
                **_pair_tuples(layers, some), means_s=tuple(offsets[entry[0]] for entry in some),
                means_t=tuple(offsets[entry[1]] for entry in some), problems=problems, n=n,
                KEEP=keep, UNBIASED=unbiased, **_operands(like), BLOCK=_whole_block(n),
                **launch_parameters("pairs_forward", like),
            )  # fmt: skip


def _make_gram(
    gram: Tensor, means: Tensor, unit: Tensor, x: Tensor, rows: _Rows, keep: bool
) -> None:
    """G [P, n, n] of a layer, its means and unit."""
    problems, n, d = x.shape
    kernel = "whole_gram" if n <= ONE_TILE else "gram"
    launch = launch_parameters(kernel, x)
    tiles = 1 if n <= ONE_TILE else triton.cdiv(n, launch["BLOCK"]) ** 2
    splits = _splits(problems * tiles, d, launch["BLOCK_D"])
    partial = gram[None] if splits[0] == 1 else gram.new_empty((splits[0], *gram.shape))
    if n <= ONE_TILE:
        with torch.cuda.device_of(x):
            _whole_gram[(problems * splits[0],)](
                partial, means, x, rows.mask, rows.first, rows.valid, x.stride(0), x.stride(1),
                splits[1], problems, n, d, KEEP=keep, BLOCK=_whole_block(n), **_operands(x),
                **launch,
            )  # fmt: skip
    else:
        centre = _centre(x, rows)
        if keep:
            means.copy_((centre.start + centre.mean).flatten())
        _gram_into(
            partial, x, centre, rows, None, None, (0, 0), (problems, n), splits=splits,
            symmetric=True, mirrored=True,
        )  # fmt: skip
    if splits[0] > 1:
        gram.copy_(_sum(partial.flatten(1)).view_as(gram))
    unit.copy_(_not_zero(_sum(gram.diagonal(dim1=-2, dim2=-1).T)))
    gram.div_(unit[:, None, None])


def _sum_rows(sums: Tensor, strip: Tensor, first: tuple[int, int], unbiased: bool) -> None:
    layers, problems, height, n = strip.shape
    block = 64
    with torch.cuda.device_of(sums):
        _row_sums[(layers * problems * triton.cdiv(height, block),)](
            sums, strip, *first, height, problems, sums.shape[1], n, UNBIASED=unbiased,
            BLOCK=block, **compiler_options(architecture(sums.device)),
        )  # fmt: skip


def _inner_of_strip(
    own: Tensor,
    given: Tensor | None,
    shifts: tuple[Tensor | None, Tensor | None],
    rows: _Rows,
    pairs: list[int],
    unbiased: bool,
    first: tuple[int, int],
    partial: tuple[Tensor, Tensor] | None,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor]:
    """Into `partial`, [tiles of n x n, pairs, P] each."""
    made, problems, height, n = own.shape
    count, all_problems = len(pairs) // 2, rows.valid.shape[0]
    block = inner_block(own)
    if partial is None:
        shape = (triton.cdiv(n, block) ** 2, count, all_problems)
        partial = (own.new_empty(shape), own.new_empty(shape))
    tiles = triton.cdiv(height, block) * triton.cdiv(n, block)
    with torch.cuda.device_of(own):
        _inner[(tiles * problems * count,)](
            *partial, own, given, *shifts, rows.mask, _on_device(tuple(pairs), own.device), made,
            *first, height, problems, all_problems, n, count, SYMMETRIC=symmetric,
            CENTRE=shifts[0] is not None, UNBIASED=unbiased, BLOCK=block,
            **compiler_options(architecture(own.device)),
        )  # fmt: skip
    return partial


def _centred_from_sums(
    inner: Tensor, sums: Tensor, rows: _Rows, pairs: list[int], unbiased: bool
) -> Tensor:
    """<G_i, G_j> [pairs, P] of matrices with row sums [layers, P, n], centred afterwards."""
    n = rows.valid
    total = _sum(sums.flatten(0, 1).T).view(sums.shape[:2])
    which = _on_device(tuple(pairs), sums.device).long()
    i, j = which[::2], which[1::2]
    between = _sum((sums[i] * sums[j]).flatten(0, 1).T).view_as(inner)
    if unbiased:
        few = (n - 2).clamp(min=1)
        return inner - 2 * between / few + total[i] * total[j] / (few * (n - 1).clamp(min=1))
    n = n.clamp(min=1)
    return inner - 2 * between / n + total[i] / n * (total[j] / n)


def _forward_feature(
    layers: list[Tensor],
    centres: list[_Centre],
    rows: _Rows,
    pairs: list[int],
    unbiased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """inner, unit and the products, flat."""
    first = layers[0]
    problems, n = first.shape[:2]
    listed = list(zip(pairs[::2], pairs[1::2], strict=True))
    products = []
    kept = centres[0].start.new_empty(
        (problems * sum(layers[i].shape[2] * layers[j].shape[2] for i, j in listed),)
    )
    at, blocks = 0, []
    for i, j in listed:
        x, y = layers[i], layers[j]
        like = widest([x, y])
        launch = launch_parameters("feature_products", like)
        block = launch["BLOCK"]
        d_x, d_y = x.shape[2], y.shape[2]
        size = problems * d_x * d_y
        product = kept[at : at + size]
        tiles = triton.cdiv(d_x, block) * triton.cdiv(d_y, block)
        splits, split_size = _splits(problems * tiles, n, launch["BLOCK_K"])
        partial = product if splits == 1 else kept.new_empty((splits, size))
        with torch.cuda.device_of(x):
            _feature_products[(tiles * problems * splits,)](
                partial, x, y, *centres[i], *centres[j], rows.mask, x.stride(0), y.stride(0),
                x.stride(1), y.stride(1), split_size, problems, n, d_x, d_y, SAME=i == j,
                **_operands(like), **launch,
            )  # fmt: skip
        if splits > 1:
            product.copy_(_sum(partial))
        products.append(product.view(problems, d_x, d_y))
        blocks.append(block)
        at += size

    selves = {i: k for k, (i, j) in enumerate(listed) if i == j}
    norms = kept.new_empty(0)
    if unbiased or len(selves) < len(layers):
        norms = torch.stack([_norms(x, c, rows) for x, c in zip(layers, centres, strict=True)])
        unit = _sum(norms.flatten(0, 1).T).view(norms.shape[:2])
    else:
        traces = [products[selves[i]].diagonal(dim1=1, dim2=2).T for i in range(len(layers))]
        unit = torch.stack([_sum(trace) for trace in traces])
    unit = _not_zero(unit)
    inner = torch.stack(
        [
            _square_of_product(product, unit[i], unit[j], block)
            for product, block, (i, j) in zip(products, blocks, listed, strict=True)
        ]
    )
    squares = inner
    if unbiased:
        norms = norms / unit[..., None]
        which = _on_device(tuple(pairs), unit.device).long()
        a, b = which[::2], which[1::2]
        total = _sum(norms.flatten(0, 1).T).view_as(unit)
        between = _sum((norms[a] * norms[b]).flatten(0, 1).T).view_as(inner)
        few = (rows.valid - 2).clamp(min=1)
        inner = inner - rows.valid / few * between
        inner = inner + total[a] * total[b] / (few * (rows.valid - 1).clamp(min=1))
    return _without_rounding(inner, squares, pairs, rows), unit, kept


def _square_of_product(product: Tensor, unit_x: Tensor, unit_y: Tensor, block: int) -> Tensor:
    """|X_cᵀ Y_c|² over both units, [P]."""
    problems, d_x, d_y = product.shape
    block = min(block, 64)
    tiles = triton.cdiv(d_x, block) * triton.cdiv(d_y, block)
    partial = product.new_empty((tiles, problems))
    with torch.cuda.device_of(product):
        _feature_inner[(tiles * problems,)](
            partial, product, unit_x, unit_y, problems, problems, d_x, d_y, SQUARE=d_x == d_y,
            BLOCK=block, **compiler_options(architecture(product.device)),
        )  # fmt: skip
    return _sum(partial)


def backward(
    grad_inner: Tensor,
    unit: Tensor,
    means: Tensor,
    kept: Tensor,
    layers: list[Tensor],
    grams: Tensor | None,
    mask: Tensor | None,
    pairs: list[int],
    bandwidths: list[float],
    side: str,
    unbiased: bool,
    wanted: list[int],
) -> list[Tensor]:
    """The gradients of the layers `wanted`, contiguous."""
    made = layers if grams is None else layers[: -grams.shape[0]]
    out = {i: layers[i].new_empty(layers[i].shape) for i in wanted}
    problems, n = layers[0].shape[:2]
    if problems == 0:
        return [out[i] for i in wanted]
    rows = _rows(layers[0], mask, unbiased)
    if _on_chip(made, pairs, bandwidths, side):
        _backward_on_chip(out, grad_inner, unit, made, rows, pairs, unbiased)
    elif side == "gram":
        own = kept.view(len(made), problems, n, n)
        shifts = _shifts_of_grams(own, grams, rows) if unbiased else (None, None)
        for i in wanted:
            x, scales = layers[i], _Scales(unit[i], None, None)
            _gradient_of_strip(
                out[i], own, grams, shifts, grad_inner, scales, x, _centre(x, rows), rows, pairs,
                i, unbiased, (0, 0),
            )  # fmt: skip
    elif side == "feature":
        _backward_feature(out, grad_inner, unit, kept, made, rows, pairs, unbiased)
    else:
        _backward_by_strips(out, grad_inner, unit, kept, made, rows, pairs, bandwidths, unbiased)
    return [out[i] for i in wanted]


def _backward_on_chip(
    out: dict[int, Tensor],
    grad: Tensor,
    unit: Tensor,
    layers: list[Tensor],
    rows: _Rows,
    pairs: list[int],
    unbiased: bool,
) -> None:
    problems, n = layers[0].shape[:2]
    entries = []
    for i, j, cross, own_i, own_j in _pair_entries(layers, pairs):
        if i in out:
            entries.append((i, j, cross, own_i, own_j))
        if j in out and j != i:
            entries.append((j, i, cross, own_j, own_i))
    for some in _launches(layers, entries):
        like = widest([layers[i] for i in some[0][:2]])
        tuples = _pair_tuples(layers, some)
        del tuples["rows_t"]
        with torch.cuda.device_of(unit):
            _pairs_backward[(len(some) * problems,)](
                tuple(out[entry[0]] for entry in some),
                grad, unit, mask=rows.mask, first=rows.first, counts=rows.valid,
                **tuples, grad_strides=grad.stride(), problems=problems, n=n,
                UNBIASED=unbiased, **_operands(like),
                **{f"{k}_M": v for k, v in _operands_of_gradient(like).items()},
                BLOCK=_whole_block(n), **launch_parameters("pairs_backward", like),
            )  # fmt: skip


def _gradient_of_strip(
    out: Tensor,
    own: Tensor,
    given: Tensor | None,
    shifts: tuple[Tensor | None, Tensor | None],
    grad: Tensor,
    scales: _Scales,
    x: Tensor,
    centre: _Centre,
    rows: _Rows,
    pairs: list[int],
    layer: int,
    unbiased: bool,
    first: tuple[int, int],
) -> None:
    """The rows of a layer's gradient that the strips of Gram matrices [layers, P, rows, n] give."""
    made, problems, height, n = own.shape
    d = x.shape[2]
    launch = launch_parameters("apply", x)
    edges = _edges(pairs, layer)
    table = _on_device(tuple(k for edge in edges for k in edge), x.device)
    tiles = triton.cdiv(height, launch["BLOCK"]) * triton.cdiv(d, launch["BLOCK_D"])
    with torch.cuda.device_of(x):
        _apply[(tiles * problems,)](
            out, own, given, *shifts, table, grad, *scales, x, *centre, rows.mask, grad.stride(),
            x.stride(0), x.stride(1), layer, 0, len(edges), made, *first, height, problems,
            x.shape[0], n, d, CENTRE=shifts[0] is not None, UNBIASED=unbiased,
            **_operands_of_gradient(x), **launch,
        )  # fmt: skip


def _backward_by_strips(
    out: dict[int, Tensor],
    grad: Tensor,
    unit: Tensor,
    kept: Tensor,
    layers: list[Tensor],
    rows: _Rows,
    pairs: list[int],
    bandwidths: list[float],
    unbiased: bool,
) -> None:
    problems, n = layers[0].shape[:2]
    # Only layers that meet one whose gradient is wanted.
    needed = sorted({j for i in out for _, j in _edges(pairs, i)} | set(out))
    place = {layer: k for k, layer in enumerate(needed)}
    among = [
        (place[i], place[j], k)
        for k, (i, j) in enumerate(zip(pairs[::2], pairs[1::2], strict=True))
        if i in out or j in out
    ]
    local_pairs = [layer for i, j, _ in among for layer in (i, j)]
    grad = torch.stack([grad[k] for _, _, k in among]) if among else grad
    centres = [_centre(layers[i], rows) for i in needed]
    norms = [_norms(layers[i], c, rows) for i, c in zip(needed, centres, strict=True)]
    scales = [
        _scales(norm, rows, bandwidths[i] if bandwidths else None, unbiased)._replace(unit=unit[i])
        for i, norm in zip(needed, norms, strict=True)
    ]
    shifts: tuple[Tensor | None, Tensor | None] = (None, None)
    if bandwidths or unbiased:
        sums = torch.stack([kept.view(len(layers), problems, n)[i] for i in needed])
        shifts = _shifts(sums if bandwidths else -sums, rows, unbiased)
    block = _strip_block(layers)
    for first, sizes in _strips(len(needed), problems, n, block):
        strip = unit.new_empty((len(needed), *sizes, n))
        for k, i in enumerate(needed):
            _gram_into(
                strip[k], layers[i], centres[k], rows, norms[k], scales[k], first, sizes,
                symmetric=False,
            )  # fmt: skip
        for i, gradient in out.items():
            k = place[i]
            _gradient_of_strip(
                gradient, strip, None, shifts, grad, scales[k], layers[i], centres[k], rows,
                local_pairs, k, unbiased, first,
            )  # fmt: skip


def _backward_feature(
    out: dict[int, Tensor],
    grad: Tensor,
    unit: Tensor,
    kept: Tensor,
    layers: list[Tensor],
    rows: _Rows,
    pairs: list[int],
    unbiased: bool,
) -> None:
    problems, n = layers[0].shape[:2]
    centres = [_centre(x, rows) for x in layers]
    starts, means = (torch.cat([centre[k].flatten() for centre in centres]) for k in (0, 1))
    offsets = _offsets(layers)
    sizes = [layers[i].shape[2] * layers[j].shape[2]
             for i, j in zip(pairs[::2], pairs[1::2], strict=True)]  # fmt: skip
    norms = None
    if unbiased:
        norms = torch.stack([_norms(x, c, rows) for x, c in zip(layers, centres, strict=True)])
        norms = norms / unit[..., None]
        total = _sum(norms.flatten(0, 1).T).view_as(unit)
    for i, gradient in out.items():
        x, d = layers[i], layers[i].shape[2]
        # Neighbours of the layer's dtype first.
        edges = sorted(_edges(pairs, i), key=lambda edge: layers[edge[1]].dtype != x.dtype)
        weights = columns = None
        if norms is not None:
            n_ = rows.valid
            few = (n_ - 2).clamp(min=1)
            weights = torch.zeros_like(norms[0])
            for k, j in edges:
                upstream = 2 * grad[k] if i == j else grad[k]
                common = total[j] / (few * (n_ - 1).clamp(min=1))
                term = common[:, None] - (n_ / few)[:, None] * norms[j]
                weights = weights + upstream[:, None] * term
            weights = weights * (2 / unit[i])[:, None]
            columns = _column_totals(x, rows, *centres[i], weights.contiguous())
            columns = columns / n_.clamp(min=1)[:, None]
        neighbours = [j for _, j in edges]
        forward_ = [pairs[2 * k] == i for k, _ in edges]  # of X_iᵀ X_j, not X_jᵀ X_i
        listed = [layers[j] for j in neighbours] + [x]
        others = tuple(y for y in listed if y.dtype != x.dtype)
        alike = len(edges) - len(others)
        launch = launch_parameters("feature_apply", x)
        tiles = triton.cdiv(n, launch["BLOCK"]) * triton.cdiv(d, launch["BLOCK_D"])
        with torch.cuda.device_of(x):
            _feature_apply[(tiles * problems,)](
                gradient, (*listed[:alike], x), others or None, starts, means, kept, grad, unit,
                weights, columns,
                rows.mask, (*neighbours, i), tuple(y.shape[2] for y in listed),
                tuple(y.stride(0) for y in listed), tuple(y.stride(1) for y in listed),
                tuple(offsets[j] for j in (*neighbours, i)),
                tuple(problems * sum(sizes[:k]) for k, _ in edges),
                tuple(1 if ahead else d for ahead in forward_),
                tuple(y.shape[2] if ahead else 1
                      for ahead, y in zip(forward_, listed[:-1], strict=True)),
                tuple(k for k, _ in edges), grad.stride(), len(edges), i, alike, len(edges),
                problems, n, d, **_operands_of_gradient(x), **launch,
            )  # fmt: skip
