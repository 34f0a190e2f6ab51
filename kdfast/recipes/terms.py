"""The terms that recipes are made of: losses on logits, hidden states and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kdfast.captured import Captured, LayerAttention, ModelShape, Needs
from kdfast.errors import InputError
from kdfast.losses import AttentionKLLoss, AttentionScoreLoss, SoftLabelLoss
from kdfast.losses.layers import choose
from kdfast.recipes.layer_map import LayerMap
from kdfast.recipes.recipe import Term
from kdfast.recipes.schedule import Moment


def describe_pairs(pairs: LayerMap) -> str:
    return "student ← teacher layers " + ", ".join(f"{i} ← {j}" for i, j in pairs)


class LabelTerm(Term):
    """Cross-entropy on the labels (of every labelled token); mean squared error for regression,
    binary cross-entropy for a relevance in [0, 1]."""

    needs_labels = True
    unit = "labels"

    def __init__(self, weight: Any, student: ModelShape) -> None:
        super().__init__(weight, "student logits with labels")
        self.shape = student

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        return Needs(logits=True), Needs()

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        if labels is None:
            raise ValueError("this recipe trains on labels and the batch has none ('labels')")
        return label_loss(logits_of(student, "student"), labels, self.shape)


def label_loss(logits: torch.Tensor, labels: torch.Tensor, shape: ModelShape) -> torch.Tensor:
    """logits [..., C], labels [...]; −100 is no label. Mean over labels.

    shape: of the model whose logits these are. Raises InputError for a relevance beyond [0, 1], if
    the labels are on the CPU.
    """
    logits = logits.float()
    if shape.binary:
        # Of a GPU it would wait; the trainer looks where batches are made.
        if labels.device.type == "cpu":
            check_relevance(labels)
        return F.binary_cross_entropy_with_logits(logits, labels.float().view_as(logits))
    if shape.regression:
        return F.mse_loss(logits, labels.float().view_as(logits))
    # A sum and a count, since the mean over no label at all would be NaN.
    total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")
    return total / (labels != -100).sum().clamp(min=1)


def check_relevance(labels: torch.Tensor) -> None:
    """InputError for labels that binary cross-entropy has no minimum for: its loss would fall
    without end."""
    if not ((labels >= 0) & (labels <= 1)).all():
        raise InputError(
            "a reranker learns relevance from 0 to 1 (binary cross-entropy), and the labels go "
            f"from {float(labels.min()):g} to {float(labels.max()):g}: divide them by the highest "
            "grade, or train squared error (data.kind=regression, or problem_type 'regression' in "
            "the model's configuration)"
        )


class SoftLabelTerm(Term):
    """The teacher's output distribution, of every sequence or of every valid token."""

    def __init__(
        self, weight: Any, *, temperature: float, regression: bool, token_logits: bool = False
    ) -> None:
        what = "squared error" if regression else f"KL at temperature {temperature:g}"
        super().__init__(weight, f"student logits with teacher logits, {what}")
        self.loss = SoftLabelLoss(temperature, regression=regression)
        self.token_aligned = token_logits
        self.unit = "tokens" if token_logits else "samples"

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        logits = logits_of(student, "student"), logits_of(teacher, "teacher")
        return self.loss(*logits, student.attention_mask if self.token_aligned else None)


class HiddenTerm(Term):
    """A loss module on hidden states, over the mapped layer pairs at once.

    loss: called as loss(hidden_s, hidden_t, attention_mask), lists with one entry a pair; one with
    learned projections also takes `which`, the numbers of the pairs that are given.
    zero_padding: give it states that are 0 where padded, in place of the mask. What it would do by
    itself is then done once for all such terms.
    """

    def __init__(
        self,
        weight: Any,
        loss: nn.Module,
        pairs: LayerMap,
        what: str,
        *,
        token_aligned: bool,
        zero_padding: bool = False,
    ) -> None:
        super().__init__(weight, what)
        self.loss = loss
        self.pairs = pairs
        self.layers = tuple(i for i, _ in pairs)
        self.by_layer = getattr(loss, "layers", None) == "sum"
        self.token_aligned = token_aligned
        self.zero_padding = zero_padding
        self.unit = getattr(loss, "unit", "samples")
        self.couples_samples = getattr(loss, "couples_samples", False)

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        return needs_of_pairs(self.pairs, layers, "hidden_states")

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        which = active_pairs(self.pairs, at)
        mask = student.attention_mask
        zeroed = mask if self.zero_padding else None
        return self.loss(
            [student.masked_states(self.pairs[k][0], zeroed) for k in which],
            [teacher.masked_states(self.pairs[k][1], zeroed) for k in which],
            None if self.zero_padding else mask,
            **({"which": which} if hasattr(self.loss, "projections") else {}),
        )


