"""One student: built, trained against its teacher (or a chain of assistants), scored, saved."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
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
from kdfast.distill.config import StudentConfig, TrainingConfig, Way
from kdfast.distill.data import DistillationCollator, Splits, same_vocabulary, tokenize
from kdfast.distill.fidelity import Predictions, alignment
from kdfast.distill.models import (
    build_student,
    freeze_embeddings,
    load_model,
    load_tokenizer,
    parameter_count,
)
from kdfast.distill.profile import can_profile, step_parts
from kdfast.distill.provenance import code_version
from kdfast.distill.run_directory import read, save_predictions, say, write_text
from kdfast.distill.scoring import Scoring
from kdfast.distill.stages import stage_steps
from kdfast.distill.trained_on import TrainedOn
from kdfast.distill.trainer import (
    TEACHER_PREFIX,
    Announcement,
    DistillationArguments,
    DistillationTrainer,
    last_whole_checkpoint,
    remove_partial_checkpoints,
)
from kdfast.errors import InputError
from kdfast.recipes import Recipe, build_recipe
from kdfast.recipes.layer_map import layer_map
from kdfast.recipes.terms import check_relevance

SETTINGS_FILE = "kdfast_settings.json"


@dataclass
class Setup:
    """What all students of one StudentConfig share in a run."""

    student_config: StudentConfig
    splits: Splits
    teacher: PreTrainedModel
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase
    collator: DistillationCollator
    shared_tokens: bool
    task: str | None
    pool: str
    cka_sentences: int
    train: Dataset
    dev: Dataset
    test: Dataset
    more_tests: dict[str, Dataset]
    frozen: int = 0
    before: dict[int, torch.Tensor] = field(default_factory=dict)

    def student(self, seed: int) -> PreTrainedModel:
        """The untrained student of this seed, with a new head."""
        set_seed(seed)
        config = self.student_config
        student = build_student(
            self.base,
            kind=config.kind,
            layers=config.layers,
            width=config.width,
            init=config.init,
            embeddings=config.embeddings,
            options=config.options,
            task=self.splits.kind,
            label_names=self.splits.label_names,
        )
        if config.freeze_embeddings:
            self.frozen = freeze_embeddings(student)
        return to_device(student)

    def alignment(
        self, student: PreTrainedModel, recipe: Recipe | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = self.test.select(range(min(self.cka_sentences, len(self.test))))
        return alignment(
            student,
            self.teacher,
            rows,
            self.collator,
            shared_tokens=self.shared_tokens,
            recipe=recipe,
        )

    @property
    def scoring(self) -> Scoring:
        return Scoring(self.splits, self.task, self.pool)

    def predict(self, model: PreTrainedModel, part: Dataset, **kwargs: Any) -> Predictions:
        return self.scoring.predict(model, part, self.collator, **kwargs)

    def measures(self, student: Predictions, teacher: Predictions) -> dict[str, float]:
        return self.scoring.scores(student) | self.scoring.fidelity(student, teacher)

    def more_scores(self, model: PreTrainedModel, role: str = "student") -> dict[str, float]:
        """Scores on the further test parts, by the names of part and metric."""
        return {
            f"{name}_{metric}": value
            for name, part in self.more_tests.items()
            for metric, value in self.scoring.scores(
                self.predict(model, part, role=role, progress=name)
            ).items()
        }

    def trainer(
        self, student: PreTrainedModel, args: DistillationArguments, **kwargs: Any
    ) -> DistillationTrainer:
        return DistillationTrainer(
            model=student,
            teacher=self.teacher,
            args=args,
            train_dataset=self.train,
            data_collator=self.collator,
            processing_class=self.tokenizer,
            teacher_processing_class=self.teacher_tokenizer,
            **kwargs,
        )

    def taught_by(self, assistant: PreTrainedModel) -> Setup:
        """The same students, taught by a model that reads their own tokens."""
        theirs = [c for c in self.train.column_names if c.startswith(TEACHER_PREFIX)]
        return replace(
            self,
            teacher=assistant,
            teacher_tokenizer=self.tokenizer,
            collator=DistillationCollator(self.tokenizer, None, self.collator.pad_to),
            shared_tokens=True,
            train=self.train.remove_columns(theirs),
        )


def make_setup(
    student: StudentConfig,
    splits: Splits,
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    data: Any,
    pool: str,
    cka_sentences: int,
    trust_remote_code: bool,
) -> Setup:
    from_teacher = student.base == "teacher"
    tokenizer = (
        teacher_tokenizer
        if from_teacher
        else load_tokenizer(student.base, trust_remote_code=trust_remote_code)
    )
    shared = from_teacher or same_vocabulary(tokenizer, teacher_tokenizer)
    extra = None if shared else teacher_tokenizer
    base = teacher if from_teacher else new_model(student.base, splits, trust_remote_code)
    for model in (base, teacher):
        check_length(model, data.max_length)

    def tokenized(part: Dataset) -> Dataset:
        return tokenize(part, tokenizer, data.max_length, extra)

    return Setup(
        student_config=student,
        splits=splits,
        teacher=teacher,
        base=base,
        tokenizer=tokenizer,
        teacher_tokenizer=teacher_tokenizer,
        collator=DistillationCollator(tokenizer, extra, data.pad_to),
        shared_tokens=shared,
        task=data.task,
        pool=pool,
        cka_sentences=cka_sentences,
        train=tokenized(splits.student_train),
        dev=tokenized(splits.dev),
        test=tokenized(splits.test),
        more_tests={name: tokenized(part) for name, part in splits.more_tests.items()},
    )


@dataclass
class Job:
    """A run's teacher and data, and the set-ups of the students distilled from it.

    pool: of embedders, see `embed`. announced: the ways whose table of losses was printed.
    """

    config: Any
    run_dir: Path
    splits: Splits
    teacher: PreTrainedModel
    teacher_tokenizer: PreTrainedTokenizerBase
    pool: str = "mean"
    setups: dict[str, Setup] = field(default_factory=dict)
    announced: set[str] = field(default_factory=set)

    def setup(self, student: StudentConfig) -> Setup:
        key = repr(student)
        if key not in self.setups:
            self.setups[key] = make_setup(
                student,
                self.splits,
                self.teacher,
                self.teacher_tokenizer,
                data=self.config.data,
                pool=self.pool,
                cka_sentences=self.config.cka_sentences,
                trust_remote_code=self.config.trust_remote_code,
            )
        return self.setups[key]

    @property
    def trained_on(self) -> TrainedOn:
        """What all its students are trained on."""
        return TrainedOn.of(asdict(self.config.data), "student_train", self.splits.student_train)

    def work(self, folder: Path) -> Path:
        """Where the checkpoints of the student of `folder` lie until it is finished."""
        return self.run_dir / "work" / Path(*folder.relative_to(self.run_dir).parts[1:])


def one_student(
    job: Job, way: Way, seed: int, teacher_test: Predictions, *, keep: bool = True
) -> dict[str, Any]:
    """The record of a student: trained unless it was before, scored on the test part.

    keep: False drops its weights once it is scored.
    """
    folder = job.run_dir / "students" / way.label / f"seed-{seed}"
    if record := finished(folder, way, weights=keep):
        say("  done before")
        return record
    setup = job.setup(way.student)
    began = time.perf_counter()
    if seed not in setup.before:
        setup.before[seed] = setup.alignment(setup.student(seed))[0]
    trainer, timer = trained(job, way, seed, folder)
    student: Any = trainer.model
    result = setup.predict(student, setup.test, progress="test")
    aligned, weights = setup.alignment(student, trainer.recipe)
    pairs = layer_map("uniform", model_shape(student), model_shape(setup.teacher))
    record = {
        "way": way.label,
        "recipe": way.recipe,
        "options": way.options,
        "seed": seed,
        **setup.measures(result, teacher_test),
        **setup.more_scores(student),
        "cka_to_teacher": float(torch.stack([aligned[i, j] for i, j in pairs]).mean()),
        "milliseconds_per_step": timer.median(),
        "parts": timer.parts,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - began, 1),
        "parameters": parameter_count(student),
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad)
        + sum(p.numel() for p in trainer.recipe.parameters() if p.requires_grad),
        "cka_before": setup.before[seed].tolist(),
        "cka_after": aligned.tolist(),
        "projection_weights": None if weights is None else weights.tolist(),
        "log": [
            {k: v for k, v in entry.items() if k == "step" or k.startswith("loss")}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
        "code": code_version(),
        "settings": way.settings(),
    }
    save_predictions(folder.with_name(folder.name + ".safetensors"), result)
    if keep:
        save_whole(folder, trainer, setup.tokenizer, job.trained_on)
    finish(job, folder, record)
    if not keep:
        for path in folder.parent.glob(f"assistant-*/{folder.name}"):
            shutil.rmtree(path)
    measured = ("milliseconds_per_step", "seconds")
    shown = {k: v for k, v in record.items() if isinstance(v, float) and k not in measured}
    say(f"  {line(shown)}")
    return record


def finished(folder: Path, way: Way, *, weights: bool) -> dict[str, Any] | None:
    """The record of a student that was finished before with the same settings."""
    text = read(folder.with_name(folder.name + ".json"))
    record = None if text is None else json.loads(text)
    if record is None or record.get("settings") != way.settings():
        return None
    return record if not weights or (folder / "config.json").is_file() else None


def finish(job: Job, folder: Path, record: dict[str, Any]) -> None:
    """Write the record, which makes a student finished, and drop its checkpoints."""
    write_text(folder.with_name(folder.name + ".json"), json.dumps(record))
    for checkpoint in job.work(folder).glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def trained(
    job: Job, way: Way, seed: int, folder: Path, *, home: Path | None = None
) -> tuple[DistillationTrainer, _StepTimer]:
    """A trainer at the end of its training, which goes on from the last checkpoint if one was left.

    folder: the student's, whose name its checkpoints get. home: where assistants are kept, beside
    the folders of the students they teach.
    """
    setup = job.setup(way.student)
    if way.options.get("assistants"):
        setup = setup.taught_by(_assistant(job, way, seed, folder, home or folder.parent))
    student = setup.student(seed)
    work = job.work(folder)
    settings = json.dumps(way.settings())
    if read(work / SETTINGS_FILE) != settings:
        shutil.rmtree(work, ignore_errors=True)  # checkpoints of other settings
        write_text(work / SETTINGS_FILE, settings)
    timer = _StepTimer()
    trainer = setup.trainer(
        student,
        arguments(
            *(way, len(setup.train), work, seed),
            prepared=job.run_dir / "prepared",
            # Assistants are of one seed, and read once or twice.
            cache=None if way.options.get("assistants") else job.config.teacher_cache,
        ),
        callbacks=[timer],
    )
    if way.label in job.announced:
        trainer.remove_callback(Announcement)
    job.announced.add(way.label)
    train(trainer, way.label)
    if seed in way.seeds[:1] and home is None and can_profile(trainer):
        timer.parts = step_parts(trainer)
    trainer.close()
    return trainer, timer


def _assistant(job: Job, way: Way, seed: int, folder: Path, home: Path) -> PreTrainedModel:
    """The last of a way's teacher assistants (Mirzadeh et al., AAAI 2020), trained unless it was:
    a student of more layers, which the others before it teach, and which teaches the student."""
    *above, layers = way.options["assistants"]
    name = f"assistant-{layers}"
    own = replace(
        way,
        label=f"{way.label}.{name}",
        options={k: v for k, v in way.options.items() if k != "assistants"}
        | ({"assistants": above} if above else {}),
        student=replace(way.student, layers=layers),
    )
    folder = home / name / folder.name
    if not finished(folder, own, weights=True):
        trainer, _ = trained(job, own, seed, folder, home=home)
        save_whole(folder, trainer, job.setup(own.student).tokenizer, job.trained_on)
        finish(job, folder, {"way": own.label, "seed": seed, "settings": own.settings()})
    remote = job.config.trust_remote_code
    return to_device(load_model(folder, job.splits.kind, trust_remote_code=remote))


def arguments(
    way: Way,
    rows: int,
    output_dir: Path,
    seed: int,
    *,
    prepared: Path | None = None,
    cache: str | None = None,
) -> DistillationArguments:
    """The Trainer's arguments. rows: of the training data, for the number of steps. prepared,
    cache: folders for what is fitted to the teacher and for what is read of it."""
    training = way.training
    per_epoch = _steps_per_epoch(training, rows)
    steps = training.steps or max(1, round((training.epochs or 1) * per_epoch))
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
        **(_grouped() if training.group_by_length else {}),
        **training.arguments,
    }
    try:
        return DistillationArguments(
            output_dir=str(output_dir),
            seed=seed,
            recipe=way.recipe,
            recipe_options=way.options,
            attention_dropout=way.student.attention_dropout,
            prepared_dir=None if prepared is None else str(prepared),
            teacher_cache=cache,
            cuda_graphs=training.cuda_graphs,
            **values,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"training: {error}") from error


def _grouped() -> dict[str, Any]:
    """The Trainer's argument for batches of like lengths, whose name has changed."""
    if "train_sampling_strategy" in DistillationArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}


