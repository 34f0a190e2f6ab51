"""Layer maps, and the losses and weights that each recipe stands for."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from kdfast.captured import Captured, ModelShape, Needs
from kdfast.errors import InputError
from kdfast.losses import AttentionKLLoss, CKALoss, CosineLoss, SoftLabelLoss
from kdfast.recipes import RECIPES, build_recipe
from kdfast.recipes.layer_map import layer_map
from kdfast.recipes.schedule import Moment
from kdfast.recipes.terms import pooled

STUDENT = ModelShape(layers=2, width=8, heads=2, classes=3)
TEACHER = ModelShape(layers=6, width=8, heads=2, classes=3)
# What a recipe cannot do without.
OPTIONS = {
    "custom": {"losses": [{"loss": "cosine"}, {"loss": "soft_labels", "weight": 0.5}]},
    "fsd": {"max_length": 5},
}


def shape(layers):
    return ModelShape(layers=layers, width=8, heads=2, classes=3)


def fit(recipe, captured, labels=None):
    """What the trainer does before the first step."""
    torch.manual_seed(0)
    batches = [(captured(TEACHER, rows=16), torch.arange(16) % 3) for _ in range(8)]
    with torch.no_grad():
        for part in recipe.fitted.values():
            part.fit(lambda: batches)
    return recipe


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
        ([[1, 2], [2, 6], [1, 2]], r"the pair \[1, 2\] twice"),
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


def only(captured, needs):
    """What a capture would leave of it."""
    return dataclasses.replace(
        captured,
        logits=captured.logits if needs.logits else None,
        hidden_states={i: captured.hidden_states[i] for i in needs.hidden_states},
        attention={i: captured.attention[i] for i in needs.attention},
    )


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_gives_finite_losses_and_gradients_to_the_student_only(captured, name):
    recipe = build_recipe(name, STUDENT, TEACHER, **OPTIONS.get(name, {}))
    fit(recipe, captured)
    seen = {}
    for number, stage in enumerate(recipe.stages):
        student, teacher = (
            only(captured(shape, grad=shape is STUDENT), needs)
            for shape, needs in zip((STUDENT, TEACHER), recipe.needs(number), strict=True)
        )
        at = Moment(stage=number, progress=0.5, stage_progress=0.5)
        losses = recipe(student, teacher, LABELS, at)
        assert set(losses) == set(stage.terms)
        seen |= losses
        total = recipe.total(losses, at)
        expected = sum(recipe.terms[k].weight(0.5) * v for k, v in losses.items())
        torch.testing.assert_close(total, expected)
        total.backward()
        own = [x.grad for x in (student.logits, *student.hidden_states.values()) if x is not None]
        # Each is read: what a recipe does not learn from it should not ask for.
        assert all(gradient is not None for gradient in own)
        own += [a.query.grad for a in student.attention.values() if a.query.grad is not None]
        assert own and all(g.isfinite().all() for g in own)
    assert set(seen) == set(recipe.terms)
    learned = [p for p in recipe.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)


def measured(recipe, student, teacher, at, **options):
    """Losses and, flat, all gradients of a step."""
    leaves = [x for x in (student.logits, *student.hidden_states.values()) if x is not None]
    leaves += [x for layer in student.attention.values() for x in (layer.query, layer.key)]
    losses = recipe(student, teacher, LABELS, at, **options)
    total = recipe.total(losses, at)
    grads = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return losses, torch.cat([g.flatten() for g in grads if g is not None])


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layers", ["sum", "mean"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_is_released_of_the_teacher_changes_no_loss(
    captured, name, layers, device, monkeypatch
):
    # On a GPU all layers are launched together.
    monkeypatch.setattr(Captured, "device", torch.device(device))
    options = OPTIONS.get(name, {})
    if layers == "mean":
        try:
            recipe = build_recipe(name, STUDENT, TEACHER, **options, layers="mean")
        except InputError:
            pytest.skip(f"recipe '{name}' has no option 'layers'")
    else:
        recipe = build_recipe(name, STUDENT, TEACHER, **options)
    fit(recipe, captured)
    for number in range(len(recipe.stages)):
        at = Moment(stage=number, progress=0.5, stage_progress=0.5)
        needs = recipe.needs(number)
        student, teacher = (
            only(captured(shape, grad=shape is STUDENT), needed)
            for shape, needed in zip((STUDENT, TEACHER), needs, strict=True)
        )
        losses, gradients = measured(recipe, student, teacher, at)
        assert set(teacher.hidden_states) == set(needs[1].hidden_states)  # left alone
        assert set(teacher.attention) == set(needs[1].attention)
        released, others = measured(recipe, student, teacher, at, release=True)
        assert list(released) == list(losses)
        torch.testing.assert_close(released, losses)
        torch.testing.assert_close(others, gradients)
        assert not teacher.hidden_states and not teacher.attention


def test_a_recipe_lets_go_of_a_layer_of_the_teacher_once_its_losses_are_taken(captured):
    recipe = build_recipe("internal", shape(2), shape(4), cosine_rows="tokens")
    student, teacher = captured(shape(2), grad=True), captured(shape(4))
    held = []
    for name in ("attention_kl", "cosine"):
        recipe.terms[name].register_forward_pre_hook(
            lambda module, args, name=name: held.append(
                (name, args[3].layers, sorted(teacher.attention), sorted(teacher.hidden_states))
            )
        )
    recipe(student, teacher, None, release=True)
    # Student layers 1 and 2 learn from the teacher's 2 and 4.
    assert held == [
        ("attention_kl", (1,), [2, 4], [2, 4]),
        ("cosine", (1,), [4], [2, 4]),
        ("attention_kl", (2,), [4], [4]),
        ("cosine", (2,), [], [4]),
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_names_every_term_and_stage(name):
    recipe = build_recipe(name, STUDENT, TEACHER, **OPTIONS.get(name, {}))
    if len(recipe.stages) > 1:
        assert all(stage.name in recipe.table([1] * len(recipe.stages)) for stage in recipe.stages)
    assert all(term in recipe.table() for term in recipe.terms)


def test_internal_is_attention_kl_and_cls_cosine_on_mapped_layers_and_soft_labels(captured):
    student, teacher = captured(STUDENT), captured(TEACHER)
    losses = build_recipe("internal", STUDENT, TEACHER)(student, teacher, None)
    pairs = [(1, 3), (2, 6)]
    s, t = (
        [student.attention[i] for i, _ in pairs],
        [teacher.attention[j] for _, j in pairs],
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


def test_attention_layers_with_different_windows_are_summed_over_all_layers(captured):
    student, teacher = captured(STUDENT), captured(TEACHER)
    local = dataclasses.replace(student.attention[2], window=1)
    student = dataclasses.replace(student, attention={**student.attention, 2: local})
    local = dataclasses.replace(teacher.attention[6], window=1)
    teacher = dataclasses.replace(teacher, attention={**teacher.attention, 6: local})
    losses = build_recipe("internal", STUDENT, TEACHER)(student, teacher, None)
    kl = AttentionKLLoss()

    def one(i, j, window):
        s, t = student.attention[i], teacher.attention[j]
        return kl(
            *(s.query, s.key, t.query, t.key, student.attention_mask),
            window=window,
            scale_s=0.5,
            scale_t=0.5,
        )

    torch.testing.assert_close(losses["attention_kl"], one(1, 3, None) + one(2, 6, 1))


def test_mapped_layers_that_attend_to_different_tokens_are_an_error(captured):
    student, teacher = captured(STUDENT), captured(TEACHER)
    local = dataclasses.replace(student.attention[2], window=1)
    student = dataclasses.replace(student, attention={**student.attention, 2: local})
    with pytest.raises(InputError, match="student layer 2 .*window 1.* teacher layer 6"):
        build_recipe("internal", STUDENT, TEACHER)(student, teacher, None)


def test_differing_head_counts_are_an_error_that_names_both_ways_out():
    student = ModelShape(layers=2, width=8, heads=4, classes=3)
    with pytest.raises(InputError, match="relation_heads.*match_heads"):
        build_recipe("internal", student, TEACHER)


@pytest.mark.parametrize("options", [{"relation_heads": 4}, {"match_heads": "mean"}])
def test_differing_head_counts_meet_with_either_option(captured, options):
    student = ModelShape(layers=2, width=8, heads=4, classes=3)
    recipe = build_recipe("internal", student, TEACHER, **options)
    losses = recipe(captured(student), captured(TEACHER), None)
    assert losses["attention_kl"].isfinite() and losses["attention_kl"] > 0


def test_a_narrower_student_gets_a_learned_projection_for_its_cosine(captured):
    student = ModelShape(layers=2, width=4, heads=2, classes=3)
    recipe = build_recipe("internal", student, TEACHER)
    assert [tuple(p.shape) for p in recipe.parameters()] == [(8, 4), (8, 4)]
    assert recipe(captured(student), captured(TEACHER), None)["cosine"].isfinite()


def test_fsd_compares_the_penultimate_layers(captured):
    student, teacher = captured(STUDENT), captured(TEACHER)
    recipe = build_recipe("fsd", STUDENT, TEACHER, global_weight=0.0)
    losses = recipe(student, teacher, None)
    h_s, h_t, mask = student.hidden_states[1], teacher.hidden_states[5], student.attention_mask
    torch.testing.assert_close(losses["intra"], CKALoss("tokens")(h_s, h_t, mask))
    torch.testing.assert_close(losses["local"], CKALoss("samples")(h_s, h_t, mask))


def test_universal_teaches_the_projected_pseudo_logits(captured):
    recipe = fit(build_recipe("universal", STUDENT, TEACHER), captured)
    student, teacher = captured(STUDENT), captured(TEACHER)
    losses = recipe(student, teacher, LABELS)
    assert set(losses) == {"soft_labels", "projection"}
    own, theirs = recipe.terms["projection"].student, recipe.terms["projection"].teacher
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
    torch.testing.assert_close(
        recipe.terms["projection"].projection_weights(student, teacher), weights.mT
    )


def test_fitted_pseudo_classifiers_are_logistic_regressions_of_the_labels(captured):
    """Against scikit-learn on the states themselves, and frozen afterwards."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    torch.manual_seed(0)
    recipe = build_recipe("universal", STUDENT, TEACHER, pseudo_c=0.1)
    batches = [(captured(TEACHER, rows=32), torch.randint(3, (32,))) for _ in range(3)]
    part = recipe.fitted["projection.teacher"]
    with torch.no_grad():
        part.fit(lambda: batches)
    x = torch.cat([c.hidden_states[2][:, 0] for c, _ in batches]).numpy()
    y = torch.cat([labels for _, labels in batches]).numpy()
    scaler = StandardScaler().fit(x)
    expected = LogisticRegression(C=0.1, max_iter=1000).fit(scaler.transform(x), y)
    found = part.classifiers[1](torch.from_numpy(x)).softmax(-1)
    torch.testing.assert_close(
        found,
        torch.from_numpy(expected.predict_proba(scaler.transform(x))).float(),
        rtol=1e-3,
        atol=1e-4,
    )
    assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("seen", [[0, 2], [1]])
