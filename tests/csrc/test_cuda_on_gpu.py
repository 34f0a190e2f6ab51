"""backend="cuda" on a GPU, against the reference in float64 and eager's error in the same dtype."""

import math
import os

import pytest
import torch

from kdfast import reference
from kdfast.ops import (
    attention_kl,
    attention_map_kl,
    cka,
    cka_matrix,
    dispatch,
    layer_projection,
    layer_projection_loss,
)

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
directions = pytest.mark.parametrize("direction", ["forward", "reverse"])


@pytest.fixture(autouse=True)
def library(request):
    """Tests of an operator are skipped, saying why, where its library or GPU is missing."""
    name = request.node.name
    words = {"projection": "layer_projection", "cka": "cka", "map": "attention_map_kl"}
    operator = next((words[word] for word in words if word in name), "attention_kl")
    reason = next(x.reason for x in dispatch.explain(operator) if x.backend == "cuda")
    if not reason and operator == "attention_kl" and torch.cuda.get_device_capability() != (9, 0):
        reason = "attention_kl needs compute capability 9.0"
    if reason:
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def memory_filled_with_nan():
    if "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ:  # initcheck looks for it by itself
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def four(b=2, h=2, n=70, nk=None, d=64, d_t=None, h_kv=None, h_kv_t=None, dtype=torch.bfloat16):
    nk, d_t = nk or n, d_t or d
    shapes = [(b, h, n, d), (b, h_kv or h, nk, d), (b, h, n, d_t), (b, h_kv_t or h, nk, d_t)]
    return [torch.randn(shape, device="cuda").to(dtype) for shape in shapes]


def gradients(inputs, backend, upstream=None, **options):
    """Rows or loss, and the students' gradients, in float64."""
    inputs = [x.detach().clone().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    out = attention_kl(*inputs, backend=backend, **options)
    out.backward(torch.ones_like(out) if upstream is None else upstream.to(out.dtype))
    return [x.detach().double() for x in (out, inputs[0].grad, inputs[1].grad)]


def close(inputs, **options):
    """Errors at most twice those of float32 arithmetic, plus the last digit of what is rounded."""
    wide = [x.double() for x in inputs]
    exact = gradients(wide, "reference", **options)
    ours = gradients(inputs, "cuda", **options)
    in_single = gradients([x.float() for x in inputs], "reference", **options)
    info = torch.finfo(inputs[0].dtype)
    for i, (truth, mine, its) in enumerate(zip(exact, ours, in_single, strict=True)):
        scale = truth.abs().max()
        floor = 2e-5 * scale + 1e-6
        if i > 0:  # dS is rounded before its product, and the gradient after
            floor = 2 * info.eps * scale + 1e-7
        error = (mine - truth).abs().max()
        assert error <= 2 * (its - truth).abs().max() + floor, (i, error, scale)


CASES = {
    "plain": ({}, {}),
    "one token": ({"n": 1}, {}),
    "three tokens": ({"n": 3}, {}),
    "127": ({"n": 127}, {}),
    "128": ({"n": 128}, {}),
    "129": ({"n": 129}, {}),
    "513": ({"b": 1, "n": 513}, {}),
    "fewer keys": ({"n": 200, "nk": 70}, {}),
    "more keys": ({"n": 70, "nk": 333}, {}),
    "width 128": ({"d": 128}, {}),
    "widths differ": ({"d": 64, "d_t": 128}, {}),
    "narrow": ({"d": 32, "d_t": 80}, {}),
    "grouped heads": ({"h": 4, "h_kv": 2, "h_kv_t": 1, "n": 150}, {}),
    "causal": ({"n": 300}, {"causal": True}),
    "causal, more keys": ({"n": 70, "nk": 200}, {"causal": True}),
    "causal, fewer keys": ({"n": 200, "nk": 70}, {"causal": True}),
    "window": ({"n": 400}, {"window": 40}),
    "causal window": ({"n": 400}, {"window": 5, "causal": True}),
    "scales": ({}, {"scale_s": 0.3, "scale_t": 0.05, "temperature": 2.0}),
}


@dtypes
@directions
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_rows_and_gradients_equal_the_reference(case, masked, direction, dtype):
    shapes, options = CASES[case]
    inputs = four(**shapes, dtype=dtype)
    options = dict(options, direction=direction, reduction="none")
    if masked:
        b, n, nk = inputs[0].shape[0], inputs[0].shape[2], inputs[1].shape[2]
        options["attention_mask"] = torch.rand(b, nk, device="cuda") < 0.7
        options["query_mask"] = torch.rand(b, n, device="cuda") < 0.7
    upstream = torch.randn(inputs[0].shape[:3], device="cuda")
    close(inputs, upstream=upstream, **options)


@dtypes
@directions
@pytest.mark.parametrize("d", [64, 128])
def test_every_branch_of_the_kernels(d, direction, dtype):
    """The fewest cases that run every line, for tools that take long: make gpu-sanitize."""
    inputs = four(h=4, h_kv=2, n=150, d=d, d_t=96, dtype=dtype)
    mask = torch.rand(2, 150, device="cuda") < 0.8
    close(inputs, attention_mask=mask, causal=True, direction=direction)
    close(four(b=1, h=1, n=300, d=d, dtype=dtype), direction=direction)


@dtypes
def test_rows_that_are_not_aligned_are_copied(dtype):
    inputs = four(n=70, h=4, h_kv=2, dtype=dtype)

    def shifted(x):  # by one number, and rows of 67
        return torch.nn.functional.pad(x, (1, 2))[..., 1:-2]

    plain = gradients(inputs, "cuda", causal=True)
    views = [shifted(x).requires_grad_(i < 2) for i, x in enumerate(inputs)]
    loss = attention_kl(*views, causal=True, backend="cuda")
    for mine, its in zip((loss, *torch.autograd.grad(loss, views[:2])), plain, strict=True):
        assert torch.equal(mine.double(), its)


@dtypes
@directions
@pytest.mark.parametrize("relation_heads", [2, 8])
def test_relation_heads_of_any_strides_equal_the_reference(relation_heads, direction, dtype):
    shapes = {"n": 70, "h": 4, "h_kv": 2, "d": 32, "d_t": 64, "dtype": dtype}
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in four(**shapes)]
    wide = [torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :, 1:] for x in inputs]
    for x in (inputs, wide):
        close(x, relation_heads=relation_heads, direction=direction)


