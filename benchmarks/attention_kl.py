"""`attention_kl` against eager PyTorch, torch.compile of it, and stock flash attention.

The third baseline is what a careful user can compose without a kernel of their own. With
α = scale, Attn(Q, K; V) the usual attention, p its weights, and V = K_s:

    KL_row = Σ_j p_t s_t - Σ_j p_t s_s - lse_t + lse_s
           = α_t q_t · Attn(Q_t, K_t; K_t) - α_s q_s · Attn(Q_t, K_t; K_s) - lse_t + lse_s
    dQ_s   = g α_s (Attn(Q_s, K_s; K_s) - Attn(Q_t, K_t; K_s))
    dK_s   = dV of Attn(Q_s, K_s; V) - dV of Attn(Q_t, K_t; V), for the upstream gradient g α_s Q_s

so the forward is three ordinary flash forwards (the third one's log-sum-exp is needed at once, its
output in backward), and the backward two ordinary flash backwards. Nothing of size N x N is kept.
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
from kdfast.ops import attention_kl

TINY = {"B": 1, "H": 1, "N": 16, "d": 64}
# Float64 maps of the heads taken at once hold at most so many entries.
ENTRIES_AT_ONCE = 1 << 24


def _rows(shape: tuple[int, int, int], *passes: str, **more: Any) -> list[Row]:
    batch, heads, length = shape
    sizes = {"B": batch, "H": heads, "N": length, "d": 64}
    return [Row("attention_kl", sizes, over=over, **more) for over in passes]


BOTH = "forward+backward"
CPU = [
    *_rows((32, 12, 128), BOTH, memory=True),
    *_rows((8, 12, 512), BOTH, "forward", memory=True),
    *_rows((8, 12, 512), "backward"),
    *_rows((2, 12, 2048), BOTH, memory=True),
    # Small: where the CPU has no bfloat16 instructions, stock products take seconds.
    *_rows((1, 12, 512), BOTH, dtype="bfloat16"),
    *_rows((8, 12, 512), BOTH, options={"padded": True}),
    *_rows((8, 12, 512), BOTH, options={"causal": True}),
    *_rows((8, 12, 512), BOTH, options={"direction": "js"}),
]
_HALF: dict[str, Any] = {"dtype": "bfloat16"}
_LONG = ("kdfast reference", "compile")
CUDA = [
    *_rows((256, 12, 128), *harness.PASSES, **_HALF),
    *_rows((32, 12, 512), *harness.PASSES, **_HALF),
    *_rows((16, 12, 1024), BOTH, **_HALF),
    # Half of the time goes into compiling the second baseline: not for each pass of each shape.
    *_rows((16, 12, 1024), "forward", "backward", **_HALF, without=("compile",)),
    *_rows((8, 12, 2048), *harness.PASSES, **_HALF),
    *_rows((2, 12, 4096), BOTH, **_HALF, without=("kdfast reference",)),
    *_rows((2, 12, 4096), "forward", "backward", **_HALF, without=_LONG),
    *_rows((1, 12, 16384), *harness.PASSES, **_HALF, without=_LONG),
    # What eager can hold of these depends on the card; where it cannot, the results say so.
    *_rows((1, 12, 24576), "forward", **_HALF, without=_LONG),
    *_rows((1, 12, 32768), "forward", **_HALF, without=_LONG),
    *_rows((32, 12, 512), BOTH, dtype="float16"),
    *_rows((32, 12, 512), BOTH, dtype="float32"),
    *_rows((32, 12, 512), BOTH, **_HALF, options={"padded": True}),
    *_rows((8, 12, 2048), BOTH, **_HALF, options={"causal": True}),
    *_rows((32, 12, 512), BOTH, **_HALF, options={"direction": "js"}),
]
ROWS = {
    "cpu": CPU,
    "cuda": CUDA,
    "quick": _rows((2, 2, 96), "forward", BOTH, "backward", without=("compile",)),
}


def memory(row: Row) -> tuple[float, float]:
    """Bytes of inputs and float64, and of eager's maps."""
    batch, heads, length, width = row.shape.values()
    size, backward = harness.itemsize(row), row.over != "forward"
    tensor, map_ = batch * heads * length * width, heads * length**2
    at_once = min(map_, max(ENTRIES_AT_ONCE, length**2))
    float64 = 8 * (2 * tensor * backward + 4 * tensor / width + (8 if backward else 6) * at_once)
    return tensor * (4 * size + 4) + float64, (10 if backward else 5) * batch * map_ * size


