import itertools
import math

import numpy as np
import pytest
import torch

from kdfast import reference
from kdfast.ops import (
    CKATeacher,
    MinibatchCKA,
    cka,
    cka_matrix,
    dispatch,
    gram_distance,
    hsic,
    hsic_matrix,
)

pytestmark = pytest.mark.usefixtures("backend_on_cpu")

OPERATOR = "cka"
OPTIONS = {
    "linear biased": {"kernel": "linear", "estimator": "biased"},
    "linear unbiased": {"kernel": "linear", "estimator": "unbiased"},
    "rbf biased": {"kernel": "rbf", "estimator": "biased"},
    "rbf unbiased": {"kernel": "rbf", "estimator": "unbiased"},
    "rbf bandwidth": {"kernel": "rbf", "estimator": "biased", "bandwidth": 1.7},
    "rbf two bandwidths": {"kernel": "rbf", "estimator": "unbiased", "bandwidth": (0.9, 3.0)},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
estimators = pytest.mark.parametrize("estimator", ["biased", "unbiased"])
BOTH_SIDES = {hsic: {}, cka: {"teacher_grad": True}}
sides = pytest.mark.parametrize("side", ["gram", "feature"])


def features(*shape, dtype=torch.float64, shared=None):
    """Random features, correlated with `shared` when that is given."""
    x = torch.randn(shape, dtype=dtype)
    if shared is not None:
        x = x + shared @ torch.randn(shared.shape[-1], shape[-1], dtype=dtype)
    return x


def gram_by_hand(x, kernel, bandwidth):
    n = len(x)
    gram, squared = np.zeros((n, n)), np.zeros((n, n))
    for i, j in itertools.product(range(n), repeat=2):
        gram[i, j] = float(x[i] @ x[j])
        squared[i, j] = float(((x[i] - x[j]) ** 2).sum())
    if kernel == "linear":
        return gram
    variance = squared.sum() / (n * (n - 1)) if bandwidth is None else bandwidth**2
    return np.exp(-squared / (2 * variance))


def hsic_by_hand(x, y, *, kernel="linear", estimator="biased", bandwidth=None):
    """One problem: trace of the centred product, or Song et al.'s three terms."""
    widths = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
    k, c = (
        gram_by_hand(z.detach().double().numpy(), kernel, width)
        for z, width in zip((x, y), widths, strict=True)
    )
    n = len(k)
    if estimator == "biased":
        centre = np.eye(n) - np.ones((n, n)) / n
        return float(np.trace(k @ centre @ c @ centre)) / (n - 1) ** 2
    for gram in (k, c):
        np.fill_diagonal(gram, 0.0)
    one = np.ones(n)
    terms = (
        np.trace(k @ c)
        + (one @ k @ one) * (one @ c @ one) / ((n - 1) * (n - 2))
        - 2 / (n - 2) * (one @ k @ c @ one)
    )
    return float(terms) / (n * (n - 3))


def cka_by_hand(x, y, **options):
    width = options.pop("bandwidth", None)
    width_x, width_y = width if isinstance(width, tuple) else (width, width)
    cross = hsic_by_hand(x, y, bandwidth=width, **options)
    own_x = hsic_by_hand(x, x, bandwidth=width_x, **options)
    own_y = hsic_by_hand(y, y, bandwidth=width_y, **options)
    return cross / math.sqrt(own_x * own_y)


# The formula


@options
@pytest.mark.parametrize(("n", "d_x", "d_y"), [(4, 3, 5), (9, 2, 3), (5, 11, 7)])
def test_hsic_and_cka_equal_the_formula(options, n, d_x, d_y):
    x = features(n, d_x)
    y = features(n, d_y, shared=x)
    for function, by_hand in ((hsic, hsic_by_hand), (cka, cka_by_hand)):
        value = function(x, y, **options)
        torch.testing.assert_close(value, torch.tensor(by_hand(x, y, **options)).double())


@options
def test_leading_dimensions_are_independent_problems(options):
    x = features(2, 3, 6, 4)
    y = features(2, 3, 6, 5)
    for function, by_hand in ((hsic, hsic_by_hand), (cka, cka_by_hand)):
        expected = [[by_hand(x[i, j], y[i, j], **options) for j in range(3)] for i in range(2)]
        torch.testing.assert_close(function(x, y, **options), torch.tensor(expected).double())


@estimators
@sides
def test_gram_and_feature_side_equal_the_formula(estimator, side):
    x, y = features(7, 4), features(7, 6)
    for function, by_hand in ((reference.hsic, hsic_by_hand), (reference.cka, cka_by_hand)):
        value = function(x, y, estimator=estimator, side=side)
        torch.testing.assert_close(value, torch.tensor(by_hand(x, y, estimator=estimator)).double())


def test_side_with_fewer_multiplications_is_chosen():
    from kdfast.reference.cka import cheaper_side

    def side(n, *widths, cross=((0, 1),), own=True):
        pairs = [i for pair in cross for i in pair]
        pairs += [i for layer in range(len(widths) * own) for i in (layer, layer)]
        return cheaper_side(n, widths, pairs)

    assert side(128, 768, 768) == "gram"
    assert side(32, 98304, 98304) == "gram"
    assert side(4096, 768, 768) == "feature"
    assert side(1500, 768, 768, own=False) == "feature"
    every = [(i, j) for i in range(12) for j in range(12, 18)]
    assert side(1500, *[768] * 18, cross=every) == "gram"  # one Gram serves many pairs


@options
@pytest.mark.parametrize("function", [hsic, cka])
def test_masked_equals_physically_removed_rows(options, function):
    x, y = features(3, 9, 4), features(3, 9, 5)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, [0, 3]] = False
    mask[1, 5:] = False
    values = function(x, y, mask=mask, **options)
    expected = [function(x[i][mask[i]], y[i][mask[i]], **options) for i in range(3)]
    torch.testing.assert_close(values, torch.stack(expected))