@dtypes
@directions
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("n", [128, 300])
def test_scalar_losses_equal_the_reference(n, reduction, direction, dtype):
    mask = torch.ones(2, n, device="cuda")
    mask[0, n // 2 :] = 0
    close(four(n=n, dtype=dtype), attention_mask=mask, reduction=reduction, direction=direction)


@dtypes
def test_pairs_of_different_widths_and_heads_equal_their_own_calls(dtype):
    shapes = [{"h": 2}, {"h": 4, "h_kv": 2}, {"h": 1, "d": 128}, {"h": 2}] * 6  # over two tables
    pairs = [four(**shape, dtype=dtype) for shape in shapes]
    together = attention_kl(*map(list, zip(*pairs, strict=True)), backend="cuda")
    apart = torch.stack([attention_kl(*pair, backend="cuda") for pair in pairs])
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=0.0)


@dtypes
@directions
@pytest.mark.parametrize("n", [100, 300])
def test_student_equal_to_teacher_has_exactly_no_loss_and_no_gradient(n, direction, dtype):
    query, key = four(n=n, dtype=dtype)[:2]
    mask = torch.rand(2, n, device="cuda") < 0.8
    made = gradients([query, key, query, key], "cuda", attention_mask=mask, direction=direction)
    assert all(torch.count_nonzero(x) == 0 for x in made)


@dtypes
@directions
@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_what_padding_holds_reaches_nothing(filling, direction, dtype):
    inputs = four(n=150, dtype=dtype)
    mask = torch.rand(2, 150, device="cuda") < 0.7
    mask[1, 100:] = False
    dirty = [x.clone() for x in inputs]
    for x in dirty:
        x.transpose(1, 2)[~mask] = filling
    options = {"attention_mask": mask, "direction": direction}
    for ours, theirs in zip(
        gradients(dirty, "cuda", **options), gradients(inputs, "cuda", **options), strict=True
    ):
        assert torch.equal(ours, theirs)


