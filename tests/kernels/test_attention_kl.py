"""What is particular to the Triton kernels: tiles, launches, memory. Run by the interpreter."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from kdfast.kernels import attention_kl as kernels  # noqa: E402
from kdfast.ops import attention_kl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is masked
DIRECTIONS = ("forward", "reverse", "js")
directions = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture
def small_tiles(monkeypatch):
    """16 x 16 tiles, so that few tokens make several of them; nothing is fused."""
    table = {(size, width): (16, 16, 4, 1) for size in (2, 4) for width in (64, 128)}
    names = ("forward", "backward_query", "backward_key")
    monkeypatch.setattr(
        kernels, "LAUNCH", {"interpreter": {**{name: table for name in names}, "fused": {}}}
    )


def four(b=2, h=2, n=40, d=8, *, nk=None, h_kv=None, h_t=None, d_t=None, dtype=torch.float32):
    nk, h_t, d_t = nk or n, h_t or h, d_t or d
    shapes = ((b, h, n, d), (b, h_kv or h, nk, d), (b, h_t, n, d_t), (b, h_t, nk, d_t))
    return [torch.randn(shape).to(dtype) for shape in shapes]


def results(inputs, backend, upstream=3.0, **options):
    """Losses or rows, and the gradients of student queries and keys."""
    student = [x.detach().clone().requires_grad_() for x in inputs[:2]]
    loss = attention_kl(*student, *inputs[2:], backend=backend, **options)
    loss.backward(torch.full_like(loss, upstream))
    return [loss.detach(), *(x.grad for x in student)]


def assert_agree(inputs, tolerance=2e-5, **options):
    expected = results([x.double() for x in inputs], "reference", **options)
    for ours, theirs in zip(results(inputs, "triton", **options), expected, strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=tolerance * max(scale, 1e-3))


def right_padded(keys, *lengths):
    return torch.arange(keys)[None, :] < torch.tensor(lengths)[:, None]


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 5},
    "causal window": {"causal": True, "window": 20},
    "padding": {"attention_mask": right_padded(40, 40, 18)},
    "holes": {"attention_mask": torch.arange(80).view(2, 40) % 3 != 0},
    "holes, window": {"attention_mask": torch.arange(80).view(2, 40) % 7 > 3, "window": 2},
    "query mask": {"query_mask": torch.arange(80).view(2, 40) % 5 > 1, "causal": True},
    "all": {
        "attention_mask": right_padded(40, 40, 18),
        "query_mask": torch.arange(80).view(2, 40) % 5 > 1,
        "causal": True,
        "window": 20,
        "temperature": 2.0,
        "scale_s": -0.4,
    },
}


OPTIONS_AND_DIRECTIONS = [
    pytest.param(
        options,
        direction,
        id=f"{name}, {direction}",
        marks=() if direction == "forward" or name == "all" else pytest.mark.exhaustive,
    )
    for name, options in OPTIONS.items()
    for direction in DIRECTIONS
]
options_and_directions = pytest.mark.parametrize(("options", "direction"), OPTIONS_AND_DIRECTIONS)


@options_and_directions
def test_several_tiles_agree_with_the_reference(small_tiles, direction, options):
    assert_agree(four(d_t=20), direction=direction, reduction="none", **options)


@options_and_directions
def test_fused_kernel_agrees_with_the_reference(direction, options):
    assert_agree(four(d_t=20), direction=direction, **options)


@directions
def test_mean_of_teacher_heads_over_several_tiles(small_tiles, direction):
    inputs = four(b=1, h_t=3, n=20, nk=40)
    assert_agree(inputs, direction=direction, match_heads="mean", causal=True)


@directions
def test_widths_beyond_one_tile_are_taken_in_chunks(small_tiles, direction):
    assert_agree(four(b=1, h=1, n=20, d=140, d_t=300), direction=direction, causal=True)


@directions
def test_key_heads_gather_the_gradients_of_their_group(small_tiles, direction):
    assert_agree(four(b=1, h=4, h_kv=2, n=20), direction=direction, reduction="none")


@directions
def test_keys_beyond_the_fused_kernel_run_forward_and_backward(direction):
    assert_agree(four(b=1, h=1, n=20, nk=300), direction=direction)


def test_packed_sequences_cross_tiles(small_tiles):
    inputs = [x.transpose(1, 2).flatten(0, 1) for x in four(b=1, n=50)]
    cu_seqlens = torch.tensor([0, 3, 3, 30, 41], dtype=torch.int32)
    assert_agree(inputs, cu_seqlens=cu_seqlens)
    assert_agree(inputs, cu_seqlens=cu_seqlens.long(), causal=True, direction="js")


def launches(monkeypatch, name):
    """Grids of the launches of one kernel."""
    kernel, grids = getattr(kernels, name), []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(kernels, name, Recorder())
    return grids


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layer_pairs_alike_share_a_launch(monkeypatch, reduction):
    pairs = [four(n=7) for _ in range(3)] + [four(n=7, h=3, d=4)] + [four(n=7)]
    grids = launches(monkeypatch, "_fused" if reduction == "mean" else "_backward_key")
    columns = [list(column) for column in zip(*pairs, strict=True)]
    student = [[x.requires_grad_() for x in column] for column in columns[:2]]
    scales = [0.3, 0.2, 0.5, 0.4, 0.1]
    losses = attention_kl(
        *student, *columns[2:], scale_s=scales, reduction=reduction, backend="triton"
    )
    together = losses.sum() if reduction == "mean" else sum(x.sum() for x in losses)
    together.backward()
    assert len(grids) == 3  # three alike, one of other heads, one more
    for pair, scale, loss in zip(pairs, scales, losses, strict=True):
        alone = [x.detach().requires_grad_(i < 2) for i, x in enumerate(pair)]
        expected = attention_kl(*alone, scale_s=scale, reduction=reduction, backend="reference")
        expected.sum().backward()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(pair[:2], alone[:2], strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_grids_are_of_one_dimension_so_that_any_batch_fits(monkeypatch, reduction):
    names = ("_visibility", "_forward", "_backward_query", "_backward_key", "_fused", "_losses")
    grids = [launches(monkeypatch, name) for name in names]
    results(four(n=5), "triton", reduction=reduction, attention_mask=right_padded(5, 5, 3))
    assert {len(grid) for grid in sum(grids, [])} == {1}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@directions
def test_every_output_element_is_written(direction, reduction, small_tiles):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        options = {"attention_mask": right_padded(19, 19, 0), "direction": direction}
        found = results(four(n=19), "triton", reduction=reduction, **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("fused", [False, True])
@directions
def test_padding_of_nan_and_infinity_does_not_spread(request, direction, fused):
    if not fused:
        request.getfixturevalue("small_tiles")
    mask = torch.arange(80).view(2, 40) % 7 > 2
    inputs = four(h=1)
    spoilt = [x.clone() for x in inputs]
    for i, x in enumerate(spoilt):
        x.transpose(1, 2)[~mask] = math.nan if i % 2 else math.inf
    options = {"attention_mask": mask, "direction": direction}
    clean = [x.masked_fill(~mask[:, None, :, None], 0.0) for x in inputs]
    found = [results(x, "triton", **options) for x in (spoilt, clean)]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


# Patterns in which there are keys that no row sees, or queries that see no key, unnamed by a mask.
UNSEEN = {
    "window, more keys": (20, 60, {"window": 3}),
    "window, more queries": (60, 20, {"window": 3}),
    "causal, more queries": (60, 20, {"causal": True}),
    "causal window, more keys": (20, 60, {"causal": True, "window": 3}),
    "window, masked queries": (
        40, 40, {"window": 2, "query_mask": ((torch.arange(40) - 17).abs() > 9).expand(2, -1)},
    ),
    "window, masked keys": (
        40, 40, {"window": 2, "attention_mask": ((torch.arange(40) - 17).abs() > 9).expand(2, -1)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@directions
@pytest.mark.parametrize("case", UNSEEN)
def test_nan_in_keys_and_queries_outside_the_pattern_does_not_spread(
    request, case, direction, fused
):
    if not fused:
        request.getfixturevalue("small_tiles")
    queries, keys, options = UNSEEN[case]
    row, key = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    visible = (row - key).abs() <= options.get("window", keys)
    if options.get("causal"):
        visible &= key <= row
    of_keys = options.get("attention_mask")
    of_queries = options.get("query_mask", of_keys)
    visible &= True if of_queries is None else of_queries[0, :, None]
    visible &= True if of_keys is None else of_keys[0]
    blind, unseen = ~visible.any(1), ~visible.any(0)
    assert blind.any() or unseen.any()
    inputs = four(h=1, n=queries, nk=keys)
    spoilt = [x.clone() for x in inputs]
    for i, x in enumerate(spoilt):
        x[:, :, unseen if i % 2 else blind] = math.nan
    found = [results(x, "triton", direction=direction, **options) for x in (spoilt, inputs)]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)
    assert not found[0][1][:, :, blind].any() and not found[0][2][:, :, unseen].any()


def test_nan_in_a_query_reaches_no_tile_of_keys_that_it_does_not_see(small_tiles):
    inputs = four(b=1, h=1, n=40)
    inputs[0][:, :, 20] = math.nan
    loss, grad_query, grad_key = results(inputs, "triton", window=2, reduction="none")
    assert loss.isnan().nonzero()[:, -1].tolist() == [20]
    assert grad_query.isnan().any(-1).nonzero()[:, -1].tolist() == [20]
    assert grad_key[:, :, :16].isfinite().all() and grad_key[:, :, 32:].isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@directions
def test_student_equal_to_teacher_has_zero_loss_and_gradient(small_tiles, direction, reduction):
    query, key = (10 * x for x in four()[:2])
    options = {"direction": direction, "reduction": reduction, "causal": True}
    for found in results([query, key, query, key], "triton", **options):
        assert not found.any()


@directions
def test_results_repeat_bit_by_bit(direction):
    inputs = four(n=70)
    first, second = (results(inputs, "triton", direction=direction) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


LAYOUTS = {
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "batch inside": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "slice of a wider tensor": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "features apart": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "same heads twice": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_any_strides(layout, reduction):
    inputs = [layout(x) for x in four(n=9)]
    student = [x.detach().requires_grad_() for x in inputs[:2]]
    rows = attention_kl(*student, *inputs[2:], reduction=reduction, backend="triton")
    rows.sum().backward()
    expected = results([x.contiguous() for x in inputs], "triton", 1.0, reduction=reduction)
    for ours, theirs in zip([rows.detach(), *(x.grad for x in student)], expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tiny_upstream_gradients_survive_float16(small_tiles):
    """The gradient of a mean over many rows is below float16 as dS, not as dK."""
    inputs = four(n=20, dtype=torch.float16)
    small, large = (
        results(inputs, "triton", upstream, reduction="none") for upstream in (1e-4, 1.0)
    )
    for a, b in zip(small[1:], large[1:], strict=True):
        torch.testing.assert_close(a.float(), 1e-4 * b.float(), rtol=1e-2, atol=1e-6)


def eager_gradients(inputs):
    student = [x.detach().requires_grad_() for x in inputs[:2]]
    log_s, log_t = (
        (q * q.shape[-1] ** -0.5 @ k.mT).log_softmax(-1) for q, k in (student, inputs[2:])
    )
    torch.nn.functional.kl_div(log_s, log_t, log_target=True, reduction="sum").backward()
    return [x.grad.double() for x in student]


def test_what_all_keys_have_in_common_costs_the_gradients_no_digits(small_tiles):
    query_s, _, query_t, key = four(n=60, d=16)
    key = key + 20 * torch.randn(2, 2, 1, 16)
    inputs = [query_t + 1e-2 * query_s, key, query_t, key]
    exact = eager_gradients([x.double() for x in inputs])
    ours = [x.double() for x in results(inputs, "triton", 1.0, reduction="sum")[1:]]
    for truth, mine, eager in zip(exact, ours, eager_gradients(inputs), strict=True):
        assert (mine - truth).abs().max() <= 2 * (eager - truth).abs().max()


@directions
def test_bfloat16_agrees_with_the_reference(small_tiles, direction):
    assert_agree(four(n=20, dtype=torch.bfloat16), 2e-2, direction=direction, causal=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_empty_batch_launches_nothing(monkeypatch, reduction):
    grids = [launches(monkeypatch, x) for x in ("_fused", "_forward", "_backward_key")]
    loss, *gradients = results([x[:0] for x in four(n=5)], "triton", reduction=reduction)
    assert loss == 0
    assert [x.shape for x in gradients] == [(0, 2, 5, 8), (0, 2, 5, 8)]
    assert not any(grids)
