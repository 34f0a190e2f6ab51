"""Packages, and the two compiled libraries.

The libraries are compiled against PyTorch's stable ABI, by ninja where there is one, and hold no
Python symbols, so one build serves every Python and every later PyTorch. Both are optional: without
a compiler, or when compilation fails, kdfast installs without them and says so in `kdfast doctor`.

    TORCH_CUDA_ARCH_LIST   the GPUs to compile for, as in "8.0 9.0a"; what follows is the default
    KDFAST_BUILD           the libraries to build, of "cpu,cuda" (default: both, where possible)
    MAX_JOBS               parallel compilations
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# These folders are top-level in the repository but installed inside kdfast: as a top-level package,
# `kernels` would be taken by transformers for the library of that name.
MAPPED = {"kdfast.kernels": "kernels", "kdfast.benchmarks": "benchmarks"}
# sm_90a code runs on Hopper alone, so PTX for later chips travels with it.
ARCHITECTURES = "8.0+PTX 9.0a"
WANTED = [x for x in re.split(r"[ ,]+", os.environ.get("KDFAST_BUILD", "cpu,cuda").strip()) if x]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # PyTorch 2.11

# The same source for each instruction set; which one runs is decided at the first call.
INSTRUCTION_SETS = {
    "portable": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


def nvcc() -> str | None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if found := shutil.which("nvcc", path=os.path.join(os.environ.get(variable, "-"), "bin")):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def gencode() -> list[str]:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST, as in "8.0;9.0a+PTX"."""
    flags = []
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    for item in re.split(r"[ ;,]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if match is None:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST has {item!r}; should be like '8.0', '9.0a' or '8.0+PTX'"
            )
        number = "".join(match.group(1, 2, 3))
        code = [f"sm_{number}", *([f"compute_{number}"] if match.group(4) else [])]
        flags += [x for kind in code for x in ("-gencode", f"arch=compute_{number},code={kind}")]
    return flags


class Step(NamedTuple):
    """One command, which makes `output` of `inputs` and the headers it includes."""

    command: list[str]
    inputs: list[Path]
    output: Path
    headers: bool = False  # the command notes them in `output`.d


class Build(build_ext):
    """Compiles an extension's library: by ninja what has changed, or else all of it."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not self.build_temp, which is new in every editable install: ninja then compiles what
        # has changed since the last one.
        folder = ROOT.resolve() / "build" / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        steps_of = {"kdfast._cpu": cpu_steps, "kdfast._cuda": cuda_steps}[extension.name]
        try:
            steps = steps_of(folder, target)
            if shutil.which("ninja"):
                by_ninja(["ninja"], folder, steps)
            elif importlib.util.find_spec("ninja"):
                by_ninja([sys.executable, "-m", "ninja"], folder, steps)
            else:
                by_threads(steps)
        except (OSError, ImportError, ValueError, subprocess.CalledProcessError) as error:
            from distutils.errors import CompileError

            # What an earlier build left must not pass for this one.
            for left in (target, ROOT.resolve() / "kdfast" / target.name):
                left.unlink(missing_ok=True)
            # `optional` makes setuptools go on without the library.
            raise CompileError(f"{extension.name}: {error}") from error


JOBS = os.environ.get("MAX_JOBS")


def by_ninja(ninja: list[str], folder: Path, steps: list[Step]) -> None:
    def escape(value: object) -> str:
        return str(value).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    lines = ["rule compile", "  command = $run", "  depfile = $out.d", "  deps = gcc",
             "rule link", "  command = $run"]  # fmt: skip
    for step in steps:
        rule = "compile" if step.headers else "link"
        lines += [
            f"build {escape(step.output)}: {rule} {' '.join(map(escape, step.inputs))}",
            f"  run = {shlex.join(step.command).replace('$', '$$')}",
        ]
    (folder / "build.ninja").write_text("\n".join([*lines, ""]))
    subprocess.run([*ninja, "-C", str(folder), *(["-j", JOBS] if JOBS else [])], check=True)


def by_threads(steps: list[Step]) -> None:
    *independent, last = steps

    def run(step: Step) -> None:
        subprocess.run(step.command, check=True)

    with ThreadPoolExecutor(int(JOBS or os.cpu_count() or 1)) as pool:
        list(pool.map(run, independent))
    run(last)


def torch_paths() -> tuple[list[str], str]:
    """The flags that find PyTorch's headers, and the folder of its libraries."""
    import torch

    package = Path(torch.__file__).parent
    include = package / "include"
    folders = [include, include / "torch" / "csrc" / "api" / "include", ROOT.resolve() / "csrc"]
    return [f"-I{x}" for x in folders], str(package / "lib")


