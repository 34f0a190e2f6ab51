import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdfast.ops import attention_kl

pytestmark = pytest.mark.usefixtures("backend_on_cpu")

DIRECTIONS = ("forward", "reverse", "js")


def four(b=2, h=2, n=5, d=4, *, nk=None, h_kv=None, h_t=None, h_kv_t=None, d_t=None, **options):
    """Random query_s, key_s, query_t, key_t; float64 unless dtype says otherwise."""
    options = {"dtype": torch.float64, **options}
    nk, h_t, d_t = nk or n, h_t or h, d_t or d
    shapes = ((b, h, n, d), (b, h_kv or h, nk, d), (b, h_t, n, d_t), (b, h_kv_t or h_t, nk, d_t))
    return [torch.randn(shape, **options) for shape in shapes]


def divergence_by_hand(p_s, p_t, direction):
    def kl(p, q):
        return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)

    if direction == "forward":
        return kl(p_t, p_s)
    if direction == "reverse":
        return kl(p_s, p_t)
    middle = [(a + b) / 2 for a, b in zip(p_s, p_t, strict=True)]
    return (kl(p_t, middle) + kl(p_s, middle)) / 2


def maps_by_hand(query, key, keys_of, scale, temperature, relation_heads):
    """maps[b][h][i] is a list of (key, probability)."""
    query, key = (x.detach().double().numpy() for x in (query, key))
    b, h, n, d = query.shape
    key = np.stack([key[:, head // (h // key.shape[1])] for head in range(h)], axis=1)
    if relation_heads:
        width = h * d // relation_heads

        def regroup(x):
            wide = np.concatenate([x[:, head] for head in range(h)], axis=-1)
            parts = [wide[..., r * width : (r + 1) * width] for r in range(relation_heads)]
            return np.stack(parts, axis=1)

        query, key, h, d = regroup(query), regroup(key), relation_heads, width
    factor = (1 / math.sqrt(d) if scale is None else scale) / temperature
    maps = np.zeros((b, h, n, key.shape[2]))
    for batch, head, i in itertools.product(range(b), range(h), range(n)):
        kept = keys_of(batch, i)
        scores = [factor * float(query[batch, head, i] @ key[batch, head, j]) for j in kept]
        weights = [math.exp(s - max(scores)) for s in scores]
        for j, weight in zip(kept, weights, strict=True):
            maps[batch, head, i, j] = weight / sum(weights)
    return maps


def by_hand(
    query_s,
    key_s,
    query_t,
    key_t,
    *,
    attention_mask=None,
    query_mask=None,
    causal=False,
    window=None,
    scale_s=None,
    scale_t=None,
    temperature=1.0,
    direction="forward",
    reduction="mean",
    relation_heads=None,
    match_heads=None,
):
    b, _, n, _ = query_s.shape
    nk = key_s.shape[2]

    def keys_of(batch, i):
        position = i + nk - n
        return [
            j
            for j in range(nk)
            if (attention_mask is None or attention_mask[batch, j])
            and (not causal or j <= position)
            and (window is None or abs(position - j) <= window)
        ]

    if query_mask is None and n == nk:
        query_mask = attention_mask
    maps_s = maps_by_hand(query_s, key_s, keys_of, scale_s, temperature, relation_heads)
    maps_t = maps_by_hand(query_t, key_t, keys_of, scale_t, temperature, relation_heads)
    if match_heads == "mean":
        maps_t = np.broadcast_to(maps_t.mean(axis=1, keepdims=True), maps_s.shape)
    rows = np.zeros(maps_s.shape[:-1])
    count = 0
    for batch, head, i in itertools.product(*map(range, rows.shape)):
        kept = keys_of(batch, i)
        if kept and (query_mask is None or query_mask[batch, i]):
            count += 1
            p_s, p_t = maps_s[batch, head, i, kept], maps_t[batch, head, i, kept]
            rows[batch, head, i] = divergence_by_hand(p_s, p_t, direction)
    if reduction == "none":
        return torch.from_numpy(rows)
    return torch.tensor(rows.sum() / (max(count, 1) if reduction == "mean" else 1))


MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 0]])
CASES = {
    "plain": ({}, {}),
    "widths differ": ({"d_t": 7}, {}),
    "fewer queries than keys": ({"n": 3, "nk": 5}, {}),
    "grouped heads": ({"h": 4, "h_kv": 2, "h_kv_t": 1}, {}),
    "padding": ({}, {"attention_mask": MASK}),
    "padding with Nq != Nk": ({"n": 3, "nk": 5}, {"attention_mask": MASK}),
    "query mask": ({}, {"attention_mask": MASK, "query_mask": MASK.flip(0)}),
    "query mask alone": ({}, {"query_mask": MASK}),
    "causal": ({}, {"causal": True}),
    "causal, fewer queries": ({"n": 2, "nk": 5}, {"causal": True}),
    "causal, more queries": ({"n": 5, "nk": 3}, {"causal": True}),
    "window": ({}, {"window": 1}),
    "window of the diagonal": ({}, {"window": 0}),
    "window with Nq != Nk": ({"n": 3, "nk": 6}, {"window": 2}),
    "causal window with padding": ({}, {"causal": True, "window": 2, "attention_mask": MASK}),
    "scales": ({}, {"scale_s": 0.3, "scale_t": 1.7}),
    "temperature": ({}, {"temperature": 2.5}),
    "relation heads": ({"h": 4, "h_t": 3, "d_t": 8}, {"relation_heads": 8}),
    "relation heads, grouped": ({"h": 4, "h_kv": 2, "h_t": 2}, {"relation_heads": 2}),
    "mean of teacher heads": ({"h": 2, "h_t": 3}, {"match_heads": "mean"}),
    "mean of teacher heads with padding": (
        {"h": 2, "h_t": 4, "h_kv_t": 2},
        {"match_heads": "mean", "attention_mask": MASK, "causal": True},
    ),
}
cases = pytest.mark.parametrize(("shapes", "options"), CASES.values(), ids=CASES.keys())
directions = pytest.mark.parametrize("direction", DIRECTIONS)