class Problem:
    """Queries and keys as projections give them, [B, N, H, d] in memory seen as [B, H, N, d]."""

    learned = ("query_s", "key_s")

    def __init__(self, row: Row, device: torch.device) -> None:
        self.over, self.device = row.over, device
        self.causal = bool(row.options.get("causal"))
        self.direction = row.options.get("direction", "forward")
        batch, heads, length, width = row.shape.values()
        generator = torch.Generator(device).manual_seed(0)

        def projected() -> Tensor:
            x = torch.randn(batch, length, heads, width, generator=generator, device=device)
            return x.to(getattr(torch, row.dtype)).transpose(1, 2)

        names = ("query_s", "key_s", "query_t", "key_t")
        self.inputs = {name: projected() for name in names}
        self.scale = width**-0.5
        self.mask: Tensor | None = None  # [B, N]
        if row.options.get("padded"):  # a quarter of the length at least
            lengths = torch.linspace(length // 4, length, batch, device=device).long()
            self.mask = torch.arange(length, device=device) < lengths[:, None]
        valid = torch.ones(batch, length, device=device) if self.mask is None else self.mask
        # A row's share in the mean, as precise as `exact` needs it and as eager multiplies by it.
        share = valid.double() / (valid.sum() * heads)
        self.weight = share[:, None, :].expand(batch, heads, length)
        self.share = share[:, None, :].to(self.inputs["query_s"].dtype)
        self.upstream: Tensor | None = None
        if row.over == "backward":
            noise = torch.rand(batch, heads, length, generator=generator, device=device)
            self.upstream = noise * self.weight.float()
        self.reduction = "none" if row.over == "backward" else "mean"
        self.work = self._work(row, valid)

    def _work(self, row: Row, valid: Tensor) -> Work:
        """Two exponentials an entry; 2 products forward, 4 backward or, where all rows of scores
        stay on chip, for both together."""
        batch, heads, length, width = row.shape.values()
        visible = float((valid.sum(-1) ** 2).sum()) * heads * (0.5 if self.causal else 1)
        tensor = batch * heads * length * width * self.inputs["query_s"].element_size()
        products = 2 if row.over == "forward" else 4
        # js: softplus takes another exponential and a logarithm.
        exponentials = 4 if self.direction == "js" else 2
        return Work(
            bytes=tensor * (4 if row.over == "forward" else 6),
            flops=products * 2 * visible * width,
            exponentials=exponentials * visible,
        )

    def variants(self) -> dict[str, Callable[..., Tensor]]:
        found: dict[str, Callable[..., Any]] = {
            f"kdfast {backend}": functools.partial(
                attention_kl,
                attention_mask=self.mask,
                causal=self.causal,
                direction=self.direction,
                reduction=self.reduction,
                backend=backend,
            )
            for backend in harness.backends("attention_kl", self.device)
        }
        found["eager"] = self.eager
        found["compile"] = torch.compile(self.eager, dynamic=False)
        if self.direction == "forward" and _flash(self.device, self.inputs["query_s"], self.mask):
            found["flash"] = self.flash
        return found

    def _reduce(self, rows: Tensor) -> Tensor:
        if self.reduction == "none":
            return rows
        return rows.mean() if self.mask is None else (rows * self.share).sum()

    def eager(self, query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor) -> Tensor:
        hidden: Tensor | None = None
        if self.causal:
            length = query_s.shape[2]
            hidden = torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)
        elif self.mask is not None:
            hidden = ~self.mask[:, None, None, :]

        def log_attention(query: Tensor, key: Tensor) -> Tensor:
            scores = query @ key.mT * self.scale
            if hidden is not None:
                scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
            return F.log_softmax(scores, dim=-1)

        with torch.no_grad():
            log_t = log_attention(query_t, key_t)
        log_s = log_attention(query_s, key_s)
        if self.direction == "js":
            log_m = ((log_s.exp() + log_t.exp()) / 2).log()
            rows = sum(
                F.kl_div(log_m, side, log_target=True, reduction="none").sum(-1) / 2
                for side in (log_s, log_t)
            )
            assert isinstance(rows, Tensor)
        else:
            rows = F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1)
        return self._reduce(rows)

    def flash(self, query_s: Tensor, key_s: Tensor, query_t: Tensor, key_t: Tensor) -> Tensor:
        attend = _flash(self.device, query_s, self.mask)
        assert attend is not None
        rows: Tensor = _FlashKL.apply(
            functools.partial(attend, causal=self.causal, scale=self.scale),
            self.scale, query_s, key_s, query_t, key_t,
        )  # fmt: skip
        return self._reduce(rows)

    def exact(self) -> tuple[Tensor, list[Tensor]]:
        """The reference in float64, over as many heads at a time as memory holds."""
        with_gradients = self.over != "forward"
        weight = self.weight if self.upstream is None else self.upstream
        batch, heads, length = weight.shape
        rows = torch.zeros(batch, heads, length, dtype=torch.float64, device=self.device)
        gradients = [
            torch.zeros_like(self.inputs[name], dtype=torch.float64) if with_gradients else rows
            for name in self.learned
        ]
        step = max(1, ENTRIES_AT_ONCE // length**2)
        for b in range(batch):
            for h in range(0, heads, step):
                part = (slice(b, b + 1), slice(h, h + step))
                inputs = {name: x[part].detach().double() for name, x in self.inputs.items()}
                learned = [inputs[name].requires_grad_(with_gradients) for name in self.learned]
                found = reference.attention_kl(
                    inputs["query_s"],
                    inputs["key_s"],
                    inputs["query_t"],
                    inputs["key_t"],
                    attention_mask=None if self.mask is None else self.mask[b : b + 1],
                    causal=self.causal,
                    direction=self.direction,
                    reduction="none",
                )
                assert isinstance(found, Tensor)
                rows[part] = found.detach()
                if with_gradients:
                    upstream = weight[part].double()
                    for total, x in zip(
                        gradients, torch.autograd.grad(found, learned, upstream), strict=True
                    ):
                        total[part] = x
        result = rows if self.reduction == "none" else (rows * self.weight).sum()
        return result, gradients


class _FlashKL(torch.autograd.Function):
    """Rows [B, H, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        attend: Callable[..., Any],
        scale: float,
        query_s: Tensor,
        key_s: Tensor,
        query_t: Tensor,
        key_t: Tensor,
    ) -> Tensor:
        own, lse_t, _ = attend(query_t, key_t, key_t)
        mixed, _, back_t = attend(query_t, key_t, key_s)
        out_s, lse_s, back_s = attend(query_s, key_s, key_s)
        ctx.scale, ctx.back_s, ctx.back_t = scale, back_s, back_t
        ctx.save_for_backward(query_s, out_s, mixed)
        dot = scale * ((query_t * own).float() - (query_s * mixed).float()).sum(-1)
        return dot - lse_t + lse_s

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor | None, ...]:
        query_s, out_s, mixed = ctx.saved_tensors
        upstream = (grad_rows * ctx.scale).unsqueeze(-1).to(query_s.dtype)
        grad_out = upstream * query_s
        grad_query = upstream * (out_s - mixed)
        grad_key = ctx.back_s(grad_out) - ctx.back_t(grad_out)
        return None, None, grad_query, grad_key, None, None


def _flash(device: torch.device, query: Tensor, mask: Tensor | None) -> Callable[..., Any] | None:
    """PyTorch's attention that returns the log-sum-exp: (output, lse, upstream -> dV), or None."""
    aten = torch.ops.aten
    bias: Tensor | None = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=device)
        bias = bias.masked_fill(~mask, -torch.inf)[:, None, None, :]

    def on_cpu(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Any:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scale
        )

        def grad_value(upstream: Tensor) -> Tensor:
            gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale
            )
            return gradients[2]

        return out, lse, grad_value

    def flash(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Any:
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)
        )

        def grad_value(upstream: Tensor) -> Tensor:
            gradients = aten._scaled_dot_product_flash_attention_backward(
                upstream, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal,
                seed, offset, scale=scale,
            )  # fmt: skip
            return gradients[2]

        return out, lse, grad_value

    def efficient(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Any:
        # Its bias must be aligned to 16 bytes in rows of the full length.
        wide = None if bias is None else bias.expand(*query.shape[:3], -1)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            query, key, value, wide, True, 0.0, causal, scale=scale
        )

        def grad_value(upstream: Tensor) -> Tensor:
            gradients = aten._scaled_dot_product_efficient_attention_backward(
                upstream, query, key, value, wide, out, lse, seed, offset, 0.0,
                [True, True, True, False], causal, scale=scale,
            )  # fmt: skip
            return gradients[2]

        return out, lse[..., : query.shape[2]], grad_value

    if device.type == "cpu":
        return on_cpu
    if device.type != "cuda":
        return None
    half = query.dtype in (torch.float16, torch.bfloat16)
    return flash if half and bias is None else efficient
