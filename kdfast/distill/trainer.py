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
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
    set_seed,
)
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from kdfast.captured import Captured, Needs
from kdfast.distill.capture import Capture, is_compiled, model_shape
from kdfast.distill.data import DistillationCollator, same_vocabulary
from kdfast.distill.graphs import Graphs
from kdfast.distill.models import set_attention_dropout
from kdfast.distill.padding import PADDED, PADDED_MASKS, PaddingCollator
from kdfast.distill.prepare import prepare
from kdfast.distill.stages import StageClock, stage_steps
from kdfast.distill.teacher_cache import (
    ROW,
    NumberedRows,
    RowCollator,
    TeacherCache,
    TeacherInputs,
    TeacherRows,
    check_indexed,
    check_masked,
    counting_padding,
)
from kdfast.errors import InputError
from kdfast.recipes import RECIPES, Recipe, build_recipe, check_recipe
from kdfast.recipes.schedule import Moment
from kdfast.recipes.terms import check_relevance

TEACHER_PREFIX = "teacher_"
STATE_FILE = "kdfast_state.safetensors"


@dataclass
class DistillationArguments(TrainingArguments):
    """TrainingArguments, and what is distilled how.

    recipe: a name in kdfast.recipes.RECIPES. recipe_options: its keyword arguments.
    attention_dropout: of the student while distilling; None keeps the model's own. 0 by default:
    the losses compare attention before dropout, and on a CPU dropout makes SDPA form the maps.
    prepared_dir: where parts that are fitted before training (cluster memories, pseudo classifiers)
    are kept for other runs on the same teacher and data; None fits them every time.
    teacher_cache: a folder for all that the recipe reads of the teacher on the training data, so
    that the teacher runs over it once, before the first step, and not at all in later runs; it
    waits on the CPU while the student trains. None runs it in every step. Its files are checked
    whole before they are used, by the first process of each machine.
    cuda_graphs: record the teacher's forward pass, and the losses with their gradients, once for
    each set of shapes (up to 32 a stage; full batches apart from padded ones), and replay them: for
    small batches on an NVIDIA GPU, which wait for launches. A set of shapes keeps what the losses
    read of both models, and its gradients, so pad to few lengths (DistillationCollator's pad_to, or
    equal texts). Of one process, not with fp16 or torch_compile (whose mode "reduce-overhead" makes
    graphs of student and teacher, but not of the losses). Losses that change from step to step
    (annealing) are launched as ever. No GPU has run it yet.
    """

    recipe: str = field(default="internal", metadata={"help": "name of the recipe"})
    recipe_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "the recipe's options, as JSON"}
    )
    attention_dropout: float | None = field(
        default=0.0, metadata={"help": "student attention dropout; None keeps the model's own"}
    )
    prepared_dir: str | None = field(
        default=None, metadata={"help": "where fitted parts of the recipe are kept and reused"}
    )
    teacher_cache: str | None = field(
        default=None, metadata={"help": "where the teacher's internals are kept and reused"}
    )
    cuda_graphs: bool = field(
        default=False, metadata={"help": "replay teacher and losses as CUDA graphs, one a shape"}
    )
    # The Trainer's own default looks at the loss of every step, and waits for the device to do so.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "leave losses that are not finite out of the log"}
    )


