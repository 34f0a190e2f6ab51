"""Which backend serves a call.

`KERNELS` says how to load each (operator, backend) and how to ask it whether it can serve given
arguments; `AUTO` says in which order `backend="auto"` asks. A new kernel is one more row. A backend
asked for by name never falls back to another.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import reference
from kdfast.errors import BackendError
from kdfast.reference.product import without_autocast

BACKENDS = ("reference", "cpp", "triton", "cuda")

# Fastest first, by the device of the inputs, as the benchmarks measured it. The kernels in CUDA C++
# have not been measured yet: they are used when asked for by name.
AUTO: dict[str, tuple[str, ...]] = {
    "cuda": ("triton", "reference"),
    "cpu": ("cpp", "reference"),
}
AUTO_ELSEWHERE = ("reference",)

logger = logging.getLogger("kdfast")


def _any_arguments(**arguments: Any) -> str | None:
    return None


@dataclass(eq=False)
class Kernel:
    """How one backend serves one operator."""

    # Imports at first use and returns the implementation, which takes the operator's arguments by
    # name, less `backend`. What it raises is why this backend cannot serve: ImportError where
    # something is to be installed, which its text names.
    load: Callable[[], Callable[..., Any]]
    # Takes the same arguments and returns the reason it cannot serve them, or None.
    refuses: Callable[..., str | None] = _any_arguments
    _outcome: tuple[Callable[..., Any] | None, str | None] | None = field(default=None, init=False)

    def loaded(self) -> tuple[Callable[..., Any] | None, str | None]:
        """The implementation, or the reason there is none; tried once."""
        if self._outcome is None:
            try:
                self._outcome = self.load(), None
            except Exception as error:  # a broken backend must not keep auto from the others
                said = str(error) or type(error).__name__
                expected = isinstance(error, (ImportError, OSError))
                self._outcome = None, said if expected else f"{type(error).__name__}: {said}"
        return self._outcome


class Availability(NamedTuple):
    backend: str
    available: bool
    reason: str  # empty when available


def run(operator: str, backend: str, device: torch.device, /, **arguments: Any) -> Any:
    """Serve a call whose arguments are already checked."""
    if backend not in ("auto", *BACKENDS):
        allowed = ("auto", *BACKENDS)
        nearest = difflib.get_close_matches(str(backend), allowed, n=1)
        hint = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(
            f"{operator}: backend={backend!r} is unknown; {hint}"
            f"allowed: {', '.join(map(repr, allowed))}"
        )
    candidates = AUTO.get(device.type, AUTO_ELSEWHERE) if backend == "auto" else (backend,)
    for candidate in candidates:
        if _reason_against(operator, candidate, arguments) is None:
            # Reading the environment and logging are no work for a compiled graph.
            compiling = torch.compiler.is_compiling()
            if backend == "auto" and not compiling and os.environ.get("KDFAST_LOG") == "1":
                _log(f"{operator}: auto picked {candidate} for {_describe(arguments)}")
            function, _ = KERNELS[operator, candidate].loaded()
            assert function is not None
            return function(**arguments)
    reasons = {
        name: _reason_against(operator, name, arguments) or "can serve this call"
        for name in BACKENDS
    }
    lines = [f"  {name}: {reason}" for name, reason in reasons.items()]
    raise BackendError(
        f"{operator}: backend={backend!r} cannot serve this call.\n"
        + "\n".join([f"inputs: {_describe(arguments)}", *lines]),
        reasons,
    )


def explain(operator: str) -> list[Availability]:
    """Every backend of an operator: whether it can run here, and if not, why not.

    Raises: ValueError for an unknown operator.
    """
    if (operator, "reference") not in KERNELS:
        known = sorted({name for name, _ in KERNELS})
        raise ValueError(f"operator={operator!r} is unknown; known are {', '.join(known)}")
    reasons = [(backend, _reason_not_loaded(operator, backend)) for backend in BACKENDS]
    return [Availability(backend, reason is None, reason or "") for backend, reason in reasons]


def _reason_not_loaded(operator: str, backend: str) -> str | None:
    kernel = KERNELS.get((operator, backend))
    if kernel is None:
        return f"no kernel for {operator} in this version"
    return kernel.loaded()[1]


# A compiled graph takes the answer as it is when it is made, without looking inside. This is
# torch.compiler.assume_constant_result, which would import the whole compiler with kdfast.
_reason_not_loaded._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reason_against(operator: str, backend: str, arguments: dict[str, Any]) -> str | None:
    reason = _reason_not_loaded(operator, backend)
    return KERNELS[operator, backend].refuses(**arguments) if reason is None else reason


def _log(message: str) -> None:
    if not logger.hasHandlers():  # the variable alone must be enough to see the message
        logger.addHandler(logging.StreamHandler())
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    logger.info(message)


def _describe(arguments: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} {value.device}"
        if isinstance(value, Sequence) and not isinstance(value, str):
            return "[" + ", ".join(map(text, value)) + "]"
        return repr(value)

    return ", ".join(f"{name}={text(value)}" for name, value in arguments.items())


def _reference(operator: str) -> Kernel:
    """The dense implementation, made to behave at its edges as the kernels do."""
    dense: Callable[..., Any] = getattr(reference, operator)

    def served(**arguments: Any) -> Any:
        def guard(value: Any) -> Any:
            if isinstance(value, Tensor):
                return _FirstDerivative.apply(operator, value) if value.requires_grad else value
            return [guard(x) for x in value] if isinstance(value, list) else value

        # A compiled backward refuses second derivatives by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            arguments = {name: guard(value) for name, value in arguments.items()}
        first = next(iter(arguments.values()))
        device = first.device if isinstance(first, Tensor) else first[0].device
        # Autocast would take the products of the float32 statistics back to half precision.
        with without_autocast(device):
            return dense(**arguments)

    return Kernel(load=lambda: served)


def kept(ctx: Any, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors to save; those made in inference mode cannot be, and are kept beside."""
    ctx.inference = {}
    if not torch.compiler.is_compiling():
        ctx.inference = {i: x for i, x in enumerate(tensors) if x is not None and x.is_inference()}
    return [None if i in ctx.inference else x for i, x in enumerate(tensors)]


