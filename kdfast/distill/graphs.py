"""CUDA graphs of what a step does beside the student: the teacher, and the losses with gradients.

Small batches wait for the host to launch their many short kernels. A graph is recorded once for
each set of shapes and replayed on the values of every later batch; the student's own forward and
backward pass stay outside.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from kdfast.captured import Captured, Needs
from kdfast.errors import InputError
from kdfast.recipes import Recipe
from kdfast.recipes.schedule import Moment

# Sets of shapes; each keeps its tensors until the stage is over, and more run as they are.
MOST = 32
WARM_UP = 3

Function = Callable[[list[torch.Tensor]], Any]


def record(function: Function, tensors: Sequence[torch.Tensor], pool: Any) -> tuple[Any, Any]:
    """A graph of function(tensors), and the outputs that each replay overwrites.

    The function may launch kernels on the current device and must not wait for them.
    """
    device = tensors[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # Triton compiles, libraries take their workspaces
            function(list(tensors))
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # weights that were cast before the graph are not its own,
    # Other threads may allocate meanwhile: those that load data pin memory.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs = function(list(tensors))
    torch.clear_autocast_cache()  # and those that it casts are nobody else's
    return graph, outputs


@dataclasses.dataclass
class Recorded:
    """inputs: where the graph reads what changes; outputs: where it writes; replays: so far."""

    inputs: list[torch.Tensor]
    graph: Any
    outputs: Any
    replays: int = 0


class Recordings:
    """Graphs of `what` by what decides them. They share one pool of memory: one is live at a time.

    Raises InputError where something waits for the device.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.made: dict[Hashable, Recorded] = {}
        self._pool: Any = None
        self._warned = False

    def run(
        self,
        key: Hashable,
        function: Function,
        tensors: Sequence[torch.Tensor],
        settled: Sequence[torch.Tensor] = (),
    ) -> Recorded | None:
        """What holds the outputs of function([*tensors, *settled]) until it is replayed; None where
        the shapes are too many to record.

        tensors: copied to where the graph reads them. settled: read where they are, every time.
        """
        key = (
            key,
            *((x.shape, x.stride(), x.dtype) for x in tensors),
            *((x.shape, x.stride(), x.dtype, x.data_ptr()) for x in settled),
        )
        if key not in self.made:
            if len(self.made) >= MOST:
                if not self._warned:
                    warnings.warn(
                        f"cuda_graphs: {MOST} shapes of {self.what} are recorded, others are run "
                        "as ever; pad to few lengths (DistillationCollator's pad_to)",
                        stacklevel=2,
                    )
                self._warned = True
                return None
            self.made[key] = self._record(function, tensors, settled)
        recorded = self.made[key]
        for mine, x in zip(recorded.inputs, tensors, strict=True):
            mine.copy_(x.detach())
        recorded.graph.replay()
        recorded.replays += 1
        return recorded

    def _record(
        self,
        function: Function,
        tensors: Sequence[torch.Tensor],
        settled: Sequence[torch.Tensor],
    ) -> Recorded:
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        inputs = [x.detach().clone() for x in tensors]
        try:
            graph, outputs = record(function, [*inputs, *settled], self._pool)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"cuda_graphs cannot record {self.what}, which may wait for the device within a "
                f"step: leave cuda_graphs out ({error})"
            ) from error
        return Recorded(inputs, graph, outputs)

    def clear(self) -> None:
        self.made.clear()
        self._pool = None