class DistillationTrainer(Trainer):
    """Trains a student on a recipe's losses against a frozen teacher.

    Args:
        model: the student, a transformers model with SDPA-capable attention.
        teacher: the teacher; run under no_grad in evaluation mode, never wrapped, never saved. In
            fp32 it runs under the student's autocast (bf16, fp16), which casts its weights in every
            step; loaded in bfloat16, or cast to it, it keeps that dtype and is spared the casts.
            Not needed by recipe "labels".
        args: DistillationArguments.
        recipe: a Recipe to use in place of the one that args names.
        teacher_processing_class: the teacher's tokenizer, where it is not the student's; the data
            set must then carry the teacher's own inputs in columns prefixed "teacher_", see
            kdfast.distill.data.tokenize.
        Everything else as in transformers.Trainer.

    A batch's columns prefixed "teacher_" go to the teacher, without the prefix; if there are none
    the teacher sees the student's. A training batch also says which of its masks leave tokens out,
    as found where it was made (`kdfast_padded_masks`), so that nobody waits for the device to see
    it: who changes a mask afterwards takes that entry away. Columns at the end of a training batch
    that a model's mask leaves out in all rows (of texts padded to one length beforehand) are cut
    there too; but not with a collator's pad_to, losses that count padding, torch_compile or
    cuda_graphs, which want few lengths, nor of batches that another process hands on. Loss terms
    are logged apart as loss_<term>, unweighted. Beside each saved student lies
    kdfast_state.safetensors with the recipe's learned parts; without any, with its metadata alone,
    the recipe's name and options.

    Micro-batches of gradient accumulation, and the batches of several processes, are weighted by
    the samples or tokens that a term is the mean of, so that together they give the gradient of the
    large batch. Terms that couple the samples of a batch gather it from all processes; accumulated
    micro-batches stay apart there, and the table at the start names such terms.

    Raises:
        InputError: models that the recipe cannot join, reentrant gradient checkpointing, label
            smoothing, data-parallel threads, differing vocabularies without teacher columns, a
            teacher cache for losses that read padding.
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
        for role, given in {"model": model, "teacher": teacher}.items():
            if is_compiled(given):
                raise InputError(
                    f"{role} is compiled already, and capture cannot see into it: give the plain "
                    "model, and torch_compile=True in args"
                )
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                f"model must be a transformers PreTrainedModel, was {type(model).__name__}"
            )
        if teacher is model:
            raise InputError("teacher is the same object as model: it would teach itself")
        if isinstance(teacher, nn.Module):
            theirs = {id(parameter) for parameter in teacher.parameters()}
            shared = [n for n, p in model.named_parameters() if id(p) in theirs]
            if shared:
                raise InputError(
                    f"model shares {len(shared)} parameters with teacher ({shared[0]}), which "
                    "would be frozen with it: give the student copies of its own"
                )
        if teacher is not None and not isinstance(teacher, PreTrainedModel):
            raise InputError(
                f"teacher must be a transformers PreTrainedModel, was {type(teacher).__name__}; "
                "load it first, e.g. AutoModelForSequenceClassification.from_pretrained(...)"
            )
        if kwargs.get("compute_loss_func") is not None:
            raise InputError("compute_loss_func would be ignored: the recipe is the loss")
        _check_labels_agree(model, teacher)
        train_dataset = kwargs.get("train_dataset")
        # Learned parts of the recipe are drawn from the run's seed, whatever was drawn before.
        set_seed(args.seed)
        student_shape = model_shape(model)
        self._binary = student_shape.binary
        if recipe is None:
            if teacher is None and args.recipe != "labels":
                raise InputError(f"recipe '{args.recipe}' needs a teacher, was None")
            options = _options(args)
            check_recipe(args.recipe, options)
            sized = "max_length" in inspect.signature(RECIPES[args.recipe]).parameters
            if sized and options.get("max_length") is None:
                # Among the options, so that the recipe can be built again from what is saved.
                longest = _longest(train_dataset, kwargs.get("data_collator"))
                options = {**options, "max_length": longest}
            recipe = build_recipe(
                args.recipe,
                student_shape,
                student_shape if teacher is None else model_shape(teacher),
                **options,
            )
        assistants = getattr(recipe, "assistants", ())
        if assistants and teacher is not None and assistants[-1] != model_shape(teacher).layers:
            raise InputError(
                f"recipe 'takd' teaches through assistants of {', '.join(map(str, assistants))} "
                "layers, and a trainer is one link of that chain: train each from the one before "
                "it, the last one as the teacher here, or run `kdfast distill takd`"
            )
        if recipe.needs_teacher() and teacher is None:
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
        if not self._shared_tokens and recipe.needs_teacher() and recipe.token_aligned:
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
            announcement += [
                f"  student attention dropout set to {args.attention_dropout:g} in {layers} layers "
                "(attention_dropout=None keeps the model's own)"
            ] * bool(layers)
        # The same check as label_loss's, which leaves it to those who have the labels on the host.
        self._relevance = student_shape.binary and bool(recipe.needs_labels)
        if self.args.world_size == 1:
            # Handed on to nobody, batches of data without numbers may hold more than tensors.
            self.accelerator.dataloader_config.dispatch_batches = False
        self._cached = bool(args.teacher_cache) and recipe.needs_teacher()
        if self._cached:
            check_masked(recipe)
            loading: Any = self.args.accelerator_config
            if loading.dispatch_batches:
                raise InputError(
                    "teacher_cache needs each process to load its own batches: leave out "
                    "accelerator_config.dispatch_batches, or teacher_cache"
                )
        self._cache: TeacherCache | None = None
        self._said_of_cache: list[str] = []
        self.recipe = recipe.to(self.args.device)
        self.teacher: PreTrainedModel | None = None
        of_student, of_teacher = recipe.needs()
        for part in recipe.fitted.values():
            of_teacher = of_teacher | part.needs_of_teacher()
        self._student_capture = Capture(model, of_student)
        self._teacher_capture: Capture | None = None
        self._compiled_teacher: Any = None
        if recipe.needs_teacher():
            assert teacher is not None
            self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
            self._teacher_capture = Capture(teacher, of_teacher)
            if self.args.torch_compile:
                # After the capture's hooks, which a graph made before would not have.
                self._compiled_teacher = torch.compile(
                    teacher,
                    backend=self.args.torch_compile_backend or "inductor",
                    mode=self.args.torch_compile_mode,
                )
        self._graphs: Graphs | None = None
        if args.cuda_graphs:
            _check_graphs(self.args)
            self._graphs = Graphs(recipe, self._run_teacher, self.teacher)
        captures = {"student": self._student_capture, "teacher": self._teacher_capture}
        announcement += [
            f"  {role} attention runs as SDPA, not {capture.replaced}, while distilling"
            for role, capture in captures.items()
            if capture is not None and capture.replaced not in (None, "sdpa")
        ]
        self._prepared: list[str] | None = None
        self._clock: StageClock | None = None
        self._resumed_clock: str | None = None
        self.add_callback(_Clockwork(self._after_step))
        self.add_callback(
            Announcement(
                lambda: "\n".join(
                    [
                        recipe.table(None if self._clock is None else self._clock.steps),
                        *announcement,
                        *(f"  {line}" for line in (*(self._prepared or ()), *self._said_of_cache)),
                    ]
                )
            )
        )
        self._sums: dict[str, torch.Tensor] = {}
        self._summed: dict[str, int] = {}
        self._stepped = True
        self._counts: dict[str, torch.Tensor] = {}
        self._reached: dict[int, set[int]] = {}

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
            if self._binary and "labels" in student_inputs:
                # transformers takes a relevance for several labels of a row.
                labels = student_inputs["labels"].float().view(-1, 1)
                student_inputs = {**student_inputs, "labels": labels}
            return super().compute_loss(model, student_inputs, return_outputs, num_items_in_batch)
        labels = student_inputs.pop("labels", None)
        if self._relevance and labels is not None and PADDED_MASKS not in inputs:
            check_relevance(labels)
        at = Moment() if self._clock is None else self._clock.moment(self.state.global_step)
        own, theirs = self.recipe.needs(at.stage)
        teacher = self._teacher_of(teacher_inputs, theirs, inputs.get(ROW)) if theirs else None
        outputs, student = self._student_capture(
            student_inputs,
            forward=model,
            needs=own,
            whole=return_outputs or self._runs_whole,
            padded=self._padded(inputs),
        )
        losses = self._weigh(self._losses(student, teacher, labels, at), inputs)
        if self._clock is not None:
            self._clock.observe(losses)
        self._accumulate(losses)
        loss = self.recipe.total(losses, at)
        if self.args.world_size > 1:
            if at.stage not in self._reached:
                self._reached[at.stage] = _reached(loss)
            # A loss that does not reach all parameters (the head, upper layers) DDP would refuse.
            for value in outputs.values():
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    loss = loss + 0 * value.sum()
        return (loss, outputs) if return_outputs else loss

    def _losses(
        self,
        student: Captured,
        teacher: Captured | None,
        labels: torch.Tensor | None,
        at: Moment,
    ) -> dict[str, torch.Tensor]:
        if self._graphs is not None:
            replayed = self._graphs.losses(student, teacher, labels, at)
            if replayed is not None:
                return replayed
        return self.recipe(student, teacher, labels, at, release=True)

    @property
    def _runs_whole(self) -> bool:
        """DDP wants the whole of what it wraps to run, and a compiled graph ends where it was
        traced to."""
        return self.args.world_size > 1 or self.args.torch_compile

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # All micro-batches of one optimizer step are known here: what each term is the mean of.
        batches, items = super().get_batch_samples(*args, **kwargs)
        self._counts = {}
        if len(batches) * self.args.world_size > 1:
            counted = [_counts(batch) for batch in batches]
            total = torch.stack([torch.stack(list(one.values())) for one in counted]).sum(0)
            total = total.to(self.args.device)
            if self.args.world_size > 1:
                torch.distributed.all_reduce(total)
            share = total / (len(batches) * self.args.world_size)
            self._counts = dict(zip(counted[0], share, strict=True))
        return batches, items

    def _weigh(
        self, losses: dict[str, torch.Tensor], inputs: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Each loss times its share of the optimizer step's samples or tokens, over the mean one.

        The Trainer takes the mean over micro-batches and DDP over processes, which is right for
        batches of one size; a term that is a mean over tokens wants it over all tokens.
        """
        if not self._counts:
            return losses
        own = _counts(inputs)
        terms: Any = self.recipe.terms
        return {
            name: loss
            if terms[name].couples_samples
            else loss * (own[unit] / self._counts[unit].clamp(min=1e-9)).to(loss.device)
            for name, loss in losses.items()
            for unit in (terms[name].unit,)
        }

    def _split(
        self, inputs: Mapping[str, Any], training: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What each model reads; to the teacher's, PADDED is added where it is known."""
        student, teacher = {}, {}
        for name, value in inputs.items():
            if name in (ROW, PADDED_MASKS):
                continue
            if name.startswith(TEACHER_PREFIX):
                teacher[name.removeprefix(TEACHER_PREFIX)] = value
            else:
                student[name] = value
        if teacher:
            teacher[PADDED] = self._padded(inputs, TEACHER_PREFIX)
            return student, teacher
        if not self._shared_tokens and self.recipe.needs_teacher() and training:
            raise InputError(
                "student and teacher have different vocabularies, so each must read the text "
                "itself: the data set needs the columns teacher_input_ids and "
                "teacher_attention_mask (kdfast.distill.data.tokenize with teacher_tokenizer). If "
                "the vocabularies are one and only padded differently, give both tokenizers as "
                "processing_class and teacher_processing_class"
            )
        own = {k: v for k, v in student.items() if k != "labels"}
        return student, {**own, PADDED: self._padded(inputs)}

    def _padded(self, inputs: Mapping[str, Any], prefix: str = "") -> bool | None:
        """Whether a mask leaves tokens out; None: not known."""
        padded = inputs.get(PADDED_MASKS)
        return None if padded is None else f"{prefix}attention_mask" in padded

    def _teacher_of(
        self,
        inputs: dict[str, Any],
        needs: Needs,
        rows: TeacherRows | None,
        *,
        replayed: bool = True,
    ) -> Captured:
        if self._cache is None:
            if self._graphs is None or not replayed:
                return self._run_teacher(inputs, needs)
            return self._graphs.teacher(inputs, needs)
        if rows is None:
            raise InputError(
                "teacher_cache reads a row of the training data by its number, and this batch has "
                "none: load batches with the trainer's own get_train_dataloader, or leave it out"
            )
        mask = None if inputs.get(PADDED) is False else inputs.get("attention_mask")
        return self._cache.read(rows, needs, mask, self.args.device)

    @torch.no_grad()
    def _run_teacher(self, inputs: dict[str, Any], needs: Needs) -> Captured:
        # no_grad, not inference_mode: the losses save the teacher's tensors for backward.
        # A half-precision teacher keeps its own dtype; an fp32 one shares the student's autocast.
        assert self.teacher is not None and self._teacher_capture is not None
        mixed = self.teacher.dtype == torch.float32
        with self.accelerator.autocast() if mixed else contextlib.nullcontext():
            _, captured = self._teacher_capture(
                self._known_to_teacher(inputs),
                forward=self._compiled_teacher,
                needs=needs,
                whole=self._compiled_teacher is not None,
                padded=inputs.get(PADDED),
            )
        return captured

    def _teacher_columns(self) -> list[str]:
        assert self.teacher is not None
        return list(inspect.signature(self.teacher.forward).parameters)

    def _known_to_teacher(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        # A teacher of another family may not know every input of the student's (token_type_ids).
        known = self._teacher_columns()
        return {name: value for name, value in inputs.items() if name in known}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if getattr(self, "teacher", None) is not None:
            columns: Any = self._signature_columns
            theirs = {ROW, *(TEACHER_PREFIX + name for name in self._teacher_columns())}
            columns += theirs.difference(columns)

    # The recipe's own parameters: optimised, clipped, reduced across ranks, saved and restored

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*([] if model is None else [model]))
        parameters = [p for p in self.recipe.parameters() if p.requires_grad]
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if parameters and id(parameters[0]) not in known:
            if self.lr_scheduler is not None and not self._created_lr_scheduler:
                raise InputError(
                    f"recipe '{self.recipe.name}' has parameters of its own, which cannot join an "
                    "optimizer that a scheduler was made for: give trainer.recipe.parameters() to "
                    "your optimizer, or leave the scheduler out"
                )
            optimizer.add_param_group({"params": parameters, "weight_decay": 0.0})
        if self.args.world_size > 1:
            # Random projections must start equal on every rank, as the student does.
            for tensor in (*self.recipe.parameters(), *self.recipe.buffers()):
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
            # Zeros that only DDP asked for: without a gradient the optimizer leaves a parameter be.
            stage = 0 if self._clock is None else self._clock.stage
            if stage in self._reached:
                assert self.model is not None
                for parameter in self.model.parameters():
                    if id(parameter) not in self._reached[stage]:
                        parameter.grad = None
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
        directory = output_dir if output_dir is not None else self.args.output_dir
        if self.args.should_save and directory is not None:
            self.save_recipe(directory)

    def save_recipe(self, directory: str | os.PathLike[str]) -> None:
        """Write the recipe's learned parts, which may be none.

        The metadata of the file name the recipe ("recipe"), its options as JSON ("options") and
        where its stages stand ("stage").
        """
        state = self.recipe.state_dict()
        partial = os.path.join(directory, STATE_FILE + ".partial")
        metadata = {
            "recipe": self.recipe.name,
            "options": json.dumps(self.recipe.options, default=str),
            "stage": "" if self._clock is None else self._clock.state(),
        }
        save_file({k: v.contiguous() for k, v in state.items()}, partial, metadata=metadata)
        os.replace(partial, os.path.join(directory, STATE_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.recipe.state_dict() or len(self.recipe.stages) > 1:
            path = os.path.join(resume_from_checkpoint, STATE_FILE)
            if not os.path.isfile(path):
                raise InputError(
                    f"checkpoint {resume_from_checkpoint} has no {STATE_FILE}, which holds the "
                    f"learned parts of recipe '{self.recipe.name}': it was made by another recipe"
                )
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            self._check_resumed(path, metadata)
            try:
                self.recipe.load_state_dict(load_file(path))
            except RuntimeError as error:
                raise InputError(
                    f"{path} does not fit recipe '{self.recipe.name}': {error}"
                ) from None
            self._resumed_clock = metadata.get("stage") or None

    def _check_resumed(self, path: str, metadata: Mapping[str, str]) -> None:
        """A checkpoint of other options would go on as neither of the two."""
        theirs = {"recipe": metadata.get("recipe"), **json.loads(metadata.get("options") or "{}")}
        options = json.loads(json.dumps(self.recipe.options, default=str))
        ours = {"recipe": self.recipe.name, **options}
        for key in {**theirs, **ours}:
            if theirs.get(key) != ours.get(key):
                raise InputError(
                    f"{path} is of a run with {key} {theirs.get(key)!r}, and this one has "
                    f"{ours.get(key)!r}: resume with the same, or start anew"
                )

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
        self._resumed_clock = None
        self._stepped = True
        self._check_before_training()
        fits = self._prepared is None and not resume_from_checkpoint
        if not self._cached:
            if fits:
                self._prepared = self._prepare_recipe()
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._fill_cache()
        assert self.teacher is not None
        self.teacher.to("cpu")  # type: ignore[arg-type]  # the device has better use for its memory
        try:
            if fits:
                self._prepared = self._prepare_recipe()
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.teacher.to(self.args.device)  # type: ignore[arg-type]

    def _check_before_training(self) -> None:
        """What would otherwise show after the preparation, which may be long."""
        dataset: Any = self.train_dataset
        if self._cached:
            check_indexed(dataset)
        wanting = self.recipe.needs_labels
        if wanting and isinstance(dataset, datasets.Dataset):
            names = {"labels", "label", "label_ids", *(self.label_names or ())}
            if not names & set(dataset.column_names):
                raise InputError(
                    f"{' and '.join(wanting)} of recipe '{self.recipe.name}' trains on labels, and "
                    f"train_dataset has none: its columns are {', '.join(dataset.column_names)}"
                )
        per_epoch = self._steps_per_epoch()
        total = self.args.max_steps
        if total <= 0:
            total = math.ceil(self.args.num_train_epochs * per_epoch)
        if total > 0:
            stage_steps(self.recipe.stages, total, per_epoch)

    def skip_preparation(self) -> None:
        """For a trial step on a few rows: stand-ins for what would be fitted to all of them, and no
        teacher cache."""
        for part in self.recipe.fitted.values():
            part.stand_in()
        self._prepared = []
        self._cached = False

    def _prepare_recipe(self) -> list[str]:
        """Fit what the recipe wants fitted before training; a checkpoint has it already."""
        parts = self.recipe.fitted
        if not parts:
            return []
        if self.train_dataset is None or self.teacher is None:
            raise InputError(
                f"recipe '{self.recipe.name}' fits {' and '.join(parts)} to the teacher and the "
                "training data: give teacher and train_dataset"
            )
        dataset, collate = self._training_rows()
        if self._cache is not None:
            dataset, collate = NumberedRows(dataset), RowCollator(collate, self._cache.inputs)
        needs = Needs()
        for part in parts.values():
            needs = needs | part.needs_of_teacher()

        def run_teacher(batch: dict[str, Any]) -> tuple[Captured, torch.Tensor | None]:
            inputs: Any = self._prepare_inputs(batch)
            _, own = self._split(inputs, training=True)
            # Each batch comes a few times only: no graph of it is worth its memory.
            teacher = self._teacher_of(own, needs, inputs.get(ROW), replayed=False)
            return teacher, inputs.get("labels")

        return prepare(
            parts,
            dataset,
            collate,
            run_teacher,
            teacher=self.teacher,
            precision=self._teacher_precision(),
            directory=self.args.prepared_dir,  # type: ignore[attr-defined]
            progress=not self.args.disable_tqdm and self.is_world_process_zero(),
        )

    def _training_rows(self) -> tuple[Any, Any]:
        """The training data and its collator, without the columns that no model takes."""
        dataset: Any = self.train_dataset
        collate: Any = self.data_collator
        if isinstance(dataset, datasets.Dataset):
            return self._remove_unused_columns(dataset, description="training"), collate
        return dataset, self._get_collator_with_removed_columns(collate, description="training")

    def _teacher_precision(self) -> str:
        assert self.teacher is not None
        return f"{self.teacher.dtype}, bf16 {self.args.bf16}, fp16 {self.args.fp16}"

    # The teacher's part of every step, read from disk

    def _fill_cache(self) -> None:
        dataset, collate = self._training_rows()
        assert self.teacher is not None
        inputs = TeacherInputs.of(dataset, self._teacher_columns())
        directory: Any = self.args.teacher_cache  # type: ignore[attr-defined]
        numbered, collate = NumberedRows(dataset), RowCollator(collate, inputs)
        shortest = collate(numbered.__getitems__([inputs.shortest]))
        self._cache = TeacherCache(
            directory,
            self.teacher,
            inputs,
            self._known_to_teacher(self._split(shortest, training=True)[1]),
            self._teacher_precision(),
        )

        def run(numbers: list[int], needs: Needs) -> tuple[Captured, TeacherRows]:
            batch: Any = self._prepare_inputs(collate(numbered.__getitems__(numbers)))
            _, own = self._split(batch, training=True)
            return self._run_teacher(own, needs), batch[ROW]

        needs = self.recipe.needs()[1]
        for part in self.recipe.fitted.values():
            needs = needs | part.needs_of_teacher()
        self._said_of_cache = [
            self._cache.fill(
                needs,
                run,
                progress=not self.args.disable_tqdm and self.is_world_process_zero(),
            )
        ]

    def get_train_dataloader(self) -> Any:
        own = self.train_dataset, self.data_collator
        collate: Any = self.data_collator
        loading: Any = self.args.accelerator_config
        dispatched = loading.dispatch_batches
        if dispatched is None:
            dispatched = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        if not (dispatched and self.args.world_size > 1):
            # Batches that one process hands to the others hold tensors alone.
            cut = not (
                getattr(collate, "pad_to", None) is not None
                or counting_padding(self.recipe)
                # Each width would be compiled or recorded anew.
                or self.args.torch_compile
                or self._graphs is not None
            )
            collate = PaddingCollator(collate, relevance=self._relevance, cut=cut)
        if self._cache is not None:
            rows: Any = NumberedRows(self._training_rows()[0])
            self.train_dataset = rows
            # Around the other one, so that it knows the rows as the teacher would see them.
            collate = RowCollator(collate, self._cache.inputs)
        self.data_collator = collate
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = own

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Some samplers look for lengths in a column, which a plain data set is asked for.
        if isinstance(train_dataset, NumberedRows):
            train_dataset = train_dataset.rows
        return super()._get_train_sampler(train_dataset)

    # Stages: their clock, and the learning-rate schedules that begin with them

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        stages = self.recipe.stages
        steps = stage_steps(stages, num_training_steps, self._steps_per_epoch())
        self._clock = StageClock(self.recipe, steps)
        if self._resumed_clock is not None:
            self._clock.load(self._resumed_clock)
        restarting = [stage.name for stage in stages[1:] if stage.restart]
        if not restarting:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is not None and not self._created_lr_scheduler:
            raise InputError(
                f"the learning rate begins anew with stage '{restarting[0]}' of recipe "
                f"'{self.recipe.name}', which a scheduler of your own does not know: leave it out"
            )
        schedule = self._restarting_schedule(num_training_steps)
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: schedule(step),  # a plain function, which the scheduler does not pickle
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _steps_per_epoch(self) -> int:
        """Optimizer steps; 0 for a data set without a length."""
        if not hasattr(self.train_dataset, "__len__"):
            if any(stage.epochs is not None for stage in self.recipe.stages):
                raise InputError(
                    f"stages of recipe '{self.recipe.name}' last epochs, and the data set has no "
                    "length: give them steps"
                )
            return 0
        rows = len(self.train_dataset)  # type: ignore[arg-type]
        batch = self.args.per_device_train_batch_size * self.args.world_size
        whole = math.floor if self.args.dataloader_drop_last else math.ceil
        return math.ceil(whole(rows / batch) / self.args.gradient_accumulation_steps)

    def _restarting_schedule(self, total: int) -> Callable[[int], float]:
        """The Trainer's schedule, warm-up in proportion, over each stretch between restarts."""
        shapes: dict[int, Callable[[int], float]] = {}
        warmup = self.args.get_warmup_steps(total) / total

        def factor(step: int) -> float:
            assert self._clock is not None
            began, length = self._clock.segment()
            if length not in shapes:
                one = get_scheduler(
                    self.args.lr_scheduler_type,
                    # Of the run's rate, of which some schedules take their lowest as a share.
                    optimizer=torch.optim.SGD([torch.zeros(1)], lr=self.args.learning_rate),
                    num_warmup_steps=round(warmup * length),
                    num_training_steps=length,
                    scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,  # type: ignore[arg-type]
                )
                if not hasattr(one, "lr_lambdas"):
                    raise InputError(
                        f"lr_scheduler_type '{self.args.lr_scheduler_type}' cannot begin anew with "
                        f"a stage of recipe '{self.recipe.name}': take linear, cosine or constant"
                    )
                shapes[length] = one.lr_lambdas[0]
            return shapes[length](step - began)

        return factor

    def _after_step(self, step: int) -> None:
        assert self._clock is not None
        if not self._clock.after(step, self._over_processes):
            return
        if self._graphs is not None:
            self._graphs.clear()
        scheduler: Any = self.lr_scheduler
        if self.recipe.stages[self._clock.stage].restart:
            assert self.optimizer is not None
            self.optimizer.state.clear()
            if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                # It has already moved to this step, by the schedule of the stage that is over.
                factors = [shape(scheduler.last_epoch) for shape in scheduler.lr_lambdas]
                scheduler._last_lr = [
                    base * f for base, f in zip(scheduler.base_lrs, factors, strict=True)
                ]
                groups = self.optimizer.param_groups
                for group, rate in zip(groups, scheduler._last_lr, strict=True):
                    group["lr"] = rate

    def _over_processes(self, mean: torch.Tensor) -> torch.Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(mean)
            mean = mean / self.args.world_size
        return mean

    def close(self) -> None:
        """Give both models their own attention functions back; the trainer is done."""
        if self._graphs is not None:
            self._graphs.clear()
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
            self._summed[name] = self._summed.get(name, 0) + 1

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._summed:
            for name, total in self._sums.items():
                mean = self._over_processes(total / self._summed[name])
                logs[f"loss_{name}"] = mean.item()
            self._sums.clear()
            self._summed.clear()
        super().log(logs, *args, **kwargs)


class Announcement(TrainerCallback):
    """Prints what is about to be trained; trainer.remove_callback(Announcement) for silence."""

    def __init__(self, text: Callable[[], str]) -> None:
        self.text = text

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            print(self.text(), flush=True)


class _Clockwork(TrainerCallback):
    """Turns the stages, before a checkpoint of the same step is written."""

    def __init__(self, after_step: Callable[[int], None]) -> None:
        self.after_step = after_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after_step(state.global_step)


def saved_recipe(folder: str | os.PathLike[str]) -> tuple[str | None, dict[str, Any]]:
    """Name and options of the recipe that trained a saved student; (None, {}) of other models."""
    file = Path(folder).expanduser() / STATE_FILE
    if not file.is_file():
        return None, {}
    try:
        with safe_open(file, "pt") as state:
            kept = state.metadata() or {}
    except SafetensorError as error:
        raise InputError(f"{file} cannot be read: {error}") from None
    return kept.get("recipe"), json.loads(kept.get("options") or "{}")


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
        if (
            model is not None
            and model.config.problem_type == "multi_label_classification"
            and model.config.num_labels != 1  # one is a relevance, see ModelShape.binary
        ):
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


def _counts(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """How many samples, valid tokens and labelled tokens a batch has, on its own device."""
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    ids = next(v for v in (batch.get("input_ids"), mask, labels, *batch.values()) if v is not None)
    # Filled there: a copy from the host would wait for the device.
    samples, tokens = (torch.full((), float(n), device=ids.device) for n in (len(ids), ids.numel()))
    return {
        "samples": samples,
        "tokens": tokens if mask is None else mask.sum().float(),
        "labels": samples if labels is None else (labels != -100).sum().float(),
    }


def _reached(loss: torch.Tensor) -> set[int]:
    """The ids of the parameters that get a gradient from this loss."""
    found, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found.add(id(variable))
        waiting += [parent for parent, _ in node.next_functions]
    return found


def _longest(dataset: Any, collator: Any) -> int | None:
    """Tokens of the longest batch that kdfast's and transformers' collators make of a tokenised
    data set; None of one that is not held whole."""
    if not isinstance(dataset, datasets.Dataset) or "input_ids" not in dataset.column_names:
        return None
    longest = max((len(ids) for ids in dataset["input_ids"]), default=0)
    padded = getattr(collator, "pad_to", None)
    if getattr(collator, "padding", None) == "max_length":
        tokenizer = getattr(collator, "tokenizer", None)
        own = getattr(tokenizer, "model_max_length", None)
        padded = getattr(collator, "max_length", None) or own
    # A tokenizer without a maximum has a huge one, to which transformers does not pad.
    if padded is not None and padded < LARGE_INTEGER:
        longest = max(longest, padded)
    multiple = getattr(collator, "pad_to_multiple_of", None) or 1
    return multiple * math.ceil(longest / multiple) or None


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


def _check_graphs(args: Any) -> None:
    for wrong, what in (
        (args.device.type != "cuda", f"the device is {args.device}"),
        (args.world_size > 1, f"there are {args.world_size} processes"),
        (args.torch_compile, "torch_compile is on"),
        (args.fp16, "fp16 scales losses before their gradients are made"),
    ):
        if wrong:
            raise InputError(
                f"cuda_graphs replays teacher and losses on one CUDA GPU, in float32 or bfloat16, "
                f"and {what}: leave it out"
            )


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
    if args.dataloader_pin_memory:  # else each batch would wait until it is on the device
        loading: Any = args.accelerator_config
        loading.non_blocking = True
    if args.label_smoothing_factor:
        raise InputError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no effect on a recipe's "
            "losses: set it to 0"
        )
    if args.attention_dropout is not None and not 0 <= args.attention_dropout < 1:
        raise InputError(f"attention_dropout must be in [0, 1), was {args.attention_dropout}")
