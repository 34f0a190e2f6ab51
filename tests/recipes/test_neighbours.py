"""The neighbours' recipes against their papers' formulas, written out here."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from kdfast.captured import ModelShape
from kdfast.errors import InputError
from kdfast.recipes import build_recipe
from kdfast.recipes.custom import LOSSES
from kdfast.recipes.minilmv2 import default_relation_heads
from kdfast.recipes.schedule import Moment

NEIGHBOURS = [
    *("minilm", "minilmv2", "tinybert", "pkd", "distilbert"),
    *("hidden", "rkd", "annealing", "takd"),
]
NARROW = ModelShape(layers=2, width=4, heads=2, classes=3)
LABELS = torch.tensor([0, 2, 1, 1])
UNIFORM = [(1, 3), (2, 6)]


def row_kl(scores_s, scores_t, mask):
    """KL(t ‖ s) of [B, H, N, N] scores: padded keys without probability, mean over valid rows."""
    hidden = ~mask.bool()[:, None, None, :]
    log_s, log_t = (x.masked_fill(hidden, -1e9).log_softmax(-1) for x in (scores_s, scores_t))
    rows = (log_t.exp() * (log_t - log_s)).sum(-1)
    return rows.transpose(1, 2)[mask.bool()].mean()


def relation(states, heads):
    """X Xᵀ / √d of [B, H, N, d], regrouped into `heads`."""
    x = states.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)
    return x @ x.mT / x.shape[-1] ** 0.5


def mean_over_tokens(values, mask):
    return values[mask.bool()].mean()


def all_losses(recipe, student, teacher, labels=LABELS, progress=0.5):
    found = {}
    for number in range(len(recipe.stages)):
        at = Moment(stage=number, progress=0.5, stage_progress=progress)
        found |= recipe(student, teacher, labels, at)
    return found


def test_minilm_is_attention_and_value_relation_kl_of_the_last_layers(captured, shapes):
    student, teacher = map(captured, shapes)
    losses = build_recipe("minilm", *shapes)(student, teacher, None)
    s, t, mask = student.attention[2], teacher.attention[6], student.attention_mask
    # The captured scale of attention is 0.5; the relations' is d^-½.
    attention = row_kl(0.5 * s.query @ s.key.mT, 0.5 * t.query @ t.key.mT, mask)
    values = row_kl(relation(s.value, 2), relation(t.value, 2), mask)
    torch.testing.assert_close(losses["attention_kl"], attention)
    torch.testing.assert_close(losses["value_relations"], values)
    assert set(losses) == {"attention_kl", "value_relations", "soft_labels"}


def test_minilm_of_another_teacher_layer_regroups_heads_that_differ(captured, shapes):
    narrow = dataclasses.replace(NARROW, heads=1)
    student, teacher = captured(narrow), captured(shapes[1])
    options = {"teacher_layer": 4, "relation_heads": 4}
    recipe = build_recipe("minilm", narrow, shapes[1], **options)
    assert recipe.layers == ((2, 4),)
    s, t, mask = student.attention[2], teacher.attention[4], student.attention_mask
    values = row_kl(relation(s.value, 4), relation(t.value, 4), mask)
    torch.testing.assert_close(recipe(student, teacher, None)["value_relations"], values)


def test_minilm_v2_sums_three_relations_of_regrouped_heads(captured, shapes):
    student, teacher = captured(NARROW), captured(shapes[1])
    recipe = build_recipe("minilmv2", NARROW, shapes[1], relation_heads=4, teacher_layer=5)
    s, t, mask = student.attention[2], teacher.attention[5], student.attention_mask
    expected = sum(
        row_kl(relation(x, 4), relation(y, 4), mask)
        for x, y in ((s.query, t.query), (s.key, t.key), (s.value, t.value))
    )
    torch.testing.assert_close(recipe(student, teacher, None)["relations"], expected)


@pytest.mark.parametrize(
    ("student", "teacher", "heads"),
    [(768, 768, 48), (384, 768, 48), (384, 1024, 64), (312, 768, 24), (8, 8, 1), (7, 768, 1)],
)
def test_relation_heads_are_the_implementations_where_they_divide_both(student, teacher, heads):
    assert default_relation_heads(student, teacher) == heads


def test_tinybert_is_the_squared_error_of_scores_and_states_then_soft_cross_entropy(
    captured, shapes
):
    student, teacher = map(captured, shapes)
    recipe = build_recipe("tinybert", *shapes, padding="counted", temperature=3.0)
    losses = all_losses(recipe, student, teacher)
    mask = student.attention_mask[:, None, None, :]
    scores = hidden = 0
    for i, j in UNIFORM:
        s, t = student.attention[i], teacher.attention[j]
        difference = 0.5 * (s.query @ s.key.mT - t.query @ t.key.mT)
        scores = scores + (difference.square() * mask).mean()
    for i, j in [(0, 0), *UNIFORM]:
        hidden = hidden + F.mse_loss(student.hidden_states[i], teacher.hidden_states[j])
    torch.testing.assert_close(losses["attention_scores"], scores)
    torch.testing.assert_close(losses["hidden_mse"], hidden)
    probabilities = (teacher.logits / 3).softmax(-1)
    soft = -(probabilities * (student.logits / 3).log_softmax(-1)).mean()
    torch.testing.assert_close(losses["soft_labels"], soft)


def test_tinybert_leaves_padding_out_unless_told_otherwise(captured, shapes):
    student, teacher = map(captured, shapes)
    losses = build_recipe("tinybert", *shapes)(student, teacher, None)
    mask = student.attention_mask
    hidden = sum(
        mean_over_tokens((student.hidden_states[i] - teacher.hidden_states[j]).square(), mask)
        for i, j in [(0, 0), *UNIFORM]
    )
    torch.testing.assert_close(losses["hidden_mse"], hidden)
    valid = [int(row.sum()) for row in mask]
    scores = 0
    for i, j in UNIFORM:
        s, t = student.attention[i], teacher.attention[j]
        squares = 0.25 * (s.query @ s.key.mT - t.query @ t.key.mT).square()
        scores = scores + sum(x[:, :n, :n].mean() for x, n in zip(squares, valid, strict=True)) / 4
    torch.testing.assert_close(losses["attention_scores"], scores)


def test_tinybert_trains_layers_first_and_outputs_with_a_new_schedule(shapes):
    recipe = build_recipe("tinybert", *shapes)
    layers, outputs = recipe.stages
    assert layers.terms == ("attention_scores", "hidden_mse") and layers.share is None
    assert outputs.terms == ("soft_labels",) and outputs.restart
    assert outputs.share == pytest.approx(3 / 13)
    assert recipe.needs(0)[0].attention and not recipe.needs(1)[0].attention
    (once,) = build_recipe("tinybert", *shapes, schedule="simultaneous").stages
    assert set(once.terms) == {*layers.terms, *outputs.terms}


def test_tinybert_of_models_without_a_head_is_its_first_stage(captured, shapes):
    student, teacher = (dataclasses.replace(shape, classes=None) for shape in shapes)
    recipe = build_recipe("tinybert", student, teacher, soft_label_weight=0.0)
    assert [stage.name for stage in recipe.stages] == ["layers"]
    assert recipe(captured(student), captured(teacher), None)["hidden_mse"] > 0


def test_tinybert_compares_differing_heads_with_the_teachers_average(captured, shapes):
    student = dataclasses.replace(shapes[0], heads=4)
    recipe = build_recipe("tinybert", student, shapes[1], match_heads="mean", padding="counted")
    s, t = captured(student), captured(shapes[1])
    expected = 0
    for i, j in UNIFORM:
        own, theirs = s.attention[i], t.attention[j]
        mean = (0.5 * theirs.query @ theirs.key.mT).mean(1, keepdim=True)
        squares = (0.5 * own.query @ own.key.mT - mean).square()
        expected = expected + (squares * s.attention_mask[:, None, None, :]).mean()
    torch.testing.assert_close(recipe(s, t, None)["attention_scores"], expected)


def test_pkd_is_normalised_cls_states_without_the_last_pair_and_the_codes_soft_labels(
    captured, shapes
):
    student, teacher = map(captured, shapes)
    recipe = build_recipe("pkd", *shapes)
    assert recipe.layers == ((1, 3),)
    losses = recipe(student, teacher, LABELS)
    s, t = (
        F.normalize(x[:, 0], dim=-1) for x in (student.hidden_states[1], teacher.hidden_states[3])
    )
    torch.testing.assert_close(losses["cls_mse"], F.mse_loss(s, t))
    log_s, log_t = ((x.logits / 10).log_softmax(-1) for x in (student, teacher))
    soft = 100 * (log_t.exp() * (log_t - log_s)).mean()
    torch.testing.assert_close(losses["soft_labels"], soft)
    torch.testing.assert_close(losses["labels"], F.cross_entropy(student.logits, LABELS))
    weights = {name: term.weight(0) for name, term in recipe.terms.items()}
    assert weights == {"labels": 0.3, "soft_labels": 0.7, "cls_mse": 500}
    rows = build_recipe("pkd", *shapes, soft_label_mean="rows")
    torch.testing.assert_close(rows(student, teacher, LABELS)["soft_labels"], 3 * soft)


def test_pkd_averages_over_layers_and_skips_the_last_one_of_both_strategies(captured):
    student, teacher = (ModelShape(layers=n, width=8, heads=2, classes=3) for n in (6, 12))
    skip, last = (build_recipe("pkd", student, teacher, layer_map=m) for m in ("skip", "last"))
    assert skip.layers == ((1, 2), (2, 4), (3, 6), (4, 8), (5, 10))
    assert last.layers == ((1, 7), (2, 8), (3, 9), (4, 10), (5, 11))
    s, t = captured(student), captured(teacher)
    one_by_one = [
        F.mse_loss(
            F.normalize(s.hidden_states[i][:, 0], dim=-1),
            F.normalize(t.hidden_states[j][:, 0], dim=-1),
        )
        for i, j in last.layers
    ]
    torch.testing.assert_close(last(s, t, LABELS)["cls_mse"], torch.stack(one_by_one).mean())


def test_distilbert_is_the_cosine_of_last_states_of_valid_tokens_and_both_labels(captured, shapes):
    student, teacher = map(captured, shapes)
    recipe = build_recipe("distilbert", *shapes)
    losses = recipe(student, teacher, LABELS)
    cosine = F.cosine_similarity(student.hidden_states[2], teacher.hidden_states[6], dim=-1)
    torch.testing.assert_close(
        losses["cosine"], mean_over_tokens(1 - cosine, student.attention_mask)
    )
    soft = 4 * F.kl_div(
        (student.logits / 2).log_softmax(-1),
        (teacher.logits / 2).softmax(-1),
        reduction="batchmean",
    )
    torch.testing.assert_close(losses["soft_labels"], soft)
    total = 5 * soft + 2 * F.cross_entropy(student.logits, LABELS) + losses["cosine"]
    torch.testing.assert_close(recipe.total(losses), total)


@pytest.mark.parametrize("width", [4, 8])
def test_hidden_is_the_ratio_of_norms_over_all_valid_tokens_of_any_width(captured, shapes, width):
    narrow = dataclasses.replace(NARROW, width=width)
    student, teacher = captured(narrow), captured(shapes[1])
    recipe = build_recipe("hidden", narrow, shapes[1])
    keep = student.attention_mask.bool()
    expected = 0
    for i, j in [(0, 0), *UNIFORM]:
        s, t = student.hidden_states[i][keep].double(), teacher.hidden_states[j][keep].double()
        s, t = s - s.mean(0), t - t.mean(0)
        alike = (s.mT @ t).norm() / ((s.mT @ s).norm() * (t.mT @ t).norm()).sqrt()
        expected = expected + 1 - alike
    losses = recipe(student, teacher, LABELS)
    torch.testing.assert_close(losses["hidden_cka"].double(), expected, atol=1e-5, rtol=1e-5)
    assert not list(recipe.parameters())
    assert recipe.terms["hidden_cka"].couples_samples
    total = losses["hidden_cka"] + 0.8 * losses["soft_labels"] + 0.2 * losses["labels"]
    torch.testing.assert_close(recipe.total(losses), total)
    layers = build_recipe("hidden", narrow, shapes[1], embeddings=False).terms["hidden_cka"].layers
    assert layers == (1, 2)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_rkd_is_huber_distances_and_angles_among_pooled_states(captured, shapes, pool):
    student, teacher = captured(NARROW), captured(shapes[1])
    recipe = build_recipe("rkd", NARROW, shapes[1], pool=pool)
    states = []
    for side, layer in ((student, 2), (teacher, 6)):
        h, mask = side.hidden_states[layer], side.attention_mask
        means = [x[m.bool()].mean(0) for x, m in zip(h, mask, strict=True)]
        states.append(h[:, 0] if pool == "cls" else torch.stack(means))
    distances, angles = [], []
    for x in states:
        apart = x[:, None] - x
        d = apart.norm(dim=-1)
        distances.append(d / d[d > 0].mean())
        e = F.normalize(apart, dim=-1)
        angles.append(torch.einsum("ijd,kjd->ijk", e, e))
    losses = recipe(student, teacher, None)
    torch.testing.assert_close(losses["rkd_distance"], F.smooth_l1_loss(*distances))
    torch.testing.assert_close(losses["rkd_angle"], F.smooth_l1_loss(*angles))
    assert {recipe.terms[k].weight(0) for k in ("rkd_distance", "rkd_angle")} == {100, 200}
    assert recipe.terms["rkd_angle"].couples_samples and not recipe.token_aligned


def test_rkd_of_several_layers_is_summed(captured, shapes):
    student, teacher = map(captured, shapes)

    def angle(layer_map):
        return build_recipe("rkd", *shapes, layer_map=layer_map)(student, teacher, None)[
            "rkd_angle"
        ]

    torch.testing.assert_close(angle("uniform"), angle([[1, 3]]) + angle([[2, 6]]))
    torch.testing.assert_close(angle("final"), angle([[2, 6]]))


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 0.25), (0.3, 0.5), (0.99, 1.0)])
def test_annealing_follows_the_teacher_growing_with_the_stage(captured, shapes, progress, factor):
    student, teacher = map(captured, shapes)
    recipe = build_recipe("annealing", *shapes, levels=4)
    at = Moment(stage=0, progress=0.7, stage_progress=progress)
    loss = recipe(student, teacher, LABELS, at)["annealing"]
    torch.testing.assert_close(loss, F.mse_loss(student.logits, factor * teacher.logits))


def test_annealing_ends_with_the_labels_alone(captured, shapes):
    recipe = build_recipe("annealing", *shapes)
    first, second = recipe.stages
    assert (first.terms, second.terms) == (("annealing",), ("labels",))
    assert second.restart and second.share == pytest.approx(4 / 18)
    assert not recipe.needs_teacher(1)
    student = captured(shapes[0])
    losses = recipe(student, None, LABELS, Moment(stage=1))
    torch.testing.assert_close(losses["labels"], F.cross_entropy(student.logits, LABELS))
    assert len(build_recipe("annealing", *shapes, label_share=0.0).stages) == 1


def test_takd_is_soft_labels_and_keeps_the_chain(captured, shapes):
    student, teacher = map(captured, shapes)
    recipe = build_recipe("takd", *shapes, assistants=[5, 3])
    assert recipe.assistants == (5, 3) and "5, 3" in recipe.table()
    soft = build_recipe("soft_labels", *shapes)(student, teacher, None)
    torch.testing.assert_close(recipe(student, teacher, None), soft)
    for none in (None, []):
        assert build_recipe("takd", *shapes, assistants=none).assistants == ()
    # The student's turn: its teacher is the last assistant.
    last = dataclasses.replace(shapes[1], layers=3)
    assert build_recipe("takd", shapes[0], last, assistants=[5, 3]).assistants == (5, 3)


@pytest.mark.parametrize("assistants", [[3, 5], [6, 5], [7], [2], [4, 4], [4.0], 4, "4", [True]])
def test_assistants_must_fall_from_the_teacher_to_the_student(shapes, assistants):
    with pytest.raises(InputError, match="assistants must be numbers of layers that fall"):
        build_recipe("takd", *shapes, assistants=assistants)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_a_narrower_student_and_its_projections_get_finite_gradients(captured, shapes, name):
    recipe = build_recipe(name, NARROW, shapes[1])
    for number in range(len(recipe.stages)):
        student, teacher = captured(NARROW, grad=True), captured(shapes[1])
        at = Moment(stage=number, stage_progress=0.5)
        recipe.total(recipe(student, teacher, LABELS, at), at).backward()
        tensors = [student.logits, *student.hidden_states.values()]
        tensors += [x for a in student.attention.values() for x in (a.query, a.key, a.value)]
        grads = [x.grad for x in tensors if x.grad is not None]
        assert grads and all(g.isfinite().all() and g.any() for g in grads)
    assert all(p.grad is not None and p.grad.any() for p in recipe.parameters())
    # One map a pair: embeddings and 2 layers, 1 intermediate layer, the last layer.
    assert len(list(recipe.parameters())) == {"tinybert": 3, "pkd": 1, "distilbert": 1}.get(name, 0)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_token_classifiers_learn_from_every_neighbour(captured, shapes, name):
    student, teacher = (dataclasses.replace(shape, token_logits=True) for shape in shapes)
    labels = torch.full((4, 5), -100)
    labels[:, 1:3] = 2
    s, t = captured(student), captured(teacher)
    losses = all_losses(build_recipe(name, student, teacher), s, t, labels)
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_annealing_of_token_classifiers_averages_over_valid_tokens(captured, shapes):
    student, teacher = (dataclasses.replace(shape, token_logits=True) for shape in shapes)
    recipe = build_recipe("annealing", student, teacher, levels=1)
    assert recipe.terms["annealing"].unit == "tokens" and recipe.token_aligned == ["annealing"]
    s, t = captured(student), captured(teacher)
    expected = mean_over_tokens((s.logits - t.logits).square(), s.attention_mask)
    torch.testing.assert_close(recipe(s, t, None)["annealing"], expected)


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_regression_compares_values(captured, shapes, name):
    student, teacher = (dataclasses.replace(x, classes=1, regression=True) for x in shapes)
    s, t = captured(student), captured(teacher)
    losses = all_losses(build_recipe(name, student, teacher), s, t, torch.randn(4))
    assert all(loss.isfinite() for loss in losses.values())
    if "soft_labels" in losses:
        torch.testing.assert_close(losses["soft_labels"], F.mse_loss(s.logits, t.logits))


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_models_without_a_head_work_without_losses_on_logits_or_are_refused(captured, shapes, name):
    student, teacher = (dataclasses.replace(shape, classes=None) for shape in shapes)
    with pytest.raises(InputError, match="head|no a sequence"):
        build_recipe(name, student, teacher)
    if name not in ("annealing", "takd"):
        options = {"soft_label_weight": 0.0, "label_weight": 0.0}
        recipe = build_recipe(name, student, teacher, **options)
        losses = recipe(captured(student), captured(teacher), None)
        assert losses and all(loss > 0 for loss in losses.values())


@pytest.mark.parametrize("name", ["minilm", "minilmv2", "tinybert"])
def test_attention_of_a_student_that_has_none_is_refused(shapes, name):
    with pytest.raises(InputError, match="student has no attention"):
        build_recipe(name, dataclasses.replace(shapes[0], heads=0), shapes[1])


@pytest.mark.parametrize("name", ["distilbert", "hidden", "rkd", "annealing", "takd"])
def test_a_student_without_attention_learns_from_states_and_outputs(captured, shapes, name):
    student = dataclasses.replace(shapes[0], heads=0, pool="mean")
    recipe = build_recipe(name, student, shapes[1])
    losses = all_losses(recipe, captured(student), captured(shapes[1]))
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_shared_key_value_heads_are_asked_for_relation_heads_that_fit_them(shapes):
    student, teacher = (
        dataclasses.replace(shape, width=16, heads=4, key_value_heads=kv)
        for shape, kv in zip(shapes, (1, 2), strict=True)
    )
    with pytest.raises(InputError, match="1 key-value heads and the teacher 2"):
        build_recipe("minilm", student, teacher)
    with pytest.raises(InputError, match="student's keys and values, 4"):
        build_recipe("minilm", student, teacher, relation_heads=8)
    assert build_recipe("minilm", student, teacher, relation_heads=4).terms
    assert build_recipe("minilmv2", student, teacher).terms["relations"].loss.relation_heads == 1


@pytest.mark.parametrize(
    ("name", "offered", "not_offered"),
    [("minilm", "relation_heads", "match_heads"), ("tinybert", "match_heads", "relation_heads")],
)
def test_differing_head_counts_name_the_recipes_own_way_out(shapes, name, offered, not_offered):
    student = dataclasses.replace(shapes[0], heads=4)
    with pytest.raises(InputError, match=offered) as error:
        build_recipe(name, student, shapes[1])
    assert not_offered not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("minilm", {"teacher_layer": 7}, "teacher_layer must be .*1 to 6, was 7"),
        ("minilmv2", {"teacher_layer": "last"}, "teacher_layer"),
        ("minilmv2", {"relation_heads": 3}, "relation_heads must divide the student's width 8"),
        ("tinybert", {"schedule": "two_stages"}, "two_stage, simultaneous"),
        ("tinybert", {"prediction_share": 1.0}, "prediction_share"),
        ("tinybert", {"padding": "none"}, "padding must be one of masked, counted"),
        ("pkd", {"soft_label_mean": "batch"}, "soft_label_mean must be one of elements, rows"),
        ("hidden", {"layer_map": "unifrom"}, "did you mean 'uniform'"),
        ("rkd", {"pool": "max"}, "pool must be one of auto, cls, mean"),
        ("annealing", {"levels": 0}, "levels must be a whole number above 0"),
        ("annealing", {"label_share": 1.0}, "label_share"),
        ("annealing", {"anealing_weight": 1.0}, "did you mean 'annealing_weight'"),
    ],
)
def test_bad_options_are_named(shapes, name, options, message):
    with pytest.raises(InputError, match=message):
        build_recipe(name, *shapes, **options)


def test_pkd_of_a_one_layer_student_has_no_intermediate_layer(shapes):
    student = dataclasses.replace(shapes[0], layers=1)
    for layer_map in ("skip", "last"):
        with pytest.raises(InputError, match="2 layers"):
            build_recipe("pkd", student, shapes[1], layer_map=layer_map)


@pytest.mark.parametrize(
    ("loss", "recipe"), [(n, r) for n, (r, _, _) in LOSSES.items() if r in NEIGHBOURS]
)
def test_every_neighbours_loss_is_reachable_by_name(captured, shapes, loss, recipe):
    student, teacher = map(captured, shapes)
    alone = build_recipe("custom", *shapes, losses=[{"loss": loss, "weight": 2.0}])
    assert list(alone.terms) == [loss] and len(alone.stages) == 1
    found = alone(student, teacher, LABELS, Moment(stage_progress=0.5))
    whole = all_losses(build_recipe(recipe, *shapes), student, teacher)
    torch.testing.assert_close(found[loss], whole[loss])
    torch.testing.assert_close(alone.total(found), 2 * whole[loss])