def test_pseudo_classifiers_of_classes_that_no_sentence_has_are_never_chosen(captured, seen):
    recipe = build_recipe("universal", STUDENT, TEACHER)
    part = recipe.fitted["projection.teacher"]
    teacher = captured(TEACHER, rows=12)
    labels = torch.tensor(seen)[torch.arange(12) % len(seen)]
    with torch.no_grad():
        part.fit(lambda: [(teacher, labels)])
    for logits in part(teacher):
        assert set(logits.argmax(-1).tolist()) <= set(seen)


def test_joint_pseudo_classifiers_learn_the_labels_and_not_to_meet_the_student(captured):
    recipe = build_recipe("universal", STUDENT, TEACHER, pseudo_classifiers="joint")
    assert not recipe.fitted
    student, teacher = captured(STUDENT), captured(TEACHER)
    losses = recipe(student, teacher, LABELS)
    theirs = recipe.terms["projection"].teacher
    labels = torch.stack([F.cross_entropy(z, LABELS) for z in theirs(teacher)]).mean()
    torch.testing.assert_close(losses["pseudo_labels"], labels)
    losses["projection"].backward()
    assert all(p.grad is None for p in theirs.parameters())


def test_free_pseudo_classifiers_of_both_sides_learn_from_the_projection(captured):
    recipe = build_recipe("universal", STUDENT, TEACHER, pseudo_classifiers="free")
    losses = recipe(captured(STUDENT), captured(TEACHER), LABELS)
    losses["projection"].backward()
    assert all(p.grad is not None for p in recipe.terms["projection"].teacher.parameters())


