"""Hidden State Matching (Dasgupta & Cohn, ICLR 2025): token states of any two widths, by CKA.

With S [n, D_s] and T [n, D_t] the states of all n valid tokens of the batch, centred:
1 − ‖Sᵀ T‖ / √(‖Sᵀ S‖ ‖Tᵀ T‖) = 1 − √CKA, summed over layers and the embeddings.
"""

from typing import Any

from kdfast.captured import ModelShape
from kdfast.losses import CKALoss
from kdfast.recipes.layer_map import layer_map as resolve_layer_map
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.terms import HiddenTerm, output_terms


def hidden(
    student: ModelShape,
    teacher: ModelShape,
    *,
    cka_weight: float = 1.0,
    layer_map: Any = "uniform",
    embeddings: bool = True,
    soft_label_weight: float = 0.8,
    label_weight: float = 0.2,
    temperature: float = 1.0,
) -> Recipe:
    """1 − √CKA of all valid tokens on mapped layers and the embeddings + soft labels + labels.

    Weights and temperature are those of the authors' script for summarisation: 0.2 labels + 0.8
    soft labels at τ = 1 + the sum over layers. It takes the alignment in float64, with 1e-8 beside
    each norm below the line; kdfast.cka in float32, where what is undefined has no loss.

    Args:
        layer_map: "uniform" is theirs, student i from teacher 2i; 12 → 8: 2, 3, 5, 6, 8, 9, 11, 12.
        embeddings: the embeddings are a pair of their own, as theirs are.
        temperature: of the soft labels.
    """
    pairs = resolve_layer_map(layer_map, student, teacher)
    terms = output_terms(student, teacher, label_weight, soft_label_weight, temperature)
    terms["hidden_cka"] = HiddenTerm(
        cka_weight,
        CKALoss("all_tokens", form="one_minus_root", layers="sum"),
        ((0, 0), *pairs) if embeddings else pairs,
        ("embeddings and " if embeddings else "") + "tokens of the batch by CKA",
        token_aligned=True,
    )
    return Recipe("hidden", terms, pairs)
