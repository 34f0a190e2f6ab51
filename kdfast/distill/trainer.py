"""DistillationTrainer: a transformers Trainer whose loss is a recipe between teacher and student.

args = DistillationArguments(output_dir="student", recipe="internal")
trainer = DistillationTrainer(
    model=student, teacher=teacher, args=args, train_dataset=train, processing_class=tokenizer
)
trainer.train()
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kdfast.captured import Captured
from kdfast.distill.capture import Capture, model_shape
from kdfast.distill.data import DistillationCollator, same_vocabulary
from kdfast.distill.models import set_attention_dropout
from kdfast.errors import InputError
from kdfast.recipes import Recipe, build_recipe

TEACHER_PREFIX = "teacher_"
STATE_FILE = "kdfast_state.safetensors"


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments, and what is distilled how.

    recipe: a name in kdfast.recipes.RECIPES. recipe_options: its keyword arguments.
    attention_dropout: of the student while distilling; None keeps the model's own. 0 by default:
    the losses compare attention before dropout, and on a CPU dropout makes SDPA form the maps.
    """

    recipe: str = field(default="internal", metadata={"help": "name of the recipe"})
    recipe_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "the recipe's options, as JSON"}
    )
    attention_dropout: float | None = field(
        default=0.0, metadata={"help": "student attention dropout; None keeps the model's own"}
    )