def test_the_capacity_gap_is_bridged_by_all_outputs_of_the_teacher(captured):
    recipe = fit(build_recipe("universal", STUDENT, TEACHER, capacity_gap=True), captured)
    student, teacher = captured(STUDENT), captured(TEACHER)
    term = recipe.terms["projection"]
    assert term.student is None and not [p for p in recipe.parameters() if p.requires_grad]
    z_t = torch.stack([*term.teacher(teacher), teacher.logits], 1)
    weights = (z_t @ student.logits[..., None]).softmax(1)
    mixture = (weights * z_t).sum(1)
    expected = F.kl_div(
        student.logits.log_softmax(-1),
        mixture.log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(recipe(student, teacher, LABELS)["projection"], expected)


def test_universal_trains_on_labels_alone_in_its_second_stage(captured):
    recipe = build_recipe("universal", STUDENT, TEACHER, label_share=0.25)
    first, second = recipe.stages
    assert (second.terms, second.share, second.restart) == (("classification",), 0.25, True)
    assert recipe.needs(1) == (Needs(logits=True), Needs())
    student = captured(STUDENT)
    losses = recipe(student, None, LABELS, Moment(stage=1))
    torch.testing.assert_close(losses["classification"], F.cross_entropy(student.logits, LABELS))
    assert len(build_recipe("universal", STUDENT, TEACHER, label_share=0.0).stages) == 1


@pytest.mark.parametrize(
    ("schedule", "expected"), [("progressive", [(1,), (2,)]), ("stacked", [(1,), (1, 2)])]
)
def test_internal_schedules_go_from_the_bottom_to_the_top_and_end_with_the_outputs(
    captured, schedule, expected
):
    recipe = build_recipe("internal", STUDENT, TEACHER, schedule=schedule, cosine_threshold=0.1)
    *layers, last = recipe.stages
    assert [stage.layers for stage in layers] == expected
    assert all(stage.terms == ("attention_kl", "cosine") for stage in layers)
    assert all(stage.until.term == "cosine" and stage.until.below == 0.1 for stage in layers)
    assert last.terms == ("soft_labels",)
    student, teacher = captured(STUDENT), captured(TEACHER)
    pairs = {1: 3, 2: 6}
    for number, stage in enumerate(layers):
        losses = recipe(student, teacher, None, Moment(stage=number))
        cosine = sum(
            CosineLoss()(student.hidden_states[i], teacher.hidden_states[pairs[i]])
            for i in stage.layers
        )
        torch.testing.assert_close(losses["cosine"], cosine)
        alone = sum(
            build_recipe("internal", STUDENT, TEACHER, layer_map=[[i, pairs[i]]])(
                student, teacher, None
            )["attention_kl"]
            for i in stage.layers
        )
        torch.testing.assert_close(losses["attention_kl"], alone)


def test_a_narrower_student_uses_the_projection_of_the_layer_in_training(captured):
    student = ModelShape(layers=2, width=4, heads=2, classes=3)
    recipe = build_recipe("internal", student, TEACHER, schedule="progressive")
    losses = recipe(captured(student), captured(TEACHER), None, Moment(stage=1))
    losses["cosine"].backward()
    first, second = recipe.parameters()
    assert first.grad is None and second.grad is not None


def test_fsd_global_is_the_memory_loss_of_the_penultimate_layer(captured):
    recipe = fit(
        build_recipe("fsd", STUDENT, TEACHER, max_length=5, clusters=5, memory_balance=0.25),
        captured,
    )
    student, teacher = captured(STUDENT), captured(TEACHER)
    loss = recipe.terms["global"].memories[0].loss
    found = recipe(student, teacher, None)["global"]
    parts = loss.parts(student.hidden_states[1], teacher.hidden_states[5], student.attention_mask)
    torch.testing.assert_close(
        found, 0.25 * parts["euclidean"] + 0.75 * parts["cosine"] + parts["memory"]
    )
    assert loss.teacher_memory.shape == (5, 5 * 8) and not loss.teacher_memory.requires_grad
    assert "5 × 5 × 8" in recipe.table()


def test_a_memory_is_fitted_to_the_samples_and_read_back(captured):
    """Sentences of two kinds: two centroids, each the mean of its kind."""
    recipe, again = (
        build_recipe("fsd", STUDENT, TEACHER, max_length=5, clusters=2) for _ in range(2)
    )
    (part,), (other,) = recipe.fitted.values(), again.fitted.values()
    one = captured(TEACHER, rows=8)
    states = dict(one.hidden_states)
    states[5] = 0.01 * torch.randn(8, 5, 8) + 10.0 * (torch.arange(8) % 2)[:, None, None]
    one = dataclasses.replace(one, hidden_states=states, attention_mask=None)
    with torch.no_grad():
        part.fit(lambda: [(one, None)])
    means = part.loss.teacher_memory.mean(1).sort().values
    torch.testing.assert_close(means, torch.tensor([0.0, 10.0]), atol=0.1, rtol=0)
    before = other.loss.student_memory.clone()
    other.load_fitted(part.fitted_state())
    assert torch.equal(other.loss.teacher_memory, part.loss.teacher_memory)
    assert torch.equal(other.loss.student_memory, before)


def test_a_memory_too_large_for_this_machine_is_refused_with_its_size():
    student = dataclasses.replace(STUDENT, width=768)
    with pytest.raises(InputError, match="GB"):
        build_recipe("fsd", student, TEACHER, clusters=10_000_000, max_length=512)
    with pytest.raises(InputError, match="max_length"):
        build_recipe("fsd", STUDENT, TEACHER)


def test_alp_projects_all_teacher_layers_on_each_student_layer(captured):
    student, teacher = captured(STUDENT), captured(TEACHER)
    recipe = build_recipe("alp", STUDENT, TEACHER, scale="width")
    h, g = (
        torch.stack([x[:, 0] for i, x in side.hidden_states.items() if i], 1)
        for side in (student, teacher)
    )
    weights = (h @ g.mT * 8**-0.5).softmax(-1)
    expected = (weights @ g - h).square().mean((0, 2)).sum()
    torch.testing.assert_close(recipe(student, teacher, LABELS)["projection"], expected)
    term = recipe.terms["projection"]
    torch.testing.assert_close(term.projection_weights(student, teacher), weights)
    tokens = build_recipe("alp", STUDENT, TEACHER, rows="tokens").terms["projection"]
    assert tokens.projection_weights(student, teacher).shape == (4, 2, 6)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_means_over_tokens_are_of_fp32_in_any_dtype(dtype, padded):
    torch.manual_seed(0)
    lengths = torch.tensor([40, 1, 0] if padded else [64, 64, 64])
    mask = (torch.arange(64) < lengths[:, None]).long()
    states = (torch.randn(3, 64, 8) + 3).to(dtype).requires_grad_()
    upstream = torch.randn(3, 8)
    (mean,) = pooled([states], mask if padded else None, "mean")
    mean.backward(upstream)
    share = (mask / lengths.clamp(min=1)[:, None])[..., None].double()
    exact = (states.detach().double() * share).sum(1)
    torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=1e-6)
    gradient = (share * upstream[:, None].double()).to(dtype)
    torch.testing.assert_close(states.grad, gradient)


