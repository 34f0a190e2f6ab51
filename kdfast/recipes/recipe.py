"""A recipe: weighted losses on a layer map, in stages, and what they read of both models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from kdfast.captured import Captured, Needs
from kdfast.errors import InputError, nearest
from kdfast.recipes.layer_map import LayerMap
from kdfast.recipes.schedule import Moment, Stage, Weight


class Term(nn.Module):
    """One weighted loss of a recipe, with the learned parts that its loss owns.

    token_aligned: compares token i of one model with token i of the other, so both must see the
    same token ids. unit: what its mean runs over, "samples", valid "tokens" or "labels"; micro-
    batches are weighted by their number of them. couples_samples: the loss of a batch is no mean of
    its samples' losses, so the batch must be seen whole. needs_labels: it cannot do without labels.
    layers: the student layers that it trains, if it is made of layer pairs; by_layer: its loss is
    the sum of those of its layers. replayable: it is the same sequence of operations at every step,
    which none of them waits for. describe: what the table at the start shows of it.
    """

    needs_labels = False
    token_aligned = False
    unit = "samples"
    couples_samples = False
    layers: tuple[int, ...] = ()
    by_layer = False
    replayable = True

    def __init__(self, weight: Any, describe: str) -> None:
        super().__init__()
        self.weight = Weight(weight)
        self.describe = describe

    def needs(self, layers: Sequence[int] | None = None) -> tuple[Needs, Needs]:
        """What it reads of the student and of the teacher while these student layers are trained
        (None: all); of the teacher nothing for a loss on labels alone. Here: the logits."""
        return Needs(logits=True), Needs(logits=True)

    def forward(
        self, student: Captured, teacher: Captured, labels: torch.Tensor | None, at: Moment
    ) -> torch.Tensor:
        """The unweighted loss, a scalar, at this moment of the training."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Call:
    """A term for some student layers (None: all). later: what is read of the teacher afterwards."""

    term: str
    layers: tuple[int, ...] | None
    later: Needs


class Fitted(nn.Module):
    """A learned part that is fitted to the frozen teacher on the training data, before training.

    passes: how often it reads the training data, in one fixed order; all parts of a recipe read it
    together. least_rows: how many it wants, by the option `limited_by`; needs_labels: with labels.
    has_enough: nothing more of the pass will change it. what: its name for people. What it learns
    are buffers or parameters, saved with the recipe and kept for other runs.
    """

    what = "a learned part"
    passes = 1
    least_rows = 1
    limited_by = ""
    needs_labels = False
    has_enough = False

    def needs_of_teacher(self) -> Needs:
        """What it reads of the teacher."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What decides the result, beside teacher and data; JSON."""
        raise NotImplementedError

    def begin(self) -> None:
        """Forget what an interrupted fit saw."""

    def see(self, teacher: Captured, labels: torch.Tensor | None) -> None:
        """A batch of the pass that is under way."""
        raise NotImplementedError

    def end_pass(self) -> None:
        """After the last of `passes` calls it is fitted."""
        raise NotImplementedError

    @torch.no_grad()
    def fit(self, batches: Callable[[], Iterable[tuple[Captured, torch.Tensor | None]]]) -> None:
        """batches: called once a pass; all of the data in one fixed order, teacher and labels."""
        self.begin()
        for _ in range(self.passes):
            for teacher, labels in batches():
                self.see(teacher, labels)
                if self.has_enough:
                    break
            self.end_pass()

    def fitted_state(self) -> dict[str, torch.Tensor]:
        """What was fitted, for `load_fitted` of a later run."""
        return self.state_dict()

    def load_fitted(self, state: dict[str, torch.Tensor]) -> None:
        self.load_state_dict(state)

    def stand_in(self) -> None:
        """Something of the right shape in place of a fit, for a step that only tries the losses."""