@estimators
@sides
def test_masked_equals_removed_rows_on_either_side(estimator, side):
    x, y, mask = features(9, 4), features(9, 5), torch.arange(9) % 4 > 0
    value = reference.cka(x, y, mask=mask, estimator=estimator, side=side)
    torch.testing.assert_close(value, cka(x[mask], y[mask], estimator=estimator))


@pytest.mark.parametrize("function", [hsic, cka])
@estimators
@sides
def test_gradients_pass_gradcheck_on_either_side(function, estimator, side):
    dense = getattr(reference, function.__name__)
    x, y = features(2, 6, 3).requires_grad_(), features(2, 6, 4).requires_grad_()
    mask = torch.ones(2, 6)
    mask[1, 2] = 0
    options = {"estimator": estimator, "side": side, **BOTH_SIDES[function]}
    assert torch.autograd.gradcheck(lambda x, y: dense(x, y, mask=mask, **options), (x, y))


@pytest.mark.parametrize("function", [hsic, cka])
@estimators
@pytest.mark.parametrize("masked", [False, True])
def test_rbf_gradients_pass_gradcheck(function, estimator, masked):
    x, y = features(2, 6, 3).requires_grad_(), features(2, 6, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]]) if masked else None
    assert torch.autograd.gradcheck(
        lambda x, y: function(
            x, y, mask=mask, kernel="rbf", estimator=estimator, bandwidth=(1.5, 2.5),
            **BOTH_SIDES[function],
        ),
        (x, y),
    )  # fmt: skip


def test_default_bandwidth_is_constant_in_backward():
    x, y = features(7, 3).requires_grad_(), features(7, 4)
    squared = torch.cdist(x.detach(), x.detach()).square().sum() / (7 * 6)
    squared_y = torch.cdist(y, y).square().sum() / (7 * 6)
    sigmas = (squared.sqrt().item(), squared_y.sqrt().item())
    results = [cka(x, y, kernel="rbf", bandwidth=b) for b in (None, sigmas)]
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in results))


@pytest.mark.exhaustive
@options
@pytest.mark.parametrize("n", [4, 5, 17, 127, 129])
@pytest.mark.parametrize(("d_x", "d_y"), [(1, 1), (3, 200), (64, 32), (200, 129)])
@pytest.mark.parametrize("masked", [False, True])
def test_every_combination_equals_the_formula(options, n, d_x, d_y, masked):
    x = features(n, d_x)
    y = features(n, d_y, shared=x)
    mask = torch.rand(n) < 0.8 if masked else torch.ones(n, dtype=torch.bool)
    mask[:4] = True
    if isinstance(options.get("bandwidth"), float):
        options = {**options, "bandwidth": options["bandwidth"] * math.sqrt(d_x + d_y)}
    elif "bandwidth" in options:
        widths = zip(options["bandwidth"], (d_x, d_y), strict=True)
        options = {**options, "bandwidth": tuple(w * math.sqrt(d) for w, d in widths)}
    expected = torch.tensor(cka_by_hand(x[mask], y[mask], **options)).double()
    torch.testing.assert_close(cka(x, y, mask=mask, **options), expected, rtol=1e-6, atol=1e-9)


