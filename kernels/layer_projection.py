"""Attention of each student layer over all teacher layers, token by token, and its loss.

With h_i, g_j the states of a token, S_ij = ⟨h_i, g_j⟩, α = softmax_j(scale S), C_i = Σ_j α_ij g_j,

    attend="states"  ℓ_i = objective(h_i, C_i)       attend="losses"  ℓ_i = Σ_j α_ij m_ij,
                                                     m_ij = objective(h_i, g_j)
    attend="pairs"   ℓ_i = objective(h_i, g_i), without weights

and, with u, D the derivatives of the objective by its second and its first argument,

    ∂α_ij = ⟨u_i, g_j⟩, or m_ij              dS_ij = scale α_ij (∂α_ij - Σ_k α_ik ∂α_ik)
    dh_i = D_i + Σ_j dS_ij g_j               dg_j = Σ_i (α_ij u_i + dS_ij h_i)
    (losses: D_i = Σ_j α_ij D_ij, and u_ij in place of u_i)

A program walks the features of its tokens several times: scores, what the objective needs (norms,
normalisers), ∂α, gradients. Layers are separate tensors: their addresses are kernel arguments, from
which a program makes a table [TOKENS, layers], so that one load reads all layers of a token. Tiles
are [TOKENS or PARTS, layers, BLOCK] features; products of tiles are batched over the first, which
is spread over warps:

    wide    one token, its features in PARTS. While they fit (HELD), every loop is unrolled, and
            the compiler keeps what was loaded first: one read. Otherwise later reads hit the cache.
    narrow  TOKENS tokens of up to NARROW features. For up to FEW, the loss and the student's
            gradient have a kernel in which each lane takes a token.

Half-precision states are multiplied as they are; what multiplies them (weights) enters as the sum
of two numbers of their precision. A single teacher layer (α = 1) is its own projection, bit by bit:
what makes C of up to 16 layers has full precision, no multiplication and addition are contracted
(`enable_fp_fusion`), and sums that must agree are made by one reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.divergence import LN_2, LOG2_E, weighted
from kdfast.kernels.launch import widest

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
EPS = tl.constexpr(1e-8)


# Tokens, their layers, and products of tiles. SHAPE is (TOKENS, PARTS, CHUNKS, BLOCK, HELD), KIND
# is (operand of products, its precision, that of products that make C, operand and precision of
# products with gradients). Statistics are [TOKENS, ...].


@triton.jit
def _tokens(token, mask, mask_strides, count, total, TOKENS: tl.constexpr, WIDE: tl.constexpr):
    """The program's tokens: their number, place in [A, B], whether they exist and take part."""
    # Divisions of 64 bits are slow: only where there are so many tokens.
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * TOKENS + token
    inside = index < total
    a, b = (index // count).to(tl.int64), (index % count).to(tl.int64)
    valid = inside
    if mask is not None:
        at = mask + a * mask_strides[0] + b * mask_strides[1]
        valid = valid & (tl.load(at, mask=inside, other=0) != 0)
    return index.to(tl.int64), a, b, inside, valid


@triton.jit
def _of(values, index):
    """values[index]; the alignment that all have in common survives. One value stands for all."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def _addresses(layers, row, ROWS: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the layers of some rows begin, for the row numbers ROWS; or the row number itself.

    Chosen as numbers, because AMD's compiler chooses among no pointers; which hides that all are
    ALIGNED to 16 bytes.
    """
    if len(layers) == 1:  # whose alignment is seen; a hint on what folds into a scalar is an error
        chosen = tl.broadcast_to(layers[0], row.shape)
    else:
        chosen = layers[0].to(tl.int64)
        for i in tl.static_range(1, len(layers)):
            number = i if ROWS is None else ROWS[i]
            chosen = tl.where(row == number, layers[i].to(tl.int64), chosen)
        chosen = tl.broadcast_to(chosen, row.shape).to(layers[0].dtype)
        if ALIGNED:
            chosen = tl.multiple_of(chosen, [16, 16])
    return chosen


@triton.jit
def _tokens_of(layers, strides, a, b, row, ALIGNED: tl.constexpr):
    """Where each layer of each token begins, [TOKENS, ROWS]."""
    at = _addresses(layers, row, None, ALIGNED)
    return at + a * _of(strides[0], row) + b * _of(strides[1], row)


@triton.jit
def _among(row, ROWS: tl.constexpr):
    found = row == ROWS[0]
    for i in tl.static_range(1, len(ROWS)):
        found = found | (row == ROWS[i])
    return found


@triton.jit
def _place(row, ROWS: tl.constexpr):
    """Where a row number stands among ROWS; 0 if it does not."""
    place = 0
    for i in tl.static_range(1, len(ROWS)):
        place = tl.where(row == ROWS[i], i, place)
    return place


@triton.jit
def _columns(begin, chunk: tl.constexpr, SHAPE: tl.constexpr):
    """Features of a tile [PARTS, 1, BLOCK]."""
    part = tl.arange(0, SHAPE[1])[:, None, None]
    begin += chunk * SHAPE[1] * SHAPE[3]
    return begin + part * SHAPE[3] + tl.arange(0, SHAPE[3])[None, None, :]


@triton.jit
def _read(at, present, column, d):
    mask = present[:, :, None] & (column < d)
    return tl.load(at[:, :, None] + column, mask=mask, other=0.0)


@triton.jit
def _write(at, present, column, d, values):
    mask = present[:, :, None] & (column < d)
    tl.store(at[:, :, None] + column, values.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _over_features(x, SHAPE: tl.constexpr):
    """Σ over the features of a tile, [TOKENS, rows]."""
    return _of_all_parts(tl.sum(x, 2), SHAPE)


@triton.jit
def _add(a, b, c, d):
    return a + c, b + d


@triton.jit
def _both_over_features(x, y, SHAPE: tl.constexpr):
    """The same of two tiles, in the same order: equal tiles have equal sums."""
    if INTERPRETED:  # slow there, and its order is one
        return _over_features(x, SHAPE), _over_features(y, SHAPE)
    else:
        x, y = tl.reduce((x, y), 2, _add)
        if SHAPE[1] > 1:
            x, y = tl.reduce((x, y), 0, _add, keep_dims=True)
        return x, y


@triton.jit
def _largest(x, SHAPE: tl.constexpr):
    x = tl.max(x, 2)
    if SHAPE[1] > 1:
        x = tl.max(x, 0, keep_dims=True)
    return x


@triton.jit
def _product(x, y, total, PRECISION: tl.constexpr):
    """total + x y, of matrices one by one. Warps are spread over these, or over a single one."""
    if x.shape[0] > 1:
        return tl.dot(x, y, total, input_precision=PRECISION)
    else:
        m: tl.constexpr = x.shape[1]
        n: tl.constexpr = y.shape[2]
        k: tl.constexpr = x.shape[2]
        x, y = tl.reshape(x, [m, k]), tl.reshape(y, [k, n])
        total = tl.dot(x, y, tl.reshape(total, [m, n]), input_precision=PRECISION)
        return tl.reshape(total, [1, m, n])


@triton.jit
def _inner(x, y, total, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """total + ⟨x_i, y_j⟩ of two tiles, part by part."""
    y = tl.permute(y.to(OPERAND), (0, 2, 1))
    return _product(x.to(OPERAND), y, total, PRECISION)


@triton.jit
def _of_all_parts(x, SHAPE: tl.constexpr):
    """[TOKENS, ...]"""
    if SHAPE[1] > 1:
        x = tl.sum(x, 0, keep_dims=True)
    return x


@triton.jit
def _mixed(weights, tile, OPERAND: tl.constexpr, PRECISION: tl.constexpr):
    """Σ_j weights_ij tile_j."""
    weights = tl.broadcast_to(weights, [tile.shape[0], weights.shape[1], weights.shape[2]])
    tile = tile.to(OPERAND)
    high = weights.to(OPERAND)
    total = tl.zeros([tile.shape[0], weights.shape[1], tile.shape[2]], tl.float32)
    if tl.float32 != OPERAND:
        low = (weights - high.to(tl.float32)).to(OPERAND)
        total = _product(low, tile, total, PRECISION)
    return _product(high, tile, total, PRECISION)


@triton.jit
def _inner_of_layers(
    at_x, in_x, at_y, in_y, d, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    SHAPE: tl.constexpr,
):  # fmt: skip
    """⟨x_i, y_j⟩ over all features, [TOKENS, rows of x, rows of y]."""
    step: tl.constexpr = SHAPE[1] * SHAPE[2] * SHAPE[3]
    sums = tl.zeros([SHAPE[0] * SHAPE[1], at_x.shape[1], at_y.shape[1]], tl.float32)
    for begin in range(0, step if SHAPE[4] else d, step):
        for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
            column = _columns(begin, chunk, SHAPE)
            x, y = _read(at_x, in_x, column, d), _read(at_y, in_y, column, d)
            sums = _inner(x, y, sums, OPERAND, PRECISION)
    return _of_all_parts(sums, SHAPE)


@triton.jit
def _softmax(scores, many):
    """Over the first `many` of the last dimension."""
    scores = tl.where(tl.arange(0, scores.shape[2])[None, None, :] < many, scores, -float("inf"))
    p = tl.exp2((scores - tl.max(scores, 2, keep_dims=True)) * LOG2_E)
    return p / tl.sum(p, 2, keep_dims=True)


@triton.jit
def _through_softmax(p, gradient):
    """The gradient of the scores, of that of p = softmax(scores)."""
    return p * (gradient - tl.sum(p * gradient, 2, keep_dims=True))


# The objectives. `statistics` of states h and their target c:
#
#     mse      none
#     cosine   |h|, |c|, at least EPS, and cos(h, c)
#     kl       of h/T and c/T: maximum and Σ exp(x - maximum) each
#
# Targets may be the mixtures [TOKENS, L_s], or one teacher layer [TOKENS, 1] that broadcasts.


@triton.jit
def _logits(x, column, d, over_temperature):
    return tl.where(column < d, x.to(tl.float32) * over_temperature, -float("inf"))


@triton.jit
def _no_statistics(x, y, OBJECTIVE: tl.constexpr):
    """Before any feature, for rows like those of x and y [TOKENS, rows]."""
    x, y = tl.zeros(x.shape, tl.float32), tl.zeros(y.shape, tl.float32)
    start = 0.0
    if OBJECTIVE == "kl":
        start = -float("inf")
    return x + start, x, y + start, y


@triton.jit
def _more_statistics(
    statistics, x, y, column, d, over_temperature, OBJECTIVE: tl.constexpr, SHAPE: tl.constexpr
):
    """kl: as above. cosine: Σ x², Σ x y (of tiles of one shape), Σ y², in places 1, 0, 3."""
    if OBJECTIVE == "kl":
        was_x, sum_x, was_y, sum_y = statistics
        x, y = _logits(x, column, d, over_temperature), _logits(y, column, d, over_temperature)
        top_x = tl.maximum(was_x, _largest(x, SHAPE))
        top_y = tl.maximum(was_y, _largest(y, SHAPE))
        x = tl.exp2((x - top_x[:, :, None]) * LOG2_E)
        y = tl.exp2((y - top_y[:, :, None]) * LOG2_E)
        more_x, more_y = _both_over_features(x, y, SHAPE)
        sum_x = sum_x * tl.exp2((was_x - top_x) * LOG2_E) + more_x
        sum_y = sum_y * tl.exp2((was_y - top_y) * LOG2_E) + more_y
        return top_x, sum_x, top_y, sum_y
    else:
        product, square_x, unused, square_y = statistics
        x, y = x.to(tl.float32), y.to(tl.float32)
        if x.shape[1] == y.shape[1]:  # otherwise the scores have it
            product += _over_features(x * y, SHAPE)
        square_x += _over_features(x * x, SHAPE)
        square_y += _over_features(y * y, SHAPE)
        return product, square_x, unused, square_y


@triton.jit
def _norm(square):
    return tl.maximum(tl.sqrt_rn(square), EPS)


@triton.jit
def _probabilities(h, c, statistics, column, d, over_temperature):
    """q = softmax(h/T), p = softmax(c/T), log p/q."""
    top_h, sum_h, top_c, sum_c = statistics
    h = _logits(h, column, d, over_temperature) - top_h[:, :, None]
    c = _logits(c, column, d, over_temperature) - top_c[:, :, None]
    log_ratio = c - h + (tl.log2(tl.div_rn(sum_h, sum_c)) * LN_2)[:, :, None]
    q = tl.exp2(h * LOG2_E) * tl.div_rn(1.0, sum_h)[:, :, None]
    p = tl.exp2(c * LOG2_E) * tl.div_rn(1.0, sum_c)[:, :, None]
    return q, p, log_ratio


@triton.jit
def _part_of_loss(
    h, c, statistics, column, d, over_temperature, OBJECTIVE: tl.constexpr, SHAPE: tl.constexpr
):
    """A tile's part of objective(h, c), [TOKENS, rows]; not of the cosine."""
    if OBJECTIVE == "kl":
        _, p, log_ratio = _probabilities(h, c, statistics, column, d, over_temperature)
        return _over_features(weighted(p, log_ratio), SHAPE)
    else:
        difference = h.to(tl.float32) - c.to(tl.float32)
        return _over_features(difference * difference, SHAPE) / d


@triton.jit
def _derivatives(h, c, statistics, loss, column, d, over_temperature, OBJECTIVE: tl.constexpr):
    """u, by the target c, and D, by the states h."""
    if OBJECTIVE == "mse":
        by_h = (h.to(tl.float32) - c.to(tl.float32)) * (2.0 / d)
        by_c = -by_h
    elif OBJECTIVE == "cosine":
        norm_h, norm_c, cosine, _ = statistics
        along_h, along_c = tl.where(norm_h > EPS, cosine, 0.0), tl.where(norm_c > EPS, cosine, 0.0)
        over_h, over_c = (1.0 / norm_h)[:, :, None], (1.0 / norm_c)[:, :, None]
        h, c = h.to(tl.float32) * over_h, c.to(tl.float32) * over_c
        by_c = (along_c[:, :, None] * c - h) * over_c
        by_h = (along_h[:, :, None] * h - c) * over_h
    else:
        q, p, log_ratio = _probabilities(h, c, statistics, column, d, over_temperature)
        by_c = weighted(p, log_ratio - loss[:, :, None]) * over_temperature
        by_h = (q - p) * over_temperature
    return by_c, by_h


@triton.jit
def _target(weights, g, KIND: tl.constexpr):
    """The mixtures of the teacher's layers; without weights they are the targets themselves."""
    if weights is None:
        return g
    else:
        return _mixed(weights, g, KIND[0], tl.constexpr(KIND[2]))


@triton.jit
def _compare_states(
    weights, at_s, in_s, at_t, in_t, d, over_temperature, OBJECTIVE: tl.constexpr,
    NEEDS_LOSS: tl.constexpr, KIND: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Statistics of states and their targets, and the losses [TOKENS, L_s]."""
    step: tl.constexpr = SHAPE[1] * SHAPE[2] * SHAPE[3]
    statistics = _no_statistics(at_s, at_s, OBJECTIVE)
    loss = tl.zeros(at_s.shape, tl.float32)
    if OBJECTIVE != "mse":
        for begin in range(0, step if SHAPE[4] else d, step):
            for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                column = _columns(begin, chunk, SHAPE)
                h, g = _read(at_s, in_s, column, d), _read(at_t, in_t, column, d)
                c = _target(weights, g, KIND)
                statistics = _more_statistics(
                    statistics, h, c, column, d, over_temperature, OBJECTIVE, SHAPE
                )
    if OBJECTIVE == "cosine":
        norm_s, norm_c = _norm(statistics[1]), _norm(statistics[3])
        cosine = statistics[0] / norm_s / norm_c
        statistics = norm_s, norm_c, cosine, cosine
        loss = 1.0 - cosine
    elif NEEDS_LOSS:
        for begin in range(0, step if SHAPE[4] else d, step):
            for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                column = _columns(begin, chunk, SHAPE)
                h, g = _read(at_s, in_s, column, d), _read(at_t, in_t, column, d)
                c = _target(weights, g, KIND)
                loss += _part_of_loss(
                    h, c, statistics, column, d, over_temperature, OBJECTIVE, SHAPE
                )
    return statistics, loss


@triton.jit
def _column(x, layer):
    """x[..., layer], of a statistic of the teacher [TOKENS, L_t] or of pairs [TOKENS, L_s, L_t]."""
    if len(x.shape) == 3:
        return tl.sum(tl.where(tl.arange(0, x.shape[2])[None, None, :] == layer, x, 0.0), 2)
    else:
        row = tl.arange(0, x.shape[1])[None, :]
        return tl.sum(tl.where(row == layer, x, 0.0), 1, keep_dims=True)


@triton.jit
def _of_pair(statistics, layer, OBJECTIVE: tl.constexpr):
    """The statistics of the student and one teacher layer, of those of all."""
    if OBJECTIVE == "mse":
        return statistics
    elif OBJECTIVE == "cosine":
        norm_s, norm_t, cosine, _ = statistics
        cosine = _column(cosine, layer)
        return norm_s, _column(norm_t, layer), cosine, cosine
    else:
        top_s, sum_s, top_t, sum_t = statistics
        return top_s, sum_s, _column(top_t, layer), _column(sum_t, layer)


@triton.jit
def _compare_layers(
    scores, at_s, in_s, at_t, in_t, layers_t, strides_t, a, b, valid, many_t, d, over_temperature,
    OBJECTIVE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Statistics of the student's and the teacher's states, and m [TOKENS, L_s, L_t]."""
    step: tl.constexpr = SHAPE[1] * SHAPE[2] * SHAPE[3]
    statistics = _no_statistics(at_s, at_t, OBJECTIVE)
    if OBJECTIVE != "mse":
        for begin in range(0, step if SHAPE[4] else d, step):
            for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                column = _columns(begin, chunk, SHAPE)
                h, g = _read(at_s, in_s, column, d), _read(at_t, in_t, column, d)
                statistics = _more_statistics(
                    statistics, h, g, column, d, over_temperature, OBJECTIVE, SHAPE
                )
    losses = tl.zeros(scores.shape, tl.float32)
    if OBJECTIVE == "cosine":
        norm_s, norm_t = _norm(statistics[1]), _norm(statistics[3])
        cosine = scores / norm_s[:, :, None] / norm_t[:, None, :]
        return (norm_s, norm_t, cosine, cosine), 1.0 - cosine
    else:
        layer_t = tl.arange(0, losses.shape[2])[None, None, :]
        for begin in range(0, step if SHAPE[4] else d, step):
            for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                column = _columns(begin, chunk, SHAPE)
                h = _read(at_s, in_s, column, d)
                for layer in range(many_t):
                    at = _of(layers_t, layer)
                    at += a * _of(strides_t[0], layer) + b * _of(strides_t[1], layer)
                    g = _read(at, valid, column, d)
                    of_pair = _of_pair(statistics, layer, OBJECTIVE)
                    loss = _part_of_loss(
                        h, g, of_pair, column, d, over_temperature, OBJECTIVE, SHAPE
                    )
                    losses += tl.where(layer_t == layer, loss[:, :, None], 0.0)
        return statistics, losses


# The kernels.


@triton.jit
def _project(
    projected, weights, layers_s, layers_t, mask, strides_s, strides_t, mask_strides, count, total,
    d, scale, WANTED: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, SHAPE: tl.constexpr, ROWS_S: tl.constexpr, ROWS_T: tl.constexpr,
):  # fmt: skip
    """α and the mixtures."""
    token = tl.arange(0, SHAPE[0])[:, None]
    index, a, b, inside, valid = _tokens(token, mask, mask_strides, count, total, SHAPE[0], WIDE)
    many_s: tl.constexpr = len(layers_s)
    many_t: tl.constexpr = len(layers_t)
    row_s, row_t = tl.arange(0, ROWS_S)[None, :], tl.arange(0, ROWS_T)[None, :]
    at_s, in_s = _tokens_of(layers_s, strides_s, a, b, row_s, ALIGNED), valid & (row_s < many_s)
    at_t, in_t = _tokens_of(layers_t, strides_t, a, b, row_t, ALIGNED), valid & (row_t < many_t)

    scores = _inner_of_layers(at_s, in_s, at_t, in_t, d, KIND[0], tl.constexpr(KIND[1]), SHAPE)
    alpha = tl.where(valid[:, :, None], _softmax(scores * scale, many_t), 0.0)
    pair = row_s[:, :, None] * many_t + row_t[:, None, :]
    exists = inside[:, :, None] & (row_s < many_s)[:, :, None] & (row_t < many_t)[:, None, :]
    tl.store(weights + index[:, :, None] * (many_s * many_t) + pair, alpha, mask=exists)

    to, wanted = _addresses(projected, row_s, WANTED, ALIGNED), _among(row_s, WANTED)
    step: tl.constexpr = SHAPE[1] * SHAPE[2] * SHAPE[3]
    for begin in range(0, step if SHAPE[4] else d, step):
        for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
            column = _columns(begin, chunk, SHAPE)
            c = _mixed(alpha, _read(at_t, in_t, column, d), KIND[0], tl.constexpr(KIND[2]))
            _write(to + index * d, inside & wanted, column, d, c)


@triton.jit
def _project_backward(
    out_s, out_t, grad_projected, grad_weights, weights, layers_s, layers_t, mask, strides_grad,
    strides_s, strides_t, mask_strides, count, total, d, scale, WANTED_S: tl.constexpr,
    WANTED_T: tl.constexpr, WIDE: tl.constexpr, ALIGNED: tl.constexpr,
    KIND: tl.constexpr, SHAPE: tl.constexpr, ROWS_S: tl.constexpr, ROWS_T: tl.constexpr,
):  # fmt: skip
    """The gradients, of those of the mixtures (which are u) and of α."""
    token = tl.arange(0, SHAPE[0])[:, None]
    index, a, b, inside, valid = _tokens(token, mask, mask_strides, count, total, SHAPE[0], WIDE)
    many_s: tl.constexpr = len(layers_s)
    many_t: tl.constexpr = len(layers_t)
    row_s, row_t = tl.arange(0, ROWS_S)[None, :], tl.arange(0, ROWS_T)[None, :]
    in_s, in_t = valid & (row_s < many_s), valid & (row_t < many_t)
    at_s = _tokens_of(layers_s, strides_s, a, b, row_s, ALIGNED)
    at_t = _tokens_of(layers_t, strides_t, a, b, row_t, ALIGNED)
    at_u = _tokens_of(grad_projected, strides_grad, a, b, row_s, ALIGNED)

    pair = index[:, :, None] * (many_s * many_t) + row_s[:, :, None] * many_t + row_t[:, None, :]
    exists = in_s[:, :, None] & in_t[:, None, :]
    alpha = tl.load(weights + pair, mask=exists, other=0.0)
    grad_alpha = tl.load(grad_weights + pair, mask=exists, other=0.0)
    grad_alpha += _inner_of_layers(at_u, in_s, at_t, in_t, d, KIND[0], tl.constexpr(KIND[1]), SHAPE)
    grad_scores = _through_softmax(alpha, grad_alpha) * scale

    step: tl.constexpr = SHAPE[1] * SHAPE[2] * SHAPE[3]
    for begin in range(0, step if SHAPE[4] else d, step):
        for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
            column = _columns(begin, chunk, SHAPE)
            if out_s is not None:
                g = _read(at_t, in_t, column, d)
                to, wanted = _addresses(out_s, row_s, WANTED_S, ALIGNED), _among(row_s, WANTED_S)
                _write(
                    to + index * d,
                    inside & wanted,
                    column,
                    d,
                    _mixed(grad_scores, g, KIND[3], tl.constexpr(KIND[4])),
                )
            if out_t is not None:
                h, u = _read(at_s, in_s, column, d), _read(at_u, in_s, column, d)
                gradient = _mixed(tl.permute(alpha, (0, 2, 1)), u, KIND[3], tl.constexpr(KIND[4]))
                gradient += _mixed(
                    tl.permute(grad_scores, (0, 2, 1)), h, KIND[3], tl.constexpr(KIND[4])
                )
                to = _addresses(out_t, row_t, WANTED_T, ALIGNED) + index * d
                _write(to, inside & _among(row_t, WANTED_T), column, d, gradient)


@triton.jit
def _loss(
    rows, out_s, out_t, grad_rows, layers_s, layers_t, mask, grad_strides, strides_s, strides_t,
    mask_strides, count, total, d, scale, over_temperature, OBJECTIVE: tl.constexpr,
    LOSSES: tl.constexpr, WANTED_S: tl.constexpr, WANTED_T: tl.constexpr, WIDE: tl.constexpr,
    ALIGNED: tl.constexpr, KIND: tl.constexpr, SHAPE: tl.constexpr, ROWS_S: tl.constexpr,
    ROWS_T: tl.constexpr,
):  # fmt: skip
    """ℓ, or, given the gradients of ℓ, those of the layers."""
    token = tl.arange(0, SHAPE[0])[:, None]
    index, a, b, inside, valid = _tokens(token, mask, mask_strides, count, total, SHAPE[0], WIDE)
    many_s: tl.constexpr = len(layers_s)
    many_t: tl.constexpr = len(layers_t)
    row_s, row_t = tl.arange(0, ROWS_S)[None, :], tl.arange(0, ROWS_T)[None, :]
    in_s, in_t = valid & (row_s < many_s), valid & (row_t < many_t)
    at_s = _tokens_of(layers_s, strides_s, a, b, row_s, ALIGNED)
    at_t = _tokens_of(layers_t, strides_t, a, b, row_t, ALIGNED)
    step: tl.constexpr = SHAPE[1] * SHAPE[2] * SHAPE[3]

    scores = _inner_of_layers(at_s, in_s, at_t, in_t, d, KIND[0], tl.constexpr(KIND[1]), SHAPE)
    alpha = _softmax(scores * scale, many_t)
    if LOSSES:
        statistics, grad_alpha = _compare_layers(
            scores, at_s, in_s, at_t, in_t, layers_t, strides_t, a, b, valid, many_t, d,
            over_temperature, OBJECTIVE, SHAPE,
        )  # fmt: skip
        loss = tl.sum(alpha * grad_alpha, 2)
    else:
        statistics, loss = _compare_states(
            alpha, at_s, in_s, at_t, in_t, d, over_temperature, OBJECTIVE,
            OBJECTIVE == "kl" or grad_rows is None, KIND, SHAPE,
        )  # fmt: skip

    if grad_rows is None:
        loss = tl.where(valid, loss, 0.0)
        tl.store(rows + index * many_s + row_s, loss, mask=inside & (row_s < many_s))
    else:
        at_rows = grad_rows + a * grad_strides[0] + b * grad_strides[1] + row_s * grad_strides[2]
        upstream = tl.load(at_rows, mask=in_s, other=0.0)
        if LOSSES:
            grad_scores = _through_softmax(alpha, grad_alpha) * scale
            for begin in range(0, step if SHAPE[4] else d, step):
                for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                    column = _columns(begin, chunk, SHAPE)
                    h = _read(at_s, in_s, column, d)
                    gradient = tl.zeros(h.shape, tl.float32)
                    for layer in range(many_t):
                        at = _of(layers_t, layer)
                        at += a * _of(strides_t[0], layer) + b * _of(strides_t[1], layer)
                        g = _read(at, valid, column, d)
                        u, by_h = _derivatives(
                            h, g, _of_pair(statistics, layer, OBJECTIVE),
                            _column(grad_alpha, layer), column, d, over_temperature, OBJECTIVE,
                        )  # fmt: skip
                        weight = _column(alpha, layer)[:, :, None]
                        grad_score = _column(grad_scores, layer)[:, :, None]
                        gradient += weight * by_h + grad_score * g.to(tl.float32)
                        if out_t is not None:
                            by_t = weight * u + grad_score * h.to(tl.float32)
                            by_t = tl.where(in_s[:, :, None], by_t * upstream[:, :, None], 0.0)
                            by_t = tl.sum(by_t, 1, keep_dims=True)
                            to, wanted = (
                                _addresses(out_t, row_t, WANTED_T, ALIGNED),
                                _among(row_t, WANTED_T),
                            )
                            _write(
                                to + index * d, inside & wanted & (row_t == layer), column, d, by_t
                            )
                    if out_s is not None:
                        gradient *= upstream[:, :, None]
                        to = _addresses(out_s, row_s, WANTED_S, ALIGNED) + index * d
                        _write(to, inside & _among(row_s, WANTED_S), column, d, gradient)
        else:
            sums = tl.zeros([SHAPE[0] * SHAPE[1], ROWS_S, ROWS_T], tl.float32)
            for begin in range(0, step if SHAPE[4] else d, step):
                for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                    column = _columns(begin, chunk, SHAPE)
                    h, g = _read(at_s, in_s, column, d), _read(at_t, in_t, column, d)
                    c = _mixed(alpha, g, KIND[0], tl.constexpr(KIND[2]))
                    u, _ = _derivatives(
                        h, c, statistics, loss, column, d, over_temperature, OBJECTIVE
                    )
                    sums = _inner(u, g, sums, KIND[3], tl.constexpr(KIND[4]))
            grad_scores = _through_softmax(alpha, _of_all_parts(sums, SHAPE)) * scale
            for begin in range(0, step if SHAPE[4] else d, step):
                for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                    column = _columns(begin, chunk, SHAPE)
                    h, g = _read(at_s, in_s, column, d), _read(at_t, in_t, column, d)
                    c = _mixed(alpha, g, KIND[0], tl.constexpr(KIND[2]))
                    u, by_h = _derivatives(
                        h, c, statistics, loss, column, d, over_temperature, OBJECTIVE
                    )
                    if out_s is not None:
                        gradient = by_h + _mixed(grad_scores, g, KIND[3], tl.constexpr(KIND[4]))
                        gradient *= upstream[:, :, None]
                        to = _addresses(out_s, row_s, WANTED_S, ALIGNED) + index * d
                        _write(to, inside & _among(row_s, WANTED_S), column, d, gradient)
                    if out_t is not None:
                        u = tl.where(in_s[:, :, None], u, 0.0)
                        back = tl.permute(alpha * upstream[:, :, None], (0, 2, 1))
                        gradient = _mixed(back, u, KIND[3], tl.constexpr(KIND[4]))
                        back = tl.permute(grad_scores * upstream[:, :, None], (0, 2, 1))
                        gradient += _mixed(back, h, KIND[3], tl.constexpr(KIND[4]))
                        to = _addresses(out_t, row_t, WANTED_T, ALIGNED) + index * d
                        _write(to, inside & _among(row_t, WANTED_T), column, d, gradient)


@triton.jit
def _loss_of_pairs(
    rows, out_s, out_t, grad_rows, layers_s, layers_t, mask, grad_strides, strides_s, strides_t,
    mask_strides, count, total, d, over_temperature, OBJECTIVE: tl.constexpr,
    WANTED_S: tl.constexpr, WANTED_T: tl.constexpr, WIDE: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """As `_loss`, of layers of the same number; a program takes some tokens of one pair."""
    token = tl.arange(0, SHAPE[0])[:, None]
    index, a, b, inside, valid = _tokens(token, mask, mask_strides, count, total, SHAPE[0], WIDE)
    pair = tl.program_id(1)
    at_s = _of(layers_s, pair) + a * _of(strides_s[0], pair) + b * _of(strides_s[1], pair)
    at_t = _of(layers_t, pair) + a * _of(strides_t[0], pair) + b * _of(strides_t[1], pair)
    statistics, loss = _compare_states(
        None, at_s, valid, at_t, valid, d, over_temperature, OBJECTIVE,
        OBJECTIVE == "kl" or grad_rows is None, None, SHAPE,
    )  # fmt: skip
    if grad_rows is None:
        tl.store(rows + index * len(layers_s) + pair, tl.where(valid, loss, 0.0), mask=inside)
    else:
        at_rows = grad_rows + a * grad_strides[0] + b * grad_strides[1] + pair * grad_strides[2]
        upstream = tl.load(at_rows, mask=valid, other=0.0)[:, :, None]
        step: tl.constexpr = SHAPE[1] * SHAPE[2] * SHAPE[3]
        for begin in range(0, step if SHAPE[4] else d, step):
            for chunk in tl.static_range(tl.constexpr(SHAPE[2])):
                column = _columns(begin, chunk, SHAPE)
                h, g = _read(at_s, valid, column, d), _read(at_t, valid, column, d)
                by_t, by_s = _derivatives(
                    h, g, statistics, loss, column, d, over_temperature, OBJECTIVE
                )
                if out_s is not None:
                    wanted = inside & _among(pair, WANTED_S)
                    to = _of(out_s, _place(pair, WANTED_S)) + index * d
                    _write(to, wanted, column, d, by_s * upstream)
                if out_t is not None:
                    wanted = inside & _among(pair, WANTED_T)
                    to = _of(out_t, _place(pair, WANTED_T)) + index * d
                    _write(to, wanted, column, d, by_t * upstream)


# Few features: a lane takes a token, and what the objective needs of it is in its registers. Tiles
# are [layers, TOKENS], one for each feature.


@triton.jit
def _and(values, value):
    return values + (value,)


@triton.jit
def _feature_sum(x, y):
    """Σ_k x_k y_k."""
    total = x[0] * y[0]
    for k in tl.static_range(1, len(x)):
        total += x[k] * y[k]
    return total


@triton.jit
def _features_times(x, factor):
    products = ()
    for k in tl.static_range(len(x)):
        products = _and(products, x[k] * factor)
    return products


@triton.jit
def _normalised(x, over_temperature):
    """x/T less its maximum, and Σ exp of that."""
    x = _features_times(x, over_temperature)
    top = x[0]
    for k in tl.static_range(1, len(x)):
        top = tl.maximum(top, x[k])
    less, total = (), tl.zeros_like(top)
    for k in tl.static_range(len(x)):
        less = _and(less, x[k] - top)
        total += tl.exp2((x[k] - top) * LOG2_E)
    return less, total


@triton.jit
def _objective_of_features(h, c, over_temperature, OBJECTIVE: tl.constexpr):
    """objective(h, c), u and D, of states h [1, TOKENS] and targets c [any, TOKENS]."""
    by_c, by_h = (), ()
    if OBJECTIVE == "mse":
        loss = tl.zeros_like(c[0])
        for k in tl.static_range(len(h)):
            difference = h[k] - c[k]
            loss += difference * difference
            by_h = _and(by_h, difference * (2.0 / len(h)))
            by_c = _and(by_c, difference * (-2.0 / len(h)))
        loss /= len(h)
    elif OBJECTIVE == "cosine":
        norm_h, norm_c = _norm(_feature_sum(h, h)), _norm(_feature_sum(c, c))
        cosine = _feature_sum(h, c) / norm_h / norm_c
        along_h, along_c = tl.where(norm_h > EPS, cosine, 0.0), tl.where(norm_c > EPS, cosine, 0.0)
        for k in tl.static_range(len(h)):
            unit_h, unit_c = h[k] / norm_h, c[k] / norm_c
            by_h = _and(by_h, (along_h * unit_h - unit_c) / norm_h)
            by_c = _and(by_c, (along_c * unit_c - unit_h) / norm_c)
        loss = 1.0 - cosine
    else:
        h, sum_h = _normalised(h, over_temperature)
        c, sum_c = _normalised(c, over_temperature)
        log_ratio = tl.log2(tl.div_rn(sum_h, sum_c)) * LN_2
        loss = tl.zeros_like(log_ratio)
        for k in tl.static_range(len(h)):
            p = tl.exp2(c[k] * LOG2_E) / sum_c
            loss += weighted(p, c[k] - h[k] + log_ratio)
        for k in tl.static_range(len(h)):
            q = tl.exp2(h[k] * LOG2_E) / sum_h
            p = tl.exp2(c[k] * LOG2_E) / sum_c
            by_h = _and(by_h, (q - p) * over_temperature)
            by_c = _and(by_c, weighted(p, c[k] - h[k] + log_ratio - loss) * over_temperature)
    return loss, by_c, by_h


@triton.jit
def _loss_of_few_features(
    rows, out_s, out_t, grad_rows, layers_s, layers_t, mask, grad_strides, strides_s, strides_t,
    mask_strides, count, total, scale, over_temperature, D: tl.constexpr,
    OBJECTIVE: tl.constexpr, LOSSES: tl.constexpr, WANTED_S: tl.constexpr, WANTED_T: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS_T: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """As `_loss`, without the teacher's gradients (`out_t`)."""
    token = tl.arange(0, TOKENS)[None, :]
    index, a, b, inside, valid = _tokens(token, mask, mask_strides, count, total, TOKENS, WIDE)
    many_s: tl.constexpr = len(layers_s)
    row_t = tl.arange(0, ROWS_T)[:, None]
    in_t = valid & (row_t < len(layers_t))
    at_t = (
        _addresses(layers_t, row_t, None, ALIGNED)
        + a * _of(strides_t[0], row_t)
        + b * _of(strides_t[1], row_t)
    )
    g = ()
    for k in tl.static_range(D):
        g = _and(g, tl.load(at_t + k, mask=in_t, other=0.0).to(tl.float32))

    for i in tl.static_range(many_s):
        at_s = (
            layers_s[i]
            + a * strides_s[0][i % len(strides_s[0])]
            + b * strides_s[1][i % len(strides_s[1])]
        )
        h = ()
        for k in tl.static_range(D):
            h = _and(h, tl.load(at_s + k, mask=valid, other=0.0).to(tl.float32))
        scores = tl.where(row_t < len(layers_t), _feature_sum(g, h) * scale, -float("inf"))
        alpha = tl.exp2((scores - tl.max(scores, 0, keep_dims=True)) * LOG2_E)
        alpha = alpha / tl.sum(alpha, 0, keep_dims=True)
        c = g
        if not LOSSES:
            c = ()
            for k in tl.static_range(D):
                c = _and(c, tl.sum(alpha * g[k], 0, keep_dims=True))
        loss, u, by_h = _objective_of_features(h, c, over_temperature, OBJECTIVE)
        grad_alpha = loss
        if not LOSSES:
            grad_alpha = _feature_sum(u, g)
        else:
            loss = tl.sum(alpha * loss, 0, keep_dims=True)
        if grad_rows is None:
            tl.store(rows + index * many_s + i, tl.where(valid, loss, 0.0), mask=inside)
        else:
            at = grad_rows + a * grad_strides[0] + b * grad_strides[1] + i * grad_strides[2]
            upstream = tl.load(at, mask=valid, other=0.0)
            grad_scores = alpha * (grad_alpha - tl.sum(alpha * grad_alpha, 0, keep_dims=True))
            grad_scores *= scale
            for place in tl.static_range(len(WANTED_S)):
                if WANTED_S[place] == i:
                    to = out_s[place] + index * D
                    for k in tl.static_range(D):
                        gradient = tl.sum(grad_scores * g[k], 0, keep_dims=True)
                        if LOSSES:
                            gradient += tl.sum(alpha * by_h[k], 0, keep_dims=True)
                        else:
                            gradient += by_h[k]
                        gradient = (gradient * upstream).to(to.dtype.element_ty)
                        tl.store(to + k, gradient, mask=inside)


# The widest states of which a program takes several tokens, and how many numbers those have.
NARROW, NUMBERS = 32, 4096
# Features of a part. Held are at most CHUNKS of them by a warp, so many bytes by a thread, and so
# many scores of each part.
BLOCK, WARPS, CHUNKS, SCORES = 32, 8, 4, 512
HELD = {"forward": 384, "backward": 192}
# Tokens of a program of few features, how many those are, and of how many layers at most.
LANES, FEW, FEW_LAYERS = 128, 4, 16
# Of states that are compared in pairs, the most that are read at once.
WIDEST = 2048
# Under the interpreter: several tokens at a time, for its speed.
INTERPRETED_SHAPE = (16, 1, 1, 64, False)
# Bytes of addresses and strides of one launch, of which it takes 4 KB.
ARGUMENTS = 3584


def architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def warp_size(device: torch.device) -> int:
    return 64 if architecture(device) == "gfx942" else 32


def compiler_options(device: torch.device, warps: int, registers: int) -> dict[str, Any]:
    if INTERPRETED.value:  # which knows none
        return {}
    options: dict[str, Any] = {"num_warps": warps, "enable_fp_fusion": False}
    if architecture(device).startswith("sm_"):  # ptxas may spill to fit one more: not here
        options["maxnreg"] = min(registers, 65536 // (32 * warps))
    return options


def few_features(x: Tensor, many_s: int, many_t: int, objective: str, losses: bool) -> bool:
    """Whether a lane takes a token: what the student's gradients need is in its registers."""
    few = x.shape[2] <= FEW and many_t <= FEW_LAYERS and many_s <= FEW_LAYERS
    return few and (not losses or objective == "mse")


def launch_parameters(
    x: Tensor, rows_s: int, rows_t: int, direction: str, registers: int = 255
) -> dict[str, Any]:
    """Shape of a program, its warps and stages."""
    d, size, rows = x.shape[-1], x.dtype.itemsize, rows_s + rows_t
    if INTERPRETED.value:
        return {"SHAPE": INTERPRETED_SHAPE}
    warps, stages = 4, 1
    if d <= NARROW:
        block = max(16, triton.next_power_of_2(d))
        tokens = max(1, NUMBERS // (triton.next_power_of_2(rows) * block))
        shape = (tokens, 1, 1, block, True)
    else:
        held = min(CHUNKS, HELD[direction] // (size * rows))
        warps = triton.next_power_of_2(triton.cdiv(d, max(held, 1) * BLOCK))
        if held > 0 and warps <= WARPS and rows_s * rows_t <= SCORES:
            shape = (1, warps, triton.cdiv(d, warps * BLOCK), BLOCK, True)
            if shape[2] == CHUNKS:  # too many numbers for fewer registers
                registers = 255
        else:
            few, block = rows_s * rows_t <= SCORES, 2 * BLOCK // size
            warps, stages = (4, 2) if few else (WARPS, 1)
            shape = (1, warps if few else 1, 1, block, False)
    options = compiler_options(x.device, warps, registers)
    return {"SHAPE": shape, "num_stages": stages, **options}


def launch_parameters_of_pairs(x: Tensor) -> dict[str, Any]:
    """As `launch_parameters`: whole states of as many tokens as make enough numbers to wait for."""
    if INTERPRETED.value:
        return {"SHAPE": INTERPRETED_SHAPE}
    block = min(max(16, triton.next_power_of_2(x.shape[-1])), WIDEST)
    shape = (max(1, NUMBERS // block), 1, 1, block, x.shape[-1] <= block)
    return {"SHAPE": shape, "num_stages": 1, **compiler_options(x.device, WARPS, 255)}


def kinds(x: Tensor, rows_t: int) -> tuple[Any, ...]:
    """KIND of the kernels.

    Three TF32 products keep float32's digits on NVIDIA's tensor cores; AMD's take float32. What
    makes C is exact for α = 1. In backward, float16 has not the range: TF32 has as many digits.
    """
    nvidia = architecture(x.device).startswith("sm_")
    if x.dtype == torch.bfloat16 and not INTERPRETED.value:
        return (tl.bfloat16, "ieee", "ieee", tl.bfloat16, "ieee")
    if x.dtype == torch.float16:
        return (tl.float16, "ieee", "ieee", tl.float32, "tf32" if nvidia else "ieee")
    single = "tf32x3" if nvidia else "ieee"
    # Products of CUDA cores take too many registers for sums over many layers.
    return (tl.float32, single, "ieee" if rows_t <= 16 else single, tl.float32, single)


def _strides(layers: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of all layers, or of one for all."""
    first, second = (tuple(x.stride(k) for x in layers) for k in (0, 1))
    if len({*zip(first, second, strict=True)}) == 1:
        return first[:1], second[:1]
    return first, second


def _rows(many: int, least: int) -> int:
    return max(least, triton.next_power_of_2(many))


def _launch(
    kernel: Any,
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    mask: Tensor | None,
    outputs: int,
    direction: str,
    *,
    square: bool = False,
    teacher: bool = False,
    registers: int = 255,
    grads: Sequence[Tensor] = (),
    **others: Any,
) -> None:
    """`outputs` is the number of tensors that the kernel writes, which `others` hold; with `square`
    both sides have as many rows, with `teacher` products sum over student layers."""
    x = widest((layers_s[0], layers_t[0]))
    tokens, count, d = x.shape[0] * x.shape[1], x.shape[1], x.shape[2]
    if tokens == 0:
        return
    sides = {"s": layers_s, "t": layers_t, **({"grad": grads} if grads else {})}
    strides = {name: _strides(layers) for name, layers in sides.items()}
    addresses = outputs + sum(map(len, sides.values()))
    if 8 * (addresses + sum(2 * len(first) for first, _ in strides.values())) > ARGUMENTS:
        sides = {name: [x.contiguous() for x in layers] for name, layers in sides.items()}
        strides = {name: _strides(layers) for name, layers in sides.items()}
    arguments = {
        "layers_s": tuple(sides["s"]), "layers_t": tuple(sides["t"]),
        "strides_s": strides["s"], "strides_t": strides["t"],
        "mask": None if mask is None else mask.view(torch.uint8),
        "mask_strides": (0, 0) if mask is None else mask.stride(),
        "count": count, "total": tokens, "WIDE": tokens >= 1 << 30,
        **others,
    }  # fmt: skip
    if kernel is not _loss_of_pairs:
        arguments["ALIGNED"] = all(
            x.data_ptr() % 16 == 0 for layers in sides.values() for x in layers
        )
    if grads:
        arguments |= {"grad_projected": tuple(sides["grad"]), "strides_grad": strides["grad"]}
    if kernel is _loss_of_pairs:
        launch = launch_parameters_of_pairs(x)
        grid: tuple[int, ...] = (triton.cdiv(tokens, launch["SHAPE"][0]), len(layers_s))
        arguments |= {"d": d, **launch}
    elif (
        kernel is _loss
        and not teacher
        and few_features(x, len(layers_s), len(layers_t), others["OBJECTIVE"], others["LOSSES"])
    ):
        kernel, grid = _loss_of_few_features, (triton.cdiv(tokens, LANES),)
        arguments |= {"D": d, "ROWS_T": _rows(len(layers_t), 1), "TOKENS": LANES}
        arguments |= compiler_options(x.device, LANES // warp_size(x.device), 255)
    else:
        # Tensor cores sum over 16 and more; NVIDIA's pad fewer rows of a result by themselves.
        least = 8 if architecture(x.device).startswith("sm_") and not teacher else 16
        rows_s, rows_t = _rows(len(layers_s), least), _rows(len(layers_t), 16)
        if square:
            rows_s = rows_t = max(rows_s, rows_t)
        launch = launch_parameters(x, rows_s, rows_t, direction, registers)
        grid = (triton.cdiv(tokens, launch["SHAPE"][0]),)
        arguments |= {
            "d": d,
            "KIND": kinds(x, rows_t),
            "ROWS_S": rows_s,
            "ROWS_T": rows_t,
            **launch,
        }
    with torch.cuda.device_of(x):
        kernel[grid](**arguments)


def _gradients(
    layers_s: list[Tensor], layers_t: list[Tensor], wanted: list[int]
) -> tuple[list[Tensor], dict[str, Any]]:
    """Memory for the gradients, and the arguments that hand it to a kernel."""
    every = [*layers_s, *layers_t]
    made = {i: every[i].new_empty(every[i].shape) for i in wanted}
    many = len(layers_s)
    of_s, of_t = [i for i in wanted if i < many], [i for i in wanted if i >= many]
    return [made[i] for i in wanted], {
        "out_s": tuple(made[i] for i in of_s) or None,
        "out_t": tuple(made[i] for i in of_t) or None,
        "WANTED_S": tuple(of_s),
        "WANTED_T": tuple(i - many for i in of_t),
        "teacher": bool(of_t),
        "outputs": len(wanted),
        "direction": "backward",
    }


def forward(
    layers_s: list[Tensor], layers_t: list[Tensor], mask: Tensor | None, scale: float
) -> list[Tensor]:
    """The projected states of each student layer, and α [A, B, L_s, L_t]."""
    x = layers_s[0]
    many = len(layers_s)
    projected = [x.new_empty(x.shape) for _ in layers_s]
    weights = x.new_empty((*x.shape[:-1], many, len(layers_t)), dtype=torch.float32)
    _launch(
        _project, layers_s, layers_t, mask, many + 1, "forward", projected=tuple(projected),
        weights=weights, scale=scale, WANTED=tuple(range(many)),
    )  # fmt: skip
    return [*projected, weights]


def backward(
    grad_projected: list[Tensor],
    grad_weights: Tensor,
    weights: Tensor,
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    mask: Tensor | None,
    scale: float,
    wanted: list[int],
) -> list[Tensor]:
    """The gradients of the layers `wanted`, contiguous."""
    gradients, arguments = _gradients(layers_s, layers_t, wanted)
    if wanted:
        _launch(
            _project_backward, layers_s, layers_t, mask, grads=grad_projected,
            grad_weights=grad_weights.contiguous(), weights=weights.contiguous(), scale=scale,
            **arguments,
        )  # fmt: skip
    return gradients


def loss_forward(
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    mask: Tensor | None,
    objective: str,
    losses: bool,
    scale: float,
    temperature: float,
) -> Tensor:
    """ℓ [A, B, L_s]."""
    x = layers_s[0]
    rows = x.new_empty((*x.shape[:-1], len(layers_s)), dtype=torch.float32)
    _launch(
        _loss, layers_s, layers_t, mask, 1, "forward", square=losses and objective == "kl",
        rows=rows, out_s=None, out_t=None, grad_rows=None, grad_strides=(0, 0, 0), scale=scale,
        over_temperature=1 / temperature, OBJECTIVE=objective, LOSSES=losses, WANTED_S=(),
        WANTED_T=(),
    )  # fmt: skip
    return rows


def loss_backward(
    grad_rows: Tensor,
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    mask: Tensor | None,
    objective: str,
    losses: bool,
    scale: float,
    temperature: float,
    wanted: list[int],
) -> list[Tensor]:
    """The gradients of the layers `wanted`, contiguous."""
    gradients, arguments = _gradients(layers_s, layers_t, wanted)
    if wanted:
        # Two programs fit on a processor, where nothing spills.
        x = layers_s[0]
        few = objective == "mse" and not losses and not arguments["teacher"]
        few = few and architecture(x.device) == "sm_90"
        few = few and x.dtype == layers_t[0].dtype == torch.bfloat16
        few = few and x.shape[2] % 16 == 0 and len(layers_s) <= 8 and len(layers_t) <= 16
        _launch(
            _loss, layers_s, layers_t, mask, square=losses and objective == "kl", rows=None,
            registers=128 if few else 255, grad_rows=grad_rows, grad_strides=grad_rows.stride(),
            scale=scale, over_temperature=1 / temperature, OBJECTIVE=objective, LOSSES=losses,
            **arguments,
        )  # fmt: skip
    return gradients


def pairs_forward(
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    mask: Tensor | None,
    objective: str,
    temperature: float,
) -> Tensor:
    """ℓ [A, B, L] of layers of the same number."""
    x = layers_s[0]
    rows = x.new_empty((*x.shape[:-1], len(layers_s)), dtype=torch.float32)
    _launch(
        _loss_of_pairs, layers_s, layers_t, mask, 1, "forward", rows=rows, out_s=None, out_t=None,
        grad_rows=None, grad_strides=(0, 0, 0), over_temperature=1 / temperature,
        OBJECTIVE=objective, WANTED_S=(), WANTED_T=(),
    )  # fmt: skip
    return rows


def pairs_backward(
    grad_rows: Tensor,
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    mask: Tensor | None,
    objective: str,
    temperature: float,
    wanted: list[int],
) -> list[Tensor]:
    """The gradients of the layers `wanted`, contiguous."""
    gradients, arguments = _gradients(layers_s, layers_t, wanted)
    if wanted:
        _launch(
            _loss_of_pairs, layers_s, layers_t, mask, rows=None, grad_rows=grad_rows,
            grad_strides=grad_rows.stride(), over_temperature=1 / temperature, OBJECTIVE=objective,
            **arguments,
        )  # fmt: skip
    return gradients
