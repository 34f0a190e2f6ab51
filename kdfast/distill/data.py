"""Sentences from anywhere, split into the four parts that a distillation needs."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from kdfast.distill import glue
from kdfast.distill.demo import demo_sentences
from kdfast.distill.models import first_line, quick_offline
from kdfast.errors import InputError, nearest

# Test rows are drawn first and student rows last: another student_train leaves the test part, the
# dev part and the teacher's sentences as they were, so results stay comparable.
PARTS = ("test", "dev", "teacher_train", "student_train")
EXTENSIONS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".conll")
KINDS = ("classification", "regression", "embedding", "reranking", "token_classification")
# Kinds whose labels are numbers on a scale, which a single logit predicts.
SCALED = ("regression", "reranking")
# Position of a word piece (or of padding) that has no label of its own: torch's ignore_index.
NO_LABEL = -100
# Below this a part measures nothing; parts that shrink do not shrink further.
SMALLEST_PART = 10
# Where there are too few rows, a held-out part has this share of all of them, or what small train
# parts leave: a teacher and a student of other sizes then hold out the same rows, if they can.
HELD_OUT = {"test": 0.4, "dev": 0.1}
# Whole numbers written as floats (1.0, 2.0) are classes up to this many, scores beyond.
MOST_WHOLE_FLOATS = 20

TEXT_PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("query", "passage"),
    ("query", "document"),
    ("text_a", "text_b"),
    ("text1", "text2"),
)
TEXT_NAMES = ("text", "sentence", "review", "content", "tweet", "comment", "utterance", "question")
LABEL_NAMES = ("label", "labels", "target", "class", "category", "sentiment", "score", "rating")
WORD_NAMES = ("tokens", "words", "text")
TAG_NAMES = ("tags", "ner_tags", "pos_tags", "chunk_tags", "labels", "label")
PART_NAMES = {
    "train": ("train", "training"),
    # MNLI validates twice: the matched genres are the usual figure.
    "validation": ("validation", "validation_matched", "valid", "val", "dev"),
    "test": ("test",),
}


@dataclass
class DataConfig:
    """Where the sentences come from, and how many of them go where.

    `path`: "demo:reviews" (the default), "demo:tweets", a csv, tsv, json, jsonl, parquet or conll
    file, a directory with train, validation and test files (or one written by datasets'
    save_to_disk), or a Hub name, optionally "name:configuration". Column names left at None are
    guessed and stated in the notes; rows of one `group` stay in one part. A source's own test and
    validation parts are used.

    `task`: a GLUE task, see kdfast.distill.glue. `path` is then a folder or file in GLUE's layout,
    by default the Hub's. The official dev set is the test part (the test sets have no labels),
    `dev` rows are held out of train, and MNLI's mismatched dev set is a test part more. As
    everywhere, training rows whose text is also in a test part, or occurs twice, are dropped with a
    note.

    `kind`: what the labels are; "auto" tells "classification" (class names or numbers) from
    "regression" (fractions). "embedding": texts without labels; "reranking": queries,
    passages and a relevance from 0 to 1, the passages of a query in one part;
    "token_classification": lists of words and of tags, or conll files (a word a line, its tag last,
    an empty line after each sentence).

    `teacher_train`, `student_train`, `dev`, `test`: rows; "all" is all that the other parts leave
    of their source (one part of a source only). Default 4000, 1000, 500 and 4000; with a task dev 0
    and test "all". `shared`: teacher_train and student_train are the same rows, as in the papers,
    by default "all"; without it they have no row in common.

    `max_length`: tokens of a text (or a pair), default 64, with a task 128. `pad`: batches to their
    "longest" row, or all to "max_length".
    """

    path: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    group: str | None = None
    test_path: str | None = None
    teacher_train: int | Literal["all"] | None = None
    student_train: int | Literal["all"] | None = None
    dev: int | Literal["all"] | None = None
    test: int | Literal["all"] | None = None
    max_length: int | None = None
    seed: int = 0
    task: str | None = None
    kind: str = "auto"
    shared: bool = False
    pad: str = "longest"

    def __post_init__(self) -> None:
        """Puts the defaults in, so that every field says what holds. Raises InputError."""
        for field, allowed in (("kind", ("auto", *KINDS)), ("pad", ("longest", "max_length"))):
            if (value := getattr(self, field)) not in allowed:
                raise InputError(
                    f"data.{field} must be {', '.join(allowed[:-1])} or {allowed[-1]}, was "
                    f"{value!r}{nearest(value, allowed)}"
                )
        defaults: dict[str, Any] = {
            "path": "demo:reviews",
            **dict(zip(PARTS, (4000, 500, 4000, 1000), strict=True)),
            "max_length": 64,
        }
        if self.task is not None:
            task = glue.glue_task(self.task)
            own = "regression" if task.regression else "classification"
            if self.kind not in ("auto", own):
                raise InputError(f"data.kind is '{self.kind}', but GLUE's {self.task} is a {own}")
            if given := [n for n in ("text", "text_pair", "label", "group") if getattr(self, n)]:
                raise InputError(f"data.task names its own columns: leave data.{given[0]} out")
            self.kind = own
            defaults |= {"path": f"{glue.HUB}:{self.task}", "dev": 0, "test": "all"}
            defaults["max_length"] = 128
        if self.shared:
            whole = self.student_train if self.teacher_train is None else self.teacher_train
            defaults |= dict.fromkeys(PARTS[2:], "all" if whole is None else whole)
        for field, default in defaults.items():
            if getattr(self, field) is None:
                setattr(self, field, default)

    @property
    def pad_to(self) -> int | None:
        """DistillationCollator's pad_to."""
        return self.max_length if self.pad == "max_length" else None


