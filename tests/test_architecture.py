"""The house: arrows between rooms go one way, and `import kdfast` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPERATORS = ("attention_kl", "attention_map_kl", "cka", "layer_projection", "procrustes")
WITH_KERNELS = ("attention_kl", "attention_map_kl", "cka", "layer_projection")
MAPPED = ("kernels", "benchmarks")  # top-level folders that are installed inside kdfast

# What each room may import of kdfast, besides itself and the bottom rooms.
BOTTOM = {"errors", "captured", "system"}
MAY_IMPORT: dict[str, set[str]] = {room: set() for room in ("kernels", "reference", *BOTTOM)}
for room, below in (
    ("ops", {"kernels", "reference"}),
    ("losses", {"ops"}),
    ("students", set()),
    ("recipes", {"losses", "students"}),
    ("distill", {"recipes"}),
    ("benchmarks", {"distill"}),
    ("doctor", {"ops"}),
    ("cli", {"distill", "benchmarks", "doctor"}),
):
    MAY_IMPORT[room] = below.union(*(MAY_IMPORT[b] for b in below))
MAY_IMPORT["__main__"] = {"cli"}


def sources() -> list[tuple[str, Path, tuple[str, ...]]]:
    """(room, file, the package it lies in) of every module of the package."""
    found = []
    for file in (x for top in ("kdfast", *MAPPED) for x in (ROOT / top).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] in MAPPED:
            parts = ("kdfast", *parts)
        if parts != ("kdfast", "__init__"):  # the front door may open on any room
            found.append((parts[1], file, parts[:-1]))
    return found


def imported_rooms(file: Path, package: tuple[str, ...]) -> set[str]:
    """Rooms of kdfast named by any import statement of the file, also those inside functions."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join([*base, *([node.module] if node.module else [])])
            modules += [f"{origin}.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in modules if name.startswith("kdfast.")}


def test_imports_go_one_way() -> None:
    wrong = []
    for room, file, package in sources():
        where = file.relative_to(ROOT)
        if room not in MAY_IMPORT:
            wrong.append(f"{where}: {room} is no room of the house (MAY_IMPORT in this test)")
            continue
        allowed = MAY_IMPORT[room] | BOTTOM | {room, "__version__"}
        wrong += [
            f"{where}: {room} imports kdfast.{other}"
            for other in sorted(imported_rooms(file, package) - allowed)
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("statement", "rooms"),
    [
        ("from ..ops import cka", {"ops"}),
        ("from . import hidden", {"losses"}),
        ("from kdfast import ops", {"ops"}),
        ("import kdfast.distill.trainer", {"distill"}),
        ("def f():\n    from kdfast.recipes.fsd import FSD", {"recipes"}),
        ("import torch, kdfastest", set()),
    ],
)
def test_import_statements_are_read(statement: str, rooms: set[str], tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text(statement)
    assert imported_rooms(file, ("kdfast", "losses")) == rooms


def test_kernels_folder_is_never_imported_by_its_bare_name() -> None:
    for _, file, _ in sources():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "kernels" for name in names), file


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("room", ["ops", "reference"])
def test_operator_has_its_file_in_each_room(operator: str, room: str) -> None:
    assert (ROOT / "kdfast" / room / f"{operator}.py").is_file()


@pytest.mark.parametrize("operator", WITH_KERNELS)
@pytest.mark.parametrize(
    "file", ["kernels/{}.py", "csrc/cpu/{}.cpp", "csrc/cuda/{}.cu", "benchmarks/{}.py"]
)
def test_operator_with_kernels_has_its_file_in_each_room(operator: str, file: str) -> None:
    assert (ROOT / file.format(operator)).is_file()


def test_import_is_quick_and_needs_only_torch() -> None:
    probe = (
        "import sys, time, torch\n"
        "before, start = set(sys.modules), time.process_time()\n"
        "import kdfast\n"
        "print(time.process_time() - start)\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(3)
    ]
    heavy = {"triton", "transformers", "datasets", "matplotlib", "sklearn", "accelerate"}
    assert not heavy & set(runs[0][1].split())
    assert min(float(seconds) for seconds, _ in runs) < 0.3
