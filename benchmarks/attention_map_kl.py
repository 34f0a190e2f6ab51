"""`attention_map_kl` against compositions of F.kl_div, and torch.compile of them.

The bound is bytes: of both maps read forward, and of the gradient written, also when both passes
are timed together, since a kernel could make the gradient in its forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks import harness
from kdfast.benchmarks.harness import Row, Work
from kdfast.ops import attention_map_kl

TINY = {"B": 1, "H": 1, "N": 16}


def _rows(shape: tuple[int, int, int], *passes: str, **more: Any) -> list[Row]:
    sizes = dict(zip("BHN", shape, strict=True))
    return [Row("attention_map_kl", sizes, over=over, **more) for over in passes]


BOTH = "forward+backward"
SCORES = {"inputs": "scores"}
PROBABILITIES = {"inputs": "probabilities"}
CPU = [
    *_rows((8, 12, 512), "forward", BOTH, options=PROBABILITIES),
    *_rows((8, 12, 512), "forward", options=SCORES),
    *_rows((8, 12, 512), BOTH, options=SCORES, memory=True),
    *_rows((8, 12, 512), "forward", dtype="bfloat16", options=PROBABILITIES),
]
CUDA = [
    *_rows((32, 12, 512), *harness.PASSES, dtype="bfloat16", options=PROBABILITIES),
    *_rows((32, 12, 512), *harness.PASSES, dtype="bfloat16", options=SCORES),
    *_rows((32, 12, 512), "forward", options=PROBABILITIES),
    *_rows((256, 12, 128), "forward", dtype="bfloat16", options=PROBABILITIES),
    *_rows((2, 12, 4096), "forward", dtype="bfloat16", options=PROBABILITIES),
]
ROWS = {
    "cpu": CPU,
    "cuda": CUDA,
    "quick": [
        *_rows((2, 2, 64), BOTH, options=PROBABILITIES, without=("compile",)),
        *_rows((2, 2, 64), BOTH, options=SCORES, without=("compile",)),
    ],
}


def memory(row: Row) -> tuple[float, float]:
    """Bytes of inputs and float64, and of eager's maps."""
    batch, heads, length = row.shape.values()
    size, backward = harness.itemsize(row), row.over != "forward"
    map_ = heads * length**2
    float64 = 8 * map_ * (batch * backward + (8 if backward else 6))
    return batch * map_ * (2 * size + 8) + float64, (6 if backward else 4) * batch * map_ * size


class Problem:
    """Maps [B, H, N, N] of random scores."""

    learned = ("map_s",)

    def __init__(self, row: Row, device: torch.device) -> None:
        self.over, self.device = row.over, device
        self.kind = row.options["inputs"]
        batch, heads, length = row.shape.values()
        generator = torch.Generator(device).manual_seed(0)

        def map_() -> Tensor:
            scores = torch.randn(batch, heads, length, length, generator=generator, device=device)
            values = scores if self.kind == "scores" else scores.softmax(-1)
            return values.to(getattr(torch, row.dtype))

        self.inputs = {"map_s": map_(), "map_t": map_()}
        self.reduction = "none" if row.over == "backward" else "mean"
        self.upstream: Tensor | None = None
        if row.over == "backward":
            rows = torch.rand(batch, heads, length, generator=generator, device=device)
            self.upstream = rows / rows.numel()
        entries = self.inputs["map_s"].numel()
        maps = 2 if row.over == "forward" else 3
        self.work = Work(
            bytes=maps * entries * self.inputs["map_s"].element_size(),
            flops=0.0,
            exponentials=2.0 * entries,
        )

    def variants(self) -> dict[str, Callable[..., Tensor]]:
        found: dict[str, Callable[..., Tensor]] = {
            f"kdfast {backend}": functools.partial(
                attention_map_kl, inputs=self.kind, reduction=self.reduction, backend=backend
            )
            for backend in harness.backends("attention_map_kl", self.device)
        }
        found["eager"] = self.eager
        found["compile"] = torch.compile(self.eager, dynamic=False)
        return found

    def eager(self, map_s: Tensor, map_t: Tensor) -> Tensor:
        if self.kind == "scores":
            log_s, log_t = F.log_softmax(map_s, dim=-1), F.log_softmax(map_t, dim=-1)
            rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        else:
            rows = F.kl_div(map_s.log(), map_t, reduction="none").sum(-1)
        return rows if self.reduction == "none" else rows.mean()

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The reference in float64, one batch element at a time."""
        with_gradients = self.over != "forward"
        map_s, map_t = (self.inputs[name].detach() for name in ("map_s", "map_t"))
        shape = map_s.shape[:-1]
        weight = self.upstream
        if weight is None:
            weight = torch.ones(shape, dtype=torch.float64, device=self.device) / shape.numel()
        rows = torch.empty(shape, dtype=torch.float64, device=self.device)
        gradient = torch.empty_like(map_s, dtype=torch.float64) if with_gradients else rows
        for b in range(shape[0]):
            part = map_s[b : b + 1].double().requires_grad_(with_gradients)
            found = reference.attention_map_kl(
                part, map_t[b : b + 1].double(), inputs=self.kind, reduction="none"
            )
            rows[b] = found.detach()
            if with_gradients:
                (gradient[b : b + 1],) = torch.autograd.grad(
                    found, part, weight[b : b + 1].double()
                )
        return rows if self.reduction == "none" else rows.mean(), [gradient]