def test_embedders_without_heads_learn_pooled_states_and_internals(captured):
    student, teacher = (dataclasses.replace(s, classes=None) for s in (STUDENT, TEACHER))
    s, t = captured(student), captured(teacher)
    losses = build_recipe("embedding", student, teacher)(s, t, None)
    mask = s.attention_mask[..., None]
    means = [(x.hidden_states[max(x.hidden_states)] * mask).sum(1) / mask.sum(1) for x in (s, t)]
    torch.testing.assert_close(losses["pooled"], (1 - F.cosine_similarity(*means)).mean())
    assert set(losses) == {"pooled", "attention_kl", "cosine"}
    with pytest.raises(InputError, match="soft_label_weight"):
        build_recipe("internal", student, teacher)
    assert "cosine" in build_recipe("internal", student, teacher, soft_label_weight=0.0).terms


def test_token_classifiers_learn_the_distribution_of_every_valid_token(captured):
    student, teacher = (dataclasses.replace(s, token_logits=True) for s in (STUDENT, TEACHER))
    s, t = captured(student), captured(teacher)
    recipe = build_recipe("soft_labels", student, teacher, label_weight=1.0, temperature=1.0)
    labels = torch.full((4, 5), -100)
    labels[:, 1] = torch.arange(4) % 3
    losses = recipe(s, t, labels)
    keep = s.attention_mask.bool()
    expected = F.kl_div(
        s.logits.log_softmax(-1)[keep],
        t.logits.log_softmax(-1)[keep],
        log_target=True,
        reduction="batchmean",
    )
    torch.testing.assert_close(losses["soft_labels"], expected)
    torch.testing.assert_close(losses["labels"], F.cross_entropy(s.logits[:, 1], labels[:, 1]))
    assert recipe.token_aligned == ["soft_labels"]
    with pytest.raises(InputError, match="of sequences"):
        build_recipe("universal", student, teacher)


