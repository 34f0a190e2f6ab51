"""The pass over the training data that some recipes need first: memories, pseudo classifiers.

Their results follow from the frozen teacher, the data and a few settings, so they are kept in a
file of that name and read by the next run that would make the same ones.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from kdfast.captured import Captured
from kdfast.errors import InputError
from kdfast.recipes.recipe import Fitted

# Of the passes, whatever the training's is: results must not depend on how that is spread out.
BATCH_SIZE = 32


def model_digest(model: nn.Module) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def data_digest(dataset: Iterable[Any]) -> str:
    """A hash of the rows of a tokenised data set."""
    digest = hashlib.sha256()
    for row in dataset:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def prepare(
    parts: dict[str, Fitted],
    dataset: Any,
    collate: Callable[[list[Any]], dict[str, torch.Tensor]],
    run_teacher: Callable[[dict[str, torch.Tensor]], tuple[Captured, torch.Tensor | None]],
    *,
    teacher: nn.Module,
    precision: str,
    directory: str | os.PathLike[str] | None,
    progress: bool = True,
) -> list[str]:
    """Fit the parts of a recipe, or read those that were fitted before; returns what was done.

    run_teacher: from a collated batch to what the parts read. precision: of the teacher's forward,
    as text. directory: where results are kept; None keeps none. The rows come in one random order,
    the same for every run; the global random state is left alone, so a run that reads its parts
    goes on as one that made them.
    """
    said, missing, files = [], {}, {}
    if directory is not None:
        # A collator that pads further counts where a recipe does not mask padding.
        padded = getattr(collate, "pad_to", None)
        keys = [model_digest(teacher), data_digest(dataset), precision, padded]
        for name, part in parts.items():
            files[name] = _file(Path(directory), part, keys)
    for name, part in parts.items():
        if name in files and _read(files[name], part):
            said.append(f"{part.what}: fitted before, read from {files[name]}")
        else:
            missing[name] = part
    if not missing:
        return said
    if not hasattr(dataset, "__len__"):
        raise InputError(
            f"{' and '.join(part.what for part in missing.values())}: fitted to all training "
            "rows, and this data set has no length; give one that is held whole"
        )
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    passes = max(part.passes for part in missing.values())
    bar = tqdm(
        total=passes * -(-len(order) // BATCH_SIZE),
        desc=f"  fitting {', '.join(dict.fromkeys(part.what for part in missing.values()))}",
        leave=False,
        disable=not progress,
    )
    for part in missing.values():
        part.begin()
    rows: dict[Fitted, int] = {}  # that the part's last pass read
    with bar, torch.no_grad():
        for number in range(passes):
            rows |= _one_pass(
                [part for part in missing.values() if number < part.passes],
                DataLoader(
                    dataset,
                    batch_size=BATCH_SIZE,
                    sampler=order,
                    collate_fn=collate,
                    generator=torch.Generator(),  # or its seed would be drawn from the global one
                ),
                run_teacher,
                bar,
            )
    for name, part in missing.items():
        many = "1 pass" if part.passes == 1 else f"{part.passes} passes"
        said.append(f"{part.what}: fitted in {many} over {rows[part]:,} rows")
        if name in files:
            files[name].parent.mkdir(parents=True, exist_ok=True)
            partial = files[name].with_name(f"{files[name].name}.{os.getpid()}.partial")
            save_file({k: v.contiguous() for k, v in part.fitted_state().items()}, partial)
            os.replace(partial, files[name])
    return said


def _one_pass(
    parts: list[Fitted],
    batches: Iterable[dict[str, torch.Tensor]],
    run_teacher: Callable[[dict[str, torch.Tensor]], tuple[Captured, torch.Tensor | None]],
    bar: Any,
) -> dict[Fitted, int]:
    """All parts read each batch of the teacher's once; returns how many rows each has read."""
    rows = dict.fromkeys(parts, 0)
    for batch in batches:
        bar.update()
        teacher, labels = run_teacher(batch)
        for part in parts:
            if not part.has_enough:
                part.see(teacher, labels)
                rows[part] += len(next(iter(batch.values())))
        if all(part.has_enough for part in parts):
            break
    for part in parts:
        part.end_pass()
    return rows


def _file(directory: Path, part: Fitted, keys: list[Any]) -> Path:
    kind = type(part).__name__
    made_of = json.dumps([kind, part.settings(), keys], sort_keys=True)
    return directory / f"{kind}-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.safetensors"


def _read(file: Path, part: Fitted) -> bool:
    """Whether the file holds this part; one that was damaged is made again."""
    if not file.is_file():
        return False
    try:
        part.load_fitted(load_file(file))
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError):
        return False
    return True
