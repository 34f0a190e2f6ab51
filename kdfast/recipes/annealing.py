"""Annealing Knowledge Distillation (Jafari et al., EACL 2021): a target that grows up.

Stage 1: mean squared error between the student's logits and φ·z_t, φ rising from 1/k to 1 in k
equal steps. Stage 2: the labels alone.
"""

from typing import Any

import torch

from kdfast.captured import Captured, ModelShape
from kdfast.errors import InputError
from kdfast.losses import AnnealingLoss, annealing_factor
from kdfast.recipes.recipe import Recipe, Term
from kdfast.recipes.schedule import Moment, Stage
from kdfast.recipes.terms import LabelTerm, logits_of


class AnnealingTerm(Term):
    """Student logits with the teacher's times φ, of every sequence or of every valid token."""

    replayable = False  # φ rises

    def __init__(self, weight: Any, *, levels: int, token_logits: bool) -> None:
        super().__init__(
            weight, f"student logits with teacher logits times 1/{levels} to 1, squared error"
        )
        self.levels = levels
        self.token_aligned = token_logits
        self.unit = "tokens" if token_logits else "samples"
        self.loss = AnnealingLoss(unit=self.unit)

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        return self.loss(
            logits_of(student, "student"),
            logits_of(teacher, "teacher"),
            annealing_factor(at.stage_progress, self.levels),
            student.attention_mask if self.token_aligned else None,
        )


def annealing(
    student: ModelShape,
    teacher: ModelShape,
    *,
    levels: int = 7,
    label_share: float = 4 / 18,
    annealing_weight: float = 1.0,
    label_weight: float = 1.0,
) -> Recipe:
    """Squared error with the teacher's logits, scaled up in `levels` steps, then the labels.

    The stages never run together, so their weights change little under Adam. Stage 2 goes on from
    the end of stage 1; the authors take its best checkpoint.

    Args:
        levels: k, the paper's largest temperature; φ = 1/k, 2/k, ..., 1 over equal shares of stage
            1. 7 in the authors' GLUE instructions (10 for images).
        label_share: the share of the run that trains on labels alone at the end, with a
            learning-rate schedule of its own; 4 epochs after 14 in those instructions. 0 leaves it
            out.
    """
    if type(levels) is not int or levels < 1:
        raise ValueError(f"levels must be a whole number above 0, was {levels!r}")
    if not 0 <= label_share < 1:
        raise ValueError(f"label_share must be at least 0 and below 1, was {label_share}")
    heads = [(shape.classes, shape.token_logits) for shape in (student, teacher)]
    if student.classes is None or heads[0] != heads[1]:
        kinds = [
            f"{classes or 'no'} a {'token' if token else 'sequence'}" for classes, token in heads
        ]
        raise InputError(
            "recipe 'annealing' compares logits and needs as many student classes as teacher "
            f"classes, were {kinds[0]} and {kinds[1]}"
        )
    terms: dict[str, Term] = {
        "annealing": AnnealingTerm(
            annealing_weight, levels=levels, token_logits=student.token_logits
        )
    }
    stages = [Stage("annealing", ("annealing",))]
    if label_share > 0:
        terms["labels"] = LabelTerm(label_weight, student)
        stages.append(Stage("labels", ("labels",), share=label_share, restart=True))
    return Recipe("annealing", terms, stages=stages)