def restored(ctx: Any) -> tuple[Any, ...]:
    """What `kept` was given. One read: each unpacks anew."""
    saved: tuple[Any, ...] = ctx.saved_tensors
    return tuple(ctx.inference.get(i, x) for i, x in enumerate(saved)) if ctx.inference else saved


def keeps_graph() -> bool:
    """Whether the backward pass under way leaves its graph for another one (retain_graph=True)."""
    # Not part of PyTorch's stated interface; a copy is the safe answer without it.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def distinct(tensors: Sequence[Any]) -> list[Any]:
    """The same tensors (or None), those that come again as views."""
    return [
        x if x is None or not any(x is y for y in tensors[:i]) else x.view_as(x)
        for i, x in enumerate(tensors)
    ]


def first_derivatives(
    operator: str, gradients: Sequence[Tensor | None], inputs: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of a kernel's backward, which raise when they are differentiated again."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return list(gradients)
    return [
        None if grad is None else _NoSecondDerivative.apply(operator, grad, x)
        for grad, x in zip(gradients, inputs, strict=True)
    ]


class _FirstDerivative(torch.autograd.Function):
    """Identity on an input, whose gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, operator: str, x: Tensor) -> Tensor:
        ctx.operator = operator
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        return None, _NoSecondDerivative.apply(ctx.operator, grad, x)


class _NoSecondDerivative(torch.autograd.Function):
    """Identity on a gradient; the input it depends on ties it to the graph that must not be."""

    @staticmethod
    def forward(ctx: Any, operator: str, grad: Tensor, x: Tensor) -> Tensor:
        ctx.operator = operator
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.operator} has first derivatives only; second derivatives (double backward, "
            "create_graph=True followed by another backward) are not supported"
        )


KERNELS: dict[tuple[str, str], Kernel] = {
    ("attention_kl", "reference"): _reference("attention_kl"),
    ("attention_map_kl", "reference"): _reference("attention_map_kl"),
    ("hsic", "reference"): _reference("hsic"),
    ("cka", "reference"): _reference("cka"),
    ("cka_matrix", "reference"): _reference("cka_matrix"),
    ("gram_distance", "reference"): _reference("gram_distance"),
    ("hsic_matrix", "reference"): _reference("hsic_matrix"),
    ("procrustes_distance", "reference"): _reference("procrustes_distance"),
    ("layer_projection", "reference"): _reference("layer_projection"),
    ("layer_projection_loss", "reference"): _reference("layer_projection_loss"),
}
