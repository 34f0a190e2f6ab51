"""The main job: a teacher, students distilled from it in several ways, and what each was worth."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from kdfast.distill.capture import model_shape
from kdfast.distill.config import (
    CompareConfig,
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    StudentConfig,
    TrainingConfig,
    Way,
    dump_config,
)
from kdfast.distill.data import (
    PARTS,
    DistillationCollator,
    Splits,
    check_labels,
    load_data,
    tokenize,
)
from kdfast.distill.fidelity import Predictions
from kdfast.distill.models import PROBLEM_TYPES, load_model, load_tokenizer, parameter_count
from kdfast.distill.prepare import model_digest
from kdfast.distill.report import write_report
from kdfast.distill.run_directory import (
    IDENTITY_FILE,
    cached_predictions,
    check_run_directory,
    claim_run_directory,
    identity,
    read,
    say,
    write_text,
)
from kdfast.distill.scoring import Scoring, embedding_pool
from kdfast.distill.student import (
    Job,
    Setup,
    arguments,
    check_length,
    line,
    new_model,
    one_student,
    save_whole,
    to_device,
    train,
    try_one_step,
)
from kdfast.distill.trained_on import TrainedOn, trained_on
from kdfast.distill.trainer import DistillationTrainer, saved_recipe
from kdfast.errors import InputError, nearest
from kdfast.recipes.terms import check_relevance

RESULTS_FILE = "results.json"


def distill(config: DistillConfig) -> dict[str, Any]:
    """Run a configuration; returns what results.json holds.

    An interrupted run of the same configuration in the same directory goes on where it stopped.
    Raises InputError for bad input, before any training and before anything is overwritten.
    """
    started = time.perf_counter()
    ways = config.ways()
    job, tfidf = start(config, ways, results=RESULTS_FILE)
    teacher_test = teacher_predictions(job, "test")
    students: list[dict[str, Any]] = []
    trainings = [(way, seed) for way in ways for seed in way.seeds]
    for number, (way, seed) in enumerate(trainings, 1):
        say(f"[{number}/{len(trainings)}] {way.label}, seed {seed}")
        students.append(one_student(job, way, seed, teacher_test))
    results = {
        "title": f"{' vs. '.join(way.label.replace('_', ' ') for way in ways)} on "
        f"{source(config.data)}",
        **facts(job, teacher_test),
        "tfidf": tfidf,
        "students": students,
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = write_report(job.run_dir, results, RESULTS_FILE)
    say()
    say(table)
    say(
        f"written: {job.run_dir / 'results.md'}, {job.run_dir / RESULTS_FILE}, "
        f"{job.run_dir / 'plots'}"
    )
    return results


def source(data: Any) -> str:
    """Where the sentences are from, as reports name it."""
    return data.path if data.task is None else f"GLUE {data.task} ({data.path})"


def start(
    config: DistillConfig | CompareConfig,
    ways: Sequence[Way],
    *,
    results: str,
    free: Sequence[str] = (),
) -> tuple[Job, dict[str, float] | None]:
    """A job with its data, its teacher and its directory, and the scores of TF-IDF if wanted.

    results: the file that tells a finished run. free: keys of the configuration in which a run may
    grow, so that a finished one goes on. Everything that can be wrong is found here: each way
    takes a step.
    """
    run_dir = Path(config.output_dir).expanduser()
    check_run_directory(run_dir, replaces=config.overwrite or bool(free), results=results)
    splits = load_data(config.data)
    if splits.kind == "embedding" and config.teacher is None:
        # Nothing to fine-tune on: the base is a finished embedder.
        config = replace(config, teacher=config.teacher_base)
    own = ("teacher_train",) if config.teacher is None else ()
    tuned = ("dev",) if any(way.trials for way in ways) else ()
    _check_parts(splits, "student_train", "test", *own, *tuned)
    for note in splits.notes:
        say(f"data: {note}")
    sizes = {
        name.replace("_", " "): len(getattr(splits, name))
        for name in ("teacher_train", "student_train", "dev", "test")
    }
    say(f"data: {', '.join(f'{name} {size}' for name, size in sizes.items())} rows")
    if config.teacher is not None and splits.kind != "embedding":
        _note_seen(config, splits)
    bags = config.tfidf and splits.kind in ("classification", "regression")
    task: str | None = config.data.task  # type: ignore[attr-defined]
    tfidf = _tfidf(Scoring(splits, task)) if bags else None
    digest = _preflight(config, ways, splits)
    pool = _pool(ways) if splits.kind == "embedding" else "mean"
    defaults = type(config)()
    claim_run_directory(
        run_dir,
        identity(config, splits, digest, pool, **{key: getattr(defaults, key) for key in free}),
        overwrite=config.overwrite,
        results=results,
    )
    teacher, tokenizer = _teacher(config, splits)
    job = Job(config, run_dir, _as_teacher_numbers(splits, teacher), teacher, tokenizer, pool)
    say(f"teacher: {model_shape(teacher).describe()}, {parameter_count(teacher):,} parameters")
    shown: list[StudentConfig] = []
    for way in ways:
        if way.student not in shown:
            shown.append(way.student)
            student = job.setup(way.student).student(way.seeds[0])
            say(f"student: {model_shape(student).describe()}")
    return job, tfidf


def _note_seen(config: DistillConfig | CompareConfig, splits: Splits) -> None:
    """Says which rows lie idle, as the teacher is given, and which of them it was trained on."""
    if len(splits.teacher_train) and not config.data.shared:  # type: ignore[attr-defined]
        say("data: the teacher_train rows lie idle, as the teacher is given")
    record = trained_on(config.teacher)  # type: ignore[arg-type]
    for part in ("student_train", "dev", "test"):
        rows = getattr(splits, part)
        if record is not None and (seen := record.seen(rows)):
            say(f"data: the teacher was trained on {seen} of the {len(rows)} {part} rows")


def _pool(ways: Sequence[Way]) -> str:
    """How embeddings are pooled that are compared with one another."""
    tried = [trial for way in ways for trial in way.trials or (way,)]
    pools = {pool for way in tried if (pool := embedding_pool(way.recipe, way.options))}
    if len(pools) == 1:
        return pools.pop()
    if pools:
        named = ", ".join(sorted(pools))
        say(f"embeddings: scored as means over tokens, as the ways pool them differently ({named})")
    return "mean"


def teacher_predictions(job: Job, part: str) -> Predictions:
    """The teacher's logits on "test" or "dev", kept in the run's directory."""
    setup = next(iter(job.setups.values()))
    middle = "" if part == "test" else f"{part}_"
    return cached_predictions(
        job.run_dir / f"teacher_{middle}predictions.safetensors",
        lambda: setup.predict(
            job.teacher, getattr(setup, part), role="teacher", progress=f"teacher on {part}"
        ),
    )


def facts(job: Job, teacher_test: Predictions) -> dict[str, Any]:
    """What a report says of the run as a whole."""
    config, setup = job.config, next(iter(job.setups.values()))
    return {
        "setting": _setting(job),
        "teacher": {
            "parameters": parameter_count(job.teacher),
            **setup.scoring.scores(teacher_test),
            **setup.more_scores(job.teacher, "teacher"),
        },
        "primary": setup.scoring.primary,
        "cka_rows": " or ".join(
            sorted(
                {
                    "all tokens" if s.shared_tokens else "the [CLS] states (other tokens)"
                    for s in job.setups.values()
                }
            )
        ),
        "cka_sentences": min(config.cka_sentences, len(job.splits.test)),
    }


def finetune(config: FinetuneConfig) -> Path:
    """Fine-tune a classifier on data.teacher_train and save it whole; returns its folder."""
    target = Path(config.output_dir).expanduser()
    if target.exists() and not target.is_dir():
        raise InputError(f"output_dir {target} is a file: choose another")
    if target.exists() and any(target.iterdir()) and not config.overwrite:
        raise InputError(
            f"output_dir {target} is not empty: choose another, or set overwrite=true to replace "
            "the model in it"
        )
    splits = load_data(config.data)
    if splits.kind == "embedding":
        raise InputError(
            "data.kind is embedding, and fine-tuning needs labels: choose another kind"
        )
    _check_parts(splits, "teacher_train")
    for note in splits.notes:
        say(f"data: {note}")
    _finetune_into(target, config, splits)
    remote = config.trust_remote_code
    tokenizer = load_tokenizer(target, trust_remote_code=remote)
    model = to_device(load_model(target, splits.kind, trust_remote_code=remote))
    data: Any = config.data
    scoring = Scoring(splits, data.task)
    collator = DistillationCollator(tokenizer, None, data.pad_to)
    for part, rows in {"dev": splits.dev, "test": splits.test, **splits.more_tests}.items():
        if len(rows):
            rows = tokenize(rows, tokenizer, data.max_length)
            result = scoring.predict(model, rows, collator, progress=part)
            say(f"{part}: {line(scoring.scores(result))}")
    say(f"written: {target}")
    return target


def evaluate(model_name: str, config: EvaluateConfig) -> dict[str, float]:
    """Scores of a saved model on one part of a data set, and its fidelity to a teacher."""
    data: Any = config.data
    remote = config.trust_remote_code
    splits = load_data(data)
    parts = {name: getattr(splits, name) for name in PARTS} | splits.more_tests
    if config.part not in parts:
        raise InputError(
            f"part must be one of {', '.join(parts)}{nearest(config.part, parts)}, was "
            f"'{config.part}'"
        )
    model = load_model(model_name, splits.kind, trust_remote_code=remote)
    splits = check_labels(splits, model.config)
    for note in splits.notes:
        say(f"data: {note}")
    rows = ({name: getattr(splits, name) for name in PARTS} | splits.more_tests)[config.part]
    _check_rows(config.part, rows)
    check_length(model, data.max_length)
    say(f"data: {source(data)}, cut at {data.max_length} tokens")
    record = trained_on(model_name)
    if record is not None and (seen := record.seen(rows)) and not config.part.endswith("_train"):
        say(
            f"data: the model was trained on {seen} of these {len(rows)} rows, so its scores say "
            "little of other sentences"
        )
    pool = None
    if splits.kind == "embedding":
        pool = embedding_pool(*saved_recipe(model_name))
    scoring = Scoring(splits, data.task, pool or "mean")

    def predictions(whose: PreTrainedModel, name: str) -> Predictions:
        tokenizer = load_tokenizer(name, trust_remote_code=remote)
        return scoring.predict(
            to_device(whose),
            tokenize(rows, tokenizer, data.max_length),
            DistillationCollator(tokenizer, None, data.pad_to),
            batch_size=config.batch_size,
        )

    own = predictions(model, model_name)
    result = scoring.scores(own)
    if config.teacher is not None:
        teacher = load_model(config.teacher, splits.kind, trust_remote_code=remote)
        theirs = check_labels(splits, teacher.config).label_names
        expected = predictions(teacher, config.teacher)
        if splits.label_names and theirs:
            # The teacher's columns in the order in which the model numbers its labels.
            place = {name.strip().casefold(): i for i, name in enumerate(theirs)}
            order = [place[name.strip().casefold()] for name in splits.label_names]
            expected.logits = expected.logits[:, order]
        result |= scoring.fidelity(own, expected)
    elif splits.kind == "embedding":
        raise InputError("embeddings are scored against a teacher's: set teacher")
    say(f"{config.part}, {len(rows)} rows: {line(result)}")
    return result


# The teacher


def _teacher(
    config: DistillConfig | CompareConfig, splits: Splits
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    remote = config.trust_remote_code
    if config.teacher is not None:
        name: str | Path = config.teacher
    else:
        recipe = FinetuneConfig(
            data=config.data,
            model=config.teacher_base,
            training=config.teacher_training,
            trust_remote_code=remote,
        )
        # Everything that makes the teacher what it is, and nothing else.
        key = json.dumps(
            [
                splits.fingerprints["teacher_train"],
                splits.label_names,
                config.teacher_base,
                asdict(config.teacher_training),
                config.data.max_length,  # type: ignore[attr-defined]
                # Earlier versions trained a reranker by squared error.
                *([PROBLEM_TYPES[splits.kind]] if splits.kind == "reranking" else []),
            ],
            sort_keys=True,
        )
        digest = hashlib.sha256(key.encode()).hexdigest()[:12]
        name = Path(config.teacher_dir).expanduser() / f"teacher-{digest}"
        if (name / "config.json").is_file():
            say(f"teacher: {name} (fine-tuned before)")
        else:
            say(f"teacher: fine-tuning {config.teacher_base}, kept in {name}")
            _finetune_into(name, recipe, splits)
    model = load_model(name, splits.kind, trust_remote_code=remote)
    return to_device(model), load_tokenizer(name, trust_remote_code=remote)


def _finetune_into(target: Path, config: FinetuneConfig, splits: Splits) -> None:
    set_seed(config.seed)
    model = new_model(config.model, splits, config.trust_remote_code)
    check_length(model, config.data.max_length)  # type: ignore[attr-defined]
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    rows = tokenize(splits.teacher_train, tokenizer, config.data.max_length)  # type: ignore[attr-defined]
    if model_shape(model).binary:
        check_relevance(torch.tensor(list(splits.teacher_train["label"])))
    work = target.with_name(target.name + ".work")
    own = dump_config(replace(config, overwrite=False)) + splits.fingerprints["teacher_train"]
    if work.exists() and read(work / IDENTITY_FILE) != own:
        if not (work / IDENTITY_FILE).is_file():
            raise InputError(f"{work} is needed for checkpoints and holds something else")
        shutil.rmtree(work)  # checkpoints of another fine-tuning
    work.mkdir(parents=True, exist_ok=True)
    write_text(work / IDENTITY_FILE, own)
    trainer = DistillationTrainer(
        model=model,
        args=arguments(_finetuning(config.training), len(rows), work, config.seed),
        train_dataset=rows,
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )
    train(trainer, "fine-tuning")
    data = asdict(config.data)
    record = TrainedOn.of(data, "teacher_train", splits.teacher_train)
    save_whole(target, trainer, tokenizer, record)
    shutil.rmtree(work, ignore_errors=True)


# Checks before anything is trained or overwritten


def _preflight(config: DistillConfig | CompareConfig, ways: Sequence[Way], splits: Splits) -> str:
    """One real training step of everything that will be trained, on a few rows.

    What cannot work then fails before the long part, and before anything is overwritten. Returns a
    digest of the teacher, or "" where the run makes it.
    """
    remote, own = config.trust_remote_code, config.teacher is not None
    name = config.teacher or config.teacher_base
    teacher = (
        load_model(name, splits.kind, trust_remote_code=remote)
        if own
        else new_model(name, splits, remote)
    )
    if own:
        splits = check_labels(splits, teacher.config)
    few = copy.copy(splits)
    for part in ("teacher_train", "student_train", "dev", "test"):
        rows = getattr(splits, part)
        # The longest, so that what grows with the length has the size it will have.
        lengths = [-sum(len(row.get(c) or "") for c in ("text", "text_pair")) for row in rows]
        longest = sorted(range(len(rows)), key=lengths.__getitem__)[:4]
        setattr(few, part, rows.select(longest))
    few.more_tests = {}
    tokenizer = load_tokenizer(name, trust_remote_code=remote)
    tried = [trial for way in ways for trial in (way, *way.trials)]
    if not own:
        tried.append(_finetuning(config.teacher_training, config.student))
        Path(config.teacher_dir).expanduser().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config, Path(folder), few, to_device(teacher), tokenizer)
        for way in tried:
            setup = job.setup(way.student)
            try_one_step(
                *(setup, way, ways[0].seeds[0], job.run_dir, splits.student_train),
                cache=config.teacher_cache,
            )
    return model_digest(teacher) if own else ""


def _finetuning(training: TrainingConfig, student: StudentConfig | None = None) -> Way:
    student = replace(student or StudentConfig(), attention_dropout=None)
    return Way("fine-tuning", "labels", {}, student, training, seeds=())


def _check_parts(splits: Splits, *needed: str) -> None:
    for part in needed:
        _check_rows(part, getattr(splits, part))


def _check_rows(part: str, rows: Dataset) -> None:
    if len(rows) < 2:
        raise InputError(
            f"data.{part} has {len(rows)} rows and needs at least 2: set data.{part} or give more "
            "data"
        )


def _as_teacher_numbers(splits: Splits, teacher: PreTrainedModel) -> Splits:
    """The splits with the teacher's label numbers; what was assumed for that is printed."""
    numbered = check_labels(splits, teacher.config)
    for note in numbered.notes[len(splits.notes) :]:
        say(f"data: {note}")
    return numbered


