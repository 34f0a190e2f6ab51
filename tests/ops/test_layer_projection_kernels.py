"""The ladder of the layer projection's kernels, on every backend.

As in test_kernels.py, each case is measured by the kernel, by eager arithmetic in the dtype of the
inputs, and in float64; memory is filled with NaN beforehand. The contract itself is written down
densely here, and must agree with the reference.
"""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kdfast.ops import dispatch, layer_projection, layer_projection_loss

pytestmark = pytest.mark.usefixtures("memory_filled_with_nan")

OPERATOR = "layer_projection"  # whose kernels are those of its loss too
MODULE = importlib.import_module("kdfast.ops.layer_projection")  # whose name is the function's
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)
EVERY_DTYPE = (torch.float64, *HALF_AND_SINGLE)
# The rounding of sums in float32 and, for projected states and gradients, of the dtype.
FLOOR = {
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (1e-6, 2**-7),
    torch.float16: (1e-6, 2**-10),
}
# Token dimensions, L_s, L_t, d
CASES = {
    "one number": ((1,), 1, 1, 1),
    "two logits": ((3,), 2, 3, 2),
    "pseudo logits": ((2, 17), 6, 11, 3),
    "eight": ((17,), 4, 12, 8),
    "one teacher": ((17,), 5, 1, 33),
    "one student": ((17,), 1, 12, 40),
    "seventeen": ((127,), 7, 13, 17),
    "a tile": ((129,), 3, 5, 64),
    "below a tile": ((3, 3), 6, 11, 127),
    "above a tile": ((2, 2, 3), 4, 12, 129),
    "hidden states": ((2, 9), 4, 12, 768),
    "many layers": ((3,), 64, 64, 8),
    "many wide layers": ((2,), 33, 64, 136),
    "a vocabulary": ((3,), 2, 3, 8192),
}
SMALL = ("two logits", "pseudo logits", "eight", "above a tile")
INTERPRETED = {
    "test_rows_and_all_gradients_err_at_most_twice_as_far_as_eager",
    "test_projected_states_weights_and_gradients_err_at_most_twice_as_far_as_eager",
    "test_scalar_losses_equal_the_reference",
    "test_student_equal_to_the_teacher_has_exactly_no_loss_and_no_gradient",
    "test_what_masked_tokens_hold_reaches_nothing",
    "test_upstream_gradients_of_masked_tokens_reach_nothing",
    "test_nan_stays_in_its_token",
    "test_empty_batch_is_zero",
    "test_fully_masked_input_has_zero_everything",
    "test_states_of_zero_have_the_gradient_of_the_reference",
    "test_saturated_scores_equal_the_reference",
    "test_layers_of_any_strides_equal_contiguous_ones",
    "test_each_output_is_that_of_the_contract",
    "test_kernels_pass_opcheck",
}

objectives = pytest.mark.parametrize("objective", ["mse", "cosine", "kl"])
attends = pytest.mark.parametrize("attend", ["states", "losses"])
reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


def main_dtype(kernel):
    return torch.bfloat16 if "cuda" in kernel else torch.float32


def states(count, *shape, dtype=torch.float32, device="cpu"):
    """Layers [..., d], made in float32."""
    return [torch.randn(shape).to(device, dtype) for _ in range(count)]


def problem(case, kernel, dtype=torch.float32):
    """Layers of both sides, and a scale with which weights are neither flat nor one-hot."""
    tokens, many_s, many_t, d = CASES[case]
    both = (states(many, *tokens, d, dtype=dtype, device=kernel[1]) for many in (many_s, many_t))
    return *both, d**-0.5


def mask_of(kind, tokens, device):
    if kind is None:
        return None
    mask = {
        "random": lambda: torch.rand(tokens) < 0.6,
        "a view": lambda: (torch.rand(*tokens[::-1], 2) < 0.6)[..., 1].permute(
            *reversed(range(len(tokens)))
        ),
        "one row for all": lambda: (torch.rand(tokens[-1:]) < 0.6).expand(tokens),
        "padded": lambda: torch.arange(tokens[-1]).expand(tokens) < tokens[-1] // 2 + 1,
        "nothing": lambda: torch.zeros(tokens, dtype=torch.bool),
    }[kind]()
    return mask.to(device)


def measured(function, layers_s, layers_t, wanted=("student", "teacher"), upstream=None):
    """By name, in float64: what the operator returns, and each side's gradients."""
    leaves = [
        [x.detach().requires_grad_(side in wanted) for x in layers]
        for side, layers in (("student", layers_s), ("teacher", layers_t))
    ]
    value = function(*leaves)
    found = {"loss": value}
    if isinstance(value, tuple):
        found = {"projected": torch.stack(value[0], -2), "weights": value[1]}
    asked = [x for side in leaves for x in side if x.requires_grad]
    if asked and any(x.requires_grad for x in found.values()):
        upstreams = upstream or [
            torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype)
            for x in found.values()
        ]
        grads = iter(torch.autograd.grad(list(found.values()), asked, upstreams))
        for name, layers in zip(("student", "teacher"), leaves, strict=True):
            if name in wanted:
                found[name] = torch.stack([next(grads) for _ in layers])
    return {name: x.detach().double().cpu() for name, x in found.items()}


def loss_of(backend, **options):
    return lambda s, t: layer_projection_loss(s, t, **options, backend=backend)


def projection_of(backend, **options):
    return lambda s, t: layer_projection(s, t, **options, backend=backend)


def in_double(layers):
    return [x.double() for x in layers]


# Eager arithmetic, in the dtype of the inputs


def eager_compare(states, targets, objective, temperature):
    if objective == "mse":
        return (states - targets).square().mean(-1)
    if objective == "cosine":
        return 1 - F.cosine_similarity(states, targets, dim=-1)
    log_s, log_t = ((x / temperature).log_softmax(-1) for x in (states, targets))
    return F.kl_div(*torch.broadcast_tensors(log_s, log_t), log_target=True, reduction="none").sum(
        -1
    )


def eager_loss(objective="mse", scale=1.0, temperature=1.0, attend="states", mask=None):
    """Rows; masked ones zero."""

    def function(layers_s, layers_t):
        h, g = torch.stack(layers_s, -2), torch.stack(layers_t, -2)
        weights = (h @ g.mT * scale).softmax(-1)
        if attend == "states":
            rows = eager_compare(h, weights @ g, objective, temperature)
        else:
            every = eager_compare(h.unsqueeze(-2), g.unsqueeze(-3), objective, temperature)
            rows = (weights * every).sum(-1)
        return rows if mask is None else rows.masked_fill(~mask.unsqueeze(-1), 0.0)

    return function


def eager_projection(scale=1.0, mask=None):
    def function(layers_s, layers_t):
        h, g = torch.stack(layers_s, -2), torch.stack(layers_t, -2)
        weights = (h @ g.mT * scale).softmax(-1)
        projected = weights @ g
        if mask is not None:
            hidden = ~mask[..., None, None]
            weights, projected = (x.masked_fill(hidden, 0.0) for x in (weights, projected))
        return list(projected.unbind(-2)), weights

    return function


def within_twice_eager(exact, ours, theirs, dtype, layers_s, layers_t, scale=1.0, objective=""):
    """Errors beside the largest number. A score is off by the rounding of its terms, and so is what
    the softmax makes of it; the gradient of a cosine is of the size of 1 / norm, though its terms
    may cancel."""
    h, g = (torch.stack(in_double(x), -2).cpu() for x in (layers_s, layers_t))
    steep = torch.finfo(torch.float32).eps * float((h.abs() @ g.abs().mT).max()) * abs(scale)
    smallest = min(float(x.norm(dim=-1).min()) for x in (h, g))
    sums, rounded = FLOOR[dtype]
    assert exact.keys() == ours.keys() == theirs.keys()
    for name, truth in exact.items():
        size = truth.abs().max()
        if objective == "cosine":
            size = size.clamp(min=1 if name == "loss" else 1 / max(smallest, 1e-8))
        floor = (sums if name in ("loss", "weights") else rounded) + steep
        its = (theirs[name] - truth).abs().max()
        its = its if its.isfinite() else torch.zeros(())  # half precision may overflow
        error, bound = (ours[name] - truth).abs().max(), 2 * its + floor * size + 1e-7
        assert error <= bound, f"{name}: {error:.3g} above {bound:.3g}"  # and NaN is wrong


