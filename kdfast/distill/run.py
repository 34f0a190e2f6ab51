"""The main job: a teacher, students distilled from it in several ways, and what each was worth."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import SaveStrategy

from kdfast.distill.capture import model_shape
from kdfast.distill.config import (
    DistillConfig,
    EvaluateConfig,
    FinetuneConfig,
    TrainingConfig,
    dump_config,
)
from kdfast.distill.data import (
    DistillationCollator,
    Splits,
    check_labels,
    load_data,
    same_vocabulary,
    tokenize,
)
from kdfast.distill.fidelity import Predictions, alignment, fidelity, predict, scores
from kdfast.distill.models import (
    cut_student,
    freeze_embeddings,
    load_classifier,
    load_tokenizer,
    parameter_count,
)
from kdfast.distill.report import write_report
from kdfast.distill.trainer import (
    STATE_FILE,
    Announcement,
    DistillationArguments,
    DistillationTrainer,
    last_whole_checkpoint,
    remove_partial_checkpoints,
)
from kdfast.errors import InputError
from kdfast.recipes import Recipe
from kdfast.recipes.layer_map import layer_map

# What a run directory holds; its identity, written first, is what marks a directory as one.
IDENTITY_FILE = "kdfast_run.yaml"
RESULTS_FILE = "results.json"
TEACHER_FILE = "teacher_predictions.safetensors"
RUN_ENTRIES = ("students", "work", "plots", "results.md", RESULTS_FILE, TEACHER_FILE, IDENTITY_FILE)


def say(text: str = "") -> None:
    print(text, flush=True)


def distill(config: DistillConfig) -> dict[str, Any]:
    """Run a configuration; returns what results.json holds.

    An interrupted run of the same configuration in the same directory goes on where it stopped.
    Raises InputError for bad input, before any training and before anything is overwritten.
    """
    started = time.perf_counter()
    run_dir = Path(config.output_dir).expanduser()
    _check_run_directory(run_dir, overwrite=config.overwrite)
    splits = load_data(config.data)
    own = ("teacher_train",) if config.teacher is None else ()
    _check_parts(splits, "student_train", "test", *own)
    for note in splits.notes:
        say(f"data: {note}")
    say(
        "data: "
        + ", ".join(
            f"{name.replace('_', ' ')} {len(getattr(splits, name))}"
            for name in ("teacher_train", "student_train", "dev", "test")
        )
        + " rows"
    )
    tfidf = _tfidf(splits) if config.tfidf else None
    digest = _preflight(config, splits)
    _claim_run_directory(run_dir, config, _identity(config, splits, digest))

    teacher, teacher_tokenizer = _teacher(config, splits)
    splits = _as_teacher_numbers(splits, teacher)
    setup = _prepare(config, splits, teacher, teacher_tokenizer)
    say(f"teacher: {model_shape(teacher).describe()}, {parameter_count(teacher):,} parameters")
    say(f"student: {model_shape(setup.student(config.seeds[0])).describe()}")
    teacher_test = _cached_predictions(
        run_dir / TEACHER_FILE,
        lambda: predict(
            teacher, setup.test, setup.collator, role="teacher", progress="teacher on test"
        ),
    )
    students: list[dict[str, Any]] = []
    ways, total = config.ways(), len(config.ways()) * len(config.seeds)
    for way in ways:
        for seed in config.seeds:
            say(f"[{len(students) + 1}/{total}] {way['name']}, seed {seed}")
            students.append(_one_student(config, setup, run_dir, way, seed, teacher_test))
    results = {
        "title": _title(config),
        "setting": _setting(config, splits, setup),
        "teacher": {
            "parameters": parameter_count(teacher),
            **scores(teacher_test, regression=splits.regression),
        },
        "tfidf": tfidf,
        "students": students,
        "regression": splits.regression,
        "cka_rows": "all tokens" if setup.shared_tokens else "the [CLS] states",
        "cka_sentences": min(config.cka_sentences, len(splits.test)),
        "seconds": round(time.perf_counter() - started, 1),
    }
    table = write_report(run_dir, results, RESULTS_FILE)
    say()
    say(table)
    say(f"written: {run_dir / 'results.md'}, {run_dir / RESULTS_FILE}, {run_dir / 'plots'}")
    return results


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
    _check_parts(splits, "teacher_train")
    for note in splits.notes:
        say(f"data: {note}")
    _finetune_into(target, config, splits)
    remote = config.trust_remote_code
    tokenizer = load_tokenizer(target, trust_remote_code=remote)
    model = _to_device(load_classifier(target, trust_remote_code=remote))
    collator = DistillationCollator(tokenizer)
    for part in ("dev", "test"):
        rows = getattr(splits, part)
        if len(rows):
            dataset = tokenize(rows, tokenizer, config.data.max_length)  # type: ignore[attr-defined]
            result = predict(model, dataset, collator, progress=part)
            say(f"{part}: {_line(scores(result, regression=splits.regression))}")
    say(f"written: {target}")
    return target


def evaluate(model_name: str, config: EvaluateConfig) -> dict[str, float]:
    """Scores of a saved classifier on one part of a data set, and its fidelity to a teacher."""
    parts = ("teacher_train", "student_train", "dev", "test")
    if config.part not in parts:
        raise InputError(f"part must be one of {', '.join(parts)}, was '{config.part}'")
    model = load_classifier(model_name, trust_remote_code=config.trust_remote_code)
    tokenizer = load_tokenizer(model_name, trust_remote_code=config.trust_remote_code)
    splits = check_labels(load_data(config.data), model.config)
    for note in splits.notes:
        say(f"data: {note}")
    _to_device(model)
    _check_parts(splits, config.part)
    _check_length(model, config.data.max_length)  # type: ignore[attr-defined]
    rows, length = getattr(splits, config.part), config.data.max_length  # type: ignore[attr-defined]
    own = predict(
        model,
        tokenize(rows, tokenizer, length),
        DistillationCollator(tokenizer),
        batch_size=config.batch_size,
    )
    result = scores(own, regression=splits.regression)
    if config.teacher is not None:
        teacher = load_classifier(config.teacher, trust_remote_code=config.trust_remote_code)
        theirs = check_labels(splits, teacher.config).label_names or []
        teacher_tokenizer = load_tokenizer(
            config.teacher, trust_remote_code=config.trust_remote_code
        )
        teacher_test = predict(
            _to_device(teacher),
            tokenize(rows, teacher_tokenizer, length),
            DistillationCollator(teacher_tokenizer),
            batch_size=config.batch_size,
        )
        if not splits.regression:
            # The teacher's columns in the order in which the model numbers its labels.
            place = {name.strip().casefold(): i for i, name in enumerate(theirs)}
            order = [place[name.strip().casefold()] for name in splits.label_names or []]
            teacher_test.logits = teacher_test.logits[:, order]
        result |= fidelity(own, teacher_test, regression=splits.regression)
    say(f"{config.part}, {len(rows)} rows: {_line(result)}")
    return result


# The teacher


def _teacher(
    config: DistillConfig, splits: Splits
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
    model = load_classifier(name, trust_remote_code=remote)
    return _to_device(model), load_tokenizer(name, trust_remote_code=remote)


def _finetune_into(target: Path, config: FinetuneConfig, splits: Splits) -> None:
    set_seed(config.seed)
    model = _new_classifier(config.model, splits, config.trust_remote_code)
    _check_length(model, config.data.max_length)  # type: ignore[attr-defined]
    tokenizer = load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
    train = tokenize(splits.teacher_train, tokenizer, config.data.max_length)  # type: ignore[attr-defined]
    work = target.with_name(target.name + ".work")
    identity = dump_config(replace(config, overwrite=False)) + splits.fingerprints["teacher_train"]
    if work.exists() and _read(work / IDENTITY_FILE) != identity:
        if not (work / IDENTITY_FILE).is_file():
            raise InputError(f"{work} is needed for checkpoints and holds something else")
        shutil.rmtree(work)  # checkpoints of another fine-tuning
    work.mkdir(parents=True, exist_ok=True)
    _write_text(work / IDENTITY_FILE, identity)
    trainer = DistillationTrainer(
        model=model,
        args=_arguments(config.training, len(train), work, config.seed, {"name": "labels"}, None),
        train_dataset=train,
        data_collator=DistillationCollator(tokenizer),
        processing_class=tokenizer,
    )
    _train(trainer, "fine-tuning")
    _save_whole(target, trainer, tokenizer)
    shutil.rmtree(work, ignore_errors=True)


def _new_classifier(name: str, splits: Splits, remote: bool) -> PreTrainedModel:
    return load_classifier(
        name,
        label_names=None if splits.regression else splits.label_names,
        regression=splits.regression,
        trust_remote_code=remote,
    )


# One student


@dataclass
class _Setup:
    """What all students of a run share."""

    config: DistillConfig
    splits: Splits
    teacher: PreTrainedModel
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    collator: DistillationCollator
    shared_tokens: bool
    train: Dataset
    test: Dataset
    frozen: int = 0
    before: dict[int, torch.Tensor] = field(default_factory=dict)

    def student(self, seed: int) -> PreTrainedModel:
        """The untrained student of this seed: chosen layers and a new head."""
        set_seed(seed)
        student = cut_student(
            self.base,
            self.config.student.layers,
            label_names=None if self.splits.regression else self.splits.label_names,
            regression=self.splits.regression,
        )
        if self.config.student.freeze_embeddings:
            self.frozen = freeze_embeddings(student)
        return _to_device(student)

    def alignment(
        self, student: PreTrainedModel, recipe: Recipe | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self.test.select(range(min(self.config.cka_sentences, len(self.test))))
        return alignment(
            student,
            self.teacher,
            rows,
            self.collator,
            shared_tokens=self.shared_tokens,
            recipe=recipe,
        )


def _prepare(
    config: DistillConfig,
    splits: Splits,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> _Setup:
    base_name = config.student.base
    from_teacher = base_name == "teacher"
    remote = config.trust_remote_code
    tokenizer = (
        teacher_tokenizer if from_teacher else load_tokenizer(base_name, trust_remote_code=remote)
    )
    shared = from_teacher or same_vocabulary(tokenizer, teacher_tokenizer)
    extra = None if shared else teacher_tokenizer
    length = config.data.max_length  # type: ignore[attr-defined]
    base = teacher if from_teacher else _new_classifier(base_name, splits, remote)
    for model in (base, teacher):
        _check_length(model, length)
    return _Setup(
        config=config,
        splits=splits,
        teacher=teacher,
        base=base,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        collator=DistillationCollator(tokenizer, extra),
        shared_tokens=shared,
        train=tokenize(splits.student_train, tokenizer, length, extra),
        test=tokenize(splits.test, tokenizer, length, extra),
    )


def _one_student(
    config: DistillConfig,
    setup: _Setup,
    run_dir: Path,
    way: dict[str, Any],
    seed: int,
    teacher_test: Predictions,
) -> dict[str, Any]:
    folder = run_dir / "students" / way["name"] / f"seed-{seed}"
    record_file = folder.with_name(folder.name + ".json")
    if record_file.is_file() and (folder / "config.json").is_file():
        say("  done before")
        return json.loads(record_file.read_text())
    student = setup.student(seed)
    if seed not in setup.before:
        setup.before[seed] = setup.alignment(student)[0]
    work = run_dir / "work" / way["name"] / f"seed-{seed}"
    timer = _StepTimer()
    trainer = DistillationTrainer(
        model=student,
        teacher=setup.teacher,
        args=_arguments(
            config.training, len(setup.train), work, seed, way, config.student.attention_dropout
        ),
        train_dataset=setup.train,
        data_collator=setup.collator,
        processing_class=setup.tokenizer,
        teacher_processing_class=setup.teacher_tokenizer,
        callbacks=[timer],
    )
    if seed != config.seeds[0]:
        trainer.remove_callback(Announcement)
    _train(trainer, way["name"])
    trainer.close()
    result = predict(student, setup.test, setup.collator, progress="test")
    aligned, weights = setup.alignment(student, trainer.recipe)
    pairs = layer_map("uniform", model_shape(student), model_shape(setup.teacher))
    regression = setup.splits.regression
    record = {
        "way": way["name"],
        "options": {k: v for k, v in way.items() if k != "name"},
        "seed": seed,
        **scores(result, regression=regression),
        **fidelity(result, teacher_test, regression=regression),
        "cka_to_teacher": float(torch.stack([aligned[i, j] for i, j in pairs]).mean()),
        "milliseconds_per_step": timer.median(),
        "steps": trainer.state.global_step,
        "parameters": parameter_count(student),
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad)
        + parameter_count(trainer.recipe),
        "cka_before": setup.before[seed].tolist(),
        "cka_after": aligned.tolist(),
        "projection_weights": None if weights is None else weights.tolist(),
        "log": [
            {k: v for k, v in entry.items() if k == "step" or k.startswith("loss")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }
    _save_predictions(folder.with_name(folder.name + ".safetensors"), result)
    _save_whole(folder, trainer, setup.tokenizer)
    _write_text(record_file, json.dumps(record))
    for checkpoint in work.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    shown = {k: v for k, v in record.items() if isinstance(v, float)}
    say(f"  {_line(shown)}")
    return record


def _arguments(
    training: TrainingConfig,
    rows: int,
    output_dir: Path,
    seed: int,
    way: dict[str, Any],
    attention_dropout: float | None,
) -> DistillationArguments:
    per_epoch = math.ceil(rows / (training.batch_size * training.gradient_accumulation))
    steps = training.steps or max(1, round((training.epochs or 1) * per_epoch))
    options = {k: v for k, v in way.items() if k != "name"}
    values: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "learning_rate": training.learning_rate,
        "warmup_steps": round(training.warmup * steps),
        "weight_decay": training.weight_decay,
        "bf16": training.bf16,
        "save_steps": training.save_every,
        "save_total_limit": 2,
        "logging_steps": training.log_every,
        "report_to": "tensorboard",
        **training.arguments,
    }
    try:
        return DistillationArguments(
            output_dir=str(output_dir),
            seed=seed,
            recipe=way["name"],
            recipe_options=options,
            attention_dropout=attention_dropout,
            **values,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {error}") from error


def _train(trainer: DistillationTrainer, what: str) -> None:
    """Train to the end, from the last whole checkpoint if an interrupted run left one."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_Progress(what))
    folder = str(trainer.args.output_dir)
    remove_partial_checkpoints(folder)
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint is None:
        trainer.train()
        return
    say(f"  resuming from {checkpoint}")
    state = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
    if state.global_step < trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=checkpoint)
    else:  # trained to the end, cut off before it was scored
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state


