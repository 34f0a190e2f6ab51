"""The baselines: labels alone, and the teacher's output distribution alone or beside them."""

from kdfast.captured import ModelShape
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.terms import output_terms


def labels(student: ModelShape, teacher: ModelShape) -> Recipe:
    """Fine-tuning on labels; the teacher is not run."""
    return Recipe(
        "labels",
        output_terms(student, teacher, 1.0, 0.0, 1.0),
    )


def soft_labels(
    student: ModelShape,
    teacher: ModelShape,
    *,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
) -> Recipe:
    """τ²·KL between the output distributions (Hinton et al. 2015), optionally with the labels."""
    return Recipe(
        "soft_labels",
        output_terms(student, teacher, label_weight, soft_label_weight, temperature),
    )
