import math

import pytest
import torch
import torch.nn.functional as F

from kdfast.ops import layer_projection, layer_projection_loss

pytestmark = pytest.mark.usefixtures("backend_on_cpu")

OPERATOR = "layer_projection"
OBJECTIVES = ("mse", "cosine", "kl")
objectives = pytest.mark.parametrize("objective", OBJECTIVES)
attends = pytest.mark.parametrize("attend", ["states", "losses"])


def layers(count, *shape, dtype=torch.float64, grad=False):
    return [torch.randn(shape, dtype=dtype, requires_grad=grad) for _ in range(count)]


def softmax_by_hand(values):
    exponentials = [math.exp(v - max(values)) for v in values]
    return [e / sum(exponentials) for e in exponentials]


def compare_by_hand(h, c, objective, temperature):
    if objective == "mse":
        return sum((a - b) ** 2 for a, b in zip(h, c, strict=True)) / len(h)
    if objective == "cosine":
        dot = sum(a * b for a, b in zip(h, c, strict=True))
        norm_h, norm_c = (math.sqrt(sum(a * a for a in v)) for v in (h, c))
        return 1 - dot / (max(norm_h, 1e-8) * max(norm_c, 1e-8))
    p_s, p_t = (softmax_by_hand([a / temperature for a in v]) for v in (h, c))
    return sum(b * (math.log(b) - math.log(a)) for a, b in zip(p_s, p_t, strict=True))


def token_by_hand(states_s, states_t, *, objective="mse", scale=1.0, temperature=1.0,
                  attend="states"):  # fmt: skip
    """Weights, projected states and losses of one token; states are lists of lists."""
    weights, projected, losses = [], [], []
    for h in states_s:
        scores = [scale * sum(a * b for a, b in zip(h, g, strict=True)) for g in states_t]
        alpha = softmax_by_hand(scores)
        mixed = [sum(w * g[k] for w, g in zip(alpha, states_t, strict=True)) for k in range(len(h))]
        weights.append(alpha)
        projected.append(mixed)
        if attend == "states":
            losses.append(compare_by_hand(h, mixed, objective, temperature))
        else:
            every = [compare_by_hand(h, g, objective, temperature) for g in states_t]
            losses.append(sum(w * loss for w, loss in zip(alpha, every, strict=True)))
    return weights, projected, losses


def by_hand(layers_s, layers_t, **options):
    """Weights [tokens, L_s, L_t], projected [L_s, tokens, d], losses [tokens, L_s]."""
    tokens = [
        token_by_hand([h.tolist() for h in hs], [g.tolist() for g in gs], **options)
        for (*both,) in zip(
            *(x.detach().double().flatten(0, -2) for x in (*layers_s, *layers_t)), strict=True
        )
        for hs, gs in [(both[: len(layers_s)], both[len(layers_s) :])]
    ]
    weights, projected, losses = (torch.tensor(x).double() for x in zip(*tokens, strict=True))
    return weights, projected.transpose(0, 1), losses


# The formula


@pytest.mark.parametrize(
    ("count_s", "count_t", "d"), [(1, 1, 1), (2, 3, 5), (4, 2, 17), (1, 12, 3)]
)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_projected_states_and_weights_equal_the_formula(count_s, count_t, d, scale):
    layers_s, layers_t = layers(count_s, 2, 3, d), layers(count_t, 2, 3, d)
    projected, weights = layer_projection(layers_s, layers_t, scale=scale)
    expected_weights, expected, _ = by_hand(layers_s, layers_t, scale=scale)
    torch.testing.assert_close(weights, expected_weights.view(2, 3, count_s, count_t))
    assert len(projected) == count_s
    torch.testing.assert_close(torch.stack(projected), expected.view(count_s, 2, 3, d))


