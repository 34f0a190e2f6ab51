"""Knowledge Distillation from Internal Representations (Aguilar et al., AAAI 2020).

On every mapped layer pair: KL between attention maps and 1 − cos of the [CLS] states; soft labels
on the outputs. All layers at once, or from the bottom to the top, one layer at a time (PID) or
keeping the lower ones (SID), the outputs last.
"""

from typing import Any

from kdfast.captured import ModelShape
from kdfast.losses import AttentionKLLoss, CosineLoss
from kdfast.losses.layers import choose
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.schedule import Stage, Threshold
from kdfast.recipes.terms import (
    AttentionTerm,
    HiddenTerm,
    check_cls,
    check_heads,
    output_terms,
)

SCHEDULES = ("simultaneous", "progressive", "stacked")


def internal(
    student: ModelShape,
    teacher: ModelShape,
    *,
    schedule: str = "simultaneous",
    layer_map: Any = "uniform",
    attention_weight: float = 1.0,
    cosine_weight: float = 1.0,
    cosine_rows: str = "cls",
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
    relation_heads: int | None = None,
    match_heads: str | None = None,
    cosine_threshold: float | None = None,
    check_every: int = 20,
    layer_steps: int | None = None,
    layer_epochs: float | None = None,
    soft_labels_throughout: bool = False,
    layers: str = "sum",
    padding: str = "masked",
) -> Recipe:
    """Attention-map KL + [CLS] (or token) cosine on mapped layers + soft labels.

    The paper leaves open how its losses' heads are reduced and what their weights are; here: mean
    over heads, weights 1 and 1 (what its re-implementation does). Nor does it say on which side of
    attention dropout a map is taken; here before it, as the re-implementation does: both models'
    maps are those of their queries and keys, and none is blurred by what was drawn in one step.

    Args:
        schedule: "simultaneous", all layers and the outputs at once; "progressive" (PID), one layer
            pair at a time from the bottom, then the outputs alone; "stacked" (SID), the same while
            the pairs below stay in training. In the last stage of both, only the outputs train.
        layer_map: strategy or list of pairs, see kdfast.recipes.layer_map.
        cosine_rows: "cls" (the paper) or "tokens". Widths that differ meet in a learned projection.
        temperature: of the soft labels only; attention maps are compared as they are. The paper's
            is not known, the re-implementation's is 1; 2 is a usual value for few classes.
        relation_heads, match_heads: needed where head counts differ, see kdfast.attention_kl.
        cosine_threshold: a layer's stage is over when the cosine loss, summed over its active
            pairs, is below this; looked at every `check_every` steps. The paper's threshold is not
            known; None (the default) leaves the end to the steps.
        layer_steps, layer_epochs: how long a layer's stage lasts at most. Without either every
            stage, the outputs' among them, gets the same share of the run (as in the paper's
            re-implementation); the outputs' stage also gets what the threshold saves.
        soft_labels_throughout: the outputs train in the layers' stages too. The paper trains them
            last.
        layers: "sum" (the re-implementation's) or "mean" over layer pairs.
        padding: "masked" (default: a padded token's row says nothing) or "counted", the
            re-implementation's, whose attention rows of padded tokens count in the mean.
    """
    choose("schedule", schedule, SCHEDULES)
    pairs = tuple(sorted(resolve_layer_map(layer_map, student, teacher)))
    if schedule == "simultaneous":
        for option, value in {
            "cosine_threshold": cosine_threshold,
            "layer_steps": layer_steps,
            "layer_epochs": layer_epochs,
        }.items():
            if value is not None:
                raise ValueError(
                    f"{option} ends the stages of schedule 'progressive' or 'stacked'; schedule "
                    "'simultaneous' has none"
                )
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    outputs = tuple(terms)
    terms["attention_kl"] = AttentionTerm(
        attention_weight,
        AttentionKLLoss(
            relation_heads=relation_heads, match_heads=match_heads, layers=layers, padding=padding
        ),
        pairs,
    )
    terms["cosine"] = HiddenTerm(
        cosine_weight,
        CosineLoss(
            cosine_rows,
            student_width=student.width,
            teacher_width=teacher.width,
            pairs=len(pairs),
            layers=layers,
        ),
        pairs,
        "[CLS] state by cosine" if cosine_rows == "cls" else "token states by cosine",
        token_aligned=cosine_rows == "tokens",
    )
    if cosine_rows == "cls" and terms["cosine"].weight.maximum > 0:
        check_cls(
            student=student, teacher=teacher, instead="set cosine_rows=tokens, or cosine_weight=0"
        )
    if terms["attention_kl"].weight.maximum > 0:
        check_heads(student, teacher, relation_heads=relation_heads, match_heads=match_heads)
    stages = []
    if schedule != "simultaneous":
        if not any(terms[name].weight.maximum > 0 for name in outputs):
            raise ValueError(
                f"schedule '{schedule}' trains the outputs last: give soft_label_weight or "
                "label_weight a value above 0, or, of models without a head, take recipe 'custom' "
                "and list the layers' stages"
            )
        until = None
        if cosine_threshold is not None:
            until = Threshold("cosine", cosine_threshold, check_every)
        trained = sorted({i for i, _ in pairs})
        stages = [
            Stage(
                f"layer {layer}",
                (*(outputs if soft_labels_throughout else ()), "attention_kl", "cosine"),
                layers=(layer,) if schedule == "progressive" else tuple(trained[: k + 1]),
                steps=layer_steps,
                epochs=layer_epochs,
                until=until,
            )
            for k, layer in enumerate(trained)
        ]
        stages.append(Stage("outputs", outputs))
    return Recipe("internal", terms, pairs, stages=stages)
