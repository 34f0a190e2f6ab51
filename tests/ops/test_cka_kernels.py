"""The ladder of the CKA kernels: every backend, on every side of their contract.

As in test_kernels.py, each case is measured by the kernel, by eager arithmetic in the dtype of the
inputs, and in float64; memory is filled with NaN beforehand. The contract itself is written down
densely here, and must agree with the reference.
"""

import importlib
import itertools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kdfast import ops
from kdfast.ops import CKATeacher, dispatch
from kdfast.reference.cka import MINIMUM_ROWS, _centre_features, _Rows, pair_indices

pytestmark = pytest.mark.usefixtures("memory_filled_with_nan")

OPERATOR = "cka"
MODULE = importlib.import_module("kdfast.ops.cka")  # whose name is the function's
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
# Side of the kernels, and options of the call.
FORMS = {
    f"{side} {estimator}": (side, {"estimator": estimator})
    for side in ("gram", "feature", "tiles")
    for estimator in ("biased", "unbiased")
} | {
    "rbf biased": ("tiles", {"kernel": "rbf"}),
    "rbf unbiased": ("tiles", {"kernel": "rbf", "estimator": "unbiased"}),
    "rbf bandwidth": ("tiles", {"kernel": "rbf", "bandwidth": 8.0}),
    "rbf two bandwidths": (
        "tiles",
        {"kernel": "rbf", "estimator": "unbiased", "bandwidth": (10.0, 20.0)},
    ),
}
BIASED = [name for name, (_, options) in FORMS.items() if "estimator" not in options
          or options["estimator"] == "biased"]  # fmt: skip
EACH = ("gram biased", "gram unbiased", "feature unbiased", "tiles unbiased", "rbf biased")
# n, d_s, d_t, mask
CASES = {
    "fewest rows": (4, 3, 5, None),
    "one column": (5, 1, 1, None),
    "plain": (17, 17, 40, None),
    "narrow and wide": (127, 3, 129, None),
    "beside a tile": (129, 40, 17, None),
    "two tiles and a row": (257, 129, 40, None),
    "padded": (37, 17, 40, "padded"),
    "holes": (129, 40, 3, "holes"),
    "few valid rows": (17, 3, 17, "few"),
}
INTERPRETED = {
    "test_cka_and_both_gradients_err_at_most_twice_as_far_as_eager",
    "test_cka_matrix_errs_at_most_twice_as_far_as_eager",
    "test_equal_features_have_cka_of_exactly_one",
    "test_equal_rows_give_zero_with_zero_gradient",
    "test_what_masked_rows_hold_reaches_nothing",
    "test_nan_stays_in_its_problem",
    "test_empty_batch_is_empty",
    "test_teacher_kept_equals_plain_calls_and_repeats",
    "test_kernels_pass_opcheck",
}

forms = pytest.mark.parametrize("form", FORMS)
each_form = pytest.mark.parametrize("form", EACH)
biased_forms = pytest.mark.parametrize("form", BIASED)


@pytest.fixture
def call(kernel, monkeypatch):
    """An operator on the kernel's backend and a form's side; a test of what the kernel refuses, and
    says so, is skipped."""

    def run(name, form, *inputs, **more):
        side, options = FORMS[form]
        monkeypatch.setattr(MODULE, "side_for", lambda *_: side)
        options = {**options, **more}
        if name == "gram_distance":
            options.pop("estimator", None)
        try:
            return getattr(ops, name)(*inputs, **options, backend=kernel[0])
        except RuntimeError as error:
            if "cannot serve this call" in str(error):
                pytest.skip(str(error))
            raise

    return run


def features(*shape, shared=None, dtype=torch.float32, device="cpu"):
    """Random features, correlated with `shared` when that is given; made in float32."""
    x = torch.randn(shape)
    if shared is not None:
        mixing = torch.randn(shared.shape[-1], shape[-1]) / shared.shape[-1] ** 0.5
        x = x + 2 * shared.float().cpu() @ mixing
    return x.to(device, dtype)


def problems(case, kernel, dtype=torch.float32):
    """Student and teacher [P, n, d], and a mask."""
    n, d_s, d_t, kind = CASES[case]
    count = 5 if kind == "few" else 3
    x = features(count, n, d_s, dtype=dtype, device=kernel[1])
    y = features(count, n, d_t, shared=x, dtype=dtype, device=kernel[1])
    return x, y, mask_of(kind, count, n, kernel[1])


