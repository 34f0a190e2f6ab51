"""What a recipe reads of a frozen teacher, kept on disk: one pass, then no teacher runs any more.

DIR/teacher-KEY/ belongs to one teacher, its inputs and its precision; KEY is a hash of them. Each
item (the logits, or the hidden states, queries, keys or values of one layer) is two files there:
ITEM.bin, the values of all rows one after the other, longest row first, valid tokens alone, in the
dtype that the teacher gives; and ITEM.json, written last, with shape, size and checksums. A recipe
that reads more adds what is missing. Reading maps the files into memory and pads a batch's rows
again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import shutil
import socket
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import datasets
import numpy as np
import psutil
import torch
import transformers
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kdfast.captured import Captured, LayerAttention, Needs
from kdfast.distill.prepare import data_digest, model_digest
from kdfast.distill.run_directory import say, write_text
from kdfast.errors import InputError
from kdfast.recipes.recipe import Recipe
from kdfast.recipes.terms import logits_of

ROW = "teacher_row"
FORMAT = 1
# Of the pass, padding included, whatever the training's batches are: the files must not depend on
# how that is spread out.
BATCH_TOKENS = 8192
CHUNK = 4 << 20  # bytes under one checksum
# Of each file, by processes that another one of their machine has looked at all of them for.
LOOKED_AT = 64
THREADS = 4
# Of more bytes a bar shows how far the check is.
BAR_BYTES = 4 << 30
# Half precision moves the states of a six-layer BERT by 0.005 of them, padding on its left by 0.3.
PADDING_TOLERANCE = 0.03


@dataclass(frozen=True)
class TeacherRows:
    """Which rows a batch is made of, and where their tokens lie. It stays on the CPU, so that
    nothing waits for the device; no tensor, so that nothing moves it there.

    numbers: of the rows in the data set, B of them. mask: [B, N] of bool, True = token.
    """

    numbers: tuple[int, ...]
    mask: np.ndarray


class NumberedRows(Dataset):
    """A data set whose rows, taken by number, also say it, as `teacher_row`; iteration gives them
    as they are."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {**self.rows[number], ROW: number}

    def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:
        at_once = getattr(self.rows, "__getitems__", None)
        rows = [self.rows[i] for i in numbers] if at_once is None else at_once(numbers)
        return [{**row, ROW: i} for row, i in zip(rows, numbers, strict=True)]


class RowCollator:
    """Any collator, with `teacher_row`: the batch's TeacherRows.

    Raises InputError where it gives a row other tokens than the data set has (random masking, rows
    cut shorter): the teacher's states of that row would be of another text.
    """

    def __init__(self, collate: Callable[[list[Any]], Any], inputs: TeacherInputs) -> None:
        self.collate = collate
        self.checksums = inputs.checksums
        self.pad_to = getattr(collate, "pad_to", None)  # as DistillationCollator says it

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        numbers = tuple(int(row[ROW]) for row in rows)
        batch = self.collate([{k: v for k, v in row.items() if k != ROW} for row in rows])
        prefix = "teacher_" if "teacher_input_ids" in batch else ""
        ids = np.asarray(batch[f"{prefix}input_ids"])
        mask = batch.get(f"{prefix}attention_mask")
        mask = np.ones(ids.shape, bool) if mask is None else np.asarray(mask) != 0
        if len(ids) != len(numbers):
            raise InputError(
                f"teacher_cache: data_collator made {len(ids)} rows of {len(numbers)}: each row "
                "must stay one, or leave teacher_cache out"
            )
        for number, row, valid in zip(numbers, ids, mask, strict=True):
            if _checksum(row[valid]) != self.checksums[number]:
                raise InputError(
                    f"teacher_cache: data_collator, or the data set itself, gives row {number} "
                    "other tokens than the cache was made of (random masking? rows cut shorter?): "
                    "tokens must be the same in each epoch, or leave teacher_cache out"
                )
        return {**batch, ROW: TeacherRows(numbers, mask)}


