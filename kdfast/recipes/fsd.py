"""Feature Structure Distillation with Centered Kernel Alignment (Jung et al. 2023).

L_I: alignment of the tokens within each sample (Eq. 6); L_L: of the samples within the batch
(Eq. 7); beside soft labels.
"""

from typing import Any

from kdfast.captured import ModelShape
from kdfast.losses import CKALoss
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import HiddenTerm, Recipe, output_terms


def fsd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    layer_map: Any = "penultimate",
    intra_weight: float = 1.0,
    local_weight: float = 1.0,
    estimator: str = "biased",
    form: str = "neg_log",
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
) -> Recipe:
    """Intra-feature and local inter-feature structure by CKA + soft labels.

    Args:
        layer_map: "penultimate" (the paper: student layer S − 1 from teacher layer T − 1; the only
            layer of a one-layer student), or as in kdfast.recipes.layer_map (its layer-wise mode;
            mean over pairs).
        estimator, form: see kdfast.losses.CKALoss; the paper's are "biased" and "neg_log".
    """
    if layer_map == "penultimate":
        layer_map = [[max(1, student.layers - 1), max(1, teacher.layers - 1)]]
    pairs = resolve_layer_map(layer_map, student, teacher)
    terms = output_terms(
        student,
        teacher,
        label_weight=label_weight,
        soft_label_weight=soft_label_weight,
        temperature=temperature,
    )
    terms["intra"] = HiddenTerm(
        intra_weight,
        CKALoss("tokens", estimator=estimator, form=form),
        pairs,
        f"tokens of each sample by {estimator} CKA",
        token_aligned=True,
    )
    # Token states side by side make the sample's row, so both must be cut into the same tokens
    # for padding to mean the same, though CKA itself would not mind.
    terms["local"] = HiddenTerm(
        local_weight,
        CKALoss("samples", estimator=estimator, form=form),
        pairs,
        f"samples of the batch by {estimator} CKA",
        token_aligned=True,
    )
    return Recipe("fsd", terms, pairs)
