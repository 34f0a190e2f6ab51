"""`layer_projection`: attention of each student layer over all teacher layers, and its loss."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import arguments, dispatch, library
from kdfast.ops.attention_kl import REDUCTIONS

MAXIMUM_LAYERS = 64


def layer_projection(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[list[Tensor], Tensor]:
    """Mixture of the teacher's layers that each student layer attends to, token by token.

    α_ij = softmax_j(scale ⟨h_i, g_j⟩) and C_i = Σ_j α_ij g_j, for student states h_i and teacher
    states g_j of one token. Gradients reach the student through the weights, and the teacher
    wherever it requires grad (a learned projection or pseudo classifier sits before it).

    Args:
        layers_s: L_s tensors [..., d], one per student layer; never stacked, at most 64.
        layers_t: L_t tensors [..., d], of the student's shape; their dtype may differ.
        scale: factor of the scores. 1, as the paper has it; d^-½ keeps them from saturating.
        mask: [...], bool or 0/1, 1 = token. Masked tokens have zero weights, zero projected states
            and zero gradient, whatever they hold.
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda".

    Returns:
        projected: list of L_s tensors [..., d] in the dtype of the student's layers (float32 for
            bfloat16 beside float16, float64 for float64 beside another).
        weights: α [..., L_s, L_t], float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names the layer.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Passban et al., "ALP-KD: Attention-based layer projection for knowledge distillation",
        AAAI 2021.
    """
    op = "layer_projection"
    layers_s, layers_t, mask = _check_layers(op, layers_s, layers_t, mask)
    projected, weights = dispatch.run(
        op,
        backend,
        layers_s[0].device,
        layers_s=layers_s,
        layers_t=layers_t,
        scale=arguments.finite(op, "scale", scale),
        mask=mask,
    )
    return projected, weights


def layer_projection_loss(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    objective: str = "mse",
    scale: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    attend: str = "states",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Loss of each student layer against its projection of the teacher's layers.

    With α and C of `layer_projection`, ℓ_i = objective(h_i, C_i) for `attend="states"`, and
    ℓ_i = Σ_j α_ij objective(h_i, g_j) for `attend="losses"`; without weights, layer by layer,
    ℓ_i = objective(h_i, g_i) for `attend="pairs"`. Gradients flow through the weights too, and into
    the teacher wherever it requires grad.

    Args:
        layers_s: L_s tensors [..., d], one per student layer; never stacked, at most 64.
        layers_t: L_t tensors [..., d], of the student's shape; their dtype may differ.
        objective: "mse", the mean over features of (h - C)²; "cosine", 1 - cos(h, C) with norms
            of at least 1e-8; "kl", KL(softmax(C / temperature) ‖ softmax(h / temperature)) in nats,
            for states that are logits (no temperature²).
        scale: factor of the scores before the softmax over teacher layers.
        temperature: of "kl", > 0; the weights do not use it.
        mask: [...], bool or 0/1, 1 = token. Masked tokens have zero loss and gradient.
        attend: "states" mixes the teacher's states, "losses" mixes the per-layer losses, "pairs"
            compares layers of the same number, of which both sides must have as many.
        reduction: "mean" over student layers and valid tokens (0 when there is none) | "sum" over
            them | "none", [..., L_s] with 0 in masked tokens.
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda".

    Returns:
        A scalar, or [..., L_s] for "none"; float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names the layer.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Passban et al., "ALP-KD", AAAI 2021 ("mse"); Wu et al., "Universal-KD: Attention-based
        output-grounded intermediate layer knowledge distillation", EMNLP 2021 ("kl" on pseudo
        logits; attend="losses" is its ablation).
    """
    op = "layer_projection_loss"
    arguments.one_of(op, "objective", objective, ("mse", "cosine", "kl"))
    arguments.one_of(op, "attend", attend, ("states", "losses", "pairs"))
    arguments.one_of(op, "reduction", reduction, REDUCTIONS)
    layers_s, layers_t, mask = _check_layers(op, layers_s, layers_t, mask, pairs=attend == "pairs")
    loss: Tensor = dispatch.run(
        op,
        backend,
        layers_s[0].device,
        layers_s=layers_s,
        layers_t=layers_t,
        objective=objective,
        scale=arguments.finite(op, "scale", scale),
        temperature=arguments.positive(op, "temperature", temperature),
        mask=mask,
        attend=attend,
        reduction=reduction,
    )
    return loss