def test_attention_losses_on_a_model_without_attention_are_refused():
    student = ModelShape(layers=2, width=8, heads=0, classes=3)
    with pytest.raises(InputError, match="student has no attention"):
        build_recipe("internal", student, TEACHER, cosine_rows="tokens")
    options = {"attention_weight": 0.0, "cosine_rows": "tokens"}
    assert "cosine" in build_recipe("internal", student, TEACHER, **options).terms


@pytest.mark.parametrize(
    "shape",
    [
        dataclasses.replace(STUDENT, heads=0, pool="mean"),
        dataclasses.replace(STUDENT, pool="last"),
    ],
)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("internal", {"attention_weight": 0.0}),
        ("alp", {}),
        ("pkd", {}),
        ("universal", {"pool": "cls"}),
    ],
)
def test_the_first_state_of_a_model_without_cls_is_not_taken_for_it(shape, name, options):
    with pytest.raises(InputError, match="first state of the student"):
        build_recipe(name, shape, TEACHER, **options)


def test_pseudo_classifiers_of_causal_models_read_the_last_token(captured):
    shape = dataclasses.replace(TEACHER, pool="last")
    part = build_recipe("universal", STUDENT, shape).fitted["projection.teacher"]
    teacher = captured(TEACHER)
    found = part.states(teacher)[1]
    expected = [teacher.hidden_states[2][row, last] for row, last in enumerate([2, 4, 4, 4])]
    torch.testing.assert_close(found, torch.stack(expected))


