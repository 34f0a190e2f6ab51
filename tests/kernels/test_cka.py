"""What is particular to the Triton kernels: tiles, strips, splits, launches. By the interpreter."""

import importlib

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from kdfast.kernels import cka as kernels  # noqa: E402
from kdfast.ops import cka, cka_matrix, dispatch  # noqa: E402

reference = importlib.import_module("kdfast.reference.cka")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is masked

SIDES = ("tiles", "gram", "feature")
sides = pytest.mark.parametrize("side", SIDES)
estimators = pytest.mark.parametrize("estimator", ["biased", "unbiased"])
FORMS = {
    **{f"{side} {e}": (side, {"estimator": e}) for side in SIDES for e in ("biased", "unbiased")},
    "rbf biased": ("tiles", {"kernel": "rbf"}),
    "rbf unbiased": ("tiles", {"kernel": "rbf", "estimator": "unbiased", "bandwidth": (3.0, 5.0)}),
}
forms = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16, so that few rows and features make several of them; no Gram matrix on chip."""
    sizes = {"block": 16, "block_k": 16, "block_d": 16}
    kinds = {
        "gram": ("block", "block_d"),
        "apply": ("block", "block_k", "block_d"),
        "feature_products": ("block", "block_k"),
        "feature_apply": ("block", "block_k", "block_d"),
        "column_sums": ("block", "block_d"),
        "row_norms": ("block", "block_d"),
        "whole_gram": ("block_d",),
    }
    table = {
        kernel: {
            size: kernels._blocks(4, 1, **{name: sizes[name] for name in names}) for size in (2, 4)
        }
        for kernel, names in kinds.items()
    }
    monkeypatch.setattr(kernels, "LAUNCH", {"interpreter": table})
    monkeypatch.setattr(kernels, "ON_CHIP", {2: 0, 4: 0})
    monkeypatch.setattr(kernels, "ONE_TILE", 16)


def layers(*widths, problems=2, n=20, dtype=torch.float32, offset=0.0):
    """Correlated features, of which a few dimensions lie far from zero."""
    shared = torch.randn(problems, n, 4)
    found = []
    for d in widths:
        x = shared @ torch.randn(4, d) + torch.randn(problems, n, d)
        x[..., : max(1, d // 8)] += offset
        found.append(x.to(dtype))
    return found


def results(function, layers_s, layers_t, **options):
    """Values and the gradients of all layers."""
    many = len(layers_s)
    leaves = [x.detach().clone().requires_grad_() for x in (*layers_s, *layers_t)]
    value = function(leaves[:many], leaves[many:], teacher_grad=True, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel()).view(value.shape).to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, upstream)]


def on_side(side, operator="cka"):
    """The kernels' operator, on a side of choice."""
    serve, reason = dispatch.KERNELS[operator, "triton"].loaded()
    assert reason is None
    names = ("layers_s", "layers_t") if operator == "cka_matrix" else ("x_s", "x_t")

    def run(layers_s, layers_t, **options):
        given = {"mask": None, "kernel": "linear", "bandwidth": None, "estimator": "biased"}
        inputs = dict(zip(names, (layers_s, layers_t), strict=True))
        return serve(**inputs, **{**given, **options}, side=side)

    return run


def assert_agree(layers_s, layers_t, side, tolerance=2e-5, operator="cka", **options):
    wide = [[x.double() for x in group] for group in (layers_s, layers_t)]
    expected = results(getattr(reference, operator), *wide, **options)
    found = results(on_side(side, operator), layers_s, layers_t, **options)
    for ours, theirs in zip(found, expected, strict=True):
        scale = max(theirs.abs().max().item(), 1e-3)
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * scale)


def holes(n, problems=2):
    mask = torch.arange(problems * n).view(problems, n) % 5 != 0
    mask[0, :3] = False
    return mask


@forms
@pytest.mark.parametrize(
    "masked", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["holes", "all rows"]
)
def test_several_tiles_agree_with_the_reference(small_tiles, form, masked):
    side, options = FORMS[form]
    x, y = layers(17, 18, problems=1, n=18, offset=30.0)
    assert_agree([x], [y], side, mask=holes(18, 1) if masked else None, **options)


@pytest.mark.exhaustive
@forms
def test_tiles_that_end_with_rows_and_features(small_tiles, form):
    side, options = FORMS[form]
    x, y = layers(32, 16, n=32)
    assert_agree([x], [y], side, **options)