def _check_layers(
    op: str,
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    mask: Tensor | None,
    *,
    pairs: bool = False,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    layers_s = arguments.tensor_list(op, "layers_s", layers_s)
    layers_t = arguments.tensor_list(op, "layers_t", layers_t)
    for name, layers in (("layers_s", layers_s), ("layers_t", layers_t)):
        if len(layers) > MAXIMUM_LAYERS:
            raise ValueError(
                f"{op}: {name} has {len(layers)} layers, should have at most {MAXIMUM_LAYERS}"
            )
    if pairs and len(layers_s) != len(layers_t):
        raise ValueError(
            f"{op}: layers_s has {len(layers_s)} layers and layers_t {len(layers_t)}; "
            'attend="pairs" compares layers of the same number, so both should have as many'
        )
    names = [f"layers_s[{i}]" for i in range(len(layers_s))]
    names += [f"layers_t[{j}]" for j in range(len(layers_t))]
    every = list(zip(names, [*layers_s, *layers_t], strict=True))
    layers = arguments.two_models(op, every[: len(layers_s)], every[len(layers_s) :])
    shape = layers[0].shape
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"{op}: layers_s[0] has shape {list(shape)}, should be [..., d], d >= 1")
    for name, x in zip(names, layers, strict=True):
        if x.shape != shape:
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)} but layers_s[0] {list(shape)}; all layers "
                "should have one shape [..., d] (project to a common width first)"
            )
    mask = arguments.boolean_mask(op, "mask", mask, shape[:-1], "[...]", layers[0].device)
    return layers[: len(layers_s)], layers[len(layers_s) :], mask


# The kernels. They see layers [A, B, d] of any strides with a dense last dimension, one tensor per
# layer, whose A B = N tokens are independent, and a bool mask [A, B]. One side may be float32 and
# the other of 16 bits (cuda: never). With α_ij = softmax_j(scale
# ⟨h_i, g_j⟩) and C_i = Σ_j α_ij g_j, as float32 (float64 for float64),
#
#   layer_projection_forward        -> C_i [A, B, d] of each student layer, in its dtype, and last
#                                      of all α [A, B, L_s, L_t]; contiguous, 0 in masked tokens.
#   layer_projection_backward       grad_projected, one [A, B, d] of any strides (dense last
#                                      dimension) a student layer, grad_weights like α, and α ->
#                                      the gradients of the layers `wanted` (student layers count
#                                      from 0, those of the teacher follow), each in its dtype,
#                                      contiguous, 0 in masked tokens.
#   layer_projection_loss_forward   -> rows ℓ [A, B, L_s], 0 in masked tokens.
#   layer_projection_loss_backward  grad_rows [A, B, L_s], of any strides -> gradients as above. The
#                                      weights are made again: every kernel has all layers of a
#                                      token at hand, and reading α costs more than its sums.
#   layer_projection_loss_fused     (cpp) both in one read: rows, and the gradients as above.
#   layer_projection_pairs_forward, (triton) the same of attend="pairs", all pairs in one launch,
#   layer_projection_pairs_backward which the other backends take one by one.
#
# `losses` is attend="losses". What masked tokens hold reaches nothing; NaN in a valid token reaches
# that token alone. With u_i = ∂ℓ_i/∂C_i and D_i the derivative of ℓ_i where h_i stands in the
# objective itself, times the upstream gradient of ℓ_i,
#
#   ∂α_ij = ⟨u_i, g_j⟩         dS_ij = scale α_ij (∂α_ij - Σ_k α_ik ∂α_ik)
#   dh_i  = D_i + Σ_j dS_ij g_j        dg_j = Σ_i (α_ij u_i + dS_ij h_i)
#
#   mse       u = -2/d (h - C)                      D = -u
#   cosine    u = (cos C/|C| - h/|h|) / |C|         D = (cos h/|h| - C/|C|) / |h|
#   kl        u = p (log p/q - ℓ) / T               D = (q - p) / T,  p, q = softmax of C/T, h/T
#
# (norms of at least 1e-8 each, and no cos term where that is the norm; torch keeps it). For
# attend="losses" the same stand with g_j in place of C_i: m_ij = objective(h_i, g_j), ∂α_ij = m_ij,
# D_i = Σ_j α_ij D_ij, and u_ij in place of u_i. h - C, h - g, and q - p are differences before they
# are summed: exactly zero for a student that equals its teacher.


