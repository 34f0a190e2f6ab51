"""`layer_projection`: attention of each student layer over all teacher layers, and its loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from kdfast.ops import arguments, dispatch
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
        layers_t: L_t tensors [..., d], of the student's shape.
        scale: factor of the scores. 1, as the paper has it; d^-½ keeps them from saturating.
        mask: [...], bool or 0/1, 1 = token. Masked tokens have zero weights, zero projected states
            and zero gradient, whatever they hold.
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda".

    Returns:
        projected: list of L_s tensors [..., d] in the dtype of the inputs.
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
    ℓ_i = Σ_j α_ij objective(h_i, g_j) for `attend="losses"`. Gradients flow through the weights
    too, and into the teacher wherever it requires grad.

    Args:
        layers_s: L_s tensors [..., d], one per student layer; never stacked, at most 64.
        layers_t: L_t tensors [..., d], of the student's shape.
        objective: "mse", the mean over features of (h - C)²; "cosine", 1 - cos(h, C) with norms
            of at least 1e-8; "kl", KL(softmax(C / temperature) ‖ softmax(h / temperature)) in nats,
            for states that are logits (no temperature²).
        scale: factor of the scores before the softmax over teacher layers.
        temperature: of "kl", > 0; the weights do not use it.
        mask: [...], bool or 0/1, 1 = token. Masked tokens have zero loss and gradient.
        attend: "states" mixes the teacher's states, "losses" mixes the per-layer losses.
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
    arguments.one_of(op, "attend", attend, ("states", "losses"))
    arguments.one_of(op, "reduction", reduction, REDUCTIONS)
    layers_s, layers_t, mask = _check_layers(op, layers_s, layers_t, mask)
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
    op: str, layers_s: Sequence[Tensor], layers_t: Sequence[Tensor], mask: Tensor | None
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    layers_s = arguments.tensor_list(op, "layers_s", layers_s)
    layers_t = arguments.tensor_list(op, "layers_t", layers_t)
    for name, layers in (("layers_s", layers_s), ("layers_t", layers_t)):
        if len(layers) > MAXIMUM_LAYERS:
            raise ValueError(
                f"{op}: {name} has {len(layers)} layers, should have at most {MAXIMUM_LAYERS}"
            )
    names = [f"layers_s[{i}]" for i in range(len(layers_s))]
    names += [f"layers_t[{j}]" for j in range(len(layers_t))]
    layers = arguments.floating(op, zip(names, [*layers_s, *layers_t], strict=True))
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