class AttentionTerm(Term):
    """A loss on queries and keys of the mapped layer pairs, launched together where their masks
    agree."""

    token_aligned = True

    def __init__(
        self,
        weight: Any,
        loss: AttentionKLLoss | AttentionScoreLoss,
        pairs: LayerMap,
        what: str = "attention maps by KL",
    ) -> None:
        super().__init__(weight, what)
        self.loss = loss
        self.pairs = pairs
        self.layers = tuple(i for i, _ in pairs)
        self.by_layer = loss.layers == "sum"
        self.unit = loss.unit

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        return needs_of_pairs(self.pairs, layers, "attention")

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        # Layers with equal masks and scales share one launch: all of them in BERT, the local and
        # the global ones apart in ModernBERT.
        which = active_pairs(self.pairs, at)
        regrouped = getattr(self.loss, "relation_heads", None) is not None
        groups: dict[tuple, list[tuple[LayerAttention, LayerAttention]]] = {}
        for s, t in same_masks(student, teacher, [self.pairs[k] for k in which]):
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
                scale_s=None if regrouped else scale_s,
                scale_t=None if regrouped else scale_t,
            )
            * (len(group) if self.loss.layers == "mean" else 1)
            for (causal, window, scale_s, scale_t), group in groups.items()
        ]
        total = torch.stack(losses).sum()
        return total / len(which) if self.loss.layers == "mean" else total


def needs_of_pairs(pairs: LayerMap, layers: Sequence[int] | None, what: str) -> tuple[Needs, Needs]:
    """Of both models, for the pairs whose student layer is trained; what: a field of Needs."""
    active = [
        pairs[k]
        for k in active_pairs(pairs, Moment(layers=None if layers is None else tuple(layers)))
    ]
    own, theirs = ([pair[side] for pair in active] for side in (0, 1))
    return Needs(**{what: own}), Needs(**{what: theirs})  # type: ignore[arg-type]


def active_pairs(pairs: LayerMap, at: Moment) -> list[int]:
    """The numbers of the pairs whose student layer is trained at this moment."""
    return [k for k, (i, _) in enumerate(pairs) if at.layers is None or i in at.layers]


def same_masks(
    student: Captured, teacher: Captured, pairs: Sequence[tuple[int, int]]
) -> list[tuple[LayerAttention, LayerAttention]]:
    """The captured attention of each pair; InputError where they attend to different tokens."""
    found = []
    for i, j in pairs:
        s, t = student.attention[i], teacher.attention[j]
        if (s.causal, s.window) != (t.causal, t.window):
            raise InputError(
                f"student layer {i} (causal {s.causal}, window {s.window}) and teacher layer "
                f"{j} (causal {t.causal}, window {t.window}) attend to different tokens: map "
                "layers whose masks agree"
            )
        found.append((s, t))
    return found


def check_heads(
    student: ModelShape,
    teacher: ModelShape,
    *,
    relation_heads: int | None = None,
    match_heads: str | None = None,
    ways: Sequence[str] = ("relation_heads", "match_heads"),
) -> None:
    """What a loss on attention asks of the two models; InputError with the ways out.

    ways: the options that the recipe has for differing numbers of heads.
    """
    for role, shape in (("student", student), ("teacher", teacher)):
        if shape.heads < 1:
            raise InputError(
                f"the {role} has no attention, and this recipe compares attention: choose losses "
                "on hidden states or logits (e.g. recipe universal or soft_labels)"
            )
        if relation_heads is not None and (
            type(relation_heads) is not int
            or relation_heads < 1
            or shape.query_width % relation_heads
        ):
            what = "width" if shape.query_width == shape.width else "queries' width"
            raise InputError(
                f"relation_heads must divide the {role}'s {what} {shape.query_width}, was "
                f"{relation_heads!r}"
            )
    if student.heads != teacher.heads and relation_heads is None and match_heads is None:
        offers = {
            "relation_heads": "relation_heads to a number that divides both widths "
            f"({student.query_width} and {teacher.query_width})",
            "match_heads": "match_heads to 'mean'",
        }
        raise InputError(
            f"the student has {student.heads} attention heads and the teacher {teacher.heads}: set "
            + ", or ".join(offers[way] for way in ways)
        )


