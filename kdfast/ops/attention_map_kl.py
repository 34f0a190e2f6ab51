"""`attention_map_kl`: KL divergence between attention maps that already exist."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import arguments, dispatch, library
from kdfast.ops.attention_kl import DIRECTIONS, REDUCTIONS, SWAPPED


def attention_map_kl(
    map_s: Tensor,
    map_t: Tensor,
    *,
    inputs: str = "probabilities",
    attention_mask: Tensor | None = None,
    direction: str = "forward",
    reduction: str = "mean",
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Divergence of the student's attention maps from the teacher's, for maps in memory.

    The rows, directions and reductions of `attention_kl`. Zero probabilities are exact zeros
    (0 log 0 = 0); nothing is added inside a logarithm. A row is +inf where the direction weighs an
    entry on which the other side has exactly none.

    The gradient of "probabilities" takes the entries as free variables (log p_s - log p_t + 1 for
    "reverse", -p_t / p_s for "forward", log(p_s / m) / 2 for "js"), so a constant along each row is
    left for the softmax before it to remove; at equal maps only "scores" gives exact zeros. An
    entry where p_s is exactly 0 gets gradient 0, because no softmax can move it, save for "forward"
    where the teacher has mass: there the loss is +inf and its gradient -inf ("scores" stay finite:
    p_s - p_t).

    Args:
        map_s: [..., Nq, Nk], [B, ..., Nq, Nk] with `attention_mask`; the student's maps.
        map_t: the teacher's maps, same shape.
        inputs: "probabilities" (rows sum to 1; not checked, not normalised again) or "scores"
            (before the softmax; -inf is a masked key).
        attention_mask: [B, Nk], bool or 0/1, 1 = token. Padded keys are left out (of the softmax
            for "scores", of the sum for "probabilities"); with Nq = Nk padded queries leave too.
            Probabilities are not normalised again: of maps made without this mask the sum over the
            valid keys is no divergence, and may be negative.
        direction: "forward" KL(t‖s) | "reverse" KL(s‖t) | "js". In nats.
        reduction: "mean" over the rows that take part | "sum" | "none", per row [..., Nq]. A row
            takes part when its query is valid and either map has mass on a valid key.
        teacher_grad: give the teacher a gradient too. By default a teacher that requires grad is
            refused.
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda".

    Returns:
        A scalar, or rows for "none"; float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Aguilar et al., "Knowledge Distillation from Internal Representations", AAAI 2020 (the KL
        term on attention maps).
    """
    op = "attention_map_kl"
    arguments.one_of(op, "inputs", inputs, ("probabilities", "scores"))
    arguments.one_of(op, "direction", direction, DIRECTIONS)
    arguments.one_of(op, "reduction", reduction, REDUCTIONS)
    map_s, map_t = arguments.floating(op, [("map_s", map_s), ("map_t", map_t)])
    if map_s.dim() < 2:
        raise ValueError(f"{op}: map_s has shape {list(map_s.shape)}, should be [..., Nq, Nk]")
    if map_s.shape != map_t.shape:
        raise ValueError(
            f"{op}: map_t has shape {list(map_t.shape)} but map_s {list(map_s.shape)}; they should "
            "agree (average the teacher's heads first when their number differs)"
        )
    if 0 in map_s.shape[-2:]:
        raise ValueError(
            f"{op}: map_s has shape {list(map_s.shape)}; Nq and Nk should be at least 1"
        )
    arguments.no_teacher_grad(op, [("map_t", map_t)], teacher_grad)
    if attention_mask is not None:
        if map_s.dim() < 3:
            raise ValueError(
                f"{op}: map_s has shape {list(map_s.shape)}, should be [B, ..., Nq, Nk] to go with "
                "an attention_mask [B, Nk]"
            )
        attention_mask = arguments.boolean_mask(
            op,
            "attention_mask",
            attention_mask,
            (map_s.shape[0], map_s.shape[-1]),
            "[B, Nk]",
            map_s.device,
        )
    divergence: Tensor = dispatch.run(
        op,
        backend,
        map_s.device,
        map_s=map_s,
        map_t=map_t,
        inputs=inputs,
        attention_mask=attention_mask,
        direction=direction,
        reduction=reduction,
        teacher_grad=bool(teacher_grad),
    )
    return divergence


# The kernels. They see [B, H, Nq, Nk] maps of any strides with a dense last dimension, and a bool
# mask [B, Nk], which also takes out queries when Nq = Nk. Statistics are float32 (float64 for
# float64):
#
#   forward   -> rows, inner, lse_s, lse_t [B, H, Nq]. inner is KL(s || m) per row for "js", else
#                empty. A row that takes no part has rows = inner = 0 and lse_s = lse_t = +inf; of
#                probabilities the others have lse_s = lse_t = 0.
#   backward  grad_rows [B, H, Nq], of any strides -> the student's gradient, contiguous, in the
#                dtype of the maps.