class Graphs:
    """A teacher and a recipe's losses, replayed.

    run_teacher: of inputs by name and of needs, by `model`. Graphs read its weights, and what the
    recipe has learned, at fixed addresses: where these change, they are recorded anew.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_teacher: Callable[[dict[str, Any], Needs], Captured],
        model: nn.Module | None,
    ) -> None:
        self._recipe = recipe
        # By where the model keeps them: to walk through it would take longer in every step.
        self._weights: list[tuple[dict[str, Any], str]] = [
            (tensors, name)
            for module in (() if model is None else model.modules())
            for tensors in (module._parameters, module._buffers)
            for name in tensors
        ]
        self._of_teacher_at: list[int] = []
        self._of_recipe_at: list[tuple[int, bool]] = []
        self._run_teacher = run_teacher
        self.of_teacher = Recordings("the teacher")
        self.of_losses = Recordings("the losses")
        # Whether the teacher's tensors of this step lie where those of its shapes always lie.
        self._settled = False
        # Losses keep tensors made of the recipe's state, which a graph would read after they went.
        recipe.register_load_state_dict_post_hook(lambda *_: self.clear())

    def clear(self) -> None:
        """Forget all graphs; what is still needed is recorded again."""
        self.of_teacher.clear()
        self.of_losses.clear()
        self._settled = False

    def teacher(self, inputs: Mapping[str, Any], needs: Needs) -> Captured:
        """What is captured of the teacher, in memory that the next batch of these shapes takes."""
        names = sorted(name for name, x in inputs.items() if isinstance(x, torch.Tensor))
        # Part of what is recorded: whether anything is padded, switches of the forward.
        rest = {name: x for name, x in inputs.items() if name not in names}
        weights = [tensors.get(name) for tensors, name in self._weights]
        addresses = [0 if x is None else x.data_ptr() for x in weights]
        if addresses != self._of_teacher_at:
            self.of_teacher.clear()
            self._of_teacher_at = addresses

        def function(tensors: list[torch.Tensor]) -> Captured:
            return self._run_teacher({**rest, **dict(zip(names, tensors, strict=True))}, needs)

        key = (needs, *sorted(rest.items()), *names)
        recorded = None
        if _hashable(key):
            recorded = self.of_teacher.run(key, function, [inputs[name] for name in names])
        self._settled = recorded is not None
        if recorded is None:
            return self._run_teacher(dict(inputs), needs)
        # Whoever releases its tensors takes them out of dictionaries of their own.
        captured: Captured = recorded.outputs.map(lambda x: x)
        return captured

    def losses(
        self,
        student: Captured,
        teacher: Captured | None,
        labels: torch.Tensor | None,
        at: Moment,
    ) -> dict[str, torch.Tensor] | None:
        """As the recipe gives them, of a teacher captured in this step; None where they cannot be
        replayed. One backward pass, before the losses of the next batch."""
        terms = self._recipe.active(at.stage)
        if not torch.is_grad_enabled() or not all(term.replayable for term in terms.values()):
            return None
        learned = [p for p in self._recipe.parameters() if p.requires_grad]
        state = (*self._recipe.parameters(), *self._recipe.buffers())
        addresses = [(x.data_ptr(), x.requires_grad) for x in state]
        if addresses != self._of_recipe_at:
            self.of_losses.clear()
            self._of_recipe_at = addresses
        masks = [x.attention_mask for x in (student, teacher) if x is not None]
        others = [x for x in (*masks, labels) if x is not None]
        own = list({id(x): x for x in student.tensors()}.values())
        theirs = [] if teacher is None else teacher.tensors()
        settled = theirs if self._settled else []
        changing = [*own, *others, *([] if self._settled else theirs)]

        def function(tensors: list[torch.Tensor]) -> tuple[list[str], list[Any], list[Any]]:
            given = dict(zip(map(id, (*changing, *settled)), tensors, strict=True))
            for x in own:
                given[id(x)] = given[id(x)].detach().requires_grad_(x.requires_grad)
            wanted = [x for x in (*(given[id(x)] for x in own), *learned) if x.requires_grad]
            with torch.enable_grad():
                losses = self._recipe(
                    _at(student, given),
                    None if teacher is None else _at(teacher, given),
                    None if labels is None else given[id(labels)],
                    at,
                )
            # Terms share the captured tensors and parameters, so no loss keeps another's graph.
            gradients = [
                torch.autograd.grad(loss, wanted, allow_unused=True)
                if loss.requires_grad
                else [None] * len(wanted)
                for loss in losses.values()
            ]
            return list(losses), [loss.detach() for loss in losses.values()], gradients

        differentiated = tuple(x.requires_grad for x in own)
        missing = (*(mask is None for mask in masks), labels is None)
        key = (at.stage, at.layers, missing, self._settled, differentiated)
        recorded = self.of_losses.run(key, function, changing, settled)
        if recorded is None:
            return None
        inputs = [x for x in (*own, *learned) if x.requires_grad]
        return dict(zip(recorded.outputs[0], _Replayed.apply(recorded, *inputs), strict=True))


def _hashable(key: Any) -> bool:
    try:
        hash(key)
    except TypeError:
        return False
    return True


def _at(captured: Captured, given: Mapping[int, torch.Tensor]) -> Captured:
    """The same with the tensors of a graph in place of its own."""
    mask = captured.attention_mask
    return dataclasses.replace(
        captured.map(lambda x: given[id(x)]),
        attention_mask=None if mask is None else given[id(mask)],
    )


class _Replayed(torch.autograd.Function):
    """Losses whose gradients the same replay has made."""

    @staticmethod
    def forward(ctx: Any, recorded: Recorded, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.recorded, ctx.replay = recorded, recorded.replays
        return tuple(loss.clone() for loss in recorded.outputs[1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.recorded.replays != ctx.replay:
            raise RuntimeError(
                "the losses of a later batch took the memory of these losses' gradients: with "
                "cuda_graphs each batch goes backward before the next one goes forward"
            )
        gradients = ctx.recorded.outputs[2]
        sums: list[torch.Tensor | None] = [None] * len(gradients[0])
        for grad, of_loss in zip(grads, gradients, strict=True):
            for i, gradient in enumerate(of_loss):
                if gradient is not None:
                    exact = torch.promote_types(gradient.dtype, torch.float32)
                    part = gradient.to(exact) * grad
                    before = sums[i]
                    sums[i] = part if before is None else before + part
        made = [
            None if x is None else x.to(of.dtype)
            for x, of in zip(sums, _first(gradients), strict=True)
        ]
        return (None, *made)


def _first(gradients: Sequence[Sequence[torch.Tensor | None]]) -> list[Any]:
    """For each input, a gradient of it."""
    return [
        next((x for x in column if x is not None), None) for column in zip(*gradients, strict=True)
    ]
