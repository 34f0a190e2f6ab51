"""What is particular to the Triton kernels: kinds of programs, addresses. By the interpreter."""

import math

import pytest
import torch

triton = pytest.importorskip("triton")
if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from kdfast.kernels import layer_projection as kernels  # noqa: E402
from kdfast.ops import layer_projection, layer_projection_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is masked
objectives = pytest.mark.parametrize("objective", ["mse", "cosine", "kl"])
attends = pytest.mark.parametrize("attend", ["states", "losses"])

# Shapes of a program (TOKENS, PARTS, CHUNKS, BLOCK, HELD), and the width of the states: several
# tokens, one token whose features are held or pass by, and the last with a part that holds nothing.
KINDS = {
    "several tokens": ((4, 1, 1, 32, True), 17),
    "held": ((1, 2, 2, 16, True), 50),
    "passing": ((1, 2, 1, 16, False), 40),
    "passing in one part": ((1, 1, 1, 16, False), 20),
    "several tokens passing": ((2, 1, 1, 16, False), 20),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def as_kind(monkeypatch):
    """Sets the shape of programs; returns the width. Lanes take no token."""

    def set_shape(kind):
        shape, d = KINDS[kind]
        monkeypatch.setattr(kernels, "INTERPRETED_SHAPE", shape)
        monkeypatch.setattr(kernels, "FEW", 0)
        return d

    return set_shape


def layers(many_s, many_t, *shape, dtype=torch.float32):
    every = [torch.randn(shape) for _ in range(many_s + many_t)]
    every = [x * 0.5 for x in every[:many_s]] + every[many_s:]
    return [x.to(dtype) for x in every[:many_s]], [x.to(dtype) for x in every[many_s:]]


def results(layers_s, layers_t, backend, wanted=None, **options):
    """Values and gradients; without an objective, of the projection."""
    layers_s, layers_t = ([x.detach() for x in side] for side in (layers_s, layers_t))
    every = [*layers_s, *layers_t]
    leaves = [every[i].requires_grad_() for i in (range(len(every)) if wanted is None else wanted)]
    if "objective" in options:
        values = [
            layer_projection_loss(layers_s, layers_t, backend=backend, reduction="none", **options)
        ]
    else:
        projected, weights = layer_projection(layers_s, layers_t, backend=backend, **options)
        values = [*projected, weights]
    upstream = [torch.linspace(0.5, -1.5, x.numel()).view(x.shape).to(x) for x in values]
    return [*(x.detach() for x in values), *torch.autograd.grad(values, leaves, upstream)]


def assert_agree(layers_s, layers_t, tolerance=2e-5, **options):
    wide = [[x.double() for x in side] for side in (layers_s, layers_t)]
    expected = results(*wide, "reference", **options)
    found = results(layers_s, layers_t, "triton", **options)
    for ours, theirs in zip(found, expected, strict=True):
        floor = tolerance * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=floor)


@kinds
@objectives
@attends
def test_every_kind_of_program_agrees_with_the_reference(as_kind, kind, objective, attend):
    d = as_kind(kind)
    mask = torch.tensor([[True, False, True]])
    assert_agree(
        *layers(2, 3, 1, 3, d), objective=objective, attend=attend, scale=0.3, temperature=1.5,
        mask=mask,
    )  # fmt: skip


@kinds
def test_every_kind_of_program_projects_as_the_reference(as_kind, kind):
    d = as_kind(kind)
    mask = torch.tensor([[True, False, True]])
    assert_agree(*layers(2, 3, 1, 3, d), scale=0.3, mask=mask)


@objectives
@attends
@pytest.mark.parametrize("d", [1, 3])
def test_few_features_agree_with_the_reference(objective, attend, d):
    tokens = 70 if attend == "states" else 7  # losses but those of mse take no lanes
    layers_s, layers_t = layers(3, 5, 2, tokens, d)
    options = {"objective": objective, "attend": attend, "scale": 0.3, "temperature": 1.5}
    assert_agree(layers_s, layers_t, wanted=range(3), mask=torch.rand(2, tokens) < 0.7, **options)