@dataclass
class Splits:
    """Four parts, each with the columns text, [text_pair] and label; disjoint, but for the two
    train parts of `data.shared`.

    `kind` is one of KINDS. Labels are class numbers into `label_names`, floats when `regression`
    (kinds "regression" and "reranking"), absent for embeddings; for token classification text is a
    list of words and label as long a list of class numbers. `more_tests` has test parts beside the
    first ("mismatched" for MNLI). `notes` say what was guessed, dropped or shrunk. `fingerprints`
    hash the rows of each part, `fingerprint` all of them and the configuration.
    """

    teacher_train: datasets.Dataset
    student_train: datasets.Dataset
    dev: datasets.Dataset
    test: datasets.Dataset
    label_names: list[str] | None
    regression: bool
    notes: list[str]
    fingerprints: dict[str, str]
    fingerprint: str
    kind: str = "classification"
    more_tests: dict[str, datasets.Dataset] = dataclasses.field(default_factory=dict)

    @property
    def num_labels(self) -> int:
        """Logits that these labels need; 0 where there are none."""
        if self.label_names is not None:
            return len(self.label_names)
        return 0 if self.kind == "embedding" else 1

    def part(self, name: str) -> datasets.Dataset:
        """The part of that name, of `more_tests` too; InputError if there is none."""
        parts = {part: getattr(self, part) for part in PARTS} | self.more_tests
        if name not in parts:
            raise InputError(
                f"no part '{name}' in this data{nearest(name, parts)}: it has {', '.join(parts)}"
            )
        return parts[name]


def load_data(config: DataConfig) -> Splits:
    """Reads, cleans and splits the sentences of `config`; the same seed gives the same parts.

    Parts are stratified by label (not those of words or without labels), or made of whole groups,
    and have exactly the sizes asked for where there are enough rows; otherwise test and dev shrink
    to shares of the rows, the train parts in proportion to what is left, and a note says so.
    Raises InputError for whatever in the source or the configuration makes that impossible.
    """
    _check_config(config)
    notes: list[str] = []
    sources, class_names = _read(config, notes)
    kind = config.kind
    names: list[str] | None = None
    if config.task is not None:
        labelled = class_names.get("label")
        of_task = glue.TASKS[config.task].label_names
        names = None if of_task is None else list(of_task)
        for source, table in sources.items():
            sources[source] = glue.task_rows(table, config.task, source, labelled, notes)
        columns = {column: column for column in next(iter(sources.values()))}
    else:
        columns = _columns(next(iter(sources.values())), config, notes)
        names = class_names.get(columns.get("label", ""))
    tables = {}
    for source, table in sources.items():
        if kind == "token_classification":
            rows = _clean_words(table, columns, source, notes)
        else:
            rows = _clean(table, columns, names, source, notes)
        if len(rows):
            tables[source] = rows
    if config.test_path is not None and "test" not in tables:
        raise InputError(f"test file '{config.test_path}' has no row with both a text and a label")
    if not {"train", "all"} & set(tables):
        raise InputError("no row of the training data has both a text and a label")
    label_names = None
    if kind == "token_classification":
        label_names = _encode_tags(tables, names)
    elif kind != "embedding":
        label_names = _encode_labels(tables, names, kind, notes)
        if kind == "auto":
            kind = "regression" if label_names is None else "classification"
    parts = _split(tables, config, kind, notes)

    label_type = datasets.Value("int64" if label_names is not None else "float64")
    text_type = datasets.Value("string")
    words = kind == "token_classification"
    features = {
        role: [one] if words else one
        for role, one in (("text", text_type), ("text_pair", text_type), ("label", label_type))
        if role in columns
    }
    made, fingerprints = {}, {}
    for part, table in parts.items():
        rows = {role: table[role].tolist() for role in features}
        if kind == "classification" and len(found := set(rows["label"])) == 1:
            assert label_names is not None
            raise InputError(
                f"the {part} part ({len(table)} rows) would hold one class only, "
                f"'{label_names[found.pop()]}': ask for more rows (data.{part}), or take another "
                "data.seed"
            )
        made[part] = datasets.Dataset.from_dict(rows, datasets.Features(features))
        fingerprints[part] = _hash(rows)
    return Splits(
        **{part: made.pop(part) for part in PARTS},
        label_names=label_names,
        regression=kind in SCALED,
        notes=notes,
        fingerprints=fingerprints,
        fingerprint=_hash([dataclasses.asdict(config), label_names, fingerprints]),
        kind=kind,
        more_tests=made,
    )


def _check_config(config: DataConfig) -> None:
    for part in PARTS:
        size = getattr(config, part)
        if size != "all" and (not isinstance(size, int) or size < 0):
            raise InputError(f"data.{part} must be a whole number of rows or 'all', not {size!r}")
    if not isinstance(config.seed, int) or config.seed < 0:
        raise InputError(f"data.seed must be a whole number, 0 or more, not {config.seed!r}")
    if not any(getattr(config, part) for part in PARTS):
        raise InputError(f"all parts are empty: set one of data.{', data.'.join(PARTS)}")
    if config.shared and config.teacher_train != config.student_train:
        raise InputError(
            "data.shared makes teacher_train and student_train the same rows: their sizes were "
            f"{config.teacher_train} and {config.student_train}"
        )


# Sources: each gives named tables, {"all": ...} or {"train": ..., "validation": ..., "test": ...}.


