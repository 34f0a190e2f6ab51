"""`layer_projection_loss`, and `layer_projection` with a loss beside it, against stacked layers.

"eager" is what one writes: both sides stacked token by token, two batched products around a
softmax, and the objective. "eager best" knows that this is an attention of the student's layers
over the teacher's: `scaled_dot_product_attention` in half precision; in float32, where that is
slower than products, the teacher is stacked layer by layer, which copies it in one piece.
`{"call": "projection"}` compares each projected state by F.mse_loss, as one does who has another
loss in mind.

Of work, each side is read once and the student's gradient written once, whichever passes are
timed: a kernel can make the gradient in its forward. `layer_projection` also writes the projected
states, and reads their gradient.
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
from kdfast.ops import layer_projection, layer_projection_loss

TINY = {"S": 1, "T": 2, "N": 16, "d": 8}
BOTH = "forward+backward"
MSE = {"objective": "mse"}
COSINE = {"objective": "cosine"}
KL = {"objective": "kl"}
PROJECTION = {"call": "projection"}
PAIRS = {"attend": "pairs", "objective": "cosine"}
COMPILED = ("compile", "compile best")
PART = 1 << 21  # numbers of a layer that the reference takes in float64 at once


def _row(shape: tuple[int, int, int, int], options: dict[str, Any], **more: Any) -> Row:
    return Row("layer_projection", dict(zip("STNd", shape, strict=True)), options=options, **more)


STATES = (4, 12, 4096, 768)
CPU = [
    _row(STATES, MSE, over="forward"),
    _row(STATES, MSE, memory=True),
    _row(STATES, MSE, dtype="bfloat16", without=COMPILED, memory=True),
    _row(STATES, COSINE, without=COMPILED),
    _row(STATES, PROJECTION, without=COMPILED),
    _row((6, 11, 65536, 3), KL),
    _row((4, 12, 512, 8192), KL, without=COMPILED),
    _row((6, 6, 4096, 768), PAIRS),
]
WIDE = (6, 12, 32768, 768)
LOGITS = (6, 11, 1 << 20, 3)
CUDA = [
    *(_row(WIDE, MSE, over=over, dtype="bfloat16") for over in harness.PASSES),
    _row(WIDE, COSINE, dtype="bfloat16"),
    _row(WIDE, PROJECTION, dtype="bfloat16"),
    _row(WIDE, MSE),
    *(_row(LOGITS, KL, over=over, dtype="bfloat16") for over in harness.PASSES),
    _row((6, 12, 4096, 8192), KL, dtype="bfloat16"),
    *(_row((6, 6, tokens, 768), PAIRS, dtype="bfloat16") for tokens in (256, 32768)),
]
ROWS = {
    "cpu": CPU,
    "cuda": CUDA,
    "quick": [
        _row((2, 3, 64, 32), MSE, without=COMPILED),
        _row((2, 3, 64, 5), KL, over="backward", without=COMPILED),
        _row((2, 3, 64, 32), PROJECTION, without=COMPILED),
        _row((2, 2, 64, 32), PAIRS, without=COMPILED),
    ],
}


def memory(row: Row) -> tuple[float, float]:
    """Bytes of inputs and float64, and of eager's stacked layers."""
    many_s, many_t, tokens, d = (row.shape[key] for key in "STNd")
    size, backward = harness.itemsize(row), row.over != "forward"
    layer, layers = tokens * d, many_s + many_t
    at_once = 4 * layers * min(layer, max(PART, d))
    float64 = 8 * (many_s * layer * backward + at_once)
    return layer * (layers * size + 12) + float64, 3 * layers * layer * size


