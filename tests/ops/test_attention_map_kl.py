import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.ops import attention_kl, attention_map_kl

pytestmark = pytest.mark.usefixtures("backend_on_cpu")

DIRECTIONS = ("forward", "reverse", "js")
directions = pytest.mark.parametrize("direction", DIRECTIONS)
kinds = pytest.mark.parametrize("inputs", ["probabilities", "scores"])
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])


def maps(*shape, inputs="probabilities", dtype=torch.float64):
    both = [torch.randn(shape, dtype=dtype) for _ in range(2)]
    return [x.softmax(-1) for x in both] if inputs == "probabilities" else both


def kl_by_hand(p, q):
    total = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            total += a * (math.log(a) - math.log(b)) if b > 0 else math.inf
    return total


def row_by_hand(row_s, row_t, kept, inputs, direction):
    row_s, row_t = ([row[j] for j in kept] for row in (row_s, row_t))
    if inputs == "scores":

        def softmax(row):
            weights = [math.exp(x - max(row)) for x in row]
            return [w / sum(weights) for w in weights]

        row_s, row_t = softmax(row_s), softmax(row_t)
    if direction == "forward":
        return kl_by_hand(row_t, row_s)
    if direction == "reverse":
        return kl_by_hand(row_s, row_t)
    middle = [(a + b) / 2 for a, b in zip(row_s, row_t, strict=True)]
    return (kl_by_hand(row_t, middle) + kl_by_hand(row_s, middle)) / 2


def by_hand(map_s, map_t, *, inputs="probabilities", attention_mask=None, direction="forward",
            reduction="none"):  # fmt: skip
    """Rows or their reduction for maps [B, H, Nq, Nk]."""
    rows, count = torch.zeros(map_s.shape[:-1], dtype=torch.float64), 0
    queries, keys = map_s.shape[-2:]
    for b, h, i in itertools.product(*map(range, rows.shape)):
        kept = [j for j in range(keys) if attention_mask is None or attention_mask[b, j]]
        if attention_mask is not None and queries == keys and not attention_mask[b, i]:
            continue
        if kept:
            count += 1
            rows[b, h, i] = row_by_hand(
                map_s[b, h, i].tolist(), map_t[b, h, i].tolist(), kept, inputs, direction
            )
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / max(count, 1)}[reduction]


# The formula


@kinds
@directions
@pytest.mark.parametrize("queries", [4, 3])
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_divergence_equals_the_formula(inputs, direction, queries, mask, reduction):
    both = maps(2, 3, queries, 4, inputs=inputs)
    options = {"inputs": inputs, "attention_mask": mask, "direction": direction,
               "reduction": reduction}  # fmt: skip
    torch.testing.assert_close(attention_map_kl(*both, **options), by_hand(*both, **options))


@kinds
@directions
@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradients_of_student_and_teacher_pass_gradcheck(inputs, direction, mask, reduction):
    both = [x.requires_grad_() for x in maps(2, 1, 4, 4, inputs=inputs)]
    assert torch.autograd.gradcheck(
        lambda s, t: attention_map_kl(
            s, t, inputs=inputs, attention_mask=mask, direction=direction, reduction=reduction,
            teacher_grad=True,
        ),
        both,
    )  # fmt: skip


@directions
def test_scores_probabilities_and_queries_with_keys_agree(direction):
    query_s, key_s, query_t, key_t = torch.randn(4, 2, 3, 4, 8, dtype=torch.float64).unbind()
    options = {"attention_mask": MASK, "direction": direction}
    expected = attention_kl(query_s, key_s, query_t, key_t, **options)
    scores = [q @ k.mT / math.sqrt(8) for q, k in ((query_s, key_s), (query_t, key_t))]
    added = torch.zeros(2, 1, 1, 4).masked_fill(MASK[:, None, None] == 0, -math.inf)
    probabilities = [(s + added).softmax(-1) for s in scores]
    torch.testing.assert_close(attention_map_kl(*scores, inputs="scores", **options), expected)
    torch.testing.assert_close(attention_map_kl(*probabilities, **options), expected)


