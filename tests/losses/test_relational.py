"""Relational distillation against its formula, pair by pair and triplet by triplet."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from kdfast.losses import RKDLoss


def states(batch=5, width=7, dtype=torch.float64):
    return torch.randn(batch, width, dtype=dtype)


def distance_loss(s, t):
    def normalised(x):
        d = torch.stack([(a - b).norm() for a in x for b in x])
        return d / d[d > 0].mean()

    return F.smooth_l1_loss(normalised(s), normalised(t))


def angle_loss(s, t):
    def cosines(x):
        return torch.stack(
            [
                F.normalize(x[i] - x[j], dim=0) @ F.normalize(x[k] - x[j], dim=0)
                for i, j, k in itertools.product(range(len(x)), repeat=3)
            ]
        )

    return F.smooth_l1_loss(cosines(s), cosines(t))


def test_distance_and_angle_follow_the_paper():
    s, t = states(width=4), states() + 3
    torch.testing.assert_close(RKDLoss(1, 0)(s, t), distance_loss(s, t))
    torch.testing.assert_close(RKDLoss(0, 1)(s, t), angle_loss(s, t))
    torch.testing.assert_close(RKDLoss(3, 5)(s, t), 3 * distance_loss(s, t) + 5 * angle_loss(s, t))


def test_duplicate_rows_have_no_distance_and_finite_gradients():
    s, t = states(width=4), states()
    s[3], t[4] = s[1], t[2]
    s.requires_grad_()
    loss = RKDLoss()(s, t)
    torch.testing.assert_close(loss, distance_loss(s, t) + 2 * angle_loss(s, t))
    loss.backward()
    assert s.grad.isfinite().all()


def test_fp32_states_far_from_zero_keep_their_digits():
    s, t = states(), states()
    exact = RKDLoss()(s, t)
    found = RKDLoss()((s + 300).float(), (t - 500).float())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


def test_scale_and_rotation_of_the_teacher_do_not_matter():
    t = states()
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64))
    assert RKDLoss()(4 * t @ rotation, t) < 1e-20


@pytest.mark.parametrize("batch", [0, 1, 2])
def test_batches_too_small_for_a_relation_are_zero_with_zero_gradient(batch):
    s = states(batch, dtype=torch.float32).requires_grad_()
    loss = RKDLoss()(s, states(batch, dtype=torch.float32))
    loss.backward()
    assert loss.abs() < 1e-12 and not s.grad.abs().gt(1e-6).any()


def test_equal_rows_alone_are_zero_with_zero_gradient():
    s = torch.ones(4, 3, requires_grad=True)
    loss = RKDLoss()(s, torch.ones(4, 5))
    loss.backward()
    assert loss == 0 and s.grad.abs().sum() == 0


def test_layer_pairs_are_summed_or_averaged():
    s, t = [states(), states()], [states(), states()]
    total = RKDLoss()(s[0], t[0]) + RKDLoss()(s[1], t[1])
    torch.testing.assert_close(RKDLoss()(s, t), total)
    torch.testing.assert_close(RKDLoss(layers="mean")(s, t), total / 2)


def test_half_precision_under_autocast_gives_the_fp32_loss():
    s, t = states(dtype=torch.bfloat16), states(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = RKDLoss()(s, t)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, RKDLoss()(s.float(), t.float()))


def test_gradients_match_finite_differences():
    s, t = states(4, 3), states(4)
    assert torch.autograd.gradcheck(lambda x: RKDLoss()(x, t), (s.requires_grad_(),))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: RKDLoss(-1), "distance_weight"),
        (lambda: RKDLoss(layers="max"), "layers"),
        (lambda: RKDLoss()(states(3), states(4)), "same samples"),
        (lambda: RKDLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)), "same samples"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name):
        call()
