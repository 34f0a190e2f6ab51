"""Attention of every student layer over all teacher layers.

For one token with student states h_i and teacher states g_j

    alpha_ij = softmax_j(scale <h_i, g_j>),    C_i = sum_j alpha_ij g_j

(ALP-KD, Passban et al. 2021; on pseudo logits instead of states Universal-KD, Wu et al. 2021), and
the loss compares h_i with C_i, or, for `attend="losses"`, mixes the losses of h_i against every g_j
with the same weights, or, for `attend="pairs"`, compares h_i with g_i alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.reference.attention_map_kl import reduce_rows, row_divergence
from kdfast.reference.product import product


def layer_projection(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Reference of `kdfast.ops.layer_projection`."""
    states_s, states_t = _stack(layers_s, mask), _stack(layers_t, mask)
    weights = _weights(states_s, states_t, scale)
    projected = product(weights, states_t.transpose(-1, -2)).to(layers_s[0].dtype)
    if mask is not None:
        weights = weights.masked_fill(~mask.bool()[..., None, None], 0.0)
    return list(projected.unbind(-2)), weights


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
) -> Tensor:
    """Reference of `kdfast.ops.layer_projection_loss`."""
    states_s, states_t = _stack(layers_s, mask), _stack(layers_t, mask)
    if attend == "pairs":
        losses = _compare(states_s, states_t, objective, temperature)
    elif attend == "states":
        weights = _weights(states_s, states_t, scale)
        projected = product(weights, states_t.transpose(-1, -2))
        losses = _compare(states_s, projected, objective, temperature)
    else:  # one teacher layer at a time, rather than [..., L_s, L_t, d] at once
        weights = _weights(states_s, states_t, scale)
        against = [
            _compare(states_s, state_t.unsqueeze(-2), objective, temperature)
            for state_t in states_t.unbind(-2)
        ]
        losses = (weights * torch.stack(against, dim=-1)).sum(-1)
    if mask is None:
        takes_part = torch.ones(losses.shape, dtype=torch.bool, device=losses.device)
    else:
        takes_part = mask.bool().unsqueeze(-1)
    return reduce_rows(losses, takes_part, reduction)


def _stack(layers: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """[..., L, d] in float32 or better; zero in masked tokens, whatever those hold."""
    states = torch.stack(list(layers), dim=-2)
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    return states if mask is None else states.masked_fill(~mask.bool()[..., None, None], 0.0)


def _weights(states_s: Tensor, states_t: Tensor, scale: float) -> Tensor:
    return torch.softmax(product(states_s, states_t) * scale, dim=-1)


def _compare(states: Tensor, targets: Tensor, objective: str, temperature: float) -> Tensor:
    """Loss of each state against its target, along the last dimension (both broadcast)."""
    if objective == "mse":
        return (states - targets).square().mean(-1)
    if objective == "cosine":
        return 1 - F.cosine_similarity(states, targets, dim=-1, eps=1e-8)
    log_t = torch.log_softmax(targets / temperature, dim=-1)
    states = states.expand(torch.broadcast_shapes(states.shape, log_t.shape))
    return row_divergence(states / temperature, log_t, "forward")
