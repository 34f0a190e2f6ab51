"""KL divergence between attention maps in memory, by rows that stay on chip.

With p a row of probabilities, or the softmax of a row of scores, and D_j = log p_t,j - log p_s,j,

    forward  Σ_j p_t,j D_j        reverse  -Σ_j p_s,j D_j
    js       (Σ_j p_s,j (log p_s,j - log m_j) + Σ_j p_t,j (log p_t,j - log m_j)) / 2

Both maps are read once; backward reads them once more, makes the row's sums again, which costs no
traffic and is more accurate than a rounded log-sum-exp, and writes the gradient. Rows longer than
LONGEST are read once per step instead: normalisers, divergence, gradient.

Multiplications and additions are never contracted (`enable_fp_fusion`): equal maps must go through
equal arithmetic to give exactly zero.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.kernels.divergence import LN_2, LOG2_E, to_middle, weighted

INTERPRETED = bool(triton.knobs.runtime.interpret)


@triton.jit
def _read(at_s, at_t, at_mask, key, keys, inside, SCORES: tl.constexpr):
    """Both maps [rows, BLOCK] in float32, and the keys on which one of them has mass."""
    mask = inside[:, None] & (key < keys)[None, :]
    absent = -float("inf") if SCORES else 0.0
    s = tl.load(at_s[:, None] + key[None, :], mask=mask, other=absent).to(tl.float32)
    t = tl.load(at_t[:, None] + key[None, :], mask=mask, other=absent).to(tl.float32)
    visible = mask & ((s != absent) | (t != absent))
    if at_mask is not None:
        visible = visible & (tl.load(at_mask[:, None] + key[None, :], mask=mask, other=0) != 0)
    return tl.where(visible, s, absent), tl.where(visible, t, absent), visible


@triton.jit
def _level(top):
    """What is taken from the scores before exp2: their maximum, 0 where there is none."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _probabilities(s, t, level_s, level_t, sum_s, sum_t, SCORES: tl.constexpr):
    """p_s, p_t and log p_t - log p_s."""
    if SCORES:
        s, t = s - level_s[:, None], t - level_t[:, None]
        log_ratio = tl.log2(tl.div_rn(sum_s, sum_t)) * LN_2
        difference = t - s + log_ratio[:, None]
        s = tl.exp2(s * LOG2_E) * tl.div_rn(1.0, sum_s)[:, None]
        t = tl.exp2(t * LOG2_E) * tl.div_rn(1.0, sum_t)[:, None]
    else:
        difference = (tl.log2(t) - tl.log2(s)) * LN_2
    return s, t, difference


@triton.jit
def _divergence(p_s, p_t, difference, DIRECTION: tl.constexpr):
    """Sums over the tile: the row's, and that of KL(s ‖ m)."""
    if DIRECTION == "forward":
        row = tl.sum(weighted(p_t, difference), 1)
        inner = row
    elif DIRECTION == "reverse":
        row = tl.sum(weighted(p_s, -difference), 1)
        inner = row
    else:
        from_s, from_t = to_middle(difference)
        inner = tl.sum(weighted(p_s, from_s), 1)
        row = 0.5 * (inner + tl.sum(weighted(p_t, from_t), 1))
    return row, inner


@triton.jit
def _gradient(p_s, p_t, difference, row, inner, DIRECTION: tl.constexpr, SCORES: tl.constexpr):
    """The student's gradient for an upstream gradient of 1."""
    if SCORES:
        if DIRECTION == "forward":
            gradient = p_s - p_t
        elif DIRECTION == "reverse":
            gradient = weighted(p_s, -difference - row[:, None])
        else:
            from_s, _ = to_middle(difference)
            gradient = 0.5 * weighted(p_s, from_s - inner[:, None])
    else:
        if DIRECTION == "forward":
            gradient = tl.where(p_t == 0.0, 0.0, -p_t / p_s)
        elif DIRECTION == "reverse":
            gradient = tl.where(p_s == 0.0, 0.0, 1.0 - difference)
        else:
            from_s, _ = to_middle(difference)
            gradient = tl.where(p_s == 0.0, 0.0, 0.5 * from_s)
    return gradient


