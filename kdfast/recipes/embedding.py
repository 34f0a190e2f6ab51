"""Sentence embedders: models without a head, whose pooled state is the output.

Beside it, internals: attention maps and token states of mapped layers, as in `internal`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.losses import AttentionKLLoss, CosineLoss
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import Recipe, Term
from kdfast.recipes.schedule import Moment
from kdfast.recipes.terms import AttentionTerm, HiddenTerm, check_heads, pool_of, pooled


class PooledTerm(Term):
    """1 − cos of the two models' pooled last states, through a learned projection where their
    widths differ."""

    def __init__(self, weight: Any, student: ModelShape, teacher: ModelShape, pool: str) -> None:
        super().__init__(weight, "pooled last states by cosine")
        self.last = student.layers, teacher.layers
        self.pools = [pool_of(shape, pool) for shape in (student, teacher)]
        self.loss = CosineLoss("tokens", student_width=student.width, teacher_width=teacher.width)

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        own, theirs = (Needs(hidden_states=[layer]) for layer in self.last)
        return own, theirs

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        own, theirs = (
            pooled([side.hidden_states[last]], side.attention_mask, pool)[0][:, None]
            for side, last, pool in zip((student, teacher), self.last, self.pools, strict=True)
        )
        return self.loss(own, theirs)


def embedding(
    student: ModelShape,
    teacher: ModelShape,
    *,
    pooled_weight: float = 1.0,
    attention_weight: float = 1.0,
    cosine_weight: float = 1.0,
    layer_map: Any = "uniform",
    pool: str = "mean",
    relation_heads: int | None = None,
    match_heads: str | None = None,
) -> Recipe:
    """Cosine of pooled states + attention-map KL + token cosine on mapped layers; needs no labels.

    Args:
        pool: "mean" over valid tokens (most sentence embedders), "cls", "last", or "auto" (what a
            head on the model would read). Students are scored by embeddings pooled so, or by the
            mean where the ways of a run differ in it.
        layer_map, relation_heads, match_heads: as in `internal`.
    """
    pairs = resolve_layer_map(layer_map, student, teacher)
    terms: dict[str, Term] = {
        "pooled": PooledTerm(pooled_weight, student, teacher, pool),
        "attention_kl": AttentionTerm(
            attention_weight,
            AttentionKLLoss(relation_heads=relation_heads, match_heads=match_heads),
            pairs,
        ),
        "cosine": HiddenTerm(
            cosine_weight,
            CosineLoss(
                "tokens",
                student_width=student.width,
                teacher_width=teacher.width,
                pairs=len(pairs),
            ),
            pairs,
            "token states by cosine",
            token_aligned=True,
        ),
    }
    if terms["attention_kl"].weight.maximum > 0:
        check_heads(student, teacher, relation_heads=relation_heads, match_heads=match_heads)
    return Recipe("embedding", terms, pairs)
