"""The nine GLUE tasks (Wang et al. 2019): their columns, labels, official metrics and files.

Metrics as GLUE defines them: Matthews correlation for CoLA, Pearson and Spearman correlation for
STS-B (a regression), F1 of the positive class and accuracy for MRPC and QQP, accuracy for the
others (MNLI on matched and mismatched genres). The first metric of a task is its primary one: where
there are two, the one that Devlin et al. 2019 (Table 1) report.

Two layouts are read. The Hub's (`nyu-mll/glue`): the columns below, `label` as a class number, -1
for unlabelled, in any file type. The official archive's tsv files: other column names, and labels
by name in some tasks. In a tsv file of either, quotation marks are plain characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdfast.errors import InputError, nearest

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One task. text: one column or two of the Hub's layout; official: text columns and label in
    the archive's tsv files; label_names: in the Hub's order, None for regression."""

    folder: str
    text: tuple[str, ...]
    official: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...] = ("accuracy",)

    @property
    def regression(self) -> bool:
        return self.label_names is None


SENTENCES = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        "CoLA",
        ("sentence",),
        ("sentence", "label"),
        ("unacceptable", "acceptable"),
        ("matthews",),
    ),
    "sst2": GlueTask("SST-2", ("sentence",), ("sentence", "label"), ("negative", "positive")),
    "mrpc": GlueTask(
        "MRPC",
        SENTENCES,
        ("#1 String", "#2 String", "Quality"),
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
    ),
    "qqp": GlueTask(
        "QQP",
        ("question1", "question2"),
        ("question1", "question2", "is_duplicate"),
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
    ),
    "stsb": GlueTask("STS-B", SENTENCES, (*SENTENCES, "score"), None, ("spearman", "pearson")),
    "mnli": GlueTask(
        "MNLI",
        ("premise", "hypothesis"),
        (*SENTENCES, "gold_label"),
        ("entailment", "neutral", "contradiction"),
    ),
    "qnli": GlueTask(
        "QNLI", ("question", "sentence"), ("question", "sentence", "label"), ENTAILMENT
    ),
    "rte": GlueTask("RTE", SENTENCES, (*SENTENCES, "label"), ENTAILMENT),
    "wnli": GlueTask("WNLI", SENTENCES, (*SENTENCES, "label"), ENTAILMENT[::-1]),
}
# CoLA's tsv files have no header: source, label, the author's mark, sentence.
COLA_COLUMNS = ("source", "label", "mark", "sentence")
# The official test sets are unlabelled, and left alone: papers report figures on the dev sets.
PART_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "validation_matched", "valid", "val", "dev", "dev_matched"),
    "mismatched": ("validation_mismatched", "dev_mismatched"),
}
# More unknown labels than this part of the rows are no damaged lines but another data set.
MOST_DAMAGED = 0.01


def glue_task(name: str) -> GlueTask:
    """The task of that name; InputError, with the nearest, if there is none."""
    if name not in TASKS:
        raise InputError(
            f"data.task '{name}' is no GLUE task{nearest(name, TASKS)}: choose {', '.join(TASKS)}"
        )
    return TASKS[name]


# Files.


def task_folder(path: Path, name: str) -> Path:
    """`path`, or its sub-folder for the task (RTE as in the archive, rte as on the Hub)."""
    found = [path / sub for sub in (TASKS[name].folder, name) if (path / sub).is_dir()]
    return found[0] if found else path


def read_tsv(path: Path, notes: list[str]) -> pd.DataFrame:
    """A tsv file of the archive, every cell as it stands; lines with too few or too many cells are
    dropped, with a note."""
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text("latin-1")
        notes.append(f"{path.name} is not UTF-8: read as latin-1")
    # Not by splitlines, nor by pandas: both end a line at characters that occur within sentences.
    lines = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError(f"'{path}' is empty")
    header: Sequence[str] = [cell.strip() for cell in lines[0]]
    rows = lines[1:]
    if len(header) == len(COLA_COLUMNS) and header[1] in ("0", "1"):
        header, rows = COLA_COLUMNS, lines
    whole = [row for row in rows if len(row) == len(header)]
    if len(whole) < len(rows):
        notes.append(
            f"{path.name}: {len(rows) - len(whole):,} lines dropped that have not the "
            f"{len(header)} cells of the first"
        )
    return pd.DataFrame(whole, columns=list(header))


def read_msr(path: Path, notes: list[str]) -> dict[str, pd.DataFrame]:
    """MRPC as Microsoft's msr_paraphrase_train.txt and msr_paraphrase_test.txt.

    GLUE's dev set is the part of the train file that its dev_ids.tsv lists; without that list the
    test file, whose labels are public, takes its place. Empty if there is no such train file.
    """
    train_file, test_file = path / "msr_paraphrase_train.txt", path / "msr_paraphrase_test.txt"
    lists = [path / name for name in ("dev_ids.tsv", "mrpc_dev_ids.tsv") if (path / name).is_file()]
    if not train_file.is_file() or not (lists or test_file.is_file()):
        return {}
    train = read_tsv(train_file, notes)
    if not lists:
        notes.append("no dev_ids.tsv: tested on msr_paraphrase_test.txt, not on GLUE's dev set")
        return {"train": train, "validation": read_tsv(test_file, notes)}
    listed = {tuple(line.split()) for line in lists[0].read_text("utf-8-sig").splitlines()}
    if absent := [name for name in ("#1 ID", "#2 ID") if name not in train]:
        raise InputError(f"'{train_file}' has no column '{absent[0]}', which dev_ids.tsv names")
    is_dev = pd.Series(
        [pair in listed for pair in zip(train["#1 ID"], train["#2 ID"], strict=True)], dtype=bool
    )
    return {"train": train[~is_dev], "validation": train[is_dev]}


