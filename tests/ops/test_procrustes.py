import math

import numpy as np
import pytest
import torch

from kdfast import reference
from kdfast.ops import procrustes_distance

# More rows than dimensions (singular values of X^T Y), and fewer (of an n x n core).
SHAPES = {"tall": (12, 4, 5), "wide": (5, 9, 7), "between": (6, 4, 9), "one column": (7, 1, 3)}
shapes = pytest.mark.parametrize(("n", "d_s", "d_t"), SHAPES.values(), ids=SHAPES.keys())


def features(*shape, dtype=torch.float64, shared=None):
    """Random features, correlated with `shared` when that is given."""
    x = torch.randn(shape, dtype=dtype)
    if shared is not None:
        x = x + shared @ torch.randn(shared.shape[-1], shape[-1], dtype=dtype)
    return x


def by_hand(x, y):
    x, y = (z.detach().double().numpy() for z in (x, y))
    x, y = (z - z.mean(0) for z in (x, y))
    x, y = (z / np.sqrt((z * z).sum()) for z in (x, y))
    return float(2 - 2 * np.linalg.norm(x.T @ y, "nuc"))


# The formula


@shapes
def test_distance_equals_the_formula(n, d_s, d_t):
    x = features(n, d_s)
    y = features(n, d_t, shared=x)
    value = procrustes_distance(x, y)
    torch.testing.assert_close(value, torch.tensor(by_hand(x, y)).double())


@shapes
def test_leading_dimensions_are_independent_problems(n, d_s, d_t):
    x, y = features(2, 3, n, d_s), features(2, 3, n, d_t)
    expected = [[by_hand(x[i, j], y[i, j]) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(procrustes_distance(x, y), torch.tensor(expected).double())


@shapes
def test_distance_is_that_to_the_best_rotation(n, d_s, d_t):
    """scipy's disparity also chooses the best scale."""
    spatial = pytest.importorskip("scipy.spatial")
    x = features(n, d_s)
    y = features(n, d_t, shared=x)
    wide = max(d_s, d_t)
    padded = [np.pad(z.numpy(), ((0, 0), (0, wide - z.shape[1]))) for z in (x, y)]
    *_, disparity = spatial.procrustes(*padded)
    expected = torch.tensor(2 - 2 * math.sqrt(1 - disparity)).double()
    torch.testing.assert_close(procrustes_distance(x, y), expected)


@shapes
def test_gradients_pass_gradcheck(n, d_s, d_t):
    x, y = features(2, n, d_s).requires_grad_(), features(2, n, d_t).requires_grad_()
    mask = torch.ones(2, n)
    mask[1, 2] = 0
    assert torch.autograd.gradcheck(
        lambda x, y: procrustes_distance(x, y, mask=mask, teacher_grad=True), (x, y)
    )


@shapes
def test_masked_equals_physically_removed_rows(n, d_s, d_t):
    x, y = features(3, n, d_s).requires_grad_(), features(3, n, d_t)
    mask = torch.ones(3, n, dtype=torch.bool)
    mask[0, [0, 3]] = False
    mask[1, 3:] = False
    values = procrustes_distance(x, y, mask=mask)
    expected = torch.stack([procrustes_distance(x[i][mask[i]], y[i][mask[i]]) for i in range(3)])
    torch.testing.assert_close(values, expected)
    upstream = torch.tensor([1.0, -2.0, 0.5]).double()
    grads = [torch.autograd.grad(v, x, upstream)[0] for v in (values, expected)]
    torch.testing.assert_close(*grads)
    assert torch.count_nonzero(grads[0][~mask]) == 0


def test_pairs_of_a_sequence_equal_their_own_calls():
    layers_s = [features(2, 6, d) for d in (3, 9, 4)]
    layers_t = [features(2, 6, d) for d in (8, 7, 4)]
    mask = torch.arange(6) < torch.tensor([[6], [4]])
    values = procrustes_distance(layers_s, layers_t, mask=mask)
    expected = [
        procrustes_distance(x, y, mask=mask) for x, y in zip(layers_s, layers_t, strict=True)
    ]
    assert torch.equal(values, torch.stack(expected))


# Invariances


@shapes
def test_distance_ignores_rotation_scale_offset_and_row_order(n, d_s, d_t):
    x = features(n, d_s)
    y = features(n, d_t, shared=x)
    rotation = torch.linalg.qr(features(d_s, d_s)).Q
    order = torch.randperm(n)
    moved = (100 * x @ rotation + 7)[order]
    torch.testing.assert_close(procrustes_distance(moved, y[order]), procrustes_distance(x, y))


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_scale_of_the_features_does_not_leave_float32(scale):
    x = features(30, 20, dtype=torch.float32)
    y = features(30, 20, dtype=torch.float32, shared=x)
    value = procrustes_distance(scale * x, y / scale)
    torch.testing.assert_close(value.item(), by_hand(x, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(40, 20), (20, 40), (300, 64), (64, 300)], ids=str)
@pytest.mark.parametrize("rank", [None, 3])
def test_equal_features_have_no_distance_and_no_gradient(dtype, shape, rank):
    x = features(*shape, dtype=dtype)
    if rank is not None:  # all other singular values are only rounding
        x = x[:, :rank] @ torch.randn(rank, shape[1], dtype=dtype)
    unrelated = features(*shape, dtype=dtype)
    gradients = []
    for y in (x.clone(), unrelated):
        leaf = x.clone().requires_grad_()
        value = procrustes_distance(leaf, y)
        gradients.append(torch.autograd.grad(value, leaf)[0].norm())
        if y is not unrelated:
            assert value.abs() < 16 * torch.finfo(dtype).eps
    assert gradients[0] < 1e-5 * gradients[1]


# Numerical edges


@shapes
def test_repeated_singular_values_have_a_finite_and_right_gradient(n, d_s, d_t):
    """Rows of a simplex: all singular values are equal, where autograd through svd divides by 0."""
    m = min(n - 1, d_s, d_t)
    x = torch.eye(n, dtype=torch.float64)[:, :m]
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T).reshape(m, m))).mT
    x, y = (torch.nn.functional.pad(x, (0, d - m)) for d in (d_s, d_t))
    y = y + 1e-3 * features(n, d_t)
    x = x.requires_grad_()
    direction = (
        features(n, d_s) if d_s == m else torch.nn.functional.pad(features(n, m), (0, d_s - m))
    )
    (grad,) = torch.autograd.grad(procrustes_distance(x, y), x)
    h = 1e-6
    change = by_hand(x + h * direction, y) - by_hand(x - h * direction, y)
    assert (grad * direction).sum().item() == pytest.approx(change / (2 * h), rel=1e-4, abs=1e-7)