@dtypes
@directions
@pytest.mark.parametrize("side", ["query_t", "key_t"])
def test_nan_of_a_token_reaches_what_sees_it_and_nothing_else(side, direction, dtype):
    inputs = four(b=1, h=1, n=200, dtype=dtype)
    inputs[2 if side == "query_t" else 3][..., 101, :] = math.nan
    made = gradients(inputs, "cuda", window=30, direction=direction, reduction="none")
    rows, keys = (0, 30) if side == "query_t" else (30, 60)  # from the token on, both ways
    distance = (torch.arange(200, device="cuda") - 101).abs()
    for x, far in zip(made, (rows, rows, keys), strict=True):
        expected = (distance <= far).view(1, 1, -1, *[1] * (x.dim() - 3)).expand_as(x)
        assert torch.equal(x.isnan(), expected)


def test_map_probabilities_next_to_nothing_have_a_finite_divergence():
    map_s = torch.tensor([[[[1.0, 1.4e-45]]]], device="cuda", requires_grad=True)
    map_t = torch.tensor([[[[1.0, 0.0]]]], device="cuda")
    loss = attention_map_kl(map_s, map_t, direction="js", backend="cuda")
    loss.backward()
    assert 0 <= loss <= math.log(2) and map_s.grad.isfinite().all()


@dtypes
def test_near_equal_maps_with_large_key_offsets_keep_their_digits(dtype):
    query_s, _, query_t, key_t = four(b=1, n=129, dtype=torch.float32)
    key_t = key_t + 20 * torch.randn(1, 2, 1, 64, device="cuda")
    inputs = [x.to(dtype) for x in (query_t + 1e-2 * query_s, key_t, query_t, key_t)]
    # Rows alone: gradients are sums of dS, rounded to this dtype, times the offset.
    with torch.no_grad():
        exact, ours, single = (
            attention_kl(*x, reduction="none", backend=backend).double()
            for x, backend in (
                ([x.double() for x in inputs], "reference"),
                (inputs, "cuda"),
                ([x.float() for x in inputs], "reference"),
            )
        )
    assert (ours - exact).abs().max() <= 4 * (single - exact).abs().max() + 2e-5 * exact.max()


@dtypes
def test_strided_inputs_and_gradients_lie_as_they_do(dtype):
    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in four(n=300, dtype=dtype)]
    close(inputs)
    query = inputs[0].detach().requires_grad_()
    attention_kl(query, *inputs[1:], backend="cuda").backward()
    assert query.grad.stride() == query.stride()


