"""Memory that is free, within the limits of control groups."""

from pathlib import Path

import psutil
import pytest

from kdfast import system


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(system, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(system, "OWN", tmp_path / "own")
    host = type("Memory", (), {"available": 10_000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: host)
    return tmp_path / "groups"


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_groups_it_is_the_machines(groups: Path) -> None:
    assert system.free_memory() == 10_000
    (groups.parent / "own").write_text("0::/\n1:cpu:/\n")
    assert system.free_memory() == 10_000


def test_the_narrowest_group_around_the_process_counts(groups: Path) -> None:
    (groups.parent / "own").write_text("0::/jobs/job 7\n")
    said = "anon 50\ninactive_file 25\nactive_file 10"
    group(groups, memory__max="max", memory__current=9_000, memory__stat=said)
    group(groups / "jobs", memory__max=400, memory__current=300, memory__stat=said)
    group(groups / "jobs/job 7", memory__max=900, memory__current=100, memory__stat=said)
    assert system.free_memory() == 125
    group(groups / "jobs", memory__max=400, memory__current=500, memory__stat=said)
    assert system.free_memory() == 0


def test_groups_of_version_1(groups: Path) -> None:
    (groups.parent / "own").write_text("5:devices:/x\n4:cpuset,memory:/of/the/host\n")
    group(
        groups / "memory",
        memory__limit_in_bytes=500,
        memory__usage_in_bytes=100,
        memory__stat="total_inactive_file 7\ninactive_file 3",
    )
    assert system.free_memory() == 407


def test_of_this_machine() -> None:
    free = system.free_memory()
    assert free is not None and free > 1 << 20