def _read(
    config: DataConfig, notes: list[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, list[str]]]:
    """Tables by name, and the class names that a Hub set declares for its integer columns."""
    path = os.path.expanduser(str(config.path))
    names: dict[str, list[str]] = {}
    if path.startswith("demo:"):
        tables = {"all": demo_sentences(path.removeprefix("demo:"))}
    elif os.path.isdir(path):
        tables, names = _read_directory(Path(path), config.task, notes)
    elif os.path.isfile(path) or Path(path).suffix.lower() in EXTENSIONS:
        tables = {"all": _read_file(Path(path), notes, config.task)}
    elif path.startswith((".", os.sep)) or path.count("/") > 1 or not path:
        raise InputError(f"no data.path '{config.path}': give a file, a folder or a Hub name")
    else:
        tables, names = _read_hub(path, config.task, notes)
    if config.test_path is not None:
        tables = {("train" if name == "all" else name): table for name, table in tables.items()}
        test_path = Path(os.path.expanduser(config.test_path))
        tables["test"] = _read_file(test_path, notes, config.task)
    return tables, names


def _read_file(path: Path, notes: list[str], task: str | None = None) -> pd.DataFrame:
    kind = path.suffix.lower()
    if kind not in EXTENSIONS:
        raise InputError(f"cannot read '{path}': its name must end in {', '.join(EXTENSIONS)}")
    try:
        with path.open("rb") as file:
            start = file.read(2)
        if not start:
            raise InputError(f"'{path}' is empty")
        if kind == ".parquet":
            table = pd.read_parquet(path)
        elif kind == ".tsv" and task is not None:
            table = glue.read_tsv(path, notes)
        else:
            encoding = "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            try:
                table = _read_text(path, kind, encoding)
            except UnicodeDecodeError:
                table = _read_text(path, kind, "latin-1")
                notes.append(f"{path.name} is not UTF-8: read as latin-1")
    except FileNotFoundError as error:
        raise InputError(f"no file '{path}'") from error
    except pd.errors.EmptyDataError as error:
        raise InputError(f"'{path}' is empty") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read '{path}' as {kind[1:]}: {first_line(error)}") from error
    if table.empty:
        raise InputError(f"'{path}' has no rows")
    return table


def _read_text(path: Path, kind: str, encoding: str) -> pd.DataFrame:
    if kind in (".json", ".jsonl"):
        # Without conversion: a text that looks like a date or a number stays what it is.
        settings: dict[str, Any] = {"dtype": False, "encoding": encoding}
        try:
            return pd.read_json(path, lines=kind == ".jsonl", **settings)
        except UnicodeDecodeError:
            raise
        except ValueError:
            if kind == ".jsonl":
                raise
            return pd.read_json(path, lines=True, **settings)
    if kind == ".conll":
        return _read_conll(path.read_text(encoding))
    # "None" and "NA" are words here, and labels: only an empty cell is missing.
    settings = {"encoding": encoding, "keep_default_na": False, "na_values": [""]}
    if kind == ".csv":
        return pd.read_csv(path, **settings)
    # A tsv may quote its cells, or (as GLUE's do) use quotation marks as plain characters: then
    # quoting swallows line ends, and the row count tells.
    lines = sum(1 for line in path.read_text(encoding).splitlines() if line.strip())
    try:
        table = pd.read_csv(path, sep="\t", **settings)
        if len(table) == lines - 1:
            return table
    except pd.errors.ParserError:
        pass
    return pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, **settings)


def _read_conll(text: str) -> pd.DataFrame:
    """Sentences of words and tags: first and last column of each line; comments start with '# '."""
    sentences: list[list[list[str]]] = [[]]
    for line in text.split("\n"):
        cells = line.split()
        if not cells or cells[0] == "-DOCSTART-":
            sentences.append([])
        elif not line.startswith("# "):
            if len(cells) < 2:
                raise ValueError(f"a line has a word and no tag: '{line.strip()[:40]}'")
            sentences[-1].append(cells)
    filled = [sentence for sentence in sentences if sentence]
    return pd.DataFrame(
        {
            "words": [[cells[0] for cells in sentence] for sentence in filled],
            "tags": [[cells[-1] for cells in sentence] for sentence in filled],
        }
    )


def _read_directory(
    path: Path, task: str | None, notes: list[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, list[str]]]:
    part_names = PART_NAMES
    if task is not None:
        path, part_names = glue.task_folder(path, task), glue.PART_NAMES
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _tables(datasets.load_from_disk(str(path)), str(path), part_names, notes)
    tables = {}
    for name, aliases in part_names.items():
        # Hub folders number their files: train-00000-of-00002.parquet.
        files = sorted(
            file
            for file in path.iterdir()
            if file.suffix.lower() in EXTENSIONS and file.stem.split("-0")[0].lower() in aliases
        )
        if files:
            read = [_read_file(file, notes, task) for file in files]
            tables[name] = pd.concat(read, ignore_index=True)
    if task == "mrpc" and "train" not in tables:
        tables = glue.read_msr(path, notes)
    if "train" not in tables:
        found = ", ".join(sorted(file.name for file in path.iterdir())[:8]) or "nothing"
        raise InputError(
            f"directory '{path}' has no train file (train.csv, .tsv, .json, .jsonl or .parquet); "
            f"it holds {found}"
        )
    return tables, {}


def _read_hub(
    path: str, task: str | None, notes: list[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, list[str]]]:
    name, _, configuration = path.partition(":")
    try:
        with quick_offline():
            loaded = datasets.load_dataset(name, configuration or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"'{path}' is no file or folder here, and could not be had from the Hub "
            f"({first_line(error)}). Without network: give a csv, tsv, json, jsonl or parquet "
            "file, or a folder written by datasets' save_to_disk on another machine"
            + ("" if task is None else " (data.path: GLUE's own files will do)")
        ) from error
    return _tables(loaded, path, PART_NAMES if task is None else glue.PART_NAMES, notes)