@directions
def test_gradient_is_the_same_bit_for_bit_each_time(direction):
    inputs = four(b=4, h=8, n=700)
    first, second = (gradients(inputs, "cuda", direction=direction) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_offsets_past_32_bits_are_served():
    rows, width = 300, 64
    stride = (1 << 31) // 128 // 8 * 8  # of a row: 300 rows lie over more than 2^31 elements
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of GPU memory")
    memory = torch.zeros(rows * stride, dtype=torch.bfloat16, device="cuda")
    query = memory.as_strided((1, 1, rows, width), (0, 0, stride, 1))
    small = four(b=1, h=1, n=rows)
    query.copy_(small[0])
    for index in (0, 1, 3):
        inputs = list(small)
        inputs[index] = query if index == 0 else query.copy_(small[index])
        rows_far = attention_kl(*inputs, backend="cuda", reduction="none")
        assert torch.equal(rows_far, attention_kl(*small, backend="cuda", reduction="none"))


@pytest.mark.parametrize("n", [128, 300])
def test_captured_in_a_cuda_graph(n):
    inputs = four(n=n)
    inputs[0].requires_grad_()
    inputs[1].requires_grad_()

    def step():
        return torch.autograd.grad(attention_kl(*inputs, backend="cuda"), inputs[:2])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x, new in zip(inputs, four(n=n), strict=True):
            x.copy_(new)
    graph.replay()
    for ours, theirs in zip(captured, step(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_not_served_is_refused_with_the_reason():
    inputs = four()
    for options in ({"direction": "js"}, {"scale_s": -1.0}, {"temperature": 1e9}):
        with pytest.raises(RuntimeError):
            attention_kl(*inputs, backend="cuda", **options)
    with pytest.raises(RuntimeError):
        attention_kl(*(x.float() for x in inputs), backend="cuda")
    with pytest.raises(RuntimeError):
        attention_kl(*four(d=20), backend="cuda")
    with pytest.raises(RuntimeError, match="width 256"):
        attention_kl(*four(h=4), relation_heads=1, backend="cuda")


# attention_map_kl


def maps(*shape, inputs, dtype):
    scores = [2 * torch.randn(shape, device="cuda") for _ in range(2)]
    return [(x if inputs == "scores" else x.softmax(-1)).to(dtype) for x in scores]


def map_gradient(both, backend, upstream, **options):
    map_s = both[0].detach().clone().requires_grad_()
    rows = attention_map_kl(map_s, both[1], backend=backend, reduction="none", **options)
    rows.backward(upstream.to(rows.dtype))
    return [x.detach().double() for x in (rows, map_s.grad)]


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 1), (2, 5, 17), (64, 128), (33, 33), (9, 250), (9, 512), (5, 1001), (5, 3000),
     (3, 8192), (2, 20000)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masked", [False, True])
def test_map_rows_and_gradient_equal_the_reference(shape, masked, direction, inputs, dtype):
    shape = (2, *shape) if len(shape) == 3 else (2, 2, *shape)
    both = maps(*shape, inputs=inputs, dtype=dtype)
    options = {"inputs": inputs, "direction": direction}
    if masked:
        options["attention_mask"] = torch.rand(shape[0], shape[-1], device="cuda") < 0.7
    upstream = torch.randn(shape[:-1], device="cuda")
    exact = map_gradient([x.double() for x in both], "reference", upstream, **options)
    theirs = map_gradient([x.float() for x in both], "reference", upstream, **options)
    ours = map_gradient(both, "cuda", upstream, **options)
    eps = (4e-6, torch.finfo(dtype).eps)
    for truth, mine, its, relative in zip(exact, ours, theirs, eps, strict=True):
        # Infinities: of exact zeros, and of what is past the last float16.
        same = (truth == mine) | (truth.to(dtype) == mine.to(dtype))
        error = torch.where(same, 0.0, mine - truth).abs()
        allowed = 2 * torch.where(same, 0.0, its - truth).abs().max()
        assert (error <= allowed + relative * truth.abs().clamp(min=1e-2)).all()


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
@pytest.mark.parametrize("direction", ["forward", "js"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_branch_of_the_map_kernels(direction, inputs, dtype):
    for keys in (100, 250, 500, 1001, 3000, 5000):  # one of each layout
        test_map_rows_and_gradient_equal_the_reference((2, keys), True, direction, inputs, dtype)


@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
def test_map_strides_change_nothing(inputs):
    wide = maps(2, 3, 40, 72, inputs=inputs, dtype=torch.bfloat16)
    options = {"inputs": inputs, "backend": "cuda", "reduction": "none"}
    for view in (
        lambda x: x[..., 1:65],
        lambda x: x.transpose(0, 1),
        lambda x: x[:, :1].expand(-1, 3, -1, -1),
    ):
        views = [view(x) for x in wide]
        rows = attention_map_kl(*views, **options)
        assert torch.equal(rows, attention_map_kl(*(x.contiguous() for x in views), **options))


def test_map_offsets_past_32_bits_are_served():
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    rows, keys = (1 << 31) // 1024 + 5, 1024
    map_s = torch.zeros(1, 1, rows, keys, dtype=torch.bfloat16, device="cuda")
    map_s[..., -3:, :].normal_()
    map_t = map_s.roll(1, dims=-1)
    made = attention_map_kl(map_s, map_t, inputs="scores", backend="cuda", reduction="none")
    last = attention_map_kl(
        map_s[..., -3:, :], map_t[..., -3:, :], inputs="scores", backend="cuda", reduction="none"
    )
    assert torch.equal(made[..., -3:], last)
    assert torch.count_nonzero(made[..., :-3]) == 0


def test_map_captured_in_a_cuda_graph():
    both = maps(2, 2, 64, 128, inputs="scores", dtype=torch.bfloat16)
    both[0].requires_grad_()

    def step():
        return torch.autograd.grad(
            attention_map_kl(*both, inputs="scores", backend="cuda"), both[0]
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        both[0].normal_()
    graph.replay()
    assert torch.equal(captured[0], step()[0])


# CKA: sides "tiles" (many problems) and "gram" (few, or all layer pairs)


def layers(problems, n, widths, dtype, mean=0.0):
    shared = torch.randn(problems, n, 5, device="cuda")
    made = []
    for d in widths:
        x = shared @ torch.randn(5, d, device="cuda") + torch.randn(problems, n, d, device="cuda")
        x[..., :2] += mean
        made.append(x.to(dtype))
    return made


def cka_outcome(function, student, teacher, backend, dtype=None, **options):
    both = [
        [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in xs]
        for xs in (student, teacher)
    ]
    if backend == "cuda":
        options["backend"] = "cuda"
    else:
        function = getattr(reference, function.__name__)
    value = function(*both, teacher_grad=True, **options)
    upstream = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype, device="cuda")
    value.backward(upstream.view_as(value))
    return [value.detach().double(), *(x.grad.double() for xs in both for x in xs)]


def cka_close(function, student, teacher, **options):
    """Features are rounded once more after they are centred, and so are the gradients."""
    made = cka_outcome(function, student, teacher, "cuda", **options)
    truth = cka_outcome(function, student, teacher, "reference", torch.float64, **options)
    eps = torch.finfo(student[0].dtype).eps
    for mine, true in zip(made, truth, strict=True):
        assert (mine - true).abs().max() <= 1.5 * eps * true.abs().max().clamp(min=1e-30)


@dtypes
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("problems", [3, 150])
@pytest.mark.parametrize(
    "n, widths",
    [(6, (33, 35)), (17, (70, 33)), (32, (64, 96)), (33, (72, 64)), (64, (136, 128)),
     (100, (136, 130)), (127, (165, 136)), (128, (768, 768)), (128, (264, 136))],
    ids=str,
)  # fmt: skip
def test_cka_and_gradients_equal_the_reference(n, widths, problems, masked, estimator, dtype):
    mask = None
    if masked:
        mask = torch.rand(problems, n, device="cuda") < 0.7
        mask[:, 1:6] = True
        mask[:, 0] = False
    x, y = layers(problems, n, widths, dtype, mean=300.0)
    cka_close(cka, [x], [y], mask=mask, estimator=estimator)


@dtypes
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_every_branch_of_the_cka_kernels(estimator, dtype):
    """The fewest cases that run every line, for tools that take long: make gpu-sanitize."""
    for problems, n, widths in ((2, 20, (40, 35)), (130, 60, (96, 70)), (130, 100, (200, 130))):
        mask = torch.rand(problems, n, device="cuda") < 0.7
        mask[:, 1:6] = True
        x, y = layers(problems, n, widths, dtype)
        cka_close(cka, [x], [y], mask=mask, estimator=estimator)
    cka_close(cka, *[[x] for x in layers(2, 40, (5000, 3333), dtype)], estimator=estimator)


@dtypes
def test_cka_matrix_equals_the_reference(dtype):
    xs, ys = (layers(2, 70, widths, dtype) for widths in ((96, 80, 72), (104, 90)))
    cka_close(cka_matrix, xs, ys, estimator="unbiased")


@dtypes
def test_cka_of_thirty_pairs_spans_two_launches(dtype):
    xs, ys = (layers(8, 40, [64] * 30, dtype) for _ in range(2))
    cka_close(cka, xs, ys)


@dtypes
@pytest.mark.parametrize("problems", [1, 200])
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_cka_of_equal_features_is_exactly_one_and_of_equal_rows_zero(estimator, problems, dtype):
    (x,) = layers(problems, 100, (136,), dtype)
    options = {"estimator": estimator, "backend": "cuda"}
    assert (cka(x, x.clone(), **options) == 1).all()
    assert torch.count_nonzero(cka(torch.full_like(x, 300.0), x, **options)) == 0


@dtypes
@pytest.mark.parametrize("problems", [3, 150])
def test_masked_rows_reach_nothing_in_cka(problems, dtype):
    x, y = layers(problems, 50, (136, 70), dtype)
    mask = torch.rand(problems, 50, device="cuda") < 0.7
    clean = cka_outcome(cka, [x], [y], "cuda", mask=mask)
    x[~mask], y[~mask] = math.nan, math.inf
    dirty = cka_outcome(cka, [x], [y], "cuda", mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(torch.count_nonzero(g[~mask]) == 0 for g in dirty[1:])


@pytest.mark.parametrize("problems, d", [(1, 98304), (150, 768)])
def test_cka_gradient_is_the_same_bit_for_bit_each_time(problems, d):
    x, y = layers(problems, 64, (d, d), torch.bfloat16)
    first, second = (cka_outcome(cka, [x], [y], "cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("problems, d", [(2, 9000), (150, 136)])
def test_cka_captured_in_a_cuda_graph(problems, d):
    x, y = layers(problems, 64, (d, d), torch.bfloat16)
    x.requires_grad_()

    def step():
        return torch.autograd.grad(cka(x, y, backend="cuda").sum(), x)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    assert torch.equal(captured, step())


# Layer projection


def states(count, *shape, dtype=torch.bfloat16):
    common = torch.randn(shape, device="cuda")
    return [((common + torch.randn(shape, device="cuda")) / 2).to(dtype) for _ in range(count)]


def projection_outcome(student, teacher, backend, dtype=None, wanted="both", **options):
    """What an operator returns, and the gradients of the sides `wanted`, in float64."""
    sides = [
        [x.detach().clone().to(dtype or x.dtype) for x in layers] for layers in (student, teacher)
    ]
    leaves = [
        x.requires_grad_()
        for side, layers in zip(("student", "teacher"), sides, strict=True)
        for x in layers
        if wanted in (side, "both")
    ]
    if "objective" in options:
        function, reduction = layer_projection_loss, {"reduction": "none"}
    else:
        function, reduction = layer_projection, {}
    if backend == "cuda":
        options["backend"] = "cuda"
    else:
        function = getattr(reference, function.__name__)
    made = function(*sides, **reduction, **options)
    values = [made] if isinstance(made, torch.Tensor) else [*made[0], made[1]]
    upstream = [
        torch.linspace(0.5, 1.5, x.numel(), device="cuda")
        .view(x.shape)
        .to(student[0].dtype)
        .to(x.dtype)
        for x in values
    ]
    grads = torch.autograd.grad(values, leaves, upstream)
    return [x.detach().double() for x in (*values, *grads)]


def projection_close(student, teacher, **options):
    """Errors at most twice those of float32 arithmetic, plus the rounding of what is written."""
    made = projection_outcome(student, teacher, "cuda", **options)
    truth = projection_outcome(student, teacher, "reference", torch.float64, **options)
    single = projection_outcome(student, teacher, "reference", torch.float32, **options)
    eps = max(torch.finfo(student[0].dtype).eps, 4e-6)
    for mine, true, its in zip(made, truth, single, strict=True):
        rounding = 1e-5 if mine is made[0] and "objective" in options else eps
        size = true.abs().max().clamp(min=1e-6)
        assert (mine - true).abs().max() <= 2 * (its - true).abs().max() + rounding * size


LOSSES = [
    {"objective": objective, "attend": attend}
    for objective in ("mse", "cosine", "kl")
    for attend in ("states", "losses")
]


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("options", [*LOSSES, {}], ids=str)
@pytest.mark.parametrize("wanted", ["both", "student", "teacher"])
@pytest.mark.parametrize(
    "many_s, many_t, d, tokens",
    [(2, 3, 3, 500), (6, 11, 16, 300), (3, 5, 17, 40), (6, 12, 768, 600), (9, 17, 136, 300),
     (1, 1, 129, 1), (64, 64, 40, 5), (6, 12, 8192, 20), (20, 50, 2000, 5)],
    ids=str,
)  # fmt: skip
def test_projection_equals_the_reference(many_s, many_t, d, tokens, wanted, options, dtype):
    layers = [states(many, 2, tokens, d, dtype=dtype) for many in (many_s, many_t)]
    mask = torch.rand(2, tokens, device="cuda") < 0.7
    mask[0, 0] = True
    projection_close(*layers, wanted=wanted, mask=mask, scale=d**-0.5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_every_branch_of_the_projection_kernels(dtype):
    for many_s, many_t, d in ((3, 4, 3), (3, 5, 16), (3, 5, 72), (9, 17, 75), (6, 12, 8192)):
        layers = [states(many, 2, 20, d, dtype=dtype) for many in (many_s, many_t)]
        mask = torch.rand(2, 20, device="cuda") < 0.7
        mask[0, 0] = True
        for options in (*LOSSES, {}):
            projection_close(*layers, mask=mask, scale=d**-0.5, **options)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@pytest.mark.parametrize("options", [*LOSSES, {}], ids=str)
@pytest.mark.parametrize("d", [5, 72, 768])
def test_masked_tokens_reach_nothing_in_projection(d, options, dtype):
    layers = [states(many, 2, 40, d, dtype=dtype) for many in (3, 5)]
    mask = torch.rand(2, 40, device="cuda") < 0.5
    clean = projection_outcome(*layers, "cuda", mask=mask, **options)
    for x in (*layers[0], *layers[1]):
        x[~mask] = math.nan
    dirty = projection_outcome(*layers, "cuda", mask=mask, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(torch.count_nonzero(x[~mask]) == 0 for x in dirty)


@pytest.mark.parametrize("d", [5, 64, 72])
def test_projection_of_strided_layers_equals_that_of_copies(d):
    layers = [states(many, 4, 5, d + 3) for many in (3, 4)]
    for view in (
        lambda x: x[..., 1 : d + 1],
        lambda x: x.transpose(0, 1)[..., :d],
        lambda x: x[:, 0, :d],
    ):
        views = [[view(x) for x in side] for side in layers]
        dense = [[x.contiguous() for x in side] for side in views]
        options = {"reduction": "none", "backend": "cuda"}
        made, plain = (layer_projection_loss(*sides, **options) for sides in (views, dense))
        assert torch.equal(made, plain)


@pytest.mark.parametrize("d", [3, 768])
def test_projection_of_offsets_past_32_bits_is_served(d):
    tokens = (1 << 31) // d + 5
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    x, y = (torch.zeros(1, tokens, d, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    x[:, -3:].normal_()
    y[:, -3:].normal_()
    x.requires_grad_()
    rows = layer_projection_loss([x], [y, y], reduction="none", backend="cuda")
    (gradient,) = torch.autograd.grad(rows.sum(), x)
    last = x.detach()[:, -3:].clone().requires_grad_()
    alone = layer_projection_loss([last], [y[:, -3:], y[:, -3:]], reduction="none", backend="cuda")
    assert torch.equal(rows[:, -3:], alone)
    assert torch.equal(gradient[:, -3:], torch.autograd.grad(alone.sum(), last)[0])
    assert torch.count_nonzero(rows[:, :-3]) == 0


@pytest.mark.parametrize("d", [3, 768])
def test_projection_is_the_same_bit_for_bit_each_time(d):
    layers = [states(many, 8, 500, d) for many in (6, 12)]
    first, second = (
        projection_outcome(*layers, "cuda", objective="mse", scale=d**-0.5) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("d", [3, 768])
def test_projection_captured_in_a_cuda_graph(d):
    xs, ys = (states(many, 2, 64, d) for many in (2, 3))
    xs[0].requires_grad_()

    def step():
        return torch.autograd.grad(layer_projection_loss(xs, ys, backend="cuda"), xs[0])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        xs[0].normal_()
    graph.replay()
    assert torch.equal(captured[0], step()[0])
