"""The clock of a recipe's stages: which one training is in, and how long each may last."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from kdfast.errors import InputError
from kdfast.recipes import Recipe
from kdfast.recipes.schedule import Moment, Stage


def stage_steps(stages: list[Stage], total: int, per_epoch: int) -> list[int]:
    """How many optimizer steps each stage lasts at most; the last one takes what is left.

    Raises InputError where the stages before the last leave it nothing.
    """
    asked = [
        stage.steps
        if stage.steps is not None
        else round(stage.epochs * per_epoch)
        if stage.epochs is not None
        else round(stage.share * total)
        if stage.share is not None
        else None
        for stage in stages
    ]
    if len(stages) == 1:
        return [total]
    known = sum(steps for steps in asked if steps is not None)
    open_ones = asked.count(None)
    share = (total - known) / open_ones if open_ones else 0
    steps, begun = [], 0.0
    for one in asked:
        end = begun + (share if one is None else max(1, one))
        steps.append(round(end) - round(begun))
        begun = end
    steps[-1] = total - sum(steps[:-1])
    if min(steps) < 1:
        shown = ", ".join(f"{s.name} {n}" for s, n in zip(stages, steps, strict=True))
        raise InputError(
            f"a run of {total} steps is too short for the stages of this recipe ({shown}): train "
            "for more steps, or give the stages fewer"
        )
    return steps


@dataclass
class StageClock:
    """Where training stands among the stages of `recipe`, of which `steps` are the lengths.

    A stage ends after its steps, or when the loss that its threshold names stays below it; what it
    leaves goes to the last stage. The state is exact: a resumed run takes the same turns.
    """

    recipe: Recipe
    steps: list[int]
    stage: int = 0
    began: int = 0  # the step at which the stage began
    restarted: int = 0  # the step at which the learning-rate schedule began
    count: int = 0
    sum: torch.Tensor | None = field(default=None, repr=False)

    @property
    def total(self) -> int:
        return sum(self.steps)

    def moment(self, step: int) -> Moment:
        return Moment(
            stage=self.stage,
            progress=step / self.total,
            stage_progress=(step - self.began) / self._length(),
        )

    def observe(self, losses: dict[str, torch.Tensor]) -> None:
        """Adds up, on the device, the loss that the stage's threshold looks at."""
        until = self.recipe.stages[self.stage].until
        if until is not None:
            loss = losses[until.term].detach().float()
            self.sum = loss if self.sum is None else self.sum + loss
            self.count += 1

    def after(self, step: int, mean: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        """To be called when `step` steps are done; True when a new stage begins with the next.

        mean: over the processes, so that all of them turn together.
        """
        stage = self.recipe.stages[self.stage]
        if self.stage + 1 == len(self.recipe.stages):
            return False
        over = step - self.began >= self.steps[self.stage]
        until = stage.until
        if until is not None and (step - self.began) % until.every == 0:
            assert self.sum is not None
            over |= mean(self.sum / self.count).item() < until.below
            self.sum, self.count = None, 0
        if over:
            self.stage += 1
            self.began = step
            self.sum, self.count = None, 0
            if self.recipe.stages[self.stage].restart:
                self.restarted = step
        return over

    def segment(self) -> tuple[int, int]:
        """The step at which the learning-rate schedule began, and how many steps it is for."""
        first = self.stage
        while first > 0 and not self.recipe.stages[first].restart:
            first -= 1
        last = self.stage + 1
        while last < len(self.steps) and not self.recipe.stages[last].restart:
            last += 1
        if last == len(self.steps):
            return self.restarted, self.total - self.restarted
        return self.restarted, sum(self.steps[first:last])

    def _length(self) -> int:
        """Steps of the present stage; the last one also has what thresholds saved."""
        last = self.stage + 1 == len(self.steps)
        return self.total - self.began if last else self.steps[self.stage]

    def state(self) -> str:
        """JSON; numbers are exact."""
        kept = {name: getattr(self, name) for name in ("stage", "began", "restarted", "count")}
        return json.dumps({**kept, "sum": None if self.sum is None else self.sum.item()})

    def load(self, state: str) -> None:
        values: dict[str, Any] = json.loads(state)
        total = values.pop("sum")
        for name, value in values.items():
            setattr(self, name, value)
        self.sum = None if total is None else torch.tensor(total, dtype=torch.float32)