@objectives
@attends
@pytest.mark.parametrize("options", [{}, {"scale": 0.5, "temperature": 2.0}], ids=str)
def test_loss_equals_the_formula(objective, attend, options):
    layers_s, layers_t = layers(2, 2, 3, 5), layers(3, 2, 3, 5)
    options = {**options, "objective": objective, "attend": attend}
    _, _, losses = by_hand(layers_s, layers_t, **options)
    losses = losses.view(2, 3, 2)
    rows = layer_projection_loss(layers_s, layers_t, **options, reduction="none")
    torch.testing.assert_close(rows, losses)
    for reduction, expected in (("mean", losses.mean()), ("sum", losses.sum())):
        loss = layer_projection_loss(layers_s, layers_t, **options, reduction=reduction)
        torch.testing.assert_close(loss, expected)


@objectives
@attends
def test_mask_leaves_the_mean_to_the_valid_tokens(objective, attend):
    layers_s, layers_t = layers(2, 2, 3, 5), layers(3, 2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    options = {"objective": objective, "attend": attend, "reduction": "none"}
    rows = layer_projection_loss(layers_s, layers_t, **options)
    masked = layer_projection_loss(layers_s, layers_t, mask=mask, **options)
    torch.testing.assert_close(masked, rows * mask[..., None])
    mean = layer_projection_loss(layers_s, layers_t, mask=mask, **{**options, "reduction": "mean"})
    torch.testing.assert_close(mean, rows[mask.bool()].mean())


@objectives
@attends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_of_student_and_teacher_pass_gradcheck(objective, attend, reduction):
    states = layers(5, 3, 4, grad=True)
    assert torch.autograd.gradcheck(
        lambda *x: layer_projection_loss(
            x[:2], x[2:], objective=objective, attend=attend, reduction=reduction, scale=0.7,
            temperature=1.5, mask=torch.tensor([1, 0, 1]),
        ),
        states,
    )  # fmt: skip


def test_gradients_of_projected_states_and_weights_pass_gradcheck():
    states = layers(5, 3, 4, grad=True)

    def outputs(*x):
        projected, weights = layer_projection(x[:2], x[2:], mask=torch.tensor([1, 1, 0]))
        return *projected, weights

    assert torch.autograd.gradcheck(outputs, states)


@pytest.mark.exhaustive
@objectives
@attends
@pytest.mark.parametrize(("count_s", "count_t"), [(1, 1), (1, 12), (6, 12), (12, 1), (7, 13)])
@pytest.mark.parametrize("d", [1, 2, 3, 17, 129])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_every_combination_equals_the_formula(
    objective, attend, count_s, count_t, d, tokens, scale
):
    layers_s, layers_t = layers(count_s, tokens, d), layers(count_t, tokens, d)
    options = {"objective": objective, "attend": attend, "scale": scale, "temperature": 1.5}
    _, _, losses = by_hand(layers_s, layers_t, **options)
    rows = layer_projection_loss(layers_s, layers_t, **options, reduction="none")
    torch.testing.assert_close(rows, losses)


# Against torch, and against eager arithmetic in the same dtype


def eager(layers_s, layers_t, objective):
    """What one would write for attend="states", in the dtype of the inputs."""
    states, targets = torch.stack(layers_s, -2), torch.stack(layers_t, -2)
    projected = (states @ targets.mT).softmax(-1) @ targets
    if objective == "mse":
        return F.mse_loss(states, projected)
    if objective == "cosine":
        return (1 - F.cosine_similarity(states, projected, dim=-1)).mean()
    log_s, log_t = states.log_softmax(-1), projected.log_softmax(-1)
    return F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1).mean()


def loss_and_gradient(function, layers_s, layers_t):
    layers_s = [x.detach().clone().requires_grad_() for x in layers_s]
    loss = function(layers_s, layers_t)
    loss.backward(torch.tensor(3.0, dtype=loss.dtype))
    return loss.detach().double(), torch.stack([x.grad for x in layers_s]).double()


@objectives
def test_loss_and_gradient_equal_stacked_torch(objective):
    layers_s, layers_t = layers(2, 7, 6), layers(4, 7, 6)
    ours = loss_and_gradient(
        lambda s, t: layer_projection_loss(s, t, objective=objective), layers_s, layers_t
    )
    theirs = loss_and_gradient(lambda s, t: eager(s, t, objective), layers_s, layers_t)
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its)