@estimators
@pytest.mark.parametrize(("bandwidth", "dtype"), [(0.3, torch.float64), (1e4, torch.float32)])
def test_rbf_far_narrower_or_wider_than_the_distances_keeps_its_digits(estimator, bandwidth, dtype):
    x, y = features(9, 8, dtype=dtype), features(9, 6, dtype=dtype)
    options = {"kernel": "rbf", "estimator": estimator}
    value = cka(x, y, bandwidth=bandwidth, **options)
    if bandwidth > 1:  # the limit is the linear kernel's CKA
        expected = cka(x, y, estimator=estimator)
    else:
        expected = torch.tensor(cka_by_hand(x, y, bandwidth=bandwidth, **options)).to(dtype)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


# Layer pairs


@options
def test_matrix_holds_the_cka_of_every_pair(options):
    layers_s = [features(2, 6, d) for d in (3, 5)]
    layers_t = [features(2, 6, d) for d in (4, 2, 7)]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]])
    matrix = cka_matrix(layers_s, layers_t, mask=mask, **options)
    assert matrix.shape == (2, 2, 3)
    for i, j in itertools.product(range(2), range(3)):
        expected = cka(layers_s[i], layers_t[j], mask=mask, **options)
        torch.testing.assert_close(matrix[:, i, j], expected)


def test_matrix_of_single_problems_has_two_dimensions():
    assert cka_matrix([features(5, 2)] * 2, (features(5, 3),)).shape == (2, 1)


@estimators
@sides
def test_matrix_gradients_pass_gradcheck(estimator, side):
    layers = [features(6, d).requires_grad_() for d in (3, 2, 4, 3)]
    assert torch.autograd.gradcheck(
        lambda *x: reference.cka_matrix(
            x[:2], x[2:], estimator=estimator, side=side, teacher_grad=True
        ),
        layers,
    )


@options
def test_list_of_pairs_holds_the_cka_of_each(options):
    layers_s = [features(2, 6, d) for d in (3, 5, 4)]
    layers_t = [features(2, 6, d) for d in (4, 2, 7)]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]])
    values = cka(layers_s, tuple(layers_t), mask=mask, **options)
    assert values.shape == (3, 2)
    expected = [cka(x, y, mask=mask, **options) for x, y in zip(layers_s, layers_t, strict=True)]
    torch.testing.assert_close(values, torch.stack(expected))


@options
def test_hsic_matrix_holds_the_hsic_of_every_pair_and_layer(options):
    layers_s, layers_t = [features(6, d) for d in (3, 5)], [features(6, d) for d in (4, 2, 7)]
    width = options.get("bandwidth")
    width_s, width_t = width if isinstance(width, tuple) else (width, width)
    cross, own_s, own_t = hsic_matrix(layers_s, layers_t, **options)
    assert (cross.shape, own_s.shape, own_t.shape) == ((2, 3), (2,), (3,))
    for i, j in itertools.product(range(2), range(3)):
        expected = hsic_by_hand(layers_s[i], layers_t[j], **options)
        torch.testing.assert_close(cross[i, j], torch.tensor(expected).double())
    for found, layers, own in ((own_s, layers_s, width_s), (own_t, layers_t, width_t)):
        expected = [hsic_by_hand(x, x, **{**options, "bandwidth": own}) for x in layers]
        torch.testing.assert_close(found, torch.tensor(expected).double())


def test_gradients_of_hsic_matrix_pass_gradcheck():
    layers = [features(6, d).requires_grad_() for d in (3, 2, 4)]
    for estimator in ("biased", "unbiased"):
        assert torch.autograd.gradcheck(
            lambda *x, e=estimator: hsic_matrix(x[:2], x[2:], estimator=e, teacher_grad=True),
            layers,
        )


# Gram distance


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_gram_distance_equals_the_formula(kernel):
    x = features(7, 4)
    y = features(7, 6, shared=x)
    grams = [gram_by_hand(z.numpy(), kernel, None) for z in (x, y)]
    centre = np.eye(7) - np.ones((7, 7)) / 7
    k, c = (centre @ gram @ centre for gram in grams)
    expected = ((k / np.linalg.norm(k) - c / np.linalg.norm(c)) ** 2).sum()
    value = gram_distance(x, y, kernel=kernel)
    torch.testing.assert_close(value, torch.tensor(expected).double())
    pairs = gram_distance([x, y], [y, y], kernel=kernel)
    torch.testing.assert_close(pairs, torch.stack([value, torch.zeros_like(value)]))


def test_gradients_of_gram_distance_pass_gradcheck():
    x, y = features(2, 6, 3).requires_grad_(), features(2, 6, 4).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]])
    assert torch.autograd.gradcheck(
        lambda x, y: gram_distance(x, y, mask=mask, teacher_grad=True), (x, y)
    )