def _fake_projection(
    layers_s: list[Tensor], layers_t: list[Tensor], mask: Tensor | None, scale: float
) -> list[Tensor]:
    first = layers_s[0]
    weights = first.new_empty(
        (*first.shape[:-1], len(layers_s), len(layers_t)), dtype=_statistics(first)
    )
    return [*(x.new_empty(x.shape) for x in layers_s), weights]


def _fake_projection_backward(*inputs: Any) -> list[Tensor]:
    layers = [*inputs[3], *inputs[4]]
    return [layers[i].new_empty(layers[i].shape) for i in inputs[-1]]


def _fake_rows(layers_s: list[Tensor], *inputs: Any) -> Tensor:
    first = layers_s[0]
    return first.new_empty((*first.shape[:-1], len(layers_s)), dtype=_statistics(first))


def _fake_backward(grad_rows: Tensor, *inputs: Any) -> list[Tensor]:
    layers = [*inputs[0], *inputs[1]]
    return [layers[i].new_empty(layers[i].shape) for i in inputs[-1]]


def _fake_fused(grad_rows: Tensor, *inputs: Any) -> list[Tensor]:
    return [_fake_rows(inputs[0]), *_fake_backward(grad_rows, *inputs)]


def _statistics(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_LAYERS = "Tensor[] layers_s, Tensor[] layers_t, Tensor? mask"
_LOSS = f"{_LAYERS}, str objective, bool losses, float scale, float temperature"
_PROJECTION = library.define(
    "layer_projection_forward", f"({_LAYERS}, float scale) -> Tensor[]", _fake_projection
)
_PROJECTION_BACKWARD = library.define(
    "layer_projection_backward",
    f"(Tensor[] grad_projected, Tensor grad_weights, Tensor weights, {_LAYERS}, float scale, "
    "int[] wanted) -> Tensor[]",
    _fake_projection_backward,
)
_FORWARD = library.define("layer_projection_loss_forward", f"({_LOSS}) -> Tensor", _fake_rows)
_BACKWARD = library.define(
    "layer_projection_loss_backward",
    f"(Tensor grad_rows, {_LOSS}, int[] wanted) -> Tensor[]",
    _fake_backward,
)
_FUSED = library.define(
    "layer_projection_loss_fused",
    f"(Tensor grad_rows, {_LOSS}, int[] wanted) -> Tensor[]",
    _fake_fused,
    ("cpp",),
)
_PAIRS = f"{_LAYERS}, str objective, float temperature"
_PAIRS_FORWARD = library.define(
    "layer_projection_pairs_forward", f"({_PAIRS}) -> Tensor", _fake_rows, ("triton",)
)
_PAIRS_BACKWARD = library.define(
    "layer_projection_pairs_backward",
    f"(Tensor grad_rows, {_PAIRS}, int[] wanted) -> Tensor[]",
    _fake_backward,
    ("triton",),
)


class _Projection(torch.autograd.Function):
    """C_i [A, B, d] of each student layer, and the weights [A, B, L_s, L_t]."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, many_s: int, scale: float, mask: Tensor | None, *layers: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.backend, ctx.many_s, ctx.scale = backend, many_s, scale
        ctx.set_materialize_grads(False)
        *projected, weights = _PROJECTION[backend](
            list(layers[:many_s]), list(layers[many_s:]), mask, scale
        )
        ctx.save_for_backward(*dispatch.kept(ctx, [mask, weights, *layers]))
        return *projected, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        mask, weights, *layers = dispatch.restored(ctx)
        wanted = _wanted(ctx.needs_input_grad[-len(layers) :])
        nothing = layers[0].new_zeros(layers[0].shape[-1:]).expand_as(layers[0])
        grad_projected = [nothing if x is None else _dense(x) for x in grads[:-1]]
        grad_weights = torch.zeros_like(weights) if grads[-1] is None else _dense(grads[-1])
        with torch.no_grad():
            made = _PROJECTION_BACKWARD[ctx.backend](
                grad_projected, grad_weights, weights,
                layers[: ctx.many_s], layers[ctx.many_s :], mask, ctx.scale, wanted,
            )  # fmt: skip
        gradients = _placed(made, wanted, layers)
        return (None,) * 4 + tuple(
            dispatch.first_derivatives("layer_projection", gradients, layers)
        )


class _Loss(torch.autograd.Function):
    """A scalar, or rows [A, B, L_s]."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        fused: bool,
        reduction: str,
        many_s: int,
        objective: str,
        attend: str,
        scale: float,
        temperature: float,
        mask: Tensor | None,
        *layers: Tensor,
    ) -> Tensor:
        ctx.backend, ctx.reduction, ctx.many_s = backend, reduction, many_s
        ctx.pairs = attend == "pairs"
        ctx.options = (objective, attend == "losses", scale, temperature)
        if ctx.pairs:
            ctx.options = (objective, temperature)
        inputs = (list(layers[:many_s]), list(layers[many_s:]), mask, *ctx.options)
        factor = _factor(layers[0], many_s, mask, reduction)
        gradients: list[Tensor] = []
        if fused and factor is not None:
            wanted = _wanted(ctx.needs_input_grad[-len(layers) :])
            rows, *gradients = _FUSED[backend](_spread(factor, layers[0], many_s), *inputs, wanted)
        else:
            rows = (_PAIRS_FORWARD if ctx.pairs else _FORWARD)[backend](*inputs)
        # Beside the saved tensors, so that backward may scale the gradients where they lie; what
        # packs saved tensors (offloading) does not see them. What has no gradient is let go.
        compiling = torch.compiler.is_compiling()
        ctx.made = None if compiling else gradients
        ctx.fused = bool(gradients)
        saved: list[Tensor | None] = [mask, factor, *layers]
        if gradients:
            saved = [*(layers[i] for i in wanted), *(gradients if compiling else [])]
        ctx.save_for_backward(*dispatch.kept(ctx, saved))
        return rows if reduction == "none" else rows.sum() * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        restored = list(dispatch.restored(ctx))
        needs = ctx.needs_input_grad[9:]
        wanted = _wanted(needs)
        with torch.no_grad():
            if ctx.fused:
                learners, saved = restored[: len(wanted)], restored[len(wanted) :]
                made = _scaled(ctx, grad, saved)
            else:
                mask, factor, *layers = restored
                if ctx.reduction != "none":
                    grad = _spread(grad * factor, layers[0], ctx.many_s)
                made = (_PAIRS_BACKWARD if ctx.pairs else _BACKWARD)[ctx.backend](
                    grad, layers[: ctx.many_s], layers[ctx.many_s :], mask, *ctx.options, wanted
                )
                learners = [layers[i] for i in wanted]
        gradients = dispatch.first_derivatives("layer_projection_loss", made, learners)
        return (None,) * 9 + tuple(_placed(gradients, wanted, needs))


