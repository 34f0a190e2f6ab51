"""The loss modules against formulas written out here."""

import pytest
import torch
from torch.nn import functional as F

from kdfast.losses import (
    AnnealingLoss,
    AttentionKLLoss,
    AttentionScoreLoss,
    CKALoss,
    ClusteredMemoryLoss,
    CosineLoss,
    HiddenMSELoss,
    LayerProjectionLoss,
    RelationKLLoss,
    RKDLoss,
    SoftLabelLoss,
)

B, N, D = 3, 5, 8


@pytest.fixture
def mask():
    mask = torch.ones(B, N, dtype=torch.long)
    mask[0, 3:] = 0
    mask[2, 2:] = 0
    return mask


def states(width=D, count=1, dtype=torch.float64):
    return [torch.randn(B, N, width, dtype=dtype) for _ in range(count)]


def maps(query, key, mask):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~mask.bool()[:, None, None, :], -torch.inf).log_softmax(-1)


def map_divergence(qs, ks, qt, kt, mask):
    """KL over valid query rows of all heads, mean, written with dense maps."""
    log_s, log_t = maps(qs, ks, mask), maps(qt, kt, mask)
    rows = torch.where(log_t > -torch.inf, log_t.exp() * (log_t - log_s), 0).sum(-1)
    return rows.transpose(1, 2)[mask.bool()].mean()


def heads(width=4, count=2):
    return torch.randn(B, count, N, width, dtype=torch.float64)


def test_attention_kl_loss_sums_dense_divergences_over_layers(mask):
    layers = [(heads(), heads(), heads(6), heads(6)) for _ in range(3)]
    loss = AttentionKLLoss()(*map(list, zip(*layers, strict=True)), attention_mask=mask)
    torch.testing.assert_close(loss, sum(map_divergence(*layer, mask) for layer in layers))


def test_attention_kl_loss_takes_a_single_layer(mask):
    layer = (heads(), heads(), heads(), heads())
    torch.testing.assert_close(AttentionKLLoss()(*layer, mask), map_divergence(*layer, mask))


def test_attention_kl_loss_with_mean_over_layers_divides_by_their_number(mask):
    layers = [[heads() for _ in range(2)] for _ in range(4)]
    total = AttentionKLLoss()(*layers, mask)
    torch.testing.assert_close(AttentionKLLoss(layers="mean")(*layers, mask), total / 2)


def test_relation_kl_regroups_heads_and_sums_three_relations(mask):
    # Student: 2 heads of 6; teacher: 4 heads of 4; 2 relation heads of widths 6 and 8.
    student = [torch.randn(B, 2, N, 6, dtype=torch.float64) for _ in range(3)]
    teacher = [torch.randn(B, 4, N, 4, dtype=torch.float64) for _ in range(3)]

    def regroup(x):
        return x.transpose(1, 2).flatten(2).unflatten(-1, (2, -1)).transpose(1, 2)

    expected = sum(
        map_divergence(regroup(s), regroup(s), regroup(t), regroup(t), mask)
        for s, t in zip(student, teacher, strict=True)
    )
    loss = RelationKLLoss(2)(*student, *teacher, mask)
    torch.testing.assert_close(loss, expected)


def test_cosine_loss_on_cls_ignores_every_other_token():
    (s,), (t,) = states(), states()
    expected = (1 - F.cosine_similarity(s[:, 0], t[:, 0])).mean()
    torch.testing.assert_close(CosineLoss()(s, t), expected)


def test_cosine_loss_on_tokens_averages_over_valid_tokens(mask):
    (s,), (t,) = states(), states()
    expected = (1 - F.cosine_similarity(s, t, dim=-1))[mask.bool()].mean()
    torch.testing.assert_close(CosineLoss("tokens")(s, t, mask), expected)


def test_hidden_mse_averages_over_valid_tokens_and_features(mask):
    (s,), (t,) = states(), states()
    expected = (s - t)[mask.bool()].square().mean()
    torch.testing.assert_close(HiddenMSELoss()(s, t, mask), expected)