def test_equal_features_have_no_gram_distance_and_equal_rows_neither():
    x = features(2, 17, 5, dtype=torch.float32)
    assert torch.count_nonzero(gram_distance(x, x.clone())) == 0
    flat = torch.full((2, 17, 5), 0.1, requires_grad=True)
    value = gram_distance(flat, x)
    value.sum().backward()
    assert torch.count_nonzero(value) == torch.count_nonzero(flat.grad) == 0


# Batches and teachers


@estimators
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_minibatch_cka_is_the_ratio_of_means_of_hsic(estimator, kernel):
    options = {"estimator": estimator, "kernel": kernel}
    sizes = (8, 8, 5)  # the last batch is short
    batches = [([features(n, 4), features(n, 3)], [features(n, 6)]) for n in sizes]
    total = MinibatchCKA(**options)
    for layers_s, layers_t in batches:
        total.update(layers_s, layers_t)
    for i in range(2):
        cross, own_s, own_t = (
            sum(hsic_by_hand(*pair, **options) for pair in pairs)
            for pairs in zip(
                *(((s[i], t[0]), (s[i], s[i]), (t[0], t[0])) for s, t in batches), strict=True
            )
        )
        expected = torch.tensor(cross / math.sqrt(own_s * own_t)).double()
        torch.testing.assert_close(total.compute()[i, 0], expected)
    assert total.batches == 3 and not total.compute().requires_grad


def test_minibatch_cka_equals_ckatorch():
    ckatorch = pytest.importorskip("ckatorch")
    x = features(5, 12, 6)
    y = features(5, 12, 9, shared=x)
    apart, at_once = MinibatchCKA(), MinibatchCKA()
    for b in range(5):
        apart.update([x[b]], [y[b]])
    at_once.update([x], [y])
    for total in (apart, at_once):
        torch.testing.assert_close(total.compute(), ckatorch.cka_batch(x, y).view(1, 1))


def test_minibatch_cka_masks_forgets_and_says_what_is_wrong():
    x, y = features(9, 4), features(9, 3)
    mask = torch.arange(9) < 6
    total = MinibatchCKA(estimator="biased")
    with pytest.raises(RuntimeError, match="no batch yet"):
        total.compute()
    total.update([x], [x])
    total.reset()
    total.update([x], [y], mask)
    torch.testing.assert_close(total.compute()[0, 0], cka(x[:6], y[:6]))
    with pytest.raises(ValueError, match="layers_s and layers_t have 2 and 1 layers.*1 and 1"):
        total.update([x, x], [y])
    with pytest.raises(ValueError, match="MinibatchCKA: estimator is 'debiased'"):
        MinibatchCKA(estimator="debiased")


@options
def test_teacher_whose_terms_are_kept_gives_the_same_values_and_gradients(options):
    layers_t = [features(2, 9, d) for d in (4, 20)]
    mask = torch.ones(2, 9)
    mask[1, 2:4] = 0
    teacher = CKATeacher(layers_t, mask=mask, **options)
    single = CKATeacher(layers_t[0], mask=mask, **options)
    for _ in range(3):  # another student each time
        layers_s = [features(2, 9, d).requires_grad_() for d in (3, 12)]
        for mine, plain in (
            (teacher.cka(layers_s), cka(layers_s, layers_t, mask=mask, **options)),
            (teacher.cka_matrix(layers_s), cka_matrix(layers_s, layers_t, mask=mask, **options)),
            (single.cka(layers_s[0]), cka(layers_s[0], layers_t[0], mask=mask, **options)),
        ):
            torch.testing.assert_close(mine, plain)
            wanted = layers_s[:1] if mine.shape == (2,) else layers_s
            grads = [torch.autograd.grad(value.sum(), wanted) for value in (mine, plain)]
            for one, other in zip(*grads, strict=True):
                torch.testing.assert_close(one, other)


# Oracles


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_equals_ckatorch(kernel, unbiased):
    ckatorch = pytest.importorskip("ckatorch")
    x = features(20, 6)
    y = features(20, 9, shared=x)
    bandwidth = {}
    if kernel == "rbf":  # its sigma is a multiple of the median distance
        medians = [torch.cdist(z, z).square().median().sqrt().item() for z in (x, y)]
        bandwidth = {"bandwidth": tuple(medians)}
    value = cka(x, y, kernel=kernel, estimator="unbiased" if unbiased else "biased", **bandwidth)
    torch.testing.assert_close(value, ckatorch.cka_base(x, y, kernel, unbiased, threshold=1.0))