@cases
@directions
def test_rows_equal_the_formula(shapes, options, direction):
    inputs = four(**shapes)
    rows = attention_kl(*inputs, **options, direction=direction, reduction="none")
    expected = by_hand(*inputs, **options, direction=direction, reduction="none")
    torch.testing.assert_close(rows, expected)


@cases
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_equal_the_formula(shapes, options, reduction):
    inputs = four(**shapes)
    loss = attention_kl(*inputs, **options, reduction=reduction)
    torch.testing.assert_close(loss, by_hand(*inputs, **options, reduction=reduction))


@cases
@directions
def test_gradients_of_student_and_teacher_pass_gradcheck(shapes, options, direction):
    inputs = four(**{"b": 2, **shapes}, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: attention_kl(*x, **options, direction=direction, teacher_grad=True),
        inputs,
        fast_mode=True,
    )


@directions
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_row_gradients_pass_gradcheck(direction, reduction):
    inputs = four(n=3, d=2, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: attention_kl(
            *x,
            attention_mask=MASK[:, :3],
            direction=direction,
            reduction=reduction,
            teacher_grad=True,
        ),
        inputs,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 2])
@pytest.mark.parametrize("masked", ["nothing", "keys", "queries", "both"])
@pytest.mark.parametrize("heads", ["equal", "grouped", "relation", "mean"])
@pytest.mark.parametrize(("n", "nk"), [(5, 5), (3, 5), (5, 3), (1, 5), (5, 1)])
def test_every_combination_equals_the_formula_and_passes_gradcheck(
    causal, window, masked, heads, n, nk
):
    shapes = {
        "equal": {},
        "grouped": {"h": 4, "h_kv": 2},
        "relation": {"h": 2, "h_t": 3},
        "mean": {"h": 2, "h_t": 3},
    }[heads]
    options = {
        "causal": causal,
        "window": window,
        "attention_mask": MASK[:, :nk] if masked in ("keys", "both") else None,
        "query_mask": MASK.flip(1)[:, :n] if masked in ("queries", "both") else None,
        "relation_heads": 4 if heads == "relation" else None,
        "match_heads": "mean" if heads == "mean" else None,
        "temperature": 1.5,
    }
    inputs = four(n=n, nk=nk, **shapes, requires_grad=True)
    for direction in DIRECTIONS:
        both = {**options, "direction": direction}
        torch.testing.assert_close(
            attention_kl(*inputs, **both, teacher_grad=True).detach(), by_hand(*inputs, **both)
        )
        assert torch.autograd.gradcheck(
            lambda *x, both=both: attention_kl(*x, **both, teacher_grad=True),
            inputs,
            fast_mode=True,
        )


# Sequences of layer pairs


