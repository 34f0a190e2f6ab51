"""GLUE's nine tasks from files in its two layouts, made here, and their official metrics."""

import re
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig

from kdfast.distill.data import PARTS, DataConfig, check_labels, load_data
from kdfast.distill.fidelity import Predictions, metrics, primary_metric, scores
from kdfast.distill.glue import METRICS, TASKS
from kdfast.errors import InputError

ROWS = {"train": 120, "validation": 40, "mismatched": 30}
HUB_LABELS = {
    "cola": ["unacceptable", "acceptable"],
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],
    "stsb": None,
    "mnli": ["entailment", "neutral", "contradiction"],
    "qnli": ["entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment"],
    "wnli": ["not_entailment", "entailment"],
}
# What the archive's files hold beside texts and labels, before and after them.
ARCHIVE = {
    "cola": ("CoLA", None),
    "sst2": ("SST-2", "sentence label"),
    "mrpc": ("MRPC", "Quality|#1 ID|#2 ID|#1 String|#2 String"),
    "qqp": ("QQP", "id qid1 qid2 question1 question2 is_duplicate"),
    "stsb": (
        "STS-B",
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    ),
    "mnli": ("MNLI", "index promptID genre sentence1 sentence2 label1 gold_label"),
    "qnli": ("QNLI", "index question sentence label"),
    "rte": ("RTE", "index sentence1 sentence2 label"),
    "wnli": ("WNLI", "index sentence1 sentence2 label"),
}
NAMED = ("mnli", "qnli", "rte")  # their archive gives labels by name, the others by number


def label_of(task, i):
    names = HUB_LABELS[task]
    return i % 11 * 0.5 if names is None else i % len(names)


def texts_of(task, part, i):
    """A quotation mark that opens and never closes, as GLUE has them."""
    made = [f'"{part} sentence {i} of {task}', f"{part} other {i}"]
    return made[: len(TASKS[task].text)]


def parts_of(task):
    return [part for part in ROWS if part != "mismatched" or task == "mnli"]


def hub_table(task, part):
    rows = range(ROWS[part])
    texts = zip(*(texts_of(task, part, i) for i in rows), strict=True)
    columns = dict(zip(TASKS[task].text, map(list, texts), strict=True))
    return pd.DataFrame({**columns, "label": [label_of(task, i) for i in rows], "idx": list(rows)})


def write_hub_layout(folder, task, ending="parquet"):
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts_of(task):
        name = part
        if task == "mnli":
            name = {"validation": "validation_matched", "mismatched": "validation_mismatched"}.get(
                part, part
            )
        table = hub_table(task, part)
        if ending == "parquet":
            table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
        elif ending == "csv":
            table.to_csv(folder / f"{name}.csv", index=False)
        elif ending == "tsv":
            lines = [table.columns, *table.astype(str).to_numpy().tolist()]
            (folder / f"{name}.tsv").write_text("\n".join("\t".join(line) for line in lines))
        else:
            table.to_json(folder / f"{name}.{ending}", orient="records", lines=ending == "jsonl")
    unlabelled = hub_table(task, "validation").assign(label=-1)
    unlabelled.to_parquet(folder / "test.parquet")
    return folder


def write_archive(root, task):
    folder, header = ARCHIVE[task]
    (root / folder).mkdir(parents=True)
    columns = None if header is None else header.split("|" if "|" in header else " ")
    *text_columns, label_column = TASKS[task].official
    for part in parts_of(task):
        name = {"train": "train", "validation": "dev", "mismatched": "dev_mismatched"}[part]
        if (task, name) == ("mnli", "dev"):
            name = "dev_matched"
        lines = [] if columns is None else [columns]
        for i in range(ROWS[part]):
            texts, label = texts_of(task, part, i), label_of(task, i)
            shown = HUB_LABELS[task][label] if task in NAMED else str(label)
            if columns is None:
                lines.append(["gj04", shown, "*" if label else "", *texts])
            else:
                cells = dict(zip(text_columns, texts, strict=True)) | {label_column: shown}
                lines.append([cells.get(column, f"x{i}") for column in columns])
        text = "\n".join("\t".join(line) for line in lines)
        (root / folder / f"{name}.tsv").write_text("\ufeff" + text + "\n")
    (root / folder / "test.tsv").write_text("index\tsentence\n0\tno label here\n")
    return root


def load(path, task, **config):
    sizes = {"teacher_train": 60, "student_train": 40, "dev": 20}
    return load_data(DataConfig(path=str(path), task=task, **{**sizes, **config}))