class Recipe(nn.Module):
    """Named terms and stages; `forward` gives each active term's loss, `total` their weighted sum.

    Terms of weight 0 are left out, so that nothing is captured or computed for them. Parameters of
    the recipe (projections, pseudo classifiers, memories) are trained with the student and saved
    apart. Without stages all terms are trained all the time.
    """

    def __init__(
        self,
        name: str,
        terms: dict[str, Term],
        layers: LayerMap = (),
        *,
        stages: Sequence[Stage] = (),
        notes: Sequence[str] = (),
    ) -> None:
        super().__init__()
        kept = {key: term for key, term in terms.items() if term.weight.maximum > 0}
        if not kept:
            raise InputError(f"every weight of recipe '{name}' is 0: nothing would be trained")
        self.name = name
        self.options: dict[str, Any] = {}
        self.terms = nn.ModuleDict(kept)
        self.layers = layers
        self.notes = list(notes)
        self.stages = _stages(name, stages, terms, kept)
        self.token_aligned = [key for key, term in kept.items() if term.token_aligned]
        self._plans: dict[tuple[int, bool], list[Call]] = {}

    @property
    def fitted(self) -> dict[str, Fitted]:
        """The parts that need a pass over the training data first, by name."""
        return {
            name.removeprefix("terms."): module
            for name, module in self.named_modules()
            if isinstance(module, Fitted)
        }

    @property
    def needs_labels(self) -> list[str]:
        """The terms and fitted parts that cannot do without labels."""
        parts: Any = {**self.terms, **self.fitted}
        return [name for name, part in parts.items() if part.needs_labels]

    def active(self, stage: int = 0) -> dict[str, Term]:
        return {name: self.terms[name] for name in self.stages[stage].terms}  # type: ignore[misc]

    def needs(self, stage: int | None = None) -> tuple[Needs, Needs]:
        """What a stage reads of the student and of the teacher; None: the whole training."""
        own, theirs = Needs(), Needs()
        for k in range(len(self.stages)) if stage is None else (stage,):
            for term in self.active(k).values():
                student, teacher = term.needs(self.stages[k].layers)
                own, theirs = own | student, theirs | teacher
        return own, theirs

    def needs_teacher(self, stage: int | None = None) -> bool:
        """Whether a stage has anything to learn from a teacher; None: any."""
        return bool(self.needs(stage)[1])

    def forward(
        self,
        student: Captured,
        teacher: Captured | None,
        labels: torch.Tensor | None,
        at: Moment | None = None,
        *,
        release: bool = False,
    ) -> dict[str, torch.Tensor]:
        """release: tensors are taken out of `teacher` once no further loss reads them. On a CPU,
        which needs no launches of many layers, losses are then taken layer by layer, so that the
        teacher's tensors go as the gradients come."""
        at = at or Moment()
        at = dataclasses.replace(at, layers=self.stages[at.stage].layers)
        if teacher is None:
            if self.needs_teacher(at.stage):
                raise ValueError(f"recipe '{self.name}' needs a teacher, got None")
            teacher = Captured(logits=None)
        losses: dict[str, torch.Tensor] = {}
        for call in self._plan(at.stage, release and student.device.type == "cpu"):
            now = dataclasses.replace(at, layers=call.layers)
            loss = self.terms[call.term](student, teacher, labels, now)
            losses[call.term] = losses[call.term] + loss if call.term in losses else loss
            if release:
                teacher.release(call.later)
        return {name: losses[name] for name in self.active(at.stage)}

    def _plan(self, stage: int, by_layer: bool) -> list[Call]:
        if (stage, by_layer) not in self._plans:
            layers, active = self.stages[stage].layers, self.active(stage)
            calls: list[tuple[str, tuple[int, ...] | None]] = []
            apart: list[tuple[int, str]] = []
            for name, term in active.items():
                if by_layer and term.by_layer:
                    apart += [(i, name) for i in set(term.layers) if layers is None or i in layers]
                else:
                    calls.append((name, layers))
            # In the order of the layers, and of the terms within one.
            calls += [(name, (i,)) for i, name in sorted(apart, key=lambda pair: pair[0])]
            later = Needs()
            plan = []
            for name, of in reversed(calls):
                plan.append(Call(name, of, later))
                later = later | active[name].needs(of)[1]
            self._plans[stage, by_layer] = plan[::-1]
        return self._plans[stage, by_layer]

    def total(self, losses: dict[str, torch.Tensor], at: Moment | None = None) -> torch.Tensor:
        progress = 0.0 if at is None else at.progress
        terms: Any = self.terms
        return torch.stack(
            [terms[name].weight(progress) * loss.float() for name, loss in losses.items()]
        ).sum()

    def table(self, steps: Sequence[int] | None = None) -> str:
        """The recipe as aligned text: terms, layer map and stages (with their numbers of steps)."""
        terms: Any = self.terms
        blocks = [
            [("term", "weight", "compares")]
            + [(name, str(term.weight), str(term.describe)) for name, term in terms.items()]
        ]
        # Terms with equal maps share a row; where they differ, each says whose it is.
        maps: dict[LayerMap, list[str]] = {}
        for name, term in terms.items():
            if pairs := getattr(term, "pairs", ()):
                maps.setdefault(tuple(pairs), []).append(name)
        for pairs, names in (maps or ({self.layers: []} if self.layers else {})).items():
            students, teachers = zip(*pairs, strict=True)
            whose = f"{', '.join(names)}: " if len(maps) > 1 else ""
            blocks.append(
                [
                    (f"{whose}student layer", *map(str, students)),
                    ("teacher layer".rjust(len(whose) + 13), *map(str, teachers)),
                ]
            )
        if len(self.stages) > 1:
            lasts = [""] * len(self.stages) if steps is None else [f"≤ {n}" for n in steps]
            blocks.append(
                [("stage", "steps", "trains")]
                + [
                    (stage.name, last, ", ".join(stage.terms) + _of_layers(stage))
                    for stage, last in zip(self.stages, lasts, strict=True)
                ]
            )
        lines = [f"recipe {self.name}"]
        for rows in blocks:
            widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
            lines += [
                "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
                for row in rows
            ]
        coupled = [name for name, term in terms.items() if term.couples_samples]
        if coupled:
            lines.append(
                f"  {', '.join(coupled)}: couples the samples of a batch, so accumulated small "
                "batches are not the large one"
            )
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _of_layers(stage: Stage) -> str:
    if stage.layers is None:
        return ""
    which = ", ".join(map(str, stage.layers))
    return f" of student layer{'s' if len(stage.layers) > 1 else ''} {which}"