def test_unbiased_cka_and_its_gradient_equal_ckatorch_minibatch_cka_of_one_batch():
    ckatorch = pytest.importorskip("ckatorch")
    x = features(12, 6)
    y = features(12, 9, shared=x)
    results = []
    for function in (
        lambda x: cka(x, y, estimator="unbiased"),
        lambda x: ckatorch.cka_batch(x[None], y[None]),
    ):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_biased_cka_equals_repsim():
    repsim = pytest.importorskip("repsim")
    x = features(25, 6)
    y = features(25, 9, shared=x)
    theirs = repsim.cka([x.numpy(), y.numpy()], "linear", "gretton")[0, 1]
    torch.testing.assert_close(cka(x, y), torch.tensor(theirs))


# Invariances


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@estimators
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("n", [17, 65])
def test_cka_of_features_with_themselves_is_exactly_one(kernel, estimator, dtype, n):
    x = features(n, 5, dtype=dtype)
    assert cka(x, x.clone(), kernel=kernel, estimator=estimator) == 1


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@estimators
def test_cka_ignores_rotation_scale_offset_and_row_order(kernel, estimator):
    x = features(15, 6)
    y = features(15, 4, shared=x)
    rotation = torch.linalg.qr(features(6, 6)).Q
    order = torch.randperm(15)
    moved = (100 * x @ rotation + 7)[order]
    options = {"kernel": kernel, "estimator": estimator}
    torch.testing.assert_close(cka(moved, y[order], **options), cka(x, y, **options))


@pytest.mark.parametrize("scale", [1e-15, 1e12])
@estimators
@sides
def test_scale_of_the_features_does_not_overflow_float32(scale, estimator, side):
    x = features(30, 20, dtype=torch.float32)
    y = features(30, 20, dtype=torch.float32, shared=x)
    value = reference.cka(scale * x, y / scale, estimator=estimator, side=side)
    expected = cka(x.double(), y.double(), estimator=estimator)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)


def test_unbiased_is_near_zero_and_negative_at_times_where_biased_is_near_one():
    x, y = features(50, 32, 768, dtype=torch.float32), features(50, 32, 768, dtype=torch.float32)
    assert (cka(x, y) > 0.9).all()
    unbiased = cka(x, y, estimator="unbiased")
    assert unbiased.mean().abs() < 0.05
    assert (unbiased < 0).any()


# Numerical edges


OFFSETS = [(30, 0.05), (300, 0.01)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "fraction"), OFFSETS, ids=str)
@estimators
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize("n", [64, 129])
def test_large_means_in_a_few_dimensions_cost_no_digits(
    dtype, offset, fraction, estimator, kernel, n
):
    x = features(n, 100, dtype=torch.float32)
    y = features(n, 60, dtype=torch.float32, shared=x)
    x[:, : math.ceil(fraction * 100)] += offset
    y[:, : math.ceil(fraction * 60)] -= offset
    x, y = x.to(dtype), y.to(dtype)
    options = {"kernel": kernel, "estimator": estimator}
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    values = [cka(leaf, y.to(leaf.dtype), **options) for leaf in leaves]
    torch.testing.assert_close(values[0].double(), values[1], rtol=0, atol=2e-6)
    grads = [
        torch.autograd.grad(value, leaf)[0].double()
        for value, leaf in zip(values, leaves, strict=True)
    ]
    tolerance = 2 * torch.finfo(dtype).eps + 1e-5
    assert (grads[0] - grads[1]).norm() <= tolerance * grads[1].norm()


@pytest.mark.parametrize("n", [4, 17, 127, 129])
@estimators
def test_float32_error_is_at_most_twice_that_of_eager(n, estimator):
    x = features(n, 40, dtype=torch.float32)
    y = features(n, 24, dtype=torch.float32, shared=x)

    def eager(x, y):
        grams = [z @ z.mT for z in (x, y)]
        if estimator == "biased":
            centred = [g - g.mean(0) - g.mean(1, keepdim=True) + g.mean() for g in grams]
        else:
            hollow = [g - torch.diag(g.diag()) for g in grams]
            centred = [
                (g - (g.sum(0) + g.sum(1)[:, None]) / (n - 2) + g.sum() / (n - 1) / (n - 2))
                * (1 - torch.eye(n))
                for g in hollow
            ]
        k, c = centred
        return (k * c).sum() / (k.norm() * c.norm())

    exact = eager(x.double(), y.double())
    error = cka(x, y, estimator=estimator) - exact  # Gram side up to n = 17, then feature side
    assert error.abs() <= 2 * (eager(x, y) - exact).abs() + 1e-6


