"""Losses on attention maps and value relations, from queries, keys and values: no map is formed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kdfast.losses.layers import (
    LAYER_REDUCTIONS,
    PADDINGS,
    Layers,
    as_pairs,
    choose,
    of_one_dtype,
    over_layers,
)
from kdfast.ops.attention_kl import attention_kl

RELATIONS = ("query", "key", "value")


class AttentionKLLoss(nn.Module):
    """KL between the attention maps of teacher and student, mean over valid rows, heads and batch.

    Args:
        direction: "forward" KL(t‖s), "reverse" or "js".
        temperature: divides both sides' scores.
        relation_heads, match_heads: how differing head counts meet, see kdfast.attention_kl.
        layers: "sum" (the paper's reading) or "mean" over layer pairs.
        padding: "masked" (default: a padded token's row says nothing) or "counted": rows of padded
            tokens take part too. Padded keys get no probability in either.
        backend: see kdfast.attention_kl.

    unit: "tokens" (query rows), "samples" with padding="counted"; couples_samples: False.

    Source: Aguilar et al. 2020, L_kl; MiniLM, L_AT.
    """

    couples_samples = False

    def __init__(
        self,
        *,
        direction: str = "forward",
        temperature: float = 1.0,
        relation_heads: int | None = None,
        match_heads: str | None = None,
        layers: str = "sum",
        padding: str = "masked",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.padding = choose("padding", padding, PADDINGS)
        self.unit = "tokens" if padding == "masked" else "samples"
        self.direction = choose("direction", direction, ("forward", "reverse", "js"))
        self.temperature = temperature
        self.relation_heads = relation_heads
        self.match_heads = match_heads and choose("match_heads", match_heads, ("mean",))
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)
        self.backend = backend

    def forward(
        self,
        query_s: Layers,
        key_s: Layers,
        query_t: Layers,
        key_t: Layers,
        attention_mask: torch.Tensor | None = None,
        *,
        causal: bool = False,
        window: int | None = None,
        scale_s: float | None = None,
        scale_t: float | None = None,
    ) -> torch.Tensor:
        """
        query_*: [B, H, N, d]; key_*: [B, H_kv, N, d]; or sequences of them, one per layer pair.
        attention_mask: [B, N], 1 = token. Returns a scalar.
        """
        counted = attention_mask is not None and self.padding == "counted"
        queries_s, queries_t = zip(*as_pairs(query_s, query_t), strict=True)
        keys_s, keys_t = zip(*as_pairs(key_s, key_t), strict=True)
        pairs = len(queries_s)
        student = of_one_dtype((*queries_s, *keys_s))
        teacher = of_one_dtype((*queries_t, *keys_t))
        losses = attention_kl(
            student[:pairs],
            student[pairs:],
            teacher[:pairs],
            teacher[pairs:],
            attention_mask=attention_mask,
            query_mask=torch.ones_like(attention_mask) if counted else None,  # type: ignore[arg-type]
            causal=causal,
            window=window,
            scale_s=scale_s,
            scale_t=scale_t,
            temperature=self.temperature,
            direction=self.direction,
            relation_heads=self.relation_heads,
            match_heads=self.match_heads,
            backend=self.backend,
        )
        assert isinstance(losses, torch.Tensor)  # a list only for reduction="none"
        return over_layers(losses, self.layers)


class RelationKLLoss(nn.Module):
    """KL between the query-query, key-key and value-value relations of teacher and student.

    Args:
        relation_heads: number of heads the [B, N, D] projections are regrouped into on both sides;
            must divide both widths. Head counts and widths need not match. None: the models' own
            heads, whose numbers must agree (widths need not), as in MiniLM.
        relations: which of the three are summed: all for MiniLMv2, ("value",) for MiniLM's L_VR.
        layers: "sum" or "mean" over layer pairs.
        backend: see kdfast.attention_kl.

    unit: "tokens" (rows of the relations); couples_samples: False.

    Source: MiniLMv2 (Wang et al. 2021): the sum of the three, equal weights; MiniLM (Wang et al.
    2020), L_VR: values alone, softmax(V Vᵀ/√d) per head.
    """

    couples_samples = False
    unit = "tokens"

    def __init__(
        self,
        relation_heads: int | None = None,
        *,
        relations: Sequence[str] = RELATIONS,
        layers: str = "sum",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.relation_heads = relation_heads
        if isinstance(relations, str) or not relations or len(set(relations)) < len(relations):
            raise ValueError(
                f"relations must be some of {', '.join(RELATIONS)}, each once, was {relations!r}"
            )
        self.relations = [choose("relations", name, RELATIONS) for name in relations]
        self.layers = choose("layers", layers, LAYER_REDUCTIONS)
        self.backend = backend

    def forward(
        self,
        query_s: Layers | None,
        key_s: Layers | None,
        value_s: Layers | None,
        query_t: Layers | None,
        key_t: Layers | None,
        value_t: Layers | None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Each [B, H, N, d] (H_kv for keys and values) or a sequence of them; what `relations` leaves
        out may be None. attention_mask: [B, N], 1 = token. Returns a scalar.
        """
        given = ((query_s, query_t), (key_s, key_t), (value_s, value_t))
        states = dict(zip(RELATIONS, given, strict=True))
        total: torch.Tensor | None = None
        for name in self.relations:
            states_s, states_t = states[name]
            if states_s is None or states_t is None:
                raise ValueError(f"{name}_s and {name}_t are compared (relations), one was None")
            pairs = as_pairs(states_s, states_t)
            student, teacher = (of_one_dtype(side) for side in zip(*pairs, strict=True))
            losses = attention_kl(
                student,
                student,
                teacher,
                teacher,
                attention_mask=attention_mask,
                relation_heads=self.relation_heads,
                backend=self.backend,
            )
            assert isinstance(losses, torch.Tensor)
            total = losses if total is None else total + losses
        assert total is not None
        return over_layers(total, self.layers)
