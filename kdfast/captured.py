"""What one forward pass leaves for the losses: the vocabulary of capture and recipes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class LayerAttention:
    """What made the attention scores of one layer: softmax(scale · query keyᵀ + masks).

    query: [B, H, N, d]; key, value: [B, H_kv, N, d], after any rotary embedding and before dropout;
    value None where it is not wanted (Needs.values).
    causal, window: the layer's own masks; window keeps |i − j| ≤ window, None keeps all.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor | None
    scale: float
    causal: bool = False
    window: int | None = None


@dataclass(frozen=True)
class Captured:
    """The internals of one forward pass, of the layers that were wanted.

    logits: [B, C], [B, N, C] of a token classifier, or None without a head or if not wanted.
    hidden_states: by layer, [B, N, D]; the embeddings are layer 0, the last is L.
    attention: by layer, from 1 to L.
    attention_mask: [B, N], 1 = token, or None when nothing is padded, as far as is known.
    """

    logits: torch.Tensor | None
    hidden_states: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, LayerAttention] = field(default_factory=dict)
    attention_mask: torch.Tensor | None = None
    _masked: dict[int, tuple[torch.Tensor | None, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def masked_states(self, layer: int, mask: torch.Tensor | None) -> torch.Tensor:
        """The hidden states of a layer, 0 where a mask [B, N] has 0; one copy for all who ask."""
        states = self.hidden_states[layer]
        if mask is None:
            return states
        if layer not in self._masked or self._masked[layer][0] is not mask:
            self._masked[layer] = mask, _ZeroPadding.apply(states, mask)
        return self._masked[layer][1]

    @property
    def device(self) -> torch.device:
        """Of its tensors; a CPU if there are none."""
        found = self.tensors()
        return found[0].device if found else torch.device("cpu")

    def tensors(self) -> list[torch.Tensor]:
        """All but the mask."""
        logits = [] if self.logits is None else [self.logits]
        layers = self.attention.values()
        parts = [x for layer in layers for x in (layer.query, layer.key, layer.value)]
        return [*logits, *self.hidden_states.values(), *(x for x in parts if x is not None)]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Captured:
        """The same with function(x) in place of each tensor x but the mask."""
        return Captured(
            logits=None if self.logits is None else function(self.logits),
            hidden_states={i: function(x) for i, x in self.hidden_states.items()},
            attention={
                i: replace(
                    layer,
                    query=function(layer.query),
                    key=function(layer.key),
                    value=None if layer.value is None else function(layer.value),
                )
                for i, layer in self.attention.items()
            },
            attention_mask=self.attention_mask,
        )

    def release(self, needs: Needs) -> None:
        """Forget, in place, all layers but those of `needs`."""
        for kept, wanted in (
            (self.hidden_states, needs.hidden_states),
            (self.attention, needs.attention),
        ):
            for layer in kept.keys() - set(wanted):
                del kept[layer]
        for layer in self._masked.keys() - set(needs.hidden_states):
            del self._masked[layer]


class _ZeroPadding(torch.autograd.Function):
    """masked_fill, whose graph several losses may go through, each on its own."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.padded = ~mask.bool()[..., None]
        return states.masked_fill(ctx.padded, 0)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.masked_fill(ctx.padded, 0), None


@dataclass(frozen=True)
class ModelShape:
    """What a recipe must know of a model before the first batch.

    heads: 0 for a model without attention. classes: None without a head. regression: the logits are
    values, which are compared as such; binary: the one value is the logit of a relevance in [0, 1],
    and learns labels by binary cross-entropy. token_logits: the head classifies every token.
    pool: how a sequence becomes one state, "cls", "mean" over tokens or the "last" token.
    key_value_heads: where several query heads share a key; None: as many as heads. head_width: of
    a query head; None: width / heads.
    """

    layers: int
    width: int
    heads: int
    classes: int | None
    regression: bool = False
    token_logits: bool = False
    pool: str = "cls"
    key_value_heads: int | None = None
    binary: bool = False
    head_width: int | None = None

    @property
    def query_width(self) -> int:
        """Of the queries of all heads."""
        return self.heads * self._head_width

    @property
    def key_width(self) -> int:
        """Of the keys (as of the values) of all heads."""
        return (self.key_value_heads or self.heads) * self._head_width

    @property
    def _head_width(self) -> int:
        return self.head_width or self.width // max(1, self.heads)

    @property
    def has_cls(self) -> bool:
        """Whether the state of the first token stands for the sequence."""
        return self.heads > 0 and self.pool != "last"

    def describe(self) -> str:
        heads = f", {self.heads} heads" if self.heads else ", no attention"
        return f"{self.layers} layers, width {self.width}{heads}"


@dataclass(frozen=True)
class Needs:
    """What is read of a model, so that nothing else is run or kept.

    hidden_states, attention: layers, as Captured numbers them (any iterable of them is taken).
    values: the layers of `attention` whose values are read too, not only queries and keys.
    """

    logits: bool = False
    hidden_states: Iterable[int] = frozenset()
    attention: Iterable[int] = frozenset()
    values: Iterable[int] = frozenset()

    def __post_init__(self) -> None:
        for name in ("hidden_states", "attention", "values"):
            object.__setattr__(self, name, frozenset(getattr(self, name)))

    def __bool__(self) -> bool:
        return self.logits or bool(self.hidden_states) or bool(self.attention)

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.logits or other.logits,
            {*self.hidden_states, *other.hidden_states},
            {*self.attention, *other.attention},
            {*self.values, *other.values},
        )

    @property
    def last(self) -> int:
        """The last layer among them."""
        return max((0, *self.hidden_states, *self.attention))