def has_pair(term: Term, stage: Stage) -> bool:
    """Whether a term made of layer pairs has one in the layers of this stage."""
    return stage.layers is None or not term.layers or bool(set(term.layers) & set(stage.layers))


def _stages(
    recipe: str, stages: Sequence[Stage], terms: dict[str, Term], kept: dict[str, Term]
) -> list[Stage]:
    """The stages without terms of weight 0 or of other layers, and without those left empty."""
    found = []
    for stage in stages:
        for name in stage.terms:
            if name not in terms:
                raise InputError(
                    f"stage '{stage.name}' of recipe '{recipe}' names the loss '{name}', which it "
                    f"has not{nearest(name, terms)}: it has {', '.join(terms)}"
                )
        active = tuple(name for name in stage.terms if name in kept and has_pair(kept[name], stage))
        if active:
            found.append(dataclasses.replace(stage, terms=active))
    if stages and not found:
        raise InputError(f"no stage of recipe '{recipe}' trains anything")
    idle = set(kept) - {name for stage in found for name in stage.terms}
    if found and idle:
        raise InputError(
            f"{', '.join(sorted(idle))} of recipe '{recipe}' has a weight and is in no stage"
        )
    for stage in found:
        if stage.until is not None and stage.until.term not in stage.terms:
            raise InputError(
                f"stage '{stage.name}' of recipe '{recipe}' ends by the loss '{stage.until.term}', "
                f"which it does not train: it trains {', '.join(stage.terms)}"
            )
    return found or [Stage("all", tuple(kept))]