class _Progress(ProgressCallback):
    """The Trainer's bar, with the losses beside it instead of a printed line each."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(f"  {self.what}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            shown = {k.removeprefix("loss_"): v for k, v in logs.items() if k.startswith("loss")}
            self.training_bar.set_postfix({k: f"{float(v):.3g}" for k, v in shown.items()})


class _StepTimer(TrainerCallback):
    """Median wall time of an optimizer step: teacher, student, losses, backward, update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)

    def median(self) -> float | None:
        """In milliseconds; None if every step was taken before this run was resumed."""
        return 1000 * statistics.median(self.seconds) if self.seconds else None


# Checks before anything is trained or overwritten


def _preflight(config: DistillConfig, splits: Splits) -> str:
    """One real training step of everything that will be trained, on a few rows.

    What cannot work then fails before the long part, and before anything is overwritten. Returns a
    digest of the teacher, or "" where the run makes it.
    """
    remote, own = config.trust_remote_code, config.teacher is not None
    name = config.teacher or config.teacher_base
    teacher = (
        load_classifier(name, trust_remote_code=remote)
        if own
        else _new_classifier(name, splits, remote)
    )
    if own:
        splits = check_labels(splits, teacher.config)
    few = copy.copy(splits)
    for part in ("teacher_train", "student_train", "test"):
        rows = getattr(splits, part)
        setattr(few, part, rows.select(range(min(4, len(rows)))))
    setup = _prepare(
        config, few, _to_device(teacher), load_tokenizer(name, trust_remote_code=remote)
    )
    digest = _digest(teacher) if own else ""
    trainings: list[tuple[dict[str, Any], TrainingConfig, float | None]] = [
        (way, config.training, config.student.attention_dropout) for way in config.ways()
    ]
    if not own:
        trainings.append(({"name": "labels"}, config.teacher_training, None))
        Path(config.teacher_dir).expanduser().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for way, training, dropout in trainings:
            arguments = _arguments(training, 4, Path(folder), config.seeds[0], way, dropout)
            try:
                _try_one_step(setup, setup.student(config.seeds[0]), arguments)
            except InputError:
                raise
            except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
                raise InputError(f"{way['name']}: {error}") from error
    return digest


