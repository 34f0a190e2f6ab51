"""What a result was made with: the version of this code and of what it stands on, without paths."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import kdfast

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "numpy", "scikit-learn", "scipy")


@functools.cache
def code_version() -> str:
    """The package's version and, in a checkout, its git revision, with + where files differ."""
    root = Path(kdfast.__file__).parents[1]
    try:
        released = version("kdfast")
    except PackageNotFoundError:  # a checkout that is not installed
        released = "unreleased"
    if not (root / ".git").exists():
        return released
    said = []
    for command in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "kdfast"]):
        try:
            found = subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            return released
        if found.returncode:
            return released
        said.append(found.stdout.strip())
    return f"{released} ({said[0]}{'+' if said[1] else ''})"


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages below, and the device that trained."""
    gpu = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
