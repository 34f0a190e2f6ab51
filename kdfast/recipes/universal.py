"""Universal-KD (Wu et al., EMNLP 2021): distillation in output space through pseudo classifiers.

Each intermediate layer of both models gets a linear classifier on its pooled state. Every student
layer attends over all teacher layers' outputs (dot products of pseudo logits) and learns their
mixture by KL.
"""

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.errors import InputError
from kdfast.losses import LayerProjectionLoss
from kdfast.losses.layers import choose
from kdfast.ops.layer_projection import layer_projection
from kdfast.recipes.recipe import Recipe, Term, output_terms, pooled


class PseudoClassifiers(nn.Module):
    """One linear classifier per intermediate layer (1 to L − 1; the last has the real head)."""

    def __init__(self, shape: ModelShape, classes: int, pool: str) -> None:
        super().__init__()
        # A one-layer student has no intermediate layer; its only one takes part.
        self.layers = range(1, max(2, shape.layers))
        self.pool = pool
        self.classifiers = nn.ModuleList(nn.Linear(shape.width, classes) for _ in self.layers)

    def forward(self, captured: Captured) -> list[torch.Tensor]:
        """L − 1 tensors [B, C] of pseudo logits."""
        states = pooled(
            [captured.hidden_states[i] for i in self.layers], captured.attention_mask, self.pool
        )
        # The classifiers are fp32 parameters of the recipe; states may come in half precision.
        return [
            classify(h.to(next(classify.parameters()).dtype))
            for classify, h in zip(self.classifiers, states, strict=True)
        ]


class PseudoLabelTerm(Term):
    """The teacher's pseudo classifiers learn the labels; the teacher itself stays frozen."""

    needs = Needs(hidden_states=True)

    def __init__(self, weight: float, classifiers: PseudoClassifiers, *, regression: bool) -> None:
        super().__init__(
            weight, f"teacher pseudo classifiers ({len(classifiers.layers)}) with labels"
        )
        self.classifiers = classifiers
        self.regression = regression

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None
    ) -> torch.Tensor:
        if labels is None:
            raise ValueError("pseudo classifiers train on labels and the batch has none ('labels')")
        losses = [
            F.mse_loss(logits, labels.float().view_as(logits))
            if self.regression
            else F.cross_entropy(logits, labels)
            for logits in self.classifiers(teacher)
        ]
        return torch.stack(losses).mean()


class PseudoProjectionTerm(Term):
    """KL from the attention-weighted teacher pseudo logits to each student layer's."""

    needs = Needs(hidden_states=True)

    def __init__(
        self,
        weight: float,
        loss: LayerProjectionLoss,
        student: PseudoClassifiers,
        teacher: PseudoClassifiers,
    ) -> None:
        super().__init__(
            weight,
            f"pseudo logits of student layers {student.layers[0]} to {student.layers[-1]} with "
            f"projected teacher layers {teacher.layers[0]} to {teacher.layers[-1]}",
        )
        self.loss = loss
        self.student = student
        # Owned (trained, saved) by PseudoLabelTerm; a tuple keeps it from being registered twice.
        self._teacher = (teacher,)

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None
    ) -> torch.Tensor:
        # Detached: the teacher's classifiers learn the labels, not to meet the student half-way.
        targets = [logits.detach() for logits in self._teacher[0](teacher)]
        return self.loss(self.student(student), targets)

    def projection_weights(self, student: Captured, teacher: Captured) -> torch.Tensor:
        """α [B, L_s, L_t]: how much each student layer attends to each teacher layer."""
        _, weights = layer_projection(
            self.student(student), self._teacher[0](teacher), scale=self.loss.scale
        )
        return weights


def universal(
    student: ModelShape,
    teacher: ModelShape,
    *,
    projection_weight: float = 1.0,
    pseudo_label_weight: float = 1.0,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
    pool: str = "cls",
    attend: str = "states",
) -> Recipe:
    """Pseudo classifiers + layer projection + soft labels, in one stage.

    How the paper trains its pseudo classifiers is not known; here the teacher's learn the labels
    with the teacher frozen (the nearest documented practice, DIH), the student's learn only from
    the projection.

    Args:
        pool: "cls" or "mean" over valid tokens.
        attend: "states" mixes the teacher's logits (the better one in the paper's ablation),
            "losses" mixes per-layer losses.
        temperature: of the soft labels; pseudo logits are compared at temperature 1.
    """
    if student.classes is None or student.classes != teacher.classes:
        raise InputError(
            "recipe 'universal' compares class logits and needs equal numbers of classes, were "
            f"{student.classes} in the student and {teacher.classes} in the teacher"
        )
    if projection_weight > 0 and not pseudo_label_weight > 0:
        raise InputError(
            "pseudo_label_weight must be positive when projection_weight is: untrained pseudo "
            "classifiers would teach noise"
        )
    choose("pool", pool, ("cls", "mean"))
    of_student = PseudoClassifiers(student, student.classes, pool)
    of_teacher = PseudoClassifiers(teacher, teacher.classes, pool)
    terms = output_terms(
        student,
        teacher,
        label_weight=label_weight,
        soft_label_weight=soft_label_weight,
        temperature=temperature,
    )
    terms["projection"] = PseudoProjectionTerm(
        projection_weight,
        # One logit has a constant softmax: regression compares values.
        LayerProjectionLoss(objective="mse" if student.regression else "kl", attend=attend),
        of_student,
        of_teacher,
    )
    terms["pseudo_labels"] = PseudoLabelTerm(
        pseudo_label_weight, of_teacher, regression=student.regression
    )
    return Recipe("universal", terms)