# Reading.


@pytest.mark.parametrize("task", TASKS)
def test_both_layouts_give_the_hubs_labels_and_the_same_parts(task, tmp_path):
    hub = load(write_hub_layout(tmp_path / "hub", task), task)
    archive = load(write_archive(tmp_path / "archive", task), task)
    assert hub.label_names == HUB_LABELS[task] and hub.regression == (task == "stsb")
    assert hub.kind == ("regression" if task == "stsb" else "classification")
    assert hub.fingerprints == archive.fingerprints
    assert len(hub.test) == ROWS["validation"]
    for row in hub.test:
        i = int(re.search(r"sentence (\d+) of", row["text"])[1])
        assert row["label"] == label_of(task, i)
        made = texts_of(task, "validation", i)
        assert [row[name] for name in ("text", "text_pair")[: len(made)]] == made
    for part in PARTS[1:]:
        assert all(text.startswith('"train') for text in getattr(hub, part)["text"])
    seen = [set(getattr(hub, part)["text"]) for part in PARTS]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 160


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl"])
def test_every_file_type_of_the_hubs_layout_is_the_same(ending, tmp_path):
    parquet = load(write_hub_layout(tmp_path / "a", "rte"), "rte")
    other = load(write_hub_layout(tmp_path / "b", "rte", ending), "rte")
    assert other.fingerprints == parquet.fingerprints


def test_mnli_has_its_mismatched_part_beside_the_test_part(tmp_path):
    splits = load(write_archive(tmp_path, "mnli"), "mnli")
    assert list(splits.more_tests) == ["mismatched"]
    assert all(text.startswith('"mismatched') for text in splits.more_tests["mismatched"]["text"])
    assert len(splits.more_tests["mismatched"]) == ROWS["mismatched"]
    assert splits.more_tests["mismatched"].features == splits.test.features
    assert splits.part("mismatched") is splits.more_tests["mismatched"]
    assert splits.part("dev") is splits.dev
    with pytest.raises(InputError, match="no part 'mismatch' .* .did you mean 'mismatched'"):
        splits.part("mismatch")
    assert not load(write_archive(tmp_path, "rte"), "rte").more_tests


def hub_set(task):
    names = HUB_LABELS[task]
    kind = datasets.Value("float32") if names is None else datasets.ClassLabel(names=names)
    parts = {part: hub_table(task, part) for part in parts_of(task)}
    if task == "mnli":
        parts["validation_matched"] = parts.pop("validation")
        parts["validation_mismatched"] = parts.pop("mismatched")
    parts["test"] = parts["train"].assign(label=-1)
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_pandas(table).cast_column("label", kind)
            for name, table in parts.items()
        }
    )


@pytest.mark.parametrize("task", ["mnli", "stsb", "wnli"])
def test_saved_to_disk_and_from_the_hub_are_the_same_as_files(task, tmp_path, monkeypatch):
    files = load(write_hub_layout(tmp_path / "files", task), task)
    hub_set(task).save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved", task).fingerprints == files.fingerprints
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or hub_set(task))
    config = DataConfig(task=task, teacher_train=60, student_train=40, dev=20)
    assert load_data(config).fingerprints == files.fingerprints
    assert asked == [("nyu-mll/glue", task)]


def test_classes_saved_in_another_order_take_the_hubs(tmp_path):
    saved = hub_set("rte")
    swapped = datasets.ClassLabel(names=["not_entailment", "entailment"])
    for name in saved:
        table = saved[name].to_pandas()
        table["label"] = [1 - label if label >= 0 else -1 for label in table["label"]]
        saved[name] = datasets.Dataset.from_pandas(table).cast_column("label", swapped)
    saved.save_to_disk(str(tmp_path / "saved"))
    files = load(write_hub_layout(tmp_path / "files", "rte"), "rte")
    assert load(tmp_path / "saved", "rte").fingerprints == files.fingerprints


def test_unreachable_hub_says_that_local_files_will_do():
    with pytest.raises(InputError, match="nyu-mll/glue:rte.*GLUE's own files"):
        load_data(DataConfig(task="rte"))


