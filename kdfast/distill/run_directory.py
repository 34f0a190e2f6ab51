"""A run's directory: whose it is, going on with it, and writing into it whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from kdfast.distill.config import dump_config
from kdfast.distill.data import Splits
from kdfast.distill.fidelity import Predictions
from kdfast.errors import InputError

# Written first, it marks a directory as a run's and says of which run.
IDENTITY_FILE = "kdfast_run.yaml"
# Of what a run keeps of its students; one of another format is not gone on with.
FORMAT = 3
# All else that runs write.
RUN_ENTRIES = (
    *("students", "tuning", "work", "prepared", "plots"),
    *("results.md", "results.json", "comparison.md", "comparison.json"),
    *("teacher_predictions.safetensors", "teacher_dev_predictions.safetensors"),
)


def say(text: str = "") -> None:
    print(text, flush=True)


def check_run_directory(run_dir: Path, *, replaces: bool, results: str) -> None:
    """InputError unless a run may write here. results: the file that tells a finished run;
    replaces: whether it may be written anew."""
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise InputError(f"output_dir {run_dir} is a file: choose another")
    if any(run_dir.iterdir()) and not (run_dir / IDENTITY_FILE).is_file():
        raise InputError(
            f"output_dir {run_dir} is not empty and was not written by kdfast: choose another"
        )
    if (run_dir / results).is_file() and not replaces:
        raise InputError(
            f"output_dir {run_dir} already has results: choose another output_dir, or set "
            "overwrite=true to replace them"
        )


def claim_run_directory(run_dir: Path, identity: str, *, overwrite: bool, results: str) -> None:
    """Go on with an interrupted run, start a new one, or, if asked, replace another."""
    same = read(run_dir / IDENTITY_FILE) == identity
    begun = any((run_dir / name).exists() for name in RUN_ENTRIES)
    finished = (run_dir / results).is_file()
    if begun and not same and not overwrite:
        raise InputError(
            f"output_dir {run_dir} holds a run of another configuration, teacher or data: choose "
            "another output_dir, or set overwrite=true to start afresh"
        )
    if not same or (finished and overwrite):
        # Only what a run writes: whatever else lies there is not ours.
        for name in (*RUN_ENTRIES, IDENTITY_FILE):
            path = run_dir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif begun:
        say(f"continuing the {'finished' if finished else 'interrupted'} run in {run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(run_dir / IDENTITY_FILE, identity)


def identity(config: Any, splits: Splits, teacher: str, pool: str, **free: Any) -> str:
    """The configuration less what changes no result, and what it was found to stand for.

    pool: how embeddings are pooled, which all ways decide together. free: further keys that may
    change while the run goes on, with a value that stands for all.
    """
    plain = replace(config, overwrite=False, quick_overrides={}, **free)
    made_of = f"# format {FORMAT}, data {splits.fingerprint}, teacher {teacher or 'of this run'}"
    if pool != "mean":
        made_of += f", pool {pool}"
    return f"{made_of}\n{dump_config(plain)}"


def read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def save_predictions(path: Path, predictions: Predictions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({k: v for k, v in vars(predictions).items() if v is not None}, partial)
    os.replace(partial, path)


def cached_predictions(path: Path, make: Callable[[], Predictions]) -> Predictions:
    if path.is_file():
        return Predictions(**load_file(path))
    predictions = make()
    save_predictions(path, predictions)
    return predictions
