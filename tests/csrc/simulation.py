"""backend="cuda" on the CPU: csrc/cuda with its entry points as they are, launches as simulation.h
runs a block after the other. The sources are rewritten where they speak to a GPU."""

import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch

from kdfast.ops import dispatch, library

ROOT = Path(__file__).parents[2]
OPERATORS = ("attention_kl", "attention_map_kl", "cka", "layer_projection")
# Those of kdfast.ops that a source serves, where they are others.
SERVED = {
    "cka": ("hsic", "hsic_matrix", "cka", "cka_matrix", "gram_distance"),
    "layer_projection": ("layer_projection", "layer_projection_loss"),
}
with mock.patch("setuptools.setup"):  # its functions, without its work
    BUILD = runpy.run_path(str(ROOT / "setup.py"))
nvcc = BUILD["nvcc"]

# In front of the rewritten source: its kernels become functions of the host.
LAUNCHES = """
#include "simulation.h"
#undef __global__
#define __global__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
template <typename Kernel>
void simulate(dim3 grid, int threads, size_t bytes, Kernel kernel) {
  gridDim = {grid.x, grid.y, grid.z};
  simulation::EARLY_COPIES = simulation::EARLY_PRODUCTS = !std::getenv("KDFAST_SIMULATE_LATE");
  simulation::BULK_COPIES = !std::getenv("KDFAST_SIMULATE_AMPERE");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) simulation::fail("an empty grid");
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        simulation::run_block((threads + 31) / 32 * 32, bytes, [&] {
          blockDim.x = threads;
          if (int(threadIdx.x) < threads) kernel();
        });
}
"""
ASIDE = (  # what only a GPU can answer
    (r"STD_CUDA_CHECK\(\s*cudaFuncSetAttribute\(.*?\)\);", ""),
    (r"STD_CUDA_CHECK\(cudaDeviceGetAttribute\(&(\w+), \w*Major,.*?\)\);", r"\1 = 9;"),
    (r"STD_CUDA_CHECK\(cudaDeviceGetAttribute\(&(\w+), \w*Minor,.*?\)\);", r"\1 = 0;"),
    # Few processors, so that blocks have more than one token.
    (r"STD_CUDA_CHECK\(cudaDeviceGetAttribute\(&(\w+), \w*ProcessorCount,.*?\)\);", r"\1 = 1;"),
    (
        r"STD_CUDA_CHECK\(\s*cudaDeviceGetAttribute\(&(\w+), \w*SharedMemory\w*,.*?\)\);",
        r"\1 = 228 << 10;",
    ),
    (r"STD_CUDA_CHECK\(cudaOccupancy\w+\(&(\w+),.*?\)\);", r"\1 = 2;"),
    (r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);", ""),
    (r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream\(.*?\)\);", ""),
    (r"const torch::stable::accelerator::DeviceGuard.*?;", ""),
    (
        r"extern __shared__ (__align__\(\d+\) )?char raw\[\];",
        "char* raw = simulation::shared.data();",
    ),
    (r"\.is_cuda\(\)", ".is_cpu()"),
    (r"\(kdfast, CUDA, m\)", "(kdfast, CPU, m)"),
)


def rewritten(source: Path) -> str:
    def launch(match: re.Match[str]) -> str:
        kernel, configuration, arguments = match.groups()
        grid, threads, size, _ = re.split(r",\s*(?![^()]*\))", configuration)
        return f"simulate({grid}, {threads}, {size}, [&] {{ {kernel}({arguments}); }});"

    text = source.read_text()
    for pattern, replacement in ASIDE:
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    text = re.sub(r"(\w+(?:<\w+>)?)<<<(.*?)>>>\((.*?)\);", launch, text, flags=re.DOTALL)
    # The headers of an operator lie where they are, entry.h beside this file.
    return re.sub(r'#include "(?=attention_|cka_|layer_)', '#include "cuda/', text)


def load(folder: Path, operators: tuple[str, ...] = OPERATORS) -> None:
    include, libraries = BUILD["torch_paths"]()
    (folder / "entry.h").write_text(rewritten(ROOT / "csrc" / "cuda" / "entry.h"))

    def build(operator: str) -> Path:
        source, target = folder / f"{operator}.cpp", folder / f"simulated_{operator}.so"
        source.write_text(LAUNCHES + rewritten(ROOT / "csrc" / "cuda" / f"{operator}.cu"))
        command = [
            nvcc(), "-x", "c++", "-std=c++20", "-O2", "-shared", "-Xcompiler", "-w,-fPIC",
            "-DKDFAST_SM_90A", BUILD["STABLE_ABI"], *include, f"-I{Path(__file__).parent}",
            str(source), "-o", str(target), f"-L{libraries}", "-ltorch", "-ltorch_cpu",
        ]  # fmt: skip
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        for target in pool.map(build, operators):
            torch.ops.load_library(str(target))


def serve(monkeypatch) -> None:
    """Makes backend="cuda" take tensors of the CPU, for one test."""
    for operator in (name for key in OPERATORS for name in SERVED.get(key, (key,))):
        monkeypatch.setattr(dispatch.KERNELS[operator, "cuda"], "_outcome", None)
    monkeypatch.setattr(library, "load", lambda *_: None)
    monkeypatch.setattr(library, "has_sm_90a", lambda: True)
    monkeypatch.setattr(
        library, "refuses", lambda _, x: "float64" if x.dtype == torch.float64 else None
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