def train(trainer: DistillationTrainer, what: str) -> None:
    """Train to the end, from the last whole checkpoint if an interrupted run left one."""
    for others in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(others)
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
    """Median wall time of an optimizer step: teacher, student, losses, backward, update.

    parts: what these take, see kdfast.distill.profile; None where nobody looked.
    """

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any]] = []  # its beginning and its end
        self.parts: dict[str, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append((self.began, self._now()))

    def median(self) -> float | None:
        """In milliseconds; None if every step was taken before this run was resumed."""
        if not self.steps:
            return None
        if not torch.cuda.is_available():
            return statistics.median(1e3 * (end - begin) for begin, end in self.steps)
        torch.cuda.synchronize()
        return statistics.median(begin.elapsed_time(end) for begin, end in self.steps)

    @staticmethod
    def _now() -> Any:
        """Seconds; of a GPU a mark in its queue, which nobody waits for until it is read."""
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def try_one_step(
    setup: Setup, way: Way, seed: int, folder: Path, whole: Dataset, *, cache: str | None = None
) -> None:
    """One real training step of each stage, on the few rows of `setup`; whatever cannot work is an
    InputError.

    whole: the training data that the few stand for. cache: the run's; nothing is written there.
    """
    rows = len(whole)
    try:
        if assistants := way.options.get("assistants"):
            # The chain as a whole, and a step of its last link, here from the first teacher.
            shapes = model_shape(setup.student(seed)), model_shape(setup.teacher)
            build_recipe(way.recipe, *shapes, **way.options)
            for layers in assistants:
                replace(setup, student_config=replace(way.student, layers=layers)).student(seed)
            way = replace(way, options={**way.options, "assistants": None})
        args = arguments(way, rows, folder, seed, cache=cache)
        steps = args.max_steps
        values = {
            "per_device_train_batch_size": min(4, args.per_device_train_batch_size),
            "gradient_accumulation_steps": 1,
            "save_strategy": SaveStrategy.NO,
            "report_to": [],
            "disable_tqdm": True,
        }
        for name, value in values.items():
            setattr(args, name, value)
        trainer = setup.trainer(setup.student(seed), args)
        recipe = trainer.recipe
        if recipe.needs_labels and setup.splits.kind == "reranking":
            check_relevance(torch.tensor(list(whole["label"])))
        for part in recipe.fitted.values():
            if rows < part.least_rows:
                raise InputError(
                    f"{part.what} is fitted to at least {part.least_rows} training rows"
                    f"{part.limited_by and f' (recipe option {part.limited_by})'}, and there are "
                    f"{rows}"
                )
        stage_steps(recipe.stages, steps, _steps_per_epoch(way.training, rows))
        recipe.stages = [replace(s, steps=1, epochs=None, share=None) for s in recipe.stages]
        args.max_steps = len(recipe.stages)
        trainer.skip_preparation()
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(Announcement)
        try:
            trainer.train()
        finally:
            trainer.close()
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
        raise InputError(f"{way.label}: {error}") from error


def _steps_per_epoch(training: TrainingConfig, rows: int) -> int:
    return math.ceil(math.ceil(rows / training.batch_size) / training.gradient_accumulation)


def new_model(name: str, splits: Splits, remote: bool) -> PreTrainedModel:
    """A model with a new head for the data's labels."""
    return load_model(
        name, splits.kind, label_names=splits.label_names, new_head=True, trust_remote_code=remote
    )


def check_length(model: PreTrainedModel, length: int) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and length > most:
        raise InputError(
            f"data.max_length is {length}, and {type(model).__name__} has {most} positions: set "
            f"data.max_length to {most} or less"
        )


def save_whole(
    target: Path,
    trainer: DistillationTrainer,
    tokenizer: PreTrainedTokenizerBase,
    trained_on: TrainedOn,
) -> None:
    """The model by save_pretrained, beside it the recipe's learned parts and what it was trained
    on; all of it or nothing."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model = trainer.model
    assert isinstance(model, PreTrainedModel)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    trainer.save_recipe(partial)
    trained_on.save(partial)
    if target.exists():
        # Over the model that is there, file by file: whatever else lies there stays.
        for path in partial.iterdir():
            os.replace(path, target / path.name)
        partial.rmdir()
    else:
        partial.rename(target)


def line(values: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())


def to_device(model: PreTrainedModel) -> PreTrainedModel:
    return nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
