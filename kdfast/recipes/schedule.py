"""When what is trained: weights that change over the run, and stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdfast.errors import InputError


class Weight:
    """A term's weight: a number, or points [[progress, weight], ...], linear between them.

    Progress is the share of the run that is over, 0 to 1; outside the points the weight is that of
    the nearest one. [[0, 0], [0.3, 1]] raises a weight from 0 to 1 over the first 30 % of the run.
    """

    def __init__(self, value: Any, name: str = "weight") -> None:
        points = (
            value if isinstance(value, Sequence) and not isinstance(value, str) else [[0, value]]
        )
        if not points or not all(
            isinstance(point, Sequence) and len(point) == 2 and all(map(_is_number, point))
            for point in points
        ):
            raise InputError(
                f"{name} must be a finite number or points [[progress, weight], ...], was {value!r}"
            )
        self.points = [(float(p), float(w)) for p, w in points]
        places = [p for p, _ in self.points]
        if sorted(set(places)) != places or places[0] < 0 or places[-1] > 1:
            raise InputError(
                f"the points of {name} must rise in progress, from 0 to 1 at most, were {value!r}"
            )
        if min(w for _, w in self.points) < 0:
            raise InputError(f"{name} must not be negative, was {value!r}")

    def __call__(self, progress: float) -> float:
        before, *rest = self.points
        for after in rest:
            if progress < after[0]:
                share = (progress - before[0]) / (after[0] - before[0])
                return before[1] + max(share, 0.0) * (after[1] - before[1])
            before = after
        return before[1]

    def times(self, other: Weight) -> Weight:
        """Of two weights one must be a plain number."""
        for one, many in ((self, other), (other, self)):
            if len(one.points) == 1:
                return Weight([[p, one.points[0][1] * w] for p, w in many.points])
        raise InputError("a weight with points cannot scale another one with points")

    @property
    def maximum(self) -> float:
        return max(w for _, w in self.points)

    def __str__(self) -> str:
        if len(self.points) == 1:
            return f"{self.points[0][1]:g}"
        return " → ".join(f"{w:g}" for _, w in self.points)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Threshold:
    """A stage is over when the mean of a term's loss since the last look is below `below`.

    every: optimizer steps between looks; each of them waits for the device once.
    """

    term: str
    below: float
    every: int = 20

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise InputError(f"check_every must be a number of steps above 0, was {self.every!r}")
        if not _is_number(self.below) or self.below <= 0:
            raise InputError(f"the threshold of {self.term} must be above 0, was {self.below!r}")


@dataclass(frozen=True)
class Stage:
    """A part of the training, in which some of a recipe's terms are trained.

    terms: their names. layers: the student layers whose pairs take part, None for all.
    steps, epochs, share (of the run): how long it lasts at most; without any of them the stages
    share alike what the others leave. The last stage lasts to the end of the run.
    until: what may end it sooner.
    restart: the learning-rate schedule, with its warm-up, and the optimizer's moments begin anew.
    """

    name: str
    terms: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    steps: int | None = None
    epochs: float | None = None
    share: float | None = None
    until: Threshold | None = None
    restart: bool = False

    def __post_init__(self) -> None:
        given = [x for x in (self.steps, self.epochs, self.share) if x is not None]
        if len(given) > 1:
            raise InputError(f"stage '{self.name}': give one of steps, epochs and share")
        if given and not (_is_number(given[0]) and given[0] > 0):
            raise InputError(f"stage '{self.name}' must last longer than 0, was {given[0]!r}")
        if self.steps is not None and type(self.steps) is not int:
            raise InputError(f"steps of stage '{self.name}' must be whole, was {self.steps!r}")
        if self.share is not None and self.share > 1:
            raise InputError(f"share of stage '{self.name}' must be 1 at most, was {self.share!r}")


@dataclass(frozen=True)
class Moment:
    """Where training stands: the stage, the shares of the run and of the stage that are over, and
    the student layers in training (None: all)."""

    stage: int = 0
    progress: float = 0.0
    stage_progress: float = 0.0
    layers: tuple[int, ...] | None = None
