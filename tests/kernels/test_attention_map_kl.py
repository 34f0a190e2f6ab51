"""What is particular to the Triton kernels: rows beyond the chip, memory. By the interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from kdfast.kernels import attention_map_kl as kernels  # noqa: E402
from kdfast.ops import attention_map_kl  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is masked
every_direction = pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
every_input = pytest.mark.parametrize("inputs", ["scores", "probabilities"])


def maps(*shape, inputs="scores", dtype=torch.float32):
    pair = torch.randn(2, *shape)
    return (pair if inputs == "scores" else pair.softmax(-1)).to(dtype).unbind()


def results(map_s, map_t, backend, **options):
    map_s = map_s.detach().requires_grad_()
    loss = attention_map_kl(map_s, map_t, backend=backend, **options)
    loss.backward(torch.full_like(loss, 3.0))
    return [loss.detach(), map_s.grad]


def assert_agree(pair, tolerance=1e-5, **options):
    expected = results(*(x.double() for x in pair), "reference", **options)
    for ours, theirs in zip(results(*pair, "triton", **options), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


@every_direction
@every_input
@pytest.mark.parametrize("keys", [1, 20, 129])
def test_rows_agree_with_the_reference(inputs, direction, keys):
    options = {"inputs": inputs, "direction": direction, "reduction": "none"}
    assert_agree(maps(2, 3, 7, keys, inputs=inputs), **options)


@every_direction
@every_input
def test_rows_longer_than_the_chip_are_read_in_steps(monkeypatch, inputs, direction):
    monkeypatch.setattr(kernels, "LONGEST", 16)
    mask = torch.arange(37) % 5 > 0
    assert_agree(
        maps(1, 2, 3, 37, inputs=inputs), inputs=inputs, direction=direction,
        attention_mask=mask[None], reduction="none",
    )  # fmt: skip


@every_direction
@every_input
def test_rows_longer_than_the_chip_may_hold_masked_steps(monkeypatch, inputs, direction):
    monkeypatch.setattr(kernels, "LONGEST", 16)
    mask = torch.arange(64) // 16 == 2
    assert_agree(
        maps(1, 1, 2, 64, inputs=inputs), inputs=inputs, direction=direction,
        attention_mask=mask[None],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_input
def test_half_maps_agree_with_the_reference(inputs, dtype):
    assert_agree(maps(2, 2, 5, 20, inputs=inputs, dtype=dtype), 2e-2, inputs=inputs)


@every_direction
@pytest.mark.parametrize("longest", [16, 8192])
def test_equal_scores_have_zero_loss_and_gradient(monkeypatch, direction, longest):
    monkeypatch.setattr(kernels, "LONGEST", longest)
    map_s, _ = maps(2, 2, 5, 40)
    for found in results(100 * map_s, 100 * map_s, "triton", inputs="scores", direction=direction):
        assert not found.any()


@every_direction
@every_input
@pytest.mark.parametrize("longest", [16, 8192])
def test_every_output_element_is_written(monkeypatch, inputs, direction, longest):
    monkeypatch.setattr(kernels, "LONGEST", longest)
    mask = torch.arange(40).view(2, 20) < 12  # of the second sample nothing remains
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        found = results(
            *maps(2, 2, 20, 20, inputs=inputs), "triton", inputs=inputs, direction=direction,
            attention_mask=mask, reduction="none",
        )  # fmt: skip
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for x in found)
    assert not found[0][1].any() and not found[1][1].any()


LAYOUTS = {
    "queries first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "slice of a longer map": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "same heads twice": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_any_strides(layout):
    map_s, map_t = (layout(x) for x in maps(2, 3, 5, 9))
    found = results(map_s, map_t, "triton", inputs="scores")
    expected = results(map_s.contiguous(), map_t.contiguous(), "triton", inputs="scores")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@every_direction
def test_scores_at_float_minimum_and_large_offsets_stay_exact(direction):
    map_s, map_t = (x.clone() for x in maps(1, 1, 4, 20))
    map_s[..., 5:8] = map_t[..., 5:8] = torch.finfo(torch.float32).min
    map_s[:, :, 1] += 4096
    map_t[:, :, 1] += 4096
    map_s[:, :, 2] = map_t[:, :, 2] = torch.finfo(torch.float32).min
    assert_agree((map_s, map_t), inputs="scores", direction=direction, reduction="none")


def test_empty_batch():
    loss, gradient = results(*(x[:0] for x in maps(2, 2, 5, 9)), "triton", inputs="scores")
    assert loss == 0 and gradient.shape == (0, 2, 5, 9)
