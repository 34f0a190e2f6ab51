"""The CUDA kernels, as far as a machine without a GPU can tell.

Every source is compiled for both architectures and must neither spill nor serialise its products.
The kernels themselves then run on the CPU, in a simulation of a block of threads (simulation.h).
"""

import importlib
import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

KERNELS = importlib.import_module("kdfast.ops.attention_kl")  # the name in kdfast.ops is a function
ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90a")
SIMULATED = ("attention_kl", "attention_map_kl")
# wgmma that waits for itself: for want of registers, or because other code touches them.
SERIALISED = re.compile(r"\(C75(?!19)\d\d\)|wgmma.*serialized")


BUILD = runpy.run_path(str(Path(__file__).with_name("simulation.py")))["BUILD"]
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
def compilations(tmp_path_factory):
    """Every source for every architecture, compiled once, two at a time."""
    folder = tmp_path_factory.mktemp("cubin")
    keys = [(source, architecture) for source in SOURCES for architecture in ARCHITECTURES]
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
