"""The CUDA kernels, as far as a machine without a GPU can tell.

Every source is compiled for both architectures and must neither spill nor serialise its products.
The kernels themselves then run on the CPU, in a simulation of a block of threads (simulation.h).
"""

import importlib
import math
import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from kdfast import reference
from kdfast.ops import cka

CKA = importlib.import_module("kdfast.ops.cka")
KERNELS = importlib.import_module("kdfast.ops.attention_kl")  # the name in kdfast.ops is a function
ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = [pytest.param("80", marks=pytest.mark.triton), "90a"]
SIMULATED = ("attention_kl", "attention_map_kl")
# wgmma that waits for itself: for want of registers, or because other code touches them.
SERIALISED = re.compile(r"\(C75(?!19)\d\d\)|wgmma.*serialized")


SIMULATION = runpy.run_path(str(Path(__file__).with_name("simulation.py")))
BUILD = SIMULATION["BUILD"]
nvcc = BUILD["nvcc"]
needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc is not installed")


def compiled(source, architecture, folder):
    include = Path(torch.__file__).parent / "include"
    command = [
        nvcc(), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-DUSE_CUDA",
        "-DKDFAST_SM_90A", BUILD["STABLE_ABI"], f"-I{include}",
        f"-I{include}/torch/csrc/api/include", f"-I{ROOT / 'csrc'}",
        "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
        "-cubin", str(source), "-o", str(folder / f"{source.name}.{architecture}"),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compilations(request, tmp_path_factory):
    """Every source for every chosen architecture, compiled once, two at a time."""
    folder = tmp_path_factory.mktemp("cubin")
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    parameters = [x.params for x in chosen if x is not None and "source" in x.params]
    keys = [(x["source"], x["architecture"]) for x in parameters]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda key: compiled(*key, folder), keys))
    return dict(zip(keys, results, strict=True))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_source_compiles_without_spills_or_serialised_products(compilations, source, architecture):
    result = compilations[source, architecture]
    assert result.returncode == 0, result.stderr
    usage = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        result.stderr,
    )
    assert usage
    assert all(numbers == ("0", "0", "0") for numbers in usage), result.stderr
    assert not SERIALISED.search(result.stderr), result.stderr


