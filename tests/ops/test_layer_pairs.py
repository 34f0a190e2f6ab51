"""layer_projection_loss with attend="pairs": layers of the same number, without weights.

The formula, and the ladder of every backend beside eager arithmetic; memory is filled with NaN.
"""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.losses import CosineLoss, HiddenMSELoss
from kdfast.ops import layer_projection_loss

pytestmark = pytest.mark.usefixtures("memory_filled_with_nan")

OPERATOR = "layer_projection"
MODULE = importlib.import_module("kdfast.ops.layer_projection")  # whose name is the function's
# Token dimensions, pairs, d
CASES = {
    "one number": ((1,), 1, 1),
    "logits": ((2, 17), 6, 3),
    "seventeen": ((127,), 3, 17),
    "below a tile": ((3, 3), 2, 127),
    "above a tile": ((2, 2, 3), 4, 129),
    "hidden states": ((2, 9), 6, 768),
    "many": ((3,), 64, 8),
    "wide": ((2,), 2, 5000),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = {
    "test_rows_and_gradients_err_at_most_twice_as_far_as_eager",
    "test_any_layers_may_want_a_gradient",
    "test_what_masked_tokens_hold_reaches_nothing",
    "test_nan_stays_in_its_token_and_pair",
    "test_empty_and_fully_masked_batches_are_zero",
    "test_student_equal_to_the_teacher_has_no_loss_and_no_gradient",
    "test_layers_of_any_strides_equal_contiguous_ones",
    "test_kernels_pass_opcheck",
}
objectives = pytest.mark.parametrize("objective", ["mse", "cosine", "kl"])


def layers(count, *shape, dtype=torch.float32, device="cpu"):
    return [torch.randn(shape).to(device, dtype) for _ in range(count)]


def results(function, layers_s, layers_t):
    """Rows, and the gradients of both sides, in float64."""
    layers_s, layers_t = ([x.detach().requires_grad_() for x in y] for y in (layers_s, layers_t))
    rows = function(layers_s, layers_t)
    upstream = torch.linspace(0.5, 1.5, rows.numel(), device=rows.device).view(rows.shape)
    grads = torch.autograd.grad(rows, [*layers_s, *layers_t], upstream.to(rows.dtype))
    found = {"rows": rows, "student": grads[: len(layers_s)], "teacher": grads[len(layers_s) :]}
    return {
        name: (torch.stack(list(x)) if name != "rows" else x).detach().double().cpu()
        for name, x in found.items()
    }


def of(backend, objective, **options):
    options = {"reduction": "none", "attend": "pairs", "temperature": 1.5} | options
    return lambda s, t: layer_projection_loss(s, t, objective=objective, backend=backend, **options)


def eager(objective, mask=None):
    def function(layers_s, layers_t):
        h, g = torch.stack(layers_s, -2), torch.stack(layers_t, -2)
        if objective == "mse":
            rows = (h - g).square().mean(-1)
        elif objective == "cosine":
            rows = 1 - F.cosine_similarity(h, g, dim=-1)
        else:
            log_s, log_t = ((x / 1.5).log_softmax(-1) for x in (h, g))
            rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        return rows if mask is None else rows.masked_fill(~mask[..., None], 0.0)

    return function


def in_double(layers):
    return [x.double() for x in layers]


# The formula


@objectives
def test_reference_equals_the_formula(objective):
    layers_s, layers_t = layers(2, 3, 4, 5), layers(2, 3, 4, 5)
    rows = of("reference", objective)(in_double(layers_s), in_double(layers_t))
    for i, (side_s, side_t) in enumerate(zip(layers_s, layers_t, strict=True)):
        for a in range(3):
            for b in range(4):
                h, g = side_s[a, b].double().tolist(), side_t[a, b].double().tolist()
                assert rows[a, b, i].item() == pytest.approx(by_hand(h, g, objective))


def by_hand(h, g, objective):
    if objective == "mse":
        return sum((x - y) ** 2 for x, y in zip(h, g, strict=True)) / len(h)
    if objective == "cosine":
        return 1 - sum(x * y for x, y in zip(h, g, strict=True)) / math.hypot(*h) / math.hypot(*g)
    p, q = ([math.exp(x / 1.5) for x in side] for side in (g, h))
    p, q = ([x / sum(side) for x in side] for side in (p, q))
    return sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))