def _tables(
    loaded: datasets.Dataset | datasets.DatasetDict,
    path: str,
    part_names: Mapping[str, tuple[str, ...]],
    notes: list[str],
) -> tuple[dict[str, pd.DataFrame], dict[str, list[str]]]:
    """The parts of a datasets object under this file's names, with its class names."""
    if isinstance(loaded, datasets.Dataset):
        found, features = {"all": loaded}, loaded.features
    else:
        found = {}
        for name, candidates in part_names.items():
            for candidate in candidates:
                if candidate in loaded:
                    found.setdefault(name, loaded[candidate])
        if "train" not in found:
            raise InputError(f"'{path}' has no train part, only {', '.join(loaded)}")
        features = found["train"].features
        used = {name for names in part_names.values() for name in names}
        if unused := [name for name in loaded if name not in used]:
            notes.append(f"{path}: parts not used: {', '.join(unused)}")
    names = {}
    for column, feature in features.items():
        # Of one label a row, or of a list of them.
        label = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        if isinstance(label, datasets.ClassLabel):
            names[column] = list(label.names)
    return {name: part.to_pandas() for name, part in found.items()}, names


# Columns and rows.


def _columns(table: pd.DataFrame, config: DataConfig, notes: list[str]) -> dict[str, str]:
    """{role: column} for text, label (not for embeddings) and, where there is one, text_pair and
    group."""
    words, labelled = config.kind == "token_classification", config.kind != "embedding"
    if (words or not labelled) and config.text_pair is not None:
        raise InputError(f"data.kind '{config.kind}' reads one text: leave data.text_pair out")
    known = {str(column): column for column in table.columns}
    listed = ", ".join(f"'{name[:40]}'" for name in known)
    chosen = {
        role: name
        for role in ("text", "text_pair", "label", "group")
        if (name := getattr(config, role)) is not None and (labelled or role != "label")
    }
    for role, name in chosen.items():
        if name not in known:
            raise InputError(
                f"data.{role} is '{name}', but the columns are {listed}{nearest(name, known)}"
            )
    # The group may be the text: a query.
    own = {role: name for role, name in chosen.items() if (role, name) != ("group", config.text)}
    if len(set(own.values())) < len(own):
        raise InputError(f"data.{', data.'.join(own)} must name different columns")
    guessed = dict(chosen)
    if config.path == "demo:reviews":
        guessed.setdefault("group", "movie")
    demo = str(config.path).startswith("demo:")

    def free(names: Iterable[str]) -> dict[str, str]:
        """Columns without a role yet, by lower-case name, those among `names` only."""
        taken = {
            name
            for role, name in guessed.items()
            if (role, config.kind) != ("group", "reranking")  # which may be the query, the text
        }
        left = {name.lower(): name for name in known if name not in taken}
        return {name: left[name] for name in names if name in left}

    if "label" not in guessed and labelled:
        candidates = list(free(TAG_NAMES if words else LABEL_NAMES).values())
        if len(candidates) > 1 and candidates[0].lower() == "label":
            candidates = candidates[:1]
        guessed["label"] = _only(candidates, "label", listed)
    if "text" not in guessed and words:
        guessed["text"] = _only(list(free(WORD_NAMES).values())[:1], "text", listed)
    if "text" not in guessed:
        pairs = [
            pair
            for first, second in TEXT_PAIRS
            if labelled and len(pair := list(free((first, second)).values())) == 2
        ]
        if pairs and "text_pair" not in guessed:
            guessed["text"], guessed["text_pair"] = pairs[0]
        else:
            first_of_pairs = tuple(dict.fromkeys(first for first, _ in TEXT_PAIRS))
            candidates = list(free(dict.fromkeys(TEXT_NAMES + first_of_pairs)).values())
            if len(candidates) > 1 and candidates[0].lower() == "text":
                candidates = candidates[:1]
            if not candidates:
                candidates = [
                    name
                    for name in free(name.lower() for name in known).values()
                    if any(isinstance(cell, str) for cell in table[known[name]])
                ]
            guessed["text"] = _only(candidates, "text", listed)
    if config.kind == "reranking" and "text_pair" not in guessed:
        raise InputError(
            "data.kind 'reranking' needs a query and a passage: name the second column with "
            f"data.text_pair=NAME; the columns are {listed}"
        )
    if config.kind == "reranking":
        guessed.setdefault("group", guessed["text"])  # a query's candidates stay together
    if not demo and (
        stated := [f"{role} = '{name}'" for role, name in guessed.items() if role not in chosen]
    ):
        notes.append(f"columns guessed: {', '.join(stated)}")
    return {role: known[name] for role, name in guessed.items()}


def _only(candidates: list[str], role: str, listed: str) -> str:
    if len(candidates) == 1:
        return candidates[0]
    why = f"could be {' or '.join(map(repr, candidates))}" if candidates else "has no known name"
    raise InputError(
        f"the {role} column {why}: name it with data.{role}=NAME; the columns (from the first line "
        f"of the file) are {listed}"
    )


def _check_columns(table: pd.DataFrame, columns: Mapping[str, str], source: str) -> str:
    """ " of the source's test part", or whichever it is, for messages; InputError if a column is
    absent from it."""
    where = "" if source == "all" else f" of the source's {source} part"
    if absent := [column for column in columns.values() if column not in table.columns]:
        raise InputError(
            f"no column '{absent[0]}'{where}: its columns are {', '.join(map(str, table.columns))}"
        )
    return where