@dataclass(frozen=True)
class TeacherInputs:
    """What the teacher reads of a data set, row by row: a digest of all of it, the tokens of each
    row with and without its own padding, and a checksum of its token ids."""

    digest: str
    widths: np.ndarray
    lengths: np.ndarray
    checksums: list[int]

    @classmethod
    def of(cls, dataset: Any, columns: Iterable[str]) -> TeacherInputs:
        """columns: that the teacher's forward takes; those prefixed "teacher_" go before.

        Raises InputError for a data set without length or numbered rows, or rows without tokens.
        """
        check_indexed(dataset)
        columns = [name for name in columns if name != "labels"]
        if isinstance(dataset, datasets.Dataset) and "input_ids" in dataset.column_names:
            read = {*columns, *(f"teacher_{name}" for name in columns)}
            dataset = dataset.select_columns([c for c in dataset.column_names if c in read])
            rows = iter(dataset)
        else:
            rows = (dataset[number] for number in range(len(dataset)))
        widths, lengths, checksums = [], [], []

        def read_rows() -> Iterator[dict[str, list[Any]]]:
            for number, row in enumerate(rows):
                prefix = "teacher_" if "teacher_input_ids" in row else ""
                inputs = {c: np.asarray(row[prefix + c]) for c in columns if prefix + c in row}
                if "input_ids" not in inputs:
                    raise InputError(
                        f"teacher_cache: row {number} of train_dataset has no input_ids (it has "
                        f"{', '.join(row)}): tokenise it before training"
                    )
                ids = inputs["input_ids"]
                valid = ids[inputs.get("attention_mask", np.ones_like(ids)) != 0]
                if not len(valid):
                    raise InputError(f"teacher_cache: row {number} of train_dataset has no tokens")
                widths.append(len(ids))
                lengths.append(len(valid))
                checksums.append(_checksum(valid))
                yield {name: value.tolist() for name, value in inputs.items()}

        digest = data_digest(read_rows())
        return cls(digest, np.array(widths), np.array(lengths), checksums)

    @property
    def shortest(self) -> int:
        """The number of the shortest row, the first of them."""
        return int(self.widths.argmin())