def _scaled(ctx: Any, grad: Tensor, saved: Sequence[Tensor]) -> list[Tensor]:
    """The gradients made in forward, times the upstream gradient."""
    if saved or dispatch.keeps_graph():
        return [x * grad for x in saved or ctx.made]
    made: list[Tensor] = ctx.made
    ctx.made = None
    if grad != 1:
        for x in made:
            x.mul_(grad)
    return made


def _factor(like: Tensor, many_s: int, mask: Tensor | None, reduction: str) -> Tensor | None:
    """What the sum of all rows is multiplied by: 1 over their number for "mean"."""
    dtype = _statistics(like)
    if reduction == "none":
        return None
    if reduction == "sum":
        return like.new_ones((), dtype=dtype)
    if mask is None:
        tokens = like.shape[0] * like.shape[1]
        return like.new_full((), 1 / (max(tokens, 1) * many_s), dtype=dtype)
    return 1 / (mask.sum().clamp(min=1) * many_s).to(dtype)


def _spread(value: Tensor, like: Tensor, many_s: int) -> Tensor:
    return value.expand(like.shape[0], like.shape[1], many_s)


def _wanted(needs: Sequence[bool]) -> list[int]:
    return [i for i, needed in enumerate(needs) if needed]


def _placed(
    made: Sequence[Tensor | None], wanted: Sequence[int], layers: Sequence[Any]
) -> list[Tensor | None]:
    gradients: list[Tensor | None] = [None] * len(layers)
    for i, gradient in zip(wanted, made, strict=True):
        gradients[i] = gradient
    return gradients


