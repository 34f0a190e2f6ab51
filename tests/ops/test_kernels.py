"""The ladder that every kernel climbs, whatever its operator and backend.

Each case is measured three times on the same inputs: by the kernel, by eager arithmetic in the
dtype of the inputs, and by the reference in float64. The kernel may err twice as far as eager does,
plus a floor. Memory is filled with NaN beforehand, so that an element nobody writes shows.
"""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from kdfast import ops
from kdfast.reference.attention_kl import _visibility

pytestmark = pytest.mark.usefixtures("memory_filled_with_nan")

OPERATOR = "attention_kl"  # asked whether a kernel can run here
DIRECTIONS = ("forward", "reverse", "js")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def skipping(operator):
    """The operator; a test of what a kernel refuses, and says so, is skipped."""

    def call(*inputs, backend, **options):
        try:
            return operator(*inputs, **options, backend=backend)
        except RuntimeError as error:
            if backend == "cuda" and "cannot serve this call" in str(error):
                pytest.skip(str(error))
            raise

    return call


attention_kl, attention_map_kl = skipping(ops.attention_kl), skipping(ops.attention_map_kl)


# The interpreter takes a second for what a kernel does in no time, so `make test` runs these in it,
# `make test-all` all.
INTERPRETED = {
    "test_rows_and_their_gradients_err_at_most_twice_as_far_as_eager",
    "test_scalar_losses_whose_gradient_is_made_in_forward_equal_the_reference",
    "test_student_equal_to_teacher_has_exactly_no_loss_and_no_gradient",
    "test_what_padding_holds_reaches_nothing",
    "test_tokens_that_are_packed_nowhere_reach_nothing",
    "test_batch_without_any_token_has_zero_loss_and_gradient",
    "test_empty_batch_is_zero",
    "test_map_rows_and_their_gradient_err_at_most_twice_as_far_as_eager",
    "test_zeros_infinities_and_nan_are_where_the_reference_has_them",
    "test_operators_of_attention_map_kl_pass_opcheck",
}


def precision(kernel):
    """The dtype of cases that are not about dtypes. Tensor cores have no float32."""
    return torch.bfloat16 if kernel[0] == "cuda" else torch.float32


# attention_kl


MASK = torch.ones(2, 37, dtype=torch.bool)
MASK[0, 30:] = False
MASK[1, :3] = False
MASK[1, 17] = False
CASES = {
    "plain": ({}, {}),
    "one token": ({"n": 1}, {}),
    "three tokens": ({"n": 3}, {}),
    "widths differ": ({"d": 16, "d_t": 24}, {}),
    "odd widths": ({"d": 13, "d_t": 7}, {}),
    "fewer queries": ({"n": 5, "nk": 37}, {}),
    "fewer keys": ({"n": 37, "nk": 5}, {}),
    "grouped heads": ({"h": 4, "h_kv": 2, "h_kv_t": 1}, {}),
    "padding": ({"n": 37}, {"attention_mask": MASK}),
    "padding, fewer queries": ({"n": 18, "nk": 37}, {"attention_mask": MASK}),
    "padding, grouped": ({"n": 37, "h": 4, "h_kv": 1}, {"attention_mask": MASK}),
    "query mask": ({"n": 37}, {"attention_mask": MASK, "query_mask": MASK.flip(1)}),
    "a sample of padding": ({"n": 37}, {"attention_mask": MASK & torch.tensor([[True], [False]])}),
    "causal": ({"n": 37}, {"causal": True}),
    "causal, widths differ": ({"n": 37, "d": 32, "d_t": 24}, {"causal": True}),
    "causal, fewer queries": ({"n": 18, "nk": 37}, {"causal": True}),
    "causal, more queries": ({"n": 37, "nk": 18}, {"causal": True}),
    "window": ({"n": 70}, {"window": 7}),
    "causal window, padding": ({"n": 37}, {"causal": True, "window": 5, "attention_mask": MASK}),
    "packed": ({"n": 50}, {"cu_seqlens": torch.tensor([0, 3, 4, 21, 45])}),
    "packed, causal, grouped": (
        {"n": 50, "h": 4, "h_kv": 2},
        {"cu_seqlens": torch.tensor([0, 17, 17, 50], dtype=torch.int32), "causal": True},
    ),
    "scales and temperature": ({}, {"scale_s": 0.5, "scale_t": 0.1, "temperature": 2.0}),
    "relation heads": ({"h": 4, "h_t": 3, "d_t": 8, "d": 16}, {"relation_heads": 2}),
    "mean of heads": ({"n": 37, "h_t": 3}, {"match_heads": "mean", "attention_mask": MASK}),
    "near-equal maps, far keys": ({"n": 37, "near": 20}, {}),
}
SHORT = ("plain", "padding", "causal", "packed", "grouped heads", "mean of heads",
         "near-equal maps, far keys")  # fmt: skip


