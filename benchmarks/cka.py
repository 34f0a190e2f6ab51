"""`cka` and `cka_matrix` against Gram matrices as one writes them, and against the best that stock
operators do.

"eager" makes centred Gram matrices n x n of every pair, after Kornblith et al.'s demonstration;
"eager best" knows the shapes: centred features need no centred matrix, many rows none of n x n, and
a layer in many pairs one alone. Both centre features in float32, or their offsets would make
everything wrong, and multiply in the dtype of the features. For `cka_matrix`, "loop" calls "eager
best" for each pair, and "cka loop" `kdfast.cka`.

Of work, symmetric products count half, and the cheaper side is taken; bytes are of the features
read, and of the student's gradient written.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdfast import reference
from kdfast.benchmarks import harness
from kdfast.benchmarks.harness import Row, Work
from kdfast.ops import cka, cka_matrix
from kdfast.reference.cka import cheaper_side

TINY = {"B": 1, "N": 16, "d": 8}
BOTH = "forward+backward"
RBF = {"kernel": "rbf"}
MATRIX = {"call": "matrix"}
PAIRS = {"call": "pairs"}
PADDED = {"estimator": "unbiased", "mask": "padded"}


def _row(shape: tuple[int, int, int], over: str = BOTH, **more: Any) -> Row:
    sizes = dict(zip("BNd", shape, strict=True)) | more.pop("layers", {})
    return Row("cka", sizes, over=over, **more)


# Matrices of n x n at n = 4096 would take a minute in each round, and the compiler another for all
# pairs of a matrix.
LONG = ("eager", "compile")
COMPILED = ("compile", "compile best")
CPU = [
    _row((192, 128, 768), "forward"),
    _row((192, 128, 768)),
    _row((192, 128, 768), options=PADDED, without=COMPILED),
    _row((1, 32, 98304)),
    _row((6, 4096, 768), memory=True, without=LONG),
    _row((1, 1024, 384), options=MATRIX, layers={"S": 7, "T": 4}, without=("compile",)),
    _row((1, 512, 384), options=RBF, without=COMPILED),
    _row((1, 4096, 384), options=RBF, memory=True, without=("compile",)),
]
CUDA = [
    *(
        _row(shape, over, dtype="bfloat16", **more)
        for shape, more in (
            ((256, 128, 768), {"options": PAIRS, "layers": {"L": 6}}),
            ((16, 64, 98304), {}),
            ((1, 65536, 768), {"without": LONG}),
            ((1, 4096, 768), {"options": MATRIX, "layers": {"S": 12, "T": 6}, "without": LONG}),
        )
        for over in harness.PASSES
    ),
    _row((192, 128, 768)),
    _row((192, 128, 768), dtype="bfloat16", options=PADDED),
    _row((6, 4096, 768)),
    _row((1, 4096, 384), dtype="bfloat16", options=RBF),
]
ROWS = {
    "cpu": CPU,
    "cuda": CUDA,
    "quick": [
        _row((4, 24, 32), without=COMPILED),
        _row((1, 96, 16), options=MATRIX, layers={"S": 2, "T": 3}, without=COMPILED),
    ],
}


def memory(row: Row) -> tuple[float, float]:
    """Bytes of inputs and float64, and of eager's Gram matrices and centred features."""
    problems, n, d = (row.shape[key] for key in "BNd")
    many_s, many_t = (row.shape.get(key, row.shape.get("L", 1)) for key in "ST")
    layers, pairs = many_s + many_t, many_s * many_t if "S" in row.shape else many_s
    size, backward = harness.itemsize(row), row.over != "forward"
    tensor, gram = n * d, n**2
    float64 = 8 * layers * ((problems / 2 + 3) * tensor * backward + 3 * tensor + 3 * gram)
    dense = 8 * pairs * problems * (2 * tensor + (4 if backward else 2) * gram)
    return problems * tensor * (layers * size + 8) + float64, dense