@estimators
@pytest.mark.parametrize("n", [4, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_pairs_on_chip_agree_with_the_reference(n, estimator):
    pairs = layers(5, 40, 70, 33, 3, 70, n=n, offset=30.0)
    assert_agree(pairs[:3], pairs[3:], "tiles", estimator=estimator)
    assert_agree(pairs[:3], pairs[3:], "tiles", estimator=estimator, mask=holes(n))


def launches(monkeypatch, name):
    """Grids of the launches of one kernel."""
    kernel, grids = getattr(kernels, name), []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, name, Recorder())
    return grids


def test_pairs_of_differing_widths_and_strides_are_one_launch(monkeypatch):
    forward, backward = (
        launches(monkeypatch, f"_pairs_{name}") for name in ("forward", "backward")
    )
    pairs = layers(5, 16, 33, 8, 16, 7, n=9)
    pairs[1] = pairs[1].transpose(0, 1).contiguous().transpose(0, 1)
    x_s, x_t = [x.requires_grad_() for x in pairs[:3]], pairs[3:]
    on_side("tiles")(x_s, x_t, teacher_grad=False).sum().backward()
    assert forward == [(6,)] and backward == [(6,)]


def test_more_pairs_than_one_launch_takes(monkeypatch):
    monkeypatch.setattr(kernels, "PAIRS", 2)
    grids = launches(monkeypatch, "_pairs_forward")
    pairs = layers(5, 16, 33, 8, 16, 7, n=9)
    assert_agree(pairs[:3], pairs[3:], "tiles")
    assert grids == [(4,), (2,)]


@pytest.mark.exhaustive
@estimators
def test_widths_and_rows_are_split_where_problems_are_few(small_tiles, monkeypatch, estimator):
    monkeypatch.setattr(kernels, "PROGRAMS", 1 << 20)
    x, y = layers(150, 20, problems=1, n=12)
    assert_agree([x], [y], "gram", estimator=estimator)
    x, y = layers(140, 20, problems=1, n=17)
    assert_agree([x], [y], "gram", estimator=estimator)
    x, y = layers(9, 9, problems=1, n=150)
    assert_agree([x], [y], "feature", estimator=estimator, mask=holes(150, 1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form][0] == "tiles"])
@pytest.mark.parametrize("workspace", [0, 40_000], ids=["of 16 rows", "of two problems"])
def test_strips_of_gram_matrices_agree_with_the_reference(
    small_tiles, monkeypatch, form, workspace
):
    monkeypatch.setattr(kernels, "WORKSPACE", workspace)
    x, y = layers(9, 20, problems=3, n=37)
    assert_agree([x], [y], "tiles", mask=holes(37, 3), **FORMS[form][1])


@pytest.mark.parametrize(
    "form", ["gram unbiased", "feature unbiased", "tiles unbiased", "rbf biased"]
)
def test_layers_in_many_pairs(small_tiles, form):
    side, options = FORMS[form]
    group = layers(5, 9, 9, 7, problems=1, n=12)
    assert_agree(group[:2], group[2:], side, operator="cka_matrix", mask=holes(12, 1), **options)


@pytest.mark.parametrize("tiles", ["usual", pytest.param("small", marks=pytest.mark.exhaustive)])
@forms
def test_equal_features_have_cka_of_exactly_one(request, form, tiles):
    if tiles == "small":
        request.getfixturevalue("small_tiles")
    side, options = FORMS[form]
    (x,) = layers(37, n=21)
    options = {**options, "bandwidth": None}
    value = on_side(side)([x], [x.clone()], mask=holes(21), teacher_grad=False, **options)
    assert torch.equal(value, torch.ones(1, 2))


@pytest.mark.exhaustive
@forms
def test_results_repeat_bit_by_bit_and_nothing_is_left_unwritten(small_tiles, form):
    side, options = FORMS[form]
    x, y = layers(18, 35, n=20)
    mask = holes(20)
    mask[1, 1:] = False
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        first = results(on_side(side), [x], [y], mask=mask, **options)
        again = results(on_side(side), [x], [y], mask=mask, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, theirs in zip(first, again, strict=True):
        assert torch.equal(ours, theirs) and ours.isfinite().all()
    assert all(not gradient[1].any() for gradient in first[1:])


@sides
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_features_agree_with_the_reference(side, dtype):
    x, y = layers(33, 18, n=33, dtype=dtype)
    assert_agree([x], [y], side, 2e-2)


@pytest.mark.exhaustive
@forms
@pytest.mark.parametrize("n", [127, 128, 129, 260])
def test_usual_tiles_agree_with_the_reference(form, n):
    side, options = FORMS[form]
    x, y = layers(130, 64, n=n, offset=300.0)
    assert_agree([x], [y], side, 1e-4, mask=holes(n), **options)


def test_public_functions_reach_the_kernels():
    x, y = layers(8, 9, n=12)
    torch.testing.assert_close(cka(x, y, backend="triton"), cka(x, y, backend="reference"))
    pair = [x, y]
    found = cka_matrix(pair, pair, backend="triton")
    torch.testing.assert_close(found, cka_matrix(pair, pair, backend="reference"))
