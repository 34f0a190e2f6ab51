"""Patient Knowledge Distillation (Sun et al., EMNLP 2019).

L = (1 − α)·labels + α·τ²·KL + β·PT; PT is the squared error between the [CLS] states of mapped
intermediate layers, each divided by its norm.
"""

from typing import Any

from kdfast.captured import ModelShape
from kdfast.errors import InputError
from kdfast.losses import HiddenMSELoss, SoftLabelLoss
from kdfast.losses.layers import choose
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.schedule import Weight
from kdfast.recipes.terms import HiddenTerm, check_cls, output_terms

SOFT_LABEL_MEANS = ("elements", "rows")


def pkd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    layer_map: Any = "skip",
    patience_weight: float = 500.0,
    soft_label_weight: float = 0.7,
    label_weight: float = 0.3,
    temperature: float = 10.0,
    soft_label_mean: str = "elements",
) -> Recipe:
    """Normalised [CLS] states of intermediate layers by squared error + soft labels + labels.

    The weights are α = 0.7 and β = 500 of the official code's predefined run, τ = 10 too. Widths
    that differ meet in learned projections, one a layer; the paper's are equal.

    Args:
        layer_map: "skip" (PKD-Skip; 12 → 6: teacher layers 2, 4, ..., 10), "last" (PKD-Last: 7 to
            11), both without the last student layer, or any other of kdfast.recipes.layer_map.
        patience_weight: β. PT is the mean over samples, layers and features, as in the official
            code, hence small (at most 4 / D) and β large.
        soft_label_mean: "elements", over samples and classes, as in the official code, for which
            α and τ were searched; "rows", over samples, the divergence itself, is larger by the
            number of classes.
    """
    if layer_map == "last" and student.layers < 2:
        raise InputError(
            "layer_map 'last' of recipe 'pkd' leaves the last pair out: needs 2 layers"
        )
    pairs = resolve_layer_map(layer_map, student, teacher)
    if layer_map == "last":
        pairs = pairs[:-1]
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    terms["soft_labels"].loss = SoftLabelLoss(
        temperature,
        regression=student.regression,
        normalize=choose("soft_label_mean", soft_label_mean, SOFT_LABEL_MEANS),
    )
    if Weight(patience_weight).maximum > 0:
        check_cls(student=student, teacher=teacher, instead="choose recipe rkd or universal")
    terms["cls_mse"] = HiddenTerm(
        patience_weight,
        HiddenMSELoss(
            "cls",
            normalize=True,
            student_width=student.width,
            teacher_width=teacher.width,
            pairs=len(pairs),
            layers="mean",
        ),
        pairs,
        "normalised [CLS] states by squared error",
        token_aligned=False,
    )
    return Recipe("pkd", terms, pairs)