def test_gradient_of_rank_deficient_features_leaves_the_null_space_alone():
    x = features(20, 3) @ features(3, 8)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(procrustes_distance(x, features(20, 8)), x)
    *_, vh = torch.linalg.svd((x - x.mean(0)).detach())
    assert (grad @ vh[3:].mT).abs().max() < 1e-12 < grad.abs().max()
    step = features(20, 3) @ vh[:3]  # along which the rank stays
    y = features(20, 8)
    (grad,) = torch.autograd.grad(procrustes_distance(x, y), x)
    change = by_hand(x + 1e-6 * step, y) - by_hand(x - 1e-6 * step, y)
    assert (grad * step).sum().item() == pytest.approx(change / 2e-6, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d_s", "d_t"), [(129, 17, 40), (17, 40, 129)])
@pytest.mark.parametrize("offset", [0, 300])
def test_float32_and_half_precision_lose_no_digits_of_their_inputs(dtype, n, d_s, d_t, offset):
    x = features(n, d_s, dtype=torch.float32)
    y = features(n, d_t, dtype=torch.float32, shared=x)
    x[:, 0] += offset
    leaves = [x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()]
    values = [procrustes_distance(leaf, y.to(dtype).to(leaf.dtype)) for leaf in leaves]
    assert values[0].dtype == torch.float32
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-5, atol=2e-6)
    mine, truth = (
        torch.autograd.grad(3 * value, leaf)[0] for value, leaf in zip(values, leaves, strict=True)
    )
    assert mine.dtype == dtype
    tolerance = 2 * torch.finfo(dtype).eps + 1e-4
    assert (mine.double() - truth).norm() <= tolerance * truth.norm()


@shapes
@pytest.mark.parametrize("constant", [0.0, 0.1, 300.0])
def test_equal_rows_give_zero_with_zero_gradient(n, d_s, d_t, constant):
    x = torch.full((2, n, d_s), constant, requires_grad=True)
    y = features(2, n, d_t, dtype=torch.float32).requires_grad_()
    value = procrustes_distance(x, y, teacher_grad=True)
    value.sum().backward()
    assert not any(torch.count_nonzero(z) for z in (value, x.grad, y.grad))


@shapes
def test_too_few_valid_rows_give_zero_with_zero_gradient(n, d_s, d_t):
    x, y = features(3, n, d_s).requires_grad_(), features(3, n, d_t)
    mask = torch.zeros(3, n, dtype=torch.bool)
    mask[0, 1] = True
    mask[2] = True
    values = procrustes_distance(x, y, mask=mask)
    values.sum().backward()
    assert torch.count_nonzero(values[:2]) == 0
    assert torch.count_nonzero(x.grad[:2]) == 0
    torch.testing.assert_close(values[2], procrustes_distance(x[2], y[2]))


