"""Knowledge Distillation from Internal Representations (Aguilar et al., AAAI 2020).

On every mapped layer pair: KL between attention maps and 1 − cos of the [CLS] states; soft labels
on the outputs. All layers at once.
"""

from typing import Any

from kdfast.captured import ModelShape
from kdfast.errors import InputError
from kdfast.losses import AttentionKLLoss, CosineLoss
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import AttentionTerm, HiddenTerm, Recipe, output_terms


def internal(
    student: ModelShape,
    teacher: ModelShape,
    *,
    layer_map: Any = "uniform",
    attention_weight: float = 1.0,
    cosine_weight: float = 1.0,
    cosine_rows: str = "cls",
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
    relation_heads: int | None = None,
    match_heads: str | None = None,
) -> Recipe:
    """Attention-map KL + [CLS] (or token) cosine on all mapped layers + soft labels.

    The paper leaves open what its losses' heads, layers and relative weights are; here: mean over
    heads and valid rows, sum over layers, weights 1 and 1 (what its re-implementation does).

    Args:
        layer_map: strategy or list of pairs, see kdfast.recipes.layer_map.
        cosine_rows: "cls" (the paper) or "tokens". Widths that differ meet in a learned projection.
        temperature: of the soft labels only; attention maps are compared as they are.
        relation_heads, match_heads: needed where head counts differ, see kdfast.attention_kl.
    """
    pairs = resolve_layer_map(layer_map, student, teacher)
    if (
        attention_weight > 0
        and student.heads != teacher.heads
        and relation_heads is None
        and match_heads is None
    ):
        raise InputError(
            f"the student has {student.heads} attention heads and the teacher {teacher.heads}: set "
            "relation_heads to a number that divides both widths "
            f"({student.width} and {teacher.width}), or match_heads to 'mean'"
        )
    if relation_heads is not None:
        for role, shape in (("student", student), ("teacher", teacher)):
            if (
                type(relation_heads) is not int
                or relation_heads < 1
                or shape.width % relation_heads
            ):
                raise InputError(
                    f"relation_heads must divide the {role}'s width {shape.width}, was "
                    f"{relation_heads!r}"
                )
    terms = output_terms(
        student,
        teacher,
        label_weight=label_weight,
        soft_label_weight=soft_label_weight,
        temperature=temperature,
    )
    terms["attention_kl"] = AttentionTerm(
        attention_weight,
        AttentionKLLoss(relation_heads=relation_heads, match_heads=match_heads),
        pairs,
    )
    terms["cosine"] = HiddenTerm(
        cosine_weight,
        CosineLoss(
            cosine_rows,
            student_width=student.width,
            teacher_width=teacher.width,
            pairs=len(pairs),
        ),
        pairs,
        "[CLS] state by cosine" if cosine_rows == "cls" else "token states by cosine",
        token_aligned=cosine_rows == "tokens",
    )
    return Recipe("internal", terms, pairs)
