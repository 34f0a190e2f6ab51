"""ALP-KD (Passban et al., AAAI 2021): attention-based layer projection.

Each student layer attends over all teacher layers and learns their mixture: α_ij =
softmax_j(scale·⟨h_i, g_j⟩), C_i = Σ_j α_ij g_j, loss Σ_i mse(h_i, C_i), on the [CLS] states.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.losses import LayerProjectionLoss
from kdfast.losses.layers import choose
from kdfast.ops.layer_projection import layer_projection
from kdfast.recipes.recipe import Recipe, Term
from kdfast.recipes.schedule import Moment, Weight
from kdfast.recipes.terms import check_cls, output_terms


class LayerProjectionTerm(Term):
    """Every student layer with its mixture of all teacher layers (embeddings are no layer)."""

    def __init__(
        self,
        weight: Any,
        loss: LayerProjectionLoss,
        student: ModelShape,
        teacher: ModelShape,
        rows: str,
    ) -> None:
        what = "[CLS] states" if rows == "cls" else "token states"
        super().__init__(
            weight,
            f"{what} of student layers 1 to {student.layers} with projected teacher layers 1 to "
            f"{teacher.layers}, {loss.objective}",
        )
        self.loss = loss
        self.of_student = range(1, student.layers + 1)
        self.of_teacher = range(1, teacher.layers + 1)
        self.rows = choose("rows", rows, ("cls", "tokens"))
        self.token_aligned = rows == "tokens"
        self.unit = "tokens" if rows == "tokens" else "samples"

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        return Needs(hidden_states=self.of_student), Needs(hidden_states=self.of_teacher)

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        return self.loss(*self._states(student, teacher), self._mask(student))

    def projection_weights(self, student: Captured, teacher: Captured) -> torch.Tensor:
        """α [B, L_s, L_t], the mean over valid tokens where rows are tokens."""
        states_s, states_t = self._states(student, teacher)
        mask = self._mask(student)
        _, weights = layer_projection(
            self.loss.projections(states_s), states_t, mask=mask, scale=self.loss.scale
        )
        if self.rows == "cls":
            return weights
        if mask is None:
            return weights.mean(1)
        return weights.sum(1) / mask.sum(1).clamp(min=1)[:, None, None]

    def _states(
        self, student: Captured, teacher: Captured
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        own = [student.hidden_states[i] for i in self.of_student]
        theirs = [teacher.hidden_states[j] for j in self.of_teacher]
        if self.rows == "cls":
            return [h[:, 0] for h in own], [h[:, 0] for h in theirs]
        return own, theirs

    def _mask(self, student: Captured) -> torch.Tensor | None:
        return student.attention_mask if self.rows == "tokens" else None


def alp(
    student: ModelShape,
    teacher: ModelShape,
    *,
    projection_weight: float = 1.0,
    rows: str = "cls",
    scale: float | str = 1.0,
    objective: str = "mse",
    layers: str = "sum",
    soft_label_weight: float = 0.7,
    label_weight: float = 0.1,
    temperature: float = 2.0,
) -> Recipe:
    """Attention-based layer projection + soft labels + labels.

    The paper weighs three terms (labels, soft labels, projection) with weights that are not known;
    the defaults are its re-implementation's for the first two, whose third, 0.2, is never used
    there: here 1. Widths that differ meet in learned projections, one a student layer.

    Args:
        rows: "cls" (both known implementations) or "tokens".
        scale: of the dot products: 1 (one implementation), "width" for 1/√D (the other), or a
            number. [CLS] states have large norms, so at 1 the softmax chooses nearly one layer.
        objective: "mse" (the paper) or "cosine".
        layers: "sum" or "mean" over student layers; the implementations differ.
        temperature: of the soft labels; the implementations' 1 and 20 differ too, 2 is between.
    """
    if isinstance(scale, str):
        choose("scale", scale, ("width",))
    factor = teacher.width**-0.5 if isinstance(scale, str) else scale
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    if rows == "cls" and Weight(projection_weight).maximum > 0:
        check_cls(student=student, teacher=teacher, instead="set rows=tokens")
    terms["projection"] = LayerProjectionTerm(
        projection_weight,
        LayerProjectionLoss(
            objective=choose("objective", objective, ("mse", "cosine")),
            scale=factor,
            student_width=student.width,
            teacher_width=teacher.width,
            pairs=student.layers,
            layers=layers,
        ),
        student,
        teacher,
        rows,
    )
    return Recipe("alp", terms)
