"""What a user gets from the wheel, seen from a folder that is not the repository."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(*arguments: str, path: list[Path], cwd: Path) -> str:
    """Output of a fresh interpreter that finds packages in `path` first."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_of_sources(folder: Path) -> Path:
    """A copy: setuptools would put whatever an earlier build left in ./build into the wheel."""
    source = folder / "tree"
    built = ("runs", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", *built))
    return source


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("pip") is None:
        pytest.skip("pip is not installed here")
    source = copy_of_sources(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    # The CUDA library takes minutes; tests/csrc compiles its sources. The library that other tests
    # load is optimised as users get it; this one is compiled in a fifth of the time.
    compiler = tmp_path_factory.mktemp("compiler") / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n')
    compiler.chmod(0o755)
    environment = os.environ | {"KDFAST_BUILD": "cpu", "CXX": str(compiler)}
    subprocess.run(
        [*build, "--wheel-dir", out, source], check=True, capture_output=True, env=environment
    )
    (built,) = out.glob("kdfast-*.whl")
    return built


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_wheel_holds_one_package(unpacked: Path) -> None:
    (metadata,) = unpacked.glob("kdfast-*.dist-info")
    assert {entry.name for entry in unpacked.iterdir()} == {"kdfast", metadata.name}
    assert (metadata / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "kdfast = kdfast.cli:main" in (metadata / "entry_points.txt").read_text()


def test_wheel_holds_every_module_and_configuration(unpacked: Path) -> None:
    def files(folder: Path, pattern: str) -> set[Path]:
        return {file.relative_to(folder) for file in folder.rglob(pattern)}

    assert files(ROOT / "kdfast", "*.yaml") == files(unpacked / "kdfast", "*.yaml")
    modules = files(ROOT / "kdfast", "*.py")
    modules |= {Path("kernels") / file for file in files(ROOT / "kernels", "*.py")}
    modules |= {Path("benchmarks") / file for file in files(ROOT / "benchmarks", "*.py")}
    assert modules == files(unpacked / "kdfast", "*.py")


def test_one_wheel_serves_every_python(wheel: Path, unpacked: Path) -> None:
    assert "-cp310-abi3-" in wheel.name
    library = (unpacked / "kdfast" / "_cpu.abi3.so").read_bytes()
    assert b"PyObject" not in library and b"Py_" not in library


def test_compiled_library_of_the_wheel_serves_calls(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import torch, kdfast\n"
        "x = torch.rand(1, 2, 5, 4)\n"
        "print(kdfast.__file__, kdfast.attention_kl(x, x, x, x, backend='cpp').item())"
    )
    file, loss = python("-c", code, path=[unpacked], cwd=tmp_path).split()
    assert Path(file).is_relative_to(unpacked)
    assert float(loss) == 0


@pytest.mark.parametrize("trouble", ["no compiler", "source that does not compile", "no torch"])
def test_failed_compilation_does_not_break_the_build(trouble: str, tmp_path: Path) -> None:
    source = copy_of_sources(tmp_path)
    environment = os.environ | {"KDFAST_BUILD": "cpu"}
    (source / "kdfast" / "_cpu.abi3.so").write_bytes(b"of an earlier build")
    if trouble == "no compiler":
        environment["CXX"] = str(tmp_path / "no-such-compiler")
    elif trouble == "source that does not compile":
        for file in (source / "csrc" / "cpu").iterdir():
            file.write_text("#error broken\n")
    else:
        (source / "torch.py").write_text("raise ImportError('no torch here')\n")
        environment["PYTHONPATH"] = str(source)
    build = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=source, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'building extension "kdfast._cpu" failed' in done.stdout + done.stderr
    assert not list((source / "kdfast").glob("*.so"))


def test_architectures_for_cuda_are_read_as_pytorch_reads_them(tmp_path: Path) -> None:
    code = (
        "import os, runpy, setuptools\n"
        "setuptools.setup = lambda **options: None\n"
        f"gencode = runpy.run_path({str(ROOT / 'setup.py')!r})['gencode']\n"
        "for listed in ('8.0;9.0a+PTX', '12.0 10.0f', 'sm_90'):\n"
        "    os.environ['TORCH_CUDA_ARCH_LIST'] = listed\n"
        "    try:\n"
        "        print(*gencode()[1::2])\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
    )
    assert python("-c", code, path=[], cwd=tmp_path).splitlines() == [
        "arch=compute_80,code=sm_80 arch=compute_90a,code=sm_90a arch=compute_90a,code=compute_90a",
        "arch=compute_120,code=sm_120 arch=compute_100f,code=sm_100f",
        "TORCH_CUDA_ARCH_LIST has 'sm_90'; should be like '8.0', '9.0a' or '8.0+PTX'",
    ]


def test_every_import_is_a_declared_dependency(unpacked: Path) -> None:
    # Most of them come along with transformers today; that is no promise.
    def normal(distribution: str) -> str:
        return re.sub(r"[-_.]+", "-", distribution).lower()

    (metadata,) = unpacked.glob("kdfast-*.dist-info")
    requires = importlib.metadata.Distribution.at(metadata).requires or []
    declared = {normal(re.split(r"[^\w.-]", line)[0]) for line in requires}
    imported: set[str] = set()
    for file in unpacked.rglob("kdfast/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    imported -= {"kdfast", *sys.stdlib_module_names}
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        name
        for name in imported
        if not declared & {normal(owner) for owner in distributions.get(name, [name])}
    }
    assert not undeclared


def test_installed_wheel_is_imported_from_elsewhere(unpacked: Path, tmp_path: Path) -> None:
    code = "import kdfast.kernels as k, kdfast.benchmarks as b; print(k.__file__, b.__file__)"
    for file in python("-c", code, path=[unpacked], cwd=tmp_path).split():
        assert Path(file).is_relative_to(unpacked)


def test_module_runs_as_a_program(unpacked: Path, tmp_path: Path) -> None:
    # `make distill VENV=` starts it this way.
    assert "distill" in python("-m", "kdfast", "--help", path=[unpacked], cwd=tmp_path)


def test_library_named_kernels_lives_beside_kdfast(unpacked: Path, tmp_path: Path) -> None:
    """The real `kernels`, which transformers uses, stays importable and apart from ours."""
    download = [sys.executable, "-m", "pip", "install", "--no-deps", "--retries", "0"]
    download += ["--timeout", "20", "--target", str(tmp_path / "site"), "kernels==0.17.2"]
    if subprocess.run(download, capture_output=True).returncode:
        pytest.skip("kernels 0.17.2 cannot be downloaded here")
    code = (
        "import importlib.util, kdfast.kernels\n"
        "print(importlib.util.find_spec('kernels').origin, kdfast.kernels.__file__)"
    )
    theirs, ours = python("-c", code, path=[unpacked, tmp_path / "site"], cwd=tmp_path).split()
    assert Path(theirs).is_relative_to(tmp_path / "site")
    assert Path(ours).is_relative_to(unpacked)