def _clean(
    table: pd.DataFrame,
    columns: Mapping[str, str],
    class_names: list[str] | None,
    source: str,
    notes: list[str],
) -> pd.DataFrame:
    """The columns by role, without rows that lack one; texts stripped, labels as they came."""
    where = _check_columns(table, columns, source)
    rows = pd.DataFrame({role: table[column] for role, column in columns.items()})
    texts = [role for role in ("text", "text_pair") if role in rows]
    for role in texts:
        filled = rows[role].astype(object).where(rows[role].notna(), "")
        rows[role] = [str(text).strip() for text in filled]
    # Texts without labels (embeddings) lack none.
    labels = rows["label"] if "label" in rows else pd.Series("none", index=rows.index)
    if labels.map(lambda label: isinstance(label, (list, dict, np.ndarray))).any():
        raise InputError(f"label column '{columns['label']}' holds lists: give one label a row")
    unlabelled = labels.isna() | (labels.astype(str).str.strip() == "")
    # The Hub's way to say unlabelled, in single rows (SNLI) and whole test parts (GLUE).
    if pd.api.types.is_numeric_dtype(labels) and (class_names or (labels == -1).all()):
        unlabelled |= labels == -1
    if source != "train" and where and len(rows) and unlabelled.all():
        notes.append(f"the source's {source} part has no labels: not used")
        return rows[:0]
    empty = unlabelled.copy()
    for role in texts:
        empty |= rows[role] == ""
    if "group" in rows:
        empty |= rows["group"].isna()
    if empty.any():
        notes.append(f"{empty.sum():,} rows{where} dropped: a text, label or group is missing")
    floats = pd.api.types.is_float_dtype(labels) and labels.isna().any()
    if floats and (labels.dropna() % 1 == 0).all():
        # Integers beside a missing value: pandas made them floats.
        rows["label"] = labels.astype("Int64")
    return rows[~empty].reset_index(drop=True)


def _clean_words(
    table: pd.DataFrame, columns: Mapping[str, str], source: str, notes: list[str]
) -> pd.DataFrame:
    """Words and tags of each row as tuples, by role; rows without a word or a tag left out."""
    where = _check_columns(table, columns, source)
    made: dict[str, list[Any]] = {role: table[column].tolist() for role, column in columns.items()}
    for role in ("text", "label"):
        cells = made[role]
        cells = [() if np.ndim(cell) == 0 and pd.isna(cell) else cell for cell in cells]
        if wrong := [cell for cell in cells if not isinstance(cell, (list, tuple, np.ndarray))]:
            raise InputError(
                f"column '{columns[role]}' must hold lists (of words, of tags), was {wrong[0]!r}"
            )
        made[role] = [tuple(cell) for cell in cells]
    made["text"] = [tuple(str(word) for word in row) for row in made["text"]]
    for words, tags in zip(made["text"], made["label"], strict=True):
        if tags and len(words) != len(tags):
            raise InputError(
                f"{len(words)} words and {len(tags)} tags in one row{where}: "
                f"'{' '.join(words)[:40]}'"
            )
    rows = pd.DataFrame({role: pd.Series(cells, dtype=object) for role, cells in made.items()})
    empty = rows["label"].map(len) == 0
    if empty.all() and source not in ("train", "all"):
        notes.append(f"the source's {source} part has no labels: not used")
    elif empty.any():
        notes.append(f"{empty.sum():,} rows{where} dropped: they have no word or no tag")
    return rows[~empty].reset_index(drop=True)


def _encode_tags(tables: Mapping[str, pd.DataFrame], class_names: list[str] | None) -> list[str]:
    """Replaces the tags by class numbers and returns their names."""
    found = {tag for table in tables.values() for tags in table["label"] for tag in tags}
    if class_names is not None:
        names, numbered = class_names, {i: i for i in range(len(class_names))}
        if strange := sorted(str(tag) for tag in found if tag not in numbered):
            raise InputError(f"tag {strange[0]} is none of the source's {len(names)} classes")
    else:
        whole = all(isinstance(tag, (int, np.integer)) for tag in found)
        order = sorted(found) if whole else sorted(found, key=str)
        names, numbered = [str(tag) for tag in order], {tag: i for i, tag in enumerate(order)}
    known = {tag for tags in tables.get("train", tables.get("all"))["label"] for tag in tags}
    if unknown := sorted(names[numbered[tag]] for tag in found - known):
        raise InputError(
            f"the test or validation part has tags that no training row has: {_shown(unknown)}"
        )
    if len(found) < 2:
        raise InputError(f"all words have the tag '{names[numbered[found.pop()]]}'")
    for table in tables.values():
        table["label"] = [tuple(numbered[tag] for tag in tags) for tags in table["label"]]
    return names