@options
@pytest.mark.parametrize("function", [hsic, cka])
@pytest.mark.parametrize("constant", [0.0, 0.1, 300.0])
def test_equal_rows_give_zero_with_zero_gradient(options, function, constant):
    x = torch.full((2, 7, 5), constant, requires_grad=True)
    y = features(2, 7, 3, dtype=torch.float32).requires_grad_()
    value = function(x, y, **options, **BOTH_SIDES[function])
    value.sum().backward()
    assert torch.count_nonzero(value) == 0
    assert torch.count_nonzero(x.grad) == 0
    if function is cka:
        assert torch.count_nonzero(y.grad) == 0
    assert y.grad.isfinite().all()


@sides
@pytest.mark.parametrize("n", [6, 1025, 4096])
@pytest.mark.parametrize("row", [0, 5])
def test_unbiased_self_hsic_that_is_only_rounding_gives_zero(side, n, row):
    if side == "gram" and n > 1025:
        pytest.skip("64 MB a matrix, and this many rows take the feature side")
    x = torch.zeros(n, 3)
    x[row] = torch.randn(3)  # one row stands out: its hollow, centred kernel is exactly zero
    x.requires_grad_()
    value = reference.cka(x, features(n, 4, dtype=torch.float32), estimator="unbiased", side=side)
    value.backward()
    assert value == 0
    assert torch.count_nonzero(x.grad) == 0


@options
@pytest.mark.parametrize("function", [hsic, cka])
def test_too_few_valid_rows_give_zero_with_zero_gradient(options, function):
    minimum = 2 if options["estimator"] == "biased" else 4
    x, y = features(3, 8, 5).requires_grad_(), features(3, 8, 6)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, : minimum - 1] = True
    mask[2] = True
    values = function(x, y, mask=mask, **options)
    values.sum().backward()
    assert torch.count_nonzero(values[:2]) == 0
    assert torch.count_nonzero(x.grad[:2]) == 0
    torch.testing.assert_close(values[2], function(x[2], y[2], **options))


@options
def test_smallest_number_of_rows_is_served(options):
    n = 2 if options["estimator"] == "biased" else 4
    x, y = features(n, 5), features(n, 6)
    value = cka(x, y, **options)
    torch.testing.assert_close(value, torch.tensor(cka_by_hand(x, y, **options)).double())


@options
@pytest.mark.parametrize("function", [hsic, cka])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_valid_row_gives_nan_in_its_problem_only(options, function, bad):
    x, y = features(2, 7, 3), features(2, 7, 4)
    x[0, 3, 1] = bad
    assert function(x, y, **options).isnan().tolist() == [True, False]