def test_damaged_lines_are_dropped_with_a_note(tmp_path):
    write_archive(tmp_path, "rte")
    train = tmp_path / "RTE" / "train.tsv"
    whole = load(tmp_path, "rte")
    train.write_text(train.read_text() + "9\tone cell too few\tentailment\n9\ta\tb\te\textra\n")
    splits = load(tmp_path, "rte")
    assert splits.fingerprints == whole.fingerprints
    assert any(note.startswith("train.tsv: 2 lines dropped") for note in splits.notes)
    train.write_text(train.read_text() + "9\tsome text\tother text\tentail\n")
    assert any("1 rows of the train part dropped" in note for note in load(tmp_path, "rte").notes)


def test_microsofts_mrpc_files_are_split_by_the_list_of_dev_ids(tmp_path):
    folder = write_archive(tmp_path, "mrpc") / "MRPC"
    table = (folder / "train.tsv").read_text("utf-8-sig").splitlines()
    (folder / "dev.tsv").unlink(), (folder / "train.tsv").unlink()
    (folder / "msr_paraphrase_train.txt").write_text("\n".join(table))
    with pytest.raises(InputError, match="no train file"):
        load(tmp_path, "mrpc")
    (folder / "msr_paraphrase_test.txt").write_text(
        "\n".join(line.replace("train", "test") for line in table[:31])
    )
    splits = load(tmp_path, "mrpc")
    assert all(text.startswith('"test') for text in splits.test["text"])
    assert any("not on GLUE's dev set" in note for note in splits.notes)
    (folder / "dev_ids.tsv").write_text("".join(f"x{i}\tx{i}\n" for i in range(20)))
    splits = load(tmp_path, "mrpc")
    numbers = {int(re.search(r"sentence (\d+)", text)[1]) for text in splits.test["text"]}
    assert numbers == set(range(20))


def test_one_file_is_split_into_all_parts(tmp_path):
    write_hub_layout(tmp_path, "rte")
    splits = load(tmp_path / "train-00000-of-00001.parquet", "rte", teacher_train=50, dev=10)
    assert [len(getattr(splits, part)) for part in PARTS] == [20, 10, 50, 40]


# Sizes.


def test_shared_trains_teacher_and_student_on_the_whole_training_set(tmp_path):
    path = str(write_hub_layout(tmp_path, "cola"))
    splits = load_data(DataConfig(path=path, task="cola", shared=True))
    assert splits.teacher_train["text"] == splits.student_train["text"]
    assert len(splits.teacher_train) == ROWS["train"] and len(splits.dev) == 0
    assert len(splits.test) == ROWS["validation"]
    held_out = load_data(DataConfig(path=path, task="cola", shared=True, dev=20))
    assert len(held_out.student_train) == ROWS["train"] - 20
    assert not set(held_out.student_train["text"]) & set(held_out.dev["text"])
    few = load_data(DataConfig(path=path, task="cola", shared=True, student_train=30))
    assert len(few.teacher_train) == len(few.student_train) == 30


def test_all_takes_what_the_other_parts_leave(tmp_path):
    splits = load(write_hub_layout(tmp_path, "rte"), "rte", student_train="all", test=10)
    assert [len(getattr(splits, part)) for part in PARTS] == [10, 20, 60, 40]


def test_defaults_follow_the_task():
    config = DataConfig(task="qqp")
    assert (config.path, config.dev, config.test) == ("nyu-mll/glue:qqp", 0, "all")
    assert (config.max_length, config.pad_to, config.kind) == (128, None, "classification")
    plain = DataConfig()
    assert (plain.path, plain.max_length, plain.kind) == ("demo:reviews", 64, "auto")
    assert [getattr(plain, part) for part in PARTS] == [4000, 500, 4000, 1000]
    assert DataConfig(pad="max_length").pad_to == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task": "mrcp"}, "'mrcp' is no GLUE task .did you mean 'mrpc'.*: choose cola, sst2"),
        ({"task": "stsb", "kind": "classification"}, "GLUE's stsb is a regression"),
        ({"task": "rte", "text": "premise"}, "leave data.text out"),
        ({"kind": "embeddings"}, "data.kind must be .* was 'embeddings' .did you mean 'embedding'"),
        ({"pad": "long"}, "data.pad must be longest or max_length, was 'long'"),
    ],
)
def test_contradictory_configurations_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        DataConfig(**config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"teacher_train": "all", "student_train": "all"}, "teacher_train and data.student_train"),
        ({"shared": True}, "the same rows: their sizes were 60 and 40"),
        ({"test": "many"}, "data.test must be a whole number of rows or 'all', not 'many'"),
    ],
)
def test_impossible_sizes_are_refused(sizes, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write_hub_layout(tmp_path, "rte"), "rte", **sizes)