@pytest.mark.parametrize("many", [(1, 1), (1, 12), (17, 3), (64, 64)], ids=str)
def test_any_number_of_layers(many):
    assert_agree(*layers(*many, 2, 2, 20), objective="mse", scale=0.3)
    assert_agree(*layers(*many, 2, 2, 3), objective="kl", scale=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@objectives
@attends
def test_half_states_agree_with_the_reference(dtype, objective, attend):
    options = {"objective": objective, "attend": attend, "scale": 0.3}
    assert_agree(*layers(2, 3, 2, 4, 20, dtype=dtype), 2e-2, **options)
    assert_agree(*layers(2, 3, 2, 4, 3, dtype=dtype), 2e-2, wanted=[0, 1], **options)


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("wanted", [[0], [1, 4], [3], [0, 1, 2, 3, 4]], ids=str)
@attends
def test_gradients_of_any_of_the_layers(d, wanted, attend):
    sides = layers(2, 3, 2, 5, d)
    assert_agree(*sides, wanted=wanted, objective="mse", attend=attend, scale=0.3)
    assert_agree(*sides, wanted=wanted, scale=0.3)


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("arguments", [3584, 0], ids=["strides of each", "copied"])
def test_layers_of_different_strides_and_alignment(monkeypatch, d, arguments):
    monkeypatch.setattr(kernels, "ARGUMENTS", arguments)
    layers_s = [
        torch.randn(5, 3, d).transpose(0, 1),
        torch.randn(3, 7, d)[:, 1:6],
        torch.randn(3, 5, d + 1)[..., 1:],
    ]
    layers_t = [torch.randn(3, 5, 2, d)[:, :, 0], torch.randn(1, 5, d).expand(3, 5, d)]
    mask = (torch.rand(5, 3) < 0.7).T
    for options in ({"objective": "mse"}, {"objective": "kl", "attend": "losses"}, {}):
        assert_agree(layers_s, layers_t, scale=0.3, mask=mask, **options)


@pytest.mark.parametrize("d", [3, 20])
def test_one_tensor_may_be_in_several_places(d):
    (h,), (g,) = layers(1, 1, 2, 5, d)
    assert_agree([h, h], [g, h, g], wanted=[0], objective="mse")


@kinds
@pytest.mark.parametrize("objective", ["mse", "kl"])
@attends
def test_student_equal_to_its_only_teacher_has_zero_loss_and_gradient(
    as_kind, kind, objective, attend
):
    (h,), _ = layers(1, 1, 1, 2, as_kind(kind))
    options = {"objective": objective, "attend": attend}
    found = results([30 * h], [30 * h], "triton", wanted=[0], **options)
    assert not any(x.any() for x in found)


@objectives
@attends
@pytest.mark.parametrize("d", [3, 20])
def test_masked_tokens_are_zero_whatever_they_hold(objective, attend, d):
    layers_s, layers_t = layers(2, 3, 2, 5, d)
    mask = torch.tensor([1, 0, 1, 0, 1]).bool().expand(2, 5)
    for i, x in enumerate((*layers_s, *layers_t)):
        x[~mask] = (math.nan, math.inf)[i % 2]
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        for wanted in ([0, 1], range(5)):
            options = {"objective": objective, "attend": attend, "mask": mask}
            found = results(layers_s, layers_t, "triton", wanted=wanted, **options)
            assert all(x.isfinite().all() and not x[~mask].any() for x in found)
        found = results(layers_s, layers_t, "triton", mask=mask)
        assert all(x.isfinite().all() and not x[~mask].any() for x in found)
    finally:
        torch.use_deterministic_algorithms(False)


@objectives
@attends
@pytest.mark.parametrize("d", [3, 20])
def test_nan_stays_in_its_token(objective, attend, d):
    layers_s, layers_t = layers(2, 3, 2, 5, d)
    layers_t[1][1, 2, 0] = math.nan
    rows, *gradients = results(
        layers_s, layers_t, "triton", wanted=[0, 1], objective=objective, attend=attend
    )
    for x in (rows, *gradients):
        assert x[1, 2].isnan().all()
        assert x.isnan().flatten(2).any(-1).sum() == 1


@objectives
@attends
@pytest.mark.parametrize("d", [3, 20])
def test_saturated_scores_and_zeros_stay_finite(objective, attend, d):
    layers_s, layers_t = layers(2, 3, 2, 5, d)
    for x in (*layers_s, *layers_t):
        x[0] *= 100
        x[1, 0] = 0
    options = {"objective": objective, "attend": attend}
    assert all(x.isfinite().all() for x in results(layers_s, layers_t, "triton", **options))
    assert_agree(layers_s, layers_t, 1e-4, wanted=[0], **options)


def test_large_offsets_keep_the_digits_of_the_loss():
    layers_s, layers_t = layers(2, 3, 2, 5, 20)
    for x in (*layers_s, *layers_t):
        x[..., 0] += 30
    for attend in ("states", "losses"):
        assert_agree(layers_s, layers_t, objective="mse", attend=attend, scale=0.01)


def test_empty_batch():
    for d in (3, 20):
        found = results(*layers(2, 3, 0, 5, d), "triton", objective="mse")
        assert [tuple(x.shape) for x in found] == [(0, 5, 2)] + [(0, 5, d)] * 5


@pytest.mark.exhaustive
@objectives
@attends
@pytest.mark.parametrize("many", [(1, 1), (1, 12), (6, 12), (12, 1), (7, 13)], ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 17, 127, 129, 768])
@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_every_combination_agrees_with_the_reference(objective, attend, many, d, scale):
    options = {"objective": objective, "attend": attend, "scale": scale / d**0.5}
    sides = layers(*many, 1, 9, d)
    assert_agree(*sides, temperature=1.5, **options)
    assert_agree(*sides, wanted=range(many[0]), temperature=1.5, **options)
