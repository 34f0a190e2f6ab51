"""A teacher of another dtype than its student: kernels read both as they are."""

import importlib

import pytest
import torch

from kdfast.ops import (
    CKATeacher,
    attention_kl,
    cka,
    cka_matrix,
    dispatch,
    gram_distance,
    hsic,
    layer_projection,
    layer_projection_loss,
)

pytestmark = pytest.mark.usefixtures("memory_filled_with_nan")

OPERATOR = "attention_kl"  # whose libraries are those of all
CKA = importlib.import_module("kdfast.ops.cka")  # whose name is the function's
INTERPRETED = {"test_two_dtypes_equal_the_same_numbers_in_float32"}
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
TWO = [(SINGLE, BRAIN), (BRAIN, SINGLE), (SINGLE, HALF), (HALF, SINGLE)]
# Of a loss and a gradient; float32 at the end is rounded to the dtype of whom it is for.
ROUNDING = {SINGLE: 2**-19, HALF: 2**-10, BRAIN: 2**-7}


def attention(students, teachers, backend, **options):
    """Queries are the first half of the layers, keys the second; [A, n, 4 d] each."""
    heads = [
        [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in side] for side in (students, teachers)
    ]
    (q_s, k_s), (q_t, k_t) = ((side[: len(side) // 2], side[len(side) // 2 :]) for side in heads)
    losses = attention_kl(
        q_s, k_s, q_t, k_t, teacher_grad=teachers[0].requires_grad, backend=backend, **options
    )
    return torch.cat([x.flatten() for x in losses]) if isinstance(losses, list) else losses


def alignment(operator, **options):
    def call(students, teachers, backend):
        grad = {} if operator is hsic else {"teacher_grad": teachers[0].requires_grad}
        if operator is hsic:
            students, teachers = students[0], teachers[0]
        return operator(students, teachers, backend=backend, **grad, **options)

    return call


def projected(students, teachers, backend):
    states, weights = layer_projection(students, teachers, scale=0.1, backend=backend)
    return torch.cat([*(x.float().flatten() for x in states), weights.flatten()])


def projection(**options):
    def call(students, teachers, backend):
        return layer_projection_loss(students, teachers, scale=0.1, backend=backend, **options)

    return call


# The call, the problems, rows and width of layers, their number.
CALLS = {
    "attention": (attention, (1, 33, 32), 4),
    "attention rows": (lambda *x: attention(*x, reduction="none"), (1, 17, 64), 4),
    "attention js": (lambda *x: attention(*x, direction="js"), (1, 17, 32), 2),
    "attention, teacher's mean": (lambda *x: attention(*x, match_heads="mean"), (1, 17, 32), 2),
    "cka, gram": (alignment(cka), (2, 24, 40), 3),
    "cka, gram or tiles": (alignment(cka), (70, 24, 40), 2),
    "cka, feature": (alignment(cka, estimator="unbiased"), (2, 96, 16), 2),
    "cka matrix, feature": (alignment(cka_matrix), (1, 420, 130), 2),
    "cka, rbf": (alignment(cka, kernel="rbf"), (1, 100, 8), 2),
    "cka matrix": (alignment(cka_matrix), (2, 24, 40), 3),
    "hsic": (alignment(hsic), (2, 24, 40), 1),
    "gram distance": (alignment(gram_distance), (2, 24, 40), 2),
    "projected states": (projected, (2, 9, 40), 3),
    "projection": (projection(), (2, 9, 64), 3),
    "projection of logits": (projection(objective="kl"), (2, 9, 3), 3),
    "projection of losses": (projection(objective="cosine", attend="losses"), (2, 9, 40), 3),
    "pairs": (projection(objective="cosine", attend="pairs"), (2, 9, 40), 3),
    "pairs of logits": (projection(objective="kl", attend="pairs"), (2, 9, 3), 3),
}


def layers(count, shape, dtype, device):
    made = [torch.randn(shape, device=device).to(dtype) for _ in range(count)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtypes", TWO, ids=lambda two: " and ".join(str(x)[6:] for x in two))
def test_two_dtypes_equal_the_same_numbers_in_float32(kernel, dtypes, name, monkeypatch):
    backend, device = kernel
    call, shape, count = CALLS[name]
    if backend == "cuda":
        pytest.skip("left to triton")
    sides, side_for = set(), CKA.side_for
    monkeypatch.setattr(CKA, "side_for", lambda *x: sides.add(side_for(*x)) or side_for(*x))
    students, teachers = (layers(count, shape, dtype, device) for dtype in dtypes)
    if name.endswith("mean"):  # whose gradient the reference alone has
        teachers = [x.detach() for x in teachers]
    wide = [[x.detach().float().requires_grad_(x.requires_grad) for x in side]
            for side in (students, teachers)]  # fmt: skip
    loss, expected = call(students, teachers, backend), call(*wide, backend)
    assert loss.dtype == SINGLE
    assert not name.endswith("feature") or sides == {"feature"}
    # On a GPU what is narrower enters some products as it is, and is multiplied in its precision.
    close = 2**-19 if device == "cpu" else max(ROUNDING[x] for x in dtypes)
    if backend == "triton" and HALF in dtypes:
        close = ROUNDING[HALF]
    if name == "projected states":  # which are in the student's dtype, and their gradient
        close = max(close, ROUNDING[dtypes[0]])
    torch.testing.assert_close(loss, expected, rtol=0, atol=8 * close)
    upstream = torch.randn_like(loss)
    loss.backward(upstream)
    expected.backward(upstream)
    for narrow, single in zip((*students, *teachers), (*wide[0], *wide[1]), strict=True):
        if not narrow.requires_grad:
            continue
        assert narrow.grad.dtype == narrow.dtype
        scale = single.grad.abs().max()
        rounding = max(ROUNDING[narrow.dtype], close)
        error = (narrow.grad.float() - single.grad).abs().max()
        assert error <= 4 * rounding * scale + (2**-24 if narrow.dtype == HALF else 0)


@pytest.mark.parametrize("name", ["attention", "cka, gram", "projection"])
@pytest.mark.parametrize(
    "dtypes", [(torch.float64, SINGLE), (SINGLE, torch.float64), (HALF, BRAIN)]
)
def test_what_no_kernel_reads_together_is_brought_to_one_dtype(name, dtypes):
    call, shape, count = CALLS[name]
    students, teachers = (layers(count, shape, dtype, "cpu") for dtype in dtypes)
    both = torch.promote_types(*dtypes)
    wide = [[x.detach().to(both) for x in side] for side in (students, teachers)]
    loss, expected = call(students, teachers, "auto"), call(*wide, "auto")
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert all(x.grad.dtype == x.dtype for x in (*students, *teachers))


@pytest.mark.parametrize("name", ["attention", "cka, gram", "projection"])
def test_one_model_has_one_dtype(name):
    call, shape, count = CALLS[name]
    students, teachers = (layers(count, shape, SINGLE, "cpu") for _ in "12")
    teachers[-1] = teachers[-1].detach().bfloat16()
    with pytest.raises(TypeError, match=r"is bfloat16 but .* is float32; all .* one dtype"):
        call(students, teachers, "auto")


@pytest.mark.parametrize("dtypes", TWO, ids=str)
def test_a_kept_teacher_of_another_dtype_gives_the_same(dtypes):
    students, teachers = (layers(2, (2, 24, 40), dtype, "cpu") for dtype in dtypes)
    teachers = [x.detach() for x in teachers]
    kept = CKATeacher(teachers)
    for _ in "12":
        assert torch.equal(kept.cka(students), cka(students, teachers))
        assert torch.equal(kept.cka_matrix(students), cka_matrix(students, teachers))


@pytest.mark.parametrize("name", ["attention", "cka, gram", "projection", "projected states"])
@pytest.mark.parametrize("dtypes", TWO[:2], ids=str)
def test_compiled_they_give_the_same(dtypes, name):
    call, shape, count = CALLS[name]
    students, teachers = (layers(count, shape, dtype, "cpu") for dtype in dtypes)
    teachers = [x.detach() for x in teachers]
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (call, compiled):
        loss = run(students, teachers, "auto")
        gradients.append(torch.autograd.grad(loss.sum(), students))
    for ours, theirs in zip(*gradients, strict=True):
        assert ours.dtype == dtypes[0] and torch.equal(ours, theirs)


def test_float16_of_a_teacher_without_gradient_leaves_the_fused_pass(monkeypatch):
    module = importlib.import_module("kdfast.ops.layer_projection")
    if "cpp" not in module._FUSED or dispatch.explain("layer_projection_loss")[1].reason:
        pytest.skip("not installed")
    calls = []
    fused = module._FUSED["cpp"]
    monkeypatch.setitem(module._FUSED, "cpp", lambda *x: calls.append(1) or fused(*x))
    (s,), (t,) = layers(1, (2, 9, 40), SINGLE, "cpu"), layers(1, (2, 9, 40), HALF, "cpu")
    layer_projection_loss([s], [t.detach()], backend="cpp").backward()
    assert calls == [1]
    layer_projection_loss([s], [t], backend="cpp").backward()  # whose gradient might vanish
    assert calls == [1]


@pytest.mark.parametrize("operator", ["attention_kl", "cka", "layer_projection_loss"])
def test_cuda_leaves_two_dtypes_to_triton(operator, monkeypatch):
    monkeypatch.setattr("kdfast.ops.library.refuses", lambda *_: None)
    s, t = torch.zeros(2, 4, 8, 16, dtype=BRAIN), torch.zeros(2, 4, 8, 16)
    options = {
        "attention_kl": {
            "query_s": s, "key_s": s, "query_t": t, "key_t": t, "cu_seqlens": None,
            "scale_s": None, "scale_t": None, "temperature": 1.0, "direction": "forward",
            "relation_heads": None, "match_heads": None,
        },
        "cka": {"x_s": s, "x_t": t, "kernel": "linear"},
        "layer_projection_loss": {"layers_s": [s], "layers_t": [t]},
    }[operator]  # fmt: skip
    reason = dispatch.KERNELS[operator, "cuda"].refuses(**options)
    assert reason == "a teacher in torch.float32 and a student in torch.bfloat16"