@options
@pytest.mark.parametrize("row", [0, 3])
def test_what_masked_rows_hold_reaches_neither_value_nor_gradient(options, row):
    x, y = features(7, 3), features(7, 4)
    mask = torch.arange(7) != row
    results = []
    for filling in (0.0, math.nan):
        filled_x, filled_y = x.clone(), y.clone()
        filled_x[row], filled_y[row] = filling, filling
        filled_x.requires_grad_()
        value = cka(filled_x, filled_y, mask=mask, **options)
        value.backward()
        results.append((value, filled_x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("function", [hsic, cka])
def test_empty_batch_of_problems_is_empty(function):
    x = torch.zeros(0, 6, 3, requires_grad=True)
    value = function(x, torch.zeros(0, 6, 4), mask=torch.ones(0, 6))
    value.sum().backward()
    assert value.shape == (0,)
    assert x.grad.shape == x.shape


def test_upstream_gradient_scales_each_problem():
    x, y = features(3, 6, 4).requires_grad_(), features(3, 6, 5)
    weights = torch.tensor([1.0, -2.0, 0.5]).double()
    (weighted,) = torch.autograd.grad(cka(x, y), x, weights)
    (plain,) = torch.autograd.grad(cka(x, y).sum(), x)
    torch.testing.assert_close(weighted, plain * weights[:, None, None])


@sides
def test_permuted_and_strided_inputs_equal_contiguous_ones(side):
    x, y = features(2, 6, 4), features(2, 6, 5)
    permuted = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided = y.repeat_interleave(2, dim=-1)[..., ::2]
    value = reference.cka(permuted, strided, side=side)
    torch.testing.assert_close(value, reference.cka(x, y, side=side))


def test_value_is_float32_and_gradient_has_the_inputs_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        x = features(6, 4, dtype=dtype).requires_grad_()
        value = cka(x, features(6, 3, dtype=dtype))
        value.backward()
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert x.grad.dtype == dtype


@estimators
@sides
def test_autocast_around_backward_does_not_change_the_gradient(estimator, side):
    x, y = features(9, 40, dtype=torch.float32), features(9, 50, dtype=torch.float32)
    x.requires_grad_()
    gradients = []
    for enabled in (False, True):
        value = reference.cka(x, y, estimator=estimator, side=side)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(value, x)[0])
    assert torch.equal(*gradients)


def test_autocast_does_not_change_the_float32_result():
    x, y = features(9, 40, dtype=torch.float32), features(9, 50, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value = cka(x, y)
    assert torch.equal(value, cka(x, y))


@pytest.mark.parametrize("function", [hsic, cka])
def test_second_derivative_raises_naming_the_operator(function):
    x, y = features(6, 4).requires_grad_(), features(6, 3)
    (grad,) = torch.autograd.grad(function(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"^{function.__name__} .*second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("function", [hsic, cka])
@options
def test_compiled_without_graph_breaks_equals_eager(function, options):
    if dispatch.AUTO["cpu"][0] == "cpp":
        pytest.skip("in the ladder of the kernels")
    x, y = features(6, 4).requires_grad_(), features(6, 3)

    def value(x, y):
        return function(x, y, mask=torch.tensor([1, 1, 0, 1, 1, 1]), **options)

    torch.compiler.reset()  # or a bandwidth that differs from the last test's becomes symbolic
    compiled = torch.compile(value, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x, y), x)[0] for f in (compiled, value)]
    torch.testing.assert_close(*grads)


def test_teacher_that_requires_grad_is_refused_when_gradients_are_on():
    x, y = features(6, 4).requires_grad_(), features(6, 3).requires_grad_()
    with torch.no_grad():
        cka(x, y)
        cka_matrix([x], [y])
    with pytest.raises(ValueError, match=r"cka: x_t requires grad.*teacher_grad=True"):
        cka(x, y)
    with pytest.raises(ValueError, match=r"cka_matrix: layers_t\[1\] requires grad"):
        cka_matrix([x], [y.detach(), y])
    cka_matrix([x], [y], teacher_grad=True).sum().backward()
    assert torch.count_nonzero(y.grad)


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("shape", [(1, 64, 4096), (3, 64, 1024), (4, 40, 2048)], ids=str)
@estimators
def test_masked_rows_of_few_wide_problems_are_dropped_on_any_number_of_threads(
    threads, shape, estimator
):
    x = features(*shape, dtype=torch.float32).requires_grad_()
    y = features(*shape[:2], 1500, dtype=torch.float32)
    mask = torch.rand(shape[:2]) < 0.6
    mask[:, :4] = True
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        value = cka(x, y, mask=mask, estimator=estimator)
        (grad,) = torch.autograd.grad(value.sum(), x)
    finally:
        torch.set_num_threads(before)
    exact = x.detach().double().requires_grad_()
    expected = cka(exact, y.double(), mask=mask, estimator=estimator, backend="reference")
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(expected.sum(), exact)
    assert (grad - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("bandwidth", [1.7, 1.85, 1.9, 2.5, 5.0, 1e4])
def test_unbiased_rbf_far_narrower_than_the_distances_is_finite_and_right(bandwidth):
    x, y = features(97, 257, dtype=torch.float32), features(97, 33, dtype=torch.float32)
    options = {"kernel": "rbf", "estimator": "unbiased", "bandwidth": (bandwidth, 20.0)}
    leaves = [x.requires_grad_(), x.detach().double().requires_grad_()]
    values = [cka(leaf, y.to(leaf.dtype), **options) for leaf in leaves]
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-3, atol=1e-5)
    grads = [torch.autograd.grad(v, leaf)[0] for v, leaf in zip(values, leaves, strict=True)]
    assert (grads[0] - grads[1]).norm() <= 0.1 * grads[1].norm()


def test_unbiased_cka_of_a_row_that_dwarfs_the_others_does_not_vanish():
    x = features(64, 128, dtype=torch.float32)
    x[0] += 300
    y = features(64, 40, dtype=torch.float32, shared=x)
    expected = cka(x.double(), y.double(), estimator="unbiased")
    value = cka(x, y, estimator="unbiased").double()
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)


def test_teacher_kept_in_inference_mode_serves_training():
    x, y = features(3, 16, 8).requires_grad_(), features(3, 16, 5)
    teacher = CKATeacher(y)
    with torch.inference_mode():
        teacher.cka(x)
    (grad,) = torch.autograd.grad(teacher.cka(x).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(cka(x, y).sum(), x)[0])


def test_teacher_kept_in_one_dtype_serves_another_under_autocast():
    x, y = features(3, 16, 64, dtype=torch.float32), features(3, 16, 64, dtype=torch.float32)
    teacher = CKATeacher(y)
    expected = teacher.cka(x)
    with torch.autocast("cpu", torch.bfloat16):
        value = teacher.cka(x.double())
    torch.testing.assert_close(value.float(), expected)


def test_teacher_that_requires_grad_is_not_kept():
    with pytest.raises(ValueError, match="CKATeacher: layers_t requires grad"):
        CKATeacher(features(5, 3).requires_grad_())


# Errors


X, Y = torch.zeros(2, 6, 4), torch.zeros(2, 6, 5)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (X[0, 0], Y[0, 0], {}, ValueError, r"x_s has shape \[4\].*\[..., n, d\]"),
        (X, Y[:, :5], {}, ValueError, r"x_t has shape \[2, 5, 5\].*same rows"),
        (X, Y[0], {}, ValueError, r"x_t has shape \[6, 5\]"),
        (X[..., :0], Y, {}, ValueError, "x_s.*width"),
        (X[:, :1], Y[:, :1], {}, ValueError, "n = 1 rows.*at least 2.*biased"),
        (X[:, :3], Y[:, :3], {"estimator": "unbiased"}, ValueError, "n = 3 rows.*at least 4"),
        ([X, X.double()], [Y, Y], {}, TypeError, r"x_s\[1\] is float64 but x_s\[0\] is float32"),
        (X.int(), Y, {}, TypeError, "x_s is int32"),
        (X, None, {}, TypeError, "x_t is a NoneType"),
        (X, Y.to("meta"), {}, ValueError, "x_t is on meta"),
        ([X], [Y, Y], {}, ValueError, "x_t has 2 tensors but x_s has 1"),
        ([X], Y, {}, TypeError, "x_t is one tensor.*sequence"),
        ([X, X], [Y, Y[:1]], {}, ValueError, r"x_t\[1\] has shape \[1, 6, 5\]"),
        (X, Y, {"kernel": "cosine"}, ValueError, "kernel is 'cosine'.*'linear', 'rbf'"),
        (X, Y, {"estimator": "debiased"}, ValueError, "estimator is 'debiased'.*'unbiased'"),
        (X, Y, {"bandwidth": 1.0}, ValueError, "bandwidth is 1.0.*None"),
        (X, Y, {"kernel": "rbf", "bandwidth": -1.0}, ValueError, "bandwidth is -1.0"),
        (X, Y, {"kernel": "rbf", "bandwidth": (1.0,)}, ValueError, "bandwidth.*pair"),
        (X, Y, {"mask": torch.ones(6)}, ValueError, r"mask has shape \[6\].*= \[2, 6\]"),
        (X, Y, {"mask": torch.full((2, 6), 0.5)}, ValueError, "mask holds values"),
        (X, Y, {"backend": "cud"}, ValueError, "did you mean 'cuda'"),
    ],
)
def test_bad_argument_is_named(x, y, options, error, message):
    with pytest.raises(error, match=message):
        cka(x, y, **options)


