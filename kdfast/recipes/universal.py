"""Universal-KD (Wu et al., EMNLP 2021): distillation in output space through pseudo classifiers.

Each intermediate layer of both models gets a linear classifier on its pooled state. Every student
layer attends over all teacher layers' outputs (dot products of pseudo logits) and learns their
mixture by KL. Outputs have one shape whatever the architecture, so the student may be anything that
has layers: a shallow transformer, a BiLSTM, a CNN.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.errors import InputError
from kdfast.losses import LayerProjectionLoss
from kdfast.losses.layers import choose
from kdfast.ops.layer_projection import layer_projection
from kdfast.recipes.recipe import Fitted, Recipe, Term
from kdfast.recipes.schedule import Moment, Stage
from kdfast.recipes.terms import (
    LabelTerm,
    check_relevance,
    label_loss,
    logits_of,
    output_terms,
    pool_of,
    pooled,
)

TRAINING = ("fitted", "joint", "free")


class PseudoClassifiers(nn.Module):
    """One linear classifier per intermediate layer (1 to L − 1; the last has the real head)."""

    def __init__(self, shape: ModelShape, classes: int, pool: str) -> None:
        super().__init__()
        # A one-layer model has no intermediate layer; its only one takes part.
        self.layers = range(1, max(2, shape.layers))
        self.pool = pool
        self.classes = classes
        self.classifiers = nn.ModuleList(nn.Linear(shape.width, classes) for _ in self.layers)

    def needs(self) -> Needs:
        return Needs(hidden_states=self.layers)

    def states(self, captured: Captured) -> list[torch.Tensor]:
        """L − 1 tensors [B, D]."""
        return pooled(
            [captured.hidden_states[i] for i in self.layers], captured.attention_mask, self.pool
        )

    def forward(self, captured: Captured) -> list[torch.Tensor]:
        """L − 1 tensors [B, C] of pseudo logits."""
        # Fitted weights and biases cancel digits, which half precision has not: no autocast.
        states = self.states(captured)
        with torch.autocast(states[0].device.type, enabled=False):
            return [
                classify(h.float()) for classify, h in zip(self.classifiers, states, strict=True)
            ]


class FittedClassifiers(PseudoClassifiers, Fitted):
    """Pseudo classifiers of the frozen teacher, each the logistic (ridge) regression of the labels.

    student: whose labels they are; its one value of a relevance is a logistic regression too.

    The problem is convex, so it is solved rather than trained: on standardised pooled states of
    `rows` training sentences, with the inverse penalty `c` (scikit-learn's C), then frozen.
    """

    what = "the teacher's pseudo classifiers"
    needs_labels = True

    def __init__(
        self, shape: ModelShape, student: ModelShape, pool: str, *, c: float, rows: int
    ) -> None:
        classes = student.classes
        assert classes is not None
        super().__init__(shape, classes, pool)
        if student.regression and classes != 1:
            raise InputError(
                f"pseudo classifiers are fitted to one value or to classes, and the teacher has "
                f"{classes} values: set pseudo_classifiers to joint"
            )
        self.requires_grad_(False)
        self.student = student
        self.c = c
        self.rows = rows
        self._states: list[list[torch.Tensor]]
        self._targets: list[torch.Tensor]
        self.begin()

    def needs_of_teacher(self) -> Needs:
        return self.needs()

    def settings(self) -> dict[str, Any]:
        return {
            "pool": self.pool,
            "classes": self.classes,
            "regression": "binary" if self.student.binary else self.student.regression,
            "c": self.c,
            "rows": self.rows,
        }

    @property
    def has_enough(self) -> bool:  # type: ignore[override]
        return sum(map(len, self._targets)) >= self.rows

    def begin(self) -> None:
        self._states = [[] for _ in self.classifiers]
        self._targets = []

    def see(self, teacher: Captured, labels: torch.Tensor | None) -> None:
        if labels is None:
            raise InputError(
                "pseudo classifiers are fitted to labels and the training data has none ('labels')"
            )
        known = labels != -100
        for kept, h in zip(self._states, self.states(teacher), strict=True):
            kept.append(h[known].float().cpu())
        self._targets.append(labels[known].cpu())

    def end_pass(self) -> None:
        y = torch.cat(self._targets).numpy()
        for module, kept in zip(self.classifiers, self._states, strict=True):
            classify: Any = module
            x = torch.cat(kept).double()
            mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
            weight, bias = self._solve(((x - mean) / scale).numpy(), y)
            classify.weight.copy_(weight / scale)
            classify.bias.copy_(bias - (weight / scale) @ mean)
        self.begin()

    def _solve(self, x: Any, y: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """[C, D] and [C] in float64 for standardised x [n, D] and labels y [n]."""
        import numpy as np
        from sklearn.linear_model import LogisticRegression, Ridge

        if self.student.binary:
            # A relevance of 0.3 is 0.3 of a relevant row and 0.7 of one that is not.
            check_relevance(torch.from_numpy(y))
            share = np.concatenate([y, 1 - y])
            if not 0 < share[: len(y)].mean() < 1:
                level = math.log(1 + len(y)) * (1 if y[0] == 1 else -1)
                return torch.zeros(1, x.shape[1]).double(), torch.tensor([level]).double()
            both = np.repeat([1, 0], len(y))
            one = LogisticRegression(C=self.c, max_iter=1000)
            one.fit(np.concatenate([x, x]), both, sample_weight=share)
            return torch.from_numpy(one.coef_), torch.from_numpy(one.intercept_)
        if self.student.regression:
            ridge = Ridge(alpha=1 / self.c).fit(x, y)
            return torch.from_numpy(ridge.coef_)[None], torch.tensor([float(ridge.intercept_)])
        seen = sorted(set(y.tolist()))
        # A class without a sentence gets the weight of less than one.
        weight = torch.zeros(self.classes, x.shape[1], dtype=torch.float64)
        bias = torch.full((self.classes,), -math.log(1 + len(y)), dtype=torch.float64)
        if len(seen) == 1:
            bias[seen[0]] = 0
            return weight, bias
        model = LogisticRegression(C=self.c, max_iter=1000).fit(x, y)
        coef, intercept = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(seen) == 2:  # one function for two classes: their logits differ by it
            coef, intercept = torch.cat([-coef, coef]) / 2, torch.cat([-intercept, intercept]) / 2
        weight[seen], bias[seen] = coef, intercept
        return weight, bias


class PseudoLabelTerm(Term):
    """The teacher's pseudo classifiers learn the labels beside the student, the teacher nothing."""

    needs_labels = True
    unit = "labels"

    def __init__(self, weight: Any, classifiers: PseudoClassifiers, student: ModelShape) -> None:
        super().__init__(
            weight, f"teacher pseudo classifiers ({len(classifiers.layers)}) with labels"
        )
        # Owned (trained, saved) by PseudoProjectionTerm; a tuple keeps it from a second entry.
        self._classifiers = (classifiers,)
        self.shape = student

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        return Needs(), self._classifiers[0].needs()

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        if labels is None:
            raise ValueError("pseudo classifiers train on labels and the batch has none ('labels')")
        return torch.stack(
            [label_loss(logits, labels, self.shape) for logits in self._classifiers[0](teacher)]
        ).mean()


class PseudoProjectionTerm(Term):
    """KL from the attention-weighted teacher (pseudo) logits to each student layer's.

    student: None for the capacity gap: the student's own logits alone, and all outputs of the
    teacher, its last among them, as its assistants. learns_from_student: see `universal`.
    """

    def __init__(
        self,
        weight: Any,
        loss: LayerProjectionLoss,
        student: PseudoClassifiers | None,
        teacher: PseudoClassifiers,
        *,
        learns_from_student: bool,
    ) -> None:
        last = teacher.layers[-1]
        super().__init__(
            weight,
            f"student logits with the projection of teacher pseudo layers 1 to {last} and logits"
            if student is None
            else f"pseudo logits of student layers 1 to {student.layers[-1]} with projected "
            f"teacher layers 1 to {last}",
        )
        self.loss = loss
        self.student = student
        self.teacher = teacher
        self.learns_from_student = learns_from_student

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        if self.student is None:
            return Needs(logits=True), self.teacher.needs() | Needs(logits=True)
        return self.student.needs(), self.teacher.needs()

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        own, theirs = self._outputs(student, teacher)
        if not self.learns_from_student:
            theirs = [logits.detach() for logits in theirs]
        return self.loss(own, theirs)

    def projection_weights(self, student: Captured, teacher: Captured) -> torch.Tensor:
        """α [B, L_s, L_t]: how much each student layer attends to each teacher layer."""
        _, weights = layer_projection(*self._outputs(student, teacher), scale=self.loss.scale)
        return weights

    def _outputs(
        self, student: Captured, teacher: Captured
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        theirs = self.teacher(teacher)
        if self.student is not None:
            return self.student(student), theirs
        logits = logits_of(student, "student").float(), logits_of(teacher, "teacher").float()
        return [logits[0]], [*theirs, logits[1]]


def universal(
    student: ModelShape,
    teacher: ModelShape,
    *,
    projection_weight: float = 1.0,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
    label_share: float = 0.3,
    capacity_gap: bool = False,
    pseudo_classifiers: str = "fitted",
    pseudo_label_weight: float = 1.0,
    pseudo_c: float = 0.01,
    pseudo_rows: int = 20_000,
    pseudo_temperature: float = 1.0,
    pool: str = "auto",
    attend: str = "states",
) -> Recipe:
    """Pseudo classifiers + layer projection + soft labels, then the labels.

    Two stages, as in the paper: the distillation losses, then ordinary fine-tuning on labels, each
    with a learning-rate schedule of its own. How long each lasts is not known.

    Args:
        label_share: the share of the run that trains on labels alone at the end; 0 leaves it out.
            0.3 is our choice: most of the run for what the method is about.
        capacity_gap: for a student much smaller than its teacher. The teacher's pseudo classifiers
            stand in for teacher assistants: the student's own logits attend over all outputs of the
            teacher, pseudo and real, and the student gets no pseudo classifiers.
        pseudo_classifiers: how the teacher's are trained, which the paper's text is not known to
            say. "fitted" (the default): on the labels, before the student, then frozen; what DIH
            (Asadian & Salehi-Abari 2021) documents for heads on intermediate teacher layers.
            "joint": on the labels beside the student. "free": from the projection alone, as in the
            known re-implementation (whose classifiers have no bias and, by default, as many outputs
            as the student has features); both sides may then meet anywhere. The student's learn
            from the projection in every case.
        pseudo_label_weight: of the labels in "joint".
        pseudo_c, pseudo_rows: inverse penalty and number of sentences in "fitted".
        pseudo_temperature: of the projection's KL.
        pool: the state that pseudo classifiers read: "cls", "mean" over valid tokens, the "last"
            token's, or "auto", what the model's own head reads.
        attend: "states" mixes the teacher's logits (the better one in the paper's ablation),
            "losses" mixes per-layer losses.
        temperature: of the soft labels; the paper's is not known, 2 is a usual value.
    """
    if student.classes is None or student.classes != teacher.classes or student.token_logits:
        kind = " a token" if student.token_logits else ""
        raise InputError(
            "recipe 'universal' compares the class logits of sequences and needs equal numbers of "
            f"classes, were {student.classes}{kind} in the student and {teacher.classes} in the "
            "teacher"
        )
    if not 0 <= label_share < 1:
        raise ValueError(f"label_share must be at least 0 and below 1, was {label_share}")
    choose("pseudo_classifiers", pseudo_classifiers, TRAINING)
    if pseudo_c <= 0 or pseudo_rows < 1:
        raise ValueError(
            f"pseudo_c and pseudo_rows must be above 0, were {pseudo_c} and {pseudo_rows}"
        )
    pools = [pool_of(student, pool, "student"), pool_of(teacher, pool, "teacher")]
    of_student = None if capacity_gap else PseudoClassifiers(student, student.classes, pools[0])
    if pseudo_classifiers == "fitted":
        of_teacher: PseudoClassifiers = FittedClassifiers(
            teacher, student, pools[1], c=pseudo_c, rows=pseudo_rows
        )
    else:
        of_teacher = PseudoClassifiers(teacher, student.classes, pools[1])
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    terms["projection"] = PseudoProjectionTerm(
        projection_weight,
        # One logit has a constant softmax: regression compares values.
        LayerProjectionLoss(
            objective="mse" if student.regression else "kl",
            attend=attend,
            temperature=pseudo_temperature,
        ),
        of_student,
        of_teacher,
        learns_from_student=pseudo_classifiers == "free",
    )
    if pseudo_classifiers == "joint" and terms["projection"].weight.maximum > 0:
        terms["pseudo_labels"] = PseudoLabelTerm(pseudo_label_weight, of_teacher, student)
        if not terms["pseudo_labels"].weight.maximum > 0:
            raise InputError(
                "pseudo_label_weight must be positive with pseudo_classifiers='joint': untrained "
                "pseudo classifiers would teach noise"
            )
    stages = []
    if label_share > 0:
        stages = [
            Stage("distillation", tuple(terms)),
            Stage("labels", ("classification",), share=label_share, restart=True),
        ]
        terms["classification"] = LabelTerm(1.0, student)
    return Recipe("universal", terms, stages=stages)