def _encode_labels(
    tables: Mapping[str, pd.DataFrame],
    class_names: list[str] | None,
    kind: str,
    notes: list[str],
) -> list[str] | None:
    """Replaces the labels by class numbers and returns their names, or by floats and None."""
    labels = pd.concat([table["label"] for table in tables.values()], ignore_index=True)
    is_bool = labels.map(lambda label: isinstance(label, (bool, np.bool_))).all()
    numbers = pd.to_numeric(labels.astype(object), errors="coerce").astype(float)
    if kind in SCALED:
        if numbers.isna().any():
            word = labels[numbers.isna()].iloc[0]
            raise InputError(f"data.kind is '{kind}', but the label '{word}' is no number")
        if numbers.nunique() < 2:
            raise InputError(f"all {len(labels):,} rows have the label {numbers.iloc[0]:g}")
    if (kind in SCALED or not is_bool) and numbers.notna().all():
        if not np.isfinite(numbers).all():
            raise InputError("a label is infinite")
        fractions = bool((numbers % 1 != 0).any())
        floats = all(pd.api.types.is_float_dtype(table["label"]) for table in tables.values())
        if kind in SCALED or (
            kind == "auto" and (fractions or (floats and numbers.nunique() > MOST_WHOLE_FLOATS))
        ):
            if kind == "auto":
                notes.append(
                    f"labels are numbers from {numbers.min():g} to {numbers.max():g} "
                    f"({numbers.nunique():,} values): regression"
                )
            for table in tables.values():
                table["label"] = pd.to_numeric(table["label"].astype(object)).astype(float)
            return None

        def value(label: Any) -> Any:
            return float(label) if fractions else int(float(label))
    else:

        def value(label: Any) -> Any:
            return str(label).strip()

    found = sorted({value(label) for label in labels})
    if class_names is None:
        names = [str(label) for label in found]
        numbered: dict[Any, int] = {label: i for i, label in enumerate(found)}
        if isinstance(found[0], int) and found != list(range(len(found))):
            shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
            notes.append(f"labels {shown} are numbered 0 to {len(names) - 1} in this order")
    else:
        names, numbered = class_names, {i: i for i in range(len(class_names))}
        if strange := [label for label in found if label not in numbered]:
            raise InputError(f"label {strange[0]} is none of the source's {len(names)} classes")
    known = {value(label) for label in tables.get("train", tables.get("all"))["label"]}
    if unknown := [names[numbered[label]] for label in found if label not in known]:
        raise InputError(
            f"the test or validation part has labels that no training row has: {_shown(unknown)}; "
            f"the training data has {_shown([names[numbered[label]] for label in sorted(known)])}"
        )
    if len(found) < 2:
        raise InputError(f"all {len(labels):,} rows have the label '{names[numbered[found[0]]]}'")
    if len(found) > len(labels) / 2:
        raise InputError(
            f"the label column has {len(found):,} different values in {len(labels):,} rows: these "
            "are no classes; name another column with data.label, or give numbers with a fraction "
            "for regression"
        )
    for table in tables.values():
        table["label"] = [numbered[value(label)] for label in table["label"]]
    return names


# Parts.


def _split(
    tables: dict[str, pd.DataFrame], config: DataConfig, kind: str, notes: list[str]
) -> dict[str, pd.DataFrame]:
    """The four parts (and "mismatched", as large as the test part), from one table or from those
    that the source brings."""
    mismatched = {name: (name,) for name in tables if name == "mismatched"}
    train = PARTS[2:3] if config.shared else PARTS[2:]
    if "test" in tables and "validation" in tables:
        pools = {"test": PARTS[:1], **mismatched, "validation": PARTS[1:2], "train": train}
        notes.append("test and dev rows are from the source's own test and validation parts")
    elif own := [source for source in ("test", "validation") if source in tables]:
        pools = {own[0]: PARTS[:1], **mismatched, "train": (*PARTS[1:2], *train)}
        notes.append(f"test rows are the source's {own[0]} part, dev rows are held out of train")
    else:
        (source,) = {"train", "all"} & set(tables)
        pools = {**mismatched, source: (*PARTS[:2], *train)}
    parts: dict[str, pd.DataFrame] = {}
    seen_texts: set[tuple[str, ...]] = set()
    seen_groups: set[Any] = set()
    for number, (source, names) in enumerate(pools.items()):
        rows = tables[source]
        texts = list(zip(*(rows[r] for r in ("text", "text_pair") if r in rows), strict=True))
        # A test or validation part that the source made is left as it is, repetitions included.
        kept = [text not in seen_texts for text in texts]
        if source in ("train", "all"):
            first = ~pd.Series(texts).duplicated()
            kept = [keep and new for keep, new in zip(kept, first, strict=True)]
        if dropped := len(kept) - sum(kept):
            notes.append(f"{dropped:,} rows dropped whose text occurs earlier or in a test part")
        sizes = {name: getattr(config, "test" if name in mismatched else name) for name in names}
        if not any(kept) and any(sizes.values()):
            raise InputError("all rows of the training data also occur in the test part")
        rows = rows[kept]
        if "group" in rows:
            apart = ~rows["group"].isin(seen_groups)
            if not apart.all():
                notes.append(f"{(~apart).sum():,} rows dropped whose group is in a test part")
            rows = rows[apart]
            seen_groups.update(rows["group"])
        seen_texts.update(texts)
        rng = np.random.default_rng([config.seed, number])
        parts |= _cut(rows.reset_index(drop=True), sizes, kind, rng, notes)
    if config.shared:
        parts["student_train"] = parts["teacher_train"]
    return parts