class Problem:
    """Features [B, N, d]: a signal that all layers share, as strong a one that each has for itself,
    noise, and a few dimensions far from zero."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.over, self.device = row.over, device
        self.call = row.options.get("call")
        self.kernel = row.options.get("kernel", "linear")
        self.estimator = row.options.get("estimator", "biased")
        self.problems, self.n, self.d = (row.shape[key] for key in "BNd")
        if self.call == "matrix":
            many_s, many_t = (row.shape.get(key, 2) for key in "ST")
        else:
            many_s = many_t = row.shape.get("L", 2) if self.call == "pairs" else 1
        self.names_s = [f"x_s{i}" for i in range(many_s)]
        self.names_t = [f"x_t{j}" for j in range(many_t)]
        self.learned = tuple(self.names_s)

        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        signal = normal(self.problems, self.n, 16)

        def features() -> Tensor:
            x = normal(self.problems, self.n, self.d) / 2
            for source in (signal, normal(self.problems, self.n, 16)):
                x += source @ normal(16, self.d) / 4
            x[..., : math.ceil(self.d / 100)] += 30
            return x.to(getattr(torch, row.dtype))

        self.inputs = {name: features() for name in (*self.names_s, *self.names_t)}
        self.mask: Tensor | None = None
        rows = torch.full((self.problems,), self.n, device=device)
        if row.options.get("mask") == "padded":
            rows = torch.linspace(self.n // 2, self.n, self.problems, device=device).int()
            self.mask = torch.arange(self.n, device=device) < rows.unsqueeze(1)
        self.rows = rows.view(-1, 1, 1).float()

        self.shape = {
            "matrix": (self.problems, many_s, many_t),
            "pairs": (many_s, self.problems),
        }.get(self.call or "", (self.problems,))
        self.upstream: Tensor | None = None
        if row.over == "backward":
            self.upstream = torch.rand(self.shape, generator=generator, device=device)
            self.upstream /= self.upstream.numel()
        self.pairs = [(i, i) for i in range(many_s)]
        if self.call == "matrix":
            self.pairs = list(itertools.product(range(many_s), range(many_t)))
        self.side = self._side(self.pairs)
        self.work = self._work(rows)

    def _side(self, pairs: list[tuple[int, int]]) -> str:
        """The cheaper one for these pairs of a student's and a teacher's layer."""
        if self.kernel == "rbf" or self.estimator == "unbiased":
            return "gram"
        many_s = len(self.names_s)
        layers = sorted({i for i, _ in pairs} | {many_s + j for _, j in pairs})
        at = {layer: k for k, layer in enumerate(layers)}
        flat = [at[x] for i, j in pairs for x in (i, many_s + j)]
        flat += [k for k in range(len(layers)) for _ in range(2)]
        return cheaper_side(self.n, [self.d] * len(layers), flat)

    def _work(self, rows: Tensor) -> Work:
        students, teachers = len(self.names_s), len(self.names_t)
        layers, rows = students + teachers, rows.double()
        forward, backward = self.over != "backward", self.over != "forward"
        size = self.inputs[self.names_s[0]].element_size()
        read, written = layers * float(rows.sum()), students * self.problems * self.n
        if self.side == "gram":
            product = float(rows.square().sum()) * self.d
            flops = forward * layers * product + backward * students * 2 * product
        else:
            product = float(rows.sum()) * self.d**2
            flops = forward * (2 * len(self.pairs) + layers) * product
            flops += backward * 2 * (len(self.pairs) + students) * product
        halves = layers * float((rows * (rows - 1)).sum()) / 2
        return Work(
            bytes=(read + written * backward) * self.d * size,
            flops=flops,
            exponentials=halves if self.kernel == "rbf" else 0.0,
        )

    def variants(self) -> dict[str, Callable[..., Tensor]]:
        operator = "cka_matrix" if self.call == "matrix" else "cka"
        found: dict[str, Callable[..., Tensor]] = {
            f"kdfast {backend}": functools.partial(self._kdfast, backend)
            for backend in harness.backends(operator, self.device)
        }
        found["eager"], found["eager best"] = self.eager, self.eager_best
        found["compile"] = torch.compile(self.eager, dynamic=False)
        found["compile best"] = torch.compile(self.eager_best, dynamic=False)
        if self.call == "matrix":
            found["loop"] = functools.partial(self._pair_by_pair, self._best_pair)
            if self.device.type == "cuda":
                found["cka loop"] = functools.partial(self._pair_by_pair, cka)
        return found

    def _layers(self, inputs: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return [inputs[x] for x in self.names_s], [inputs[x] for x in self.names_t]

    def _reduce(self, values: Tensor) -> Tensor:
        return values if self.over == "backward" else values.mean()

    def _kdfast(self, backend: str, **inputs: Tensor) -> Tensor:
        layers_s, layers_t = self._layers(inputs)
        function: Callable[..., Tensor] = cka_matrix if self.call == "matrix" else cka
        x, y = (layers_s, layers_t) if self.call else (layers_s[0], layers_t[0])
        return self._reduce(
            function(
                x, y, mask=self.mask, kernel=self.kernel, estimator=self.estimator, backend=backend
            )
        )

    def _pair_by_pair(self, function: Callable[..., Tensor], **inputs: Tensor) -> Tensor:
        layers_s, layers_t = self._layers(inputs)
        values = [function(layers_s[i], layers_t[j]) for i, j in self.pairs]
        if self.call == "matrix":
            return self._reduce(torch.stack(values, -1).view(self.shape))
        return self._reduce(torch.stack(values).view(self.shape))

    def eager(self, **inputs: Tensor) -> Tensor:
        return self._pair_by_pair(self._eager_pair, **inputs)

    def eager_best(self, **inputs: Tensor) -> Tensor:
        if self.call != "matrix" or self.side == "feature":
            return self._pair_by_pair(self._best_pair, **inputs)
        # Each Gram matrix once, all inner products as one.
        grams_s, grams_t = (
            torch.stack([self._gram(self._centred(x)).flatten(1) for x in layers], 1)
            for layers in self._layers(inputs)
        )
        norms_s, norms_t = (torch.linalg.vector_norm(x, dim=-1) for x in (grams_s, grams_t))
        return self._reduce(grams_s @ grams_t.mT / (norms_s[:, :, None] * norms_t[:, None]))

    def _centred(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.mask is None:
            return (wide - wide.mean(-2, keepdim=True)).to(x.dtype)
        hidden = ~self.mask.unsqueeze(-1)
        mean = wide.masked_fill(hidden, 0.0).sum(-2, keepdim=True) / self.rows
        return (wide - mean).masked_fill(hidden, 0.0).to(x.dtype)

    def _gram(self, x: Tensor) -> Tensor:
        """K of centred features, up to a constant."""
        gram = (x @ x.mT).float()
        if self.kernel == "rbf":
            norms = gram.diagonal(dim1=-2, dim2=-1)
            squared = norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * gram
            variance = 2 * norms.detach().sum(-1) / (self.n - 1)
            gram = (squared / (-2 * variance[:, None, None])).exp() - math.exp(-0.5)
        if self.estimator == "unbiased":
            gram = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
        return gram

    def _eager_pair(self, x: Tensor, y: Tensor) -> Tensor:
        n = self.rows
        one, both = (n - 2, (n - 1) * (n - 2)) if self.estimator == "unbiased" else (n, n * n)

        def centred(gram: Tensor) -> Tensor:
            sums = gram.sum(-1, keepdim=True)
            gram = gram - sums / one - sums.mT / one + sums.sum(-2, keepdim=True) / both
            if self.mask is not None:
                gram = gram * self.mask.unsqueeze(-1) * self.mask.unsqueeze(-2)
            if self.estimator == "unbiased":
                gram = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
            return gram

        k, c = (centred(self._gram(self._centred(z))) for z in (x, y))
        return _ratio(*((a * b).sum((-2, -1)) for a, b in ((k, c), (k, k), (c, c))))

    def _best_pair(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = self._centred(x), self._centred(y)
        if self._side([(0, 0)]) == "feature":
            products = ((a.mT @ b).float() for a, b in ((x, y), (x, x), (y, y)))
            return _ratio(*(a.square().sum((-2, -1)) for a in products))
        k, c = self._gram(x), self._gram(y)
        return _ratio(*(self._inner(a, b) for a, b in ((k, c), (k, k), (c, c))))

    def _inner(self, k: Tensor, c: Tensor) -> Tensor:
        """Of centred matrices, from those that are not."""
        inner = (k * c).sum((-2, -1))
        if (self.kernel, self.estimator) == ("linear", "biased"):
            return inner  # its features are centred
        n = self.rows.view(-1)
        one, both = (n - 2, (n - 1) * (n - 2)) if self.estimator == "unbiased" else (n, n * n)
        sums, others = k.sum(-1), c.sum(-1)
        return inner - 2 / one * (sums * others).sum(-1) + sums.sum(-1) * others.sum(-1) / both

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The reference in float64, a problem at a time."""
        with_gradients = self.over != "forward"
        weight = self.upstream
        if weight is None:
            weight = torch.full(self.shape, 1 / math.prod(self.shape), device=self.device)
        weight = weight.double()
        values = torch.zeros_like(weight)
        gradients = [
            torch.zeros_like(self.inputs[name], dtype=torch.float64) if with_gradients else weight
            for name in self.learned
        ]
        function: Any = reference.cka_matrix if self.call == "matrix" else reference.cka
        for b in range(self.problems):
            part = slice(b, b + 1)
            layers_s, layers_t = (
                [x.detach()[part].double() for x in layers] for layers in self._layers(self.inputs)
            )
            for x in layers_s:
                x.requires_grad_(with_gradients)
            at = (slice(None), part) if self.call == "pairs" else (part,)
            found = function(
                *((layers_s, layers_t) if self.call else (layers_s[0], layers_t[0])),
                mask=None if self.mask is None else self.mask[part],
                kernel=self.kernel, estimator=self.estimator,
            )  # fmt: skip
            values[at] = found.detach()
            if with_gradients:
                made = torch.autograd.grad(found, layers_s, weight[at])
                for total, gradient in zip(gradients, made, strict=True):
                    total[part] = gradient
        return self._reduce(values), gradients


def _ratio(cross: Tensor, own_s: Tensor, own_t: Tensor) -> Tensor:
    return cross / (own_s * own_t).sqrt()