@pytest.mark.parametrize(
    ("layers_s", "layers_t", "error", "message"),
    [
        (X, [Y], TypeError, "layers_s is one tensor.*sequence"),
        ([], [Y], ValueError, "layers_s is empty"),
        ([X], [], ValueError, "layers_t is empty"),
        ([X, X], [Y, Y[:, 1:]], ValueError, r"layers_t\[1\] has shape \[2, 5, 5\]"),
        ([X, X.half()], [Y], TypeError, r"layers_s\[1\] is float16"),
        ([X, "layer"], [Y], TypeError, r"layers_s\[1\] is a str"),
    ],
)
def test_bad_layer_is_named(layers_s, layers_t, error, message):
    with pytest.raises(error, match=message):
        cka_matrix(layers_s, layers_t)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize(
    "function", [hsic, cka, cka_matrix, hsic_matrix, gram_distance], ids=lambda f: f.__name__
)
def test_too_few_rows_by_shape_are_refused_by_the_estimators_that_need_more(function, n):
    x = torch.rand(n, 4)
    inputs = ([x], [x]) if function in (cka_matrix, hsic_matrix) else (x, x)
    served = {"biased": n >= 2} | ({} if function is gram_distance else {"unbiased": False})
    for estimator, serves in served.items():
        options = {} if function is gram_distance else {"estimator": estimator}
        if serves:
            function(*inputs, **options)
            continue
        least = {"biased": 2, "unbiased": 4}[estimator]
        message = f"^{function.__name__}: .* has n = {n} rows.*at least {least}.*{estimator}"
        with pytest.raises(ValueError, match=message):
            function(*inputs, **options)