class DistillationTrainer(Trainer):
    """Trains a student on a recipe's losses against a frozen teacher.

    Args:
        model: the student, a transformers model with SDPA-capable attention.
        teacher: the teacher; run under no_grad in evaluation mode and its own dtype, never wrapped,
            never saved. Not needed by recipe "labels".
        args: DistillationArguments.
        recipe: a Recipe to use in place of the one that args names.
        teacher_processing_class: the teacher's tokenizer, where it is not the student's; the data
            set must then carry the teacher's own inputs in columns prefixed "teacher_", see
            kdfast.distill.data.tokenize.
        Everything else as in transformers.Trainer.

    A batch's columns prefixed "teacher_" go to the teacher, without the prefix; if there are none
    the teacher sees the student's. Loss terms are logged apart as loss_<term>, unweighted. Beside
    each saved student lies kdfast_state.safetensors with the recipe's learned parts, if any.

    Raises:
        InputError: models that the recipe cannot join, reentrant gradient checkpointing, label
            smoothing, data-parallel threads, differing vocabularies without teacher columns.
    """

    # A recipe is a mean over the batch: the Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | None = None,
        args: DistillationArguments | None = None,
        *,
        teacher: PreTrainedModel | None = None,
        recipe: Recipe | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            args = DistillationArguments()
        _check_arguments(args)
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"model must be a transformers PreTrainedModel, was {type(model).__name__}"
            )
        if teacher is model:
            raise InputError("teacher is the same object as model: it would teach itself")
        if teacher is not None and not isinstance(teacher, PreTrainedModel):
            raise InputError(
                f"teacher must be a transformers PreTrainedModel, was {type(teacher).__name__}; "
                "load it first, e.g. AutoModelForSequenceClassification.from_pretrained(...)"
            )
        if kwargs.get("compute_loss_func") is not None:
            raise InputError("compute_loss_func would be ignored: the recipe is the loss")
        _check_labels_agree(model, teacher)
        # Learned parts of the recipe are drawn from the run's seed, whatever was drawn before.
        set_seed(args.seed)
        student_shape = model_shape(model)
        if recipe is None:
            if teacher is None and args.recipe != "labels":
                raise InputError(f"recipe '{args.recipe}' needs a teacher, was None")
            recipe = build_recipe(
                args.recipe,
                student_shape,
                student_shape if teacher is None else model_shape(teacher),
                **_options(args),
            )
        if recipe.needs_teacher and teacher is None:
            raise InputError(f"recipe '{recipe.name}' needs a teacher, was None")
        processing_class = kwargs.get("processing_class")
        # Whether both models read the same token ids: known here where both tokenizers are given,
        # otherwise guessed from the vocabulary's size.
        self._shared_tokens = teacher is None or (
            same_vocabulary(processing_class, teacher_processing_class)
            if processing_class is not None and teacher_processing_class is not None
            else model.config.get_text_config().vocab_size
            == teacher.config.get_text_config().vocab_size
        )
        if not self._shared_tokens and recipe.needs_teacher and recipe.token_aligned:
            raise InputError(
                "student and teacher have different vocabularies, and "
                f"{' and '.join(recipe.token_aligned)} of this recipe compare token by token: "
                "choose losses on [CLS] states or logits (e.g. attention_weight=0 "
                "cosine_rows=cls), or models that share a tokenizer"
            )

        if kwargs.get("data_collator") is None and not self._shared_tokens and processing_class:
            # The Trainer's default would not know that the teacher's columns are inputs to pad.
            kwargs["data_collator"] = DistillationCollator(
                processing_class, teacher_processing_class
            )
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise InputError(
                f"this process sees {self.args.n_gpu} GPUs and would run data-parallel threads: "
                "start one process per GPU (torchrun, accelerate launch), or set "
                "CUDA_VISIBLE_DEVICES"
            )
        # For releases without loss_is_scaled_for_ga: the student's own loss is not the one trained.
        self.model_accepts_loss_kwargs = False

        announcement = []
        if args.attention_dropout is not None:
            layers = set_attention_dropout(model, args.attention_dropout)
            announcement.append(
                f"  student attention dropout set to {args.attention_dropout:g} in {layers} layers "
                "(attention_dropout=None keeps the model's own)"
            )
        self.recipe = recipe.to(self.args.device)
        self.teacher: PreTrainedModel | None = None
        self._student_capture = Capture(model, recipe.needs)
        self._teacher_capture: Capture | None = None
        if recipe.needs_teacher:
            assert teacher is not None
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
            self._teacher_capture = Capture(teacher, recipe.needs)
        captures = {"student": self._student_capture, "teacher": self._teacher_capture}
        announcement += [
            f"  {role} attention runs as SDPA, not {capture.replaced}, while distilling"
            for role, capture in captures.items()
            if capture is not None and capture.replaced not in (None, "sdpa")
        ]
        self.add_callback(Announcement("\n".join([recipe.table(), *announcement])))
        self._sums: dict[str, torch.Tensor] = {}
        self._summed = 0
        self._stepped = True

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        student_inputs, teacher_inputs = self._split(inputs, model.training)
        if not model.training:
            # Evaluation reports the student's own loss on the labels, and keeps its logits only.
            return super().compute_loss(model, student_inputs, return_outputs, num_items_in_batch)
        labels = student_inputs.pop("labels", None)
        teacher = self._run_teacher(teacher_inputs)
        outputs, student = self._student_capture(student_inputs, forward=model)
        losses = self.recipe(student, teacher, labels)
        loss = self.recipe.total(losses)
        if self.args.world_size > 1 and student.logits is not None:
            # A recipe without a loss on logits leaves the head without gradient, which DDP refuses.
            loss = loss + 0 * student.logits.sum()
        self._accumulate(losses)
        return (loss, outputs) if return_outputs else loss

    def _split(
        self, inputs: Mapping[str, Any], training: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        student = {k: v for k, v in inputs.items() if not k.startswith(TEACHER_PREFIX)}
        teacher = {
            k.removeprefix(TEACHER_PREFIX): v
            for k, v in inputs.items()
            if k.startswith(TEACHER_PREFIX)
        }
        if teacher:
            return student, teacher
        if not self._shared_tokens and self.recipe.needs_teacher and training:
            raise InputError(
                "student and teacher have different vocabularies, so each must read the text "
                "itself: the data set needs the columns teacher_input_ids and "
                "teacher_attention_mask (kdfast.distill.data.tokenize with teacher_tokenizer). If "
                "the vocabularies are one and only padded differently, give both tokenizers as "
                "processing_class and teacher_processing_class"
            )
        return student, {k: v for k, v in student.items() if k != "labels"}

    @torch.no_grad()
    def _run_teacher(self, inputs: dict[str, Any]) -> Captured | None:
        # no_grad, not inference_mode: the losses save the teacher's tensors for backward.
        if self._teacher_capture is None:
            return None
        # A teacher of another family may not know every input of the student's (token_type_ids).
        known = self._teacher_columns()
        # A half-precision teacher keeps its own dtype; an fp32 one shares the student's autocast.
        assert self.teacher is not None
        mixed = self.teacher.dtype == torch.float32
        with self.accelerator.autocast() if mixed else contextlib.nullcontext():
            _, captured = self._teacher_capture({k: v for k, v in inputs.items() if k in known})
        return captured

    def _teacher_columns(self) -> list[str]:
        assert self.teacher is not None
        return list(inspect.signature(self.teacher.forward).parameters)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if getattr(self, "teacher", None) is not None:
            columns: Any = self._signature_columns
            columns += {TEACHER_PREFIX + name for name in self._teacher_columns()}.difference(
                columns
            )

    # The recipe's own parameters: optimised, clipped, reduced across ranks, saved and restored

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        parameters = list(self.recipe.parameters())
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if parameters and id(parameters[0]) not in known:
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        if self.args.world_size > 1:
            # Random projections must start equal on every rank, as the student does.
            for tensor in (*parameters, *self.recipe.buffers()):
                torch.distributed.broadcast(tensor.data, src=0)
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # The Trainer zeroes the gradients of the model it knows, after each optimizer step.
        if self._stepped:
            self.recipe.zero_grad()
        loss = super().training_step(*args, **kwargs)
        self._stepped = self.accelerator.sync_gradients
        if self.args.world_size > 1 and self._stepped:
            # The student's gradients are averaged by its wrapper; the recipe has none.
            for parameter in self.recipe.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.args.world_size
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # transformers 5.0 has no such method, and clips the student alone.
        parameters = list(self.recipe.parameters())
        if not parameters:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_(
            [*model.parameters(), *parameters], self.args.max_grad_norm
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        state = self.recipe.state_dict()
        if state and self.args.should_save:
            directory = output_dir if output_dir is not None else self.args.output_dir
            assert directory is not None
            partial = os.path.join(directory, STATE_FILE + ".partial")
            save_file(state, partial, metadata={"recipe": self.recipe.name})
            os.replace(partial, os.path.join(directory, STATE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.recipe.state_dict():
            path = os.path.join(resume_from_checkpoint, STATE_FILE)
            if not os.path.isfile(path):
                raise InputError(
                    f"checkpoint {resume_from_checkpoint} has no {STATE_FILE}, which holds the "
                    f"learned parts of recipe '{self.recipe.name}': it was made by another recipe"
                )
            try:
                self.recipe.load_state_dict(load_file(path))
            except RuntimeError as error:
                raise InputError(
                    f"{path} does not fit recipe '{self.recipe.name}': {error}"
                ) from None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None and os.path.isfile(os.path.join(best, STATE_FILE)):
            self.recipe.load_state_dict(load_file(os.path.join(best, STATE_FILE)))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise InputError(f"no whole checkpoint in {self.args.output_dir} to resume from")
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def close(self) -> None:
        """Give both models their own attention functions back; the trainer is done."""
        self._student_capture.close()
        if self._teacher_capture is not None:
            self._teacher_capture.close()

    # Logging

    def _accumulate(self, losses: dict[str, torch.Tensor]) -> None:
        # Summed on the device; read only when the Trainer logs, not at every step.
        for name, loss in losses.items():
            previous = self._sums.get(name)
            detached = loss.detach().float()
            self._sums[name] = detached if previous is None else previous + detached
        self._summed += 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._summed:
            for name, total in self._sums.items():
                mean = total / self._summed
                if self.args.world_size > 1:
                    torch.distributed.all_reduce(mean)
                    mean = mean / self.args.world_size
                logs[f"loss_{name}"] = mean.item()
            self._sums.clear()
            self._summed = 0
        super().log(logs, *args, **kwargs)


class Announcement(TrainerCallback):
    """Prints what is about to be trained; trainer.remove_callback(Announcement) for silence."""

    def __init__(self, text: str) -> None:
        self.text = text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print(self.text, flush=True)


def last_whole_checkpoint(directory: str | Path) -> str | None:
    """The newest checkpoint that was written to its end, or None.

    The Trainer writes trainer_state.json last, so a checkpoint without a readable one was cut off
    (SIGKILL, full disk). It rotates older ones out only after that.
    """
    found = [(step, str(path)) for path, step in _checkpoints(directory) if step is not None]
    return max(found)[1] if found else None


def remove_partial_checkpoints(directory: str | Path) -> None:
    """Delete checkpoints that were cut off, which rotation would count as whole ones."""
    for path, step in _checkpoints(directory):
        if step is None:
            shutil.rmtree(path, ignore_errors=True)


def _checkpoints(directory: str | Path) -> list[tuple[Path, int | None]]:
    """Checkpoint folders with their steps, None where writing was cut off."""
    found: list[tuple[Path, int | None]] = []
    for path in Path(directory).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            step = int(json.loads((path / "trainer_state.json").read_text())["global_step"])
        except (OSError, ValueError, KeyError, TypeError):
            step = None
        found.append((path, step))
    return found


def _check_labels_agree(student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    """What would train on the wrong classes without a sign of it."""
    for role, model in (("model", student), ("teacher", teacher)):
        if model is not None and model.config.problem_type == "multi_label_classification":
            raise InputError(
                f"{role} is a multi-label classifier, which the recipes do not cover: soft labels "
                "would compare a softmax of independent labels"
            )
    if teacher is None:
        return
    ours, theirs = (
        [str(name).casefold() for _, name in sorted((model.config.id2label or {}).items())]
        for model in (student, teacher)
    )
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise InputError(
            f"the student numbers its labels {', '.join(ours)} and the teacher "
            f"{', '.join(theirs)}: give the student the teacher's id2label"
        )


def _options(args: DistillationArguments) -> dict[str, Any]:
    options = args.recipe_options or {}
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError as error:
            raise InputError(f"recipe_options is not JSON ({error}): {options!r}") from None
    if not isinstance(options, dict):
        raise InputError(f"recipe_options must be a mapping, was {options!r}")
    return options


def _check_arguments(args: Any) -> None:
    if not isinstance(args, DistillationArguments):
        raise InputError(f"args must be DistillationArguments, was {type(args).__name__}")
    # transformers 5.2x renamed these fields and keeps the old ones as mirrors.
    on = getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing
    kwargs: dict[str, Any] = dict(
        getattr(args, "activation_checkpointing_kwargs", None)
        or args.gradient_checkpointing_kwargs
        or {}  # type: ignore[arg-type]
    )
    if on and kwargs.setdefault("use_reentrant", False):
        raise InputError(
            "gradient_checkpointing_kwargs sets use_reentrant=True: captured tensors would carry "
            "no gradient and the internal losses train nothing; set use_reentrant to False"
        )
    if on:
        args.gradient_checkpointing_kwargs = kwargs
        if hasattr(args, "activation_checkpointing_kwargs"):
            args.activation_checkpointing_kwargs = kwargs
    if args.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on a recipe's "
            "losses: set it to 0"
        )
    if args.attention_dropout is not None and not 0 <= args.attention_dropout < 1:
        raise InputError(f"attention_dropout must be in [0, 1), was {args.attention_dropout}")