@directions
def test_gradient_through_softmax_of_probabilities_equals_that_of_scores(direction):
    scores_s, scores_t = maps(2, 3, 4, 4, inputs="scores")
    scores_s.requires_grad_()
    options = {"attention_mask": MASK, "direction": direction}
    from_scores = attention_map_kl(scores_s, scores_t, inputs="scores", **options)
    # Normalised over the valid keys, as a model that was given the mask does.
    hidden = MASK[:, None, None] == 0
    normalised = (x.masked_fill(hidden, -math.inf).softmax(-1) for x in (scores_s, scores_t))
    from_probabilities = attention_map_kl(*normalised, **options)
    grads = [torch.autograd.grad(loss, scores_s)[0] for loss in (from_scores, from_probabilities)]
    torch.testing.assert_close(*grads)


@pytest.mark.exhaustive
@kinds
@directions
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (3, 17), (17, 3), (17, 17), (1, 129)])
@pytest.mark.parametrize("masked", [False, True])
def test_every_combination_equals_the_formula(inputs, direction, heads, queries, keys, masked):
    both = maps(2, heads, queries, keys, inputs=inputs)
    mask = torch.rand(2, keys) < 0.6 if masked else None
    options = {"inputs": inputs, "attention_mask": mask, "direction": direction}
    rows = attention_map_kl(*both, **options, reduction="none")
    torch.testing.assert_close(rows, by_hand(*both, **options))


# Against torch


def eager(map_s, map_t, inputs):
    if inputs == "scores":
        log_s, p_t = map_s.log_softmax(-1), map_t.softmax(-1)
    else:
        log_s, p_t = map_s.log(), map_t
    return F.kl_div(log_s, p_t, reduction="none").sum(-1).mean()


def loss_and_gradient(function, map_s, map_t):
    leaf = map_s.detach().clone().requires_grad_()
    loss = function(leaf, map_t)
    loss.backward(torch.tensor(3.0, dtype=loss.dtype))
    return loss.detach().double(), leaf.grad.double()


@kinds
def test_loss_and_gradient_equal_kl_div_of_torch(inputs):
    both = maps(2, 3, 17, 17, inputs=inputs)
    ours = loss_and_gradient(lambda s, t: attention_map_kl(s, t, inputs=inputs), *both)
    theirs = loss_and_gradient(lambda s, t: eager(s, t, inputs), *both)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keys", [1, 3, 17, 127, 129])