def _dense(x: Tensor) -> Tensor:
    # Not contiguous(), which takes an empty tensor, or one of d = 1, for dense as it is.
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _flat(
    layers_s: list[Tensor], layers_t: list[Tensor], mask: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """Layers as [A, B, d], views wherever two strides can tell where the tokens are."""
    shape = layers_s[0].shape
    if len(shape) < 3:
        three = (1, math.prod(shape[:-1]), shape[-1])
    else:
        three = (math.prod(shape[:-2]), shape[-2], shape[-1])
    layers = [_dense(x).reshape(three) for x in (*layers_s, *layers_t)]
    if torch.compiler.is_compiling():  # refuses one tensor in two places
        layers = dispatch.distinct(layers)
    return layers, None if mask is None else mask.reshape(three[:2])


def _serve_projection(
    backend: str,
    *,
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    scale: float,
    mask: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    layers, mask = _flat(layers_s, layers_t, mask)
    *projected, weights = _Projection.apply(backend, len(layers_s), scale, mask, *layers)
    shape = layers_s[0].shape
    return [x.view(shape) for x in projected], weights.view(*shape[:-1], *weights.shape[-2:])


def _serve_loss(
    backend: str,
    *,
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    objective: str,
    scale: float,
    temperature: float,
    mask: Tensor | None,
    attend: str,
    reduction: str,
) -> Tensor:
    if attend == "pairs" and backend not in _PAIRS_FORWARD:
        losses = []
        for s, t in zip(layers_s, layers_t, strict=True):
            losses.append(
                _serve_loss(
                    backend, layers_s=[s], layers_t=[t], objective=objective, scale=scale,
                    temperature=temperature, mask=mask, attend="states", reduction=reduction,
                )
            )  # fmt: skip
        if reduction == "none":
            return torch.cat(losses, -1)
        total = torch.stack(losses).sum()
        return total / len(losses) if reduction == "mean" else total
    layers, mask = _flat(layers_s, layers_t, mask)
    # On a GPU the gradients would be written, read, and written again to be scaled: as many bytes
    # as reading the layers twice. In float16 they vanish before the loss is scaled up.
    fused = (
        backend in _FUSED
        and all(x.dtype != torch.float16 for x in layers if x.requires_grad)
        and reduction != "none"
        and torch.is_grad_enabled()
        and any(x.requires_grad for x in layers)
    )
    result: Tensor = _Loss.apply(
        backend, fused, reduction, len(layers_s),
        objective, attend, scale, temperature, mask, *layers,
    )  # fmt: skip
    shape = layers_s[0].shape
    return result.view(*shape[:-1], len(layers_s)) if reduction == "none" else result


def _kernel(operator: str, backend: str) -> dispatch.Kernel:
    def load() -> Callable[..., Any]:
        names = ["layer_projection_forward", "layer_projection_backward",
                 "layer_projection_loss_forward", "layer_projection_loss_backward"]  # fmt: skip
        if backend in _FUSED:
            names.append("layer_projection_loss_fused")
        if backend in _PAIRS_FORWARD:
            names += ["layer_projection_pairs_forward", "layer_projection_pairs_backward"]
        library.load(backend, "layer_projection", names)
        serve = _serve_projection if operator == "layer_projection" else _serve_loss
        return functools.partial(serve, backend)

    def refuses(*, layers_s: list[Tensor], layers_t: list[Tensor], **others: Any) -> str | None:
        reason = library.refuses(backend, layers_s[0]) or library.refuses(backend, layers_t[0])
        if reason is None and backend == "cuda" and layers_s[0].dtype != layers_t[0].dtype:
            return f"a teacher in {layers_t[0].dtype} and a student in {layers_s[0].dtype}"
        return reason

    return dispatch.Kernel(load, refuses)


for _backend in library.KERNEL_BACKENDS:
    for _operator in ("layer_projection", "layer_projection_loss"):
        dispatch.KERNELS[_operator, _backend] = _kernel(_operator, _backend)