def test_normalised_hidden_mse_compares_unit_vectors():
    (s,), (t,) = states(), states()
    unit = [x[:, 0] / x[:, 0].norm(dim=-1, keepdim=True) for x in (s, t)]
    expected = (unit[0] - unit[1]).square().mean()
    torch.testing.assert_close(HiddenMSELoss("cls", normalize=True)(s, t), expected)


@pytest.mark.parametrize("loss", [CosineLoss, HiddenMSELoss])
def test_widths_that_differ_meet_in_one_trained_projection_per_pair(loss):
    module = loss("tokens", student_width=4, teacher_width=D, pairs=2).double()
    assert [tuple(p.shape) for p in module.parameters()] == [(D, 4)] * 2
    module(states(4, 2), states(D, 2)).backward()
    assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@pytest.mark.parametrize("loss", [CosineLoss, HiddenMSELoss])
def test_widths_that_differ_without_a_projection_are_an_error_that_says_so(loss):
    with pytest.raises(ValueError, match="student_width"):
        loss("tokens")(states(4), states(D))


def test_equal_widths_need_no_projection():
    assert not list(CosineLoss(student_width=D, teacher_width=D, pairs=3).parameters())


def dense_cka(x, y):
    k, t = x @ x.T, y @ y.T
    n = len(x)
    c = torch.eye(n, dtype=x.dtype) - 1 / n
    k, t = c @ k @ c, c @ t @ c
    return (k * t).sum() / (k.norm() * t.norm())


def test_cka_loss_on_tokens_is_the_mean_of_logarithms_over_samples(mask):
    (s,), (t,) = states(6), states(D)
    logs = [-dense_cka(s[b][mask[b].bool()], t[b][mask[b].bool()]).abs().log() for b in range(B)]
    torch.testing.assert_close(CKALoss()(s, t, mask), torch.stack(logs).mean())


def test_cka_loss_on_samples_flattens_tokens_with_padding_zeroed(mask):
    (s,), (t,) = states(6), states(D)
    m = mask[..., None]
    expected = -dense_cka((s * m).flatten(1), (t * m).flatten(1)).log()
    torch.testing.assert_close(CKALoss("samples")(s, t, mask), expected)


def test_cka_loss_one_minus_form():
    (s,), (t,) = states(6), states(D)
    expected = torch.stack([1 - dense_cka(s[b], t[b]) for b in range(B)]).mean()
    torch.testing.assert_close(CKALoss(form="one_minus")(s, t), expected)


def test_cka_loss_refuses_the_logarithm_of_an_estimate_that_may_be_negative():
    with pytest.raises(ValueError, match="one_minus"):
        CKALoss(estimator="unbiased")


@pytest.mark.parametrize("form", ["neg_log", "neg_log_of_mean", "one_minus", "one_minus_root"])
@pytest.mark.parametrize("rows", ["tokens", "samples", "all_tokens"])
def test_cka_loss_of_too_few_rows_is_zero_with_zero_gradient(rows, form):
    shape = {"samples": (1, N, D), "tokens": (B, 1, D), "all_tokens": (1, 1, D)}[rows]
    s = torch.randn(shape, dtype=torch.float16, requires_grad=True)
    loss = CKALoss(rows, form=form)([s, s], [torch.randn(shape)] * 2)
    loss.backward()
    assert loss == 0 and loss.dtype == torch.float32 and s.grad.abs().sum() == 0


def test_cka_loss_counts_samples_with_one_valid_token_as_zero(mask):
    mask[1, 1:] = 0
    (s,), (t,) = states(6), states(D)
    s.requires_grad_()
    kept = [b for b in range(B) if mask[b].sum() > 1]
    expected = CKALoss()(s[kept], t[kept], mask[kept]) * len(kept) / B
    loss = CKALoss()(s, t, mask)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert s.grad.isfinite().all() and s.grad[1].abs().sum() == 0