def compare_loss(kernel, layers_s, layers_t, dtype, wanted=("student", "teacher"), **options):
    exact = measured(
        loss_of("reference", reduction="none", **options),
        in_double(layers_s), in_double(layers_t), wanted,
    )  # fmt: skip
    ours = measured(loss_of(kernel[0], reduction="none", **options), layers_s, layers_t, wanted)
    theirs = measured(eager_loss(**options), layers_s, layers_t, wanted)
    more = {"scale": options.get("scale", 1.0), "objective": options.get("objective", "mse")}
    within_twice_eager(exact, ours, theirs, dtype, layers_s, layers_t, **more)


def compare_projection(kernel, layers_s, layers_t, dtype, wanted=("student", "teacher"), **options):
    exact = measured(
        projection_of("reference", **options), in_double(layers_s), in_double(layers_t), wanted
    )
    ours = measured(projection_of(kernel[0], **options), layers_s, layers_t, wanted)
    theirs = measured(eager_projection(**options), layers_s, layers_t, wanted)
    scale = options.get("scale", 1.0)
    within_twice_eager(exact, ours, theirs, dtype, layers_s, layers_t, scale)


def close(ours, exact, rtol=1e-5, atol=1e-6):
    """Beside the largest number of each result."""
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        size = max(1.0, float(truth.abs().max())) if truth.numel() else 1.0
        torch.testing.assert_close(
            ours[name], truth, rtol=rtol, atol=atol * size, msg=lambda x, n=name: f"{n}: {x}"
        )


def equal(ours, exact):
    return ours.keys() == exact.keys() and all(torch.equal(ours[k], exact[k]) for k in exact)


# Accuracy


@objectives
@attends
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_rows_and_all_gradients_err_at_most_twice_as_far_as_eager(
    kernel, objective, attend, case, dtype, unless
):
    on_gpu = "cuda" in kernel and (attend == "states" or case in SMALL)
    unless(
        dtype == main_dtype(kernel)
        and (
            on_gpu
            or case == "two logits"
            or (case in ("eight", "one teacher") and attend == "states")
            or (case == "below a tile" and (objective, attend) == ("mse", "states"))
        )
    )
    if case == "a vocabulary" and objective != "kl":
        pytest.skip("only logits are this wide")
    layers_s, layers_t, scale = problem(case, kernel, dtype)
    options = {"objective": objective, "attend": attend, "scale": scale}
    compare_loss(kernel, layers_s, layers_t, dtype, **options)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_projected_states_weights_and_gradients_err_at_most_twice_as_far_as_eager(
    kernel, case, dtype, unless
):
    unless(dtype == main_dtype(kernel) and ("cuda" in kernel or case in ("two logits", "eight")))
    layers_s, layers_t, scale = problem(case, kernel, dtype)
    compare_projection(kernel, layers_s, layers_t, dtype, scale=scale)