@pytest.mark.parametrize(
    ("written", "read", "message"),
    [
        ("rte", "qnli", "has not the columns of GLUE's qnli .question, sentence, label.: it has"),
        ("mnli", "wnli", "columns of GLUE's wnli"),
    ],
)
def test_columns_of_another_task_are_refused(written, read, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load(write_hub_layout(tmp_path, written), read)


def test_labels_of_another_task_are_refused(tmp_path):
    folder = write_archive(tmp_path, "rte") / "RTE"
    for name in ("train", "dev"):
        text = (folder / f"{name}.tsv").read_text()
        (folder / f"{name}.tsv").write_text(text.replace("\tnot_entailment", "\tneutral"))
    with pytest.raises(InputError, match="label 'neutral' of the train part is none of GLUE's rte"):
        load(tmp_path, "rte")


def test_teachers_order_is_taken_by_the_mismatched_part_too(tmp_path):
    splits = load(write_hub_layout(tmp_path, "mnli"), "mnli")
    teacher = BertConfig(id2label={0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"})
    checked = check_labels(splits, teacher)
    before, after = splits.more_tests["mismatched"], checked.more_tests["mismatched"]
    assert after["label"] == [2 - label for label in before["label"]]
    assert checked.test["label"] == [2 - label for label in splits.test["label"]]


# Metrics.


def logits_of(chosen, classes=2):
    return torch.nn.functional.one_hot(torch.tensor(chosen), classes).float()


def test_binary_metrics_follow_their_formulas():
    labels, chosen = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1]), [1, 1, 0, 0, 0, 1, 0, 1]
    predictions = Predictions(logits_of(chosen), labels)
    tp, fp, fn, tn = 3, 1, 1, 3
    found = scores(predictions, regression=False, task="mrpc")
    assert found == {
        "f1": pytest.approx(2 * tp / (2 * tp + fp + fn)),
        "accuracy": pytest.approx((tp + tn) / 8),
    }
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    matthews = (tp * tn - fp * fn) / root
    assert scores(predictions, regression=False, task="cola") == {
        "matthews": pytest.approx(matthews)
    }
    assert set(scores(predictions, regression=False)) == {"accuracy", "f1_macro"}


def test_correlations_follow_their_formulas():
    generator = np.random.default_rng(0)
    labels, values = generator.normal(size=50), generator.normal(size=50)
    predictions = Predictions(torch.tensor(values)[:, None], torch.tensor(labels))
    found = scores(predictions, regression=True, task="stsb")
    assert found["pearson"] == pytest.approx(np.corrcoef(labels, values)[0, 1])
    ranks = [np.argsort(np.argsort(side)) for side in (labels, values)]
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("task", [None, *TASKS])
def test_constant_predictions_score_without_nan_or_warning(task):
    regression = task == "stsb"
    classes = 1 if regression else 3 if task == "mnli" else 2
    labels = torch.arange(12) % 2
    logits = torch.full((12, 1), 2.3) if regression else logits_of([0] * 12, classes)
    predictions = Predictions(logits, labels.float() if regression else labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scores(predictions, regression=regression, task=task)
    assert tuple(found) == metrics(task, regression)
    assert all(np.isfinite(value) for value in found.values())
    for name in ("matthews", "pearson", "spearman", "f1"):
        assert found.get(name, 0) == 0
    assert found.get("accuracy", 0.5) == 0.5


def test_f1_is_of_the_tasks_positive_class_whatever_the_teachers_order():
    labels, chosen = torch.tensor([1, 1, 1, 0]), [1, 0, 1, 0]
    ours = scores(Predictions(logits_of(chosen), labels), regression=False, task="mrpc")
    swapped = Predictions(logits_of([1 - c for c in chosen]), 1 - labels)
    names = ["Equivalent", "Not_equivalent"]
    assert scores(swapped, regression=False, task="mrpc", label_names=names) == ours
    assert scores(swapped, regression=False, task="mrpc") != ours


def test_primary_metrics():
    assert {task: primary_metric(task, task == "stsb") for task in TASKS} == {
        **dict.fromkeys(("sst2", "mnli", "qnli", "rte", "wnli"), "accuracy"),
        **dict.fromkeys(("mrpc", "qqp"), "f1"),
        "cola": "matthews",
        "stsb": "spearman",
    }
    assert (primary_metric(None, False), primary_metric(None, True)) == ("accuracy", "pearson")
    assert {name for task in TASKS.values() for name in task.metrics} <= set(METRICS)
