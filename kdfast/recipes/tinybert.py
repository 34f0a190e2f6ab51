"""TinyBERT (Jiao et al., Findings of EMNLP 2020): first the layers, then the outputs.

On every mapped layer pair the squared error of attention scores (before the softmax) and of hidden
states, of the embeddings too; after that the soft cross-entropy of the outputs alone.
"""

from dataclasses import replace
from typing import Any

import torch

from kdfast.captured import Captured, ModelShape
from kdfast.losses import AttentionScoreLoss, HiddenMSELoss, SoftLabelLoss
from kdfast.losses.layers import PADDINGS, choose
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.schedule import Moment, Stage
from kdfast.recipes.terms import AttentionTerm, HiddenTerm, check_heads, output_terms

SCHEDULES = ("two_stage", "simultaneous")


class CountedHiddenTerm(HiddenTerm):
    """Token states, padded positions among them."""

    padding = "counted"

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        return super().forward(replace(student, attention_mask=None), teacher, labels, at)


def tinybert(
    student: ModelShape,
    teacher: ModelShape,
    *,
    schedule: str = "two_stage",
    prediction_share: float = 3 / 13,
    layer_map: Any = "uniform",
    attention_weight: float = 1.0,
    hidden_weight: float = 1.0,
    padding: str = "masked",
    match_heads: str | None = None,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 1.0,
) -> Recipe:
    """Attention scores + hidden states on mapped layers and the embeddings, then soft labels.

    Both layer losses are means over all their elements, summed over layers, weights 1 and 1, as in
    the official code. Widths that differ meet in learned bias-free projections, one a layer; the
    official code has one with bias for all layers.

    Args:
        schedule: "two_stage" (the paper): layers, then outputs, which begin with a learning-rate
            schedule of their own; "simultaneous": all at once.
        prediction_share: the share of the run that the outputs' stage gets; by default the 3 epochs
            after 10 of the official instructions.
        layer_map: "uniform" is the paper's (12 → 4: 3, 6, 9, 12); the embeddings are always paired.
        padding: "masked" (the default: padding says nothing of a sentence), or "counted", the
            official code's: padded queries and states take part, so that the loss depends on how
            far a batch is padded.
        match_heads: where head counts differ, "mean" compares every student head with the average
            of the teacher's scores.
        soft_label_weight: of the cross-entropy −Σ p_t log p_s, mean over classes too and without
            τ², as in the official code; the squared error of the logits for regression.
        label_weight: of the labels in the last stage; the official code has them for regression
            only, in place of the teacher's values (label_weight=1, soft_label_weight=0).
        temperature: of the soft labels, 1 in the official instructions.
    """
    choose("schedule", schedule, SCHEDULES)
    choose("padding", padding, PADDINGS)
    if not 0 < prediction_share < 1:
        raise ValueError(f"prediction_share must be between 0 and 1, was {prediction_share}")
    pairs = resolve_layer_map(layer_map, student, teacher)
    states = ((0, 0), *pairs)
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    outputs = tuple(terms)
    if not student.regression:
        terms["soft_labels"].loss = SoftLabelLoss(
            temperature, divergence="cross_entropy", normalize="elements", rescale=False
        )
        terms[
            "soft_labels"
        ].describe = (
            f"student logits with teacher logits, cross-entropy at temperature {temperature:g}"
        )
    terms["attention_scores"] = AttentionTerm(
        attention_weight,
        AttentionScoreLoss(match_heads=match_heads, padding=padding),
        pairs,
        "attention scores by squared error",
    )
    hidden = HiddenTerm if padding == "masked" else CountedHiddenTerm
    terms["hidden_mse"] = hidden(
        hidden_weight,
        HiddenMSELoss(student_width=student.width, teacher_width=teacher.width, pairs=len(states)),
        states,
        "embeddings and token states by squared error",
        token_aligned=True,
    )
    if padding == "counted":
        terms["hidden_mse"].unit = "samples"
    if terms["attention_scores"].weight.maximum > 0:
        check_heads(student, teacher, match_heads=match_heads, ways=("match_heads",))
    stages = []
    if schedule == "two_stage":
        stages = [
            Stage("layers", ("attention_scores", "hidden_mse")),
            Stage("prediction", outputs, share=prediction_share, restart=True),
        ]
    return Recipe("tinybert", terms, pairs, stages=stages)