def test_pseudo_classifiers_keep_their_digits_under_autocast(captured):
    recipe = fit(build_recipe("universal", STUDENT, TEACHER, pseudo_c=1.0), captured)
    part = recipe.fitted["projection.teacher"]
    teacher = captured(TEACHER)
    far = {i: h + 100 for i, h in teacher.hidden_states.items()}
    teacher = dataclasses.replace(teacher, hidden_states=far)
    expected = part(teacher)
    with torch.autocast("cpu", torch.bfloat16):
        for found, wanted in zip(part(teacher), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_pseudo_classifiers_cannot_be_fitted_without_labels(captured):
    part = build_recipe("universal", STUDENT, TEACHER).fitted["projection.teacher"]
    with pytest.raises(InputError, match="fitted to labels"):
        part.fit(lambda: [(captured(TEACHER), None)])


def test_rows_without_a_label_are_left_out_of_the_fit(captured):
    parts = [
        build_recipe("universal", STUDENT, TEACHER).fitted["projection.teacher"] for _ in range(2)
    ]
    teacher, labels = captured(TEACHER, rows=12), torch.arange(12) % 3
    whole = dataclasses.replace(
        teacher,
        hidden_states={i: h[:9] for i, h in teacher.hidden_states.items()},
        attention_mask=teacher.attention_mask[:9],
    )
    with torch.no_grad():
        parts[0].fit(lambda: [(whole, labels[:9])])
        labels[9:] = -100
        parts[1].fit(lambda: [(teacher, labels)])
    for one, two in zip(*(part(teacher) for part in parts), strict=True):
        torch.testing.assert_close(one, two)


def test_models_without_a_head_learn_layer_by_layer_from_stages_of_their_own(captured):
    student, teacher = (dataclasses.replace(s, classes=None) for s in (STUDENT, TEACHER))
    with pytest.raises(InputError, match="without a head, take recipe 'custom' and list .* stages"):
        build_recipe("internal", student, teacher, schedule="stacked", soft_label_weight=0.0)
    stages = [{"name": "lower", "layers": [1]}, {"name": "both", "layers": [1, 2]}]
    losses = [{"loss": "attention_kl"}, {"loss": "cosine"}]
    recipe = build_recipe("custom", student, teacher, losses=losses, stages=stages)
    assert [stage.layers for stage in recipe.stages] == [(1,), (1, 2)]
    assert recipe.needs(0)[0].hidden_states == {1}


def test_terms_of_weight_zero_are_neither_computed_nor_captured_for():
    recipe = build_recipe("internal", STUDENT, TEACHER, attention_weight=0.0)
    assert "attention_kl" not in recipe.terms
    assert not any(needs.attention for needs in recipe.needs())
    assert build_recipe("labels", STUDENT, TEACHER).needs_teacher() is False


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
        (
            "universal",
            {"pseudo_classifiers": "joint", "pseudo_label_weight": 0.0},
            "pseudo_label_weight",
        ),
        ("universal", {"pseudo_classifiers": "fited"}, "one of fitted, joint, free"),
        ("universal", {"label_share": 1.0}, "label_share"),
        ("internal", {"schedule": "stackd"}, "simultaneous, progressive, stacked"),
        ("internal", {"cosine_threshold": 0.1}, "schedule"),
        ("internal", {"layer_steps": "3", "schedule": "stacked"}, "whole number"),
        ("fsd", {"clusters": 4.5}, "whole number"),
        ("minilmv2", {"relation_heads": "4"}, "whole number"),
        ("internal", {"attention_weight": [[0.5, 1], [0.1, 2]]}, "rise in progress"),
        ("internal", {"soft_labels_throughout": "no"}, "must be true or false, was 'no'"),
        ("universal", {"capacity_gap": "nope"}, "must be true or false, was 'nope'"),
        ("hidden", {"embeddings": 1}, "must be true or false, was 1"),
        ("alp", {"scale": "wide"}, "width"),
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


def test_regression_compares_values(captured):
    student, teacher = (
        dataclasses.replace(shape, classes=1, regression=True) for shape in (STUDENT, TEACHER)
    )
    for name in RECIPES:
        recipe = build_recipe(name, student, teacher, **OPTIONS.get(name, {}))
        with torch.no_grad():
            for part in recipe.fitted.values():
                part.fit(lambda: [(captured(teacher, rows=128), torch.randn(128))])
        for number in range(len(recipe.stages)):
            losses = recipe(
                captured(student), captured(teacher), torch.randn(4), Moment(stage=number)
            )
            assert all(loss.isfinite() for loss in losses.values())


RELEVANCE = [
    dataclasses.replace(s, classes=1, regression=True, binary=True) for s in (STUDENT, TEACHER)
]


def test_a_relevance_is_learned_by_binary_cross_entropy_and_soft_labels_by_values(captured):
    student, teacher = map(captured, RELEVANCE)
    labels = torch.tensor([0.0, 1.0, 0.25, 1.0])
    losses = build_recipe("soft_labels", *RELEVANCE, label_weight=1)(student, teacher, labels)
    p = student.logits[:, 0].sigmoid()
    expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    torch.testing.assert_close(losses["labels"], expected)
    squared = (student.logits - teacher.logits).square().mean()
    torch.testing.assert_close(losses["soft_labels"], squared)


@pytest.mark.parametrize("pseudo", ["fitted", "joint"])
def test_grades_that_are_no_relevance_are_refused_with_what_to_do(captured, pseudo):
    recipe = build_recipe("universal", *RELEVANCE, pseudo_classifiers=pseudo)
    grades = torch.tensor([0.0, 3.0, 1.0, 2.0])
    refused = pytest.raises(InputError, match="from 0 to 3: divide .*data.kind=regression")
    with refused, torch.no_grad():
        for part in recipe.fitted.values():
            part.fit(lambda: [(captured(TEACHER), grades)])
        recipe(*map(captured, RELEVANCE), grades)


def test_pseudo_classifiers_of_a_relevance_are_logistic_regressions_of_its_shares(captured):
    """A relevance of ¼ is one relevant row and three that are not, each a quarter of the weight."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    torch.manual_seed(0)
    part = build_recipe("universal", *RELEVANCE, pseudo_c=0.1).fitted["projection.teacher"]
    teacher, quarters = captured(TEACHER, rows=48), torch.randint(5, (48,))
    part.fit(lambda: [(teacher, quarters / 4)])
    x = teacher.hidden_states[2][:, 0].numpy()
    rows = StandardScaler().fit_transform(x).repeat(4, axis=0)
    labels = (torch.arange(4) < quarters[:, None]).flatten().numpy()
    expected = LogisticRegression(C=0.1 / 4, max_iter=1000).fit(rows, labels)
    torch.testing.assert_close(
        part.classifiers[1](torch.from_numpy(x)).detach()[:, 0],
        torch.from_numpy(expected.decision_function(rows[::4])).float(),
        rtol=1e-3,
        atol=1e-3,
    )
    for same in (torch.zeros(48), torch.ones(48)):
        part = build_recipe("universal", *RELEVANCE).fitted["projection.teacher"]
        part.fit(lambda same=same: [(teacher, same)])
        assert all((z[:, 0] > 0).equal(same > 0) for z in part(teacher))


def test_states_without_padding_are_made_once_for_all_who_ask():
    torch.manual_seed(0)
    states = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    captured = Captured(None, {1: states}, attention_mask=mask)
    masked = captured.masked_states(1, mask)
    assert captured.masked_states(1, mask) is masked
    assert captured.masked_states(1, None) is states
    assert captured.masked_states(1, mask.clone()) is not masked
    torch.testing.assert_close(masked, states * mask[..., None])
    for _ in range(2):  # two losses, each with a backward pass of its own
        (grad,) = torch.autograd.grad(masked.square().sum(), states)
        torch.testing.assert_close(grad, 2 * states * mask[..., None])
    captured.release(Needs())
    assert not captured._masked


@pytest.mark.parametrize("padding", ["masked", "counted"])
def test_fsd_with_shared_states_is_that_of_its_losses(padding):
    torch.manual_seed(0)
    recipe = build_recipe(
        "fsd", STUDENT, TEACHER, clusters=4, max_length=5, padding=padding, soft_label_weight=0.0
    )
    for part in recipe.fitted.values():
        part.stand_in()
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    student, teacher = (
        Captured(None, {layer: torch.randn(3, 5, 8)}, attention_mask=mask) for layer in (1, 5)
    )
    found = recipe(student, teacher, None)
    given = student.hidden_states[1], teacher.hidden_states[5], mask
    for name, term in recipe.terms.items():
        loss = term.memories[0].loss if name == "global" else term.loss
        torch.testing.assert_close(found[name], loss(*given))
