"""MiniLMv2 (Wang et al., Findings of ACL 2021): self-attention relations of one layer.

For X in Q, K, V, cut into A relation heads of width d on both sides: KL between
softmax(X Xᵀ / √d) of teacher and student, the sum of the three. Neither widths nor numbers of
attention heads need agree.
"""

from kdfast.captured import ModelShape
from kdfast.losses import RelationKLLoss
from kdfast.recipes.minilm import RelationTerm, check_relations, last_pair
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.schedule import Weight
from kdfast.recipes.terms import check_heads, output_terms

# 48 relation heads for teachers of width 768 and 64 for 1024, in both known implementations.
TEACHER_RELATION_WIDTH = 16


def default_relation_heads(student_width: int, teacher_width: int) -> int:
    """The most heads that divide both widths and are at least 16 wide in the teacher, if any is."""
    most = max(1, teacher_width // TEACHER_RELATION_WIDTH)
    return max(
        heads
        for heads in range(1, most + 1)
        if student_width % heads == 0 and teacher_width % heads == 0
    )


def minilmv2(
    student: ModelShape,
    teacher: ModelShape,
    *,
    relation_weight: float = 1.0,
    relation_heads: int | None = None,
    teacher_layer: int | None = None,
    soft_label_weight: float = 1.0,
    label_weight: float = 0.0,
    temperature: float = 2.0,
) -> Recipe:
    """KL between query-query, key-key and value-value relations of one layer + soft labels.

    The three have equal weights and are means over relation heads and valid tokens. How the paper
    treats padding is not known, its implementations differ; here padded tokens take no part.

    Args:
        relation_heads: must divide both widths. None: the implementations' 48 for teachers of
            width 768 and 64 for 1024, that is relation heads of 16 teacher features; where these do
            not divide both widths, the largest smaller number that does.
        teacher_layer: the teacher's layer, from 1; None: its last, as in the implementations. The
            student's is its last. The paper studies which layer of a large teacher is best.
        soft_label_weight: as in `minilm`, the paper's own setting has none (0).
        temperature: of the soft labels.
    """
    pair = last_pair(student, teacher, teacher_layer)
    heads = relation_heads
    if heads is None:
        # Of what the narrowest of queries, keys and values has.
        widths = [shape.key_width for shape in (student, teacher) if shape.heads]
        heads = default_relation_heads(*widths) if len(widths) == 2 else 1
    if Weight(relation_weight).maximum > 0:
        check_heads(student, teacher, relation_heads=heads)
        check_relations(student, teacher, ("query", "key", "value"), heads)
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    terms["relations"] = RelationTerm(relation_weight, RelationKLLoss(heads), pair)
    return Recipe("minilmv2", terms, pair)
