"""`kdfast doctor`: what is here, which backend serves each operator and why not the others, and
whether they compute what they should."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import ops
from kdfast.errors import BackendError
from kdfast.ops import dispatch, library

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Largest error of a result or gradient against float64, relative to its largest entry.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def operators() -> list[str]:
    return list(dict.fromkeys(operator for operator, _ in dispatch.KERNELS))


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# What is here


def report() -> dict[str, Any]:
    """Versions, machine, compiled libraries, and the backends of every operator."""
    compiler = next(filter(None, map(_version_of, _compilers())), None)
    cuda = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    nvcc = _version_of(os.path.join(cuda, "bin", "nvcc")) or _version_of("nvcc")
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory": properties.total_memory,
            }
        )
    return {
        "versions": {
            "kdfast": version("kdfast"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "transformers": version("transformers"),
            "compiler": compiler,
            "nvcc": nvcc,
        },
        "cpu": {
            "model": _cpu_model(),
            "threads": torch.get_num_threads(),
            "instruction_set": _instruction_set(),
        },
        "gpus": gpus,
        "libraries": {
            f"kdfast/{name}": file.name if (file := library.compiled_library(backend)) else None
            for backend, name in library.COMPILED.items()
        },
        "operators": {operator: _backends(operator) for operator in operators()},
    }


def _backends(operator: str) -> dict[str, Any]:
    found = ops.explain(operator)
    here = {x.backend for x in found if x.available}
    return {
        "auto": {
            device: next(name for name in dispatch.AUTO[device] if name in here)
            for device in devices()
        },
        "backends": {
            x.backend: {"available": x.available, "reason": x.reason or None} for x in found
        },
    }


def _compilers() -> list[str]:
    return [*filter(None, [os.environ.get("CXX")]), "g++", "clang++", "c++"]


def _version_of(program: str) -> str | None:
    """`g++ 12.2.0`, or None where there is no such program."""
    file = shutil.which(program.split()[0]) if program.split() else None
    if file is None:
        return None
    try:
        said = subprocess.run([file, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    number = re.search(r"release (\S+),|(\d+\.\d+\.\d+)", said.stdout)
    name = Path(file).name
    return f"{name} {next(filter(None, number.groups()))}" if number else name


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _instruction_set() -> str | None:
    """The one whose code the cpp library runs here."""
    file = library.compiled_library("cpp")
    if file is None:
        return None
    try:
        function = ctypes.CDLL(str(file)).kdfast_cpu_isa
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_char_p
    said: bytes | None = function()
    return said.decode() if said else None


def text(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    rows = [(name, value or "not found") for name, value in found["versions"].items()]
    cpu = found["cpu"]
    threads = f"{cpu['threads']} thread{'s' if cpu['threads'] > 1 else ''}"
    used = f", cpp uses {cpu['instruction_set']}" if cpu["instruction_set"] else ""
    rows.append(("cpu", f"{cpu['model']}, {threads}{used}"))
    for gpu in found["gpus"]:
        memory = f"{gpu['memory'] / 2**30:.0f} GiB"
        rows.append(("gpu", f"{gpu['name']}, capability {gpu['capability']}, {memory}"))
    if not found["gpus"]:
        rows.append(("gpu", "none that PyTorch sees"))
    for (name, file), needed in zip(found["libraries"].items(), ("compiler", "nvcc"), strict=True):
        program = found["versions"][needed]
        remedy = f"{program} can: pip install --no-build-isolation kdfast"
        missing = {"compiler": "no C++ compiler (g++, clang++ or CXX)", "nvcc": "no nvcc"}[needed]
        rows.append((name, file or f"not built; {remedy if program else missing}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]

    # Operators in the same state are shown together.
    alike: dict[str, list[str]] = {}
    for operator, entry in found["operators"].items():
        picked = ", ".join(f"{backend} on {device}" for device, backend in entry["auto"].items())
        state = [f"  auto picks {picked}"]
        for backend, kernel in entry["backends"].items():
            answer = _answer(backend, kernel, entry["auto"]).replace(f" for {operator}", "")
            state.append(f"  {backend:{max(map(len, dispatch.BACKENDS))}}  {answer}")
        alike.setdefault("\n".join(state), []).append(operator)
    for state_text, names in alike.items():
        lines += ["", ", ".join(names), state_text]
    return "\n".join(lines)


def _answer(backend: str, kernel: dict[str, Any], auto: dict[str, str]) -> str:
    """Whether it can be used, and why auto does not."""
    if not kernel["available"]:
        return f"no: {kernel['reason']}"
    if backend in auto.values():
        return "yes"
    before = [first for device, first in auto.items() if backend in dispatch.AUTO[device]]
    if before:
        return f"yes, where {' or '.join(before)} cannot serve a call"
    return "yes, asked for by name; not in the order of auto until it has been measured"


# Whether it is right


class Check(NamedTuple):
    operator: str
    backend: str
    device: str
    dtype: str
    passed: bool
    detail: str  # the largest relative error, or what was raised
    skipped: bool = False

    def __str__(self) -> str:
        state = "SKIP" if self.skipped else "PASS" if self.passed else "FAIL"
        return (
            f"{state}  {self.operator:21}  {self.backend:9}  {self.device:4}  {self.dtype:8}  "
            f"{self.detail}"
        )


def check() -> Iterator[Check]:
    """Every operator on every available backend and dtype against the reference in float64."""
    for operator in operators():
        for backend, available, _ in ops.explain(operator):
            # Under its interpreter Triton runs on a CPU, where bfloat16 is not right.
            interpreted = backend == "triton" and library.interpreting()
            for device in devices() if available else ():
                own = "cpu" if interpreted else library.DEVICE.get(backend, device)
                for dtype in DTYPES if device == own else ():
                    if dtype != torch.bfloat16 or not interpreted:
                        yield _checked(operator, backend, device, dtype)


def _checked(operator: str, backend: str, device: str, dtype: torch.dtype) -> Check:
    name = str(dtype).removeprefix("torch.")
    where = (operator, backend, device, name)
    worst, worst_case = 0.0, ""
    refused: dict[str, str] = {}
    cases = _cases(operator, device)
    try:
        for case, (tensors, learned, options) in cases.items():
            tensors = {key: _map(lambda x: x.to(dtype), value) for key, value in tensors.items()}
            exact = {key: _map(lambda x: x.double(), value) for key, value in tensors.items()}
            right = _outputs_and_gradients(operator, "reference", exact, learned, options)
            try:
                found = _outputs_and_gradients(operator, backend, tensors, learned, options)
            except BackendError as refusal:
                refused[case] = refusal.reasons[backend]
                continue
            for x, x64 in zip(found, right, strict=True):
                scale = x64.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
                error = float((x.double() - x64).abs().max() / scale)
                if error > worst or error != error:  # and NaN stays
                    worst, worst_case = error, case
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Check(*where, passed=False, detail=f"{type(error).__name__}: {lines[0]}")
    if len(refused) == len(cases):
        return Check(*where, passed=True, detail=next(iter(refused.values())), skipped=True)
    limit = TOLERANCE[dtype]
    passed = worst <= limit
    detail = f"error {worst:.1e}"
    if not passed:
        detail += f" ({worst_case or 'default'}), should be <= {limit:.0e}"
    if refused:
        detail += f"; not served: {', '.join(map(repr, refused))}"
    return Check(*where, passed=passed, detail=detail)


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return [function(x) for x in value] if isinstance(value, list) else function(value)


def _outputs_and_gradients(
    operator: str,
    backend: str,
    tensors: dict[str, Any],
    learned: tuple[str, ...],
    options: dict[str, Any],
) -> list[Tensor]:
    leaves: list[Tensor] = []
    inputs = {}
    for name, value in tensors.items():
        inputs[name] = _map(lambda x: x.detach(), value)
        if name in learned:
            inputs[name] = _map(lambda x: x.requires_grad_(), inputs[name])
            leaves += inputs[name] if isinstance(inputs[name], list) else [inputs[name]]
    result = getattr(ops, operator)(**inputs, **options, backend=backend)
    outputs: list[Tensor] = []
    for part in result if isinstance(result, tuple) else (result,):
        outputs += part if isinstance(part, list) else [part]
    # An upstream gradient other than 1, and other for each entry.
    graded = [x for x in outputs if x.requires_grad]  # a teacher's own terms have none
    upstream = [
        torch.linspace(0.5, 1.5, x.numel(), device=x.device).view(x.shape).to(x.dtype)
        for x in graded
    ]
    gradients = torch.autograd.grad(graded, leaves, upstream)
    return [x.detach() for x in (*outputs, *gradients)]


Case = tuple[dict[str, Any], tuple[str, ...], dict[str, Any]]


def _cases(operator: str, device: str) -> dict[str, Case]:
    """Tensors, the names of those that get a gradient, and options; by what is special."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    if operator == "attention_kl":
        tensors: dict[str, Any] = {
            "query_s": normal(2, 4, 65, 32),
            "key_s": normal(2, 2, 65, 32),
            "query_t": normal(2, 4, 65, 48),
            "key_t": normal(2, 4, 65, 48),
        }
        mask = torch.arange(65, device=device) < torch.tensor([[65], [30]], device=device)
        learned: tuple[str, ...] = ("query_s", "key_s")
        options: dict[str, dict[str, Any]] = {
            "": {},
            "no reduction": {"reduction": "none"},
            "causal": {"causal": True},
            "padded, reverse": {"attention_mask": mask, "direction": "reverse"},
            "window, js": {"window": 9, "direction": "js", "reduction": "sum"},
        }
    elif operator == "attention_map_kl":
        scores = {"map_s": normal(2, 3, 33, 65), "map_t": normal(2, 3, 33, 65)}
        return {
            f"{kind}, {direction}": (
                {k: x if kind == "scores" else x.softmax(-1) for k, x in scores.items()},
                ("map_s",),
                {"inputs": kind, "direction": direction, "reduction": "none"},
            )
            for kind in ("scores", "probabilities")
            for direction in ("forward", "reverse", "js")
        }
    elif operator in ("hsic", "cka", "gram_distance", "procrustes_distance"):
        first, second = ("x", "y") if operator == "hsic" else ("x_s", "x_t")
        tensors = {first: normal(2, 40, 16) + 1, second: normal(2, 40, 24)}
        learned, options = (first,), _alignments(operator)
    elif operator in ("cka_matrix", "hsic_matrix"):
        tensors = {
            "layers_s": [normal(2, 40, d) + 1 for d in (16, 24)],
            "layers_t": [normal(2, 40, d) for d in (16, 8, 24)],
        }
        learned, options = ("layers_s",), _alignments(operator)
    else:
        layers = {
            "layers_s": [normal(3, 20, 16) for _ in range(2)],
            "layers_t": [normal(3, 20, 16) for _ in range(3)],
        }
        tensors, learned, options = layers, ("layers_s",), {"": {}}
        if operator == "layer_projection":
            options = {"": {"scale": 0.25}}
        elif operator == "layer_projection_loss":
            options = {x: {"objective": x, "scale": 0.25} for x in ("mse", "cosine", "kl")}
    return {case: (tensors, learned, chosen) for case, chosen in options.items()}


def _alignments(operator: str) -> dict[str, dict[str, Any]]:
    if operator == "procrustes_distance":
        return {"": {}}
    if operator == "gram_distance":
        return {kernel: {"kernel": kernel} for kernel in ("linear", "rbf")}
    return {
        f"{kernel}, {estimator}": {"kernel": kernel, "estimator": estimator}
        for kernel in ("linear", "rbf")
        for estimator in ("biased", "unbiased")
    }
