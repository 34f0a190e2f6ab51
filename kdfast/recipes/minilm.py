"""MiniLM (Wang et al., NeurIPS 2020): the self-attention of one layer.

L_AT: KL between the attention maps of the last layers. L_VR: KL between their value relations,
softmax(V Vᵀ / √d) per head. Both compare N × N maps, so widths need not agree.
"""

from collections.abc import Sequence
from typing import Any

import torch

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.errors import InputError
from kdfast.losses import AttentionKLLoss, RelationKLLoss
from kdfast.recipes.layer_map import LayerMap
from kdfast.recipes.recipe import Recipe, Term
from kdfast.recipes.schedule import Moment
from kdfast.recipes.terms import AttentionTerm, check_heads, output_terms


class RelationTerm(Term):
    """KL between the relations of one student layer and one teacher layer."""

    token_aligned = True

    def __init__(self, weight: Any, loss: RelationKLLoss, pair: LayerMap) -> None:
        heads = "" if loss.relation_heads is None else f" of {loss.relation_heads} relation heads"
        super().__init__(weight, f"{', '.join(loss.relations)} relations{heads} by KL")
        self.loss = loss
        self.pairs = pair
        ((self.student_layer, self.teacher_layer),) = pair
        self.layers = (self.student_layer,)
        self.unit = loss.unit

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        own, theirs = (
            Needs(attention=[layer], values=[layer] if "value" in self.loss.relations else [])
            for layer in (self.student_layer, self.teacher_layer)
        )
        return own, theirs

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        s, t = student.attention[self.student_layer], teacher.attention[self.teacher_layer]
        return self.loss(s.query, s.key, s.value, t.query, t.key, t.value, student.attention_mask)


def check_relations(
    student: ModelShape, teacher: ModelShape, relations: Sequence[str], heads: int | None
) -> None:
    """What relations of keys and values ask of models whose query heads share them."""
    if set(relations) <= {"query"}:
        return
    shared = [s.key_value_heads or s.heads for s in (student, teacher)]
    if heads is None and shared[0] != shared[1]:
        raise InputError(
            f"the student has {shared[0]} key-value heads and the teacher {shared[1]}: set "
            "relation_heads to a number that divides the widths of both"
        )
    for role, shape, own in zip(("student", "teacher"), (student, teacher), shared, strict=True):
        if heads is not None and shape.key_width % heads:
            raise InputError(
                "relation_heads must divide the width of the "
                f"{role}'s keys and values, {shape.key_width} "
                f"({own} heads), was {heads}"
            )


def last_pair(student: ModelShape, teacher: ModelShape, teacher_layer: int | None) -> LayerMap:
    """The student's last layer with a layer of the teacher, None: its last."""
    layer = teacher.layers if teacher_layer is None else teacher_layer
    if type(layer) is not int or not 1 <= layer <= teacher.layers:
        raise InputError(
            f"teacher_layer must be one of the teacher's layers, 1 to {teacher.layers}, was "
            f"{teacher_layer!r}"
        )
    return ((student.layers, layer),)


def minilm(
    student: ModelShape,
    teacher: ModelShape,
    *,
    attention_weight: float = 1.0,
    value_weight: float = 1.0,
    teacher_layer: int | None = None,
    relation_heads: int | None = None,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
) -> Recipe:
    """Attention-map KL + value-relation KL of the last layers (L = L_AT + L_VR) + soft labels.

    Both are means over heads and valid tokens. The paper divides by the sequence length and says
    nothing of padding; here padded keys get no probability and padded queries do not count.

    Args:
        teacher_layer: the teacher's layer, from 1; None (the paper): its last.
        relation_heads: the paper asks both models for equal numbers of heads; where they differ,
            queries, keys and values are regrouped into this many, which must divide both widths.
        soft_label_weight: the paper distils in pre-training, without a task, from L alone (0). In
            fine-tuning, as in FSD's comparison, nothing else would train the student's head, hence
            1; models without a head need 0.
        temperature: of the soft labels.
    """
    pair = last_pair(student, teacher, teacher_layer)
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    terms["attention_kl"] = AttentionTerm(
        attention_weight, AttentionKLLoss(relation_heads=relation_heads), pair
    )
    terms["value_relations"] = RelationTerm(
        value_weight, RelationKLLoss(relation_heads, relations=("value",)), pair
    )
    if any(terms[name].weight.maximum > 0 for name in ("attention_kl", "value_relations")):
        check_heads(student, teacher, relation_heads=relation_heads, ways=("relation_heads",))
        check_relations(student, teacher, ("value",), relation_heads)
    return Recipe("minilm", terms, pair)