@objectives
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [1, 3, 17, 127, 129])
def test_error_is_at_most_twice_that_of_eager_in_the_same_dtype(objective, dtype, d):
    layers_s, layers_t = layers(3, 17, d, dtype=dtype), layers(5, 17, d, dtype=dtype)
    layers_s = [x * 0.1 for x in layers_s]  # weights far from one-hot, where gradients are delicate
    exact = loss_and_gradient(
        lambda s, t: eager(s, t, objective),
        [x.double() for x in layers_s],
        [x.double() for x in layers_t],
    )
    ours = loss_and_gradient(
        lambda s, t: layer_projection_loss(s, t, objective=objective), layers_s, layers_t
    )
    theirs = loss_and_gradient(lambda s, t: eager(s, t, objective), layers_s, layers_t)
    for truth, mine, its in zip(exact, ours, theirs, strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max() + 1e-7
        assert (mine - truth).abs().max() <= 2 * (its - truth).abs().max() + floor


# Numerical edges


@objectives
@attends
def test_student_equal_to_a_teacher_of_one_layer_has_zero_loss(objective, attend):
    states = layers(1, 7, 5, dtype=torch.float32, grad=True)
    loss = layer_projection_loss(
        states, [states[0].detach()], objective=objective, attend=attend, reduction="sum"
    )
    loss.backward()
    if objective == "cosine":  # 1 - <h, h> / |h|^2 is zero up to rounding
        assert loss.abs() < 1e-5
        assert states[0].grad.abs().max() < 1e-6
    else:
        assert loss == 0
        assert torch.count_nonzero(states[0].grad) == 0


@objectives
@attends
def test_fully_masked_input_has_zero_loss_and_gradient(objective, attend):
    states = layers(5, 3, 4, grad=True)
    loss = layer_projection_loss(
        states[:2], states[2:], objective=objective, attend=attend, mask=torch.zeros(3)
    )
    loss.backward()
    assert loss == 0
    assert all(torch.count_nonzero(x.grad) == 0 for x in states)


def test_masked_tokens_have_zero_projection_and_weights():
    mask = torch.tensor([True, False, True])
    projected, weights = layer_projection(layers(2, 3, 4), layers(3, 3, 4), mask=mask)
    assert torch.count_nonzero(weights[1]) == 0
    assert all(torch.count_nonzero(x[1]) == 0 for x in projected)
    torch.testing.assert_close(weights[mask].sum(-1), torch.ones(2, 2).double())


@objectives
@attends
def test_what_masked_tokens_hold_reaches_neither_loss_nor_gradient(objective, attend):
    clean = layers(5, 3, 4)
    mask = torch.tensor([True, False, True])
    results = []
    for filling in (0.0, math.nan):
        states = [x.clone() for x in clean]
        for x in states:
            x[1] = filling
            x.requires_grad_()
        loss = layer_projection_loss(
            states[:2], states[2:], objective=objective, attend=attend, mask=mask
        )
        loss.backward()
        results.append([loss, *(x.grad for x in states)])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@objectives
@attends
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_a_token_gives_nan_in_that_token_only(objective, attend, side):
    layers_s, layers_t = layers(2, 3, 4), layers(3, 3, 4)
    (layers_s if side == "student" else layers_t)[1][2, 0] = math.nan
    rows = layer_projection_loss(
        layers_s, layers_t, objective=objective, attend=attend, reduction="none"
    )
    assert rows[2, 1].isnan()
    assert rows[:2].isfinite().all()


@objectives
@attends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch_is_zero(objective, attend, reduction):
    states = layers(3, 0, 4, grad=True)
    loss = layer_projection_loss(
        states[:2], states[2:], objective=objective, attend=attend, reduction=reduction
    )
    loss.sum().backward()
    assert loss.shape == ((0, 2) if reduction == "none" else ())
    assert loss.sum() == 0
    assert states[0].grad.shape == (0, 4)


@attends
def test_saturated_weights_pick_one_layer(attend):
    student = torch.tensor([[100.0, 0.0]], requires_grad=True)
    teacher = [torch.tensor([[100.0, 0.0]]), torch.tensor([[-100.0, 0.0]])]
    loss = layer_projection_loss([student], teacher, attend=attend)
    loss.backward()
    assert loss == 0
    assert student.grad.isfinite().all()


@objectives
@attends
def test_states_of_zero_have_finite_loss_and_gradient(objective, attend):
    states = [torch.zeros(2, 3, requires_grad=True) for _ in range(3)]
    loss = layer_projection_loss(states[:1], states[1:], objective=objective, attend=attend)
    loss.backward()
    assert loss == (1 if objective == "cosine" else 0)
    assert all(x.grad.isfinite().all() for x in states)


def test_large_mean_offset_keeps_the_digits_of_the_loss():
    layers_s, layers_t = (
        layers(2, 9, 64, dtype=torch.float32),
        layers(3, 9, 64, dtype=torch.float32),
    )
    for x in (*layers_s, *layers_t):
        x[:, 0] += 30
    loss = layer_projection_loss(layers_s, layers_t, scale=0.01)
    expected = layer_projection_loss(
        [x.double() for x in layers_s], [x.double() for x in layers_t], scale=0.01
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_teacher_gets_gradients_by_default():
    layers_s, layers_t = layers(1, 3, 4, grad=True), layers(2, 3, 4, grad=True)
    layer_projection_loss(layers_s, layers_t).backward()
    assert all(torch.count_nonzero(x.grad) for x in (*layers_s, *layers_t))


def test_upstream_gradient_scales_the_gradient():
    states = layers(5, 3, 4)
    states[0].requires_grad_()
    rows = layer_projection_loss(states[:2], states[2:], reduction="none")
    weights = torch.randn(3, 2).double()
    (weighted,) = torch.autograd.grad(rows, states[0], weights, retain_graph=True)
    (plain,) = torch.autograd.grad(rows.sum(), states[0])
    torch.testing.assert_close(weighted, plain * weights[:, :1])


@objectives
def test_slices_and_strides_equal_contiguous_inputs(objective):
    hidden_s, hidden_t = layers(2, 3, 5, 8), layers(3, 3, 5, 8)
    sliced = [[h[:, 0, ::2] for h in side] for side in (hidden_s, hidden_t)]  # [CLS], every other
    copied = [[h.contiguous() for h in side] for side in sliced]
    assert not sliced[0][0].is_contiguous()
    losses = [layer_projection_loss(*x, objective=objective) for x in (sliced, copied)]
    torch.testing.assert_close(*losses)


def test_token_dimensions_may_be_any_number():
    flat_s, flat_t = layers(2, 12, 4), layers(3, 12, 4)
    expected = layer_projection_loss(flat_s, flat_t, reduction="none")
    for shape in [(12, 4), (3, 4, 4), (2, 3, 2, 4)]:
        rows = layer_projection_loss(
            [x.view(shape) for x in flat_s], [x.view(shape) for x in flat_t], reduction="none"
        )
        torch.testing.assert_close(rows.reshape(12, 2), expected)
    assert layer_projection_loss([flat_s[0][0]], [flat_t[0][0]], reduction="none").shape == (1,)


# Types and modes


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_weights_and_losses_are_float32_and_states_have_the_inputs_dtype(dtype):
    statistics = torch.promote_types(dtype, torch.float32)
    layers_s, layers_t = layers(1, 3, 4, dtype=dtype, grad=True), layers(2, 3, 4, dtype=dtype)
    projected, weights = layer_projection(layers_s, layers_t)
    loss = layer_projection_loss(layers_s, layers_t)
    loss.backward()
    assert (weights.dtype, loss.dtype) == (statistics, statistics)
    assert (projected[0].dtype, layers_s[0].grad.dtype) == (dtype, dtype)


@objectives
def test_autocast_does_not_change_the_float32_result(objective):
    layers_s, layers_t = layers(2, 3, 9, dtype=torch.float32), layers(3, 3, 9, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer_projection_loss(layers_s, layers_t, objective=objective)
    assert torch.equal(loss, layer_projection_loss(layers_s, layers_t, objective=objective))


@objectives
@attends
def test_autocast_around_backward_does_not_change_the_gradient(objective, attend):
    layers_s, layers_t = layers(2, 3, 9, dtype=torch.float32), layers(3, 3, 9, dtype=torch.float32)

    def results():
        return loss_and_gradient(
            lambda s, t: layer_projection_loss(s, t, objective=objective, attend=attend),
            layers_s,
            layers_t,
        )

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(), expected))


@objectives
@attends
def test_compiled_without_graph_breaks_equals_eager(objective, attend):
    layers_s, layers_t = layers(2, 3, 5, grad=True), layers(3, 3, 5)

    def loss(layers_s, layers_t):
        return layer_projection_loss(layers_s, layers_t, objective=objective, attend=attend)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(layers_s, layers_t), layers_s) for f in (compiled, loss)]
    torch.testing.assert_close(*grads)