def _try_one_step(setup: _Setup, model: PreTrainedModel, arguments: DistillationArguments) -> None:
    values = {
        "max_steps": 1,
        "per_device_train_batch_size": min(4, arguments.per_device_train_batch_size),
        "gradient_accumulation_steps": 1,
        "save_strategy": SaveStrategy.NO,
        "report_to": [],
        "disable_tqdm": True,
    }
    for name, value in values.items():
        setattr(arguments, name, value)
    trainer = DistillationTrainer(
        model=model,
        teacher=setup.teacher,
        args=arguments,
        train_dataset=setup.train,
        data_collator=setup.collator,
        processing_class=setup.tokenizer,
        teacher_processing_class=setup.teacher_tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(Announcement)
    try:
        trainer.train()
    finally:
        trainer.close()


def _check_parts(splits: Splits, *needed: str) -> None:
    for part in needed:
        if len(getattr(splits, part)) < 2:
            raise InputError(
                f"data.{part} has {len(getattr(splits, part))} rows and needs at least 2: set "
                f"data.{part} or give more data"
            )


def _check_length(model: PreTrainedModel, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise InputError(
            f"data.max_length is {length}, and {type(model).__name__} has {most} positions"
        )


def _as_teacher_numbers(splits: Splits, teacher: PreTrainedModel) -> Splits:
    """The splits with the teacher's label numbers; what was assumed for that is printed."""
    numbered = check_labels(splits, teacher.config)
    for note in numbered.notes[len(splits.notes) :]:
        say(f"data: {note}")
    return numbered


def _check_run_directory(run_dir: Path, *, overwrite: bool) -> None:
    if not run_dir.exists():
        return
    if not run_dir.is_dir():
        raise InputError(f"output_dir {run_dir} is a file: choose another")
    if any(run_dir.iterdir()) and not (run_dir / IDENTITY_FILE).is_file():
        raise InputError(
            f"output_dir {run_dir} is not empty and was not written by kdfast: choose another"
        )
    if (run_dir / RESULTS_FILE).is_file() and not overwrite:
        raise InputError(
            f"output_dir {run_dir} already has results: choose another output_dir, or set "
            "overwrite=true to replace them"
        )


def _claim_run_directory(run_dir: Path, config: DistillConfig, identity: str) -> None:
    """Go on with an interrupted run, start a new one, or, if asked, replace another."""
    same = _read(run_dir / IDENTITY_FILE) == identity
    begun = any((run_dir / name).exists() for name in ("students", "work", TEACHER_FILE))
    finished = (run_dir / RESULTS_FILE).is_file()
    if begun and not same and not config.overwrite:
        raise InputError(
            f"output_dir {run_dir} holds an unfinished run of another configuration, teacher or "
            "data: choose another output_dir, or set overwrite=true to start afresh"
        )
    if finished or not same:
        # Only what a run writes: whatever else lies there is not ours.
        for name in RUN_ENTRIES:
            path = run_dir / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif begun:
        say(f"continuing the interrupted run in {run_dir}")
    run_dir.mkdir(parents=True, exist_ok=True)
    _write_text(run_dir / IDENTITY_FILE, identity)


def _identity(config: DistillConfig, splits: Splits, teacher: str) -> str:
    """The configuration less what changes no result, and what it was found to stand for."""
    plain = replace(config, overwrite=False, quick_overrides={})
    made_of = f"# data {splits.fingerprint}, teacher {teacher or 'made by this run'}"
    return f"{made_of}\n{dump_config(plain)}"


def _digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


# Writing


def _save_whole(
    target: Path, trainer: DistillationTrainer, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The model by save_pretrained, the recipe's learned parts beside it; all of it or nothing."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = trainer.model
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    state = trainer.recipe.state_dict()
    if state:
        save_file(state, partial / STATE_FILE, metadata={"recipe": trainer.recipe.name})
    if target.exists():
        # Over the model that is there, file by file: whatever else lies there stays.
        for path in partial.iterdir():
            os.replace(path, target / path.name)
        partial.rmdir()
    else:
        partial.rename(target)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _save_predictions(path: Path, predictions: Predictions) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file({"logits": predictions.logits, "labels": predictions.labels}, partial)
    os.replace(partial, path)


def _cached_predictions(path: Path, make: Callable[[], Predictions]) -> Predictions:
    if path.is_file():
        return Predictions(**load_file(path))
    predictions = make()
    _save_predictions(path, predictions)
    return predictions


# Facts for the report


def _tfidf(splits: Splits) -> dict[str, float] | None:
    """TF-IDF of words and pairs, with logistic (or ridge) regression on the student's sentences."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

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
    return scores(Predictions(output, labels), regression=splits.regression)


def _title(config: DistillConfig) -> str:
    names = [way["name"].replace("_", " ") for way in config.ways()]
    return f"{' vs. '.join(names)} on {config.data.path}"  # type: ignore[attr-defined]


def _setting(config: DistillConfig, splits: Splits, setup: _Setup) -> dict[str, str]:
    student = setup.student(config.seeds[0])
    training = config.training
    budget = f"{training.steps} steps" if training.steps else f"{training.epochs:g} epochs"
    return {
        "data": f"{config.data.path}: {len(splits.student_train)} training sentences, "  # type: ignore[attr-defined]
        f"{len(splits.test)} test sentences, scored once",
        "teacher": f"{config.teacher or config.teacher_base} "
        f"({model_shape(setup.teacher).describe()})"
        + (
            f", fine-tuned on {len(splits.teacher_train)} other sentences"
            if config.teacher is None
            else ""
        ),
        "student": f"layers {config.student.layers} of {config.student.base} "
        f"({model_shape(student).describe()}"
        + (f", {setup.frozen:,} embedding parameters frozen" if setup.frozen else "")
        + f"), attention dropout {config.student.attention_dropout}",
        "training": f"{budget}, batch {training.batch_size}"
        + (f" × {training.gradient_accumulation}" if training.gradient_accumulation > 1 else "")
        + f", learning rate {training.learning_rate:g}, seeds {', '.join(map(str, config.seeds))}",
    }


def _line(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def _to_device(model: PreTrainedModel) -> PreTrainedModel:
    return nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