def test_sequences_give_the_vector_of_the_pairs_losses():
    pairs = [four(h=2, d=4), four(h=3, d=6, d_t=2)]
    losses = attention_kl(*map(list, zip(*pairs, strict=True)), attention_mask=MASK)
    expected = [attention_kl(*pair, attention_mask=MASK) for pair in pairs]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_sequences_unreduced_give_a_list_of_rows():
    pairs = [four(h=2), four(h=3)]
    rows = attention_kl(*zip(*pairs, strict=True), reduction="none")
    assert [x.shape for x in rows] == [(2, 2, 5), (2, 3, 5)]


def test_sequences_take_one_scale_per_pair():
    pairs = [four(), four()]
    losses = attention_kl(*zip(*pairs, strict=True), scale_s=[0.5, 2.0], scale_t=0.25)
    expected = [
        attention_kl(*pair, scale_s=scale, scale_t=0.25)
        for pair, scale in zip(pairs, (0.5, 2.0), strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_each_pair_of_a_sequence_gets_its_own_gradient():
    pairs = [four(), four()]
    queries = [pair[0].requires_grad_() for pair in pairs]
    losses = attention_kl(*zip(*pairs, strict=True))
    (losses * torch.tensor([1.0, 3.0])).sum().backward()
    for pair, query, factor in zip(pairs, queries, (1.0, 3.0), strict=True):
        (grad,) = torch.autograd.grad(attention_kl(*pair), query)
        torch.testing.assert_close(query.grad, factor * grad)


# Packed sequences


@directions
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 1}], ids=str)
def test_packed_rows_equal_those_of_the_separate_sequences(direction, options):
    lengths = [3, 1, 5]
    separate = [four(b=1, h=4, h_kv=2, h_kv_t=1, n=n, d_t=6) for n in lengths]
    packed = [
        torch.cat([x[0].transpose(0, 1) for x in side]) for side in zip(*separate, strict=True)
    ]
    cu_seqlens = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    options = {**options, "direction": direction, "reduction": "none"}
    rows = attention_kl(*packed, cu_seqlens=cu_seqlens, **options)
    expected = torch.cat([attention_kl(*inputs, **options)[0] for inputs in separate], dim=-1)
    assert rows.shape == (4, 9)
    torch.testing.assert_close(rows, expected)