def four(b=2, h=2, n=17, d=16, *, nk=None, h_kv=None, h_t=None, h_kv_t=None, d_t=None, near=None):
    nk, h_t, d_t = nk or n, h_t or h, d_t or d
    shapes = ((b, h, n, d), (b, h_kv or h, nk, d), (b, h_t, n, d_t), (b, h_kv_t or h_t, nk, d_t))
    # [B, N, H, d] seen as [B, H, N, d], as projections give them.
    inputs = [torch.randn(s[0], s[2], s[1], s[3]).transpose(1, 2) for s in shapes]
    if near is not None:
        inputs[3] = inputs[3] + near * torch.randn(b, h_t, 1, d_t)
        inputs[:2] = [inputs[2] + 1e-2 * inputs[0], inputs[3].clone()]
    return inputs


def eager(query_s, key_s, query_t, key_t, *, direction, **options):
    """Rows, in the dtype of the inputs from beginning to end."""
    cu_seqlens, query_mask = options.get("cu_seqlens"), options.get("query_mask")
    sides = [query_s, key_s, query_t, key_t]
    if cu_seqlens is not None:
        sides = [x.transpose(0, 1)[None] for x in sides]
    visible, takes_part = _visibility(
        sides[0].shape[2], sides[1].shape[2], attention_mask=options.get("attention_mask"),
        query_mask=query_mask, causal=options.get("causal", False), window=options.get("window"),
        cu_seqlens=cu_seqlens, device=query_s.device,
    )  # fmt: skip

    def log_softmax(query, key, scale):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        if (r := options.get("relation_heads")) is not None:
            query, key = (
                x.transpose(1, 2).flatten(2).unflatten(2, (r, -1)).transpose(1, 2)
                for x in (query, key)
            )
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.mT * (scale / options.get("temperature", 1.0))
        if visible is not None:
            scores = scores.masked_fill(~visible, -3e4)
        return scores.log_softmax(-1)

    log_s = log_softmax(*sides[:2], options.get("scale_s"))
    log_t = log_softmax(*sides[2:], options.get("scale_t"))
    if options.get("match_heads") == "mean":
        log_t = log_t.exp().mean(1, keepdim=True).clamp(min=torch.finfo(log_t.dtype).tiny).log()

    def kl(log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    if direction == "js":
        middle = torch.logaddexp(log_s, log_t) - math.log(2)
        rows = (kl(log_t, middle) + kl(log_s, middle)) / 2
    else:
        rows = kl(log_t, log_s) if direction == "forward" else kl(log_s, log_t)
    rows = rows.masked_fill(~takes_part, 0.0)
    return rows[0] if cu_seqlens is not None else rows


def rows_and_gradients(function, inputs, upstream, **options):
    learned = 4 if options.get("teacher_grad") else 2
    leaves = [x.detach().requires_grad_(i < learned) for i, x in enumerate(inputs)]
    rows = function(*leaves, **options)
    rows.backward(upstream.to(rows))
    return [x.detach().double().cpu() for x in (rows, *(x.grad for x in leaves[:learned]))]


def moved(inputs, options, device, dtype):
    packed = "cu_seqlens" in options
    inputs = [x[0].transpose(0, 1) if packed else x for x in inputs]
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return [x.to(device, dtype) for x in inputs], options


def least(dtype):
    """An error that counts as none, beside maps whose gradients are about 1e-5."""
    return 1e-6 if dtype in (torch.bfloat16, torch.float16) else 1e-9


def within_twice_eager(exact, ours, theirs, dtype):
    names = ("loss", "query_s", "key_s", "query_t", "key_t")[: len(exact)]
    for name, truth, mine, its in zip(names, exact, ours, theirs, strict=True):
        assert mine.isfinite().all(), name
        floor = 4 * torch.finfo(dtype).eps * truth.abs().max() + least(dtype)
        error, bound = (mine - truth).abs().max(), 2 * (its - truth).abs().max() + floor
        assert error <= bound, f"{name}: {error:.3g} above {bound:.3g}"


def same(mine, its, dtype=torch.float32):
    """Equal but for the last digits, of what was computed in one way and rounded to this dtype."""
    rtol = max(1e-5, 2 * torch.finfo(dtype).eps)
    torch.testing.assert_close(mine, its, rtol=rtol, atol=1e-6)


def by(backend, operator=attention_kl, **fixed):
    def call(*inputs, **options):
        return operator(*inputs, **{**fixed, **options}, backend=backend)

    return call


def in_double(inputs):
    return [x.double() for x in inputs]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_rows_and_their_gradients_err_at_most_twice_as_far_as_eager(
    kernel, case, direction, dtype, unless
):
    main = torch.bfloat16 if "cuda" in kernel else torch.float32
    if case in SHORT and "cuda" in kernel or case in ("plain", "padding"):
        unless(dtype == main or direction == "forward")
    else:
        unless(dtype == main and direction == "forward")
    shapes, options = CASES[case]
    inputs, options = moved(four(**shapes), options, kernel[1], dtype)
    options["direction"] = direction
    dense = by("reference", reduction="none")
    upstream = torch.rand_like(dense(*in_double(inputs), **options)) + 0.5
    within_twice_eager(
        rows_and_gradients(dense, in_double(inputs), upstream, **options),
        rows_and_gradients(by(kernel[0], reduction="none"), inputs, upstream, **options),
        rows_and_gradients(eager, inputs, upstream, **options),
        dtype,
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scalar_losses_whose_gradient_is_made_in_forward_equal_the_reference(
    kernel, case, direction, reduction, unless
):
    several = SHORT if "cuda" in kernel else ("padding",)
    unless(reduction == "mean" and case in SHORT and (case in several or direction == "forward"))
    shapes, options = CASES[case]
    inputs, options = moved(four(**shapes), options, kernel[1], precision(kernel))
    options |= {"direction": direction, "reduction": reduction}
    upstream = torch.tensor(3.0)
    total = attention_kl(
        *in_double(inputs), **{**options, "reduction": "sum"}, backend="reference"
    ).item()
    exact = rows_and_gradients(by("reference"), in_double(inputs), upstream, **options)
    ours = rows_and_gradients(by(kernel[0]), inputs, upstream, **options)
    factor = exact[0].item() / total if total else 1.0
    theirs = rows_and_gradients(
        lambda *x, reduction, **o: eager(*x, **o).sum() * factor, inputs, upstream, **options
    )
    within_twice_eager(exact, ours, theirs, precision(kernel))
    with torch.no_grad():  # the path without gradients is another one
        loss = attention_kl(*inputs, **options, backend=kernel[0])
    same(loss.double().cpu(), ours[0])


@pytest.mark.parametrize("n", [127, 129, 257])
@pytest.mark.parametrize("direction", ["forward", "js"])
def test_lengths_beside_a_tile_equal_the_reference(kernel, n, direction):
    inputs, _ = moved(four(b=1, h=2, n=n, d=32), {}, kernel[1], precision(kernel))
    upstream = torch.tensor(3.0)
    exact, ours, theirs = (
        rows_and_gradients(function, x, upstream, direction=direction)
        for function, x in (
            (by("reference"), in_double(inputs)),
            (by(kernel[0]), inputs),
            (lambda *x, **o: eager(*x, **o).mean(), inputs),
        )
    )
    within_twice_eager(exact, ours, theirs, precision(kernel))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "heads and widths differ"])
