"""The matrix product of the reference: in the dtype of its operands, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [..., m, k] @ b^T [..., k, n] with equal leading dimensions.

    Autograd would multiply in half precision where `backward` is called under autocast.
    """
    # torch.compile refuses one tensor in two places.
    result: Tensor = _Product.apply(a, b.view_as(b) if b is a else b)
    return result


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b.transpose(-1, -2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        with without_autocast(grad.device):
            grad_a = grad @ b if ctx.needs_input_grad[0] else None
            grad_b = grad.transpose(-1, -2) @ a if ctx.needs_input_grad[1] else None
        return grad_a, grad_b


def without_autocast(device: torch.device) -> Any:
    """Context in which products keep the dtype of their operands."""
    # torch.autocast refuses devices that have none, where there is nothing to switch off.
    # The question is not put to torch.compile: that of PyTorch 2.11 cannot trace it.
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    kind = device.type if known else "cpu"
    return torch.autocast(kind, enabled=False)