def task_rows(
    table: pd.DataFrame,
    name: str,
    source: str,
    class_names: Sequence[str] | None,
    notes: list[str],
) -> pd.DataFrame:
    """Columns text, (text_pair) and label of a table in either layout.

    Labels become class numbers in the Hub's order, or scores; missing ones are NA. class_names:
    what the table's own numbers mean, where it says so. Rows with a label that the task does not
    have are dropped with a note; InputError if they are more than 1 %.
    """
    task = TASKS[name]
    layouts = ((*task.text, "label"), task.official)
    columns = next((layout for layout in layouts if set(layout) <= set(table.columns)), None)
    if columns is None:
        expected = " or ".join(dict.fromkeys(", ".join(layout) for layout in layouts))
        raise InputError(
            f"the {source} part has not the columns of GLUE's {name} ({expected}): it has "
            f"{', '.join(map(str, table.columns))}"
        )
    *texts, label = columns
    rows = pd.DataFrame(
        {role: table[text] for role, text in zip(("text", "text_pair"), texts, strict=False)}
    ).reset_index(drop=True)
    cells = [_cell(cell) for cell in table[label]]
    if task.label_names is None:
        values = [_score(cell) for cell in cells]
    else:
        numbers: dict[str, int] = {str(i): i for i in range(len(task.label_names))}
        if class_names is not None:
            if sorted(map(str.casefold, class_names)) != sorted(task.label_names):
                raise InputError(
                    f"the source's classes ({', '.join(class_names)}) are not those of GLUE's "
                    f"{name} ({', '.join(task.label_names)})"
                )
            names = [class_name.casefold() for class_name in class_names]
            numbers = {str(i): task.label_names.index(n) for i, n in enumerate(names)}
        numbers |= {label_name: i for i, label_name in enumerate(task.label_names)}
        values = [numbers.get(cell.casefold()) for cell in cells]
    missing = [cell in ("", "-", "-1") for cell in cells]
    strange = [value is None and not absent for value, absent in zip(values, missing, strict=True)]
    if count := sum(strange):
        if count > MOST_DAMAGED * len(rows):
            example = cells[strange.index(True)]
            kinds = "scores" if task.label_names is None else ", ".join(task.label_names)
            raise InputError(
                f"label '{example[:40]}' of the {source} part is none of GLUE's {name} ({kinds})"
            )
        notes.append(f"{count:,} rows of the {source} part dropped: their label is damaged")
    kind = "Float64" if task.label_names is None else "Int64"
    absent_or = [None if gone else v for v, gone in zip(values, missing, strict=True)]
    rows["label"] = pd.array(absent_or, dtype=kind)
    return rows[~np.array(strange, dtype=bool)].reset_index(drop=True)


def _cell(cell: Any) -> str:
    """A label as text; whole numbers (which pandas makes floats beside a missing one) as such."""
    if cell is None or cell is pd.NA or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if isinstance(cell, (float, np.floating)) and float(cell).is_integer():
        return str(int(cell))
    return str(cell).strip()


def _score(cell: str) -> float | None:
    try:
        score = float(cell)
    except ValueError:
        return None
    return score if math.isfinite(score) else None


# Metrics of labels [n] and predictions [n]: class numbers, or scores. Of two classes True is the
# positive one.


def matthews(labels: np.ndarray, chosen: np.ndarray) -> float:
    """(tp·tn − fp·fn) / √((tp+fp)(tp+fn)(tn+fp)(tn+fn)); 0 where one of the four sums is."""
    if len(np.unique(chosen)) < 2 or len(np.unique(labels)) < 2:
        return 0.0
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, chosen))


def accuracy(labels: np.ndarray, chosen: np.ndarray) -> float:
    return float((labels == chosen).mean())


def f1(labels: np.ndarray, chosen: np.ndarray) -> float:
    """2tp / (2tp + fp + fn) of the positive class; 0 where it is neither predicted nor right."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, chosen, zero_division=0))


def f1_macro(labels: np.ndarray, chosen: np.ndarray) -> float:
    """Mean over the classes that occur or are predicted of each one's F1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, chosen, average="macro", zero_division=0))


def pearson(labels: np.ndarray, values: np.ndarray) -> float:
    """Linear correlation; undefined, and here 0, for a constant side: it tells nothing of the
    other."""
    from scipy.stats import pearsonr

    return 0.0 if _constant(labels, values) else float(pearsonr(values, labels).statistic)


def spearman(labels: np.ndarray, values: np.ndarray) -> float:
    """Rank correlation; undefined, and here 0, for a constant side: it ranks nothing."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(labels, values) else float(spearmanr(values, labels).statistic)


def _constant(*sides: np.ndarray) -> bool:
    return any(len(side) < 2 or bool((side == side[0]).all()) for side in sides)


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "f1_macro": f1_macro,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
