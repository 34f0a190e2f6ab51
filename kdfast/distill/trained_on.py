"""What a saved model was trained on: the data's configuration and a hash of each text.

It lies beside the weights, so that the model is scored later on the same parts, and so that rows
which it has seen are noticed in whatever file they come.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from kdfast.errors import InputError

FILE = "kdfast_data.safetensors"
# Of another source only how its texts are cut and padded is taken over.
OF_ANY_SOURCE = ("max_length", "pad")


@dataclass(frozen=True)
class TrainedOn:
    """data: the DataConfig as a dict. part: which was trained on. texts: [rows] int64, hashes.
    local: its path is a file or a folder."""

    data: dict[str, Any]
    part: str
    texts: torch.Tensor
    local: bool

    @classmethod
    def of(cls, data: dict[str, Any], part: str, rows: Dataset) -> TrainedOn:
        return cls(data, part, _hashes(rows), Path(data["path"]).expanduser().exists())

    def seen(self, rows: Dataset) -> int:
        """How many of these rows have a text that was trained on."""
        return int(torch.isin(_hashes(rows), self.texts).sum())

    def save(self, folder: Path) -> None:
        """Overwrites; the caller moves the folder into place."""
        metadata = {"data": json.dumps(self.data), "part": self.part, "local": str(int(self.local))}
        save_file({"texts": self.texts.sort().values}, folder / FILE, metadata)


def trained_on(model: str | os.PathLike[str]) -> TrainedOn | None:
    """The record beside a model that kdfast trained; None for any other."""
    file = Path(model).expanduser() / FILE
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as record:
            kept = record.metadata()
            texts, local = record.get_tensor("texts"), kept["local"] == "1"
            return TrainedOn(json.loads(kept["data"]), kept["part"], texts, local)
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None  # damaged: only a convenience is lost


def data_below(model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The data section that holds for a model where `given` (keys such as "data.path") says nothing
    else: all it was trained on, or, of another source, only how texts are cut."""
    record = trained_on(model)
    if record is None:
        return {}
    path, task = given.get("data.path", record.data["path"]), given.get("data.task")
    if "data.path" not in given and record.local and not Path(path).expanduser().exists():
        raise InputError(
            f"'{model}' was trained on '{path}', which is not here: give data.path=FILE_OR_FOLDER"
        )
    same = os.path.abspath(str(path)) == os.path.abspath(record.data["path"])
    if same and task in (None, record.data["task"]):
        return record.data
    return {key: record.data[key] for key in OF_ANY_SOURCE}


def _hashes(rows: Dataset) -> torch.Tensor:
    columns: Sequence[Any] = [rows[c] for c in ("text", "text_pair") if c in rows.column_names]
    digests = [
        hashlib.blake2b(json.dumps(texts).encode(), digest_size=8).digest()
        for texts in zip(*columns, strict=True)
    ]
    return (
        torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int64)
        if digests
        else (torch.empty(0, dtype=torch.int64))
    )