@triton.jit
def _rows(
    rows,
    inner_rows,
    lse_s,
    lse_t,
    gradient,
    grad_rows,
    map_s,
    map_t,
    key_mask,
    map_s_strides,
    map_t_strides,
    mask_strides,
    grad_rows_strides,
    total,
    heads,
    queries,
    keys,
    SCORES: tl.constexpr,
    DIRECTION: tl.constexpr,
    BACKWARD: tl.constexpr,
    LONG: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ROWS rows: their divergence, or (BACKWARD) their gradient."""
    # Divisions of 64 bits are slow: only where there are so many rows.
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * ROWS + tl.arange(0, ROWS)
    inside = index < total
    query, head = (index % queries).to(tl.int64), (index // queries % heads).to(tl.int64)
    batch = (index // queries // heads).to(tl.int64)
    at_s = map_s + batch * map_s_strides[0] + head * map_s_strides[1] + query * map_s_strides[2]
    at_t = map_t + batch * map_t_strides[0] + head * map_t_strides[1] + query * map_t_strides[2]
    at_mask = None
    valid = inside
    if key_mask is not None:
        at_mask = key_mask + batch * mask_strides[0]
        if queries == keys:
            valid = valid & (tl.load(at_mask + query * mask_strides[1], mask=inside, other=0) != 0)
    key = tl.arange(0, BLOCK)

    sum_s, sum_t = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    level_s, level_t = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    row, inner = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    if LONG:
        seen = tl.zeros([ROWS], tl.int32)
        top_s = tl.full([ROWS], -float("inf"), tl.float32)
        top_t = tl.full([ROWS], -float("inf"), tl.float32)
        for begin in range(0, keys, BLOCK):
            s, t, visible = _read(at_s, at_t, at_mask, begin + key, keys, inside, SCORES)
            seen += tl.sum(visible.to(tl.int32), 1)
            if SCORES:
                top_s = tl.maximum(top_s, tl.max(s, 1))
                top_t = tl.maximum(top_t, tl.max(t, 1))
                was_s, was_t = level_s, level_t
                level_s, level_t = _level(top_s), _level(top_t)
                sum_s = weighted(sum_s, tl.exp2((was_s - level_s) * LOG2_E))
                sum_t = weighted(sum_t, tl.exp2((was_t - level_t) * LOG2_E))
                sum_s += tl.sum(tl.exp2((s - level_s[:, None]) * LOG2_E), 1)
                sum_t += tl.sum(tl.exp2((t - level_t[:, None]) * LOG2_E), 1)
        takes_part = valid & (seen > 0)
        for begin in range(0, keys, BLOCK):
            s, t, visible = _read(at_s, at_t, at_mask, begin + key, keys, inside, SCORES)
            p_s, p_t, difference = _probabilities(s, t, level_s, level_t, sum_s, sum_t, SCORES)
            more_row, more_inner = _divergence(p_s, p_t, difference, DIRECTION)
            row += more_row
            inner += more_inner
    else:
        s, t, visible = _read(at_s, at_t, at_mask, key, keys, inside, SCORES)
        takes_part = valid & (tl.max(visible.to(tl.int32), 1) > 0)
        if SCORES:
            level_s, level_t = _level(tl.max(s, 1)), _level(tl.max(t, 1))
            sum_s = tl.sum(tl.exp2((s - level_s[:, None]) * LOG2_E), 1)
            sum_t = tl.sum(tl.exp2((t - level_t[:, None]) * LOG2_E), 1)
        p_s, p_t, difference = _probabilities(s, t, level_s, level_t, sum_s, sum_t, SCORES)
        row, inner = _divergence(p_s, p_t, difference, DIRECTION)

    if BACKWARD:
        at = grad_rows + batch * grad_rows_strides[0] + head * grad_rows_strides[1]
        upstream = tl.load(at + query * grad_rows_strides[2], mask=takes_part, other=0.0)
        at = gradient + index.to(tl.int64) * keys
        if LONG:
            for begin in range(0, keys, BLOCK):
                s, t, visible = _read(at_s, at_t, at_mask, begin + key, keys, inside, SCORES)
                p_s, p_t, difference = _probabilities(s, t, level_s, level_t, sum_s, sum_t, SCORES)
                values = _gradient(p_s, p_t, difference, row, inner, DIRECTION, SCORES)
                values = tl.where(visible & takes_part[:, None], values * upstream[:, None], 0.0)
                mask = inside[:, None] & (begin + key < keys)[None, :]
                values = values.to(gradient.dtype.element_ty)
                tl.store(at[:, None] + begin + key[None, :], values, mask=mask)
        else:
            values = _gradient(p_s, p_t, difference, row, inner, DIRECTION, SCORES)
            values = tl.where(visible & takes_part[:, None], values * upstream[:, None], 0.0)
            mask = inside[:, None] & (key < keys)[None, :]
            tl.store(at[:, None] + key[None, :], values.to(gradient.dtype.element_ty), mask=mask)
    else:
        tl.store(rows + index, tl.where(takes_part, row, 0.0), mask=inside)
        if DIRECTION == "js":
            tl.store(inner_rows + index, tl.where(takes_part, inner, 0.0), mask=inside)
        log_s, log_t = tl.zeros_like(row), tl.zeros_like(row)
        if SCORES:
            log_s, log_t = level_s + tl.log2(sum_s) * LN_2, level_t + tl.log2(sum_t) * LN_2
        tl.store(lse_s + index, tl.where(takes_part, log_s, float("inf")), mask=inside)
        tl.store(lse_t + index, tl.where(takes_part, log_t, float("inf")), mask=inside)


# Elements of a map per program while rows are short (so that they fill whole transactions), the
# longest row that is kept on chip, and elements per thread.
ELEMENTS = 2048
LONGEST = 8192
PER_THREAD = 16


def launch_parameters(keys: int, direction: str) -> dict[str, Any]:
    """ROWS and BLOCK of a program, and its warps."""
    longest = LONGEST // 2 if direction == "js" else LONGEST  # which takes more registers
    block = min(triton.next_power_of_2(keys), longest)
    rows = max(1, ELEMENTS // block)
    warps = min(max(4, rows * block // (32 * PER_THREAD)), 16)
    blocks = {"LONG": keys > block, "ROWS": rows, "BLOCK": block, "num_warps": warps}
    if INTERPRETED:  # which knows neither option
        return blocks
    if on_nvidia():  # ptxas may spill to fit one more program on a processor: not here
        blocks["maxnreg"] = min(255, 65536 // (32 * warps))
    return {**blocks, "enable_fp_fusion": False}


def on_nvidia() -> bool:
    return torch.version.hip is None


def _launch(
    outputs: tuple[Tensor | None, ...],
    grad_rows: Tensor | None,
    map_s: Tensor,
    map_t: Tensor,
    attention_mask: Tensor | None,
    scores: bool,
    direction: str,
) -> None:
    batch, heads, queries, keys = map_s.shape
    total = batch * heads * queries
    if total == 0:
        return
    mask = None if attention_mask is None else attention_mask.contiguous().view(torch.uint8)
    launch = launch_parameters(keys, direction)
    with torch.cuda.device_of(map_s):
        _rows[(triton.cdiv(total, launch["ROWS"]),)](
            *outputs, grad_rows, map_s, map_t, mask, map_s.stride()[:3], map_t.stride()[:3],
            (0, 0) if mask is None else mask.stride(),
            (0, 0, 0) if grad_rows is None else grad_rows.stride(),
            total, heads, queries, keys, SCORES=scores, DIRECTION=direction,
            BACKWARD=grad_rows is not None, WIDE=total >= 1 << 31, **launch,
        )  # fmt: skip


def forward(
    map_s: Tensor, map_t: Tensor, attention_mask: Tensor | None, scores: bool, direction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """rows, inner, lse_s, lse_t [B, H, Nq]."""
    rows, lse_s, lse_t = (
        map_s.new_empty(map_s.shape[:-1], dtype=torch.float32) for _ in ("rows", "s", "t")
    )
    inner = torch.empty_like(rows) if direction == "js" else rows.new_empty(0)
    _launch(
        (rows, inner, lse_s, lse_t, None), None, map_s, map_t, attention_mask, scores, direction
    )
    return rows, inner, lse_s, lse_t


def backward(
    grad_rows: Tensor,
    rows: Tensor,
    inner: Tensor,
    lse_s: Tensor,
    lse_t: Tensor,
    map_s: Tensor,
    map_t: Tensor,
    attention_mask: Tensor | None,
    scores: bool,
    direction: str,
) -> Tensor:
    """The student's gradient, contiguous."""
    gradient = map_s.new_empty(map_s.shape)
    outputs = (None, None, None, None, gradient)
    _launch(outputs, grad_rows, map_s, map_t, attention_mask, scores, direction)
    return gradient