def test_cka_losses_of_micro_batches_average_to_that_of_the_joined_batch():
    s, t = torch.randn(4, N, 6), torch.randn(4, N, D)
    mask = torch.ones(4, N, dtype=torch.long)
    mask[1, 1:] = 0  # no CKA of a single token
    halves = [CKALoss()(s[half], t[half], mask[half]) for half in (slice(2), slice(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, CKALoss()(s, t, mask))


def test_cka_loss_of_the_mean_takes_the_logarithm_last(mask):
    (s,), (t,) = states(6), states(D)
    values = [dense_cka(s[b][mask[b].bool()], t[b][mask[b].bool()]).abs() for b in range(B)]
    expected = -(torch.stack(values).mean() + 1e-8).log()
    torch.testing.assert_close(CKALoss(form="neg_log_of_mean")(s, t, mask), expected)


def test_cka_loss_without_masking_counts_padded_positions(mask):
    (s,), (t,) = states(6), states(D)
    for rows in ("tokens", "samples", "all_tokens"):
        loss = CKALoss(rows, padding="counted")(s, t, mask)
        torch.testing.assert_close(loss, CKALoss(rows)(s, t))


def test_hidden_state_matching_is_one_minus_the_ratio_of_norms_over_all_valid_tokens(mask):
    (s,), (t,) = states(3), states(4)
    x, y = ((h[mask.bool()] - h[mask.bool()].mean(0)) for h in (s, t))
    expected = 1 - (x.T @ y).norm() / ((x.T @ x).norm() * (y.T @ y).norm()).sqrt()
    torch.testing.assert_close(CKALoss("all_tokens", form="one_minus_root")(s, t, mask), expected)


@pytest.mark.parametrize("form", ["neg_log", "neg_log_of_mean", "one_minus", "one_minus_root"])
def test_features_without_alignment_have_finite_gradients(form):
    s = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    t = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]])
    CKALoss(form=form)(s, t).backward()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("form", ["neg_log", "neg_log_of_mean", "one_minus", "one_minus_root"])
@pytest.mark.parametrize("rows", ["tokens", "samples", "all_tokens"])
def test_cka_loss_of_student_equal_to_teacher_is_zero(rows, form, mask):
    (s,) = states()
    assert CKALoss(rows, form=form)(s, s, mask).abs() < 2e-8


def test_losses_say_what_their_mean_runs_over_and_whether_they_couple_samples():
    expected = {
        CosineLoss(): ("samples", False),
        HiddenMSELoss(): ("tokens", False),
        AttentionKLLoss(): ("tokens", False),
        RelationKLLoss(2): ("tokens", False),
        CKALoss(): ("samples", False),
        CKALoss("samples"): ("samples", True),
        CKALoss("all_tokens"): ("samples", True),
        CKALoss(form="neg_log_of_mean"): ("samples", True),
        RKDLoss(): ("samples", True),
        ClusteredMemoryLoss(2, 1, 1, 1): ("samples", False),
        AttentionScoreLoss(): ("samples", False),
        AnnealingLoss(): ("samples", False),
        SoftLabelLoss(unit="tokens"): ("tokens", False),
        LayerProjectionLoss(unit="tokens"): ("tokens", False),
    }
    assert {loss: (loss.unit, loss.couples_samples) for loss in expected} == expected


@pytest.mark.parametrize("loss", [CosineLoss, HiddenMSELoss])
def test_a_subset_of_pairs_uses_the_projections_of_those_pairs(loss):
    module = loss("tokens", student_width=4, teacher_width=D, pairs=3).double()
    s, t = states(4, 3), states(D, 3)
    some = module([s[2], s[0]], [t[2], t[0]], which=[2, 0])
    one = module([s[1]], [t[1]], which=[1])
    torch.testing.assert_close(some + one, module(s, t))
    some.backward()
    assert [p.grad is None for p in module.parameters()] == [False, True, False]


def test_layer_projection_of_a_subset_uses_its_projections():
    module = LayerProjectionLoss(student_width=4, teacher_width=D, pairs=3).double()
    s, t = states(4, 3), states(D, 2)
    parts = [module([s[k]], t, which=[k]) for k in range(3)]
    torch.testing.assert_close(sum(parts), module(s, t))