def test_each_pair_of_a_sequence_equals_its_own_call(kernel, reduction, alike):
    shapes = [{}, {}, {}] if alike else [{}, {"h": 4, "h_kv": 2, "d": 24}, {"h_t": 2, "d_t": 32}]
    pairs = [moved(four(**shape), {}, kernel[1], precision(kernel))[0] for shape in shapes]
    for pair in pairs:
        for x in pair[:2]:
            x.requires_grad_()
    options = {"reduction": reduction, "backend": kernel[0]}
    losses = attention_kl(*map(list, zip(*pairs, strict=True)), **options)
    factors = [1.0, 3.0, 0.5]
    sum(f * x.sum() for f, x in zip(factors, losses, strict=True)).backward()
    for pair, loss, factor in zip(pairs, losses, factors, strict=True):
        grads = [x.grad for x in pair[:2]]
        alone = attention_kl(*pair, **options)
        same(loss, alone)
        expected = torch.autograd.grad(factor * alone.sum(), pair[:2])
        for mine, its in zip(grads, expected, strict=True):
            same(mine, its, precision(kernel))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", ["padding", "grouped heads", "packed, causal, grouped"])
def test_teacher_gets_its_gradient_when_it_is_asked_for(kernel, direction, case):
    shapes, options = CASES[case]
    inputs, options = moved(four(**shapes), options, kernel[1], precision(kernel))
    options |= {"direction": direction, "teacher_grad": True}
    upstream = torch.tensor(3.0)
    exact = rows_and_gradients(
        by("reference", reduction="sum"), in_double(inputs), upstream, **options
    )
    ours = rows_and_gradients(by(kernel[0], reduction="sum"), inputs, upstream, **options)
    theirs = rows_and_gradients(lambda *x, **o: eager(*x, **o).sum(), inputs, upstream, **options)
    within_twice_eager(exact, ours, theirs, precision(kernel))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_student_equal_to_teacher_has_exactly_no_loss_and_no_gradient(
    kernel, direction, reduction, dtype, unless
):
    unless(dtype == precision(kernel) or (direction == "forward" and reduction == "mean"))
    query, key = four(n=37)[:2]
    inputs, _ = moved([query, key, query, key], {}, kernel[1], dtype)
    upstream = torch.tensor(3.0) if reduction == "mean" else torch.ones(2, 2, 37)
    results = rows_and_gradients(
        by(kernel[0]), inputs, upstream,
        direction=direction, reduction=reduction, attention_mask=MASK.to(kernel[1]),
    )  # fmt: skip
    assert all(torch.count_nonzero(x) == 0 for x in results)