def test_error_is_at_most_twice_that_of_eager_in_the_same_dtype(inputs, dtype, keys):
    both = maps(2, 2, 5, keys, inputs=inputs, dtype=dtype)
    exact = loss_and_gradient(lambda s, t: eager(s, t, inputs), *(x.double() for x in both))
    ours = loss_and_gradient(lambda s, t: attention_map_kl(s, t, inputs=inputs), *both)
    theirs = loss_and_gradient(lambda s, t: eager(s, t, inputs), *both)
    for truth, mine, its in zip(exact, ours, theirs, strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max() + 1e-7
        assert (mine - truth).abs().max() <= 2 * (its - truth).abs().max() + floor


# Exact zeros


@directions
def test_entries_that_are_zero_on_both_sides_change_nothing(direction):
    both = [x.requires_grad_() for x in maps(1, 1, 4, 4)]
    padded = [F.pad(x.detach(), (1, 2)).requires_grad_() for x in both]
    results = []
    for pair in (both, padded):
        loss = attention_map_kl(*pair, direction=direction, teacher_grad=True)
        loss.backward()
        results.append(loss)
    torch.testing.assert_close(*results)
    for x, wide in zip(both, padded, strict=True):
        torch.testing.assert_close(wide.grad, F.pad(x.grad, (1, 2)))


def gradient(p_s, p_t, direction):
    p_s = torch.tensor([p_s], requires_grad=True)
    loss = attention_map_kl(p_s, torch.tensor([p_t]), direction=direction)
    loss.backward()
    return loss.item(), p_s.grad[0].tolist()


def test_zero_student_entry_with_teacher_mass_is_infinite_in_forward():
    loss, grad = gradient([0.0, 1.0], [0.5, 0.5], "forward")
    assert loss == math.inf
    assert grad == [-math.inf, -0.5]


def test_zero_student_entry_has_zero_gradient_in_reverse():
    loss, grad = gradient([0.0, 1.0], [0.5, 0.5], "reverse")
    assert loss == pytest.approx(math.log(2))
    assert grad == pytest.approx([0.0, math.log(2) + 1])


def test_zero_student_entry_has_zero_gradient_in_js():
    loss, grad = gradient([0.0, 1.0], [0.5, 0.5], "js")
    expected = row_by_hand([0.0, 1.0], [0.5, 0.5], [0, 1], "probabilities", "js")
    assert loss == pytest.approx(expected)
    assert grad == pytest.approx([0.0, 0.5 * math.log(1 / 0.75)])


def test_zero_teacher_entry_with_student_mass_is_infinite_in_reverse_only():
    assert gradient([0.5, 0.5], [0.0, 1.0], "reverse")[0] == math.inf
    loss, grad = gradient([0.5, 0.5], [0.0, 1.0], "forward")
    assert loss == pytest.approx(math.log(2))
    assert grad == pytest.approx([0.0, -2.0])


@pytest.mark.parametrize("direction", ["reverse", "js"])
def test_softmax_that_underflows_to_zero_gets_a_finite_gradient(direction):
    scores = torch.tensor([[0.0, 200.0, 199.0]], requires_grad=True)
    p_s = scores.softmax(-1)
    assert p_s[0, 0] == 0
    attention_map_kl(p_s, torch.full((1, 3), 1 / 3), direction=direction).backward()
    assert scores.grad.isfinite().all()


@directions
def test_scores_of_minus_infinity_on_both_sides_are_masked_keys(direction):
    both = maps(1, 1, 4, 4, inputs="scores")
    wide = [F.pad(x, (0, 2), value=-math.inf).requires_grad_() for x in both]
    options = {"inputs": "scores", "direction": direction}
    loss = attention_map_kl(*wide, **options, teacher_grad=True)
    loss.backward()
    torch.testing.assert_close(loss, attention_map_kl(*both, **options))
    for x in wide:
        assert x.grad.isfinite().all()
        assert torch.count_nonzero(x.grad[..., 4:]) == 0


def test_scores_with_teacher_mass_where_the_student_has_none_are_infinite_with_finite_gradient():
    map_s = torch.tensor([[-math.inf, 0.0]], requires_grad=True)
    loss = attention_map_kl(map_s, torch.zeros(1, 2), inputs="scores")
    loss.backward()
    assert loss == math.inf
    assert map_s.grad.tolist() == [[-0.5, 0.5]]


@pytest.mark.parametrize("peak", [1e4, -1e4])
@directions
def test_saturated_scores_are_finite_and_right(peak, direction):
    map_s = torch.tensor([[peak, 0.0]], requires_grad=True)
    loss = attention_map_kl(-map_s.detach(), map_s.detach(), inputs="scores", direction=direction)
    assert loss == pytest.approx(math.log(2) if direction == "js" else 1e4)
    attention_map_kl(map_s, -map_s.detach(), inputs="scores", direction=direction).backward()
    assert map_s.grad.isfinite().all()


# Numerical edges


@kinds
@directions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_student_equal_to_teacher_has_zero_loss(inputs, direction, dtype):
    map_s = maps(2, 3, 33, 33, inputs=inputs, dtype=dtype)[0].requires_grad_()
    loss = attention_map_kl(map_s, map_s.detach(), inputs=inputs, direction=direction,
                            reduction="sum")  # fmt: skip
    loss.backward()
    assert loss == 0
    if inputs == "scores" or direction == "js":
        assert torch.count_nonzero(map_s.grad) == 0
    else:  # the constant that the softmax before it removes
        assert (map_s.grad.abs() == 1).all()


@kinds
@directions
def test_fully_masked_sample_has_zero_loss_and_gradient(inputs, direction):
    both = [x.requires_grad_() for x in maps(2, 3, 4, 4, inputs=inputs)]
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    options = {"inputs": inputs, "direction": direction, "attention_mask": mask}
    loss = attention_map_kl(*both, **options, teacher_grad=True)
    loss.backward()
    expected = attention_map_kl(*(x[:1] for x in both), inputs=inputs, direction=direction,
                                teacher_grad=True)  # fmt: skip
    torch.testing.assert_close(loss, expected)
    for x in both:
        assert torch.count_nonzero(x.grad[1]) == 0
        assert x.grad.isfinite().all()


@kinds
def test_rows_without_any_mass_leave_the_mean(inputs):
    both = maps(2, 1, 4, 4, inputs=inputs)
    for x in both:
        x[1] = 0.0 if inputs == "probabilities" else -math.inf
        x.requires_grad_()
    loss = attention_map_kl(*both, inputs=inputs, teacher_grad=True)
    loss.backward()
    torch.testing.assert_close(loss, eager(*(x[:1] for x in both), inputs))
    assert all(x.grad.isfinite().all() for x in both)


@kinds
@directions
def test_one_valid_key_has_zero_loss(inputs, direction):
    map_s, map_t = maps(1, 1, 3, 4, inputs=inputs)
    if inputs == "probabilities":
        map_s = map_t = torch.tensor([0.0, 1.0, 0.0, 0.0]).expand(1, 1, 3, 4)
    mask = torch.tensor([[0, 1, 0, 0]])
    options = {"inputs": inputs, "direction": direction, "attention_mask": mask}
    assert attention_map_kl(map_s, map_t, **options) == 0


@kinds
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_is_zero(inputs, reduction):
    map_s = torch.zeros(0, 2, 3, 3, requires_grad=True)
    loss = attention_map_kl(
        map_s, torch.zeros(0, 2, 3, 3), inputs=inputs, attention_mask=torch.ones(0, 3),
        reduction=reduction,
    )  # fmt: skip
    loss.sum().backward()
    assert loss.shape == ((0, 2, 3) if reduction == "none" else ())
    assert loss.sum() == 0
    assert map_s.grad.shape == map_s.shape


@kinds
@directions
@pytest.mark.parametrize("side", [0, 1])
def test_nan_gives_nan_in_its_row_only(inputs, direction, side):
    both = maps(1, 1, 3, 4, inputs=inputs)
    both[side][0, 0, 1, 2] = math.nan
    rows = attention_map_kl(*both, inputs=inputs, direction=direction, reduction="none")
    assert rows.isnan().tolist() == [[[False, True, False]]]


@kinds
@directions
def test_what_padding_holds_reaches_neither_loss_nor_gradient(inputs, direction):
    clean = maps(2, 3, 4, 4, inputs=inputs)
    results = []
    for filling in (0.0, math.nan):
        both = [x.clone() for x in clean]
        for x in both:
            x.transpose(1, 2)[MASK == 0] = filling
            x.transpose(1, 3)[MASK == 0] = filling
        both[0].requires_grad_()
        loss = attention_map_kl(*both, inputs=inputs, attention_mask=MASK, direction=direction)
        loss.backward()
        results.append((loss, both[0].grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_upstream_gradient_scales_the_gradient():
    map_s, map_t = maps(2, 3, 4, 4)
    map_s.requires_grad_()
    rows = attention_map_kl(map_s, map_t, reduction="none")
    weights = torch.randn(rows.shape).double()
    (weighted,) = torch.autograd.grad(rows, map_s, weights, retain_graph=True)
    (plain,) = torch.autograd.grad(rows.sum(), map_s)
    torch.testing.assert_close(weighted, plain * weights[..., None])


@kinds
def test_permuted_and_strided_inputs_equal_contiguous_ones(inputs):
    map_s, map_t = maps(2, 3, 4, 5, inputs=inputs)
    permuted = map_s.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    strided = map_t.repeat_interleave(2, dim=-1)[..., ::2]
    loss = attention_map_kl(permuted, strided, inputs=inputs)
    torch.testing.assert_close(loss, attention_map_kl(map_s, map_t, inputs=inputs))


@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 5), (2, 1, 3, 4, 5)])
def test_leading_dimensions_may_be_any_number(shape):
    both = maps(*shape)
    rows = attention_map_kl(*both, reduction="none")
    assert rows.shape == shape[:-1]
    torch.testing.assert_close(rows, (both[1] * (both[1].log() - both[0].log())).sum(-1))


