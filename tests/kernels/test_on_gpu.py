"""backend="triton" on a GPU: what its interpreter cannot show. Graphs, and tensors past 32 bits."""

import pytest
import torch

from kdfast.ops import attention_kl, attention_map_kl, cka, dispatch

pytestmark = pytest.mark.gpu
directions = pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
PAST_32_BITS = 1 << 31


@pytest.fixture(autouse=True)
def triton():
    reason = next(x.reason for x in dispatch.explain("attention_kl") if x.backend == "triton")
    if reason:
        pytest.skip(reason)


def needs_memory(gibibytes):
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory")


def four(b=2, h=2, n=70, d=64, dtype=torch.bfloat16):
    return [torch.randn(b, h, n, d, device="cuda").to(dtype) for _ in range(4)]


def results(inputs, **options):
    """Loss or rows, and the gradients of the student's queries and keys."""
    student = [x.detach().requires_grad_() for x in inputs[:2]]
    loss = attention_kl(*student, *inputs[2:], backend="triton", **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), student)]


def assert_replay_equals_eager(step, inputs, new):
    """`step` of `inputs`, captured and replayed after these have become `new`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x, values in zip(inputs, new, strict=True):
        x.copy_(values)
    graph.replay()
    for ours, theirs in zip(captured, step(), strict=True):
        assert torch.equal(ours, theirs)


@directions
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("n", [128, 300])  # gradients made in forward, and afterwards
def test_captured_in_a_cuda_graph(n, reduction, direction):
    mask = torch.ones(2, n, dtype=torch.bool, device="cuda")
    shorter = mask.clone()
    shorter[1, n // 2 :] = False
    inputs, new = four(n=n), four(n=n)
    options = {"attention_mask": mask, "reduction": reduction, "direction": direction}

    def step():
        return results(inputs, **options)

    assert_replay_equals_eager(step, [*inputs, mask], [*new, shorter])


@directions
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
def test_map_captured_in_a_cuda_graph(inputs, direction):
    def maps():
        scores = torch.randn(2, 2, 3, 64, 100, device="cuda")
        return list((scores if inputs == "scores" else scores.softmax(-1)).bfloat16())

    both = maps()

    def step():
        map_s = both[0].detach().requires_grad_()
        loss = attention_map_kl(
            map_s, both[1], inputs=inputs, direction=direction, backend="triton"
        )
        return [loss.detach(), *torch.autograd.grad(loss, map_s)]

    assert_replay_equals_eager(step, both, maps())


@directions
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_strides_past_32_bits_are_served(reduction, direction):
    needs_memory(6)
    small = four(b=2, h=2, n=100)
    elements = small[0].numel()
    memory = torch.empty(PAST_32_BITS + elements, dtype=torch.bfloat16, device="cuda")
    token = PAST_32_BITS // 99 // 16 * 16 + 16
    far = {
        "batch": (PAST_32_BITS, 6400, 64, 1),
        "heads": (6400, PAST_32_BITS, 64, 1),
        "tokens": (64, 128, token, 1),
    }
    options = {"reduction": reduction, "direction": direction, "causal": True}
    expected = results(small, **options)
    for name, strides in far.items():
        for index in range(4):
            inputs = list(small)
            inputs[index] = memory.as_strided(small[0].shape, strides).copy_(small[index])
            for ours, theirs in zip(results(inputs, **options), expected, strict=True):
                assert torch.equal(ours, theirs), (name, index)


@pytest.mark.parametrize("reduction", ["sum", "none"])  # gradients made in forward, and afterwards
def test_gradients_past_32_bits_are_written(reduction):
    needs_memory(56 if reduction == "sum" else 32)
    heads, n, d = 16, 128, 64
    batch = PAST_32_BITS // (heads * n * d) + 2
    teacher = four(1, heads, n, d)[:2]
    student = [
        torch.empty(batch, heads, n, d, dtype=torch.bfloat16, device="cuda").normal_()
        for _ in range(2)
    ]
    mask = torch.ones(batch, n, dtype=torch.bool, device="cuda")
    mask[:, 100:] = False
    everything = [*student, *(x.expand(batch, -1, -1, -1) for x in teacher)]
    found = results(everything, reduction=reduction, attention_mask=mask)
    ends = [0, 1, -3, -2, -1]
    alone = results([x[ends] for x in everything], reduction=reduction, attention_mask=mask[ends])
    for ours, theirs in zip(found[1:], alone[1:], strict=True):
        assert torch.equal(ours[ends], theirs)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_batches_past_65535_are_served(reduction):
    batch, n = 65537, 20
    inputs = four(batch, 1, n, 16)
    mask = torch.rand(batch, n, device="cuda") < 0.7
    options = {"reduction": reduction, "window": 5}
    found = results(inputs, attention_mask=mask, **options)
    alone = results([x[-2:] for x in inputs], attention_mask=mask[-2:], **options)
    for ours, theirs in zip(found[1:], alone[1:], strict=True):
        assert torch.equal(ours[-2:], theirs)


@directions
@pytest.mark.parametrize("inputs", ["probabilities", "scores"])
def test_maps_past_32_bits_equal_the_reference_on_sampled_rows(inputs, direction):
    needs_memory(24)
    n = 46400
    assert n * n > PAST_32_BITS
    map_s, map_t = (torch.empty(1, 1, n, n, dtype=torch.bfloat16, device="cuda") for _ in "st")
    for x in (map_s, map_t):
        x.normal_()
        if inputs == "probabilities":  # by parts: in float32 the whole would take 8 GiB more
            for part in x.split(4096, dim=2):
                part.copy_(part.float().softmax(-1))
    sampled = [0, 1, PAST_32_BITS // n, PAST_32_BITS // n + 1, n - 1]
    few = [x[:, :, sampled].double() for x in (map_s, map_t)]
    options = {"inputs": inputs, "direction": direction, "reduction": "none"}

    def rows_and_gradient(map_s, map_t, backend):
        map_s.requires_grad_()
        rows = attention_map_kl(map_s, map_t, backend=backend, **options)
        (gradient,) = torch.autograd.grad(rows, map_s, torch.full_like(rows, 3.0))
        return rows.detach(), gradient

    rows, gradient = rows_and_gradient(map_s, map_t, "triton")
    expected_rows, expected_gradient = rows_and_gradient(*few, "reference")
    torch.testing.assert_close(rows[:, :, sampled].double(), expected_rows, rtol=1e-4, atol=1e-6)
    found, eps = gradient[:, :, sampled].double(), torch.finfo(torch.bfloat16).eps
    floor = eps * expected_gradient.abs().mean().item()
    torch.testing.assert_close(found, expected_gradient, rtol=eps, atol=floor)


def test_more_map_rows_than_32_bits_count_are_served():
    needs_memory(64)
    count = PAST_32_BITS + 5
    map_s = torch.full((1, 1, count, 1), 0.5, dtype=torch.bfloat16, device="cuda")
    map_s[..., -1, :] = 0.25
    map_t = torch.ones((), dtype=torch.bfloat16, device="cuda").expand(map_s.shape)
    rows = attention_map_kl(map_s, map_t, reduction="none", backend="triton").flatten()
    found = torch.stack([*rows[:-1].aminmax(), rows[-1]]).cpu()
    torch.testing.assert_close(found, torch.tensor([2.0, 2.0, 4.0]).log())


CKA_SHAPES = {  # by the side they take: problems, rows, width, options
    "tiles": (130, 64, 96, {}),
    "tiles, rbf": (2, 200, 48, {"kernel": "rbf"}),
    "gram": (2, 64, 4096, {}),
    "feature": (2, 700, 48, {}),
}


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("side", CKA_SHAPES)
def test_cka_captured_in_a_cuda_graph(side, estimator):
    problems, n, d, options = CKA_SHAPES[side]
    mask = torch.ones(problems, n, dtype=torch.bool, device="cuda")
    shorter = mask.clone()
    shorter[1, n // 2 :] = False

    def features():
        return [torch.randn(problems, n, d, device="cuda").bfloat16() for _ in "st"]

    both = features()

    def step():
        x_s = both[0].detach().requires_grad_()
        value = cka(x_s, both[1], mask=mask, estimator=estimator, backend="triton", **options)
        return [value.detach(), *torch.autograd.grad(value.sum(), x_s)]

    assert_replay_equals_eager(step, [*both, mask], [*features(), shorter])


@pytest.mark.parametrize("side", CKA_SHAPES)
def test_features_past_32_bits_are_served(side):
    needs_memory(6)
    problems, n, d, options = CKA_SHAPES[side]
    small = [torch.randn(problems, n, d, device="cuda").bfloat16() for _ in "st"]
    memory = torch.empty(PAST_32_BITS + small[0].numel(), dtype=torch.bfloat16, device="cuda")
    far = {
        "problems": (PAST_32_BITS // (problems - 1) // 16 * 16, d, 1),
        "rows": (d, PAST_32_BITS // (n - 1) // 16 * 16, 1),
    }

    def value_and_gradient(x_s, x_t):
        x_s = x_s.detach().requires_grad_()
        value = cka(x_s, x_t, backend="triton", **options)
        return [value.detach(), *torch.autograd.grad(value.sum(), x_s)]

    expected = value_and_gradient(*small)
    for name, strides in far.items():
        for index in range(2):
            inputs = list(small)
            inputs[index] = memory.as_strided(small[0].shape, strides).copy_(small[index])
            for ours, theirs in zip(value_and_gradient(*inputs), expected, strict=True):
                assert torch.equal(ours, theirs), (name, index)
