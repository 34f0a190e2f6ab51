"""Argument checks that several operators share.

None of them looks at values on a device other than the CPU: that would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def one_of(operator: str, name: str, value: Any, allowed: Sequence[str | None]) -> None:
    if value not in allowed:
        raise ValueError(
            f"{operator}: {name} is {value!r}, should be one of {', '.join(map(repr, allowed))}"
        )


def positive(operator: str, name: str, value: Any) -> float:
    if finite(operator, name, value) <= 0:
        raise ValueError(f"{operator}: {name} is {value!r}, should be greater than 0")
    return float(value)


def finite(operator: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{operator}: {name} is a {type(value).__name__}, should be a number")
    number: Any = value
    if not -math.inf < number < math.inf:  # math.isfinite takes no symbolic number
        raise ValueError(f"{operator}: {name} is {value!r}, should be finite")
    return float(value)


def integer(operator: str, name: str, value: Any, *, at_least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{operator}: {name} is a {type(value).__name__}, should be an int")
    if value < at_least:
        raise ValueError(f"{operator}: {name} is {value}, should be at least {at_least}")
    return int(value)


def tensor_list(operator: str, name: str, value: Any) -> list[Tensor]:
    """A sequence of tensors, one per layer; its members are checked by `floating`."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{operator}: {name} is one tensor of shape {list(value.shape)}, should be a sequence "
            "of tensors, one per layer (layers are never stacked)"
        )
    if not isinstance(value, Sequence):
        raise TypeError(
            f"{operator}: {name} is a {type(value).__name__}, should be a list or tuple of tensors"
        )
    if not value:
        raise ValueError(f"{operator}: {name} is empty, should hold one tensor per layer")
    return list(value)


def floating(operator: str, named: Iterable[tuple[str, Any]]) -> list[Tensor]:
    """The tensors, when they share one floating dtype and one device.

    Under autocast, where mixed dtypes are no mistake, they are promoted to the widest.
    """
    named = list(named)
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{operator}: {name} is a {type(x).__name__}, should be a tensor")
        if x.dtype not in FLOATING:
            raise TypeError(
                f"{operator}: {name} is {_short(x.dtype)}, should be float64, float32, bfloat16 "
                "or float16"
            )
    one_device(operator, named)
    first_name, first = named[0]
    tensors = [x for _, x in named]
    if all(x.dtype == first.dtype for x in tensors):
        return tensors
    kind = first.device.type
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)
    if known and torch.is_autocast_enabled(kind):
        widest = first.dtype
        for x in tensors:
            widest = torch.promote_types(widest, x.dtype)
        return [x.to(widest) for x in tensors]
    name, x = next((name, x) for name, x in named if x.dtype != first.dtype)
    raise TypeError(
        f"{operator}: {name} is {_short(x.dtype)} but {first_name} is {_short(first.dtype)}; all "
        f"tensors should have one dtype (cast with {name}.to({first.dtype}))"
    )


def two_models(
    operator: str, student: Iterable[tuple[str, Any]], teacher: Iterable[tuple[str, Any]]
) -> list[Tensor]:
    """As `floating`, the student's and then the teacher's, which may have a dtype of their own.

    Kernels read both as they are, except float64 beside another and bfloat16 beside float16: these
    are brought to the dtype that holds both.
    """
    student, teacher = list(student), list(teacher)
    layers_s, layers_t = floating(operator, student), floating(operator, teacher)
    one_device(operator, [student[0], teacher[0]])
    own = {layers_s[0].dtype, layers_t[0].dtype}
    both = torch.promote_types(layers_s[0].dtype, layers_t[0].dtype)
    if len(own) > 1 and (both == torch.float64 or both not in own):
        return [x.to(both) for x in (*layers_s, *layers_t)]
    return [*layers_s, *layers_t]


def one_device(operator: str, named: Iterable[tuple[str, Tensor]]) -> None:
    named = iter(named)
    first_name, first = next(named)
    for name, x in named:
        if x.device != first.device:
            raise ValueError(
                f"{operator}: {name} is on {x.device} but {first_name} on {first.device}; all "
                "tensors should be on one device"
            )


def boolean_mask(
    operator: str, name: str, mask: Any, shape: Sequence[int], meaning: str, device: torch.device
) -> Tensor | None:
    """The mask as bool, when it has the given shape and is bool or holds zeros and ones.

    Where values are not looked at, what is above zero takes part: a mask made to be added to scores
    (0 for a token, -inf or -1e4 for padding) then selects nothing, rather than the padding.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{operator}: {name} is a {type(mask).__name__}, should be a tensor")
    if tuple(mask.shape) != tuple(shape):
        raise ValueError(
            f"{operator}: {name} has shape {list(mask.shape)}, should be {meaning} = {list(shape)}"
        )
    if mask.device != device:
        raise ValueError(
            f"{operator}: {name} is on {mask.device}, should be on {device} like the inputs"
        )
    if mask.dtype == torch.bool:
        return mask
    if mask.is_complex():
        raise TypeError(f"{operator}: {name} is {_short(mask.dtype)}, should be bool or 0 and 1")
    if device.type == "cpu" and not torch.compiler.is_compiling() and not _zeros_and_ones(mask):
        raise ValueError(
            f"{operator}: {name} holds values other than 0 and 1; it should be bool or 1 = takes "
            "part, 0 = masked (not a mask that is added to scores)"
        )
    return mask > 0


def no_teacher_grad(
    operator: str, named: Iterable[tuple[str, Tensor]], teacher_grad: bool | None
) -> None:
    """`teacher_grad` is None where there is no such argument."""
    for name, x in named:
        if x.requires_grad and not teacher_grad and torch.is_grad_enabled():
            remedy = f"run the teacher under torch.no_grad() or pass {name}.detach()"
            if teacher_grad is not None:
                remedy = remedy.replace(" or", ",") + ", or set teacher_grad=True"
            raise ValueError(
                f"{operator}: {name} requires grad, but the teacher gets no gradient; {remedy}"
            )


def _zeros_and_ones(mask: Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
