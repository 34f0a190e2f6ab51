"""`attention_map_kl`: KL divergence between attention maps that already exist."""

from __future__ import annotations

from torch import Tensor

from kdfast.ops import arguments, dispatch
from kdfast.ops.attention_kl import DIRECTIONS, REDUCTIONS


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