# Types and modes


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@kinds
def test_loss_is_float32_and_gradient_has_the_inputs_dtype(inputs, dtype):
    map_s, map_t = maps(2, 3, 4, 4, inputs=inputs, dtype=dtype)
    map_s.requires_grad_()
    loss = attention_map_kl(map_s, map_t, inputs=inputs)
    loss.backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert map_s.grad.dtype == dtype


@kinds
@directions
def test_second_derivative_raises_naming_the_operator(inputs, direction):
    map_s, map_t = maps(1, 2, 3, 3, inputs=inputs)
    map_s.requires_grad_()
    loss = attention_map_kl(map_s, map_t, inputs=inputs, direction=direction)
    (grad,) = torch.autograd.grad(loss, map_s, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_map_kl .*second derivative"):
        grad.sum().backward()


# Errors


P = torch.full((2, 3, 4, 4), 0.25)


@pytest.mark.parametrize(
    ("map_s", "map_t", "options", "error", "message"),
    [
        (P[0, 0, 0], P[0, 0, 0], {}, ValueError, r"map_s has shape \[4\].*\[..., Nq, Nk\]"),
        (P, P[:, :2], {}, ValueError, r"map_t has shape \[2, 2, 4, 4\].*average the teacher"),
        (P[..., :0], P[..., :0], {}, ValueError, "map_s.*at least 1"),
        (P, P.double(), {}, TypeError, "map_t is float64 but map_s is float32"),
        (P.int(), P, {}, TypeError, "map_s is int32"),
        (P, None, {}, TypeError, "map_t is a NoneType"),
        (P, P.clone().requires_grad_(), {}, ValueError, "map_t requires grad.*teacher_grad"),
        (P, P, {"inputs": "logits"}, ValueError, "inputs is 'logits'.*'probabilities', 'scores'"),
        (P, P, {"direction": "kl"}, ValueError, "direction is 'kl'.*'forward', 'reverse', 'js'"),
        (P, P, {"reduction": "batchmean"}, ValueError, "reduction is 'batchmean'"),
        (P, P, {"attention_mask": torch.ones(2, 3)}, ValueError, r"attention_mask.*= \[2, 4\]"),
        (P, P, {"attention_mask": P[0, :2, 0]}, ValueError, "attention_mask holds values"),
        (P[0, 0], P[0, 0], {"attention_mask": torch.ones(4)}, ValueError, r"\[B, ..., Nq, Nk\]"),
    ],
)
def test_bad_argument_is_named(map_s, map_t, options, error, message):
    with pytest.raises(error, match=message):
        attention_map_kl(map_s, map_t, **options)


@directions
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
def test_compiled_without_graph_breaks_equals_eager(inputs, direction):
    map_s, map_t = (torch.randn(2, 3, 4, 4).double().softmax(-1) for _ in range(2))
    map_s.requires_grad_()

    def loss(map_s, map_t):
        return attention_map_kl(map_s, map_t, inputs=inputs, direction=direction)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(map_s, map_t), map_s)[0] for f in (compiled, loss)]
    torch.testing.assert_close(*grads)