@pytest.mark.parametrize("which", [[0], [0, 3], [1, 1], [-1, 0]])
def test_numbers_that_name_no_pair_are_an_error(which):
    module = CosineLoss("tokens", student_width=4, teacher_width=D, pairs=3).double()
    with pytest.raises(ValueError, match="which"):
        module(states(4, 2), states(D, 2), which=which)


def test_minilm_value_relation_keeps_heads_and_needs_no_equal_widths(mask):
    value_s, value_t = heads(4), heads(6)
    loss = RelationKLLoss(relations=("value",))(None, None, value_s, None, None, value_t, mask)
    torch.testing.assert_close(loss, map_divergence(value_s, value_s, value_t, value_t, mask))


def test_relations_add_up():
    student, teacher = [heads() for _ in range(3)], [heads() for _ in range(3)]
    parts = [RelationKLLoss(relations=(r,))(*student, *teacher) for r in ("query", "key", "value")]
    torch.testing.assert_close(RelationKLLoss()(*student, *teacher), sum(parts))


def test_a_relation_without_its_states_is_an_error():
    with pytest.raises(ValueError, match="query_s"):
        RelationKLLoss()(None, heads(), heads(), heads(), heads(), heads())


def test_layer_projection_loss_sums_squared_distances_to_the_mixtures():
    student, teacher = states(count=2), states(count=4)
    expected = 0.0
    for h in student:
        weights = torch.stack([(h * g).sum(-1) for g in teacher], -1).softmax(-1)
        mixture = sum(weights[..., j, None] * g for j, g in enumerate(teacher))
        expected += (h - mixture).square().mean()
    torch.testing.assert_close(LayerProjectionLoss()(student, teacher), expected)
    mean = LayerProjectionLoss(layers="mean")(student, teacher)
    torch.testing.assert_close(mean, expected / 2)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: CosineLoss("words"), "rows"),
        (lambda: CKALoss("words"), "rows"),
        (lambda: LayerProjectionLoss(temperature=0.0), "temperature"),
        (lambda: LayerProjectionLoss(scale=float("inf")), "scale"),
        (lambda: CKALoss(form="log"), "form"),
        (lambda: CKALoss(form="one_minus_root", estimator="unbiased"), "unbiased"),
        (lambda: CKALoss(padding="none"), "padding"),
        (lambda: RelationKLLoss(relations=()), "relations"),
        (lambda: RelationKLLoss(relations=("value", "value")), "relations"),
        (lambda: RelationKLLoss(relations="value"), "relations"),
        (lambda: RelationKLLoss(relations=("values",)), "relations"),
        (lambda: LayerProjectionLoss(unit="words"), "unit"),
        (lambda: AttentionKLLoss(direction="up"), "direction"),
        (lambda: LayerProjectionLoss(objective="l1"), "objective"),
        (lambda: SoftLabelLoss(0.0), "temperature"),
        (lambda: CosineLoss(layers="max"), "layers"),
        (lambda: CosineLoss(student_width=4), "teacher_width"),
    ],
)
def test_bad_arguments_are_named(make, argument):
    with pytest.raises(ValueError, match=argument):
        make()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("make", [CosineLoss, HiddenMSELoss, CKALoss])
def test_half_precision_states_give_fp32_losses(make, dtype):
    loss = make()(states(dtype=dtype), states(dtype=dtype))
    assert loss.dtype == torch.float32 and loss.isfinite()


@pytest.mark.parametrize(
    "loss",
    [
        CosineLoss(),
        CosineLoss("tokens"),
        HiddenMSELoss(),
        CKALoss(),
        CKALoss("samples"),
        CKALoss(form="neg_log_of_mean"),
        CKALoss("all_tokens", form="one_minus_root"),
    ],
)
def test_gradients_match_finite_differences(loss, mask):
    (s,), (t,) = states(), states()
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, t, mask), (s,))