@objectives
def test_second_derivative_raises_naming_the_operator(objective):
    layers_s, layers_t = layers(1, 3, 4, grad=True), layers(2, 3, 4)
    loss = layer_projection_loss(layers_s, layers_t, objective=objective)
    (grad,) = torch.autograd.grad(loss, layers_s[0], create_graph=True)
    with pytest.raises(RuntimeError, match="layer_projection_loss .*second derivative"):
        grad.sum().backward()


# Errors


X = torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    ("layers_s", "layers_t", "options", "error", "message"),
    [
        ([], [X], {}, ValueError, "layers_s is empty"),
        ([X], [], {}, ValueError, "layers_t is empty"),
        (X, [X], {}, TypeError, "layers_s is one tensor"),
        ([X], [X] * 65, {}, ValueError, "layers_t has 65 layers, should have at most 64"),
        ([X, X[:1]], [X], {}, ValueError, r"layers_s\[1\] has shape \[1, 3, 4\]"),
        ([X], [X, X[..., :2]], {}, ValueError, r"layers_t\[1\].*project to a common width"),
        ([X], [X, X.half()], {}, TypeError, r"layers_t\[1\] is float16"),
        ([X.long()], [X], {}, TypeError, r"layers_s\[0\] is int64"),
        ([X], [X.to("meta")], {}, ValueError, r"layers_t\[0\] is on meta"),
        ([X], [None], {}, TypeError, r"layers_t\[0\] is a NoneType"),
        ([X[0, 0, 0]], [X[0, 0, 0]], {}, ValueError, r"layers_s\[0\] has shape \[\]"),
        ([X], [X], {"mask": torch.ones(2, 4)}, ValueError, r"mask has shape \[2, 4\].*= \[2, 3\]"),
        ([X], [X], {"mask": torch.full((2, 3), 2)}, ValueError, "mask holds values"),
        ([X], [X], {"scale": None}, TypeError, "scale is a NoneType"),
        ([X], [X], {"scale": math.inf}, ValueError, "scale is inf"),
        ([X], [X], {"temperature": -1.0}, ValueError, "temperature is -1.0"),
        ([X], [X], {"objective": "mae"}, ValueError, "objective is 'mae'.*'mse', 'cosine', 'kl'"),
        ([X], [X], {"attend": "state"}, ValueError, "attend is 'state'.*'states', 'losses'"),
        ([X], [X], {"reduction": "avg"}, ValueError, "reduction is 'avg'.*'none'"),
    ],
)
def test_bad_argument_is_named(layers_s, layers_t, options, error, message):
    with pytest.raises(error, match=message):
        layer_projection_loss(layers_s, layers_t, **options)


def test_sixty_four_layers_a_side_are_served():
    states = layers(64, 2, 3)
    projected, weights = layer_projection(states, states)
    assert (len(projected), weights.shape) == (64, (2, 64, 64))
