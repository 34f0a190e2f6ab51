"""The kernels' operators in torch.library, and where their implementations come from.

Schemas are defined here and nowhere else: one operator per backend, because a second kernel under
the same name and dispatch key would silently replace the first. The compiled libraries register
their own implementations when they are loaded; those of Triton are Python functions.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

KERNEL_BACKENDS = ("cpp", "triton", "cuda")
COMPILED = {"cpp": "_cpu", "cuda": "_cuda"}
DEVICE = {"cpp": "cpu", "triton": "cuda", "cuda": "cuda"}

LIBRARY = torch.library.Library("kdfast", "FRAGMENT")


def define(
    name: str, schema: str, fake: Callable[..., Any], backends: Iterable[str] = KERNEL_BACKENDS
) -> dict[str, Any]:
    """Define `name`_`backend` for each backend; the callables, by backend."""
    overloads = {}
    for backend in backends:
        operator = f"{name}_{backend}"
        # Kernels read the strides they are given: a compiler must not choose others.
        LIBRARY.define(operator + schema, tags=(torch.Tag.needs_exact_strides,))
        torch.library.register_fake(f"kdfast::{operator}", fake, lib=LIBRARY)
        overloads[backend] = getattr(torch.ops.kdfast, operator).default
    return overloads


def compiled_library(backend: str) -> Path | None:
    """The file of a compiled library, or None where it was not built."""
    name = COMPILED[backend]
    return next(iter(sorted(Path(__file__).parents[1].glob(f"{name}.*so"))), None)


def load(backend: str, operator: str, names: Iterable[str]) -> None:
    """Make `names`_`backend` callable.

    Raises: ImportError, or OSError for a library that does not load; the text says what to do.
    """
    if backend == "triton":
        _load_triton(operator, names)
        return
    if backend == "cuda" and not torch.cuda.is_available():
        raise ImportError("PyTorch sees no CUDA device here (torch.cuda.is_available() is False)")
    file = compiled_library(backend)
    if file is None:
        needs = "a C++ compiler" if backend == "cpp" else "nvcc (the CUDA toolkit)"
        raise ImportError(
            f"the library kdfast/{COMPILED[backend]} was not built; with {needs} on the path, "
            "install again: pip install --no-build-isolation kdfast"
        )
    torch.ops.load_library(str(file))
    for name in names:
        if not _implemented(f"{name}_{backend}", DEVICE[backend].upper()):
            raise ImportError(f"{file.name} has no {name}: it was built from other sources")


def has_sm_90a() -> bool:
    """Whether the CUDA library holds the code for compute capability 9.0 (Hopper)."""
    file = compiled_library("cuda")
    return file is not None and bool(ctypes.CDLL(str(file)).kdfast_cuda_has_sm_90a())


def refuses(backend: str, x: torch.Tensor) -> str | None:
    """Why a kernel backend cannot serve tensors like x, or None."""
    if backend == "cpp":
        return None if x.device.type == "cpu" else f"inputs are on {x.device}, not on the CPU"
    if x.dtype == torch.float64:
        return "float64 is served by the reference and cpp"
    if x.device.type != ("cpu" if backend == "triton" and interpreting() else "cuda"):
        return f"inputs are on {x.device}, not on a GPU"
    if backend == "triton" and x.device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(x.device)
        if major < 8:
            return f"{x.device} has compute capability {major}.{minor}; triton serves 8.0 and later"
    return None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on tensors of the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _load_triton(operator: str, names: Iterable[str]) -> None:
    if importlib.util.find_spec("triton") is None:
        raise ImportError("triton is not installed: pip install 'kdfast[gpu]'")
    if not interpreting() and not torch.cuda.is_available():
        raise ImportError(
            "PyTorch sees no GPU here (torch.cuda.is_available() is False; TRITON_INTERPRET=1 runs "
            "the kernels on the CPU, slowly)"
        )
    if not interpreting() and not any(
        map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))
    ):
        raise ImportError(
            "Triton needs a C compiler for its launches: gcc, clang, or the one in CC"
        )
    module = importlib.import_module(f"kdfast.kernels.{operator}")
    key = "CPU" if interpreting() else "CUDA"
    for name in names:
        if not _implemented(f"{name}_triton", key):
            LIBRARY.impl(f"{name}_triton", getattr(module, name.removeprefix(f"{operator}_")), key)


def _implemented(operator: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"kdfast::{operator}", key)
