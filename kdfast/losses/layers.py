"""What every loss on layer pairs shares: pairing, learned projections, masked rows, statistics."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

Layers = torch.Tensor | Sequence[torch.Tensor]

LAYER_REDUCTIONS = ("sum", "mean")
# Padded positions are left out, or take part as in papers whose formulas have no mask.
PADDINGS = ("masked", "counted")
# What the mean of a loss runs over: `unit` of each loss module. Micro-batches that are weighted by
# how many they have of it add up to the joined batch, unless the module says `couples_samples`.
UNITS = ("samples", "tokens")


def choose(argument: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, or a ValueError that names the argument and lists what is allowed."""
    if value not in allowed:
        raise ValueError(f"{argument} must be one of {', '.join(allowed)}, was {value!r}")
    return value


def as_layers(layers: Layers) -> list[torch.Tensor]:
    return [layers] if isinstance(layers, torch.Tensor) else list(layers)


def as_pairs(student: Layers, teacher: Layers) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The layers of both, pair by pair; ValueError if their numbers differ.

    Nothing is cast: operators read a teacher of another dtype than the student's as it is.
    """
    layers_s, layers_t = as_layers(student), as_layers(teacher)
    if not layers_s or len(layers_s) != len(layers_t):
        raise ValueError(
            f"student and teacher must give the same number of layers, at least one, were "
            f"{len(layers_s)} and {len(layers_t)}"
        )
    return list(zip(layers_s, layers_t, strict=True))


def of_one_dtype(layers: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of one model: under autocast some layers may come in half precision and others not."""
    layers = list(layers)
    widest = functools.reduce(torch.promote_types, (x.dtype for x in layers))
    return [x.to(widest) for x in layers]


def over_layers(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    return losses.sum() if reduction == "sum" else losses.mean()


def statistics(x: torch.Tensor) -> torch.Tensor:
    """Half precision to fp32, where norms and means are taken; fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class LearnedProjections(nn.Module):
    """One bias-free linear map per layer pair from the student's width to the teacher's.

    Owned by the loss and trained with the student; saved apart from it. Widths left out or equal:
    the identity, without parameters.
    """

    def __init__(self, student_width: int | None, teacher_width: int | None, pairs: int) -> None:
        super().__init__()
        if (student_width is None) != (teacher_width is None):
            raise ValueError("student_width and teacher_width must be given together, or neither")
        if pairs < 1:
            raise ValueError(f"pairs must be at least 1, was {pairs}")
        self.maps = nn.ModuleList()
        if student_width is not None and teacher_width is not None:
            if min(student_width, teacher_width) < 1:
                raise ValueError(
                    f"widths must be positive, were {student_width} and {teacher_width}"
                )
            if student_width != teacher_width:
                self.maps.extend(
                    nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs)
                )

    def forward(self, layers: Layers, which: Sequence[int] | None = None) -> list[torch.Tensor]:
        """
        layers: [..., D_s], one per layer pair.
        which: the numbers of the pairs (from 0) that `layers` are of; None: all of them, in order.
        """
        students = as_layers(layers)
        if which is not None and len(which) != len(students):
            raise ValueError(f"which names {len(which)} pairs of {len(students)} student layers")
        if not self.maps:
            return students
        if which is None:
            which = range(len(self.maps))
        if len(students) != len(which):
            raise ValueError(
                f"this loss was made with pairs={len(self.maps)} projections and got "
                f"{len(students)} student layers; name the pairs they are of by `which`"
            )
        if not all(0 <= k < len(self.maps) for k in which) or len(set(which)) < len(which):
            raise ValueError(
                f"which must be different numbers from 0 to {len(self.maps) - 1}, was {list(which)}"
            )
        # The maps are fp32; a student in half precision meets the teacher in theirs.
        maps: list[Any] = [self.maps[k] for k in which]
        return [p(x.to(p.weight.dtype)) for p, x in zip(maps, students, strict=True)]


def check_widths(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"student states {list(student.shape)} and teacher states {list(teacher.shape)} must "
            "agree in batch and tokens"
        )
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student width {student.shape[-1]} and teacher width {teacher.shape[-1]} differ: give "
            "the loss student_width and teacher_width, and it learns a projection"
        )


def masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of [B, N] values over the tokens of a [B, N] mask (1 = token); 0 if there are none."""
    if mask is None:
        return values.mean()
    if mask.shape != values.shape:
        raise ValueError(f"mask {list(mask.shape)} should have shape {list(values.shape)}")
    keep = mask.bool()
    return values.masked_fill(~keep, 0).sum() / keep.sum().clamp(min=1)