def test_packed_mean_equals_the_padded_mean():
    padded = four(b=2, n=5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    packed = [x.transpose(1, 2)[mask] for x in padded]
    loss = attention_kl(*packed, cu_seqlens=torch.tensor([0, 5, 8]))
    torch.testing.assert_close(loss, attention_kl(*padded, attention_mask=mask))


def test_packed_tokens_after_the_last_boundary_are_padding():
    packed = [x[0].transpose(0, 1).clone() for x in four(b=1, n=6)]
    loss = attention_kl(*(x[:4] for x in packed), cu_seqlens=torch.tensor([0, 4]))
    for x in packed:
        x[4:] = math.nan
    packed[0].requires_grad_()
    padded = attention_kl(*packed, cu_seqlens=torch.tensor([0, 4]))
    padded.backward()
    torch.testing.assert_close(padded, loss)
    assert packed[0].grad.isfinite().all()


def test_packed_query_mask_selects_rows():
    packed = [x[0].transpose(0, 1) for x in four(b=1, n=5)]
    cu_seqlens, chosen = torch.tensor([0, 2, 5]), torch.tensor([1, 0, 0, 1, 1])
    rows = attention_kl(*packed, cu_seqlens=cu_seqlens, reduction="none")
    loss = attention_kl(*packed, cu_seqlens=cu_seqlens, query_mask=chosen)
    torch.testing.assert_close(loss, rows[:, chosen.bool()].mean())


def test_packed_batch_of_no_sequences_is_zero():
    empty = [torch.zeros(0, 2, 4) for _ in range(4)]
    assert attention_kl(*empty, cu_seqlens=torch.tensor([0])) == 0


@directions
def test_packed_gradients_pass_gradcheck(direction):
    packed = [x[0].transpose(0, 1).clone().requires_grad_() for x in four(b=1, n=5)]
    assert torch.autograd.gradcheck(
        lambda *x: attention_kl(
            *x, cu_seqlens=torch.tensor([0, 2, 4]), direction=direction, teacher_grad=True
        ),
        packed,
    )


# Against torch, and against eager arithmetic in the same dtype


def eager(query_s, key_s, query_t, key_t, direction="forward"):
    """What one would write: the mean over rows, all in the dtype of the inputs."""
    log_s, log_t = (
        (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).log_softmax(-1)
        for query, key in ((query_s, key_s), (query_t, key_t))
    )

    def kl(log_p, log_q):
        return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()

    if direction == "forward":
        return kl(log_t, log_s)
    if direction == "reverse":
        return kl(log_s, log_t)
    log_middle = torch.logaddexp(log_s, log_t) - math.log(2)
    return (kl(log_t, log_middle) + kl(log_s, log_middle)) / 2


def loss_and_gradients(function, inputs, **options):
    query_s, key_s = (x.detach().clone().requires_grad_() for x in inputs[:2])
    loss = function(query_s, key_s, *inputs[2:], **options)
    loss.backward(torch.tensor(3.0, dtype=loss.dtype))
    return [x.detach().double() for x in (loss, query_s.grad, key_s.grad)]


def test_loss_and_gradients_equal_softmax_and_kl_div_of_torch():
    inputs = four(b=2, h=3, n=17, d=8, d_t=16)
    for ours, theirs in zip(
        loss_and_gradients(attention_kl, inputs), loss_and_gradients(eager, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


@directions
@pytest.mark.parametrize("n", [1, 3, 17, 127, 129])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
def test_error_is_at_most_twice_that_of_eager_in_the_same_dtype(n, dtype, direction):
    inputs = four(b=1, h=2, n=n, d=16, dtype=dtype)
    exact = loss_and_gradients(eager, [x.double() for x in inputs], direction=direction)
    ours, theirs = (
        loss_and_gradients(f, inputs, direction=direction) for f in (attention_kl, eager)
    )
    for truth, mine, its in zip(exact, ours, theirs, strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max() + 1e-7
        assert (mine - truth).abs().max() <= 2 * (its - truth).abs().max() + floor


def near_equal(n, dtype, offset):
    query_s, _, query_t, key_t = four(b=1, h=2, n=n, d=16, dtype=torch.float32)
    key_t = key_t + offset * torch.randn(1, 2, 1, 16)  # shifts a row's scores, not its softmax
    return [x.to(dtype) for x in (query_t + 1e-2 * query_s, key_t, query_t, key_t)]


def errors_and_bounds(function, n, dtype, offset, direction):
    """Against float32 arithmetic: a loss may lose nothing to half inputs, a gradient its dtype.

    Root mean squares over draws: the error of a single sum is luck.
    """
    errors, bounds = [], []
    for seed in range(32 if n < 100 else 8):
        torch.manual_seed(seed)
        inputs = near_equal(n, dtype, offset)
        exact = loss_and_gradients(eager, [x.double() for x in inputs], direction=direction)
        theirs = loss_and_gradients(eager, [x.float() for x in inputs], direction=direction)
        ours = loss_and_gradients(function, inputs, direction=direction)
        errors.append([(x - y).abs().max() for x, y in zip(ours, exact, strict=True)])
        bounds.append([(x - y).abs().max() for x, y in zip(theirs, exact, strict=True)])
    errors, bounds = (torch.tensor(x).square().mean(0).sqrt() for x in (errors, bounds))
    info = torch.finfo(dtype)
    of_gradients = (info.eps, info.smallest_normal * info.eps)  # the latter is its last digit
    floors = [(16 * torch.finfo(torch.float32).eps, 0.0), of_gradients, of_gradients]
    for error, its, truth, (relative, least) in zip(errors, bounds, exact, floors, strict=True):
        yield error, 2 * its + relative * truth.abs().max() + least


@directions
@pytest.mark.parametrize("n", [3, 17, 127, 129])
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("offset", [0, 20])
def test_error_on_near_equal_maps_is_at_most_twice_that_of_float32_eager(
    n, dtype, direction, offset
):
    for error, bound in errors_and_bounds(attention_kl, n, dtype, offset, direction):
        assert error <= bound


def unshifted(query_s, key_s, query_t, key_t, direction):
    scores_s, scores_t = (
        q.float() @ k.float().mT / 4 for q, k in ((query_s, key_s), (query_t, key_t))
    )
    sums = (scores_t.softmax(-1) * (scores_t - scores_s)).sum(-1)
    return (sums - scores_t.logsumexp(-1) + scores_s.logsumexp(-1)).mean()


def nothing(query_s, key_s, query_t, key_t, direction):
    return 0 * (query_s.float().sum() + key_s.float().sum())


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("wrong", [unshifted, nothing])
def test_bound_on_near_equal_maps_tells_a_wrong_loss(wrong, dtype):
    # An offset whose rounding shows on every machine: with one of 20 the errors of both, of the
    # size of float32's last digits, are told apart on some only.
    error, bound = next(errors_and_bounds(wrong, 129, dtype, 100, "forward"))
    assert error > bound


def test_odd_sizes_equal_the_formula_in_float32():
    for n, nk in [(1, 1), (3, 17), (17, 3), (17, 17)]:
        inputs = four(b=1, h=1, n=n, nk=nk, dtype=torch.float32)
        loss = attention_kl(*inputs, causal=nk >= n)
        expected = by_hand(*inputs, causal=nk >= n)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


# Numerical edges


@directions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_student_equal_to_teacher_has_zero_loss_and_gradient(direction, dtype):
    query, key = four(n=33, nk=33, d=16, dtype=dtype)[:2]
    inputs = [x.clone().requires_grad_() for x in (query, key, query, key)]
    mask = torch.ones(2, 33)
    mask[1, 20:] = 0
    loss = attention_kl(
        *inputs, attention_mask=mask, direction=direction, reduction="sum", teacher_grad=True
    )
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(x.grad) == 0 for x in inputs)


@directions
def test_fully_masked_sample_has_zero_loss_and_gradient(direction):
    inputs = four(requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
    rows = attention_kl(
        *inputs, attention_mask=mask, direction=direction, reduction="none", teacher_grad=True
    )
    rows.sum().backward()
    assert torch.count_nonzero(rows[1]) == 0
    for x in inputs:
        assert torch.count_nonzero(x.grad[1]) == 0
        assert x.grad.isfinite().all()


def test_batch_without_any_token_has_zero_mean():
    inputs = four(requires_grad=True)
    loss = attention_kl(*inputs, attention_mask=torch.zeros(2, 5), teacher_grad=True)
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(x.grad) == 0 for x in inputs)


def test_rows_that_see_no_key_leave_the_mean():
    inputs = four(n=5, nk=3)
    rows = attention_kl(*inputs, causal=True, reduction="none")
    assert torch.count_nonzero(rows[..., :2]) == 0
    torch.testing.assert_close(attention_kl(*inputs, causal=True), rows[..., 2:].mean())


@directions
def test_one_valid_key_has_zero_loss_and_gradient(direction):
    inputs = four(requires_grad=True)
    mask = torch.tensor([[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]])
    loss = attention_kl(
        *inputs,
        attention_mask=mask,
        query_mask=torch.ones(2, 5),
        direction=direction,
        teacher_grad=True,
    )
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(x.grad) == 0 for x in inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_is_zero(reduction):
    inputs = four(b=0)
    inputs[0].requires_grad_()
    loss = attention_kl(*inputs, attention_mask=torch.ones(0, 5), reduction=reduction)
    loss.sum().backward()
    assert loss.shape == ((0, 2, 5) if reduction == "none" else ())
    assert loss.sum() == 0
    assert inputs[0].grad.shape == inputs[0].shape


def one_row(scores):
    """query and key [1, 1, ., 1] whose scores at scale 1 are the given ones."""
    return torch.ones(1, 1, 1, 1), torch.tensor(scores).view(1, 1, -1, 1)


@pytest.mark.parametrize("peak", [1e4, -1e4])
@pytest.mark.parametrize(("direction", "expected"), [("forward", 1e4), ("reverse", 1e4)])
def test_saturated_softmax_is_finite_and_right(peak, direction, expected):
    query_s, key_s = one_row([peak, 0.0])
    query_t, key_t = one_row([-peak, 0.0])
    query_s.requires_grad_()
    loss = attention_kl(
        query_s, key_s, query_t, key_t, scale_s=1.0, scale_t=1.0, direction=direction
    )
    loss.backward()
    assert loss == expected
    assert query_s.grad.isfinite().all()


@pytest.mark.parametrize("peak", [1e4, -1e4])
def test_saturated_js_is_log_two(peak):
    query_s, key_s = one_row([peak, 0.0])
    query_t, key_t = one_row([-peak, 0.0])
    query_s.requires_grad_()
    loss = attention_kl(query_s, key_s, query_t, key_t, scale_s=1.0, scale_t=1.0, direction="js")
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(math.log(2)))
    assert query_s.grad.isfinite().all()


def test_loss_is_infinite_where_the_student_has_exactly_none_of_the_teachers_mass():
    query_s, key_s = one_row([-math.inf, 0.0])
    query_t, key_t = one_row([0.0, 0.0])
    query_s.requires_grad_()
    options = {"scale_s": 1.0, "scale_t": 1.0}
    assert attention_kl(query_s, key_s, query_t, key_t, **options) == math.inf
    assert attention_kl(query_s, key_s, query_t, key_t, direction="reverse", **options) > 0
    assert attention_kl(query_s, key_s, query_s.detach(), key_s, **options) == 0


@directions
@pytest.mark.parametrize("which", range(4))
def test_nan_in_an_input_gives_nan(direction, which):
    inputs = four()
    inputs[which][0, 0, 2, 1] = math.nan
    assert attention_kl(*inputs, direction=direction).isnan()


@directions
def test_what_padding_holds_reaches_neither_loss_nor_gradient(direction):
    clean = four()
    dirty = [x.clone() for x in clean]
    for x in dirty:
        x.transpose(1, 2)[MASK == 0] = math.nan
    results = []
    for inputs in (clean, dirty):
        for x in inputs[:2]:
            x.requires_grad_()
        loss = attention_kl(*inputs, attention_mask=MASK, direction=direction)
        loss.backward()
        results.append([loss, inputs[0].grad, inputs[1].grad])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@directions
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"window": 0},
        {"causal": True, "window": 2, "attention_mask": torch.ones(1, 5)},
        {"cu_seqlens": torch.tensor([0, 4, 5])},
        {"cu_seqlens": torch.tensor([0, 2, 5]), "causal": True},
    ],
    ids=str,
)
def test_what_only_excluded_queries_see_reaches_neither_loss_nor_gradient(direction, options):
    clean = four(b=1)
    chosen = torch.tensor([[1, 1, 1, 1, 0]])
    if "cu_seqlens" in options:
        clean, chosen = [x[0].transpose(0, 1) for x in clean], chosen[0]
    results = []
    for filling in (0.0, math.nan):
        inputs = [x.clone() for x in clean]
        for x in inputs:
            x[(4,) if x.dim() == 3 else (..., 4, slice(None))] = filling
            x.requires_grad_()
        loss = attention_kl(
            *inputs, **options, query_mask=chosen, direction=direction, teacher_grad=True
        )
        loss.backward()
        results.append([loss, *(x.grad for x in inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@directions
def test_nan_in_a_key_reaches_only_the_rows_that_see_it(direction):
    inputs = four()
    for x in inputs[1::2]:
        x[..., 3, :] = math.nan
    rows = attention_kl(*inputs, causal=True, direction=direction, reduction="none")
    assert rows[..., :3].isfinite().all()
    assert rows[..., 3:].isnan().all()


def test_padded_batch_equals_the_trimmed_sequence():
    inputs = four(b=1, n=5)
    mask = torch.tensor([[True, True, True, False, False]])
    trimmed = attention_kl(*(x[:, :, :3] for x in inputs))
    torch.testing.assert_close(attention_kl(*inputs, attention_mask=mask), trimmed)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32], ids=str)
def test_mask_may_be_bool_integer_or_float(dtype):
    inputs = four()
    loss = attention_kl(*inputs, attention_mask=MASK.to(dtype), query_mask=MASK.to(dtype))
    assert torch.equal(loss, attention_kl(*inputs, attention_mask=MASK.bool()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16, torch.float32], ids=str)
def test_mask_whose_values_are_not_looked_at_is_never_inverted(dtype):
    added = torch.where(MASK == 1, 0, -10000).to(dtype)
    inputs = four()

    def loss(*inputs, mask):  # a compiled graph waits for no value, as on any device but the CPU
        return attention_kl(*inputs, attention_mask=mask)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert compiled(*inputs, mask=added) == 0
    torch.testing.assert_close(
        compiled(*inputs, mask=MASK.to(dtype)), attention_kl(*inputs, attention_mask=MASK)
    )


def test_compiled_without_any_mask_equals_eager():
    inputs = four()
    compiled = torch.compile(attention_kl, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), attention_kl(*inputs))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_mask_on_the_meta_device_may_be_bool_integer_or_float(dtype):
    inputs = [x.to("meta") for x in four()]
    mask = torch.empty(2, 5, dtype=dtype, device="meta")
    assert attention_kl(*inputs, attention_mask=mask).shape == ()