@pytest.mark.parametrize(
    "options, reason",
    [
        ({}, None),
        ({"relation_heads": 2}, None),
        ({"relation_heads": 1}, "width 256"),
        ({"relation_heads": 64}, "width 4"),
        ({"temperature": 1e6}, "scale / temperature"),  # also that of the default scale
        ({"temperature": 1e-8}, "scale / temperature"),
        ({"temperature": 1e6, "scale_s": 1e5, "scale_t": 1e5}, None),
        ({"direction": "js"}, "js"),
    ],
    ids=str,
)
def test_attention_kl_says_what_it_refuses(monkeypatch, options, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    inputs = dict.fromkeys(("query_s", "key_s", "query_t", "key_t"))
    for name in inputs:
        inputs[name] = torch.zeros(1, 4, 5, 64, dtype=torch.bfloat16)[..., 1:, :]
    defaults = {"direction": "forward", "temperature": 1.0} | dict.fromkeys(
        ("cu_seqlens", "scale_s", "scale_t", "relation_heads", "match_heads")
    )
    refusal = KERNELS._refused_by_hopper(**inputs, **(defaults | options))
    assert refusal is None if reason is None else reason in refusal


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("operator", SIMULATED)
def test_simulated_kernels_equal_the_formula(operator, tmp_path):
    source, program = Path(__file__).with_name(f"{operator}.cpp"), tmp_path / operator
    command = [nvcc(), "-x", "c++", "-std=c++20", "-O2", "-Xcompiler", "-w", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


# CKA, whose entry points run in the simulation as well

BOTH = (torch.bfloat16, torch.float16)
SIDES = ("tiles", "gram")


@pytest.fixture(scope="module")
def simulated_cka(tmp_path_factory):
    if nvcc() is None:
        pytest.skip("nvcc is not installed")
    SIMULATION["load"](tmp_path_factory.mktemp("simulation"), ("cka",))


@pytest.fixture
def served(simulated_cka, monkeypatch):
    SIMULATION["serve"](monkeypatch)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


def layers(problems, n, widths, dtype, mean=0.0):
    shared = torch.randn(problems, n, 5)
    made = [shared @ torch.randn(5, d) + torch.randn(problems, n, d) for d in widths]
    for x in made:
        x[..., :2] += mean
    return [x.to(dtype) for x in made]


def outcome(student, teacher, side=None, matrix=False, dtype=None, **options):
    """Values and all gradients, in float64; of the kernels, or of the reference in `dtype`."""
    both = [
        [x.detach().clone().to(dtype or x.dtype).requires_grad_() for x in xs]
        for xs in (student, teacher)
    ]
    names = ("layers_s", "layers_t") if matrix else ("x_s", "x_t")
    options = {"mask": None, "estimator": "biased", "teacher_grad": True} | options
    arguments = dict(zip(names, both, strict=True)) | options
    name = "cka_matrix" if matrix else "cka"
    if side is None:
        value = getattr(reference, name)(**arguments)
    else:
        serve = CKA._serve_matrix if matrix else CKA._serve_cka
        value = serve(name, "cuda", side=side, kernel="linear", bandwidth=None, **arguments)
    value.backward(torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value))
    return [value.detach().double(), *(x.grad.double() for xs in both for x in xs)]


def close_to_reference(student, teacher, side, **options):
    """Features are rounded once more after they are centred, and so are the gradients."""
    made = outcome(student, teacher, side, **options)
    truth = outcome(student, teacher, dtype=torch.float64, **options)
    eps = torch.finfo(student[0].dtype).eps
    for mine, true in zip(made, truth, strict=True):
        assert (mine - true).abs().max() <= 1.5 * eps * true.abs().max().clamp(min=1e-30)


def partial_mask(problems, n):
    mask = torch.rand(problems, n) < 0.7
    mask[:, 1:6] = True
    mask[:, 0] = False
    return mask


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize(
    "n, widths, masked",
    [(6, (1, 3), False), (17, (70, 33), True), (33, (72, 64), False), (64, (136, 128), True),
     (100, (72, 130), True), (127, (65, 8), True), (128, (264, 136), False)],
    ids=str,
)  # fmt: skip
def test_simulated_cka_equals_the_reference(
    served, monkeypatch, n, widths, masked, estimator, dtype, side
):
    if estimator == "unbiased":  # copies land as late as they may, or else as early
        monkeypatch.setenv("KDFAST_SIMULATE_LATE", "1")
    x, y = layers(2, n, widths, dtype, mean=300.0)
    mask = partial_mask(2, n) if masked else None
    close_to_reference([x], [y], side, estimator=estimator, mask=mask)


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_simulated_pairs_and_matrices_equal_the_reference(served, estimator):
    options = {"estimator": estimator, "mask": partial_mask(2, 40)}
    xs, ys = (layers(2, 40, widths, torch.bfloat16) for widths in ((64, 70, 8), (24, 64, 130)))
    for side in SIDES:
        close_to_reference(xs, ys, side, **options)
    close_to_reference(xs[:2], ys, "gram", matrix=True, **options)


@pytest.mark.slow
def test_simulated_products_over_many_columns_are_divided_and_added_up(served):
    close_to_reference(*[[x] for x in layers(1, 40, (5000, 3333), torch.bfloat16)], "gram")


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_simulated_cka_of_equal_features_is_one_and_of_equal_rows_zero(served, estimator, side):
    x = layers(2, 100, (72,), torch.bfloat16)[0]
    options = {"estimator": estimator, "mask": partial_mask(2, 100)}
    assert (outcome([x], [x], side, **options)[0] == 1).all()
    for constant in (0.1, 300.0):
        made = outcome([torch.full_like(x, constant)], [x], side, **options)
        assert all(torch.count_nonzero(z) == 0 for z in made)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
def test_simulated_cka_takes_nothing_from_rows_that_are_masked(served, estimator, side):
    x, y = layers(3, 50, (72, 70), torch.float16)
    mask = partial_mask(3, 50)
    mask[1] = False
    mask[1, 7] = True
    clean = outcome([x], [y], side, estimator=estimator, mask=mask)
    x[~mask], y[~mask] = math.nan, math.inf
    dirty = outcome([x], [y], side, estimator=estimator, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert all(torch.count_nonzero(g[~mask]) == 0 for g in dirty[1:])
    assert dirty[0][0, 1] == 0 and all(torch.count_nonzero(g[1]) == 0 for g in dirty[1:])


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_of_a_valid_row_stays_in_its_problem_in_simulated_cka(served, bad, side):
    x, y = layers(3, 50, (72, 70), torch.bfloat16)
    x[1, 20, 3] = bad
    mask = partial_mask(3, 50)
    mask[1, 20] = True
    value, *gradients = outcome([x], [y], side, mask=mask)
    assert value.isnan().tolist() == [[False, True, False]]
    for gradient in gradients:
        assert gradient[1][mask[1]].isnan().all() and not gradient[[0, 2]].isnan().any()
        assert torch.count_nonzero(gradient[1][~mask[1]]) == 0


@pytest.mark.slow
def test_simulated_cka_of_strided_and_permuted_features(served):
    x, y = layers(3, 20, (72, 64), torch.bfloat16)
    wide = torch.nn.functional.pad(x, (1, 2))[..., 1:-2]
    turned = y.transpose(0, 1).contiguous().transpose(0, 1)
    for side in SIDES:
        made, plain = outcome([wide], [turned], side), outcome([x], [y], side)
        assert all(torch.equal(mine, its) for mine, its in zip(made, plain, strict=True))
    assert cka(x[:0], y[:0], backend="cuda").shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_simulated_kept_terms_of_a_teacher_change_nothing(served, side):
    xs, ys = ([z] for z in layers(2, 30, (64, 72), torch.bfloat16))
    options = {"kernel": "linear", "bandwidth": None, "estimator": "unbiased", "mask": None}
    terms = {}
    xs[0].requires_grad_()
    for _ in range(2):
        value = CKA._serve_cka("cka", "cuda", x_s=xs, x_t=ys, side=side, terms_t=terms, **options)
    whole = CKA._serve_cka("cka", "cuda", x_s=xs, x_t=ys, side=side, **options)
    assert torch.equal(value, whole)
    made, its = (torch.autograd.grad(z.sum(), xs[0])[0] for z in (value, whole))
    assert torch.equal(made, its)


# Layer projection, simulated as well: with tensor cores (up to 16 teachers, and more), without, and
# that of narrow layers

PROJECTION = importlib.import_module("kdfast.ops.layer_projection")
OBJECTIVES = ("mse", "cosine", "kl")
ATTENDS = ("states", "losses")
attends = pytest.mark.parametrize("attend", ATTENDS)
ALL = (torch.float32, *BOTH)
# Of bulk copies that land early and late, and of those of compute capability 8.0.
COPIES = {
    "early": {},
    "late": {"KDFAST_SIMULATE_LATE": "1"},
    "ampere": {"KDFAST_SIMULATE_AMPERE": "1", "KDFAST_SIMULATE_LATE": "1"},
}
OTHERS = [pytest.param(x, marks=pytest.mark.exhaustive) for x in ("early", "ampere")]
copies = pytest.mark.parametrize("copy", ["late", *OTHERS])
each_copy = pytest.mark.parametrize("copy", COPIES)


@pytest.fixture(scope="module")
def simulated_projection(tmp_path_factory):
    if nvcc() is None:
        pytest.skip("nvcc is not installed")
    SIMULATION["load"](tmp_path_factory.mktemp("simulation"), ("layer_projection",))


@pytest.fixture
def projecting(simulated_projection, monkeypatch):
    """Sets how copies land, too."""
    SIMULATION["serve"](monkeypatch)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN

    def set_copies(copy):
        for name, value in COPIES[copy].items():
            monkeypatch.setenv(name, value)

    yield set_copies
    torch.use_deterministic_algorithms(False)


def states(count, *shape, dtype=torch.bfloat16, mean=0.0):
    """Layers that have something in common, as those of one model do."""
    common = torch.randn(shape)
    return [((common + torch.randn(shape)) / 2 + mean).to(dtype) for _ in range(count)]


def projected(student, teacher, backend, *, project=False, wanted="both", dtype=None, **options):
    """What an operator returns, and the gradients of the layers of the sides `wanted`, in float64;
    of the kernels, or of the reference in `dtype`."""
    copies = [
        [x.detach().clone().to(dtype or x.dtype) for x in layers] for layers in (student, teacher)
    ]
    sides = zip(("student", "teacher"), copies, strict=True)
    chosen = [x for side, layers in sides if wanted in (side, "both") for x in layers]
    leaves = [x.requires_grad_() for x in chosen]
    layers = dict(zip(("layers_s", "layers_t"), copies, strict=True))
    options = {"scale": 1.0, "mask": None} | options
    if project:
        serve = PROJECTION._serve_projection
        result = (
            serve("cuda", **layers, **options)
            if backend == "cuda"
            else reference.layer_projection(**layers, **options)
        )
        values = [*result[0], result[1]]
    else:
        options = {"objective": "mse", "temperature": 1.0, "attend": "states"} | options
        options = {"reduction": "none"} | options
        value = (
            PROJECTION._serve_loss("cuda", **layers, **options)
            if backend == "cuda"
            else reference.layer_projection_loss(**layers, **options)
        )
        values = [value]
    upstream = [
        torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(student[0].dtype).to(x.dtype)
        for x in values
    ]
    grads = torch.autograd.grad(values, leaves, upstream)
    return [x.detach().double() for x in (*values, *grads)]


def projection_is_close(student, teacher, **options):
    """Errors at most twice those of float32 arithmetic, plus the rounding of what is written, and,
    where tensor cores mix, the sixteen digits of their coefficients."""
    made = projected(student, teacher, "cuda", **options)
    truth = projected(student, teacher, "reference", dtype=torch.float64, **options)
    single = projected(student, teacher, "reference", dtype=torch.float32, **options)
    written = torch.finfo(student[0].dtype).eps if student[0].dtype != torch.float32 else 4e-6
    for mine, true, its in zip(made, truth, single, strict=True):
        size = true.abs().max().clamp(min=1e-6)
        rounding = 4e-6 if mine is made[0] and not options.get("project") else written
        assert (mine - true).abs().max() <= 2 * (its - true).abs().max() + rounding * size


def some_tokens(*shape):
    mask = torch.rand(shape) < 0.7
    mask.view(-1)[:2] = torch.tensor([True, False])
    return mask


@pytest.mark.slow
@copies
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize(
    "many_s, many_t, d",
    [(2, 3, 3), (3, 5, 32), (6, 12, 136), (9, 17, 40), (1, 1, 129),
     pytest.param(3, 17, 16, marks=pytest.mark.exhaustive),
     pytest.param(2, 16, 200, marks=pytest.mark.exhaustive)],
    ids=str,
)  # fmt: skip
def test_simulated_projection_equals_the_reference(projecting, many_s, many_t, d, dtype, copy):
    projecting(copy)
    layers = [states(many, 2, 3, d, dtype=dtype) for many in (many_s, many_t)]
    options = {"mask": some_tokens(2, 3), "scale": d**-0.5}
    for attend in ATTENDS:
        for objective in OBJECTIVES:
            for wanted in ("both", "student", "teacher") if objective == "mse" else ("both",):
                projection_is_close(
                    *layers, attend=attend, objective=objective, temperature=1.5, wanted=wanted,
                    **options,
                )  # fmt: skip
    for wanted in ("both", "student", "teacher"):
        projection_is_close(*layers, project=True, wanted=wanted, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "many_s, many_t, d, tokens",
    [(3, 4, 768, 3), (6, 11, 3, 300),
     pytest.param(64, 64, 40, 1, marks=pytest.mark.exhaustive),
     pytest.param(64, 64, 16, 3, marks=pytest.mark.exhaustive),
     pytest.param(6, 12, 8192, 1, marks=pytest.mark.exhaustive),
     pytest.param(20, 50, 2000, 1, marks=pytest.mark.exhaustive)],
    ids=str,
)  # fmt: skip
@copies
def test_simulated_projection_of_many_layers_tokens_and_columns(
    projecting, many_s, many_t, d, tokens, dtype, copy
):
    projecting(copy)
    layers = [states(many, 1, tokens, d, dtype=dtype) for many in (many_s, many_t)]
    for attend, objective in (("states", "mse"), ("states", "kl"), ("losses", "cosine")):
        projection_is_close(*layers, attend=attend, objective=objective, scale=d**-0.5)
    projection_is_close(*layers, project=True, scale=d**-0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("d", [5, 72])
@attends
@pytest.mark.parametrize("objective", ["mse", "kl"])
def test_simulated_student_that_equals_its_teacher_has_no_loss_and_no_gradient(
    projecting, objective, attend, d, dtype
):
    (x,) = states(1, 3, 4, d, dtype=dtype, mean=3.0)
    for z in projected([x], [x], "cuda", objective=objective, attend=attend, wanted="student"):
        assert torch.count_nonzero(z) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("d", [5, pytest.param(40, marks=pytest.mark.exhaustive), 72])
@attends
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_simulated_projection_takes_nothing_from_masked_tokens(
    projecting, objective, attend, d, dtype
):
    layers = [states(many, 2, 4, d, dtype=dtype) for many in (3, 5)]
    mask = some_tokens(4, 2).T
    for options in ({"objective": objective, "attend": attend}, {"project": True}):
        clean = projected(*layers, "cuda", mask=mask, **options)
        marred = [[x.clone() for x in side] for side in layers]
        for side, bad in zip(marred, (math.nan, math.inf), strict=True):
            for x in side:
                x[~mask] = bad
        dirty = projected(*marred, "cuda", mask=mask, **options)
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
        assert all(torch.count_nonzero(z[~mask]) == 0 for z in dirty)


@pytest.mark.slow
@each_copy
def test_simulated_copies_of_rows_that_are_wide_and_come_at_any_time(projecting, copy):
    projecting(copy)
    layers = [states(many, 1, 5, 328, dtype=torch.float16) for many in (2, 3)]
    projection_is_close(*layers, scale=0.05)
    projection_is_close(*([x.float() for x in side] for side in layers), scale=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("d", [5, pytest.param(40, marks=pytest.mark.exhaustive), 72])
@attends
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nan_stays_in_its_token_in_simulated_projection(projecting, objective, attend, d, dtype):
    layers = [states(many, 2, 4, d, dtype=dtype) for many in (3, 5)]
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 2] = False
    good = projected(*layers, "cuda", objective=objective, attend=attend)
    for marred in (0, 3):  # the first student, which others are not; the first teacher
        copies = [x.clone() for side in layers for x in side]
        copies[marred][1, 2, d - 1] = math.nan
        bad = projected(copies[:3], copies[3:], "cuda", objective=objective, attend=attend)
        for mine, its in zip(bad, good, strict=True):
            assert torch.equal(mine[others], its[others])
        for i in range(3 if marred else 1):
            assert bad[0][1, 2, i].isnan() and bad[1 + i][1, 2].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("d", [5, 72])
@attends
def test_simulated_projection_of_zeros_and_of_saturated_scores_is_finite(
    projecting, attend, d, dtype
):
    zeros = [torch.zeros(2, 3, d, dtype=dtype)] * 3
    large = [100 * x for x in states(5, 2, 3, d, dtype=dtype)]
    for objective in OBJECTIVES:
        options = {"objective": objective, "attend": attend}
        rows, *gradients = projected(zeros[:1], zeros[1:], "cuda", **options)
        assert (rows == (objective == "cosine")).all()
        saturated = projected(large[:2], large[2:], "cuda", **options)
        assert all(z.isfinite().all() for z in (*gradients, *saturated))


@pytest.mark.slow
@pytest.mark.parametrize("d", [5, 64, 72])
def test_strides_change_nothing_in_simulated_projection(projecting, d):
    layers = [states(many, 4, 5, d + 3) for many in (3, 4)]
    for view in (
        lambda x: x[..., 1 : d + 1],
        lambda x: x.transpose(0, 1)[..., :d],
        lambda x: x[:, :1, :d].expand(-1, 3, -1),
    ):
        views = [[view(x) for x in side] for side in layers]
        for attend in ATTENDS:
            options = {"attend": attend, "reduction": "none", "objective": "mse"}
            options |= {"scale": 1.0, "temperature": 1.0, "mask": None}
            made, plain = (
                PROJECTION._serve_loss("cuda", layers_s=s, layers_t=t, **options)
                for s, t in (views, [[x.contiguous() for x in side] for side in views])
            )
            assert torch.equal(made, plain)
    empty = projected(*([x[:0] for x in side] for side in layers), "cuda")
    assert empty[0].shape == (0, 5, 3) and empty[1].shape == (0, 5, d + 3)
