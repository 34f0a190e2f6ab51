import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from kdfast.ops import dispatch, library


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The shapes here are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_start():
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # a test's compiled graphs would count for the next
        torch.compiler.reset()


@pytest.fixture(params=["reference", "cpp"])
def backend_on_cpu(request, monkeypatch):
    """What `auto` picks on the CPU; the same tests hold for both."""
    if request.param == "reference":
        monkeypatch.setitem(dispatch.AUTO, "cpu", ("reference",))
    elif reason := dispatch.explain(getattr(request.module, "OPERATOR", "attention_kl"))[1].reason:
        pytest.skip(reason)


# The ladders of the kernels: their modules say which OPERATOR is asked whether a kernel can run
# here, and which tests are INTERPRETED in `make test`.


KERNELS = [
    pytest.param(("cpp", "cpu"), id="cpp"),
    pytest.param(("triton", "cpu"), id="triton-interpreted"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cuda"), id="cuda", marks=pytest.mark.gpu),
    pytest.param(("cuda", "cpu"), id="cuda-simulated", marks=pytest.mark.exhaustive),
]


@pytest.fixture(scope="session")
def simulation(tmp_path_factory):
    file = Path(__file__).parents[1] / "csrc" / "simulation.py"
    spec = importlib.util.spec_from_file_location("simulation", file)
    module = sys.modules["simulation"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.nvcc() is None:
        pytest.skip("nvcc is not installed")
    module.load(tmp_path_factory.mktemp("simulation"))
    return module


@pytest.fixture(params=KERNELS)
def kernel(request):
    operator = request.module.OPERATOR
    backend, device = request.param
    if (backend, device) == ("cuda", "cpu"):
        simulation = request.getfixturevalue("simulation")
        if operator not in simulation.OPERATORS:
            pytest.skip(f"{operator} is not simulated")
        simulation.serve(request.getfixturevalue("monkeypatch"))
    quick = request.function.__name__ in request.module.INTERPRETED
    if (backend, device) == ("triton", "cpu") and not quick and request.config.option.markexpr:
        pytest.skip("part of make test-all")
    reason = dispatch.explain(operator)[dispatch.BACKENDS.index(backend)].reason
    if reason:
        pytest.skip(reason)
    if (backend, device) == ("triton", "cpu") and not library.interpreting():
        pytest.skip("Triton compiles here; its interpreter is not on")
    return request.param


@pytest.fixture
def memory_filled_with_nan():
    """Deterministic mode fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unless(request, kernel):
    """Leaves a case to `make test-all`, except for the compiled CPU library, which is quick: the
    interpreter is slow, and a GPU compiles each combination of options for seconds."""

    def leave(condition):
        everything = not request.config.option.markexpr and kernel != ("cuda", "cpu")
        if kernel[0] != "cpp" and not condition and not everything:
            pytest.skip("part of make test-all")

    return leave