def _cut(
    rows: pd.DataFrame,
    sizes: dict[str, Any],
    kind: str,
    rng: np.random.Generator,
    notes: list[str],
) -> dict[str, pd.DataFrame]:
    """Consecutive blocks of one random order of the rows, or of their groups.

    Rows are stratified by class (labels on a scale: by fifths), groups by fifths of their mean
    label, rows of words or without labels not at all.
    """
    if not any(sizes.values()):
        return {name: rows[:0] for name in sizes}
    usable = len(rows)
    # From here on a unit (a group, or a single row) has a label, a stratum and a place.
    stratified = kind in ("classification", *SCALED)
    labels = rows["label"].to_numpy(dtype=float) if stratified else np.zeros(len(rows))
    unit: np.ndarray = np.arange(len(rows))
    if "group" in rows:
        unit = pd.factorize(rows["group"])[0]
        counts = np.bincount(unit)
        labels = np.bincount(unit, weights=labels) / counts
        # Each part ends with a whole group, and may take from the next one's share that much.
        usable -= (sum(size > 0 for size in sizes.values()) - 1) * int(counts.max())
    fifths = stratified and (kind in SCALED or "group" in rows)
    ranks = np.argsort(np.argsort(labels, kind="stable"))
    stratum = np.asarray(ranks * 5 // len(ranks) if fifths else labels)
    # The k-th of the n members of a stratum stands at k / n: any block of the order then holds
    # every stratum in proportion.
    place: np.ndarray = np.empty(len(labels))
    for value in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == value))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    place = np.argsort(np.argsort(place, kind="stable"))[unit]
    order = np.argsort(place, kind="stable")

    rest = [name for name, size in sizes.items() if size == "all"]
    if len(rest) > 1:
        raise InputError(
            f"data.{' and data.'.join(rest)} are both 'all' of the same rows: give all but one a "
            "number, or set data.shared=true for the same training rows"
        )
    for name in rest:
        others = sum(size for size in sizes.values() if size != "all")
        sizes = {**sizes, name: max(min(usable, SMALLEST_PART), usable - others)}
    asked = sum(sizes.values())
    if asked > usable:
        least = {name: min(size, SMALLEST_PART) for name, size in sizes.items()}
        spare = usable - sum(least.values())
        if spare < 0:
            raise InputError(
                f"too few rows{' or too large groups' if 'group' in rows else ''}: "
                f"{len(rows):,} usable for the parts {', '.join(sizes)}, "
                f"which need {sum(least.values()):,} at least ({SMALLEST_PART} each)"
            )
        sizes = _shrunk(sizes, least, usable, len(rows))
        notes.append(
            f"{asked:,} rows asked for, {len(rows):,} usable"
            f"{' in whole groups' if 'group' in rows else ''}: parts shrink to "
            + ", ".join(f"{size:,} {name}" for name, size in sizes.items())
        )
    parts, start = {}, 0
    for name, size in sizes.items():
        end = start + size
        if "group" in rows and size:
            end = int(np.searchsorted(place[order], place[order[end - 1]], side="right"))
        chosen = rng.permutation(order[start:end])
        # A query's candidates are ranked together, all of them.
        parts[name] = rows.iloc[chosen if kind == "reranking" else chosen[:size]]
        start = end
    return parts


def _shrunk(sizes: dict[str, int], least: dict[str, int], usable: int, rows: int) -> dict[str, int]:
    """Sizes that fit: held-out parts by their shares, then the train parts in proportion."""
    sizes = dict(sizes)
    held = [name for name in HELD_OUT if name in sizes]
    train = [name for name in sizes if name not in HELD_OUT]
    for name in held:
        others = sum(size for other, size in sizes.items() if other != name)
        floor = max(least[name], int(HELD_OUT[name] * rows), usable - others)
        sizes[name] = min(sizes[name], floor)
    excess = sum(sizes.values()) - usable
    # The held-out ones again only where the train parts have come down to their least.
    for names in (train, held):
        spare = sum(sizes[name] - least[name] for name in names)
        share = min(excess, spare) / spare if spare else 0
        for name in names:
            sizes[name] -= math.ceil((sizes[name] - least[name]) * share)
        excess = sum(sizes.values()) - usable
        if excess <= 0:
            break
    return sizes


# What a teacher and a model need.


def check_labels(splits: Splits, teacher_config: PreTrainedConfig) -> Splits:
    """The splits with their labels numbered as the teacher numbers them.

    Labels are matched by name (whatever the case) where both sides have names, otherwise by
    number; rows without labels (embeddings) need nothing of the teacher, labels on a scale one
    logit. Raises InputError where the number, the names or the kind of task differ.
    """
    if splits.kind == "embedding":
        return splits
    id2label = dict(sorted((teacher_config.id2label or {}).items()))
    count = len(id2label)
    if splits.regression != (count == 1):
        kinds = "scores (regression)", "classes"
        data, teacher = kinds if splits.regression else kinds[::-1]
        raise InputError(f"the data has {data}, but the teacher predicts {teacher}")
    if splits.label_names is None:
        return splits
    ours = splits.label_names
    theirs = [str(name) for name in id2label.values()]
    if len(ours) != count:
        raise InputError(
            f"the data has {len(ours)} labels ({_shown(ours)}), the teacher {count} "
            f"({_shown(theirs)}): give a teacher fine-tuned on these labels"
        )
    if _unnamed(ours) or _unnamed(theirs):
        if not (_unnamed(ours) and _unnamed(theirs)):
            pairs = _shown([f"{a} = {b}" for a, b in zip(ours, theirs, strict=True)])
            note = f"labels matched to the teacher's by number, for want of names: {pairs}"
            return dataclasses.replace(splits, notes=[*splits.notes, note])
        return splits
    place = {name.strip().casefold(): i for i, name in enumerate(theirs)}
    numbers = [place.get(name.strip().casefold()) for name in ours]
    if None in numbers or len(set(numbers)) < count:
        raise InputError(
            f"the data's labels ({_shown(ours)}) are not the teacher's ({_shown(theirs)}): rename "
            "them in the data, or in id2label of the teacher's config.json"
        )
    if numbers == list(range(count)):
        return splits

    def renumbered(rows: datasets.Dataset) -> datasets.Dataset:
        labels = [
            [numbers[one] for one in label] if isinstance(label, list) else numbers[label]
            for label in rows["label"]
        ]
        return datasets.Dataset.from_dict({**rows[:], "label": labels}, rows.features)

    note = f"labels renumbered as the teacher's: {_shown(theirs)}"
    return dataclasses.replace(
        splits,
        **{part: renumbered(getattr(splits, part)) for part in PARTS},
        more_tests={name: renumbered(rows) for name, rows in splits.more_tests.items()},
        label_names=theirs,
        notes=[*splits.notes, note],
    )