def one_row(kernel, scores, width=8):
    """query and key [1, 1, ., width] whose scores at scale 1 are the given ones."""
    query, key = torch.zeros(1, 1, 1, width), torch.zeros(1, 1, len(scores), width)
    query[..., 0], key[..., 0] = 1.0, torch.tensor(scores)
    return tuple(x.to(kernel[1], precision(kernel)) for x in (query, key))


@pytest.mark.parametrize("peak", [1e4, -1e4])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saturated_softmax_is_right_and_its_gradient_finite(kernel, peak, direction, reduction):
    inputs = [*one_row(kernel, [peak, 0.0]), *one_row(kernel, [-peak, 0.0])]
    for x in inputs[:2]:
        x.requires_grad_()
    loss = attention_kl(*inputs, scale_s=1.0, scale_t=1.0, direction=direction,
                        reduction=reduction, backend=kernel[0])  # fmt: skip
    loss.sum().backward()
    rounded = inputs[1].abs().max().item()
    assert loss.item() == pytest.approx(math.log(2) if direction == "js" else rounded)
    assert all(x.grad.isfinite().all() for x in inputs[:2])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_mass_where_the_other_side_has_exactly_none_is_infinite(kernel, reduction):
    nowhere, even = one_row(kernel, [-math.inf, 0.0]), one_row(kernel, [0.0, 0.0])
    options = {"scale_s": 1.0, "scale_t": 1.0, "reduction": reduction, "backend": kernel[0]}
    nowhere[0].requires_grad_()
    even[0].requires_grad_()
    with torch.no_grad():
        assert attention_kl(*nowhere, *even, **options).item() == math.inf
    assert attention_kl(*nowhere, *(x.detach() for x in even), **options).item() == math.inf
    student = [x.detach() for x in nowhere]
    reverse = attention_kl(*even, *student, direction="reverse", **options)
    assert reverse.item() == math.inf
    assert attention_kl(*even, *student, **options).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nan_in_an_input_gives_nan(kernel, direction, which, reduction, unless):
    unless(direction == "forward" or (which, reduction) == (1, "mean"))
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    inputs[which][0, 0, 2, 1] = math.nan
    for x in inputs[:2]:
        x.requires_grad_()
    loss = attention_kl(*inputs, direction=direction, reduction=reduction, backend=kernel[0])
    with torch.no_grad():
        evaluated = attention_kl(*inputs, direction=direction, backend=kernel[0])
    assert loss.isnan().any()
    assert evaluated.isnan()
    query, key = torch.autograd.grad(loss.sum(), inputs[:2])
    assert query[0, 0, 2].isnan().all() and key[0, 0].isnan().all()
    assert query[1].isfinite().all() and key[1].isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_what_padding_holds_reaches_nothing(kernel, direction, reduction, filling, unless):
    unless(math.isnan(filling) and (direction == "forward" or reduction == "mean"))
    clean, _ = moved(four(n=37), {}, kernel[1], precision(kernel))
    mask = MASK.to(kernel[1])
    results = []
    for value in (0.0, filling):
        inputs = [x.clone() for x in clean]
        for x in inputs:
            x.transpose(1, 2)[~mask] = value
        for x in inputs[:2]:
            x.requires_grad_()
        loss = attention_kl(*inputs, attention_mask=mask, direction=direction,
                            reduction=reduction, backend=kernel[0])  # fmt: skip
        loss.sum().backward()
        results.append([loss.detach(), *(x.grad for x in inputs[:2])])
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)
        assert mine.isfinite().all()
    for grad in results[0][1:]:
        assert torch.count_nonzero(grad.transpose(1, 2)[~mask]) == 0