class Problem:
    """Layers [N, d]: a signal that all share, and as much noise; some layers are nearer than
    others, but none takes all weight."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.over, self.device = row.over, device
        self.call = row.options.get("call")
        self.objective = row.options.get("objective", "mse")
        self.attend = row.options.get("attend", "states")
        many_s, many_t, self.tokens, self.d = (row.shape[key] for key in "STNd")
        self.scale = self.d**-0.5
        self.half = row.dtype in ("bfloat16", "float16")
        self.names_s = [f"h_s{i}" for i in range(many_s)]
        self.names_t = [f"h_t{j}" for j in range(many_t)]
        self.learned = tuple(self.names_s)

        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        signal = normal(self.tokens, self.d) / 2

        def states() -> Tensor:
            return (signal + normal(self.tokens, self.d) / 2).to(getattr(torch, row.dtype))

        self.inputs = {name: states() for name in (*self.names_s, *self.names_t)}
        self.upstream: Tensor | None = None
        if row.over == "backward":
            self.upstream = torch.rand(self.tokens, many_s, generator=generator, device=device)
            self.upstream /= self.upstream.numel()
        self.work = self._work(many_s, many_t)

    def _work(self, many_s: int, many_t: int) -> Work:
        backward = self.over != "forward"
        passes = (self.over != "backward") + backward
        layers = many_s + many_t + many_s * backward
        if self.call == "projection":
            layers += many_s * passes
        exponentials = flops = many_s * many_t
        if self.attend == "pairs":
            exponentials, flops = 0, 2 * many_s  # three sums, and a gradient of two terms
        if self.objective == "kl":
            exponentials += 2 * many_s * self.d
        size = self.inputs[self.names_s[0]].element_size()
        return Work(
            bytes=float(layers * self.tokens * self.d * size),
            flops=float(passes * 4 * flops * self.tokens * self.d),
            exponentials=float(exponentials * self.tokens),
        )

    def variants(self) -> dict[str, Callable[..., Tensor]]:
        operator = "layer_projection" if self.call == "projection" else "layer_projection_loss"
        found: dict[str, Callable[..., Tensor]] = {
            f"kdfast {backend}": functools.partial(self._kdfast, backend)
            for backend in harness.backends(operator, self.device)
        }
        found["eager"], found["eager best"] = self.eager, self.eager_best
        found["compile"] = torch.compile(self.eager, dynamic=False)
        found["compile best"] = torch.compile(self.eager_best, dynamic=False)
        return found

    def _layers(self, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [inputs[x] for x in self.names_s], [inputs[x] for x in self.names_t]

    def _kdfast(self, backend: str, **inputs: Tensor) -> Tensor:
        layers_s, layers_t = self._layers(inputs)
        if self.call == "projection":
            projected, _ = layer_projection(layers_s, layers_t, scale=self.scale, backend=backend)
            losses = [F.mse_loss(h, c) for h, c in zip(layers_s, projected, strict=True)]
            return torch.stack(losses).mean()
        return layer_projection_loss(
            layers_s, layers_t, objective=self.objective, scale=self.scale, attend=self.attend,
            reduction="none" if self.over == "backward" else "mean", backend=backend,
        )  # fmt: skip

    def eager(self, **inputs: Tensor) -> Tensor:
        if self.attend == "pairs":
            pairs = zip(*self._layers(inputs), strict=True)
            losses = torch.stack([self._loss(h, g) for h, g in pairs], -1)
            return losses if self.over == "backward" else losses.mean()
        h, g = (torch.stack(layers, -2) for layers in self._layers(inputs))
        return self._loss(h, (h @ g.mT * self.scale).softmax(-1) @ g)

    def eager_best(self, **inputs: Tensor) -> Tensor:
        layers_s, layers_t = self._layers(inputs)
        h = torch.stack(layers_s, -2)
        if self.attend == "pairs":
            return self._loss(h, torch.stack(layers_t, -2))
        if self.half:
            g = torch.stack(layers_t, -2).unsqueeze(1)
            mixed = F.scaled_dot_product_attention(h.unsqueeze(1), g, g, scale=self.scale)
            return self._loss(h, mixed.squeeze(1))
        g = torch.stack(layers_t)
        weights = (torch.einsum("nsd,tnd->nst", h, g) * self.scale).softmax(-1)
        return self._loss(h, torch.einsum("nst,tnd->nsd", weights, g))

    def _loss(self, h: Tensor, projected: Tensor) -> Tensor:
        none = self.over == "backward"
        if self.objective == "mse":
            if not none:
                return F.mse_loss(h, projected)
            return F.mse_loss(h, projected, reduction="none").mean(-1)
        if self.objective == "cosine":
            rows = 1 - F.cosine_similarity(h, projected, dim=-1)
        else:
            log_s, log_t = h.log_softmax(-1), projected.log_softmax(-1)
            rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        return rows if none else rows.mean()

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The reference in float64, some tokens at a time."""
        with_gradients = self.over != "forward"
        many_s = len(self.names_s)
        weight = self.upstream
        if weight is None:
            weight = torch.ones(self.tokens, many_s, device=self.device) / (self.tokens * many_s)
        weight = weight.double()
        rows = torch.empty_like(weight)
        gradients = [
            torch.empty_like(self.inputs[name], dtype=torch.float64) if with_gradients else weight
            for name in self.learned
        ]
        step = max(1, PART // self.d)
        for start in range(0, self.tokens, step):
            part = slice(start, start + step)
            layers_s, layers_t = (
                [x.detach()[part].double() for x in layers] for layers in self._layers(self.inputs)
            )
            for x in layers_s:
                x.requires_grad_(with_gradients)
            found = reference.layer_projection_loss(
                layers_s, layers_t, objective=self.objective, scale=self.scale,
                attend=self.attend, reduction="none",
            )  # fmt: skip
            rows[part] = found.detach()
            if with_gradients:
                made = torch.autograd.grad(found, layers_s, weight[part])
                for whole, gradient in zip(gradients, made, strict=True):
                    whole[part] = gradient
        return rows if self.over == "backward" else rows.mean(), gradients
