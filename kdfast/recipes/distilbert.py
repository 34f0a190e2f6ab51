"""DistilBERT (Sanh et al. 2019): soft labels, the language model's own loss, last states by cosine.

L = 5·τ²·KL + 2·MLM + 1·cos, the triple loss of pre-training, carried over to fine-tuning.
"""

from kdfast.captured import ModelShape
from kdfast.losses import CosineLoss
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.terms import HiddenTerm, output_terms


def distilbert(
    student: ModelShape,
    teacher: ModelShape,
    *,
    cosine_weight: float = 1.0,
    soft_label_weight: float = 5.0,
    label_weight: float = 2.0,
    temperature: float = 2.0,
) -> Recipe:
    """Soft labels + labels + 1 − cos of the last hidden states of all valid tokens.

    DistilBERT is trained on masked words. A fine-tuned student has none: the task's labels stand in
    the place of the masked words' loss and its logits in that of the vocabulary's. Weights (5, 2,
    1) and temperature are the known ones of its pre-training, where τ²·KL is a mean over words.
    Widths that differ, which the paper does not have, meet in a learned projection.
    """
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    pairs = ((student.layers, teacher.layers),)
    terms["cosine"] = HiddenTerm(
        cosine_weight,
        CosineLoss("tokens", student_width=student.width, teacher_width=teacher.width),
        pairs,
        "last token states by cosine",
        token_aligned=True,
    )
    return Recipe("distilbert", terms, pairs)
