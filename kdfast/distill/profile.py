"""Where the time of a training step goes."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch

from kdfast.captured import Captured
from kdfast.distill.teacher_cache import ROW
from kdfast.distill.trainer import DistillationTrainer
from kdfast.recipes.schedule import Moment

PARTS = ("teacher", "student", "losses", "backward", "optimizer")


def step_parts(trainer: DistillationTrainer, batches: int = 6) -> dict[str, float]:
    """Median seconds of each part of an optimizer step, on the first batches of the training data;
    of several stages the mean, by their steps. Raises as profile does."""
    with torch.random.fork_rng():  # of which a loader draws a seed
        taken = list(itertools.islice(trainer.get_train_dataloader(), batches))
    steps = trainer._clock.steps if trainer._clock else [1]
    found = dict.fromkeys(PARTS, 0.0)
    for stage, length in enumerate(steps):
        for part, seconds in profile(trainer, taken, stage).items():
            found[part] += statistics.median(seconds) * length / sum(steps)
    batches_of_a_step = trainer.args.gradient_accumulation_steps
    return {
        part: seconds if part == "optimizer" else seconds * batches_of_a_step
        for part, seconds in found.items()
    }


def can_profile(trainer: DistillationTrainer) -> bool:
    """Whether gradients go through nothing that splits no backward, and there is an optimizer."""
    return trainer.optimizer is not None and trainer.args.world_size == 1 and not trainer.args.fp16


def profile(
    trainer: DistillationTrainer, batches: Iterable[dict[str, Any]], stage: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each part of a training step, by part, one entry a batch.

    teacher: its forward pass, or what is read of its cache. student: its forward pass. losses:
    forward and backward, down to the tensors that were captured from the student; backward: from
    there to the student's parameters. optimizer: clipping, step and zeroing.

    The trainer must have its optimizer, as after train(). Its steps are real ones, of `stage`
    (None: the present one); afterwards the student, the recipe's learned parts and the random state
    are what they were, the optimizer's own state is not. Raises RuntimeError unless can_profile.
    """
    if not can_profile(trainer):
        raise RuntimeError(
            "a profile is taken of a trainer with its optimizer, of one process, in float32 or "
            "bfloat16"
        )
    models = trainer.model, trainer.recipe
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in models]  # type: ignore[union-attr]
    try:
        with torch.random.fork_rng():
            return _profile(trainer, batches, stage)
    finally:
        for model, state in zip(models, before, strict=True):
            model.load_state_dict(state)  # type: ignore[union-attr]


def _profile(
    trainer: DistillationTrainer, batches: Iterable[dict[str, Any]], stage: int | None
) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {part: [] for part in PARTS}
    clock = _Clock(trainer.args.device)
    model: Any = trainer.model_wrapped
    model.train()
    for batch in batches:
        inputs: Any = trainer._prepare_inputs(batch)
        for_student, for_teacher = trainer._split(inputs, training=True)
        labels = for_student.pop("labels", None)
        at = trainer._clock.moment(trainer.state.global_step) if trainer._clock else Moment()
        at = at if stage is None else dataclasses.replace(at, stage=stage)
        own, theirs = trainer.recipe.needs(at.stage)
        clock.start()
        with trainer.compute_loss_context_manager():
            teacher = None
            if theirs:
                teacher = trainer._teacher_of(for_teacher, theirs, inputs.get(ROW))
            seconds["teacher"].append(clock.lap())
            _, student = trainer._student_capture(
                for_student,
                forward=model,
                needs=own,
                whole=trainer._runs_whole,
                padded=trainer._padded(inputs),
            )
            seconds["student"].append(clock.lap())
            learner, leaves = _cut(student)
            losses = trainer._losses(learner, teacher, labels, at)
            loss = trainer.recipe.total(losses, at)
        loss.backward()
        seconds["losses"].append(clock.lap())
        reached = [(x, leaf.grad) for x, leaf in leaves if leaf.grad is not None]
        del leaves, learner, loss, losses, student, teacher
        torch.autograd.backward([x for x, _ in reached], [grad for _, grad in reached])
        del reached
        seconds["backward"].append(clock.lap())
        learned = [*model.parameters(), *trainer.recipe.parameters()]
        trainer.accelerator.clip_grad_norm_(learned, trainer.args.max_grad_norm)
        trainer.optimizer.step()  # type: ignore[union-attr]
        model.zero_grad()
        trainer.recipe.zero_grad()
        seconds["optimizer"].append(clock.lap())
    return seconds


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        self.last = self._now()

    def lap(self) -> float:
        before, self.last = self.last, self._now()
        return self.last - before

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _cut(student: Captured) -> tuple[Captured, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The same on leaves, and each tensor of the student's graph with the leaf in its place."""
    leaves = []

    def leaf(x: torch.Tensor) -> torch.Tensor:
        if not x.requires_grad:
            return x
        leaves.append((x, x.detach().requires_grad_()))
        return leaves[-1][1]

    return student.map(leaf), leaves
