"""Layer maps, and the losses and weights that each recipe stands for."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from kdfast.captured import Captured, LayerAttention, ModelShape
from kdfast.errors import InputError
from kdfast.losses import AttentionKLLoss, CKALoss, CosineLoss, SoftLabelLoss
from kdfast.recipes import RECIPES, build_recipe
from kdfast.recipes.layer_map import layer_map

STUDENT = ModelShape(layers=2, width=8, heads=2, classes=3)
TEACHER = ModelShape(layers=6, width=8, heads=2, classes=3)
B, N = 4, 5


def shape(layers):
    return ModelShape(layers=layers, width=8, heads=2, classes=3)


def captured(shape, *, grad=False):
    def tensor(*size):
        return torch.randn(*size, requires_grad=grad)

    head = (B, shape.heads, N, shape.width // shape.heads)
    mask = torch.ones(B, N, dtype=torch.long)
    mask[0, 3:] = 0
    return Captured(
        logits=tensor(B, shape.classes),
        hidden_states=tuple(tensor(B, N, shape.width) for _ in range(shape.layers + 1)),
        attention=tuple(
            LayerAttention(tensor(*head), tensor(*head), tensor(*head), scale=0.5)
            for _ in range(shape.layers)
        ),
        attention_mask=mask,
    )


LABELS = torch.tensor([0, 2, 1, 1])


@pytest.mark.parametrize(
    ("strategy", "student", "teacher", "expected"),
    [
        ("uniform", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        ("uniform", 4, 6, [(1, 2), (2, 3), (3, 5), (4, 6)]),
        ("uniform", 6, 6, [(i, i) for i in range(1, 7)]),
        ("uniform", 2, 1, [(1, 1), (2, 1)]),
        ("skip", 6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
        ("last", 2, 6, [(1, 5), (2, 6)]),
        ("first", 2, 6, [(1, 1), (2, 2)]),
        ([[1, 6], [1, 3]], 2, 6, [(1, 6), (1, 3)]),
    ],
)
def test_layer_map(strategy, student, teacher, expected):
    assert layer_map(strategy, shape(student), shape(teacher)) == tuple(expected)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ("unifrom", "did you mean 'uniform'"),
        ([[3, 1]], "student layer 3; the student has layers 1 to 2"),
        ([[1, 7]], "teacher layer 7; the teacher has layers 1 to 6"),
        ([[0, 1]], "layers 1 to 2"),
        ([], "list of"),
        ([[1]], "list of"),
        ([["1", 2]], "list of"),
        (3, "list of"),
    ],
)
def test_bad_layer_maps_say_what_is_allowed(strategy, message):
    with pytest.raises(InputError, match=message):
        layer_map(strategy, STUDENT, TEACHER)


@pytest.mark.parametrize("strategy", ["last", "first"])
def test_a_student_deeper_than_its_teacher_cannot_take_its_last_or_first_layers(strategy):
    with pytest.raises(InputError, match="at least as many"):
        layer_map(strategy, shape(7), TEACHER)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_finite_losses_and_gradients_to_the_student_only(name):
    recipe = build_recipe(name, STUDENT, TEACHER)
    student, teacher = captured(STUDENT, grad=True), captured(TEACHER)
    losses = recipe(student, teacher, LABELS)
    assert set(losses) == set(recipe.terms)
    total = recipe.total(losses)
    expected = sum(recipe.terms[k].weight * v for k, v in losses.items())
    torch.testing.assert_close(total, expected)
    total.backward()
    assert student.logits.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in recipe.parameters())


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_names_every_term(name):
    recipe = build_recipe(name, STUDENT, TEACHER)
    assert all(term in recipe.table() for term in recipe.terms)


def test_internal_is_attention_kl_and_cls_cosine_on_mapped_layers_and_soft_labels():
    student, teacher = captured(STUDENT), captured(TEACHER)
    losses = build_recipe("internal", STUDENT, TEACHER)(student, teacher, None)
    pairs = [(1, 3), (2, 6)]
    s, t = (
        [student.attention[i - 1] for i, _ in pairs],
        [teacher.attention[j - 1] for _, j in pairs],
    )
    attention = AttentionKLLoss()(
        [x.query for x in s],
        [x.key for x in s],
        [x.query for x in t],
        [x.key for x in t],
        student.attention_mask,
        scale_s=0.5,
        scale_t=0.5,
    )
    cosine = CosineLoss()(
        [student.hidden_states[i] for i, _ in pairs], [teacher.hidden_states[j] for _, j in pairs]
    )
    torch.testing.assert_close(losses["attention_kl"], attention)
    torch.testing.assert_close(losses["cosine"], cosine)
    torch.testing.assert_close(
        losses["soft_labels"], SoftLabelLoss(2.0)(student.logits, teacher.logits)
    )


def test_attention_layers_with_different_windows_are_summed_over_all_layers():
    student, teacher = captured(STUDENT), captured(TEACHER)
    local = dataclasses.replace(student.attention[1], window=1)
    student = dataclasses.replace(student, attention=(student.attention[0], local))
    layers = list(teacher.attention)
    layers[5] = dataclasses.replace(layers[5], window=1)
    teacher = dataclasses.replace(teacher, attention=tuple(layers))
    losses = build_recipe("internal", STUDENT, TEACHER)(student, teacher, None)
    kl = AttentionKLLoss()

    def one(i, j, window):
        s, t = student.attention[i - 1], teacher.attention[j - 1]
        return kl(
            *(s.query, s.key, t.query, t.key, student.attention_mask),
            window=window,
            scale_s=0.5,
            scale_t=0.5,
        )

    torch.testing.assert_close(losses["attention_kl"], one(1, 3, None) + one(2, 6, 1))


def test_mapped_layers_that_attend_to_different_tokens_are_an_error():
    student, teacher = captured(STUDENT), captured(TEACHER)
    local = dataclasses.replace(student.attention[1], window=1)
    student = dataclasses.replace(student, attention=(student.attention[0], local))
    with pytest.raises(InputError, match="student layer 2 .*window 1.* teacher layer 6"):
        build_recipe("internal", STUDENT, TEACHER)(student, teacher, None)


def test_differing_head_counts_are_an_error_that_names_both_ways_out():
    student = ModelShape(layers=2, width=8, heads=4, classes=3)
    with pytest.raises(InputError, match="relation_heads.*match_heads"):
        build_recipe("internal", student, TEACHER)


@pytest.mark.parametrize("options", [{"relation_heads": 4}, {"match_heads": "mean"}])
def test_differing_head_counts_meet_with_either_option(options):
    student = ModelShape(layers=2, width=8, heads=4, classes=3)
    recipe = build_recipe("internal", student, TEACHER, **options)
    losses = recipe(captured(student), captured(TEACHER), None)
    assert losses["attention_kl"].isfinite() and losses["attention_kl"] > 0


def test_a_narrower_student_gets_a_learned_projection_for_its_cosine():
    student = ModelShape(layers=2, width=4, heads=2, classes=3)
    recipe = build_recipe("internal", student, TEACHER)
    assert [tuple(p.shape) for p in recipe.parameters()] == [(8, 4), (8, 4)]
    assert recipe(captured(student), captured(TEACHER), None)["cosine"].isfinite()


def test_fsd_compares_the_penultimate_layers():
    student, teacher = captured(STUDENT), captured(TEACHER)
    losses = build_recipe("fsd", STUDENT, TEACHER)(student, teacher, None)
    h_s, h_t, mask = student.hidden_states[1], teacher.hidden_states[5], student.attention_mask
    torch.testing.assert_close(losses["intra"], CKALoss("tokens")(h_s, h_t, mask))
    torch.testing.assert_close(losses["local"], CKALoss("samples")(h_s, h_t, mask))


def test_universal_teaches_the_projected_pseudo_logits_and_trains_the_teachers_on_labels():
    recipe = build_recipe("universal", STUDENT, TEACHER)
    student, teacher = captured(STUDENT), captured(TEACHER)
    losses = recipe(student, teacher, LABELS)
    own, theirs = recipe.terms["projection"].student, recipe.terms["pseudo_labels"].classifiers
    z_s = own.classifiers[0](student.hidden_states[1][:, 0])
    z_t = torch.stack(
        [c(teacher.hidden_states[j + 1][:, 0]) for j, c in enumerate(theirs.classifiers)], 1
    )
    weights = (z_t @ z_s[..., None]).softmax(1)
    mixture = (weights * z_t).sum(1)
    expected = F.kl_div(
        z_s.log_softmax(-1), mixture.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(losses["projection"], expected)
    labels = torch.stack([F.cross_entropy(z_t[:, j], LABELS) for j in range(5)]).mean()
    torch.testing.assert_close(losses["pseudo_labels"], labels)


def test_universal_projection_leaves_the_teachers_classifiers_alone():
    recipe = build_recipe("universal", STUDENT, TEACHER)
    recipe(captured(STUDENT), captured(TEACHER), LABELS)["projection"].backward()
    assert all(p.grad is None for p in recipe.terms["pseudo_labels"].parameters())


def test_terms_of_weight_zero_are_neither_computed_nor_captured_for():
    recipe = build_recipe("internal", STUDENT, TEACHER, attention_weight=0.0)
    assert "attention_kl" not in recipe.terms and not recipe.needs.attention
    assert build_recipe("labels", STUDENT, TEACHER).needs_teacher is False


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("intrenal", {}, "did you mean 'internal'"),
        ("internal", {"atention_weight": 1}, "did you mean 'attention_weight'"),
        ("internal", {"cosine_rows": "words"}, "rows must be one of cls, tokens"),
        ("internal", {"soft_label_weight": -1.0}, "must not be negative"),
        ("soft_labels", {"soft_label_weight": 0.0}, "every weight"),
        ("soft_labels", {"temperature": 0.0}, "temperature must be positive"),
        ("internal", {"attention_weight": "high"}, "recipe 'internal'"),
        ("universal", {"pseudo_label_weight": 0.0}, "pseudo_label_weight"),
        ("fsd", {"estimator": "unbiased"}, "one_minus"),
    ],
)
def test_bad_recipes_and_options_are_named(name, options, message):
    with pytest.raises(InputError, match=message):
        build_recipe(name, STUDENT, TEACHER, **options)


def test_soft_labels_need_equal_numbers_of_classes():
    teacher = ModelShape(layers=6, width=8, heads=2, classes=4)
    with pytest.raises(InputError, match="3 and 4"):
        build_recipe("soft_labels", STUDENT, teacher)


def test_regression_compares_values():
    student = ModelShape(layers=2, width=8, heads=2, classes=1, regression=True)
    teacher = ModelShape(layers=6, width=8, heads=2, classes=1, regression=True)
    for name in RECIPES:
        losses = build_recipe(name, student, teacher)(
            captured(student), captured(teacher), torch.randn(B)
        )
        assert all(loss.isfinite() for loss in losses.values())