@objectives
@attends
@pytest.mark.parametrize("case", ["pseudo logits", "a tile", "hidden states"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_weights_near_one_hot_or_turned_around_err_at_most_twice_as_far_as_eager(
    kernel, objective, attend, case, dtype, scale, unless
):
    unless(dtype == main_dtype(kernel) and case == "a tile" and "cuda" in kernel)
    layers_s, layers_t, _ = problem(case, kernel, dtype)
    options = {"objective": objective, "attend": attend, "scale": scale}
    compare_loss(kernel, layers_s, layers_t, dtype, **options)
    if (objective, attend) == ("mse", "states"):
        compare_projection(kernel, layers_s, layers_t, dtype, scale=scale)


@attends
@pytest.mark.parametrize("temperature", [0.25, 4.0])
@pytest.mark.parametrize("case", ["two logits", "pseudo logits", "below a tile", "a vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_temperature_of_kl_errs_at_most_twice_as_far_as_eager(
    kernel, attend, temperature, case, dtype, unless
):
    unless(dtype == main_dtype(kernel) and "cuda" in kernel)
    layers_s, layers_t, scale = problem(case, kernel, dtype)
    options = {"objective": "kl", "attend": attend, "scale": scale, "temperature": temperature}
    compare_loss(kernel, layers_s, layers_t, dtype, **options)


@pytest.mark.exhaustive
@objectives
@attends
@pytest.mark.parametrize(
    ("many_s", "many_t"), [(1, 1), (1, 12), (6, 11), (4, 12), (7, 13), (12, 1)]
)
@pytest.mark.parametrize("tokens", [1, 3, 17, 127, 129])
@pytest.mark.parametrize("d", [1, 2, 3, 4, 5, 8, 16, 17, 31, 64, 127, 129, 384, 768])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_every_combination_errs_at_most_twice_as_far_as_eager(
    kernel, objective, attend, many_s, many_t, tokens, d, dtype
):
    if kernel in (("triton", "cpu"), ("cuda", "cpu")) and tokens * many_s * many_t > 500:
        pytest.skip("takes minutes")
    layers_s, layers_t = (
        states(many, tokens, d, dtype=dtype, device=kernel[1]) for many in (many_s, many_t)
    )
    options = {"scale": d**-0.5, "mask": mask_of("random", (tokens,), kernel[1])}
    compare_loss(
        kernel, layers_s, layers_t, dtype, objective=objective, attend=attend, temperature=1.5,
        **options,
    )  # fmt: skip
    if (objective, attend) == ("mse", "states"):
        compare_projection(kernel, layers_s, layers_t, dtype, **options)


@objectives
@attends
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_reference(kernel, objective, attend, case):
    if kernel[0] != "cpp":
        pytest.skip("float64 is served by the reference and cpp")
    layers_s, layers_t, scale = problem(case, kernel, torch.float64)
    options = {"objective": objective, "attend": attend, "scale": scale, "temperature": 1.5}
    tolerances = {"rtol": 1e-9, "atol": 1e-12}
    for reduction in ("none", "mean"):
        exact, ours = (
            measured(loss_of(x, reduction=reduction, **options), layers_s, layers_t)
            for x in ("reference", "cpp")
        )
        close(ours, exact, **tolerances)
    exact, ours = (
        measured(projection_of(x, scale=scale), layers_s, layers_t) for x in ("reference", "cpp")
    )
    close(ours, exact, **tolerances)


@objectives
@attends
@reductions
@pytest.mark.parametrize("kind", [None, "random"])
@pytest.mark.parametrize("case", ["two logits", "pseudo logits", "above a tile"])
def test_scalar_losses_equal_the_reference(
    kernel, objective, attend, reduction, kind, case, unless
):
    unless(
        (case == "two logits" and kind and reduction == "mean" and attend == "states")
        or (case == "pseudo logits" and "cuda" in kernel)
    )
    layers_s, layers_t, scale = problem(case, kernel)
    mask = mask_of(kind, CASES[case][0], kernel[1])
    options = {"objective": objective, "attend": attend, "scale": scale, "mask": mask}
    exact, ours = (
        measured(loss_of(backend, reduction=reduction, **options), s, t)
        for backend, s, t in (
            ("reference", in_double(layers_s), in_double(layers_t)),
            (kernel[0], layers_s, layers_t),
        )
    )
    close(ours, exact, rtol=2e-5, atol=5e-6)


@objectives
@attends
@pytest.mark.parametrize("wanted", [("student",), ("teacher",), ()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_side_alone_gets_the_gradient_it_gets_with_the_other(
    kernel, objective, attend, wanted, reduction, unless
):
    unless("cuda" in kernel)
    layers_s, layers_t, scale = problem("eight", kernel)
    options = {"objective": objective, "attend": attend, "scale": scale, "reduction": reduction}
    function = loss_of(kernel[0], **options)
    everything = measured(function, layers_s, layers_t)
    some = measured(function, layers_s, layers_t, wanted)
    close(some, {name: everything[name] for name in some})
    assert {"loss", *wanted} == some.keys()
    if objective == "mse":
        everything = measured(projection_of(kernel[0], scale=scale), layers_s, layers_t)
        some = measured(projection_of(kernel[0], scale=scale), layers_s, layers_t, wanted)
        close(some, {name: everything[name] for name in some})


@pytest.mark.parametrize("what", ["weights", "one projected", "weights and one projected"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_through_some_of_the_projections_outputs_are_right(kernel, what, dtype, unless):
    unless("cuda" in kernel and dtype == main_dtype(kernel))
    layers_s, layers_t, scale = problem("above a tile", kernel, dtype)

    def some(run):
        def function(s, t):
            projected, weights = run(s, t)
            found = (weights * torch.arange(weights.shape[-1], device=weights.device)).sum(-1)
            if what == "weights":
                return found
            alone = projected[2].square().sum(-1, keepdim=True).to(found.dtype)
            return alone if what == "one projected" else found + alone

        return function

    options = {"scale": scale}
    exact = measured(
        some(projection_of("reference", **options)), in_double(layers_s), in_double(layers_t)
    )
    ours = measured(some(projection_of(kernel[0], **options)), layers_s, layers_t)
    theirs = measured(some(eager_projection(**options)), layers_s, layers_t)
    within_twice_eager(exact, ours, theirs, dtype, layers_s, layers_t, scale)


@objectives
@attends
@pytest.mark.parametrize("case", ["two logits", "a tile"])
@pytest.mark.parametrize("kind", ["random", "a view", "one row for all", "padded"])
def test_masked_rows_and_gradients_err_at_most_twice_as_far_as_eager(
    kernel, objective, attend, case, kind, unless
):
    unless("cuda" in kernel and case == "a tile" and kind == "a view")
    dtype = main_dtype(kernel)
    tokens, many_s, many_t, d = (5, 7), *CASES[case][1:]
    layers_s, layers_t = (
        states(many, *tokens, d, dtype=dtype, device=kernel[1]) for many in (many_s, many_t)
    )
    options = {"mask": mask_of(kind, tokens, kernel[1]), "scale": d**-0.5}
    compare_loss(kernel, layers_s, layers_t, dtype, objective=objective, attend=attend, **options)
    if (objective, attend) == ("mse", "states"):
        compare_projection(kernel, layers_s, layers_t, dtype, **options)


# Numerical edges


@pytest.mark.parametrize("objective", ["mse", "cosine", "kl"])
@attends
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("d", [1, 3, 129, 768])
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_student_equal_to_the_teacher_has_exactly_no_loss_and_no_gradient(
    kernel, objective, attend, reduction, d, dtype, unless
):
    if kernel[0] != "cpp" and dtype == torch.float64:
        pytest.skip("float64 is served by the reference and cpp")
    unless(dtype == main_dtype(kernel) and d == 3 and ("cuda" in kernel or reduction == "none"))
    teacher = (states(1, 9, d)[0] + 3).to(kernel[1], dtype)
    options = {"objective": objective, "attend": attend, "reduction": reduction}
    found = measured(loss_of(kernel[0], **options), [teacher.clone()] * 3, [teacher])
    for name, x in found.items():
        eps = torch.finfo(torch.float32).eps
        if objective == "cosine":  # 1 - <h, h> / |h|^2 is zero up to rounding
            norm = float(teacher.double().norm(dim=-1).min()) if name != "loss" else 1.0
            assert x.abs().max() <= 4 * (27 if x.dim() == 0 else 3) * eps / norm, name
        elif name == "teacher":  # a sum over students, each of which is zero up to rounding
            assert x.abs().max() <= 8 * eps * teacher.double().abs().max(), name
        else:
            assert torch.count_nonzero(x) == 0, name


@objectives
@attends
@pytest.mark.parametrize("peak", [1e4, -1e4, 1e7])
def test_saturated_scores_equal_the_reference(kernel, objective, attend, peak, unless):
    unless(peak == 1e4 or "cuda" in kernel)
    # Whole numbers, so that all scores are exact: many are equal, the others far apart.
    layers_s, layers_t = (
        [torch.randint(-3, 4, (11, 6)).float().to(kernel[1]) for _ in range(many)]
        for many in (3, 5)
    )
    options = {"objective": objective, "attend": attend, "scale": peak, "reduction": "none"}
    exact, ours = (
        measured(loss_of(backend, **options), s, t)
        for backend, s, t in (
            ("reference", in_double(layers_s), in_double(layers_t)),
            (kernel[0], layers_s, layers_t),
        )
    )
    # Between equal scores the weights are even, and their gradient is peak times a difference.
    close(ours, exact, rtol=1e-5, atol=3e-6)
    exact, ours = (
        measured(projection_of(backend, scale=peak), s, t)
        for backend, s, t in (
            ("reference", in_double(layers_s), in_double(layers_t)),
            (kernel[0], layers_s, layers_t),
        )
    )
    close(ours, exact, rtol=1e-5, atol=3e-6)


@objectives
@attends
@pytest.mark.parametrize("zero", ["both", "student", "teacher"])
@pytest.mark.parametrize("d", [3, 40])
def test_states_of_zero_have_the_gradient_of_the_reference(
    kernel, objective, attend, zero, d, unless
):
    unless(d == 3 and zero != "teacher")
    layers_s, layers_t = (
        [torch.zeros_like(x) if zero in ("both", side) else x for x in layers]
        for side, layers in (
            ("student", states(2, 3, d, device=kernel[1])),
            ("teacher", states(3, 3, d, device=kernel[1])),
        )
    )
    options = {"objective": objective, "attend": attend, "reduction": "none"}
    exact, ours = (
        measured(loss_of(backend, **options), s, t)
        for backend, s, t in (
            ("reference", in_double(layers_s), in_double(layers_t)),
            (kernel[0], layers_s, layers_t),
        )
    )
    if objective == "cosine":
        assert (ours["loss"] == 1).all()
    elif zero == "both":
        assert torch.count_nonzero(ours["loss"]) == 0
    close(ours, exact)


@attends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [3, 64, 768])
def test_large_means_in_a_dimension_keep_the_digits_of_mse(kernel, attend, dtype, d, unless):
    unless("cuda" in kernel and dtype == main_dtype(kernel))
    layers_s, layers_t = ([x + 0 for x in states(many, 9, d)] for many in (2, 3))
    for x in (*layers_s, *layers_t):
        x[:, 0] += 300
    layers_s, layers_t = ([x.to(kernel[1], dtype) for x in y] for y in (layers_s, layers_t))
    # Weights as good as even: it is the differences that are tested.
    options = {"attend": attend, "scale": 1e-9, "reduction": "none"}
    exact = measured(loss_of("reference", **options), in_double(layers_s), in_double(layers_t))
    ours = measured(loss_of(kernel[0], **options), layers_s, layers_t)
    # The mixture of numbers of size 300 in float32 is off by 300 eps; so is its difference.
    eps = torch.finfo(torch.float32).eps
    for name in ("loss", "student"):
        error = (ours[name] - exact[name]).abs().max() / exact[name].abs().max()
        rounded = torch.finfo(dtype).eps if name == "student" else 0.0
        assert error <= 16 * 300 * eps + rounded, name


@attends
@pytest.mark.parametrize("d", [3, 40, 129])
def test_states_far_from_zero_have_gradients_of_differences_taken_before_sums(
    kernel, attend, d, unless
):
    unless("cuda" in kernel)
    layers_s, layers_t = (
        [x + 300 for x in states(many, 17, d, device=kernel[1])] for many in (2, 3)
    )
    options = {"attend": attend, "scale": 1e-9}  # weights as good as even
    compare_loss(kernel, layers_s, layers_t, torch.float32, **options)


@objectives
@attends
@pytest.mark.parametrize("place", [0, 3])
def test_a_layer_far_from_the_others_costs_them_no_digits_wherever_it_is(
    kernel, objective, attend, place, unless
):
    unless("cuda" in kernel)
    student = torch.randn(100, 40, device=kernel[1])
    teacher = [student + 0.3 * torch.randn(100, 40, device=kernel[1]) for _ in range(3)]
    teacher.insert(place, -100 * student)
    options = {"objective": objective, "attend": attend, "scale": 40**-0.5}
    exact = measured(loss_of("reference", **options), [student.double()], in_double(teacher))
    ours, theirs = (
        measured(loss_of(backend, **options), [student], teacher)
        for backend in (kernel[0], "reference")
    )
    for name in ("loss", "student"):
        error, bound = ((x[name] - exact[name]).abs().max() for x in (ours, theirs))
        assert error <= 2 * bound + 1e-6 * exact[name].abs().max(), name


@pytest.mark.parametrize("size", [1e4, 3e4, 1e6])
@pytest.mark.parametrize("d", [3, 64])
def test_scores_of_billions_that_are_rounded_give_weights(kernel, size, d, unless):
    unless("cuda" in kernel)
    layers_s = [size * torch.linspace(0.5, 1.5, d, device=kernel[1]).repeat(9, 1)]
    layers_t = [layers_s[0] * factor for factor in (1.0, 0.99, 0.5)]
    _, weights = layer_projection(layers_s, layers_t, scale=0.1, backend=kernel[0])
    assert weights[:, 0].tolist() == [[1, 0, 0]] * 9
    loss = layer_projection_loss(
        layers_s, layers_t, objective="cosine", scale=0.1, backend=kernel[0]
    )
    assert loss.abs() < 1e-6


@attends
@pytest.mark.parametrize("d", [3, 129, 8192])
@pytest.mark.parametrize("distance", [1e-1, 1e-3])
def test_kl_of_close_distributions_is_as_near_as_the_reference_in_float32(
    kernel, attend, d, distance, unless
):
    unless(d == 129 and "cuda" in kernel)
    teacher = 3 * torch.randn(9, d, device=kernel[1])
    student = [teacher + distance * torch.randn(9, d, device=kernel[1]) for _ in range(2)]
    options = {"objective": "kl", "attend": attend, "scale": 1 / d, "reduction": "none"}
    exact = measured(loss_of("reference", **options), in_double(student), [teacher.double()])
    ours, theirs = (
        measured(loss_of(backend, **options), student, [teacher])
        for backend in (kernel[0], "reference")
    )
    for name, truth in exact.items():
        error, bound = ((x[name] - truth).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 2 * bound + 1e-7 * max(1.0, float(truth.abs().max())), name


@attends
@pytest.mark.parametrize("d", [4, 40])
def test_probabilities_of_exactly_zero_contribute_nothing(kernel, attend, d, unless):
    unless("cuda" in kernel and d == 4)
    layers_s, layers_t = ([300 * x for x in states(k, 7, d, device=kernel[1])] for k in (2, 3))
    assert all((x.softmax(-1) == 0).any() for x in (*layers_s, *layers_t))
    # Scores of whole numbers: exact.
    layers_s, layers_t = ([x.round() for x in y] for y in (layers_s, layers_t))
    options = {"objective": "kl", "attend": attend, "scale": 1e-6, "reduction": "none"}
    exact = measured(loss_of("reference", **options), in_double(layers_s), in_double(layers_t))
    ours = measured(loss_of(kernel[0], **options), layers_s, layers_t)
    close(ours, exact, rtol=1e-4, atol=1e-5)


@objectives
@attends
@pytest.mark.parametrize("filling", [math.nan, math.inf])
@reductions
def test_what_masked_tokens_hold_reaches_nothing(
    kernel, objective, attend, filling, reduction, unless
):
    unless(math.isnan(filling) and attend == "states" and reduction != "sum")
    d = 5
    layers_s, layers_t = (states(many, 3, 5, d, device=kernel[1]) for many in (2, 3))
    mask = mask_of("a view", (3, 5), kernel[1])
    assert mask.any() and not mask.all()
    options = {"objective": objective, "attend": attend, "mask": mask, "reduction": reduction}
    functions = [loss_of(kernel[0], **options), projection_of(kernel[0], mask=mask)]
    for function in functions:
        clean, dirty = (
            measured(
                function,
                *([torch.where(mask[..., None], x, y) for x in z] for z in (layers_s, layers_t)),
            )
            for y in (0.0, filling)
        )
        assert equal(dirty, clean)
        for name, x in clean.items():
            assert x.isfinite().all(), name
            if name in ("student", "teacher"):
                assert torch.count_nonzero(x[:, ~mask.cpu()]) == 0, name
            elif x.dim() > 1:
                assert torch.count_nonzero(x[~mask.cpu()]) == 0, name


@objectives
@attends
def test_upstream_gradients_of_masked_tokens_reach_nothing(kernel, objective, attend, unless):
    unless(attend == "states" and ("cuda" in kernel or objective == "mse"))
    layers_s, layers_t = (states(many, 3, 5, 6, device=kernel[1]) for many in (2, 3))
    mask = mask_of("a view", (3, 5), kernel[1])
    upstreams = [torch.randn(3, 5, *x, device=kernel[1]) for x in ((2,), (2, 6), (2, 3))]
    dirty = [x.masked_fill(~mask.view(3, 5, *[1] * (x.dim() - 2)), math.nan) for x in upstreams]
    options = {"objective": objective, "attend": attend, "mask": mask, "reduction": "none"}
    for function, part in (
        (loss_of(kernel[0], **options), slice(1)),
        (projection_of(kernel[0], mask=mask), slice(1, 3)),
    ):
        found, expected = (
            measured(function, layers_s, layers_t, upstream=x[part]) for x in (dirty, upstreams)
        )
        assert equal(found, expected)


@objectives
@attends
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("d", [3, 40])
def test_nan_stays_in_its_token(kernel, objective, attend, bad, side, d, unless):
    unless(math.isnan(bad) and d == 3 and attend == "states")
    layers_s, layers_t = (states(many, 5, d, device=kernel[1]) for many in (2, 3))
    options = {"objective": objective, "attend": attend, "reduction": "none"}
    functions = [loss_of(kernel[0], **options), projection_of(kernel[0])]
    clean = [measured(f, layers_s, layers_t) for f in functions]
    (layers_s if side == "student" else layers_t)[1][3, d - 1] = bad
    others = [0, 1, 2, 4]
    for function, before in zip(functions, clean, strict=True):
        after = measured(function, layers_s, layers_t)
        for name, x in after.items():
            y, tokens = before[name], 0
            if name in ("student", "teacher"):
                x, y, tokens = x.transpose(0, 1), y.transpose(0, 1), 1
            assert torch.equal(x[others], y[others]), name
            if math.isnan(bad):
                # A layer of the student is its own affair, one of the teacher that of all.
                of_it = (
                    x[3, 1] if side == "student" and (tokens == 0 or name == "student") else x[3]
                )
                if side == "teacher" or name != "teacher":
                    assert of_it.isnan().any(), name
                else:
                    assert x[3].isnan().any(), name
        if math.isnan(bad) and side == "student":
            value = after["loss" if "loss" in after else "weights"]
            assert value[3, 0].isfinite().all()


@objectives
@attends
def test_fully_masked_input_has_zero_everything(kernel, objective, attend):
    layers_s, layers_t = (states(many, 3, 4, device=kernel[1]) for many in (2, 3))
    mask = mask_of("nothing", (3,), kernel[1])
    for reduction in ("mean", "sum", "none"):
        options = {"objective": objective, "attend": attend, "reduction": reduction}
        found = measured(loss_of(kernel[0], mask=mask, **options), layers_s, layers_t)
        assert not any(torch.count_nonzero(x) for x in found.values())
    found = measured(projection_of(kernel[0], mask=mask), layers_s, layers_t)
    assert not any(torch.count_nonzero(x) for x in found.values())


@attends
@reductions
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_empty_batch_is_zero(kernel, attend, reduction, shape, masked):
    layers_s, layers_t = (
        [x.requires_grad_() for x in states(many, *shape, 4, device=kernel[1])] for many in (2, 3)
    )
    mask = torch.ones(shape, device=kernel[1]) if masked else None
    for objective in ("mse", "cosine", "kl"):
        options = {"objective": objective, "attend": attend, "reduction": reduction, "mask": mask}
        loss = layer_projection_loss(layers_s, layers_t, **options, backend=kernel[0])
        assert loss.shape == ((*shape, 2) if reduction == "none" else ())
        assert loss.sum() == 0
        for grad in torch.autograd.grad(loss.sum(), [*layers_s, *layers_t]):
            assert grad.shape == (*shape, 4)
    projected, weights = layer_projection(layers_s, layers_t, mask=mask, backend=kernel[0])
    assert [x.shape for x in projected] == [(*shape, 4)] * 2
    assert weights.shape == (*shape, 2, 3)
    for grad in torch.autograd.grad(weights.sum() + projected[0].sum(), [*layers_s, *layers_t]):
        assert grad.shape == (*shape, 4)


# Where the layers lie


def laid_out(x, layout):
    """The same numbers [A, B, d] elsewhere."""
    a, b, d = x.shape
    if layout == "contiguous":
        return x.clone()
    if layout == "CLS":  # the first of seven tokens
        wide = torch.full((a, b, 7, d), math.nan, dtype=x.dtype, device=x.device)
        wide[:, :, 0] = x
        return wide[:, :, 0]
    if layout == "batch second":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "unaligned":  # an odd offset, rows of odd length
        memory = torch.full((a * b * (d + 3) + 1,), math.nan, dtype=x.dtype, device=x.device)
        return memory[1:].view(a, b, d + 3)[..., :d].copy_(x)
    if layout == "every other":
        wide = torch.full((a, b, d, 2), math.nan, dtype=x.dtype, device=x.device)
        wide[..., 1] = x
        return wide[..., 1]
    raise ValueError(layout)


LAYOUTS = ("CLS", "contiguous", "batch second", "unaligned", "every other")


@objectives
@pytest.mark.parametrize("layout", [*LAYOUTS, "each its own"])
@pytest.mark.parametrize("d", [3, 8, 40, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_any_strides_equal_contiguous_ones(kernel, objective, layout, d, dtype, unless):
    unless(
        layout == "each its own" and dtype == main_dtype(kernel)
        and (d in (8, 129) if "cuda" in kernel else (d, objective) == (3, "mse"))
    )  # fmt: skip
    plain = [states(many, 3, 5, d, dtype=dtype, device=kernel[1]) for many in (3, 5)]
    chosen = LAYOUTS if layout == "each its own" else (layout,)
    moved = [
        [laid_out(x, chosen[(k + start) % len(chosen)]) for k, x in enumerate(layers)]
        for start, layers in enumerate(plain)
    ]
    mask = mask_of("a view", (3, 5), kernel[1])
    options = {"mask": mask, "scale": d**-0.5}
    # A gradient of half precision may round the other way.
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    )
    for reduction in ("none", "mean"):
        function = loss_of(kernel[0], objective=objective, reduction=reduction, **options)
        close(measured(function, *moved), measured(function, *plain), **tolerance)
    if objective == "mse":
        function = projection_of(kernel[0], **options)
        close(measured(function, *moved), measured(function, *plain), **tolerance)


def test_one_feature_may_have_any_stride(kernel):
    plain = [states(many, 4, 3, 1, device=kernel[1]) for many in (2, 3)]
    moved = [[x.as_strided(x.shape, (3, 1, 5)) for x in layers] for layers in plain]
    assert moved[0][0].is_contiguous() and moved[0][0].stride(-1) == 5
    for function in (loss_of(kernel[0], reduction="none"), projection_of(kernel[0])):
        assert equal(measured(function, *moved), measured(function, *plain))


@attends
def test_one_batch_entry_may_stand_for_all(kernel, attend):
    layers_s = states(2, 3, 5, 9, device=kernel[1])
    layers_t = [x.expand(3, 5, 9) for x in states(3, 1, 5, 9, device=kernel[1])]
    copied = [x.contiguous() for x in layers_t]
    function = loss_of(kernel[0], attend=attend, reduction="none")
    close(measured(function, layers_s, layers_t), measured(function, layers_s, copied))


@objectives
@attends
def test_the_same_tensor_in_several_places_gets_the_sum_of_gradients(kernel, objective, attend):
    a, b, c = (x.requires_grad_() for x in states(3, 7, 6, device=kernel[1]))
    options = {"objective": objective, "attend": attend, "scale": 0.3}

    def gradients(backend, *leaves):
        a, b, c = leaves
        loss = layer_projection_loss([a, b, a], [b, c, c, a], **options, backend=backend)
        return torch.autograd.grad(2 * loss, leaves)

    exact = gradients("reference", *(x.detach().double().requires_grad_() for x in (a, b, c)))
    for mine, truth in zip(gradients(kernel[0], a, b, c), exact, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "one for all"])
@attends
def test_upstream_gradients_may_have_any_strides(kernel, layout, attend):
    layers_s, layers_t = (states(many, 3, 5, 9, device=kernel[1]) for many in (2, 4))
    rows = torch.randn(3, 5, 2, device=kernel[1])
    states_, weights = torch.randn(3, 5, 2, 9), torch.randn(3, 5, 2, 4)
    upstreams = [x.to(kernel[1]) for x in (rows, states_, weights)]
    if layout == "one for all":
        upstreams = [x.flatten()[0].expand(x.shape) for x in upstreams]
    moved = upstreams
    if layout == "transposed":
        moved = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in upstreams]
    for function, mine, its in (
        (loss_of(kernel[0], attend=attend, reduction="none"), moved[:1], upstreams[:1]),
        (projection_of(kernel[0]), moved[1:], upstreams[1:]),
    ):
        its = [x.contiguous() for x in its]
        close(
            measured(function, layers_s, layers_t, upstream=mine),
            measured(function, layers_s, layers_t, upstream=its),
        )


# What stands around the kernels


@objectives
@attends
def test_results_are_the_same_bit_for_bit_each_time(kernel, objective, attend):
    layers_s, layers_t, scale = problem("above a tile", kernel, main_dtype(kernel))
    options = {"objective": objective, "attend": attend, "scale": scale}
    torch.use_deterministic_algorithms(False)
    for function in (
        loss_of(kernel[0], reduction="none", **options),
        loss_of(kernel[0], reduction="mean", **options),
        projection_of(kernel[0], scale=scale),
    ):
        assert equal(*(measured(function, layers_s, layers_t) for _ in range(2)))


@objectives
@attends
@pytest.mark.parametrize("case", ["pseudo logits", "seventeen", "hidden states"])
def test_threads_change_nothing(kernel, objective, attend, case):
    if kernel[0] != "cpp":
        pytest.skip("threads are those of the CPU")
    layers_s, layers_t, scale = problem(case, kernel)
    options = {"objective": objective, "attend": attend, "scale": scale}
    functions = (loss_of("cpp", reduction="none", **options), projection_of("cpp", scale=scale))
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append([measured(f, layers_s, layers_t) for f in functions])
    torch.set_num_threads(1)
    assert all(map(equal, *results))


@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_results_have_the_dtypes_promised_and_are_contiguous(kernel, dtype):
    if kernel[0] != "cpp" and dtype == torch.float64:
        pytest.skip("float64 is served by the reference and cpp")
    statistics = torch.promote_types(dtype, torch.float32)
    layers_s, layers_t, _ = problem("two logits", kernel, dtype)
    leaves = [x.requires_grad_() for x in (*layers_s, *layers_t)]
    projected, weights = layer_projection(layers_s, layers_t, backend=kernel[0])
    assert weights.dtype == statistics and all(x.dtype == dtype for x in projected)
    assert all(x.is_contiguous() for x in (weights, *projected))
    values = [projected[0].sum() + weights.sum()]
    for reduction in ("mean", "none"):
        loss = layer_projection_loss(layers_s, layers_t, reduction=reduction, backend=kernel[0])
        assert loss.dtype == statistics and loss.is_contiguous()
        values.append(loss.sum())
    for value in values:
        for grad in torch.autograd.grad(value, leaves):
            assert grad.dtype == dtype and grad.is_contiguous()


@objectives
@reductions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graph_that_is_kept_gives_the_same_gradient_twice(kernel, objective, reduction, dtype):
    layers_s, layers_t, scale = problem("two logits", kernel, dtype)
    leaves = [x.requires_grad_() for x in (*layers_s, *layers_t)]
    options = {"objective": objective, "reduction": reduction, "scale": scale}
    loss = layer_projection_loss(layers_s, layers_t, **options, backend=kernel[0]).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(4 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(4 * loss, leaves)
    eps = torch.finfo(dtype).eps
    for one, same, two, three in zip(first, kept, second, third, strict=True):
        assert torch.equal(one, same)  # what was given away is not written again
        torch.testing.assert_close(two, 4 * one, rtol=2 * eps + 1e-5, atol=1e-6)
        torch.testing.assert_close(three, two, rtol=2 * eps + 1e-5, atol=1e-6)


def test_gradients_made_in_forward_let_the_teacher_go(kernel):
    if kernel[0] != "cpp":
        pytest.skip("a GPU makes no gradients in forward")
    layers_s, layers_t, _ = problem("two logits", kernel)
    for x in layers_s:
        x.requires_grad_()
    saved = layer_projection_loss(layers_s, layers_t, backend="cpp").grad_fn.saved_tensors
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in layers_s}


def test_graph_of_a_projection_that_is_kept_gives_the_same_gradient_twice(kernel):
    layers_s, layers_t, scale = problem("two logits", kernel)
    leaves = [x.requires_grad_() for x in (*layers_s, *layers_t)]
    projected, weights = layer_projection(layers_s, layers_t, scale=scale, backend=kernel[0])
    value = projected[1].square().sum() + weights[..., 0].sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, leaves)))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_raises_naming_the_operator(kernel, reduction):
    layers_s, layers_t, _ = problem("two logits", kernel)
    leaf = layers_s[0].requires_grad_()
    loss = layer_projection_loss(layers_s, layers_t, reduction=reduction, backend=kernel[0]).sum()
    projected, weights = layer_projection(layers_s, layers_t, backend=kernel[0])
    for name, value in (
        ("layer_projection_loss", loss),
        ("layer_projection", projected[0].square().sum()),
        ("layer_projection", weights.square().sum()),
    ):
        (grad,) = torch.autograd.grad(value, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name} has first derivatives only"):
            grad.sum().backward()


def test_teacher_made_in_inference_mode_is_served(kernel):
    layers_s, plain, scale = problem("two logits", kernel)
    with torch.inference_mode():
        layers_t = [x + 0 for x in plain]
        mask = torch.ones(3, dtype=torch.bool, device=kernel[1])
    assert layers_t[0].is_inference()
    leaves = [x.requires_grad_() for x in layers_s]
    for reduction in ("mean", "none"):
        mine, its = (
            torch.autograd.grad(
                layer_projection_loss(
                    leaves, t, mask=m, scale=scale, reduction=reduction, backend=kernel[0]
                ).sum(),
                leaves,
            )
            for t, m in ((layers_t, mask), (plain, None))
        )
        torch.testing.assert_close(mine, its)
    mine, its = (
        torch.autograd.grad(layer_projection(leaves, t, backend=kernel[0])[1][..., 0].sum(), leaves)
        for t in (layers_t, plain)
    )
    torch.testing.assert_close(mine, its)
    with torch.inference_mode():
        inside = layer_projection_loss(leaves, layers_t, mask=mask, scale=scale, backend=kernel[0])
    outside = layer_projection_loss(leaves, plain, scale=scale, backend=kernel[0])
    torch.testing.assert_close(inside.clone(), outside.detach())


@objectives
@reductions
def test_only_inputs_are_saved_for_backward(kernel, objective, reduction):
    layers_s, layers_t, scale = problem("above a tile", kernel)
    leaves = [x.requires_grad_() for x in layers_s]
    mask = mask_of("random", CASES["above a tile"][0], kernel[1])
    inputs = {x.untyped_storage().data_ptr() for x in (*leaves, *layers_t, mask)}
    saved = []

    def pack(x):
        saved.append(x)
        return x

    options = {"objective": objective, "reduction": reduction, "scale": scale, "mask": mask}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        layer_projection_loss(leaves, layers_t, **options, backend=kernel[0])
    others = [x for x in saved if x.untyped_storage().data_ptr() not in inputs]
    assert all(x.numel() == 1 for x in others)  # what the sum of rows is divided by
    assert not others or reduction != "none"


def test_projection_saves_its_inputs_and_weights(kernel):
    layers_s, layers_t, scale = problem("above a tile", kernel)
    leaves = [x.requires_grad_() for x in layers_s]
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _, weights = layer_projection(leaves, layers_t, scale=scale, backend=kernel[0])
    inputs = {x.untyped_storage().data_ptr() for x in (*leaves, *layers_t, weights)}
    assert {x.untyped_storage().data_ptr() for x in saved} <= inputs


@pytest.mark.parametrize(
    ("objective", "attend", "reduction"),
    [("mse", "states", "mean"), ("kl", "losses", "none"), ("cosine", "states", "sum")],
)
def test_compiled_without_graph_breaks_and_with_dynamic_shapes_equals_eager(
    kernel, objective, attend, reduction, unless
):
    unless("cuda" in kernel)
    options = {"objective": objective, "attend": attend, "reduction": reduction}

    def loss(a, b, c, mask):  # one tensor in two places
        return layer_projection_loss(
            [a, b, a], [c, b], mask=mask, scale=0.3, **options, backend=kernel[0]
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 17, 6), (3, 29, 9)):
        a, b, c = states(3, *shape, device=kernel[1])
        leaves = [a.requires_grad_(), b.requires_grad_()]
        mask = mask_of("random", shape[:-1], kernel[1])
        results = []
        for function in (loss, compiled):
            value = function(a, b, c, mask)
            results.append([value, *torch.autograd.grad(3 * value.sum(), leaves)])
        for mine, its in zip(*results, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


def test_compiled_projection_equals_eager(kernel, unless):
    unless("cuda" in kernel)

    def value(a, b, c):
        projected, weights = layer_projection([a, b], [c, b, c], scale=0.3, backend=kernel[0])
        return torch.stack(projected).square().sum() + weights[..., 0].sum()

    compiled = torch.compile(value, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 17, 6), (3, 29, 9)):
        leaves = [x.requires_grad_() for x in states(3, *shape, device=kernel[1])]
        results = [
            [f(*leaves), *torch.autograd.grad(f(*leaves), leaves)] for f in (value, compiled)
        ]
        for mine, its in zip(*results, strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager(kernel):
    if kernel == ("triton", "cpu"):
        pytest.skip("the interpreter runs Python, which a compiled graph cannot call")

    def loss(a, b, c):
        return 3 * layer_projection_loss([2 * a, b], [c, b], scale=0.3, backend=kernel[0])

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    leaves = [x.requires_grad_() for x in states(3, 5, 7, 9, device=kernel[1])]
    results = [[f(*leaves), *torch.autograd.grad(f(*leaves), leaves)] for f in (loss, compiled)]
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)


@objectives
@reductions
def test_autocast_around_forward_and_backward_changes_nothing(kernel, objective, reduction):
    layers_s, layers_t, scale = problem("eight", kernel)
    functions = (
        loss_of(kernel[0], objective=objective, reduction=reduction, scale=scale),
        projection_of(kernel[0], scale=scale),
    )
    results = []
    for enabled in (False, True):
        with torch.autocast(kernel[1], torch.bfloat16, enabled=enabled):
            results.append([measured(f, layers_s, layers_t) for f in functions])
    assert all(map(equal, *results))


@objectives
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed_loss_has_the_same_gradient(kernel, objective, reduction):
    layers_s, layers_t, scale = problem("two logits", kernel)
    layers_s = [x.requires_grad_() for x in layers_s]
    options = {"objective": objective, "reduction": reduction, "scale": scale}

    def loss(*x):
        return layer_projection_loss(x, layers_t, **options, backend=kernel[0]).sum()

    plain = torch.autograd.grad(loss(*layers_s), layers_s)
    again = torch.autograd.grad(checkpoint(loss, *layers_s, use_reentrant=False), layers_s)
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_may_come_back_with_other_strides(kernel, reduction):
    layers_s, layers_t = (
        [laid_out(x, "batch second") for x in states(many, 3, 5, 9, device=kernel[1])]
        for many in (2, 3)
    )
    layers_s = [x.requires_grad_() for x in layers_s]
    gradients = []
    for pack in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = layer_projection_loss(
                layers_s, layers_t, reduction=reduction, backend=kernel[0]
            ).sum()
            projected, weights = layer_projection(layers_s, layers_t, backend=kernel[0])
        gradients.append(torch.autograd.grad(loss + weights.mT[0].sum(), layers_s))
    torch.testing.assert_close(*gradients)


def test_what_a_kernel_cannot_serve_it_refuses_with_a_reason(kernel):
    if kernel == ("cuda", "cpu"):
        pytest.skip("the simulation does not look at devices")
    x = torch.zeros(4, 2, device="meta")
    with pytest.raises(RuntimeError, match=f"{kernel[0]}: inputs are on meta"):
        layer_projection_loss([x], [x], backend=kernel[0])
    if kernel[0] != "cpp":
        x = torch.zeros(4, 2, dtype=torch.float64, device=kernel[1])
        with pytest.raises(RuntimeError, match="layer_projection_loss: .*float64"):
            layer_projection_loss([x], [x], backend=kernel[0])


# The contract


EXACT = torch.float64


def dense(layers, mask):
    """[A, B, L, d], masked tokens zero."""
    made = torch.stack([x.to(EXACT) for x in layers], -2)
    return made if mask is None else made.masked_fill(~mask[..., None, None], 0.0)


def unstacked(grad_s, grad_t, layers, mask, wanted, dtype):
    """Gradients of the layers wanted; 0 in masked tokens, whatever came from upstream."""
    grads = torch.cat([grad_s, grad_t], -2)
    if mask is not None:
        grads = grads.masked_fill(~mask[..., None, None], 0.0)
    return [grads[..., i, :].to(dtype or layers[0].dtype).contiguous() for i in wanted]


def dense_projection(layers_s, layers_t, mask, scale):
    h, g = dense(layers_s, mask), dense(layers_t, mask)
    weights = (scale * h @ g.mT).softmax(-1)
    projected = (weights @ g).to(layers_s[0].dtype)
    if mask is not None:
        weights = weights.masked_fill(~mask[..., None, None], 0.0)
    statistics = torch.promote_types(layers_s[0].dtype, torch.float32)
    return [*(x.contiguous() for x in projected.unbind(-2)), weights.to(statistics).contiguous()]


def of_scores(weights, grad_weights, scale):
    inner = (weights * grad_weights).sum(-1, keepdim=True)
    return scale * weights * (grad_weights - inner)


def dense_projection_backward(
    grad_projected, grad_weights, weights, layers_s, layers_t, mask, scale, wanted
):
    h, g = dense(layers_s, mask), dense(layers_t, mask)
    u, weights = torch.stack(list(grad_projected), -2).to(EXACT), weights.to(EXACT)
    scores = of_scores(weights, u @ g.mT + grad_weights, scale)
    return unstacked(
        scores @ g, weights.mT @ u + scores.mT @ h, [*layers_s, *layers_t], mask, wanted, None
    )


def dense_objective(h, c, objective, temperature):
    """l, its derivative D where h stands, and u where c does."""
    if objective == "mse":
        difference = h - c
        grad = 2 / h.shape[-1] * difference
        return difference.square().mean(-1), grad, -grad
    if objective == "cosine":
        norm_h, norm_c = (x.norm(dim=-1, keepdim=True) for x in (h, c))
        free_h, free_c = ((x > 1e-8).to(EXACT) + 0 * x for x in (norm_h, norm_c))
        norm_h, norm_c = norm_h.clamp(min=1e-8), norm_c.clamp(min=1e-8)
        unit_h, unit_c = h / norm_h, c / norm_c
        cos = (unit_h * unit_c).sum(-1, keepdim=True)
        of_h = (free_h * cos * unit_h - unit_c) / norm_h
        of_c = (free_c * cos * unit_c - unit_h) / norm_c
        return 1 - cos.squeeze(-1), of_h, of_c
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (h, c))
    ratio, p = log_p - log_q, log_p.exp()
    terms = torch.where(p == 0, 0.0, p * ratio)
    value = terms.sum(-1)
    of_c = (terms - p * value.unsqueeze(-1)) / temperature
    return value, (log_q.exp() - p) / temperature, of_c


def dense_loss(layers_s, layers_t, mask, objective, losses, scale, temperature):
    return dense_fused(None, layers_s, layers_t, mask, objective, losses, scale, temperature, [])[0]


def dense_fused(grad_rows, layers_s, layers_t, mask, objective, losses, scale, temperature, wanted):
    h, g = dense(layers_s, mask), dense(layers_t, mask)
    statistics = torch.promote_types(layers_s[0].dtype, torch.float32)
    weights = (scale * h @ g.mT).softmax(-1)
    if losses:
        every, of_h, of_g = dense_objective(
            *torch.broadcast_tensors(h.unsqueeze(-2), g.unsqueeze(-3)), objective, temperature
        )
        rows = (weights * every).sum(-1)
    else:
        rows, of_h, of_c = dense_objective(h, weights @ g, objective, temperature)
    hidden = None if mask is None else ~mask[..., None]
    found = rows if hidden is None else rows.masked_fill(hidden, 0.0)
    found = found.to(statistics).contiguous()
    if not wanted:
        return [found]
    upstream = grad_rows.to(EXACT)[..., None]
    if losses:
        scores = of_scores(weights, upstream * every, scale)
        share = (upstream * weights).unsqueeze(-1)
        grad_s, grad_t = (share * of_h).sum(-2), (share * of_g).sum(-3)
    else:
        u = upstream * of_c
        scores = of_scores(weights, u @ g.mT, scale)
        grad_s, grad_t = upstream * of_h, weights.mT @ u
    grad_s, grad_t = grad_s + scores @ g, grad_t + scores.mT @ h
    layers = [*layers_s, *layers_t]
    return [found, *unstacked(grad_s, grad_t, layers, mask, wanted, layers[0].dtype)]


def dense_loss_backward(*inputs):
    return dense_fused(*inputs)[1:]


DENSE = {
    "layer_projection_forward": dense_projection,
    "layer_projection_backward": dense_projection_backward,
    "layer_projection_loss_forward": dense_loss,
    "layer_projection_loss_backward": dense_loss_backward,
    "layer_projection_loss_fused": dense_fused,
}


@pytest.fixture
def contract(monkeypatch):
    """The dense implementation in the place of cpp."""
    for table, name in (
        ("_PROJECTION", "layer_projection_forward"),
        ("_PROJECTION_BACKWARD", "layer_projection_backward"),
        ("_FORWARD", "layer_projection_loss_forward"),
        ("_BACKWARD", "layer_projection_loss_backward"),
        ("_FUSED", "layer_projection_loss_fused"),
    ):
        monkeypatch.setitem(getattr(MODULE, table), "cpp", DENSE[name])
    monkeypatch.setattr(MODULE.library, "load", lambda *_: None)
    for operator in ("layer_projection", "layer_projection_loss"):
        monkeypatch.setattr(dispatch.KERNELS[operator, "cpp"], "_outcome", None)


@objectives
@attends
@pytest.mark.parametrize("kind", [None, "a view"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (3, 4, 1, 4, 5), (1, 2, 3, 1, 2)], ids=str)
def test_contract_written_densely_agrees_with_the_reference(
    contract, objective, attend, kind, shape
):
    a, b, many_s, many_t, d = shape
    both = [states(many, a, b, d, dtype=torch.float64) for many in (many_s, many_t)]
    mask = mask_of(kind, (a, b), "cpu")
    options = {"objective": objective, "attend": attend, "temperature": 1.5, "scale": 0.7}
    for reduction in ("mean", "sum", "none"):
        exact, ours = (
            measured(loss_of(x, mask=mask, reduction=reduction, **options), *both)
            for x in ("reference", "cpp")
        )
        close(ours, exact, rtol=1e-10, atol=1e-12)
    exact, ours = (
        measured(projection_of(x, mask=mask, scale=0.7), *both) for x in ("reference", "cpp")
    )
    close(ours, exact, rtol=1e-10, atol=1e-12)


def operator_of(kernel, name):
    return getattr(torch.ops.kdfast, f"{name}_{kernel[0]}").default


def contract_calls(kernel, objective, losses, dtype=torch.float32, kind="a view", wanted=(0, 3)):
    """Arguments of each operator of a backend: three and four layers, each where it wants to be."""
    a, b, d = 2, 5, 6
    layers_s, layers_t = (
        [
            laid_out(x, ("CLS", "contiguous", "batch second", "unaligned")[k % 4])
            for k, x in enumerate(states(many, a, b, d, dtype=dtype, device=kernel[1]))
        ]
        for many in (3, 4)
    )
    mask, wanted = mask_of(kind, (a, b), kernel[1]), list(wanted)
    inputs = (layers_s, layers_t, mask, objective, losses, 0.4, 1.5)
    rows = torch.linspace(-1, 1, a * b * 3, device=kernel[1]).view(3, b, a).permute(2, 1, 0)
    grad_projected = [laid_out(x, "CLS") for x in states(3, a, b, d, dtype=dtype, device=kernel[1])]
    weights = dense_projection(layers_s, layers_t, mask, 0.4)[-1]
    grad_weights = torch.randn(weights.shape, device=kernel[1])
    calls = {
        "layer_projection_forward": (layers_s, layers_t, mask, 0.4),
        "layer_projection_backward": (
            grad_projected, grad_weights, weights, layers_s, layers_t, mask, 0.4, wanted,
        ),
        "layer_projection_loss_forward": inputs,
        "layer_projection_loss_backward": (rows, *inputs, wanted),
    }  # fmt: skip
    if kernel[0] in MODULE._FUSED:
        calls["layer_projection_loss_fused"] = (rows, *inputs, wanted)
    return calls


def as_list(found):
    return list(found) if isinstance(found, (list, tuple)) else [found]


@objectives
@pytest.mark.parametrize("losses", [False, True], ids=["states", "losses"])
@pytest.mark.parametrize("kind", [None, "a view"])
@pytest.mark.parametrize("wanted", [(), (0, 1, 2), (6, 1), (3, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_each_output_is_that_of_the_contract(
    kernel, objective, losses, kind, wanted, dtype, unless
):
    unless(kind and wanted == (6, 1) and dtype == main_dtype(kernel))
    calls = contract_calls(kernel, objective, losses, dtype, kind, wanted)
    for name, inputs in calls.items():
        found = as_list(operator_of(kernel, name)(*inputs))
        exact = as_list(DENSE[name](*inputs))
        assert len(found) == len(exact), name
        for mine, truth in zip(found, exact, strict=True):
            assert mine.shape == truth.shape and mine.dtype == truth.dtype, name
            assert mine.is_contiguous(), name
            # Products of half precision may be rounded between.
            eps = torch.finfo(dtype).eps if dtype != torch.float32 else 2e-6
            size = truth.double().abs().max().clamp(min=1.0) if truth.numel() else 1.0
            assert (mine.double() - truth.double()).abs().max() <= 4 * eps * size, name


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize(
    ("objective", "losses"), [("mse", False), ("kl", True)], ids=["states", "losses"]
)
@pytest.mark.parametrize("kind", [None, "a view"])
def test_kernels_pass_opcheck(kernel, objective, losses, kind, unless):
    unless(kind and not losses or "cuda" in kernel)
    for name, inputs in contract_calls(kernel, objective, losses, kind=kind).items():
        torch.library.opcheck(operator_of(kernel, name), inputs, test_utils=CHECKS)


@pytest.mark.parametrize("name", ["loss_backward", "loss_fused", "backward"])
def test_layers_wanted_get_their_gradients_in_the_order_asked(kernel, name):
    name = f"layer_projection_{name}"
    calls = contract_calls(kernel, "mse", False)
    if name not in calls:
        pytest.skip("of cpp alone")
    operator, (*inputs, _) = operator_of(kernel, name), calls[name]
    first = 1 if name.endswith("fused") else 0
    every = operator(*inputs, list(range(7)))[first:]
    assert len(every) == 7
    for wanted in ([6, 0], [2], [0, 1, 2], [5, 3, 4], []):
        some = operator(*inputs, wanted)[first:]
        assert len(some) == len(wanted)
        for mine, i in zip(some, wanted, strict=True):
            torch.testing.assert_close(mine, every[i], rtol=1e-5, atol=1e-6)


# On a GPU


def on_gpu(kernel):
    if kernel[1] != "cuda":
        pytest.skip("of a GPU")


@pytest.mark.gpu
@objectives
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(2, 65, 3), (2, 65, 768), (4, 8192)], ids=str)
def test_captured_in_a_cuda_graph(kernel, objective, reduction, shape):
    on_gpu(kernel)
    torch.use_deterministic_algorithms(False)  # filling memory is no part of a captured step

    def layers(many):
        return states(many, *shape, dtype=torch.bfloat16, device="cuda")

    layers_s, layers_t, mask = layers(2), layers(3), mask_of("random", shape[:-1], "cuda")
    scale = shape[-1] ** -0.5
    options = {"objective": objective, "reduction": reduction, "mask": mask, "scale": scale}

    def step():
        leaves = [x.detach().requires_grad_() for x in layers_s]
        loss = layer_projection_loss(leaves, layers_t, **options, backend=kernel[0])
        projected, weights = layer_projection(
            leaves, layers_t, mask=mask, scale=scale, backend=kernel[0]
        )
        of_loss = torch.autograd.grad(loss.sum(), leaves)
        of_both = torch.autograd.grad(projected[1].sum() + weights[..., 0].sum(), leaves)
        return [loss.detach(), *(x.detach() for x in projected), *of_loss, *of_both]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    new = [*layers(2), *layers(3), mask_of("random", shape[:-1], "cuda")]
    for x, values in zip([*layers_s, *layers_t, mask], new, strict=True):
        x.copy_(values)
    graph.replay()
    for ours, theirs in zip(captured, step(), strict=True):
        assert torch.equal(ours, theirs)


def needs_memory(gibibytes):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory")


PAST_32_BITS = 1 << 31


@pytest.mark.gpu
@pytest.mark.parametrize("d", [3, 768])
@pytest.mark.parametrize("far", ["tokens", "batch entries"])
def test_offsets_past_32_bits_are_served(kernel, d, far):
    on_gpu(kernel)
    needs_memory(8)
    a, b = 3, 40
    layers_s, layers_t = (
        states(many, a, b, d, dtype=torch.bfloat16, device="cuda") for many in (2, 3)
    )
    memory = torch.empty(PAST_32_BITS + a * b * d, dtype=torch.bfloat16, device="cuda")
    strides = {
        "tokens": (d, PAST_32_BITS // (b - 1) // 16 * 16, 1),
        "batch entries": (PAST_32_BITS // (a - 1) // 16 * 16, d, 1),
    }[far]
    function = loss_of(kernel[0], scale=d**-0.5, reduction="none")
    projection = projection_of(kernel[0], scale=d**-0.5)
    expected = [measured(f, layers_s, layers_t) for f in (function, projection)]
    for side in (layers_s, layers_t):
        near = side[1]
        side[1] = memory.as_strided(near.shape, strides).copy_(near)
        for f, truth in zip((function, projection), expected, strict=True):
            close(measured(f, layers_s, layers_t), truth, rtol=1e-2, atol=1e-4)
        side[1] = near


@pytest.mark.gpu
@pytest.mark.parametrize("d", [3, 1024])
def test_layers_of_more_than_32_bits_of_numbers_are_served(kernel, d):
    on_gpu(kernel)
    needs_memory(40)
    torch.use_deterministic_algorithms(False)
    tokens, last = PAST_32_BITS // d + 5, slice(-3, None)
    student = torch.zeros(tokens, d, dtype=torch.bfloat16, device="cuda")
    student[last].normal_()
    teacher = [x.expand(tokens, d) for x in states(2, d, dtype=torch.bfloat16, device="cuda")]
    end = [x[last] for x in teacher]

    leaf = student.requires_grad_()
    short = student.detach()[last].clone().requires_grad_()
    for reduction in ("sum", "none"):
        made, few = (
            layer_projection_loss([s], t, scale=0.1, reduction=reduction, backend=kernel[0])
            for s, t in ((leaf, teacher), (short, end))
        )
        (grad,), (expected,) = (
            torch.autograd.grad(x.sum(), s) for x, s in ((made, leaf), (few, short))
        )
        if reduction == "none":
            torch.testing.assert_close(made[last], few)
        torch.testing.assert_close(grad[last], expected)
        del made, grad
    projected, weights = layer_projection([leaf], teacher, scale=0.1, backend=kernel[0])
    few, few_weights = layer_projection([short], end, scale=0.1, backend=kernel[0])
    torch.testing.assert_close(projected[0][last], few[0])
    torch.testing.assert_close(weights[last], few_weights)
    (grad,) = torch.autograd.grad(weights[..., 0].sum(), leaf)
    (expected,) = torch.autograd.grad(few_weights[..., 0].sum(), short)
    torch.testing.assert_close(grad[last], expected)
