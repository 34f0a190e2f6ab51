"""Losses on logits against formulas written out here."""

import pytest
import torch

from kdfast.losses import AnnealingLoss, SoftLabelLoss, annealing_factor


def logits(*shape):
    return [torch.randn(*shape, dtype=torch.float64) for _ in range(2)]


def test_soft_labels_scale_the_divergence_by_squared_temperature():
    s, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    p, q = (t / 2).softmax(-1), (s / 2).softmax(-1)
    expected = 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(SoftLabelLoss(2.0)(s, t), expected)


def test_soft_labels_of_equal_logits_are_exactly_zero():
    logits = torch.randn(4, 3)
    assert SoftLabelLoss()(logits, logits) == 0


def test_soft_labels_for_regression_are_the_mean_squared_difference():
    s, t = torch.randn(4, 1), torch.randn(4, 1)
    torch.testing.assert_close(SoftLabelLoss(regression=True)(s, t), (s - t).square().mean())


def test_soft_labels_of_one_class_point_to_regression():
    with pytest.raises(ValueError, match="regression"):
        SoftLabelLoss()(torch.randn(4, 1), torch.randn(4, 1))


def test_soft_labels_of_tokens_average_over_valid_tokens():
    s, t = logits(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    p, q = t[mask.bool()].softmax(-1), s[mask.bool()].softmax(-1)
    torch.testing.assert_close(SoftLabelLoss()(s, t, mask), (p * (p / q).log()).sum(-1).mean())


def test_soft_labels_without_a_valid_token_are_zero_with_zero_gradient():
    s, t = logits(2, 4, 3)
    loss = SoftLabelLoss()(s.requires_grad_(), t, torch.zeros(2, 4))
    loss.backward()
    assert loss == 0 and s.grad.abs().sum() == 0


def test_soft_labels_of_pkd_are_the_mean_over_elements_times_squared_temperature():
    s, t = logits(4, 3)
    p, q = (t / 10).softmax(-1), (s / 10).softmax(-1)
    loss = SoftLabelLoss(10.0, normalize="elements")(s, t)
    torch.testing.assert_close(loss, 100 * (p * (p / q).log()).mean())


def test_soft_labels_of_tinybert_are_the_mean_cross_entropy_over_elements():
    s, t = logits(4, 3)
    loss = SoftLabelLoss(2.0, divergence="cross_entropy", normalize="elements", rescale=False)
    torch.testing.assert_close(loss(s, t), -((t / 2).softmax(-1) * (s / 2).log_softmax(-1)).mean())


def test_masked_regression_averages_over_valid_rows():
    s, t = logits(4, 1)
    mask = torch.tensor([1, 0, 1, 1])
    expected = (s - t)[mask.bool()].square().mean()
    torch.testing.assert_close(SoftLabelLoss(regression=True)(s, t, mask), expected)


def test_annealing_compares_with_the_scaled_teacher():
    s, t = logits(4, 3)
    torch.testing.assert_close(AnnealingLoss()(s, t, 0.3), (s - 0.3 * t).square().mean())


def test_annealing_of_tokens_averages_over_valid_ones():
    s, t = logits(2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    expected = (s - 0.5 * t)[mask.bool()].square().mean()
    torch.testing.assert_close(AnnealingLoss()(s, t, 0.5, mask), expected)


def test_annealing_factor_climbs_to_one_in_equal_steps():
    factors = [annealing_factor(k / 8, 4) for k in range(9)]
    assert factors == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1, 1]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: SoftLabelLoss(divergence="js"), "divergence"),
        (lambda: SoftLabelLoss(normalize="batch"), "normalize"),
        (lambda: SoftLabelLoss(unit="words"), "unit"),
        (lambda: SoftLabelLoss()(*logits(2, 3), torch.ones(3)), "mask"),
        (lambda: AnnealingLoss()(torch.zeros(2, 3), torch.zeros(2, 4), 1.0), "same shape"),
        (lambda: annealing_factor(1.5, 4), "progress"),
        (lambda: annealing_factor(0.5, 0), "max_temperature"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()


@pytest.mark.parametrize(
    "loss",
    [SoftLabelLoss(3.0), SoftLabelLoss(divergence="cross_entropy", normalize="elements")],
)
def test_gradients_match_finite_differences(loss):
    s, t = logits(4, 3)
    assert torch.autograd.gradcheck(lambda x: loss(x, t), (s.requires_grad_(),))