def test_tokens_that_are_packed_nowhere_reach_nothing(kernel):
    inputs, options = moved(four(n=50), CASES["packed"][1], kernel[1], precision(kernel))
    results = []
    for value in (0.0, math.nan):
        leaves = [x.clone() for x in inputs]
        for x in leaves:
            x[45:] = value
        leaves[1].requires_grad_()
        loss = attention_kl(*leaves, **options, backend=kernel[0])
        results.append([loss, *torch.autograd.grad(loss, leaves[1])])
    for mine, its in zip(*results, strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("packed", [False, True])
def test_empty_batch_is_zero(kernel, reduction, packed):
    options = {"cu_seqlens": torch.tensor([0])} if packed else {"attention_mask": torch.ones(0, 17)}
    shape = (0, 2, 16) if packed else (0, 2, 17, 16)
    inputs = [torch.zeros(shape, dtype=precision(kernel), device=kernel[1]) for _ in range(4)]
    options = {k: v.to(kernel[1]) for k, v in options.items()}
    inputs[0].requires_grad_()
    loss = attention_kl(*inputs, **options, reduction=reduction, backend=kernel[0])
    loss.sum().backward()
    assert loss.sum() == 0
    assert inputs[0].grad.shape == inputs[0].shape


def test_batch_without_any_token_has_zero_loss_and_gradient(kernel):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    for x in inputs[:2]:
        x.requires_grad_()
    nothing = torch.zeros(2, 17, device=kernel[1])
    loss = attention_kl(*inputs, attention_mask=nothing, backend=kernel[0])
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(x.grad) == 0 for x in inputs[:2])


@pytest.mark.parametrize("layout", ["contiguous", "strided", "one head for all", "sliced"])
def test_strides_change_nothing(kernel, layout):
    plain, _ = moved(four(), {}, kernel[1], precision(kernel))
    variant = [
        {
            "contiguous": x.contiguous(),
            "strided": x.repeat_interleave(2, dim=-1)[..., ::2],
            "one head for all": x[:, :1].expand_as(x),
            "sliced": torch.cat([x, x], -2)[:, :, : x.shape[2]],
        }[layout].detach()
        for x in plain
    ]
    if layout == "one head for all":
        plain = [x.contiguous() for x in variant]
    for mine, its in zip(
        rows_and_gradients(by(kernel[0]), variant, torch.tensor(3.0)),
        rows_and_gradients(by(kernel[0]), plain, torch.tensor(3.0)),
        strict=True,
    ):
        same(mine, its, precision(kernel))


def test_gradients_lie_as_the_inputs_do(kernel):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    for x in inputs[:2]:
        x.requires_grad_()
    grads = torch.autograd.grad(attention_kl(*inputs, backend=kernel[0]), inputs[:2])
    assert [x.stride() for x in grads] == [x.stride() for x in inputs[:2]]


def test_graph_that_is_kept_gives_the_same_gradient_twice(kernel):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    inputs[0].requires_grad_()
    loss = attention_kl(*inputs, backend=kernel[0])
    (first,) = torch.autograd.grad(3 * loss, inputs[0], retain_graph=True)
    (second,) = torch.autograd.grad(loss, inputs[0])
    torch.testing.assert_close(first, 3 * second)


def test_gradients_made_in_forward_let_the_teacher_go(kernel):
    if kernel[0] != "cpp":
        pytest.skip("not every shape has its gradient made in forward")
    inputs = [x.cpu() for x in four()]
    for x in inputs[:2]:
        x.requires_grad_()
    saved = attention_kl(*([x] for x in inputs), backend="cpp").grad_fn.saved_tensors
    assert {x.data_ptr() for x in saved} == {x.data_ptr() for x in inputs[:2]}