def _fake_forward(
    map_s: Tensor, map_t: Tensor, attention_mask: Tensor | None, scores: bool, direction: str
) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(map_s.dtype, torch.float32)
    rows, inner, lse_s, lse_t = (map_s.new_empty(map_s.shape[:-1], dtype=dtype) for _ in range(4))
    if direction != "js":
        inner = map_s.new_empty((0,), dtype=dtype)
    return rows, inner, lse_s, lse_t


def _fake_backward(*inputs: Any) -> Tensor:
    map_s: Tensor = inputs[5]
    return map_s.new_empty(map_s.shape)


_INPUTS = "Tensor map_s, Tensor map_t, Tensor? attention_mask, bool scores, str direction"
_FORWARD = library.define(
    "attention_map_kl_forward", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake_forward
)
_BACKWARD = library.define(
    "attention_map_kl_backward",
    "(Tensor grad_rows, Tensor rows, Tensor inner, Tensor lse_s, Tensor lse_t, "
    f"{_INPUTS}) -> Tensor",
    _fake_backward,
)


class _AttentionMapKL(torch.autograd.Function):
    """A scalar, or rows [B, H, Nq]."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        scores: bool,
        direction: str,
        reduction: str,
        attention_mask: Tensor | None,
        map_s: Tensor,
        map_t: Tensor,
    ) -> Tensor:
        ctx.backend, ctx.scores, ctx.direction = backend, scores, direction
        ctx.reduction = reduction
        statistics = _FORWARD[backend](map_s, map_t, attention_mask, scores, direction)
        rows, _, lse_s, _ = statistics
        count = None
        if reduction == "mean":
            count = (lse_s != torch.inf).sum().clamp(min=1).to(rows.dtype)
        saved = [attention_mask, map_s, map_t, count, *statistics]
        ctx.save_for_backward(*dispatch.kept(ctx, saved))
        if reduction == "none":
            return rows.clone()  # what is returned may be changed in place
        return rows.sum() if count is None else rows.sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        attention_mask, map_s, map_t, count, rows, inner, lse_s, lse_t = dispatch.restored(ctx)
        grad_s: Tensor | None = None
        grad_t: Tensor | None = None
        with torch.no_grad():
            if ctx.reduction != "none":
                grad = (grad if count is None else grad / count).expand_as(rows)
            backward = _BACKWARD[ctx.backend]
            if ctx.needs_input_grad[-2]:
                grad_s = backward(
                    grad, rows, inner, lse_s, lse_t,
                    map_s, map_t, attention_mask, ctx.scores, ctx.direction,
                )  # fmt: skip
            if ctx.needs_input_grad[-1]:
                # The other side's gradient is the student's with the roles exchanged.
                inner_t = 2 * rows - inner if ctx.direction == "js" else inner
                grad_t = backward(
                    grad, rows, inner_t, lse_t, lse_s,
                    map_t, map_s, attention_mask, ctx.scores, SWAPPED[ctx.direction],
                )  # fmt: skip
        gradients = dispatch.first_derivatives("attention_map_kl", [grad_s, grad_t], [map_s, map_t])
        return None, None, None, None, None, *gradients


def _serve(
    backend: str,
    *,
    map_s: Tensor,
    map_t: Tensor,
    inputs: str,
    attention_mask: Tensor | None,
    direction: str,
    reduction: str,
    teacher_grad: bool,
) -> Tensor:
    shape = map_s.shape[:-1]
    if not teacher_grad:
        map_t = map_t.detach()

    def four(x: Tensor) -> Tensor:
        if x.dim() < 4:
            x = x[(None,) * (4 - x.dim())] if x.dim() == 2 else x.unsqueeze(1)
        elif x.dim() > 4:
            x = x.flatten(1, -3)
        return x if x.stride(-1) == 1 else x.contiguous()

    result: Tensor = _AttentionMapKL.apply(
        backend, inputs == "scores", direction, reduction, attention_mask, four(map_s), four(map_t)
    )
    return result.view(shape) if reduction == "none" else result


def _kernel(backend: str) -> dispatch.Kernel:
    def load() -> Callable[..., Any]:
        names = [f"attention_map_kl_{name}" for name in ("forward", "backward")]
        library.load(backend, "attention_map_kl", names)
        return functools.partial(_serve, backend)

    def refuses(*, map_s: Tensor, **others: Any) -> str | None:
        return library.refuses(backend, map_s)

    return dispatch.Kernel(load, refuses)


for _backend in library.KERNEL_BACKENDS:
    dispatch.KERNELS["attention_map_kl", _backend] = _kernel(_backend)