def _unnamed(names: Sequence[str]) -> bool:
    """Whether names only count: 0, 1, ... or LABEL_0, LABEL_1, ..."""
    return all(re.fullmatch(r"(LABEL_)?-?\d+", name) for name in names)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def tokenize(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> datasets.Dataset:
    """input_ids, attention_mask, (token_type_ids) and labels of a part, cut at max_length tokens.

    With a teacher tokenizer of another vocabulary, the same texts once more with the prefix
    `teacher_`. Pairs also have `query`, the number of their first text, which is no model's input.
    A part without labels gives none; one of words a label for each token: that of the word on its
    first piece, -100 on other pieces and special tokens. Raises InputError for a max_length beyond
    a tokenizer's own limit, and, with words, for two vocabularies (losses and scores compare token
    by token) or a tokenizer that does not tell which word a token is of.
    """
    words = not isinstance(dataset.features["text"], datasets.Value)
    if words and teacher_tokenizer is not None:
        raise InputError(
            "token classification compares student and teacher token by token: both need one "
            "vocabulary (take the student's layers from the teacher, or a base with its tokenizer)"
        )
    if words and not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} does not tell which word a token is of: token "
            "classification needs a fast tokenizer"
        )
    texts = [dataset[column] for column in ("text", "text_pair") if column in dataset.column_names]
    columns: dict[str, Any] = {}
    if len(texts) == 2:  # which rows are candidates of one query, for scoring alone
        columns["query"] = pd.factorize(np.array(texts[0], dtype=object))[0].tolist()
    labels = list(dataset["label"]) if "label" in dataset.column_names else None
    for prefix, one in (("", tokenizer), ("teacher_", teacher_tokenizer)):
        if one is None:
            continue
        if not 4 <= max_length <= one.model_max_length:
            whose = "teacher's" if prefix else "student's"
            raise InputError(
                f"data.max_length is {max_length}: it must be between 4 and the "
                f"{one.model_max_length} tokens that the {whose} tokenizer allows"
            )
        if not len(dataset):
            columns |= {f"{prefix}{name}": [] for name in one.model_input_names}
            continue
        rows = [list(text) for text in texts]
        if words and getattr(one, "add_prefix_space", None) is False:
            # GPT-2's and RoBERTa's tokens hold the space before them: as in running text, all words
            # but the first have one.
            rows = [[[*row[:1], *(f" {word}" for word in row[1:])] for row in rows[0]]]
        encoded = one(*rows, truncation=True, max_length=max_length, is_split_into_words=words)
        columns |= {f"{prefix}{name}": encoded[name] for name in encoded}
        if words:
            assert labels is not None
            labels = [_on_pieces(row, encoded.word_ids(i)) for i, row in enumerate(labels)]
    return datasets.Dataset.from_dict(columns if labels is None else {**columns, "labels": labels})


def _on_pieces(labels: Sequence[int], words: Sequence[int | None]) -> list[int]:
    """One label a token: its word's on the first piece, NO_LABEL elsewhere."""
    before = (None, *words)
    return [
        NO_LABEL if word is None or word == last else labels[word]
        for word, last in zip(words, before, strict=False)
    ]


def same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether both tokenizers make the same tokens of any text, so that ids can be shared."""
    probe = ("The café's 2nd  Über-film (1999) isn't half BAD…", "naïve\tTEXT 東京 🙂")
    return first.get_vocab() == second.get_vocab() and (
        first(*probe)["input_ids"] == second(*probe)["input_ids"]
    )


@dataclass
class DistillationCollator:
    """Pads a batch of tokenized rows to its longest, the teacher's columns to theirs.

    With `pad_to`, both to that many tokens (losses that compare texts by position need one length).

    Gives input_ids, attention_mask, (token_type_ids), all [B, N] int64, the same with the prefix
    `teacher_` [B, N_t] where the rows have them, and, where they have labels, labels [B] (int64 or
    float32) or, one for each token, [B, N] int64 with -100 on padding. Raises InputError for a row
    of more than `pad_to` tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None = None
    pad_to: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        batch: dict[str, torch.Tensor] = {}
        padding: dict[str, Any] = {"padding": True}
        if self.pad_to is not None:
            padding = {"padding": "max_length", "max_length": self.pad_to}
        for prefix, tokenizer in (("", self.tokenizer), ("teacher_", self.teacher_tokenizer)):
            if tokenizer is None:
                continue
            names = [name for name in tokenizer.model_input_names if f"{prefix}{name}" in rows[0]]
            if not names:  # a run that needs no teacher drops the teacher's columns
                continue
            longest = max(len(row[f"{prefix}{names[0]}"]) for row in rows)
            if self.pad_to is not None and longest > self.pad_to:
                raise InputError(f"pad_to is {self.pad_to}, and a row has {longest} tokens")
            features = [{name: row[f"{prefix}{name}"] for name in names} for row in rows]
            padded = pad_without_fast_tokenizer_warning(
                tokenizer, features, return_tensors="pt", **padding
            )
            batch |= {f"{prefix}{name}": padded[name] for name in names}
        if "labels" not in rows[0]:
            return batch
        labels = [row["labels"] for row in rows]
        if isinstance(labels[0], Sequence):
            length = batch["input_ids"].shape[1]
            left = self.tokenizer.padding_side == "left"
            pads = [[NO_LABEL] * (length - len(row)) for row in labels]
            batch["labels"] = torch.tensor(
                [
                    [*pad, *row] if left else [*row, *pad]
                    for pad, row in zip(pads, labels, strict=True)
                ]
            )
            return batch
        kind = torch.float32 if isinstance(labels[0], float) else torch.int64
        batch["labels"] = torch.tensor(labels, dtype=kind)
        return batch


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