@objectives
@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradients_pass_gradcheck(objective, backend, reduction):
    every = [torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    function = of(backend, objective, reduction=reduction, mask=torch.tensor([[1, 0, 1]] * 2))
    assert torch.autograd.gradcheck(lambda *x: function(x[:2], x[2:]), every)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_it_is_one_layer_projection_for_each_pair(backend):
    layers_s, layers_t = layers(3, 2, 5, 8), layers(3, 2, 5, 8)
    mask = torch.rand(2, 5) < 0.6
    for reduction, join in (("none", lambda x: torch.cat(x, -1)), ("sum", sum),
                            ("mean", lambda x: sum(x) / 3)):  # fmt: skip
        apart = [
            layer_projection_loss([s], [t], mask=mask, reduction=reduction, backend=backend)
            for s, t in zip(layers_s, layers_t, strict=True)
        ]
        together = of(backend, "mse", mask=mask, reduction=reduction)(layers_s, layers_t)
        torch.testing.assert_close(together, join(apart))


# Every backend


@objectives
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_gradients_err_at_most_twice_as_far_as_eager(
    kernel, objective, case, dtype, unless
):
    unless(dtype == torch.float32 or (case == "seventeen" and objective != "kl"))
    tokens, many, d = CASES[case]
    layers_s, layers_t = (layers(many, *tokens, d, dtype=dtype, device=kernel[1]) for _ in range(2))
    mask = (torch.rand(tokens) < 0.7).to(kernel[1])
    exact = results(eager(objective, mask), in_double(layers_s), in_double(layers_t))
    theirs = results(eager(objective, mask), layers_s, layers_t)
    ours = results(of(kernel[0], objective, mask=mask), layers_s, layers_t)
    norms = [float(x.double().norm(dim=-1).min()) for x in (*layers_s, *layers_t)]
    for name, truth in exact.items():
        size = truth.abs().max()
        if objective == "cosine":  # its terms may cancel
            size = size.clamp(min=1 if name == "rows" else 1 / max(min(norms), 1e-8))
        eps = torch.finfo(torch.float32 if name == "rows" else dtype).eps
        its = (theirs[name] - truth).abs().max()
        assert (ours[name] - truth).abs().max() <= 2 * its + 8 * eps * size + 1e-7, name


@pytest.mark.parametrize("wanted", [[0], [1, 2], [3], [2, 3, 5], [0, 1, 2, 3, 4, 5]], ids=str)
def test_any_layers_may_want_a_gradient(kernel, wanted):
    every = layers(6, 2, 5, 20, device=kernel[1])
    grads = []
    for backend in ("reference", kernel[0]):
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(every)]
        loss = of(backend, "mse", reduction="mean")(leaves[:3], leaves[3:])
        grads.append(torch.autograd.grad(loss, [leaves[i] for i in wanted]))
    torch.testing.assert_close(*grads)


@objectives
def test_what_masked_tokens_hold_reaches_nothing(kernel, objective):
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool().to(kernel[1])
    clean = layers(4, 2, 3, 20, device=kernel[1])
    found = []
    for filling in (0.0, math.nan):
        every = [x.masked_fill(~mask[..., None], filling) for x in clean]
        found.append(results(of(kernel[0], objective, mask=mask), every[:2], every[2:]))
    for name, x in found[0].items():
        assert torch.equal(found[1][name], x)
        hidden = ~mask.cpu()
        assert not (x[hidden] if name == "rows" else x[:, hidden]).any()


@objectives
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_in_its_token_and_pair(kernel, objective, side):
    sides = layers(2, 2, 3, 20, device=kernel[1]), layers(2, 2, 3, 20, device=kernel[1])
    sides[side][1][0, 2, 3] = math.nan
    found = results(of(kernel[0], objective), *sides)
    assert found["rows"][0, 2, 1].isnan() and found["rows"].isnan().sum() == 1
    for name in ("student", "teacher"):
        bad = found[name].isnan().any(-1)
        assert bad[1, 0, 2] and bad.sum() == 1


@objectives
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_and_fully_masked_batches_are_zero(kernel, objective, reduction):
    for shape, mask in (((0, 5, 8), None), ((2, 5, 8), torch.zeros(2, 5, dtype=torch.bool))):
        mask = None if mask is None else mask.to(kernel[1])
        every = [x.requires_grad_() for x in layers(4, *shape, device=kernel[1])]
        loss = of(kernel[0], objective, reduction=reduction, mask=mask)(every[:2], every[2:])
        assert loss.shape == ((*shape[:2], 2) if reduction == "none" else ())
        loss.sum().backward()
        assert not loss.any() and not any(x.grad.any() for x in every)


@pytest.mark.parametrize("objective", ["mse", "kl"])
@pytest.mark.parametrize("d", [3, 20, 384])
def test_student_equal_to_the_teacher_has_no_loss_and_no_gradient(kernel, objective, d):
    every = layers(3, 4, 5, d, device=kernel[1])
    found = results(of(kernel[0], objective), every, [x.clone() for x in every])
    assert not found["rows"].any() and not found["student"].any()


