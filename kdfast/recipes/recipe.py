"""A recipe: weighted losses on a layer map, and what they read of teacher and student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.captured import Captured, LayerAttention, ModelShape, Needs
from kdfast.errors import InputError
from kdfast.losses import AttentionKLLoss, SoftLabelLoss
from kdfast.recipes.layer_map import LayerMap


class Term(nn.Module):
    """One weighted loss of a recipe, with the learned parts that its loss owns.

    needs: what it reads of both models. needs_teacher: False for losses on labels alone.
    token_aligned: compares token i of one model with token i of the other, so both must see the
    same token ids. describe: what the table at the start shows of it.
    """

    needs = Needs()
    needs_teacher = True
    token_aligned = False

    def __init__(self, weight: float, describe: str) -> None:
        super().__init__()
        self.weight = weight
        self.describe = describe

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None
    ) -> torch.Tensor:
        """The unweighted loss, a scalar."""
        raise NotImplementedError


class Recipe(nn.Module):
    """Named terms; `forward` gives each term's unweighted loss, `total` their weighted sum.

    Terms of weight 0 are left out, so that nothing is captured or computed for them. Parameters of
    the recipe (projections, pseudo classifiers) are trained with the student and saved apart.
    """

    def __init__(self, name: str, terms: dict[str, Term], layers: LayerMap = ()) -> None:
        super().__init__()
        for term_name, term in terms.items():
            if term.weight < 0:
                raise InputError(
                    f"the weight of {term_name} in recipe '{name}' must not be negative, was "
                    f"{term.weight}"
                )
        kept = {key: term for key, term in terms.items() if term.weight > 0}
        if not kept:
            raise InputError(f"every weight of recipe '{name}' is 0: nothing would be trained")
        self.name = name
        self.terms = nn.ModuleDict(kept)
        self.layers = layers
        self.needs = Needs()
        for term in kept.values():
            self.needs = self.needs | term.needs
        self.needs_teacher = any(term.needs_teacher for term in kept.values())
        self.token_aligned = [key for key, term in kept.items() if term.token_aligned]

    def forward(
        self, student: Captured, teacher: Captured | None, labels: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        if teacher is None:
            if self.needs_teacher:
                raise ValueError(f"recipe '{self.name}' needs a teacher, got None")
            teacher = Captured(logits=None)
        return {name: term(student, teacher, labels) for name, term in self.terms.items()}

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack(
            [self.terms[name].weight * loss.float() for name, loss in losses.items()]  # type: ignore[operator]
        ).sum()

    def table(self) -> str:
        """The recipe as aligned text: term, weight, and what it compares."""
        rows = [("term", "weight", "compares")]
        rows += [
            (name, f"{term.weight:g}", str(term.describe)) for name, term in self.terms.items()
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}" for a, b, c in rows]
        return f"recipe {self.name}\n" + "\n".join(f"  {line}" for line in lines)


def describe_pairs(pairs: LayerMap) -> str:
    return "student ← teacher layers " + ", ".join(f"{i} ← {j}" for i, j in pairs)


class LabelTerm(Term):
    """Cross-entropy on the labels; mean squared error for regression."""

    needs_teacher = False

    def __init__(self, weight: float, *, regression: bool) -> None:
        super().__init__(weight, "student logits with labels")
        self.regression = regression

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None
    ) -> torch.Tensor:
        if labels is None:
            raise ValueError("this recipe trains on labels and the batch has none ('labels')")
        logits = logits_of(student, "student").float()
        if self.regression:
            return F.mse_loss(logits, labels.float().view_as(logits))
        return F.cross_entropy(logits, labels)


class SoftLabelTerm(Term):
    def __init__(self, weight: float, *, temperature: float, regression: bool) -> None:
        what = "squared error" if regression else f"KL at temperature {temperature:g}"
        super().__init__(weight, f"student logits with teacher logits, {what}")
        self.loss = SoftLabelLoss(temperature, regression=regression)

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None
    ) -> torch.Tensor:
        return self.loss(logits_of(student, "student"), logits_of(teacher, "teacher"))


class HiddenTerm(Term):
    """A loss module on hidden states, over the mapped layer pairs at once."""

    needs = Needs(hidden_states=True)

    def __init__(
        self, weight: float, loss: nn.Module, pairs: LayerMap, what: str, *, token_aligned: bool
    ) -> None:
        super().__init__(weight, f"{what}, {describe_pairs(pairs)}")
        self.loss = loss
        self.pairs = pairs
        self.token_aligned = token_aligned

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None
    ) -> torch.Tensor:
        return self.loss(
            [student.hidden_states[i] for i, _ in self.pairs],
            [teacher.hidden_states[j] for _, j in self.pairs],
            student.attention_mask,
        )


class AttentionTerm(Term):
    """Attention-map KL of the mapped layer pairs, launched together where their masks agree."""

    needs = Needs(attention=True)
    token_aligned = True

    def __init__(self, weight: float, loss: AttentionKLLoss, pairs: LayerMap) -> None:
        super().__init__(weight, f"attention maps by KL, {describe_pairs(pairs)}")
        self.loss = loss
        self.pairs = pairs

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None
    ) -> torch.Tensor:
        # Layers with equal masks and scales share one launch: all of them in BERT, the local and
        # the global ones apart in ModernBERT.
        groups: dict[tuple, list[tuple[LayerAttention, LayerAttention]]] = {}
        for i, j in self.pairs:
            s, t = student.attention[i - 1], teacher.attention[j - 1]
            if (s.causal, s.window) != (t.causal, t.window):
                raise InputError(
                    f"student layer {i} (causal {s.causal}, window {s.window}) and teacher layer "
                    f"{j} (causal {t.causal}, window {t.window}) attend to different tokens: map "
                    "layers whose masks agree"
                )
            groups.setdefault((s.causal, s.window, s.scale, t.scale), []).append((s, t))
        losses = [
            self.loss(
                [s.query for s, _ in group],
                [s.key for s, _ in group],
                [t.query for _, t in group],
                [t.key for _, t in group],
                student.attention_mask,
                causal=causal,
                window=window,
                scale_s=None if self.loss.relation_heads else scale_s,
                scale_t=None if self.loss.relation_heads else scale_t,
            )
            * (len(group) if self.loss.layers == "mean" else 1)
            for (causal, window, scale_s, scale_t), group in groups.items()
        ]
        total = torch.stack(losses).sum()
        return total / len(self.pairs) if self.loss.layers == "mean" else total


def logits_of(captured: Captured, role: str) -> torch.Tensor:
    if captured.logits is None:
        raise InputError(f"the {role} has no classification head, and this recipe needs its logits")
    if captured.logits.dim() != 2:
        raise InputError(
            f"the {role}'s logits must be [batch, classes], one row a sequence, were "
            f"{list(captured.logits.shape)}"
        )
    return captured.logits


def output_terms(
    student: ModelShape,
    teacher: ModelShape,
    *,
    label_weight: float,
    soft_label_weight: float,
    temperature: float,
) -> dict[str, Term]:
    """The terms on logits that every recipe offers; checks that both heads speak of the same."""
    if soft_label_weight > 0 and student.classes != teacher.classes:
        raise InputError(
            f"soft labels need as many student classes as teacher classes, were {student.classes} "
            f"and {teacher.classes}"
        )
    return {
        "labels": LabelTerm(label_weight, regression=student.regression),
        "soft_labels": SoftLabelTerm(
            soft_label_weight, temperature=temperature, regression=student.regression
        ),
    }


def pooled(
    hidden: Sequence[torch.Tensor], mask: torch.Tensor | None, pool: str
) -> list[torch.Tensor]:
    """[B, D] of each [B, N, D]: its [CLS] state, or the mean over valid tokens."""
    if pool == "cls":
        return [h[:, 0] for h in hidden]
    if mask is None:
        return [h.mean(1) for h in hidden]
    weights = mask.to(hidden[0].dtype)[..., None]
    return [(h * weights).sum(1) / weights.sum(1).clamp(min=1) for h in hidden]