def mask_of(kind, count, n, device):
    if kind is None:
        return None
    mask = torch.ones(count, n, dtype=torch.bool)
    if kind == "padded":
        mask = torch.arange(n) < torch.linspace(n // 2, n, count).int().unsqueeze(1)
    elif kind == "holes":
        mask = torch.rand(count, n) < 0.7
        mask[:, :5] = torch.tensor([False, True, True, True, True])
    else:  # no row, one, three, four and all
        for problem, rows in enumerate((0, 1, 3, 4)):
            mask[problem] = False
            mask[problem, torch.randperm(n)[:rows]] = True
    return mask.to(device)


def outputs(function, layers, upstream=None):
    """The value and the gradients of all layers, in float64."""
    leaves = [x.detach().requires_grad_() for x in layers]
    value = function(leaves)
    if upstream is None:
        upstream = torch.linspace(0.5, 1.5, value.numel()).view(value.shape)
    grads = torch.autograd.grad(value, leaves, upstream.to(value), allow_unused=True)
    return [x.detach().double().cpu() for x in (value, *grads)]


# Eager arithmetic, in the dtype of the inputs


def eager_terms(x, *, side, kernel="linear", bandwidth=None, estimator="biased"):
    """What inner products are taken of: of one problem [n, d], in float32 after the products."""
    n = len(x)
    x = x - x.mean(0)
    wide = x if x.dtype == torch.float64 else x.float()
    if side == "feature":
        return x, wide.square().sum(-1)
    gram = (x @ x.mT).to(wide.dtype)
    if kernel == "rbf":
        squared = gram.diag() + gram.diag()[:, None] - 2 * gram
        variance = bandwidth**2 if bandwidth else squared.detach().sum() / (n * (n - 1))
        gram = (-squared / (2 * variance)).exp()
    if estimator == "biased":
        return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    hollow = gram - torch.diag(gram.diag())
    sums = hollow.sum(0)
    centred = hollow - (sums + sums[:, None]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return centred - torch.diag(centred.diag())


def eager_inner(x, y, side, estimator):
    if side != "feature":
        return (x * y).sum()
    (x, a), (y, b) = x, y
    inner = (x.mT @ y).to(a.dtype).square().sum()
    if estimator == "biased":
        return inner
    n = len(a)
    return inner - n / (n - 2) * (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2))


def eager_matrix(operator, layers_s, layers_t, mask, side, options):
    """[P, L_s, L_t], problem by problem, dropped rows removed."""
    estimator = options.get("estimator", "biased")
    widths = options.get("bandwidth")
    widths = widths if isinstance(widths, tuple) else (widths, widths)
    options = {"side": side, "kernel": options.get("kernel", "linear"), "estimator": estimator}
    matrices = []
    for p in range(len(layers_s[0])):
        rows = slice(None) if mask is None else mask[p]
        n = len(layers_s[0][p][rows])
        if n < MINIMUM_ROWS[estimator]:
            matrices.append(sum(x[p].sum() * 0.0 for x in (*layers_s, *layers_t)).float().expand(
                len(layers_s), len(layers_t)))  # fmt: skip
            continue
        kept_s, kept_t = (
            [eager_terms(x[p][rows], bandwidth=width, **options) for x in layers]
            for layers, width in zip((layers_s, layers_t), widths, strict=True)
        )
        matrix = [[eager_inner(x, y, side, estimator) for y in kept_t] for x in kept_s]
        if operator == "hsic":
            factor = 1 / (n - 1) ** 2 if estimator == "biased" else 1 / (n * (n - 3))
            matrix = [[factor * value for value in row] for row in matrix]
        else:
            own_s, own_t = (
                [eager_inner(x, x, side, estimator).sqrt() for x in kept]
                for kept in (kept_s, kept_t)
            )
            matrix = [
                [value / (s * t) for value, t in zip(row, own_t, strict=True)]
                for row, s in zip(matrix, own_s, strict=True)
            ]
        matrices.append(torch.stack([torch.stack(row) for row in matrix]))
    return torch.stack(matrices)


def within_twice_eager(exact, ours, theirs, dtype, n):
    """Eager's error of all gradients is their worst: one alone may be right by chance. The floor of
    a value is that of sums of n rounded rows, of a gradient that of its dtype."""
    eps, least = torch.finfo(dtype).eps, 8 * torch.finfo(torch.float32).eps
    scales = [truth.abs().max() + 1e-12 for truth in exact]
    found, eager = (
        [
            (x - truth).abs().max() / scale
            for x, truth, scale in zip(all_, exact, scales, strict=True)
        ]
        for all_ in (ours, theirs)
    )
    eager = [x if x.isfinite() else torch.zeros(()) for x in eager]  # half precision may overflow
    few = 4 if n < 8 else 1  # whose unbiased estimate is of sums that nearly cancel
    bounds = [2 * eager[0] + max(eps / n**0.5, few * least)]
    bounds += [2 * max(eager[1:]) + max(4 * eps, 2 * least)] * (len(exact) - 1)
    for k, (error, bound) in enumerate(zip(found, bounds, strict=True)):
        name = "value" if k == 0 else f"gradient {k - 1}"
        assert error <= bound, f"{name}: {error:.3g} above {bound:.3g}"  # and NaN is wrong


def compare(call, operator, form, layers_s, layers_t, mask, dtype):
    """A pair or all pairs by the kernel, in float64, and eagerly."""
    side, options = FORMS[form]
    many = operator.endswith("matrix")
    split = len(layers_s)
    teacher = {} if operator == "hsic" else {"teacher_grad": True}

    def by_operator(run):
        def function(leaves):
            pair = (leaves[:split], leaves[split:]) if many else leaves
            return run(*pair, mask=mask, **teacher)

        return function

    def eagerly(leaves):
        matrix = eager_matrix(operator, leaves[:split], leaves[split:], mask, side, options)
        return matrix if many else matrix[:, 0, 0]

    layers = [*layers_s, *layers_t]
    dense = getattr(ops, operator)
    within_twice_eager(
        outputs(
            by_operator(lambda *x, **o: dense(*x, **options, **o, backend="reference")),
            [x.double() for x in layers],
        ),
        outputs(by_operator(lambda *x, **o: call(operator, form, *x, **o)), layers),
        outputs(eagerly, layers),
        dtype,
        layers[0].shape[-2],
    )


# Accuracy


@forms
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_cka_and_both_gradients_err_at_most_twice_as_far_as_eager(
    kernel, call, form, case, dtype, unless
):
    main = torch.bfloat16 if "cuda" in kernel else torch.float32
    unless(dtype == main and (case == "padded" or (form in EACH and "cuda" in kernel)))
    x, y, mask = problems(case, kernel, dtype)
    compare(call, "cka", form, [x], [y], mask, dtype)


@forms
@pytest.mark.parametrize("case", ["fewest rows", "plain", "beside a tile", "few valid rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hsic_and_both_gradients_err_at_most_twice_as_far_as_eager(
    kernel, call, form, case, dtype, unless
):
    unless(form in EACH and dtype == torch.float32)
    x, y, mask = problems(case, kernel, dtype)
    compare(call, "hsic", form, [x], [y], mask, dtype)


@forms
@pytest.mark.parametrize("kind", [None, "few"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cka_matrix_errs_at_most_twice_as_far_as_eager(kernel, call, form, kind, dtype, unless):
    unless(form in EACH and dtype == torch.float32 and (kind is None or "cuda" in kernel))
    count = 5 if kind == "few" else 2
    shared = features(count, 19, 6)
    layers_s, layers_t = (
        [features(count, 19, d, shared=shared, dtype=dtype, device=kernel[1]) for d in widths]
        for widths in ((8, 17, 33), (17, 5))
    )
    mask = mask_of(kind, count, 19, kernel[1])
    compare(call, "cka_matrix", form, layers_s, layers_t, mask, dtype)


@forms
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_reference(kernel, call, form, case):
    x, y, mask = problems(case, kernel, torch.float64)
    options = FORMS[form][1]
    results = [
        outputs(lambda leaves, run=run: run(*leaves, mask=mask, teacher_grad=True), [x, y])
        for run in (
            lambda *z, **o: ops.cka(*z, **options, **o, backend="reference"),
            lambda *z, **o: call("cka", form, *z, **o),
        )
    ]
    for truth, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11 * truth.abs().max().item())


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("offset", "columns"), [(30, 5), (300, 1)])
@pytest.mark.parametrize("n", [64, 129])
def test_large_means_in_a_few_dimensions_cost_no_digits(
    kernel, call, form, dtype, offset, columns, n
):
    x = features(2, n, 100)
    y = features(2, n, 60, shared=x)
    x[..., :columns] += offset
    y[..., :columns] -= offset
    layers = [z.to(kernel[1], dtype) for z in (x, y)]
    options = {**FORMS[form][1], "teacher_grad": True}
    exact = outputs(
        lambda leaves: ops.cka(*leaves, **options, backend="reference"),
        [z.double() for z in layers],
    )
    ours = outputs(lambda leaves: call("cka", form, *leaves, teacher_grad=True), layers)
    # A constant 1 beside what is centred in float32 and rounded to the dtype of a product.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[0], exact[0], rtol=0, atol=max(4e-6, 0.1 * eps))
    for mine, truth in zip(ours[1:], exact[1:], strict=True):
        assert (mine - truth).norm() <= (4 * eps + 2e-5) * truth.norm()


@biased_forms
@pytest.mark.parametrize("case", ["plain", "padded", "few valid rows"])
def test_gram_distance_is_twice_what_cka_lacks(kernel, call, form, case):
    x, y, mask = problems(case, kernel)
    distance, cka = (
        outputs(lambda leaves, op=op: call(op, form, *leaves, mask=mask, teacher_grad=True), [x, y])
        for op in ("gram_distance", "cka")
    )
    defined = torch.ones(len(x)) if mask is None else (mask.sum(-1) >= 2).cpu().double()
    torch.testing.assert_close(distance[0], defined * (2 - 2 * cka[0]), rtol=0, atol=1e-6)
    for mine, its in zip(distance[1:], cka[1:], strict=True):
        torch.testing.assert_close(mine, -2 * its, rtol=1e-4, atol=1e-6)


@forms
@pytest.mark.parametrize("kind", [None, "few"])
def test_hsic_matrix_holds_the_hsic_of_every_pair(kernel, call, form, kind):
    layers = [features(5, 19, d, device=kernel[1]) for d in (8, 17, 5)]
    mask = mask_of(kind, 5, 19, kernel[1])
    widths = FORMS[form][1].get("bandwidth")
    of_s, of_t = widths if isinstance(widths, tuple) else (widths, widths)

    def as_one(cross, own_s, own_t):
        return torch.cat([cross.flatten(-2), own_s, own_t], -1)

    def matrix(leaves):
        found = call("hsic_matrix", form, leaves[:2], leaves[2:], mask=mask, teacher_grad=True)
        return as_one(*found)

    def calls(leaves):
        def hsic(x, y, *bandwidth):
            options = {"bandwidth": bandwidth} if widths else {}
            return call("hsic", form, x, y, mask=mask, **options)

        cross = torch.stack([hsic(x, leaves[2], of_s, of_t) for x in leaves[:2]], -1)
        own_s = torch.stack([hsic(x, x, of_s, of_s) for x in leaves[:2]], -1)
        return as_one(cross.unsqueeze(-1), own_s, hsic(leaves[2], leaves[2], of_t, of_t)[..., None])

    upstream = torch.linspace(0.5, 1.5, 25).view(5, 5)
    for mine, its in zip(
        outputs(matrix, layers, upstream), outputs(calls, layers, upstream), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5 * its.abs().max().item())


# Pairs and layers


@each_form
@pytest.mark.parametrize("operator", ["cka", "gram_distance"])
def test_pairs_of_a_sequence_equal_their_own_calls(kernel, call, form, operator):
    """Widths differ, and one layer is in two pairs."""
    shared = features(3, 19, 6)
    s = [features(3, 19, d, shared=shared, device=kernel[1]) for d in (8, 17)]
    t = [features(3, 19, d, shared=shared, device=kernel[1]) for d in (17, 5)]
    mask = mask_of("padded", 3, 19, kernel[1])

    def sequence(leaves):
        a, b, c, d = leaves
        return call(operator, form, [a, b, a], [c, d, d], mask=mask, teacher_grad=True)

    def calls(leaves):
        a, b, c, d = leaves
        return torch.stack([
            call(operator, form, x, y, mask=mask, teacher_grad=True)
            for x, y in ((a, c), (b, d), (a, d))
        ])  # fmt: skip

    for mine, its in zip(outputs(sequence, [*s, *t]), outputs(calls, [*s, *t]), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-6)


@each_form
@pytest.mark.parametrize("kind", [None, "few"])
def test_teacher_kept_equals_plain_calls_and_repeats(kernel, call, form, kind, unless):
    unless(kind is None and form == "gram unbiased" or "cuda" in kernel)
    options = FORMS[form][1]
    count = 5 if kind == "few" else 2
    shared = features(count, 19, 6)
    s, t = (
        [features(count, 19, d, shared=shared, device=kernel[1]) for d in widths]
        for widths in ((8, 17), (17, 5))
    )
    mask = mask_of(kind, count, 19, kernel[1])
    for operator in ("cka", "cka_matrix"):
        plain = outputs(lambda x, op=operator: call(op, form, x, t, mask=mask), s)
        teacher = CKATeacher(t, mask=mask, **options, backend=kernel[0])
        first, second = (outputs(getattr(teacher, operator), s) for _ in range(2))
        for mine, again, its in zip(first, second, plain, strict=True):
            assert torch.equal(mine, again)
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=2e-6)
        with torch.no_grad():
            without = getattr(teacher, operator)(s).double().cpu()
        torch.testing.assert_close(without, first[0], rtol=1e-6, atol=1e-6)


# Exactness


@forms
@pytest.mark.parametrize("n", [5, 17, 127, 129, 257])
@pytest.mark.parametrize("d", [1, 40, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_features_have_cka_of_exactly_one(kernel, call, form, n, d, dtype, unless):
    unless(dtype == torch.float32 and (n, d) == (17, 40))
    x = features(2, n, d, dtype=dtype, device=kernel[1])
    more = {"bandwidth": None} if form == "rbf two bandwidths" else {}
    x = x.requires_grad_()
    value = call("cka", form, x, x.detach().clone(), **more)
    assert (value == 1).all()
    (grad,) = torch.autograd.grad(value.sum(), x)
    # Beside the gradient of unrelated features, of 1/|x|.
    assert grad.norm() <= 1e-4 / x.norm()
    with torch.no_grad():  # the path without gradients is another one
        assert (call("cka", form, x, x.clone(), **more) == 1).all()
    if form in BIASED:
        assert (call("gram_distance", form, x, x.detach().clone(), **more) == 0).all()


@forms
@pytest.mark.parametrize("constant", [0.0, 0.1, 300.0])
@pytest.mark.parametrize("n", [7, 129])
def test_equal_rows_give_zero_with_zero_gradient(kernel, call, form, constant, n, unless):
    unless(constant == 0.1 and n == 7)
    x = torch.full((2, n, 5), constant, device=kernel[1])
    y = features(2, n, 3, device=kernel[1])
    for operator in ("cka", "gram_distance")[: 1 + (form in BIASED)]:
        results = outputs(lambda z, op=operator: call(op, form, *z, teacher_grad=True), [x, y])
        assert not any(torch.count_nonzero(z) for z in results)
    value, of_x, of_y = outputs(lambda z: call("hsic", form, *z), [x, y])
    assert torch.count_nonzero(value) == torch.count_nonzero(of_x) == 0
    assert of_y.isfinite().all()


@forms
@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_what_masked_rows_hold_reaches_nothing(kernel, call, form, filling, unless):
    unless(math.isnan(filling) and form in EACH)
    x, y = features(3, 19, 5, device=kernel[1]), features(3, 19, 9, device=kernel[1])
    mask = mask_of("holes", 3, 19, kernel[1])
    results = []
    for value in (0.0, filling):
        filled = [torch.where(mask[..., None], z, value) for z in (x, y)]
        results.append(
            outputs(lambda z: call("cka", form, *z, mask=mask, teacher_grad=True), filled)
        )
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)
        assert mine.isfinite().all()
    for grad in results[0][1:]:
        assert torch.count_nonzero(grad[~mask.cpu()]) == 0


@forms
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_stays_in_its_problem(kernel, call, form, bad, masked, unless):
    unless(math.isnan(bad) and not masked and form in EACH)
    x, y = features(3, 19, 5, device=kernel[1]), features(3, 19, 9, device=kernel[1])
    mask = mask_of("padded", 3, 19, kernel[1]) if masked else None

    def results():
        return outputs(lambda z: call("cka", form, *z, mask=mask, teacher_grad=True), [x, y])

    clean = results()
    x[1, 3, 2] = bad
    for mine, its in zip(results(), clean, strict=True):
        assert mine[1].isnan().any()
        assert torch.equal(mine[[0, 2]], its[[0, 2]])


@each_form
@pytest.mark.parametrize("operator", ["hsic", "cka", "cka_matrix", "hsic_matrix"])
def test_empty_batch_is_empty(kernel, call, form, operator):
    x = torch.zeros(0, 6, 3, device=kernel[1], requires_grad=True)
    y, mask = torch.zeros(0, 6, 4, device=kernel[1]), torch.ones(0, 6, device=kernel[1])
    inputs = ([x], [y]) if operator.endswith("matrix") else (x, y)
    value = call(operator, form, *inputs, mask=mask)
    value = value[0] if isinstance(value, tuple) else value
    value.sum().backward()
    assert value.shape[0] == 0 and x.grad.shape == x.shape


@each_form
@pytest.mark.parametrize("layout", ["permuted", "strided", "sliced", "one problem for all"])
def test_strides_change_nothing(kernel, call, form, layout):
    plain = [features(3, 19, d, device=kernel[1]) for d in (6, 9)]
    if layout == "one problem for all":
        plain = [x[:1].repeat(3, 1, 1) for x in plain]
    variant = [
        {
            "permuted": x.transpose(0, 1).contiguous().transpose(0, 1),
            "strided": x.repeat_interleave(2, dim=-1)[..., ::2],
            "sliced": torch.cat([x, x], -1)[..., : x.shape[-1]],
            "one problem for all": x[:1].expand_as(x),
        }[layout]
        for x in plain
    ]
    mask = mask_of("padded", 3, 19, kernel[1])
    one, two = (
        outputs(lambda z: call("cka", form, *z, mask=mask, teacher_grad=True), layers)
        for layers in (plain, variant)
    )
    assert all(map(torch.equal, one, two))


@each_form
def test_results_are_the_same_bit_for_bit_each_time(kernel, call, form):
    x, y, mask = problems("holes", kernel)
    one, two = (
        outputs(lambda z: call("cka", form, *z, mask=mask, teacher_grad=True), [x, y])
        for _ in range(2)
    )
    assert all(map(torch.equal, one, two))


@forms
def test_threads_change_nothing_but_the_last_digits(kernel, call, form):
    if kernel[0] != "cpp":
        pytest.skip("threads are those of the CPU")
    x, y, mask = problems("holes", kernel)
    for many in (len(x), 1):  # several problems, and one that threads must share
        options, results = {"mask": mask[:many], "teacher_grad": True}, []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            results.append(
                outputs(lambda z, o=options: call("cka", form, *z, **o), [x[:many], y[:many]])
            )
        torch.set_num_threads(1)
        for mine, its in zip(*results, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


# What stands around the kernels


@each_form
def test_gradients_have_the_inputs_dtype_and_values_are_float32(kernel, call, form):
    for dtype in HALF_AND_SINGLE:
        x, y, _ = problems("plain", kernel, dtype)
        value = call("cka", form, x.requires_grad_(), y)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert (value.dtype, grad.dtype) == (torch.float32, dtype)
        assert grad.is_contiguous()


@each_form
def test_graph_that_is_kept_gives_the_same_gradient_twice(kernel, call, form):
    x, y, _ = problems("plain", kernel)
    value = call("cka", form, x.requires_grad_(), y).sum()
    (first,) = torch.autograd.grad(2 * value, x, retain_graph=True)
    (second,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(first, 2 * second)


@pytest.mark.parametrize("operator", ["hsic", "cka", "cka_matrix"])
def test_second_derivative_raises_naming_the_operator(kernel, call, operator):
    x, y, _ = problems("plain", kernel)
    inputs = ([x.requires_grad_()], [y]) if operator == "cka_matrix" else (x.requires_grad_(), y)
    value = call(operator, "gram biased", *inputs).sum()
    (grad,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"^{operator} has first derivatives only"):
        grad.sum().backward()


@each_form
@pytest.mark.parametrize("operator", ["hsic", "cka", "cka_matrix"])
def test_compiled_without_graph_breaks_and_with_dynamic_shapes_equals_eager(
    kernel, call, form, operator, monkeypatch
):
    side, options = FORMS[form]
    monkeypatch.setattr(MODULE, "side_for", lambda *_: side)

    def loss(x, y, mask):
        inputs = ([x, x], [y]) if operator == "cka_matrix" else (x, y)
        return getattr(ops, operator)(*inputs, mask=mask, **options, backend=kernel[0])

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, n in ((2, 17), (3, 29)):
        x = features(count, n, 6, device=kernel[1]).requires_grad_()
        y = features(count, n, 9, device=kernel[1])
        mask = mask_of("padded", count, n, kernel[1])
        results = []
        for function in (loss, compiled):
            value = function(x, y, mask)
            results.append([value, *torch.autograd.grad(3 * value.sum(), x)])
        for mine, its in zip(*results, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gram biased", "tiles unbiased"])
def test_compiled_by_inductor_equals_eager(kernel, call, form, monkeypatch):
    if kernel == ("triton", "cpu"):
        pytest.skip("the interpreter runs Python, which a compiled graph cannot call")
    side, options = FORMS[form]
    monkeypatch.setattr(MODULE, "side_for", lambda *_: side)

    def loss(x, y):
        return 1 - ops.cka(x, y, **options, backend=kernel[0]).mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    x, y, _ = problems("plain", kernel)
    x.requires_grad_()
    results = [[f(x, y), *torch.autograd.grad(f(x, y), x)] for f in (loss, compiled)]
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@each_form
def test_autocast_changes_nothing(kernel, call, form):
    x, y, mask = problems("padded", kernel)
    results = []
    for enabled in (False, True):
        with torch.autocast(kernel[1], torch.bfloat16, enabled=enabled):
            results.append(
                outputs(lambda z: call("cka", form, *z, mask=mask, teacher_grad=True), [x, y])
            )
    assert all(map(torch.equal, *results))


@each_form
def test_checkpointed_loss_has_the_same_gradient(kernel, call, form):
    x, y, _ = problems("plain", kernel)
    x.requires_grad_()

    def loss(x):
        return call("cka", form, x, y).sum()

    (plain,) = torch.autograd.grad(loss(x), x)
    (again,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    assert torch.equal(plain, again)


@each_form
def test_saved_tensors_may_come_back_with_other_strides(kernel, call, form):
    x, y, _ = problems("plain", kernel)
    x = x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    gradients = []
    for pack in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            value = call("cka", form, x, y).sum()
        gradients.append(torch.autograd.grad(3 * value, x)[0])
    torch.testing.assert_close(*gradients)


def test_what_a_kernel_cannot_serve_it_refuses_with_a_reason(kernel):
    x = torch.zeros(4, 2, device="meta")
    with pytest.raises(RuntimeError, match=f"{kernel[0]}: inputs are on meta"):
        ops.cka(x, x, backend=kernel[0])
    if kernel[0] != "cpp":
        x = torch.zeros(4, 2, dtype=torch.float64, device=kernel[1])
        with pytest.raises(RuntimeError, match="cka: .*float64"):
            ops.cka(x, x, backend=kernel[0])


# The contract


def dense_layers(layers, grams, mask, bandwidths, unbiased):
    """Of each layer in float64: valid rows, G, unit, centred features, and what dG becomes."""
    count, n = layers[0].shape[:2]
    valid = torch.ones(count, n, dtype=torch.bool) if mask is None else mask
    rows = _Rows(valid, valid.sum(-1).double())
    entries = valid.unsqueeze(-1) & valid.unsqueeze(-2)
    made = []
    for k in range(len(layers) - (0 if grams is None else len(grams))):
        x = torch.where(valid.unsqueeze(-1), layers[k].double(), 0.0)
        centred = _centre_features(x, rows)
        gram, size = centred @ centred.mT, centred.square().sum((-2, -1))
        weight = None
        if bandwidths:
            norms = gram.diagonal(dim1=-2, dim2=-1)
            squared = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * gram).clamp(min=0)
            typical = 2 * size / (rows.count - 1).clamp(min=1)
            variance = torch.full_like(size, bandwidths[k] ** 2) if bandwidths[k] else typical
            variance = torch.where(variance == 0, 1.0, variance)
            constant = (-typical / (2 * variance)).exp()
            size = 1 - constant
            if unbiased:
                size = size * (-typical / (4 * variance)).exp().clamp(min=1e-15)
            weight = (-squared / (2 * variance)[:, None, None]).exp()
            gram = weight - constant[:, None, None]
            weight = -weight / (2 * variance)[:, None, None]
        unit = torch.where(size == 0, 1.0, size)
        gram = (gram / unit[:, None, None]).masked_fill(~entries, 0.0)
        made.append((gram, unit, centred, weight, x.sum(1) / rows.count.clamp(min=1)[:, None]))
    return rows, entries, made


def dense_centred(gram, rows, entries, unbiased):
    """G as the estimator asks."""
    if unbiased:
        entries = entries & ~torch.eye(gram.shape[-1], dtype=torch.bool)
        gram = gram.masked_fill(~entries, 0.0)
    n = rows.count[:, None, None]
    one, all_ = (n - 2, (n - 1) * (n - 2)) if unbiased else (n, n * n)
    means = gram.sum(-1, keepdim=True) / one.clamp(min=1)
    total = gram.sum((-2, -1), keepdim=True) / all_.clamp(min=1)
    return (gram - means - means.mT + total).masked_fill(~entries, 0.0)


def dense_forward(layers, grams, mask, pairs, bandwidths, side, unbiased, keep):
    dtype = torch.promote_types(layers[0].dtype, torch.float32)
    rows, entries, made = dense_layers(layers, grams, mask, bandwidths, unbiased)
    known = [] if grams is None else list(grams.double())
    all_grams = [gram for gram, *_ in made] + known
    centred = [dense_centred(gram, rows, entries, unbiased) for gram in all_grams]
    enough = rows.count >= (4 if unbiased else 2)
    inner = []
    for i, j in pair_indices(pairs):
        value = (centred[i] * centred[j]).sum((-2, -1))
        if i == j:
            size = all_grams[i].square().sum((-2, -1))
            value = value.masked_fill(value <= 2 * torch.finfo(dtype).eps * rows.count * size, 0.0)
        inner.append(value.masked_fill(~enough, 0.0))
    if side == "gram":
        kept = [dense_centred(gram, rows, entries, False) for gram, *_ in made]
    elif side == "feature":
        kept = [made[i][2].mT @ made[j][2] for i, j in pair_indices(pairs)]
    else:
        kept = [gram.sum(-1) if bandwidths else gram.diagonal(dim1=1, dim2=2) for gram, *_ in made]
    nothing = torch.zeros(0, len(layers[0]))
    return tuple(
        x.to(dtype)
        for x in (
            torch.stack(inner),
            torch.stack([unit for _, unit, *_ in made]) if made else nothing,
            torch.cat([mean.flatten() for *_, mean in made]) if keep else nothing.flatten(),
            torch.cat([x.flatten() for x in kept]) if keep else nothing.flatten(),
        )
    )


def dense_backward(
    grad_inner, unit, means, kept, layers, grams, mask, pairs, bandwidths, side, unbiased, wanted
):
    rows, entries, made = dense_layers(layers, grams, mask, bandwidths, unbiased)
    known = [] if grams is None else list(grams.double())
    centred = [
        dense_centred(gram, rows, entries, unbiased) for gram in [m[0] for m in made] + known
    ]
    enough = (rows.count >= (4 if unbiased else 2))[:, None, None]
    gradients = []
    for layer in wanted:
        _, size, x, weight, _ = made[layer]
        total = torch.zeros_like(centred[layer])
        for grad, (i, j) in zip(grad_inner.double(), pair_indices(pairs), strict=True):
            for mine, its in ((i, j), (j, i)):
                if mine == layer:
                    total = total + grad[:, None, None] * centred[its]
        total = total / size[:, None, None]
        if weight is None:
            grad_x = 2 * total @ x
        else:  # of the squared distances, each of which is there twice
            total = (total * weight).masked_fill(~entries, 0.0)
            grad_x = 4 * (total.sum(-1, keepdim=True) * x - total @ x)
        grad_x = grad_x.masked_fill(~(enough & rows.valid.unsqueeze(-1)), 0.0)
        gradients.append(grad_x.to(layers[layer].dtype).contiguous())
    return gradients


@pytest.fixture
def contract(monkeypatch):
    """The dense implementation in the place of cpp."""
    monkeypatch.setitem(MODULE._FORWARD, "cpp", dense_forward)
    monkeypatch.setitem(MODULE._BACKWARD, "cpp", dense_backward)
    monkeypatch.setattr(MODULE.library, "load", lambda *_: None)
    for operator in ("hsic", "cka", "cka_matrix", "hsic_matrix"):
        monkeypatch.setattr(dispatch.KERNELS[operator, "cpp"], "_outcome", None)


@forms
@pytest.mark.parametrize("kind", [None, "few"])
def test_contract_written_densely_agrees_with_the_reference(contract, form, kind, monkeypatch):
    side, options = FORMS[form]
    monkeypatch.setattr(MODULE, "side_for", lambda *_: side)
    layers = [features(5, 9, d, dtype=torch.float64) for d in (4, 6, 3)]
    mask = mask_of(kind, 5, 9, "cpu")
    for operator in ("cka_matrix", "hsic_matrix"):

        def value(leaves, backend, operator=operator):
            found = getattr(ops, operator)(
                leaves[:2], leaves[2:], mask=mask, teacher_grad=True, **options, backend=backend
            )
            found = found if isinstance(found, tuple) else (found,)
            return torch.cat([x.flatten() for x in found])

        results = [outputs(lambda x, b=b: value(x, b), layers) for b in ("reference", "cpp")]
        for truth, mine in zip(*results, strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-10)


def operator_of(kernel, direction):
    return getattr(torch.ops.kdfast, f"cka_{direction}_{kernel[0]}").default


def contract_inputs(kernel, form, kind="few", count=5, n=19):
    """Arguments of the forward operator: three layers, in pairs with one another and themselves."""
    side, options = FORMS[form]
    layers = [features(count, n, d, device=kernel[1]) for d in (8, 5, 17)]
    widths = options.get("bandwidth") or 0.0
    widths = [*widths, 0.0] if isinstance(widths, tuple) else [widths] * 3
    bandwidths = widths if "kernel" in options else []
    pairs = [0, 1, 0, 2, 0, 0, 1, 1, 2, 2]
    unbiased = options.get("estimator") == "unbiased"
    return (layers, None, mask_of(kind, count, n, kernel[1]), pairs, bandwidths, side, unbiased)


@forms
@pytest.mark.parametrize("keep", [True, False])
def test_each_output_of_the_forward_is_that_of_the_contract(kernel, form, keep):
    few = operator_of(kernel, "forward")(*contract_inputs(kernel, form), keep)
    assert all(x.isfinite().all() for x in few)  # where nothing is defined, that is all
    inputs = contract_inputs(kernel, form, "padded")
    on_cpu = [
        [x.cpu() for x in z] if isinstance(z, list) and z and isinstance(z[0], torch.Tensor)
        else z.cpu() if isinstance(z, torch.Tensor) else z
        for z in inputs
    ]  # fmt: skip
    found = operator_of(kernel, "forward")(*inputs, keep)
    exact = dense_forward(*on_cpu, keep)
    for name, mine, truth in zip(("inner", "unit", "means", "kept"), found, exact, strict=True):
        assert mine.shape == truth.shape and mine.dtype == truth.dtype, name
        assert mine.isfinite().all(), name
        # What only the backend's own backward reads is its own affair, but for Gram matrices,
        # which CKATeacher hands to other calls.
        if name in ("inner", "unit") or (name == "kept" and inputs[5] == "gram"):
            torch.testing.assert_close(
                mine.cpu(), truth, rtol=1e-4, atol=1e-5 * max(truth.abs().max(), 1e-9)
                if truth.numel() else 0,
            )  # fmt: skip


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@each_form
@pytest.mark.parametrize("known", [False, True], ids=["", "grams"])
def test_kernels_pass_opcheck(kernel, form, known, unless):
    unless(form == "gram unbiased" and not known or "cuda" in kernel)
    inputs = contract_inputs(kernel, form, "padded", count=2, n=9)
    forward, backward = (operator_of(kernel, x) for x in ("forward", "backward"))
    if known:
        if inputs[5] != "gram":
            pytest.skip("kept by the Gram side alone")
        layers, _, mask, pairs, *rest = inputs
        *_, kept = forward(*inputs, True)
        grams = kept.view(3, 2, 9, 9)[2:].clone()
        inputs = (layers, grams, mask, pairs[:-2], *rest)
    torch.library.opcheck(forward, (*inputs, True), test_utils=CHECKS)
    torch.library.opcheck(forward, (*inputs, False), test_utils=CHECKS)
    inner, *saved = forward(*inputs, True)
    arguments = (torch.ones_like(inner), *saved, *inputs, [0] if known else [0, 2])
    torch.library.opcheck(backward, arguments, test_utils=CHECKS)


@each_form
def test_only_the_layers_wanted_get_gradients_in_their_order(kernel, form):
    inputs = contract_inputs(kernel, form, None)
    inner, *saved = operator_of(kernel, "forward")(*inputs, True)
    upstream = torch.linspace(-1, 1, inner.numel(), device=kernel[1]).view(inner.shape)
    strided = upstream.mT.contiguous().mT  # of any strides
    backward = operator_of(kernel, "backward")
    every = backward(upstream, *saved, *inputs, [0, 1, 2])
    assert [x.shape for x in every] == [x.shape for x in inputs[0]]
    for wanted in itertools.permutations(range(3), 2):
        some = backward(strided, *saved, *inputs, list(wanted))
        assert all(torch.equal(x, every[i]) for x, i in zip(some, wanted, strict=True))