# Facts for the report


def _tfidf(scoring: Scoring) -> dict[str, float] | None:
    """TF-IDF of words and pairs, with logistic (or ridge) regression on the student's sentences."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    splits = scoring.splits

    def texts(rows: Dataset) -> list[str]:
        if "text_pair" in rows.column_names:
            return [f"{a} {b}" for a, b in zip(rows["text"], rows["text_pair"], strict=True)]
        return list(rows["text"])

    head = Ridge() if splits.regression else LogisticRegression(max_iter=1000)
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), head)
    try:
        model.fit(texts(splits.student_train), splits.student_train["label"])
    except ValueError as error:  # no word of two letters in any text
        say(f"TF-IDF row left out: {error}")
        return None
    labels = torch.tensor(splits.test["label"])
    if splits.regression:
        output = torch.tensor(model.predict(texts(splits.test)))[:, None]
    else:
        # Columns are the labels seen in training, which may not be all.
        output = torch.zeros(len(labels), len(splits.label_names or []))
        output[:, model.classes_] = torch.tensor(
            model.predict_proba(texts(splits.test)), dtype=torch.float32
        )
    return scoring.scores(Predictions(output, labels))


def _setting(job: Job) -> dict[str, str]:
    config, splits = job.config, job.splits
    training = config.training
    budget = f"{training.steps} steps" if training.steps else f"{training.epochs:g} epochs"
    students = [_describe(setup, config.seeds[0]) for setup in job.setups.values()]
    return {
        "data": f"{source(config.data)}: {len(splits.student_train)} training sentences, "
        f"{len(splits.test)} test sentences, scored once",
        "teacher": f"{config.teacher or config.teacher_base} "
        f"({model_shape(job.teacher).describe()})"
        + (
            f", fine-tuned on {len(splits.teacher_train)} "
            f"{'sentences, the same' if config.data.shared else 'other sentences'}"
            if config.teacher is None
            else _seen_by_teacher(config.teacher, splits)
        ),
        "student": "; ".join(dict.fromkeys(students)),
        "training": f"{budget}, batch {training.batch_size}"
        + (f" × {training.gradient_accumulation}" if training.gradient_accumulation > 1 else "")
        + f", learning rate {training.learning_rate:g}, seeds {', '.join(map(str, config.seeds))}",
    }


def _seen_by_teacher(teacher: str, splits: Splits) -> str:
    record = trained_on(teacher)
    if record is None:
        return ""
    parts = {"training": splits.student_train, "test": splits.test}
    return ", trained on " + " and ".join(
        f"{record.seen(rows)} of the {len(rows)} {name} sentences" for name, rows in parts.items()
    )


def _describe(setup: Setup, seed: int) -> str:
    config, student = setup.student_config, setup.student(seed)
    return (
        f"{config.describe(setup.base.config.num_hidden_layers)} ({model_shape(student).describe()}"
        + (f", {setup.frozen:,} embedding parameters frozen" if setup.frozen else "")
        + f"), attention dropout {config.attention_dropout}"
    )