def test_layers_of_any_strides_equal_contiguous_ones(kernel):
    device = kernel[1]
    layers_s = [
        torch.randn(5, 3, 20, device=device).transpose(0, 1),
        torch.randn(3, 7, 20, device=device)[:, 1:6],
        torch.randn(3, 5, 21, device=device)[..., 1:],
    ]
    layers_t = [
        torch.randn(3, 5, 2, 20, device=device)[:, :, 0],
        torch.randn(1, 5, 20, device=device).expand(3, 5, 20),
        torch.randn(3, 5, 20, device=device),
    ]
    mask = (torch.rand(5, 3, device=device) < 0.7).T
    found, expected = (
        of(kernel[0], "mse", mask=mask)(*sides)
        for sides in (
            (layers_s, layers_t),
            ([x.contiguous() for x in layers_s], [x.contiguous() for x in layers_t]),
        )
    )
    torch.testing.assert_close(found, expected)


def test_kernels_pass_opcheck(kernel):
    if kernel[0] not in MODULE._PAIRS_FORWARD:
        pytest.skip("takes pairs one by one")
    layers_s, layers_t = layers(2, 2, 3, 8, device=kernel[1]), layers(2, 2, 3, 8, device=kernel[1])
    inputs = layers_s, layers_t, None, "mse", 1.0
    torch.library.opcheck(MODULE._PAIRS_FORWARD[kernel[0]], inputs)
    upstream = torch.ones(2, 3, 2, device=kernel[1])
    torch.library.opcheck(MODULE._PAIRS_BACKWARD[kernel[0]], (upstream, *inputs, [0, 2]))


@objectives
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_compiled_without_graph_breaks_equals_eager(objective, backend):
    layers_s = [x.requires_grad_() for x in layers(2, 3, 5)]
    layers_t = layers(2, 3, 5)
    function = of(backend, objective, reduction="mean")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(layers_s, layers_t), layers_s) for f in (compiled, function)]
    torch.testing.assert_close(*grads)


# Who calls it


@pytest.mark.parametrize("make", [CosineLoss, HiddenMSELoss])
@pytest.mark.parametrize("rows", ["cls", "tokens"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_losses_of_several_pairs_are_those_of_each(make, rows, reduction):
    hidden_s, hidden_t = layers(3, 2, 5, 8), layers(3, 2, 5, 8, dtype=torch.bfloat16)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    loss = make(rows, layers=reduction)
    apart = torch.stack([loss(s, t, mask) for s, t in zip(hidden_s, hidden_t, strict=True)])
    expected = apart.sum() if reduction == "sum" else apart.mean()
    torch.testing.assert_close(loss(hidden_s, hidden_t, mask), expected)


def test_pairs_of_other_shapes_and_dtypes_are_taken_as_they_come():
    shapes = ((2, 5, 8), (2, 5, 8), (2, 3, 4))
    hidden_s = [torch.randn(shape) for shape in shapes]
    hidden_t = [torch.randn(shape).to(dtype) for shape, dtype in zip(
        shapes, (torch.bfloat16, torch.float32, torch.float32), strict=True)]  # fmt: skip
    loss = HiddenMSELoss()
    apart = [loss(s, t.float()) for s, t in zip(hidden_s, hidden_t, strict=True)]
    torch.testing.assert_close(loss(hidden_s, hidden_t), sum(apart))
    torch.testing.assert_close(loss(hidden_s[:2], hidden_t[:2]), sum(apart[:2]))
    many = [torch.randn(2, 3, 4)] * 70
    torch.testing.assert_close(loss(many, [x + 1 for x in many]), torch.tensor(70.0))


# Errors


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("layers_s", "layers_t", "error", "message"),
    [
        ([X, X], [X], ValueError, "layers_s has 2 layers and layers_t 1.*should have as many"),
        ([X], [X[..., :2]], ValueError, r"layers_t\[0\] has shape \[2, 3, 2\]"),
        ([X, X], [X, X.half()], TypeError, r"layers_t\[1\] is float16 but layers_t\[0\]"),
        ([X], [X.long()], TypeError, r"layers_t\[0\] is int64"),
        ([X], [X.to("meta")], ValueError, r"layers_t\[0\] is on meta"),
    ],
)
def test_bad_argument_is_named(layers_s, layers_t, error, message):
    with pytest.raises(error, match=message):
        layer_projection_loss(layers_s, layers_t, attend="pairs")
