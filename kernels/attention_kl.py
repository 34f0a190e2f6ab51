"""KL divergence between two attentions, straight from queries and keys, tile by tile.

With x = log2(e) scale q kᵀ of each side, m its maximum so far and l = Σ_j 2^(x_j - m), one sweep
over the keys gives a row of KL(p ‖ q), p being the side that weighs, from the shifted sum

    a = Σ_j 2^(x_p,j - m_p) ((x_p,j - m_p) - (x_q,j - m_q)),
    KL = ln 2 (a / l_p - log2 l_p + log2 l_q).

When the maxima move, with c = 2^(m_p_old - m_p): l_p ← c l_p and
a ← c (a + l_p_old ((m_p_old - m_p) - (m_q_old - m_q))). Without the shift a large score common to a
row would cost its digits. "js" needs both normalisers before its first term, hence a second sweep.

Backward computes the scores again, once for dQ (a program holds queries and streams keys) and once
for dK (the other way round), so that no sum is shared between programs: no atomics, and results
repeat bit by bit. Σ_j dS_ij = 0 holds only up to the rounding of the saved log-sum-exp, which is
common to a row and would multiply what all keys have in common; dQ is therefore taken about a
centre c of the keys, dQ_i = Σ_j dS_ij k_j - (Σ_j dS_ij) c.

Multiplications and additions are never contracted (`enable_fp_fusion`), save where the source says
fma: equal maps must go through equal arithmetic to give exactly zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.divergence import LN_2, LOG2_E, to_middle, weighted
from kdfast.kernels.launch import widest

# Where maxima start: finite, so that no difference of two of them is NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _visibility(
    seen,
    counts,
    key_mask,
    query_mask,
    cu_seqlens,
    key_mask_strides,
    query_mask_strides,
    batch,
    queries,
    keys,
    sequences,
    search_steps,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Per query the interval of keys it sees, per key that of the queries which see it.

    seen [3, B, Nq + Nk] gets first, last + 1 and whether something in between is masked, zeros for
    a line that sees nothing; counts [B, tiles of queries] the queries that take part.
    """
    query_tiles = tl.cdiv(queries, BLOCK)
    tiles = query_tiles + tl.cdiv(keys, BLOCK)
    tile, b = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    of_queries, of_keys = tile < query_tiles, tile >= query_tiles
    line = tl.where(of_keys, tile - query_tiles, tile) * BLOCK + tl.arange(0, BLOCK)
    lines = tl.where(of_keys, keys, queries)
    others = tl.where(of_keys, queries, keys)
    diagonal = line + tl.where(of_keys, queries - keys, keys - queries)

    first = tl.zeros_like(line)
    stop = first + others
    if CAUSAL:
        first = tl.maximum(first, tl.where(of_keys, diagonal, 0))
        stop = tl.minimum(stop, tl.where(of_keys, others, diagonal + 1))
    if WINDOW:
        first = tl.maximum(first, diagonal - window)
        stop = tl.minimum(stop, diagonal + window + 1)
    alive = line < lines
    if cu_seqlens is not None:
        low, high = tl.zeros_like(line), tl.zeros_like(line) + sequences
        for _ in range(search_steps):
            middle = (low + high) // 2
            searching = low < high
            end = tl.load(cu_seqlens + 1 + middle, mask=searching, other=0)
            low = tl.where(searching & (end <= line), middle + 1, low)
            high = tl.where(searching & (end > line), middle, high)
        alive = alive & (low < sequences)
        first = tl.maximum(first, tl.load(cu_seqlens + low, mask=alive, other=0).to(tl.int32))
        stop = tl.minimum(stop, tl.load(cu_seqlens + 1 + low, mask=alive, other=0).to(tl.int32))
    if query_mask is not None:
        query_mask += tl.cast(b, tl.int64) * query_mask_strides[0]
        at = query_mask + line.to(tl.int64) * query_mask_strides[1]
        alive = alive & (of_keys | (tl.load(at, mask=(line < queries), other=0) != 0))
    if key_mask is not None:
        key_mask += tl.cast(b, tl.int64) * key_mask_strides[0]
        at = key_mask + line.to(tl.int64) * key_mask_strides[1]
        alive = alive & (of_queries | (tl.load(at, mask=(line < keys), other=0) != 0))
    first = tl.where(alive, first, others)
    stop = tl.where(alive, stop, 0)

    holes = tl.zeros_like(line)
    if (query_mask is not None) or (key_mask is not None):
        inner_first, inner_stop = tl.zeros_like(line) + others, tl.zeros_like(line)
        found = tl.zeros_like(line)
        for begin in range(tl.min(first, 0) // 32 * 32, tl.max(stop, 0), 32):
            other = begin + tl.arange(0, 32)
            valid = other < others
            if query_mask is not None:
                at_other = query_mask + other.to(tl.int64) * query_mask_strides[1]
                valid = valid & (tl.load(at_other, mask=valid & of_keys, other=1) != 0)
            if key_mask is not None:
                at_other = key_mask + other.to(tl.int64) * key_mask_strides[1]
                valid = valid & (tl.load(at_other, mask=valid & of_queries, other=1) != 0)
            visible = (other[None, :] >= first[:, None]) & (other[None, :] < stop[:, None])
            visible = visible & valid[None, :]
            inner_first = tl.minimum(inner_first, tl.min(tl.where(visible, other, others), 1))
            inner_stop = tl.maximum(inner_stop, tl.max(tl.where(visible, other + 1, 0), 1))
            found += tl.sum(visible.to(tl.int32), 1)
        first, stop = inner_first, inner_stop
        holes = (found < stop - first).to(tl.int32)
    some = stop > first
    at = seen + tl.cast(b, tl.int64) * (queries + keys) + tl.where(of_keys, queries, 0) + line
    plane = tl.cast(batch, tl.int64) * (queries + keys)
    tl.store(at, tl.where(some, first, 0), mask=line < lines)
    tl.store(at + plane, tl.where(some, stop, 0), mask=line < lines)
    tl.store(at + 2 * plane, tl.where(some, holes, 0), mask=line < lines)
    count = tl.sum((some & (line < lines)).to(tl.int32), 0)
    tl.store(counts + tl.cast(b, tl.int64) * query_tiles + tile, count, mask=tile < query_tiles)


@triton.jit
def _place(tiles, chunks, heads, batch):
    """A program's tile of lines, chunk of features, head, element of the batch and layer pair."""
    program = tl.program_id(0)
    tile, program = program % tiles, program // tiles
    chunk, program = program % chunks, program // chunks
    head, program = program % heads, program // heads
    return tile, chunk, head, program % batch, program // batch


@triton.jit
def _of_pair(values, pair):
    """values[pair]; the alignment that all have in common survives."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(pair == i, values[i], chosen)
    return chosen


@triton.jit
def _head(tensors, strides, pair, batch, head):
    """Address of one head [N, d]."""
    at = tl.cast(batch, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return _of_pair(tensors, pair) + at


@triton.jit
def _rows_of(head, b, row_heads, queries):
    """Where the rows of one head begin in [B, row_heads, Nq]."""
    return (tl.cast(head, tl.int64) + tl.cast(b, tl.int64) * row_heads) * queries


@triton.jit
def _tile(lines, column, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """[lines, BLOCK_D] from `column` on; zero beyond the width and where not valid.

    Lines are (address of the head, strides, indices, which of them are valid or None for all).
    """
    base, strides, index, valid = lines
    columns = column + tl.arange(0, BLOCK_D)
    at = base + index.to(tl.int64)[:, None] * strides[2] + columns[None, :]
    inside = (columns < D)[None, :]
    if valid is None:
        if D % BLOCK_D == 0:
            tile = tl.load(at)
        else:
            tile = tl.load(at, mask=inside, other=0.0)
    else:
        if D % BLOCK_D == 0:
            tile = tl.load(at, mask=valid[:, None], other=0.0)
        else:
            tile = tl.load(at, mask=valid[:, None] & inside, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def _products(
    held,
    streamed,
    rows,
    columns,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """q kᵀ: of the two tiles, or of chunks loaded here when one tile does not hold the width."""
    if D <= BLOCK_D:
        total = tl.dot(held, tl.trans(streamed), input_precision=PRECISION)
    else:
        total = tl.zeros([rows[2].shape[0], columns[2].shape[0]], tl.float32)
        for column in range(0, D, BLOCK_D):
            q = _tile(rows, column, D, BLOCK_D, UPCAST)
            k = _tile(columns, column, D, BLOCK_D, UPCAST)
            total = tl.dot(q, tl.trans(k), total, input_precision=PRECISION)
    return total


@triton.jit
def _mean_log2(
    rows,
    columns,
    lse_t,
    queries,
    scale_t,
    heads_t,
    group_t,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """log2 of the average of the teacher's maps; rows and columns are of its first heads."""
    query_t, query_strides, query, valid_query = rows
    key_t, key_strides, key, valid_key = columns
    top = tl.full([query.shape[0], key.shape[0]], -float("inf"), tl.float32)
    total = tl.zeros_like(top)
    for head in range(heads_t):
        q = query_t + tl.cast(head, tl.int64) * query_strides[1]
        k = key_t + tl.cast(head // group_t, tl.int64) * key_strides[1]
        at = lse_t + tl.cast(head, tl.int64) * queries + query
        if valid_query is None:
            lse = tl.load(at)
        else:
            lse = tl.load(at, mask=valid_query, other=0.0)
        of_head, of_key_head = (
            (q, query_strides, query, valid_query),
            (k, key_strides, key, valid_key),
        )
        q_t = _tile(of_head, 0, D, BLOCK_D, UPCAST)
        k_t = _tile(of_key_head, 0, D, BLOCK_D, UPCAST)
        raw = _products(q_t, k_t, of_head, of_key_head, D, BLOCK_D, UPCAST, PRECISION)
        log_p = raw * scale_t - lse[:, None]
        higher = tl.maximum(top, log_p)
        level = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(top - level) + tl.exp2(log_p - level)
        top = higher
    return tl.where(total == 0.0, -float("inf"), top + tl.log2(total / heads_t))


@triton.jit
def _seen(seen, line, valid, others, plane, SEEN: tl.constexpr):
    """What each line sees, [first, stop); empty for a line that takes no part."""
    if SEEN:
        first = tl.load(seen + line, mask=valid, other=0)
        stop = tl.load(seen + plane + line, mask=valid, other=0)
    else:
        first = tl.zeros_like(line)
        stop = tl.where(valid, others, 0)
    return first, stop


@triton.jit
def _interval(seen, line, valid, others, plane, BLOCK: tl.constexpr, SEEN: tl.constexpr):
    """What each line sees, [first, stop), and the tiles of the others for all lines together.

    Tiles begin..end hold all that some line sees; of these full..full_end hide nothing from any
    line that takes part.
    """
    first, stop = _seen(seen, line, valid, others, plane, SEEN)
    holes = 0
    if SEEN:
        at = seen + 2 * tl.cast(plane, tl.int64) + line
        holes = tl.max(tl.load(at, mask=valid, other=0), 0)
    some = stop > first
    lowest, highest = tl.min(tl.where(some, first, others), 0), tl.max(stop, 0)
    begin, end = lowest // BLOCK, tl.cdiv(highest, BLOCK)
    full = tl.cdiv(tl.max(first, 0), BLOCK)
    full_end = tl.where(holes > 0, 0, tl.min(tl.where(some, stop, others), 0) // BLOCK)
    begin = tl.minimum(begin, end)
    full = tl.minimum(tl.maximum(full, begin), end)
    full_end = tl.minimum(tl.maximum(full_end, full), end)
    return first, stop, lowest, highest, begin, full, full_end, end


@triton.jit
def _partial_tile(step, begin, full, full_end):
    """The step-th of the tiles begin..full and full_end..end."""
    return tl.where(step < full - begin, begin + step, full_end + step - (full - begin))


@triton.jit
def _valid_others(seen, other, lowest, highest, plane, SEEN: tl.constexpr):
    """Others that some line sees and that see some line: what they hold may enter a product."""
    valid = (other >= lowest) & (other < highest)
    if SEEN:
        valid = valid & (tl.load(seen + plane + other, mask=valid, other=0) > 0)
    return valid


@triton.jit
def _forward(
    rows,
    inner,
    lse_s,
    lse_t,
    seen,
    query_s,
    key_s,
    query_t,
    key_t,
    query_s_strides,
    key_s_strides,
    query_t_strides,
    key_t_strides,
    scale_s,
    scale_t,
    batch,
    heads,
    heads_t,
    group_s,
    group_t,
    queries,
    keys,
    row_heads,
    row_heads_t,
    seen_stride,
    plane,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    DIRECTION: tl.constexpr,
    MEAN: tl.constexpr,
    SEEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of the divergence and both log-sum-exps (base 2) of BLOCK_M queries of one head."""
    tile, _, head, b, pair = _place(tl.cdiv(queries, BLOCK_M), 1, heads, batch)
    head_t = head % heads_t

    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    seen += tl.cast(b, tl.int64) * seen_stride
    first, stop, lowest, highest, begin, full, full_end, end = _interval(
        seen, query, query < queries, keys, plane, BLOCK_N, SEEN
    )
    takes_part = stop > first

    qs = _head(query_s, query_s_strides, pair, b, head)
    ks = _head(key_s, key_s_strides, pair, b, head // group_s)
    qt = _head(query_t, query_t_strides, pair, b, 0 if MEAN else head_t)
    kt = _head(key_t, key_t_strides, pair, b, 0 if MEAN else head_t // group_t)
    rows_s = (qs, query_s_strides, query, takes_part)
    rows_t = (qt, query_t_strides, query, takes_part)
    at_t = _rows_of(pair * heads_t, b, row_heads_t, queries)
    factor_s, factor_t = _of_pair(scale_s, pair), _of_pair(scale_t, pair)
    q_s = _tile(rows_s, 0, D_S, BLOCK_S, UPCAST)
    if not MEAN:
        q_t = _tile(rows_t, 0, D_T, BLOCK_T, UPCAST)

    m_s = tl.full([BLOCK_M], LOWEST, tl.float32)
    m_t = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_s = tl.zeros([BLOCK_M], tl.float32)
    l_t = tl.zeros([BLOCK_M], tl.float32)
    sum_s = tl.zeros([BLOCK_M], tl.float32)
    sum_t = tl.zeros([BLOCK_M], tl.float32)
    SWEEPS: tl.constexpr = 2 if DIRECTION == "js" else 1
    for SWEEP in tl.static_range(SWEEPS):
        if SWEEP == 1:
            inverse_s, inverse_t = tl.div_rn(1.0, l_s), tl.div_rn(1.0, l_t)
            log_ratio = tl.log2(tl.div_rn(l_s, l_t))
        for PARTIAL in tl.static_range(2):
            steps = (full - begin) + (end - full_end) if PARTIAL else full_end - full
            for step in tl.range(0, steps, num_stages=1 if PARTIAL else None):
                if PARTIAL:
                    key = _partial_tile(step, begin, full, full_end) * BLOCK_N
                    key += tl.arange(0, BLOCK_N)
                    valid = _valid_others(seen + queries, key, lowest, highest, plane, SEEN)
                    visible = (key[None, :] >= first[:, None]) & (key[None, :] < stop[:, None])
                    visible = visible & valid[None, :]
                else:
                    key = (full + step) * BLOCK_N + tl.arange(0, BLOCK_N)
                keys_s = (ks, key_s_strides, key, valid if PARTIAL else None)
                keys_t = (kt, key_t_strides, key, valid if PARTIAL else None)
                k_s = _tile(keys_s, 0, D_S, BLOCK_S, UPCAST)
                raw_s = _products(q_s, k_s, rows_s, keys_s, D_S, BLOCK_S, UPCAST, PRECISION)
                x_s = raw_s * factor_s
                if MEAN:
                    x_t = _mean_log2(
                        rows_t, keys_t, lse_t + at_t, queries, factor_t, heads_t, group_t,
                        D_T, BLOCK_T, UPCAST, PRECISION,
                    )  # fmt: skip
                else:
                    k_t = _tile(keys_t, 0, D_T, BLOCK_T, UPCAST)
                    raw_t = _products(q_t, k_t, rows_t, keys_t, D_T, BLOCK_T, UPCAST, PRECISION)
                    x_t = raw_t * factor_t

                if PARTIAL:
                    x_s = tl.where(visible, x_s, -float("inf"))
                    x_t = tl.where(visible, x_t, -float("inf"))
                if SWEEP == 0:
                    new_s, new_t = tl.maximum(m_s, tl.max(x_s, 1)), tl.maximum(m_t, tl.max(x_t, 1))
                    fall_s, fall_t = m_s - new_s, m_t - new_t
                    m_s, m_t = new_s, new_t
                x_s, x_t = x_s - m_s[:, None], x_t - m_t[:, None]
                e_s, e_t = tl.exp2(x_s), tl.exp2(x_t)
                if SWEEP == 0:
                    c_s, c_t = tl.exp2(fall_s), tl.exp2(fall_t)
                    if DIRECTION == "forward":
                        moved = weighted(c_t, tl.fma(l_t, fall_t - fall_s, sum_t))
                        sum_t = moved + tl.sum(weighted(e_t, x_t - x_s), 1)
                    if DIRECTION == "reverse":
                        moved = weighted(c_s, tl.fma(l_s, fall_s - fall_t, sum_s))
                        sum_s = moved + tl.sum(weighted(e_s, x_s - x_t), 1)
                    l_s = tl.fma(l_s, c_s, tl.sum(e_s, 1))
                    l_t = tl.fma(l_t, c_t, tl.sum(e_t, 1))
                else:
                    difference = (x_t - x_s + log_ratio[:, None]) * LN_2
                    from_s, from_t = to_middle(difference)
                    sum_s += tl.sum(weighted(e_s * inverse_s[:, None], from_s), 1)
                    sum_t += tl.sum(weighted(e_t * inverse_t[:, None], from_t), 1)

    if DIRECTION == "forward":
        row = (tl.div_rn(sum_t, l_t) + tl.log2(tl.div_rn(l_s, l_t))) * LN_2
    elif DIRECTION == "reverse":
        row = (tl.div_rn(sum_s, l_s) + tl.log2(tl.div_rn(l_t, l_s))) * LN_2
    else:
        row = 0.5 * (sum_s + sum_t)
    at = _rows_of(pair * heads + head, b, row_heads, queries)
    inside = query < queries
    tl.store(rows + at + query, tl.where(takes_part, row, 0.0), mask=inside)
    if DIRECTION == "js":
        tl.store(inner + at + query, tl.where(takes_part, sum_s, 0.0), mask=inside)
    log_sum = tl.where(takes_part, m_s + tl.log2(l_s), float("inf"))
    tl.store(lse_s + at + query, log_sum, mask=inside)
    if not MEAN:
        at = at_t + tl.cast(head_t, tl.int64) * queries
        log_sum = tl.where(takes_part, m_t + tl.log2(l_t), float("inf"))
        tl.store(lse_t + at + query, log_sum, mask=inside)


@triton.jit
def _log_sum_exp(
    lse_t,
    seen,
    query_t,
    key_t,
    query_t_strides,
    key_t_strides,
    scale_t,
    batch,
    heads_t,
    group_t,
    queries,
    keys,
    row_heads_t,
    seen_stride,
    plane,
    D_T: tl.constexpr,
    SEEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The teacher's log-sum-exp (base 2), which the average of its maps needs beforehand."""
    tile, _, head, b, pair = _place(tl.cdiv(queries, BLOCK_M), 1, heads_t, batch)
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    seen += tl.cast(b, tl.int64) * seen_stride
    first, stop, lowest, highest, begin, full, full_end, end = _interval(
        seen, query, query < queries, keys, plane, BLOCK_N, SEEN
    )
    takes_part = stop > first
    qt = _head(query_t, query_t_strides, pair, b, head)
    kt = _head(key_t, key_t_strides, pair, b, head // group_t)
    rows_t = (qt, query_t_strides, query, takes_part)
    factor = _of_pair(scale_t, pair)
    q_t = _tile(rows_t, 0, D_T, BLOCK_T, UPCAST)
    m = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for step in range(end - begin):
        key = (begin + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        valid = _valid_others(seen + queries, key, lowest, highest, plane, SEEN)
        visible = (key[None, :] >= first[:, None]) & (key[None, :] < stop[:, None])
        keys_t = (kt, key_t_strides, key, valid)
        k_t = _tile(keys_t, 0, D_T, BLOCK_T, UPCAST)
        raw = _products(q_t, k_t, rows_t, keys_t, D_T, BLOCK_T, UPCAST, PRECISION)
        x = tl.where(visible & valid[None, :], raw * factor, -float("inf"))
        new = tl.maximum(m, tl.max(x, 1))
        total = tl.fma(total, tl.exp2(m - new), tl.sum(tl.exp2(x - new[:, None]), 1))
        m = new
    at = _rows_of(pair * heads_t + head, b, row_heads_t, queries)
    log_sum = tl.where(takes_part, m + tl.log2(total), float("inf"))
    tl.store(lse_t + at + query, log_sum, mask=query < queries)


@triton.jit
def _score_gradient(log_s, log_t, moment, DIRECTION: tl.constexpr):
    """dS for an upstream gradient of 1, of base-2 logs; moment is KL(s ‖ t), or KL(s ‖ m)."""
    p_s = tl.exp2(log_s)
    if DIRECTION == "forward":
        gradient = p_s - tl.exp2(log_t)
    elif DIRECTION == "reverse":
        gradient = weighted(p_s, tl.fma(log_s - log_t, LN_2, -moment))
    else:
        from_s, _ = to_middle((log_t - log_s) * LN_2)
        gradient = 0.5 * weighted(p_s, from_s - moment)
    return gradient


@triton.jit
def _centre(lines, column, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A point amid the tile's rows; what is not finite must not spread from here."""
    tile = _tile(lines, column, D, BLOCK_D, True)
    tile = tl.where(tl.abs(tile) < float("inf"), tile, 0.0)
    return tl.sum(tile, 0) / tl.maximum(tl.sum(lines[3].to(tl.float32), 0), 1.0)


@triton.jit
def _backward_query(
    grad_query,
    grad_rows,
    moments,
    lse_s,
    lse_t,
    seen,
    query_s,
    key_s,
    query_t,
    key_t,
    grad_strides,
    grad_rows_strides,
    query_s_strides,
    key_s_strides,
    query_t_strides,
    key_t_strides,
    scale_s,
    scale_t,
    batch,
    heads,
    heads_t,
    group_s,
    group_t,
    queries,
    keys,
    row_heads,
    row_heads_t,
    seen_stride,
    plane,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    DIRECTION: tl.constexpr,
    MEAN: tl.constexpr,
    SEEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ of BLOCK_M queries of one head; of BLOCK_S features, where the width is larger."""
    tile, chunk, head, b, pair = _place(
        tl.cdiv(queries, BLOCK_M), tl.cdiv(D_S, BLOCK_S), heads, batch
    )
    head_t, column = head % heads_t, chunk * BLOCK_S
    query = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    seen += tl.cast(b, tl.int64) * seen_stride
    first, stop, lowest, highest, begin, full, full_end, end = _interval(
        seen, query, query < queries, keys, plane, BLOCK_N, SEEN
    )
    takes_part = stop > first

    qs = _head(query_s, query_s_strides, pair, b, head)
    ks = _head(key_s, key_s_strides, pair, b, head // group_s)
    qt = _head(query_t, query_t_strides, pair, b, 0 if MEAN else head_t)
    kt = _head(key_t, key_t_strides, pair, b, 0 if MEAN else head_t // group_t)
    rows_s = (qs, query_s_strides, query, takes_part)
    rows_t = (qt, query_t_strides, query, takes_part)
    factor_s, factor_t = _of_pair(scale_s, pair), _of_pair(scale_t, pair)
    at = _rows_of(pair * heads + head, b, row_heads, queries)
    at_t = _rows_of(pair * heads_t, b, row_heads_t, queries)
    q_s = _tile(rows_s, 0, D_S, BLOCK_S, UPCAST)
    log_sum_s = tl.load(lse_s + at + query, mask=takes_part, other=0.0)
    if not MEAN:
        q_t = _tile(rows_t, 0, D_T, BLOCK_T, UPCAST)
        log_sum_t = tl.load(
            lse_t + at_t + tl.cast(head_t, tl.int64) * queries + query, mask=takes_part, other=0.0
        )
    moment = tl.zeros([BLOCK_M], tl.float32)
    if DIRECTION != "forward":
        moment = tl.load(moments + at + query, mask=takes_part, other=0.0)
    amid = begin * BLOCK_N + tl.arange(0, BLOCK_N)
    amid_valid = _valid_others(seen + queries, amid, lowest, highest, plane, SEEN)
    centre = _centre((ks, key_s_strides, amid, amid_valid), column, D_S, BLOCK_S)

    gradient = tl.zeros([BLOCK_M, BLOCK_S], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    for PARTIAL in tl.static_range(2):
        steps = (full - begin) + (end - full_end) if PARTIAL else full_end - full
        for step in tl.range(0, steps, num_stages=1 if PARTIAL else None):
            if PARTIAL:
                key = _partial_tile(step, begin, full, full_end) * BLOCK_N
                key += tl.arange(0, BLOCK_N)
                valid = _valid_others(seen + queries, key, lowest, highest, plane, SEEN)
            else:
                key = (full + step) * BLOCK_N + tl.arange(0, BLOCK_N)
            keys_s = (ks, key_s_strides, key, valid if PARTIAL else None)
            keys_t = (kt, key_t_strides, key, valid if PARTIAL else None)
            k_s = _tile(keys_s, column, D_S, BLOCK_S, UPCAST)
            raw_s = _products(q_s, k_s, rows_s, keys_s, D_S, BLOCK_S, UPCAST, PRECISION)
            if MEAN:
                log_t = _mean_log2(
                    rows_t, keys_t, lse_t + at_t, queries, factor_t, heads_t, group_t,
                    D_T, BLOCK_T, UPCAST, PRECISION,
                )  # fmt: skip
            else:
                k_t = _tile(keys_t, 0, D_T, BLOCK_T, UPCAST)
                raw_t = _products(q_t, k_t, rows_t, keys_t, D_T, BLOCK_T, UPCAST, PRECISION)
                log_t = raw_t * factor_t - log_sum_t[:, None]
            log_s = raw_s * factor_s - log_sum_s[:, None]
            scores = _score_gradient(log_s, log_t, moment[:, None], DIRECTION)
            if PARTIAL:
                visible = (key[None, :] >= first[:, None]) & (key[None, :] < stop[:, None])
                scores = tl.where(visible & valid[None, :], scores, 0.0)
            scores = scores.to(qs.dtype.element_ty)
            weight += tl.sum(scores.to(tl.float32), 1)
            gradient = tl.dot(scores.to(k_s.dtype), k_s, gradient, input_precision=PRECISION)

    at_rows = _row(grad_rows, grad_rows_strides, b, pair * heads + head, query)
    upstream = tl.load(at_rows, mask=takes_part, other=0.0)
    gradient = gradient - weight[:, None] * centre[None, :]
    gradient = gradient * (upstream * (factor_s * LN_2))[:, None]
    gradient = tl.where(takes_part[:, None], gradient, 0.0)
    size = tl.cast(batch, tl.int64) * heads * queries * D_S
    base = grad_query + pair * size
    base += tl.cast(b, tl.int64) * grad_strides[0] + tl.cast(head, tl.int64) * grad_strides[1]
    _store(base, grad_strides[2], query, queries, column, gradient, D_S, BLOCK_S)


@triton.jit
def _row(rows, strides, b, head, query):
    at = tl.cast(b, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    return rows + at + query.to(tl.int64) * strides[2]


@triton.jit
def _store(base, stride, index, size, column, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = column + tl.arange(0, BLOCK_D)
    at = base + index.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = (index < size)[:, None] & (columns < D)[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _backward_key(
    grad_key,
    grad_rows,
    moments,
    lse_s,
    lse_t,
    seen,
    query_s,
    key_s,
    query_t,
    key_t,
    grad_strides,
    grad_rows_strides,
    query_s_strides,
    key_s_strides,
    query_t_strides,
    key_t_strides,
    scale_s,
    scale_t,
    batch,
    heads,
    heads_t,
    group_s,
    group_t,
    queries,
    keys,
    row_heads,
    row_heads_t,
    seen_stride,
    plane,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    DIRECTION: tl.constexpr,
    MEAN: tl.constexpr,
    SEEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK of BLOCK_N keys of one key head, from all queries of its group of heads."""
    key_heads = heads // group_s
    tile, chunk, key_head, b, pair = _place(
        tl.cdiv(keys, BLOCK_N), tl.cdiv(D_S, BLOCK_S), key_heads, batch
    )
    column = chunk * BLOCK_S
    key = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    seen += tl.cast(b, tl.int64) * seen_stride
    first, stop, lowest, highest, begin, full, full_end, end = _interval(
        seen + queries, key, key < keys, queries, plane, BLOCK_M, SEEN
    )
    takes_part = stop > first
    ks = _head(key_s, key_s_strides, pair, b, key_head)
    factor_s, factor_t = _of_pair(scale_s, pair), _of_pair(scale_t, pair)
    keys_s = (ks, key_s_strides, key, takes_part)
    k_s = _tile(keys_s, 0, D_S, BLOCK_S, UPCAST)

    # Upstream gradients may be too small for float16 products: they enter as parts of the largest.
    unit = 1.0
    if ks.dtype.element_ty == tl.float16:
        largest = tl.zeros([BLOCK_M], tl.float32)
        for in_group in range(group_s):
            head = pair * heads + key_head * group_s + in_group
            at = _rows_of(head, b, row_heads, queries)
            for i in range(begin, end):
                query = i * BLOCK_M + tl.arange(0, BLOCK_M)
                log_sum = tl.load(lse_s + at + query, mask=query < queries, other=float("inf"))
                at_rows = _row(grad_rows, grad_rows_strides, b, head, query)
                upstream = tl.load(at_rows, mask=log_sum != float("inf"), other=0.0)
                largest = tl.maximum(largest, tl.abs(upstream))
        unit = tl.max(largest, 0)
        unit = tl.where((unit > 0) & (unit < float("inf")), unit, 1.0)

    gradient = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    for in_group in range(group_s):
        head = key_head * group_s + in_group
        head_t = head % heads_t
        qs = _head(query_s, query_s_strides, pair, b, head)
        qt = _head(query_t, query_t_strides, pair, b, 0 if MEAN else head_t)
        kt = _head(key_t, key_t_strides, pair, b, 0 if MEAN else head_t // group_t)
        at = _rows_of(pair * heads + head, b, row_heads, queries)
        at_t = _rows_of(pair * heads_t, b, row_heads_t, queries)
        keys_t = (kt, key_t_strides, key, takes_part)
        if not MEAN:
            k_t = _tile(keys_t, 0, D_T, BLOCK_T, UPCAST)
        for PARTIAL in tl.static_range(2):
            steps = (full - begin) + (end - full_end) if PARTIAL else full_end - full
            for step in tl.range(0, steps, num_stages=1 if PARTIAL else None):
                if PARTIAL:
                    query = _partial_tile(step, begin, full, full_end) * BLOCK_M
                    query += tl.arange(0, BLOCK_M)
                    row_first, row_stop = _seen(seen, query, query < queries, keys, plane, SEEN)
                    valid = (row_stop > row_first) & (query >= lowest) & (query < highest)
                    read = valid
                else:
                    query = (full + step) * BLOCK_M + tl.arange(0, BLOCK_M)
                    read = query >= 0
                rows_s = (qs, query_s_strides, query, valid if PARTIAL else None)
                rows_t = (qt, query_t_strides, query, valid if PARTIAL else None)
                q_s = _tile(rows_s, column, D_S, BLOCK_S, UPCAST)
                raw_s = _products(q_s, k_s, rows_s, keys_s, D_S, BLOCK_S, UPCAST, PRECISION)
                if MEAN:
                    log_t = _mean_log2(
                        rows_t, keys_t, lse_t + at_t, queries, factor_t, heads_t, group_t,
                        D_T, BLOCK_T, UPCAST, PRECISION,
                    )  # fmt: skip
                else:
                    q_t = _tile(rows_t, 0, D_T, BLOCK_T, UPCAST)
                    raw_t = _products(q_t, k_t, rows_t, keys_t, D_T, BLOCK_T, UPCAST, PRECISION)
                    at_lse = lse_t + at_t + tl.cast(head_t, tl.int64) * queries + query
                    log_sum_t = tl.load(at_lse, mask=read, other=0.0)
                    log_t = raw_t * factor_t - log_sum_t[:, None]
                log_sum_s = tl.load(lse_s + at + query, mask=read, other=0.0)
                log_s = raw_s * factor_s - log_sum_s[:, None]
                moment = tl.zeros([BLOCK_M], tl.float32)
                if DIRECTION != "forward":
                    moment = tl.load(moments + at + query, mask=read, other=0.0)
                at_rows = _row(grad_rows, grad_rows_strides, b, pair * heads + head, query)
                upstream = tl.load(at_rows, mask=read, other=0.0)
                if ks.dtype.element_ty == tl.float16:
                    upstream = upstream / unit
                scores = _score_gradient(log_s, log_t, moment[:, None], DIRECTION)
                scores = scores * upstream[:, None]
                if PARTIAL:
                    visible = (key[None, :] >= row_first[:, None]) & takes_part[None, :]
                    visible = visible & (key[None, :] < row_stop[:, None])
                    scores = tl.where(visible, scores, 0.0)
                scores = tl.trans(scores.to(ks.dtype.element_ty).to(q_s.dtype))
                gradient = tl.dot(scores, q_s, gradient, input_precision=PRECISION)

    gradient = tl.where(takes_part[:, None], gradient * (unit * factor_s * LN_2), 0.0)
    size = tl.cast(batch, tl.int64) * key_heads * keys * D_S
    base = grad_key + pair * size
    base += tl.cast(b, tl.int64) * grad_strides[0] + tl.cast(key_head, tl.int64) * grad_strides[1]
    _store(base, grad_strides[2], key, keys, column, gradient, D_S, BLOCK_S)


@triton.jit
def _fused(
    partial,
    grad_query,
    grad_key,
    counts,
    seen,
    query_s,
    key_s,
    query_t,
    key_t,
    grad_query_strides,
    grad_key_strides,
    query_s_strides,
    key_s_strides,
    query_t_strides,
    key_t_strides,
    scale_s,
    scale_t,
    batch,
    heads,
    heads_t,
    group_s,
    group_t,
    queries,
    keys,
    count_size,
    count_factor,
    seen_stride,
    plane,
    D_S: tl.constexpr,
    D_T: tl.constexpr,
    DIRECTION: tl.constexpr,
    DIVIDE: tl.constexpr,
    SEEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum of rows and both gradients of one key head, whose BLOCK_N keys all fit on chip.

    Tiles are [keys, queries]: the keys fill all warps however few queries are taken at a time.
    """
    key_heads = heads // group_s
    _, _, key_head, b, pair = _place(1, 1, key_heads, batch)
    key = tl.arange(0, BLOCK_N)
    seen += tl.cast(b, tl.int64) * seen_stride
    valid = _valid_others(seen + queries, key, 0, keys, plane, SEEN)
    ks = _head(key_s, key_s_strides, pair, b, key_head)
    factor_s, factor_t = _of_pair(scale_s, pair), _of_pair(scale_t, pair)
    keys_s = (ks, key_s_strides, key, valid)
    k_s = _tile(keys_s, 0, D_S, BLOCK_S, UPCAST)
    centre = _centre(keys_s, 0, D_S, BLOCK_S)
    upstream = factor_s * LN_2
    if DIVIDE:
        upstream = upstream / _rows_in_mean(counts, count_size, count_factor)

    grad_query += tl.cast(pair, tl.int64) * batch * heads * queries * D_S
    grad_query += tl.cast(b, tl.int64) * grad_query_strides[0]
    grad_key += tl.cast(pair, tl.int64) * batch * key_heads * keys * D_S
    grad_key += tl.cast(b, tl.int64) * grad_key_strides[0]
    grad_key += tl.cast(key_head, tl.int64) * grad_key_strides[1]
    gradient_key = tl.zeros([BLOCK_N, BLOCK_S], tl.float32)
    loss = tl.zeros([BLOCK_M], tl.float32)
    for in_group in range(group_s):
        head = key_head * group_s + in_group
        head_t = head % heads_t
        qs = _head(query_s, query_s_strides, pair, b, head)
        qt = _head(query_t, query_t_strides, pair, b, head_t)
        kt = _head(key_t, key_t_strides, pair, b, head_t // group_t)
        k_t = _tile((kt, key_t_strides, key, valid), 0, D_T, BLOCK_T, UPCAST)
        for begin in range(0, queries, BLOCK_M):
            query = begin + tl.arange(0, BLOCK_M)
            first, stop = _seen(seen, query, query < queries, keys, plane, SEEN)
            takes_part = stop > first
            visible = (key[:, None] >= first[None, :]) & (key[:, None] < stop[None, :])
            visible = visible & valid[:, None]
            rows_s = (qs, query_s_strides, query, takes_part)
            rows_t = (qt, query_t_strides, query, takes_part)
            q_s = _tile(rows_s, 0, D_S, BLOCK_S, UPCAST)
            q_t = _tile(rows_t, 0, D_T, BLOCK_T, UPCAST)
            raw_s = tl.dot(k_s, tl.trans(q_s), input_precision=PRECISION)
            raw_t = tl.dot(k_t, tl.trans(q_t), input_precision=PRECISION)
            x_s, l_s = _below_maximum(raw_s, factor_s, visible)
            x_t, l_t = _below_maximum(raw_t, factor_t, visible)
            # Another exp2 rather than that of the sum: registers are scarcer here.
            p_s = tl.exp2(x_s - tl.log2(l_s)[None, :])
            p_t = tl.exp2(x_t - tl.log2(l_t)[None, :])
            if DIRECTION == "forward":
                mean = tl.sum(weighted(p_t, x_t - x_s), 0)
                row = (mean + tl.log2(tl.div_rn(l_s, l_t))) * LN_2
                scores = p_s - p_t
            elif DIRECTION == "reverse":
                mean = tl.sum(weighted(p_s, x_s - x_t), 0)
                row = (mean + tl.log2(tl.div_rn(l_t, l_s))) * LN_2
                scores = weighted(p_s, x_s - x_t - mean[None, :]) * LN_2
            else:
                log_ratio = tl.log2(tl.div_rn(l_s, l_t))
                from_s, from_t = to_middle((x_t - x_s + log_ratio[None, :]) * LN_2)
                mean = tl.sum(weighted(p_s, from_s), 0)
                row = 0.5 * (mean + tl.sum(weighted(p_t, from_t), 0))
                scores = 0.5 * weighted(p_s, from_s - mean[None, :])
            loss += tl.where(takes_part, row, 0.0)
            scores = tl.where(visible, scores, 0.0).to(qs.dtype.element_ty)
            weight = tl.sum(scores.to(tl.float32), 0)
            scores = scores.to(k_s.dtype)
            gradient_key = tl.dot(scores, q_s, gradient_key, input_precision=PRECISION)
            # dQᵀ: a transposed dS would be computed a second time, in another layout.
            gradient = tl.dot(tl.trans(k_s), scores, input_precision=PRECISION)
            gradient = (gradient - centre[:, None] * weight[None, :]) * upstream
            gradient = tl.trans(tl.where(takes_part[None, :], gradient, 0.0))
            base = grad_query + tl.cast(head, tl.int64) * grad_query_strides[1]
            _store(base, grad_query_strides[2], query, queries, 0, gradient, D_S, BLOCK_S)
    gradient_key = tl.where(valid[:, None], gradient_key * upstream, 0.0)
    _store(grad_key, grad_key_strides[2], key, keys, 0, gradient_key, D_S, BLOCK_S)
    tl.store(partial + tl.program_id(0), tl.sum(loss, 0))


@triton.jit
def _below_maximum(raw, factor, visible):
    """Scaled scores less their maximum, -inf where hidden, and the sum of their exp2."""
    x = tl.where(visible, raw * factor, -float("inf"))
    x = x - tl.maximum(tl.max(x, 0), LOWEST)[None, :]
    return x, tl.sum(tl.exp2(x), 0)


@triton.jit
def _rows_in_mean(counts, count_size, count_factor):
    """Rows that take part, at least 1; count_size is their number per unit without counts."""
    total = tl.cast(count_size, tl.float32)
    if counts is not None:
        some = tl.zeros([256], tl.int32)
        for begin in range(0, count_size, 256):
            i = begin + tl.arange(0, 256)
            some += tl.load(counts + i, mask=i < count_size, other=0)
        total = tl.sum(some.to(tl.int64), 0).to(tl.float32)
    return tl.maximum(total * count_factor, 1.0)


@triton.jit
def _losses(losses, partial, counts, programs, count_size, count_factor, DIVIDE: tl.constexpr):
    """One loss per layer pair, from the sums of its programs in a fixed order."""
    pair = tl.program_id(0)
    partial += tl.cast(pair, tl.int64) * programs
    total = tl.zeros([256], tl.float32)
    for begin in range(0, programs, 256):
        i = begin + tl.arange(0, 256)
        total += tl.load(partial + i, mask=i < programs, other=0.0)
    loss = tl.sum(total, 0)
    if DIVIDE:
        loss = loss / _rows_in_mean(counts, count_size, count_factor)
    tl.store(losses + pair, loss)


# Launch parameters by architecture, kernel, and (bytes of an element, width of the wider head: 64
# for all up to it, 128, and 256 for all beyond, or else 128): (BLOCK_M queries, BLOCK_N keys,
# warps, stages). "KERNEL VARIANT" is looked for first, VARIANT being the direction, or "mean" for
# averaged heads. The third number of "fused" is its BLOCK_N, all keys; what is not listed is left
# to forward and backward. All spill no register, which is what they were chosen for; none is timed.
Launch = dict[tuple[int, ...], tuple[int, int, int, int]]
AVERAGED: dict[str, Launch] = {
    f"{kernel} mean": {
        (2, 64): (32, 32, 4, 1),
        (2, 128): (32, 32, 4, 1),
        (4, 64): (16, 16, 4, 1),
        (4, 128): (16, 16, 8, 1),
    }
    for kernel in ("forward", "backward_query", "backward_key")
}
LAUNCH: dict[str, dict[str, Launch]] = {
    "sm_80": {
        **AVERAGED,
        "forward": {
            (2, 64): (128, 64, 8, 3),
            (2, 128): (64, 32, 4, 2),
            (2, 256): (32, 32, 4, 1),
            (4, 64): (64, 16, 4, 1),
            (4, 128): (32, 16, 4, 1),
        },
        "forward js": {
            (2, 64): (128, 64, 8, 3),
            (2, 128): (32, 32, 4, 1),
            (4, 64): (64, 16, 4, 1),
            (4, 128): (32, 16, 4, 1),
        },
        "backward_query": {
            (2, 64): (128, 64, 8, 2),
            (2, 128): (32, 32, 4, 1),
            (4, 64): (16, 16, 4, 1),
            (4, 128): (16, 16, 4, 1),
        },
        "backward_key": {
            (2, 64): (64, 32, 4, 2),
            (2, 128): (32, 32, 4, 1),
            (4, 64): (32, 32, 4, 1),
            (4, 128): (16, 32, 4, 1),
        },
        "fused": {(2, 64, 128): (32, 128, 8, 1), (2, 64, 256): (16, 256, 8, 1)},
    },
    "sm_90": {
        **AVERAGED,
        "forward": {
            (2, 64): (128, 64, 8, 3),
            (2, 128): (128, 64, 8, 3),
            (4, 64): (128, 32, 8, 2),
            (4, 128): (32, 16, 4, 1),
        },
        "backward_query": {
            (2, 64): (128, 64, 8, 2),
            (2, 128): (128, 32, 8, 2),
            (4, 64): (64, 32, 4, 2),
            (4, 128): (32, 16, 4, 1),
        },
        "backward_query js": {
            (2, 64): (128, 32, 8, 2),
            (2, 128): (128, 32, 8, 2),
            (4, 64): (64, 32, 4, 2),
            (4, 128): (32, 16, 4, 1),
        },
        "backward_key": {
            (2, 64): (128, 64, 8, 2),
            (2, 128): (64, 32, 4, 1),
            (4, 64): (16, 32, 4, 1),
            (4, 128): (16, 32, 4, 1),
        },
        "backward_key js": {
            (2, 64): (128, 32, 8, 2),
            (2, 128): (64, 32, 4, 1),
            (4, 64): (16, 32, 4, 1),
            (4, 128): (16, 32, 4, 1),
        },
        "fused": {
            (2, 64, 128): (32, 128, 8, 1),
            (2, 64, 256): (16, 256, 8, 1),
            (2, 128, 128): (16, 128, 8, 1),
        },
        "fused js": {(2, 64, 128): (32, 128, 8, 1)},
    },
    "sm_100": {
        **AVERAGED,
        "backward_query mean": {
            **AVERAGED["backward_query mean"],
            (4, 128): (16, 16, 4, 1),
        },
        "forward": {
            (2, 64): (128, 64, 8, 3),
            (2, 128): (64, 64, 4, 2),
            (4, 64): (32, 16, 4, 1),
            (4, 128): (32, 16, 4, 1),
        },
        "backward_query": {
            (2, 64): (128, 64, 8, 2),
            (2, 128): (64, 32, 4, 1),
            (4, 64): (16, 16, 4, 1),
            (4, 128): (16, 16, 4, 1),
        },
        "backward_key": {
            (2, 64): (64, 64, 8, 2),
            (2, 128): (32, 32, 4, 1),
            (4, 64): (16, 32, 4, 1),
            (4, 128): (16, 16, 4, 1),
        },
        "fused": {(2, 64, 128): (16, 128, 8, 1)},
    },
    "gfx942": {
        **AVERAGED,
        "forward": {
            (2, 64): (128, 64, 8, 3),
            (2, 128): (64, 64, 4, 2),
            (4, 64): (32, 32, 4, 1),
            (4, 128): (32, 32, 4, 1),
        },
        "backward_query": {
            (2, 64): (64, 64, 4, 2),
            (2, 128): (64, 32, 4, 2),
            (4, 64): (32, 32, 4, 1),
            (4, 128): (32, 32, 4, 1),
        },
        "backward_key": {
            (2, 64): (64, 32, 4, 2),
            (2, 128): (64, 32, 4, 2),
            (4, 64): (32, 32, 4, 1),
            (4, 128): (32, 32, 4, 1),
        },
        "fused": {
            (2, 64, 128): (16, 128, 8, 1),
            (2, 64, 256): (16, 256, 4, 1),
            (2, 128, 128): (16, 128, 8, 1),
        },
    },
}
SQUARE: Launch = {(size, width): (64, 64, 4, 1) for size in (2, 4) for width in (64, 128)}
LAUNCH["interpreter"] = {
    **{kernel: SQUARE for kernel in ("forward", "backward_query", "backward_key")},
    "fused": {(*key, keys): (64, keys, 4, 1) for key in SQUARE for keys in (128, 256)},
}
# What every other NVIDIA GPU gets; most have 99 KB of shared memory.
LAUNCH["sm_86"] = {**LAUNCH["sm_80"], "fused": {(2, 64, 128): (32, 128, 8, 1)}}
# Up to so many keys `_fused` holds whole rows of scores on chip.
WHOLE_ROWS = 256
# Layer pairs of one launch; their addresses are kernel arguments, of which a launch takes 4 KB.
PAIRS = 32
INTERPRETED = bool(triton.knobs.runtime.interpret)


def architecture(device: torch.device) -> str:
    """The entry of LAUNCH for a device."""
    if torch.version.hip:
        return "gfx942"
    if device.type != "cuda":
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    return name if name in LAUNCH else "sm_86"


def width_block(x: Tensor) -> int:
    """Features of one tile; wider heads are taken in chunks."""
    return min(max(16, triton.next_power_of_2(x.shape[3])), 256 // x.dtype.itemsize)


def launch_parameters(
    kernel: str, variant: str, query_s: Tensor, query_t: Tensor, *keys: int
) -> dict[str, Any] | None:
    name = architecture(query_s.device)
    tables = LAUNCH[name]
    table = tables.get(f"{kernel} {variant}", tables[kernel])
    width = max(query_s.shape[3], query_t.shape[3])
    size = widest((query_s, query_t)).dtype.itemsize
    found = table.get((size, 64 if width <= 64 else 128 if width <= 128 else 256, *keys))
    if found is None and width > 128:
        found = table.get((size, 128, *keys))
    if found is None:
        return None
    block_m, block_n, warps, stages = found
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    return {**blocks, **compiler_options(name)}


def compiler_options(name: str) -> dict[str, Any]:
    if INTERPRETED:  # which knows neither
        return {}
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if name.startswith("sm_"):  # ptxas may spill to fit one more program on a processor: not here
        options["maxnreg"] = 255
    return options


def precision(like: Tensor) -> str:
    """Three TF32 products keep float32's digits on NVIDIA's tensor cores; AMD's take float32."""
    nvidia = like.is_cuda and not torch.version.hip
    return "tf32x3" if like.dtype == torch.float32 and nvidia else "ieee"


class _Visible(NamedTuple):
    """What `_visibility` found; nothing where every query sees every key."""

    needed: bool
    seen: Tensor
    counts: Tensor | None
    stride: int
    plane: int
    count_size: int
    count_factor: int


def _visibility_of(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
) -> _Visible:
    batch, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    masked = attention_mask is not None or query_mask is not None
    if not (masked or causal or window is not None or cu_seqlens is not None):
        nothing = query.new_empty(0, dtype=torch.int32)
        return _Visible(False, nothing, None, 0, 0, queries, batch)
    lines, some = queries + keys, batch if masked else 1
    block = 128
    tiles = triton.cdiv(queries, block)
    seen = query.new_empty((3, some, lines), dtype=torch.int32)
    counts = query.new_empty((some, tiles), dtype=torch.int32)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    masks = [None if x is None else x.view(torch.uint8) for x in (attention_mask, query_mask)]
    with torch.cuda.device_of(query):
        _visibility[((tiles + triton.cdiv(keys, block)) * some,)](
            seen, counts, *masks, cu_seqlens,
            *((0, 0) if x is None else x.stride() for x in masks),
            some, queries, keys, sequences, sequences.bit_length(),
            0 if window is None else min(window, lines),
            CAUSAL=causal, WINDOW=window is not None, BLOCK=block,
            **compiler_options(architecture(query.device)),
        )  # fmt: skip
    return _Visible(
        True, seen, counts, lines if masked else 0, some * lines, some * tiles, batch // some
    )


def _runs(*sides: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive layer pairs alike in all but their addresses: one launch each."""

    def kind(pair: int) -> list[Any]:
        return [(x[pair].shape, x[pair].stride(), x[pair].data_ptr() % 16) for x in sides]

    start = 0
    for pair in range(1, len(sides[0]) + 1):
        alike = pair < len(sides[0]) and kind(pair) == kind(start) and pair - start < PAIRS
        if not alike:
            yield slice(start, pair)
            start = pair


def _pair_arguments(
    sides: Sequence[Sequence[Tensor]],
    scale_s: Sequence[float],
    scale_t: Sequence[float],
    run: slice,
    mean_heads: bool,
) -> tuple[tuple[Any, ...], tuple[int, ...], dict[str, Any]]:
    """Addresses, strides and scales; sizes; and constants of the pairs of one launch."""
    query_s, key_s, query_t, key_t = (side[run.start] for side in sides)
    batch, heads, queries, d_s = query_s.shape
    heads_t = query_t.shape[1]
    tensors = (
        *(tuple(side[run]) for side in sides),
        *(side[run.start].stride()[:3] for side in sides),
        *(tuple(x * LOG2_E.value for x in scale[run]) for scale in (scale_s, scale_t)),
    )
    sizes = (
        batch, heads, heads_t, heads // key_s.shape[1], heads_t // key_t.shape[1], queries,
        key_s.shape[2],
    )  # fmt: skip
    mean = mean_heads and heads_t > 1
    # Averaging keeps two more tiles: smaller chunks, and no operand split into three.
    like = widest((query_s, query_t))
    most = (128 if mean else 256) // like.dtype.itemsize
    constants = {
        "D_S": d_s,
        "D_T": query_t.shape[3],
        "BLOCK_S": min(width_block(query_s), most),
        "BLOCK_T": min(width_block(query_t), most),
        "UPCAST": INTERPRETED and torch.bfloat16 in (query_s.dtype, query_t.dtype),
        "PRECISION": "ieee" if mean else precision(like),
        "MEAN": mean,
    }
    return tensors, sizes, constants


def forward(
    query_s: list[Tensor],
    key_s: list[Tensor],
    query_t: list[Tensor],
    key_t: list[Tensor],
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: list[float],
    scale_t: list[float],
    causal: bool,
    window: int | None,
    mean_heads: bool,
    direction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, inner, lse_s, lse_t; the log-sum-exps are of base 2."""
    like = query_s[0]
    batch, _, queries, _ = like.shape
    all_heads, all_heads_t = (sum(x.shape[1] for x in side) for side in (query_s, query_t))
    rows, lse_s = (like.new_empty((batch, all_heads, queries), dtype=torch.float32) for _ in "12")
    inner = torch.empty_like(rows) if direction == "js" else like.new_empty(0, dtype=torch.float32)
    lse_t = like.new_empty((batch, all_heads_t, queries), dtype=torch.float32)
    if rows.numel() == 0:
        return rows, inner, lse_s, lse_t
    visible = _visibility_of(like, key_s[0], attention_mask, query_mask, cu_seqlens, causal, window)
    sides = (query_s, key_s, query_t, key_t)
    for run in _runs(*sides):
        tensors, sizes, constants = _pair_arguments(sides, scale_s, scale_t, run, mean_heads)
        heads = sum(x.shape[1] for x in query_s[: run.start])
        heads_t = sum(x.shape[1] for x in query_t[: run.start])
        mean = constants["MEAN"]
        launch = launch_parameters(
            "forward", "mean" if mean else direction, query_s[run.start], query_t[run.start]
        )
        assert launch is not None
        tiles = triton.cdiv(queries, launch["BLOCK_M"]) * batch * (run.stop - run.start)
        with torch.cuda.device_of(like):
            if mean:
                teacher = {
                    k: v for k, v in constants.items() if k not in ("D_S", "BLOCK_S", "MEAN")
                }
                _log_sum_exp[(tiles * sizes[2],)](
                    lse_t[:, heads_t:], visible.seen, *tensors[2:4], *tensors[6:8], tensors[9],
                    batch, sizes[2], sizes[4], queries, sizes[6], all_heads_t,
                    visible.stride, visible.plane, SEEN=visible.needed, **teacher, **launch,
                )  # fmt: skip
            _forward[(tiles * sizes[1],)](
                rows[:, heads:], inner[:, heads:] if direction == "js" else inner,
                lse_s[:, heads:], lse_t[:, heads_t:], visible.seen, *tensors, *sizes,
                all_heads, all_heads_t, visible.stride, visible.plane,
                DIRECTION=direction, SEEN=visible.needed, **constants, **launch,
            )  # fmt: skip
    return rows, inner, lse_s, lse_t


def backward(
    grad_rows: Tensor,
    rows: Tensor,
    inner: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    query_s: list[Tensor],
    key_s: list[Tensor],
    query_t: list[Tensor],
    key_t: list[Tensor],
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: list[float],
    scale_t: list[float],
    causal: bool,
    window: int | None,
    mean_heads: bool,
    direction: str,
    tokens_first: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of all student queries and keys, flat, in the student's dtype."""
    like = query_s[0]
    batch, _, queries, _ = like.shape
    keys = key_s[0].shape[2]
    grad_query, grad_key = (
        like.new_empty((sum(x.numel() for x in side),)) for side in (query_s, key_s)
    )
    if grad_query.numel() == 0:
        return grad_query, grad_key
    visible = _visibility_of(like, key_s[0], attention_mask, query_mask, cu_seqlens, causal, window)
    sides = (query_s, key_s, query_t, key_t)
    moments = {"forward": None, "reverse": rows, "js": inner}[direction]
    at_query = at_key = heads = heads_t = 0
    for run in _runs(*sides):
        tensors, sizes, constants = _pair_arguments(sides, scale_s, scale_t, run, mean_heads)
        query, key = query_s[run.start], key_s[run.start]
        pairs = run.stop - run.start
        variant = "mean" if constants["MEAN"] else direction
        chunks = triton.cdiv(query.shape[3], constants["BLOCK_S"])
        statistics = (
            grad_rows[:, heads:], None if moments is None else moments[:, heads:],
            lse_s[:, heads:], lse_t[:, heads_t:], visible.seen,
        )  # fmt: skip
        last = (lse_s.shape[1], lse_t.shape[1], visible.stride, visible.plane)
        with torch.cuda.device_of(like):
            for kernel, name, flat, at, x, lines, block in (
                (_backward_query, "backward_query", grad_query, at_query, query, queries, "M"),
                (_backward_key, "backward_key", grad_key, at_key, key, keys, "N"),
            ):
                launch = launch_parameters(name, variant, query, query_t[run.start])
                assert launch is not None
                tiles = triton.cdiv(lines, launch[f"BLOCK_{block}"])
                kernel[(tiles * chunks * x.shape[1] * batch * pairs,)](
                    flat[at:], *statistics, *tensors[:4], _gradient_strides(x, tokens_first),
                    grad_rows.stride(), *tensors[4:], *sizes, *last,
                    DIRECTION=direction, SEEN=visible.needed, **constants, **launch,
                )  # fmt: skip
        at_query += pairs * query.numel()
        at_key += pairs * key.numel()
        heads += pairs * sizes[1]
        heads_t += pairs * sizes[2]
    return grad_query, grad_key


def fuses(
    query_s: list[Tensor],
    key_s: list[Tensor],
    query_t: list[Tensor],
    direction: str,
    mean_heads: bool,
    packed: bool,
) -> bool:
    """Whether `fused` serves these: all scores of a row, and both its widths, stay on chip."""
    keys = key_s[0].shape[2]
    if keys > WHOLE_ROWS or packed or (mean_heads and any(x.shape[1] > 1 for x in query_t)):
        return False
    return all(
        max(s.shape[3], t.shape[3]) <= 256 // widest((s, t)).dtype.itemsize
        and launch_parameters("fused", direction, s, t, _padded(keys)) is not None
        for s, t in zip(query_s, query_t, strict=True)
    )


def _padded(keys: int) -> int:
    return 128 if keys <= 128 else 256


def fused(
    query_s: list[Tensor],
    key_s: list[Tensor],
    query_t: list[Tensor],
    key_t: list[Tensor],
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    scale_s: list[float],
    scale_t: list[float],
    causal: bool,
    window: int | None,
    mean_heads: bool,
    direction: str,
    reduction: str,
    tokens_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [pairs] and the gradients for an upstream gradient of 1, flat, in float32."""
    like = query_s[0]
    batch, _, queries, _ = like.shape
    keys = key_s[0].shape[2]
    grad_query, grad_key = (
        like.new_empty((sum(x.numel() for x in side),), dtype=torch.float32)
        for side in (query_s, key_s)
    )
    losses = like.new_empty((len(query_s),), dtype=torch.float32)
    if grad_query.numel() == 0:
        return losses.zero_(), grad_query, grad_key
    sides = (query_s, key_s, query_t, key_t)
    runs = list(_runs(*sides))
    found = [
        launch_parameters("fused", direction, query_s[i], query_t[i], _padded(keys))
        for i in (run.start for run in runs)
    ]
    launches = [launch for launch in found if launch is not None]
    assert len(launches) == len(runs) and cu_seqlens is None, "`fuses` says no"

    visible = _visibility_of(like, key_s[0], attention_mask, query_mask, None, causal, window)
    at_query = at_key = 0
    divide = reduction == "mean"
    for run, launch in zip(runs, launches, strict=True):
        tensors, sizes, constants = _pair_arguments(sides, scale_s, scale_t, run, mean_heads)
        del constants["MEAN"]
        query, key = query_s[run.start], key_s[run.start]
        pairs = run.stop - run.start
        programs = batch * key.shape[1]
        partial = like.new_empty((pairs, programs), dtype=torch.float32)
        counting = (visible.count_size, float(visible.count_factor * query.shape[1]))
        with torch.cuda.device_of(like):
            _fused[(pairs * programs,)](
                partial, grad_query[at_query:], grad_key[at_key:], visible.counts, visible.seen,
                *tensors[:4], _gradient_strides(query, tokens_first),
                _gradient_strides(key, tokens_first), *tensors[4:], *sizes, *counting,
                visible.stride, visible.plane,
                DIRECTION=direction, DIVIDE=divide, SEEN=visible.needed, **constants, **launch,
            )  # fmt: skip
            _losses[(pairs,)](
                losses[run.start :], partial, visible.counts, programs, *counting, DIVIDE=divide
            )
        at_query += pairs * query.numel()
        at_key += pairs * key.numel()
    return losses, grad_query, grad_key


def _gradient_strides(x: Tensor, tokens_first: bool) -> tuple[int, int, int]:
    """Strides of batch, head and token in a gradient [B, H, N, d] or [B, N, H, d]."""
    _, heads, length, width = x.shape
    head, token = (width, heads * width) if tokens_first else (length * width, width)
    return heads * length * width, head, token