def test_upstream_gradient_scales_the_gradient():
    inputs = four()
    inputs[0].requires_grad_()
    weights = torch.rand(2, 2, 5, dtype=torch.float64)
    rows = attention_kl(*inputs, reduction="none")
    (grad,) = torch.autograd.grad(rows, inputs[0], weights)
    # Row i of the loss depends on query i alone.
    (unweighted,) = torch.autograd.grad(attention_kl(*inputs, reduction="sum"), inputs[0])
    torch.testing.assert_close(grad, unweighted * weights[..., None])


def test_permuted_and_strided_inputs_equal_contiguous_ones():
    inputs = four(n=6, d=4)
    permuted = [x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2) for x in inputs]
    strided = [x.repeat_interleave(2, dim=-1)[..., ::2] for x in inputs]
    expected = loss_and_gradients(attention_kl, inputs)
    for variant in (permuted, strided):
        assert not variant[0].is_contiguous()
        query_s, key_s = (x.requires_grad_() for x in variant[:2])
        loss = attention_kl(*variant)
        grads = torch.autograd.grad(loss, (query_s, key_s), torch.tensor(3.0).double())
        for ours, theirs in zip((loss.detach(), *grads), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_mean_of_teacher_heads_equals_kl_to_the_averaged_map():
    query_s, key_s, query_t, key_t = four(h=2, h_t=6, n=9)
    average = (query_t @ key_t.transpose(-1, -2) / 2).softmax(-1).mean(1, keepdim=True)
    log_s = (query_s @ key_s.transpose(-1, -2) / 2).log_softmax(-1)
    expected = F.kl_div(log_s, average.expand_as(log_s), reduction="none").sum(-1).mean()
    loss = attention_kl(query_s, key_s, query_t, key_t, match_heads="mean")
    torch.testing.assert_close(loss, expected)


def test_relation_heads_equal_to_the_heads_change_nothing():
    inputs = four(h=4)
    torch.testing.assert_close(attention_kl(*inputs, relation_heads=4), attention_kl(*inputs))


# Types and modes


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_loss_is_float32_and_gradients_have_the_inputs_dtype(dtype, expected):
    inputs = four(dtype=dtype)
    inputs[0].requires_grad_()
    loss = attention_kl(*inputs)
    loss.backward()
    assert loss.dtype == expected
    assert inputs[0].grad.dtype == dtype


def test_autocast_does_not_change_the_float32_result():
    inputs = four(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_kl(*inputs)
    assert torch.equal(loss, attention_kl(*inputs))


@directions
def test_autocast_around_backward_does_not_change_the_gradients(direction):
    inputs = four(n=17, d=16, dtype=torch.float32)
    expected = loss_and_gradients(attention_kl, inputs, direction=direction)
    with torch.autocast("cpu", torch.bfloat16):
        results = loss_and_gradients(attention_kl, inputs, direction=direction)
    assert all(map(torch.equal, results, expected))


def test_autocast_promotes_mixed_dtypes():
    inputs = four(dtype=torch.float32)
    mixed = [*(x.bfloat16() for x in inputs[:2]), *inputs[2:]]
    with torch.autocast("cpu", torch.bfloat16):
        loss = attention_kl(*mixed)
    assert torch.equal(loss, attention_kl(*(x.float() for x in mixed)))


def test_second_derivative_raises_naming_the_operator():
    inputs = four()
    inputs[0].requires_grad_()
    (grad,) = torch.autograd.grad(attention_kl(*inputs), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention_kl.*second derivative"):
        grad.sum().backward()


def test_teacher_that_requires_grad_is_refused_when_gradients_are_on():
    query_s, key_s, query_t, key_t = four(requires_grad=True)
    with torch.no_grad():
        attention_kl(query_s, key_s, query_t, key_t)
    with pytest.raises(ValueError, match=r"query_t requires grad.*teacher_grad=True"):
        attention_kl(query_s, key_s, query_t, key_t)


def test_teacher_made_under_inference_mode_is_served():
    query_s, key_s = four()[:2]
    query_s.requires_grad_()
    with torch.inference_mode():
        query_t, key_t = four()[2:]
    attention_kl(query_s, key_s, query_t, key_t).backward()
    assert query_s.grad.isfinite().all()


def test_compiled_without_graph_breaks_equals_eager():
    inputs = four()
    inputs[0].requires_grad_()

    def loss(*inputs):
        return attention_kl(*inputs, attention_mask=MASK, causal=True, window=2)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        (grad,) = torch.autograd.grad(function(*inputs), inputs[0])
        torch.testing.assert_close(grad, torch.autograd.grad(loss(*inputs), inputs[0])[0])


# Errors


def swap(index, value):
    inputs = four()
    inputs[index] = value(inputs[index]) if callable(value) else value
    return inputs


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (swap(0, lambda x: x[0]), {}, ValueError, r"query_s has shape \[2, 5, 4\].*\[B, H, N, d\]"),
        (swap(1, lambda x: x[:1]), {}, ValueError, "key_s.*batch"),
        (swap(2, lambda x: x[:, :, :3]), {}, ValueError, "query_t.*length"),
        (swap(3, lambda x: x[:, :, :3]), {}, ValueError, "key_t.*length"),
        (swap(1, lambda x: x[..., :2]), {}, ValueError, "key_s has width 2 but query_s 4"),
        (four(h=4, h_kv=3), {}, ValueError, "query_s has 4 heads but key_s 3.*multiple"),
        (four(h=2, h_t=3), {}, ValueError, "query_t has 3 heads.*relation_heads.*match_heads"),
        (swap(0, lambda x: x.float()), {}, TypeError, "one dtype"),
        (swap(3, lambda x: x.long()), {}, TypeError, "key_t is int64"),
        (swap(0, "query"), {}, TypeError, "query_s is a str"),
        (swap(1, lambda x: [x]), {}, TypeError, "key_s is a list"),
        (swap(1, lambda x: x.to("meta")), {}, ValueError, "key_s is on meta"),
        (four(n=1, nk=2)[:1] + [torch.zeros(2, 2, 0, 4).double()] + four(n=1, nk=2)[2:], {},
         ValueError, "key_s.*at least 1"),
        (four(), {"direction": "backward"}, ValueError, "direction is 'backward'.*'forward'"),
        (four(), {"reduction": "batchmean"}, ValueError, "reduction is 'batchmean'.*'mean'"),
        (four(), {"match_heads": "max"}, ValueError, "match_heads is 'max'.*'mean'"),
        (four(), {"temperature": 0}, ValueError, "temperature is 0"),
        (four(), {"temperature": "hot"}, TypeError, "temperature is a str"),
        (four(), {"temperature": math.nan}, ValueError, "temperature is nan"),
        (four(), {"window": -1}, ValueError, "window is -1"),
        (four(), {"window": 1.5}, TypeError, "window is a float"),
        (four(), {"relation_heads": 3}, ValueError, "relation_heads is 3.*divide"),
        (four(), {"relation_heads": 2, "match_heads": "mean"}, ValueError, "match_heads"),
        (four(), {"scale_s": [1.0]}, TypeError, "scale_s is a list"),
        (four(), {"attention_mask": MASK[:1]}, ValueError, r"attention_mask.*\[B, Nk\] = \[2, 5\]"),
        (four(), {"query_mask": MASK[:, :2]}, ValueError, r"query_mask.*\[B, Nq\] = \[2, 5\]"),
        (four(), {"attention_mask": (1 - MASK) * -1e4}, ValueError, "attention_mask.*0 and 1"),
        (four(), {"attention_mask": MASK.tolist()}, TypeError, "attention_mask is a list"),
        (four(), {"cu_seqlens": torch.tensor([0, 2])}, ValueError, "query_s.*packed"),
        (four(), {"backend": "tritn"}, ValueError, "did you mean 'triton'"),
        (four(), {"backend": None}, ValueError, "backend=None is unknown; allowed"),
        ([[], [], [], []], {}, ValueError, "query_s is empty"),
        ([[four()[0]], [], [four()[2]], [four()[3]]], {}, ValueError, "key_s is empty"),
        ([[four()[0]] * 2, *([x] for x in four()[1:])], {}, ValueError, "key_s has 1 tensors"),
        ([[x, y] for x, y in zip(four(), four(n=3), strict=True)], {}, ValueError,
         r"query_s\[1\].*share batch and length"),
        ([[x, y] for x, y in zip(four(), four(h_t=3), strict=True)], {}, ValueError,
         r"query_t\[1\] has 3 heads"),
    ],
)  # fmt: skip
def test_bad_argument_is_named(inputs, options, error, message):
    with pytest.raises(error, match=message):
        attention_kl(*inputs, **options)


@pytest.mark.parametrize(
    ("cu_seqlens", "error"),
    [
        ([0, 5], TypeError),
        (torch.tensor([0.0, 5.0]), TypeError),
        (torch.tensor([[0, 5]]), ValueError),
        (torch.tensor([1, 5]), ValueError),
        (torch.tensor([0, 4, 3]), ValueError),
        (torch.tensor([0, 6]), ValueError),
    ],
)
def test_bad_cu_seqlens_is_named(cu_seqlens, error):
    packed = [x[0].transpose(0, 1) for x in four(b=1)]
    with pytest.raises(error, match="cu_seqlens"):
        attention_kl(*packed, cu_seqlens=cu_seqlens)


def test_attention_mask_beside_cu_seqlens_is_refused():
    packed = [x[0].transpose(0, 1) for x in four(b=1)]
    with pytest.raises(ValueError, match="attention_mask is given beside cu_seqlens"):
        attention_kl(*packed, cu_seqlens=torch.tensor([0, 5]), attention_mask=torch.ones(1, 5))