@dataclass(frozen=True)
class _Item:
    """What ITEM.json says of ITEM.bin.

    per: "token", or "row" of the logits of sequences. shape: [tokens, ...] or [rows, ...].
    attention: scale, causal and window of the layer that queries, keys and values are from.
    """

    item: str
    key: str
    dtype: str
    per: str
    shape: list[int]
    bytes: int
    checksums: list[int]
    attention: dict[str, Any] | None = None
    format: int = FORMAT

    def text(self) -> str:
        values = asdict(self)
        return json.dumps({**values, "digest": _hash(values)})

    @classmethod
    def read(cls, path: Path, key: str, item: str) -> _Item:
        """Raises ValueError for anything but what was written for this key and item."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.pop("digest") != _hash(values):
                raise ValueError("it was altered")
            read = cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name} cannot be read ({error})") from None
        if (read.format, read.key, read.item) != (FORMAT, key, item):
            raise ValueError(f"{path.name} belongs to something else")
        return read


class TeacherCache:
    """What is needed of one teacher on all rows of one data set, in a folder of `directory`.

    Args:
        directory: made if it is not there. Runs, processes and recipes may share it.
        teacher: frozen; its weights and configuration are part of the folder's name, as are
        inputs: what it reads,
        collated: what the collator makes of the shortest row for it, see `shortest`, and
        precision: of its forward, as text. So is the release of transformers, as another forward
        may give other values.

    `fill` makes what is missing, `read` gives a batch.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        teacher: PreTrainedModel,
        inputs: TeacherInputs,
        collated: Mapping[str, Any],
        precision: str,
    ) -> None:
        config = teacher.config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            config.pop(name, None)
        weights = type(teacher).__name__, model_digest(teacher)
        release = transformers.__version__.split(".")[:2]
        made = _unpadded(collated)
        self.key = _hash([FORMAT, *weights, config, inputs.digest, made, precision, release])
        self.folder = Path(directory).expanduser() / f"teacher-{self.key}"
        self.inputs = inputs
        # Longest first, so that what does not fit in memory shows at once.
        self.order = np.argsort(-inputs.widths, kind="stable")
        self.rank = np.empty_like(self.order)
        self.rank[self.order] = np.arange(len(self.order))
        lengths = inputs.lengths[self.order]
        self.start = (np.cumsum(lengths) - lengths)[self.rank]
        self._items: dict[str, tuple[_Item, torch.Tensor]] = {}
        self._mapped: list[mmap.mmap] = []

    def fill(
        self,
        needs: Needs,
        run: Callable[[list[int], Needs], tuple[Captured, TeacherRows]],
        *,
        progress: bool = True,
    ) -> str:
        """Make what is missing of `needs`, and open all of it; returns a line on what was done.

        run: the teacher on the rows of these numbers. What it will take is printed first; files
        that are truncated, altered or foreign are named and made again. Of several processes one
        makes them, and the others wait. Raises InputError for a folder that cannot be written and
        a disk that has not enough space.
        """
        names = _names(needs)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "lock").touch()
        except OSError as error:
            raise InputError(
                f"teacher_cache must be a folder that can be written, {self.folder} cannot: {error}"
            ) from error
        with _alone(self.folder / "lock") as lock:
            # Who looked at all of it last: processes that one parent started need not do it again,
            # but for the first of them, as a parent may start several trainings.
            parent = _parent()
            note = f"{parent} {os.environ.get('TORCHELASTIC_RUN_ID', '')} {' '.join(names)}"
            later = parent is not None and int(os.environ.get("LOCAL_RANK", 0)) > 0
            together = later and lock.read() == note
            missing = self._missing(names, whole=not together, progress=progress)
            if missing:
                self._make(missing, run, progress)
            lock.seek(0)
            lock.truncate()
            lock.write(note)
        self._mapped.clear()
        self._items = {name: self._open(name) for name in names}
        size = _size(sum(item.bytes for item, _ in self._items.values()))
        if missing == names:
            return f"teacher cache: {_list(names)}, {size}, made in {self.folder}"
        more = f", beside {_list(missing)}, made now" if missing else ""
        read = [name for name in names if name not in missing]
        return f"teacher cache: {_list(read)} made before, read from {self.folder}{more}: {size}"

    def read(
        self,
        rows: TeacherRows,
        needs: Needs,
        attention_mask: torch.Tensor | None,
        device: torch.device,
    ) -> Captured:
        """The teacher's part of a batch as running it gives it, with zeros at padded positions.

        needs: all of it among what was filled. attention_mask: of the teacher's inputs.
        """
        values = {name: self._batch(name, rows, device) for name in _names(needs)}
        # Otherwise all that was ever read would count as this process's memory.
        for mapped in self._mapped:
            mapped.madvise(mmap.MADV_DONTNEED)
        attention = {}
        for layer in sorted(needs.attention):
            about = self._items[f"query-{layer}"][0].attention
            assert about is not None
            parts = {
                part: values[f"{part}-{layer}"].transpose(1, 2)
                if f"{part}-{layer}" in values
                else None
                for part in ("query", "key", "value")
            }
            attention[layer] = LayerAttention(**parts, **about)  # type: ignore[arg-type]
        return Captured(
            logits=values.get("logits"),
            hidden_states={i: values[f"hidden-{i}"] for i in sorted(needs.hidden_states)},
            attention=attention,
            attention_mask=attention_mask,
        )

    def _batch(self, name: str, rows: TeacherRows, device: torch.device) -> torch.Tensor:
        item, values = self._items[name]
        numbers = list(rows.numbers)
        pinned = device.type == "cuda"
        if item.per == "row":
            batch = values[torch.from_numpy(self.rank[numbers])]
            return (batch.pin_memory() if pinned else batch).to(device, non_blocking=True)
        batch = torch.empty(
            *rows.mask.shape, *item.shape[1:], dtype=values.dtype, pin_memory=pinned
        )
        for place, valid, number in zip(batch, rows.mask, numbers, strict=True):
            start, length = int(self.start[number]), int(self.inputs.lengths[number])
            first = int(valid.argmax())
            own = values[start : start + length]
            if valid[first : first + length].all():
                place[:first].zero_()
                place[first : first + length] = own
                place[first + length :].zero_()
            else:  # padding between the tokens
                place.zero_()[torch.from_numpy(valid)] = own
        return batch.to(device, non_blocking=True)

    # Files

    def _files(self, name: str) -> tuple[Path, Path]:
        return self.folder / f"{name}.bin", self.folder / f"{name}.json"

    def _missing(self, names: Sequence[str], *, whole: bool, progress: bool) -> list[str]:
        """The items that are not there whole; damaged ones are named and deleted."""
        sizes = [path.stat().st_size for path, _ in map(self._files, names) if path.is_file()]
        shown = progress and whole and sum(sizes) > BAR_BYTES
        missing = []
        with tqdm(
            desc="  checking the teacher cache",
            total=sum(sizes),
            unit="B",
            unit_scale=True,
            leave=False,
            disable=not shown,
        ) as bar:
            for name in names:
                path, about = self._files(name)
                if not about.is_file():
                    missing.append(name)
                elif fault := self._fault(name, whole, bar):
                    say(f"teacher cache: {fault} in {self.folder}: made again")
                    missing.append(name)
        for name in missing:
            for file in self._files(name):
                file.unlink(missing_ok=True)
        return missing

    def _fault(self, name: str, whole: bool, bar: tqdm) -> str | None:
        path, about = self._files(name)
        try:
            item = _Item.read(about, self.key, name)
        except ValueError as error:
            return str(error)
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != item.bytes:
            return f"{path.name} has {path.stat().st_size:,} bytes, not {item.bytes:,}"
        chunks = len(item.checksums)
        which = np.linspace(0, chunks - 1, chunks if whole else min(chunks, LOOKED_AT), dtype=int)
        for chunk, checksum in zip(which, _checksums(path, which), strict=True):
            bar.update(min(CHUNK, item.bytes - int(chunk) * CHUNK))
            if checksum != item.checksums[chunk]:
                return f"{path.name} was altered"
        return None

    def _open(self, name: str) -> tuple[_Item, torch.Tensor]:
        path, about = self._files(name)
        item = _Item.read(about, self.key, name)
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), item.bytes, access=mmap.ACCESS_READ)
        self._mapped.append(mapped)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            values = torch.frombuffer(mapped, dtype=torch.uint8)
        return item, values.view(getattr(torch, item.dtype)).view(item.shape)

    def _make(
        self,
        names: list[str],
        run: Callable[[list[int], Needs], tuple[Captured, TeacherRows]],
        progress: bool,
    ) -> None:
        for left in self.folder.glob("*.partial"):  # of a process that was killed
            left.unlink()
        needs = _needs(names)
        # The shortest row alone: shapes and dtypes, and how far the collator pads anyway.
        shortest = int(self.order[-1])
        captured, rows = run([shortest], needs)
        least = rows.mask.shape[1]
        widths = self.inputs.widths
        if widths[self.order[0]] > widths[shortest]:
            longer = int(self.order[widths[self.order] > widths[shortest]][-1])
            _check_padding(names, (captured, rows), run([shortest, longer], needs))
        items = {name: self._item(name, captured, rows) for name in names}
        size = sum(item.bytes for item in items.values())
        say(
            f"teacher cache: {_list(names)} of {len(self.order):,} rows, "
            f"{self.inputs.lengths.mean():.0f} tokens on average: {_size(size)} in {self.folder}"
        )
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise InputError(
                f"teacher_cache needs {_size(size)} in {self.folder}, and {_size(free)} are free: "
                "give a folder on a larger disk, a recipe that reads fewer layers (layer_map), or "
                "leave it out"
            )
        partial = {name: self.folder / f"{name}.bin.partial" for name in names}
        bar = tqdm(total=len(self.order), desc="  teacher cache", leave=False, disable=not progress)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(bar)
                files = {name: stack.enter_context(open(p, "wb")) for name, p in partial.items()}
                for numbers in self._batches(least):
                    captured, rows = run(numbers, needs)
                    for name, file in files.items():
                        file.write(_bytes(_values(name, captured, rows)))
                    bar.update(len(numbers))
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
            for name, item in items.items():
                path, about = self._files(name)
                written = partial[name].stat().st_size
                if written != item.bytes:
                    raise RuntimeError(f"{name}: {written} bytes where {item.bytes} were expected")
                checksums = list(_checksums(partial[name], range(-(-item.bytes // CHUNK))))
                os.replace(partial[name], path)
                write_text(about, replace(item, checksums=checksums).text())
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)

    def _item(self, name: str, captured: Captured, rows: TeacherRows) -> _Item:
        values = _values(name, captured, rows)
        tokens = int(self.inputs.lengths.sum())
        kind, layer = _split(name)
        per = "row" if kind == "logits" and logits_of(captured, "teacher").dim() == 2 else "token"
        shape = [len(self.order) if per == "row" else tokens, *values.shape[1:]]
        attention = None
        if kind in ("query", "key", "value"):
            seen = captured.attention[layer]
            attention = {"scale": seen.scale, "causal": seen.causal, "window": seen.window}
        return _Item(
            item=name,
            key=self.key,
            dtype=str(values.dtype).removeprefix("torch."),
            per=per,
            shape=shape,
            bytes=math.prod(shape) * values.element_size(),
            checksums=[],
            attention=attention,
        )

    def _batches(self, least: int) -> Iterator[list[int]]:
        """Rows of about one length, as many as BATCH_TOKENS allows. least: a row's tokens with
        padding, at the least."""
        batch: list[int] = []
        for number in self.order.tolist():
            if batch:
                width = max(least, int(self.inputs.widths[batch[0]]))
                if (len(batch) + 1) * width > BATCH_TOKENS:
                    yield batch
                    batch = []
            batch.append(number)
        yield batch


def check_indexed(dataset: Any) -> None:
    """InputError for a data set whose rows have no numbers: the cache finds them by these."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise InputError(
            f"teacher_cache needs a train_dataset with a length and numbered rows, was "
            f"{type(dataset).__name__}: give one that is held whole, or leave teacher_cache out"
        )
    if not len(dataset):
        raise InputError("teacher_cache: train_dataset has no rows")


def counting_padding(recipe: Recipe) -> list[str]:
    """The terms that read padded positions."""
    return [
        name
        for name, term in recipe.terms.items()
        if any(getattr(module, "padding", None) == "counted" for module in term.modules())
    ]


def check_masked(recipe: Recipe) -> None:
    """InputError for a recipe that reads padded positions, which are not kept."""
    if counted := counting_padding(recipe):
        raise InputError(
            f"teacher_cache keeps no padded positions, and padding=counted of recipe "
            f"'{recipe.name}' ({', '.join(counted)}) reads them: set padding=masked, or leave "
            "teacher_cache out"
        )


def _check_padding(
    names: Sequence[str],
    alone: tuple[Captured, TeacherRows],
    padded: tuple[Captured, TeacherRows],
) -> None:
    """InputError where the teacher sees the first row of both differently when it is padded: what
    is kept would not be what it gives in another batch."""
    for one, other in zip(*(_of_first(names, *side) for side in (alone, padded)), strict=True):
        # Of what is not a number, no comparison holds.
        if not (one - other).float().norm() <= PADDING_TOLERANCE * one.float().norm():
            raise InputError(
                "teacher_cache keeps what the teacher says of a text, and this teacher says "
                "something else where the text is padded further (padding on the left, with "
                "positions counted from there? values that are not finite?): pad on the right "
                "(tokenizer.padding_side) or all rows alike, or leave teacher_cache out"
            )


def _of_first(
    names: Sequence[str], captured: Captured, rows: TeacherRows
) -> Iterator[torch.Tensor]:
    """What is kept of a batch's first row. Queries and keys may be turned by the positions, both
    alike, so their products stand for them."""
    first = TeacherRows(rows.numbers, rows.mask & (np.arange(len(rows.mask)) == 0)[:, None])
    for name in names:
        if _split(name)[0] not in ("query", "key"):
            yield _values(name, captured, first)
    for layer in captured.attention:
        query, key = (_values(f"{p}-{layer}", captured, first).float() for p in ("query", "key"))
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        yield torch.einsum("ihd,jhd->hij", query, key)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[IO[str]]:
    """Only one process of this machine at a time; a killed one lets go. Gives the file."""
    import fcntl  # not on Windows, where the rest of the trainer works

    with open(path, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _parent() -> str | None:
    """What started this process, unlike any other process of any machine; None where it lies beyond
    a container."""
    try:
        parent = psutil.Process(os.getppid())
        return f"{socket.gethostname()} {parent.pid} {parent.create_time()}"
    except psutil.Error:
        return None


def _unpadded(collated: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What stands at the tokens of one collated row, however far it is padded."""
    ids = np.asarray(collated["input_ids"])
    mask = np.asarray(collated.get("attention_mask", np.ones_like(ids))) != 0
    values = {name: np.asarray(value) for name, value in collated.items()}
    return {
        name: [str(value.dtype), (value[mask] if value.shape == mask.shape else value).tolist()]
        for name, value in values.items()
    }


def _names(needs: Needs) -> list[str]:
    """The items that hold what is needed."""
    return [
        *(["logits"] if needs.logits else []),
        *(f"hidden-{layer}" for layer in sorted(needs.hidden_states)),
        *(f"{part}-{layer}" for part in ("query", "key") for layer in sorted(needs.attention)),
        *(f"value-{layer}" for layer in sorted(needs.values)),
    ]


def _needs(names: Sequence[str]) -> Needs:
    """What must be captured to make these items."""
    split = [_split(name) for name in names]
    return Needs(
        logits="logits" in names,
        hidden_states=[layer for kind, layer in split if kind == "hidden"],
        attention=[layer for kind, layer in split if kind in ("query", "key", "value")],
        values=[layer for kind, layer in split if kind == "value"],
    )


def _split(name: str) -> tuple[str, int]:
    kind, _, layer = name.partition("-")
    return kind, int(layer or 0)


def _list(names: Sequence[str]) -> str:
    """For people: logits, hidden states, queries and keys of layers 2, 4."""
    words = {"hidden": "hidden states", "query": "queries", "key": "keys", "value": "values"}
    layers: dict[str, list[int]] = {}
    for name in names:
        kind, layer = _split(name)
        layers.setdefault(kind, []).append(layer)
    alike: dict[tuple[int, ...], list[str]] = {}
    for kind, word in words.items():
        if kind in layers:
            alike.setdefault(tuple(layers[kind]), []).append(word)
    said = ["logits"] if "logits" in layers else []
    for numbers, kinds in alike.items():
        *others, last = kinds
        what = f"{', '.join(others)} and {last}" if others else last
        which = ", ".join(map(str, numbers))
        said.append(f"{what} of layer{'s' if len(numbers) > 1 else ''} {which}")
    return ", ".join(said)


def _values(name: str, captured: Captured, rows: TeacherRows) -> torch.Tensor:
    """[tokens, ...], the valid ones of all rows; [B, C] of the logits of sequences, B rows that
    have a valid token."""
    kind, layer = _split(name)
    if kind == "logits":
        values = logits_of(captured, "teacher")
        if values.dim() == 2:
            return values[torch.from_numpy(rows.mask.any(1)).to(values.device)]
    elif kind == "hidden":
        values = captured.hidden_states[layer]
    else:
        values = getattr(captured.attention[layer], kind).transpose(1, 2)
    return values[torch.from_numpy(rows.mask).to(values.device)]


def _bytes(values: torch.Tensor) -> memoryview:
    raw: Any = values.contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _checksum(ids: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(ids, dtype=np.int64).tobytes())


def _checksums(path: Path, chunks: Iterable[int]) -> Iterator[int]:
    # Neither reading nor crc32 holds Python's lock.
    with open(path, "rb") as file, ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(
            lambda chunk: zlib.crc32(os.pread(file.fileno(), CHUNK, int(chunk) * CHUNK)), chunks
        )


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _size(size: int) -> str:
    return next(
        f"{size / unit:.3g} {name}"
        for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
        if size >= unit or unit == 1
    )
