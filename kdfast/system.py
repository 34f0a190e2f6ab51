"""How much memory this process can still have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def free_memory() -> int | None:
    """Bytes of main memory that can be had now: of the machine, and of each control group that the
    process is in (a container's, a batch job's). None without psutil."""
    try:
        import psutil
    except ModuleNotFoundError:
        return None
    free: int = psutil.virtual_memory().available
    return max(min([free, *_left_in_groups()]), 0)


def _left_in_groups() -> Iterator[int]:
    for folder, limit, used in _groups():
        try:
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            said = (folder / "memory.stat").read_text()
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        # Files that were read count as used, but give way.
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", said, re.MULTILINE)
        yield left + (int(cached[1]) if cached else 0)


def _groups() -> Iterator[tuple[Path, str, str]]:
    """The process's group and those around it, with the names of limit and use."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = GROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root = GROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # Within a container the path may be that of the host: then the root is the container's.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield group, *names