def logits_of(captured: Captured, role: str) -> torch.Tensor:
    if captured.logits is None:
        raise InputError(f"the {role} has no classification head, and this recipe needs its logits")
    if captured.logits.dim() not in (2, 3):
        raise InputError(
            f"the {role}'s logits must be [batch, classes], or [batch, tokens, classes], were "
            f"{list(captured.logits.shape)}"
        )
    return captured.logits


def output_terms(
    student: ModelShape,
    teacher: ModelShape,
    label_weight: Any,
    soft_label_weight: Any,
    temperature: float,
) -> dict[str, Term]:
    """The terms on logits that every recipe offers; checks that both heads speak of the same."""
    terms: dict[str, Term] = {
        "labels": LabelTerm(label_weight, student),
        "soft_labels": SoftLabelTerm(
            soft_label_weight,
            temperature=temperature,
            regression=student.regression,
            token_logits=student.token_logits,
        ),
    }
    if terms["labels"].weight.maximum > 0 and student.classes is None:
        raise InputError(
            "the student has no classification head to train on labels: set label_weight to 0"
        )
    if terms["soft_labels"].weight.maximum > 0:
        for role, shape in (("student", student), ("teacher", teacher)):
            if shape.classes is None:
                raise InputError(
                    f"the {role} has no classification head, so there are no soft labels: set "
                    "soft_label_weight to 0, or choose recipe 'embedding'"
                )
        if (student.classes, student.token_logits) != (teacher.classes, teacher.token_logits):
            kinds = [
                f"{shape.classes}{' a token' if shape.token_logits else ''}"
                for shape in (student, teacher)
            ]
            raise InputError(
                "soft labels need as many student classes as teacher classes, were "
                f"{kinds[0]} and {kinds[1]}"
            )
    return terms


def pooled(
    hidden: Sequence[torch.Tensor], mask: torch.Tensor | None, pool: str
) -> list[torch.Tensor]:
    """[B, D] of each [B, N, D]: the state of [CLS] or of the last valid token, or the mean over
    valid tokens, in fp32."""
    if pool == "cls":
        return [h[:, 0] for h in hidden]
    if mask is None:
        return [h[:, -1] if pool == "last" else h.mean(1, dtype=torch.float32) for h in hidden]
    if pool == "last":
        positions = torch.arange(mask.shape[1], device=mask.device)
        last = (positions * mask.bool()).argmax(1)
        return [h[torch.arange(len(h), device=h.device), last] for h in hidden]
    # Padding goes in the states' own dtype, and sums are taken in fp32 without a copy in it.
    padded, tokens = ~mask.bool()[..., None], mask.bool().sum(1, keepdim=True).clamp(min=1)
    return [h.masked_fill(padded, 0).sum(1, dtype=torch.float32) / tokens for h in hidden]


POOLS = ("auto", "cls", "mean", "last")


def pool_of(shape: ModelShape, pool: str, role: str = "model") -> str:
    """As asked for; "auto" is what the model's own head reads."""
    if choose("pool", pool, POOLS) == "cls":
        check_cls(**{role: shape}, instead="set pool to auto, mean or last")
    return shape.pool if pool == "auto" else pool


def check_cls(*, instead: str, **shapes: ModelShape) -> None:
    """InputError, with what to do instead, for a model whose first state is no [CLS] state."""
    for role, shape in shapes.items():
        if not shape.has_cls:
            raise InputError(
                f"the first state of the {role} stands for one token, not for the sequence (a "
                f"causal model, or one without attention), so it is no [CLS] state: {instead}"
            )
