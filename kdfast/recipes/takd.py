"""Knowledge distillation via teacher assistants (Mirzadeh et al., AAAI 2020).

Soft labels, handed down a chain: the teacher teaches the largest assistant, each assistant the next
smaller one, and the last one the student.
"""

from collections.abc import Sequence
from typing import Any

from kdfast.captured import ModelShape
from kdfast.errors import InputError
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.terms import output_terms


def takd(
    student: ModelShape,
    teacher: ModelShape,
    *,
    assistants: Sequence[int] | None = None,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
) -> Recipe:
    """Soft labels from the last of a chain of teacher assistants.

    Args:
        assistants: their numbers of layers, falling, each below the teacher's and above the
            student's. `kdfast distill` and `kdfast compare` train them, each by these same losses;
            kept as `recipe.assistants`. The teacher that the recipe is built for may be the last
            of them, as it is when the student's turn has come. None: there are none, so the
            teacher teaches the student itself; that is recipe soft_labels.
        soft_label_weight, label_weight, temperature: of every link of the chain.
    """
    chain = _chain([] if assistants is None else assistants, student.layers, teacher.layers)
    recipe: Any = Recipe(
        "takd",
        output_terms(student, teacher, label_weight, soft_label_weight, temperature),
        notes=[
            f"assistants of {', '.join(map(str, chain))} layers"
            if chain
            else "without assistants this is recipe soft_labels"
        ],
    )
    recipe.assistants = chain
    return recipe


def _chain(assistants: Any, student: int, teacher: int) -> tuple[int, ...]:
    """The assistants' layers; InputError unless they lead from the teacher's to the student's."""
    listed = isinstance(assistants, Sequence) and not isinstance(assistants, str)
    chain = tuple(assistants) if listed else (assistants,)
    if (
        not listed
        or not all(type(layers) is int for layers in chain)
        or list(chain) != sorted({*chain, student}, reverse=True)[:-1]
        or (chain and chain[0] >= teacher and chain[-1] != teacher)
    ):
        raise InputError(
            "assistants must be numbers of layers that fall from below the teacher's "
            f"{teacher} to above the student's {student}, as in [9, 6] between 12 and 3, was "
            f"{assistants!r}"
        )
    return chain