def cpu_steps(folder: Path, target: Path) -> list[Step]:
    compiler = os.environ.get("CXX") or next(
        (x for x in ("g++", "clang++", "c++") if shutil.which(x)), None
    )
    if compiler is None:
        raise OSError("no C++ compiler (g++, clang++, or CXX) on the path")
    cxx = shlex.split(compiler)
    includes, libraries = torch_paths()
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno",
             "-fno-trapping-math", "-Wall", "-Wno-psabi", STABLE_ABI, *includes]  # fmt: skip
    steps = []
    x86 = platform.machine() in ("x86_64", "AMD64")
    for source in sorted((ROOT.resolve() / "csrc" / "cpu").glob("*.cpp")):
        # NAME.cpp holds an operator's entry points; NAME.isa.cpp its arithmetic, compiled once for
        # each instruction set.
        variants: dict[str, list[str]] = {"": []}
        if source.name.endswith(".isa.cpp"):
            variants = INSTRUCTION_SETS if x86 else {"portable": []}
        for variant, options in variants.items():
            output = folder / f"{source.name}.{variant or 'plain'}.o"
            chosen = [*options, f"-DKDFAST_ISA={variant}"] if variant else []
            steps.append(compilation([*cxx, *flags, *chosen], source, output))
    objects = [step.output for step in steps]
    link = [*cxx, "-shared", *map(str, objects), "-o", str(target),
            f"-L{libraries}", "-ltorch", "-ltorch_cpu"]  # fmt: skip
    return [*steps, Step(link, objects, target)]


def cuda_steps(folder: Path, target: Path) -> list[Step]:
    compiler = nvcc()
    if compiler is None:
        raise OSError("nvcc is not on the path")
    includes, libraries = torch_paths()
    codes = gencode()
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC",
             "-Xcompiler", "-fvisibility=hidden", "-lineinfo", "-DUSE_CUDA",
             STABLE_ABI, *codes, *includes]  # fmt: skip
    if any(code.endswith("code=sm_90a") for code in codes):
        flags.append("-DKDFAST_SM_90A")
    steps = [
        compilation([compiler, *flags], source, folder / f"{source.name}.o")
        for source in sorted((ROOT.resolve() / "csrc" / "cuda").glob("*.cu"))
    ]
    objects = [step.output for step in steps]
    # The library needs libtorch_cuda, which a build against a CPU PyTorch has not: an empty one of
    # the same name makes the linker ask for it.
    stub = folder / "stub" / "libtorch_cuda.so"
    stub.parent.mkdir(exist_ok=True)
    empty = [compiler, "-shared", "-Xlinker", "-soname=libtorch_cuda.so",
             "-x", "c++", "/dev/null", "-o", str(stub)]  # fmt: skip
    link = [compiler, "-shared", *map(str, objects), "-o", str(target), "-cudart", "static",
            f"-L{libraries}", f"-L{stub.parent}", "-ltorch", "-ltorch_cpu",
            "-Xlinker", "--no-as-needed", "-ltorch_cuda"]  # fmt: skip
    return [*steps, Step(empty, [], stub), Step(link, [*objects, stub], target)]


def compilation(compiler: list[str], source: Path, output: Path) -> Step:
    command = [*compiler, "-MD", "-MF", f"{output}.d", "-c", str(source), "-o", str(output)]
    return Step(command, [source], output, headers=True)


def extensions() -> list[Extension]:
    """Listed only where they can be built, so that their absence is no failed build."""
    found = []
    if "cpu" in WANTED and any((ROOT / "csrc" / "cpu").glob("*.cpp")):
        found.append("kdfast._cpu")
    if "cuda" in WANTED and nvcc() and any((ROOT / "csrc" / "cuda").glob("*.cu")):
        found.append("kdfast._cuda")
    return [Extension(name, sources=[], optional=True, py_limited_api=True) for name in found]


packages = find_packages(include=["kdfast", "kdfast.*"])
for package, folder in MAPPED.items():
    packages += [package, *(f"{package}.{inner}" for inner in find_packages(folder))]

setup(
    packages=packages,
    package_dir=MAPPED,
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