def test_gradient_is_the_same_bit_for_bit_each_time(kernel):
    inputs, options = moved(four(n=37), CASES["padding"][1], kernel[1], precision(kernel))
    one, two = (
        rows_and_gradients(by(kernel[0]), inputs, torch.tensor(1.0), **options) for _ in range(2)
    )
    assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivative_raises_naming_the_operator(kernel, reduction):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    inputs[0].requires_grad_()
    loss = attention_kl(*inputs, reduction=reduction, backend=kernel[0]).sum()
    (grad,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_kl has first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_without_graph_breaks_and_with_dynamic_shapes_equals_eager(kernel, reduction):
    def loss(*inputs, attention_mask):
        return attention_kl(*inputs, attention_mask=attention_mask, reduction=reduction,
                            backend=kernel[0])  # fmt: skip

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (17, 29):
        inputs, _ = moved(four(n=n), {}, kernel[1], precision(kernel))
        for x in inputs[:2]:
            x.requires_grad_()
        mask = MASK[:, :n].to(kernel[1])
        results = []
        for function in (loss, compiled):
            value = function(*inputs, attention_mask=mask)
            results.append([value, *torch.autograd.grad(3 * value.sum(), inputs[:2])])
        for mine, its in zip(*results, strict=True):
            same(mine, its, precision(kernel))


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_by_inductor_equals_eager(kernel, reduction):
    if kernel == ("triton", "cpu"):
        pytest.skip("the interpreter runs Python, which a compiled graph cannot call")

    def loss(*inputs):
        return attention_kl(*inputs, reduction=reduction, backend=kernel[0]) * 2

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for n in (17, 29):
        inputs, _ = moved(four(n=n), {}, kernel[1], precision(kernel))
        for x in inputs[:2]:
            x.requires_grad_()
        results = []
        for function in (compiled, loss):
            value = function(*inputs)
            results.append([value, *torch.autograd.grad(3 * value.sum(), inputs[:2])])
        for mine, its in zip(*results, strict=True):
            same(mine, its, precision(kernel))


def test_autocast_changes_nothing(kernel):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    plain = rows_and_gradients(by(kernel[0]), inputs, torch.tensor(3.0))
    with torch.autocast(kernel[1], torch.bfloat16):
        cast = rows_and_gradients(by(kernel[0]), inputs, torch.tensor(3.0))
    assert all(map(torch.equal, plain, cast))


# What stands around the kernels in a training step


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed_loss_has_the_same_gradient(kernel, reduction):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    inputs[0].requires_grad_()

    def loss(query_s):
        return attention_kl(query_s, *inputs[1:], reduction=reduction, backend=kernel[0]).sum()

    (plain,) = torch.autograd.grad(loss(inputs[0]), inputs[0])
    again = checkpoint(loss, inputs[0], use_reentrant=False)
    (checkpointed,) = torch.autograd.grad(again, inputs[0])
    assert torch.equal(plain, checkpointed)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensors_may_come_back_with_other_strides(kernel, reduction):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    for x in inputs[:2]:
        x.requires_grad_()
    gradients = []
    for pack in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = attention_kl(*inputs, reduction=reduction, backend=kernel[0]).sum()
        gradients.append(torch.autograd.grad(3 * loss, inputs[:2]))
    for mine, its in zip(*gradients, strict=True):
        same(mine, its, precision(kernel))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masks_may_be_made_in_inference_mode(kernel, reduction):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    inputs[0].requires_grad_()
    with torch.inference_mode():
        mask = torch.ones(2, 17, dtype=torch.bool, device=kernel[1])
    loss = attention_kl(*inputs, attention_mask=mask, reduction=reduction, backend=kernel[0])
    loss.sum().backward()
    assert inputs[0].grad.isfinite().all()


def test_rows_may_be_changed_in_place(kernel):
    inputs, _ = moved(four(), {}, kernel[1], precision(kernel))
    inputs[0].requires_grad_()
    rows = attention_kl(*inputs, reduction="none", backend=kernel[0])
    (plain,) = torch.autograd.grad((2 * rows).sum(), inputs[0], retain_graph=True)
    rows *= 2
    rows.sum().backward()
    torch.testing.assert_close(inputs[0].grad, plain)


def test_cu_seqlens_may_have_strides(kernel):
    inputs, options = moved(four(n=50), CASES["packed"][1], kernel[1], precision(kernel))
    dense = options["cu_seqlens"]
    losses = [
        attention_kl(*inputs, cu_seqlens=x, backend=kernel[0])
        for x in (dense, dense.repeat_interleave(2)[::2])
    ]
    assert torch.equal(*losses)


@pytest.mark.parametrize("case", [*SHORT, "window", "packed, causal, grouped", "an empty batch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_threads_that_share_few_heads_change_nothing(kernel, case, reduction):
    """With fewer heads than threads, a head's rows are divided and its keys' gradients summed."""
    if kernel[0] != "cpp":
        pytest.skip("threads are those of the CPU")
    shapes, options = CASES.get(case, ({"b": 0}, {}))
    inputs, options = moved(four(**{"n": 150, **shapes}), options, "cpu", torch.float32)
    rows = attention_kl(*inputs, **options, reduction="none", backend="cpp")
    upstream = torch.ones_like(rows) if reduction == "none" else torch.tensor(1.0)
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(
            rows_and_gradients(by("cpp"), inputs, upstream, **options, reduction=reduction)
        )
    torch.set_num_threads(1)
    for mine, its in zip(*results, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-6)


CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("direction", ["forward", "js"])
def test_operators_of_attention_kl_pass_opcheck(kernel, direction):
    inputs, _ = moved(four(h=4, h_kv=2, n=19), {}, kernel[1], precision(kernel))
    mask = MASK[:, :19].to(kernel[1])
    attention_kl(*inputs, direction=direction, backend=kernel[0])  # or it is refused
    inputs = ([inputs[0]], [inputs[1]], [inputs[2]], [inputs[3]], mask, mask, None, [0.25], [0.25],
              False, None, False, direction)  # fmt: skip
    registered = {
        name: getattr(torch.ops.kdfast, f"attention_kl_{name}_{kernel[0]}").default
        for name in ("forward", "backward", *(["fused"] if kernel[0] != "cuda" else []))
    }
    statistics = registered["forward"](*inputs)
    calls = {
        "forward": inputs,
        "backward": (torch.ones_like(statistics[0]), *statistics, *inputs, True),
        "fused": (*inputs, "mean", True),
    }
    for name, operator in registered.items():
        torch.library.opcheck(operator, calls[name], test_utils=CHECKS)


# attention_map_kl


def two_maps(shape, inputs, kernel, dtype, near=False):
    both = [torch.randn(shape) for _ in range(2)]
    if near:
        both[1] = both[0] + 1e-2 * both[1]
    if inputs == "probabilities":
        both = [x.softmax(-1) for x in both]
    return [x.to(kernel[1], dtype) for x in both]


def eager_map(map_s, map_t, *, inputs, direction, attention_mask=None):
    if inputs == "scores":
        if attention_mask is not None:
            hidden = ~attention_mask[:, None, None]
            map_s, map_t = (x.masked_fill(hidden, -3e4) for x in (map_s, map_t))
        log_s, log_t = map_s.log_softmax(-1), map_t.log_softmax(-1)
    else:
        log_s, log_t = map_s.log(), map_t.log()

    def kl(log_p, log_q):
        terms = log_p.exp() * (log_p - log_q)
        if attention_mask is not None:
            terms = terms.masked_fill(~attention_mask[:, None, None], 0.0)
        return terms.sum(-1)

    if direction == "js":
        middle = torch.logaddexp(log_s, log_t) - math.log(2)
        rows = (kl(log_t, middle) + kl(log_s, middle)) / 2
    else:
        rows = kl(log_t, log_s) if direction == "forward" else kl(log_s, log_t)
    if attention_mask is not None and map_s.shape[-1] == map_s.shape[-2]:
        rows = rows.masked_fill(~attention_mask[:, None], 0.0)
    return rows


def map_rows_and_gradient(function, both, upstream, **options):
    map_s = both[0].detach().requires_grad_()
    rows = function(map_s, both[1], **options)
    rows.backward(upstream.to(rows))
    return [rows.detach().double().cpu(), map_s.grad.double().cpu()]


SHAPES = [(2, 3, 1, 1), (2, 2, 3, 3), (2, 2, 17, 37), (2, 2, 37, 37), (2, 1, 5, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_map_rows_and_their_gradient_err_at_most_twice_as_far_as_eager(
    kernel, shape, inputs, direction, dtype, padded, unless
):
    unless(dtype == torch.float32 or (direction == "forward" and not padded))
    both = two_maps(shape, inputs, kernel, dtype)
    options = {"inputs": inputs, "direction": direction}
    if padded:
        mask = torch.rand(2, shape[-1]) < 0.7
        mask[0, 0] = True
        options["attention_mask"] = mask.to(kernel[1])
    upstream = torch.rand(shape[:-1]) + 0.5
    exact, ours, theirs = (
        map_rows_and_gradient(function, x, upstream, **options)
        for function, x in (
            (by("reference", attention_map_kl, reduction="none"), in_double(both)),
            (by(kernel[0], attention_map_kl, reduction="none"), both),
            (eager_map, both),
        )
    )
    for name, truth, mine, its in zip(("loss", "gradient"), exact, ours, theirs, strict=True):
        assert mine.isfinite().all(), name
        floor = 4 * torch.finfo(dtype).eps * truth.abs().max() + least(dtype)
        assert (mine - truth).abs().max() <= 2 * (its - truth).abs().max() + floor, name


@pytest.mark.parametrize(
    "shape", [(5, 7), (3, 5, 7), (2, 1, 2, 5, 7), (2, 3, 5, 2500), (1, 1, 2, 20000)], ids=str
)
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_maps_of_any_rank_and_length_equal_the_reference(kernel, shape, inputs, reduction):
    both = two_maps(shape, inputs, kernel, torch.float32)
    options = {"inputs": inputs, "reduction": reduction}
    upstream = torch.tensor(2.0)
    results = []
    for backend, x in (("reference", in_double(both)), (kernel[0], both)):
        map_s = x[0].requires_grad_()
        loss = attention_map_kl(map_s, x[1], **options, backend=backend)
        (grad,) = torch.autograd.grad((loss * upstream).sum(), map_s)
        results.append([loss.detach().double(), grad.double()])
    for truth, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_near_equal_maps_err_at_most_twice_as_far_as_eager(kernel, inputs, direction):
    both = two_maps((2, 4, 33, 33), inputs, kernel, torch.float32, near=True)
    options = {"inputs": inputs, "direction": direction}
    exact, ours, theirs = (
        map_rows_and_gradient(function, x, torch.ones(2, 4, 33), **options)
        for function, x in (
            (by("reference", attention_map_kl, reduction="none"), in_double(both)),
            (by(kernel[0], attention_map_kl, reduction="none"), both),
            (eager_map, both),
        )
    )
    for truth, mine, its in zip(exact, ours, theirs, strict=True):
        error, bound = ((x - truth).square().mean().sqrt() for x in (mine, its))
        assert error <= 2 * bound + 1e-7 * truth.abs().max()


def edge_maps():
    """Rows of probabilities with exact zeros on either side, or on both."""
    rows = [
        ([0.0, 1.0, 0.0], [0.5, 0.5, 0.0]),
        ([0.5, 0.5, 0.0], [0.0, 1.0, 0.0]),
        ([0.25, 0.75, 0.0], [0.5, 0.5, 0.0]),
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]),
        ([math.nan, 0.5, 0.5], [0.0, 0.5, 0.5]),
    ]
    return [torch.tensor([row[side] for row in rows])[None, None] for side in (0, 1)]


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_zeros_infinities_and_nan_are_where_the_reference_has_them(kernel, inputs, direction):
    both = edge_maps()
    if inputs == "scores":
        both = [x.log() for x in both]
    results = []
    for backend, device in (("reference", "cpu"), kernel):
        leaves = [x.to(device).requires_grad_() for x in both]
        rows = attention_map_kl(*leaves, inputs=inputs, direction=direction, reduction="none",
                                teacher_grad=True, backend=backend)  # fmt: skip
        rows.sum().backward()
        results.append([x.detach().cpu() for x in (rows, leaves[0].grad, leaves[1].grad)])
    for truth, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, truth, equal_nan=True, rtol=1e-5, atol=1e-6)


def test_js_is_finite_where_half_of_a_probability_is_zero(kernel):
    least = 1.4e-45
    both = [torch.tensor([[1.0, least, 0.0]]), torch.tensor([[1.0, 0.0, least]])]
    both = [x.to(kernel[1]).requires_grad_() for x in both]
    rows = attention_map_kl(*both, inputs="probabilities", direction="js", reduction="none",
                            teacher_grad=True, backend=kernel[0])  # fmt: skip
    gradients = torch.autograd.grad(rows.sum(), both)
    assert rows.abs().max() < 1e-6 and all(x.isfinite().all() for x in gradients)


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_maps_of_student_equal_to_teacher_have_exactly_no_loss(kernel, inputs, direction):
    map_s, _ = two_maps((2, 2, 37, 37), inputs, kernel, torch.float32)
    loss, grad = map_rows_and_gradient(
        by(kernel[0], attention_map_kl, reduction="none"), [map_s, map_s.clone()],
        torch.ones(2, 2, 37), inputs=inputs, direction=direction,
    )  # fmt: skip
    assert torch.count_nonzero(loss) == 0
    if inputs == "scores" or direction == "js":
        assert torch.count_nonzero(grad) == 0


def test_map_strides_change_nothing(kernel):
    both = two_maps((2, 3, 16, 16), "scores", kernel, torch.float32)
    options = {"inputs": "scores", "reduction": "none"}
    upstream = torch.ones(2, 3, 16)
    plain = map_rows_and_gradient(by(kernel[0], attention_map_kl), both, upstream, **options)
    for variant in (
        [x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in both],
        [torch.cat([x, x], -1)[..., 1:17] for x in both],
    ):
        expected = plain
        if variant[0].shape == both[0].shape and not torch.equal(variant[0], both[0]):
            expected = map_rows_and_gradient(
                by(kernel[0], attention_map_kl), [x.contiguous() for x in variant], upstream,
                **options,
            )  # fmt: skip
        ours = map_rows_and_gradient(by(kernel[0], attention_map_kl), variant, upstream, **options)
        for mine, its in zip(ours, expected, strict=True):
            same(mine, its)


def test_map_of_an_empty_batch_is_zero(kernel):
    empty = torch.zeros(0, 2, 3, 3, device=kernel[1], requires_grad=True)
    loss = attention_map_kl(empty, empty.detach(), backend=kernel[0])
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
def test_map_compiled_without_graph_breaks_equals_eager(kernel, inputs):
    def loss(map_s, map_t):
        return attention_map_kl(map_s, map_t, inputs=inputs, backend=kernel[0])

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (16, 19):
        map_s, map_t = two_maps((2, 2, n, n), inputs, kernel, torch.float32)
        map_s.requires_grad_()
        grads = [torch.autograd.grad(f(map_s, map_t), map_s)[0] for f in (compiled, loss)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("scores", [False, True])
def test_operators_of_attention_map_kl_pass_opcheck(kernel, scores):
    kind = "scores" if scores else "probabilities"
    both = two_maps((2, 2, 19, 19), kind, kernel, torch.float32)
    inputs = (*both, MASK[:, :19].to(kernel[1]), scores, "forward")
    forward, backward = (
        getattr(torch.ops.kdfast, f"attention_map_kl_{name}_{kernel[0]}").default
        for name in ("forward", "backward")
    )
    statistics = forward(*inputs)
    torch.library.opcheck(forward, inputs, test_utils=CHECKS)
    arguments = (torch.ones_like(statistics[0]), *statistics, *inputs)
    torch.library.opcheck(backward, arguments, test_utils=CHECKS)
