"""Relational Knowledge Distillation (Park et al., CVPR 2019): the geometry of the batch.

Huber distances between the pairwise distances, and between the angles of all triplets, of the
samples' states in teacher and student; soft labels beside them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.losses import RKDLoss
from kdfast.recipes.layer_map import LayerMap
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import Recipe, Term
from kdfast.recipes.schedule import Moment
from kdfast.recipes.terms import active_pairs, needs_of_pairs, output_terms, pool_of, pooled


class RelationalTerm(Term):
    """Distances or angles among the pooled states of a batch, summed over layer pairs."""

    def __init__(
        self, weight: Any, loss: RKDLoss, pairs: LayerMap, pools: tuple[str, str], what: str
    ) -> None:
        super().__init__(weight, f"{what} among samples by Huber distance")
        self.loss = loss
        self.pairs = pairs
        self.pools = pools
        self.layers = tuple(i for i, _ in pairs)
        self.unit = loss.unit
        self.couples_samples = loss.couples_samples

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        return needs_of_pairs(self.pairs, layers, "hidden_states")

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        active = [self.pairs[k] for k in active_pairs(self.pairs, at)]
        return self.loss(
            *(
                pooled([side.hidden_states[i] for i in layers], side.attention_mask, pool)
                for side, layers, pool in zip(
                    (student, teacher), zip(*active, strict=True), self.pools, strict=True
                )
            )
        )


def rkd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    distance_weight: float = 100.0,
    angle_weight: float = 200.0,
    layer_map: Any = "final",
    pool: str = "auto",
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
) -> Recipe:
    """Distances and angles among the samples of a batch + soft labels; any two widths.

    Args:
        distance_weight, angle_weight: FSD, whose baseline this is, searches 100, 1000, 10000 and
            200, 2000, 20000; the defaults are the least of them, in the paper's ratio 1 : 2.
        layer_map: "final" (the last layer of both: the state that the head reads, the nearest to
            the paper's embedding; FSD does not say which it takes), or as in
            kdfast.recipes.layer_map, summed over pairs.
        pool: "cls", "mean" over valid tokens, or "auto", what the model's own head reads (the mean
            for token classifiers, whose heads read all tokens).
        temperature: of the soft labels.

    Angles are B³ numbers, see kdfast.losses.RKDLoss; angle_weight=0 leaves them out.
    """
    if layer_map == "final":
        layer_map = [[student.layers, teacher.layers]]
    pairs = resolve_layer_map(layer_map, student, teacher)
    of_student, of_teacher = (
        "mean" if pool == "auto" and shape.token_logits else pool_of(shape, pool)
        for shape in (student, teacher)
    )
    pools = of_student, of_teacher
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    terms["rkd_distance"] = RelationalTerm(
        distance_weight, RKDLoss(1.0, 0.0), pairs, pools, "distances"
    )
    terms["rkd_angle"] = RelationalTerm(angle_weight, RKDLoss(0.0, 1.0), pairs, pools, "angles")
    return Recipe("rkd", terms, pairs)