@shapes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_a_valid_row_gives_nan_in_its_problem_only(n, d_s, d_t, bad):
    x, y = features(3, n, d_s), features(3, n, d_t)
    x[0, 3, 0] = bad
    x.requires_grad_()
    values = procrustes_distance(x, y)
    values.sum().backward()
    assert values.isnan().tolist() == [True, False, False]
    assert x.grad.isnan().flatten(1).any(1).tolist() == [True, False, False]
    torch.testing.assert_close(values[1:], procrustes_distance(x[1:], y[1:]))


@shapes
@pytest.mark.parametrize("row", [0, 3])
def test_what_masked_rows_hold_reaches_neither_value_nor_gradient(n, d_s, d_t, row):
    x, y, mask = features(n, d_s), features(n, d_t), torch.arange(n) != row
    results = []
    for filling in (0.0, math.nan):
        filled_x, filled_y = x.clone(), y.clone()
        filled_x[row], filled_y[row] = filling, filling
        filled_x.requires_grad_()
        value = procrustes_distance(filled_x, filled_y, mask=mask)
        value.backward()
        results.append((value, filled_x.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_empty_batch_of_problems_is_empty():
    for n in (3, 9):
        x = torch.zeros(0, n, 6, requires_grad=True)
        value = procrustes_distance(x, torch.zeros(0, n, 7), mask=torch.ones(0, n))
        value.sum().backward()
        assert value.shape == (0,)
        assert x.grad.shape == x.shape


def test_permuted_and_strided_inputs_equal_contiguous_ones():
    x, y = features(2, 6, 4), features(2, 6, 5)
    permuted = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    strided = y.repeat_interleave(2, dim=-1)[..., ::2]
    torch.testing.assert_close(procrustes_distance(permuted, strided), procrustes_distance(x, y))


# What stands around it


@shapes
def test_compiled_without_graph_breaks_equals_eager(n, d_s, d_t):
    x, y = features(n, d_s).requires_grad_(), features(n, d_t)
    mask = torch.arange(n) != 2
    compiled = torch.compile(procrustes_distance, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(x, y, mask=mask), x)[0] for f in (compiled, procrustes_distance)]
    torch.testing.assert_close(*grads)


def test_autocast_changes_nothing():
    x, y = features(9, 40, dtype=torch.float32), features(9, 50, dtype=torch.float32)
    x.requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = procrustes_distance(x, y)
            results.append([value, *torch.autograd.grad(value, x)])
    assert all(map(torch.equal, *results))


def test_second_derivative_raises_naming_the_operator():
    x, y = features(6, 4).requires_grad_(), features(6, 3)
    (grad,) = torch.autograd.grad(procrustes_distance(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="^procrustes_distance .*second derivative"):
        grad.sum().backward()


def test_reference_is_the_only_backend():
    x, y = features(6, 4), features(6, 3)
    assert torch.equal(
        procrustes_distance(x, y, backend="reference"), reference.procrustes_distance(x, y)
    )
    for backend in ("cpp", "triton", "cuda"):
        with pytest.raises(RuntimeError, match=f"{backend}: no kernel for procrustes_distance"):
            procrustes_distance(x, y, backend=backend)


X, Y = torch.zeros(2, 6, 4), torch.zeros(2, 6, 5)


def test_teacher_may_have_another_dtype():
    x, y = torch.randn(2, 6, 4).bfloat16().requires_grad_(), torch.randn(2, 6, 5)
    distance = procrustes_distance(x, y)
    assert torch.equal(distance, procrustes_distance(x.detach().float(), y))
    distance.sum().backward()
    assert x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        (X[0, 0], Y[0, 0], {}, ValueError, r"x_s has shape \[4\].*\[..., n, d\]"),
        (X, Y[:, :5], {}, ValueError, r"x_t has shape \[2, 5, 5\].*same rows"),
        (X[:, :1], Y[:, :1], {}, ValueError, "n = 1 rows.*at least 2"),
        ([X, X.double()], [Y, Y], {}, TypeError, r"x_s\[1\] is float64 but x_s\[0\] is float32"),
        (X, None, {}, TypeError, "x_t is a NoneType"),
        ([X], [Y, Y], {}, ValueError, "x_t has 2 tensors but x_s has 1"),
        ([X, X], [Y, Y[:, 1:]], {}, ValueError, r"x_t\[1\] has shape \[2, 5, 5\]"),
        (X, Y.clone().requires_grad_(), {}, ValueError, "x_t requires grad.*teacher_grad=True"),
        (X, Y, {"mask": torch.ones(6)}, ValueError, r"mask has shape \[6\].*= \[2, 6\]"),
        (X, Y, {"backend": "cud"}, ValueError, "did you mean 'cuda'"),
    ],
)
def test_bad_argument_is_named(x, y, options, error, message):
    with pytest.raises(error, match=f"^procrustes_distance: .*{message}"):
        procrustes_distance(x, y, **options)
