"""`attention_kl`: KL divergence between two attentions, straight from queries and keys."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import arguments, dispatch, library

DIRECTIONS = ("forward", "reverse", "js")
REDUCTIONS = ("mean", "sum", "none")


def attention_kl(
    query_s: Tensor | Sequence[Tensor],
    key_s: Tensor | Sequence[Tensor],
    query_t: Tensor | Sequence[Tensor],
    key_t: Tensor | Sequence[Tensor],
    *,
    attention_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    scale_s: float | Sequence[float] | None = None,
    scale_t: float | Sequence[float] | None = None,
    temperature: float = 1.0,
    direction: str = "forward",
    reduction: str = "mean",
    relation_heads: int | None = None,
    match_heads: str | None = None,
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor | list[Tensor]:
    """Divergence of the student's attention maps from the teacher's, from queries and keys.

    With p = softmax(scale Q Kᵀ / temperature) of each side and lse its log-sum-exp, a row's forward
    divergence is Σ_j p_t (log p_t - log p_s). There is no hidden factor (no temperature²). A row
    is +inf where the teacher has mass on a key on which the student has exactly none.

    A row takes part when its query is valid and it sees at least one key; other rows are 0, get no
    gradient, and do not count in the mean. NaN in a row that takes part gives NaN.

    Args:
        query_s: [B, H, Nq, d_s], or [total, H, d_s] with `cu_seqlens`; the student's queries.
            Each of the four arguments may also be a sequence of such tensors, one per layer pair;
            B, Nq and Nk are then shared, heads and widths may differ between pairs.
        key_s: [B, H_kv, Nk, d_s]; query head h uses key head h // (H / H_kv).
        query_t: [B, H_t, Nq, d_t]; the teacher's queries. d_t may differ from d_s, and the
            teacher's dtype from the student's.
        key_t: [B, H_kv_t, Nk, d_t].
        attention_mask: [B, Nk], bool or 0/1, 1 = token. Padded keys get no probability; with
            Nq = Nk padded queries leave the mean as well, unless `query_mask` says otherwise.
            Not with `cu_seqlens`.
        query_mask: [B, Nq] ([total] with `cu_seqlens`), bool or 0/1: the queries that take part.
        causal: key j is seen by query i when j <= i + Nk - Nq (aligned at the bottom right).
        window: keeps |i + Nk - Nq - j| <= window (symmetric, 0 = the diagonal alone); combines
            with `causal`. None: no window.
        cu_seqlens: [sequences + 1] int32 or int64, starts of packed sequences and their total.
            Tokens after the last boundary are padding.
        scale_s, scale_t: factor of the scores, or one per layer pair. None: (width of a head)^-½.
        temperature: divides the scores of both sides, > 0.
        direction: "forward" KL(t‖s), "reverse" KL(s‖t), or "js" = (KL(t‖m) + KL(s‖m)) / 2 with
            m = (p_s + p_t) / 2. In nats.
        reduction: "mean" over rows that take part, of all heads and the batch; "sum" over them;
            "none", per row [B, H, Nq] ([H, total] with `cu_seqlens`).
        relation_heads: R of MiniLMv2: key heads are expanded, the heads of each side concatenated
            and cut into R heads of width H d / R, so that H_s and H_t need not agree. The default
            scale is then (H d / R)^-½.
        match_heads: "mean" compares every student head with the average of the teacher's maps.
            None: H_s and H_t agree.
        teacher_grad: give the teacher gradients too. By default a teacher that requires grad is
            refused.
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda". The reference keeps whole maps:
            its memory grows with H Nq Nk, with `cu_seqlens` with H total².

    Returns:
        A scalar for "mean" and "sum" (0 when no row takes part), rows for "none". For sequences a
        vector [pairs] for "mean" and "sum" and always a list of row tensors for "none". float32,
        float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.
            torch.func transforms and batched backwards (`is_grads_batched`) are not supported.

    Source:
        Aguilar et al., "Knowledge Distillation from Internal Representations", AAAI 2020 (the KL
        term on attention maps); Wang et al., "MiniLM", NeurIPS 2020, eq. 4, and "MiniLMv2",
        Findings of ACL 2021 (relation heads).
    """
    op = "attention_kl"
    arguments.one_of(op, "direction", direction, DIRECTIONS)
    arguments.one_of(op, "reduction", reduction, REDUCTIONS)
    arguments.one_of(op, "match_heads", match_heads, (None, "mean"))
    temperature = arguments.positive(op, "temperature", temperature)
    if window is not None:
        window = arguments.integer(op, "window", window, at_least=0)
    if relation_heads is not None:
        relation_heads = arguments.integer(op, "relation_heads", relation_heads, at_least=1)
        if match_heads is not None:
            raise ValueError(
                f"{op}: match_heads is {match_heads!r} beside relation_heads={relation_heads}, "
                "should be None: relation heads agree in number already"
            )

    named: dict[str, Any] = {"query_s": query_s, "key_s": key_s, "query_t": query_t, "key_t": key_t}
    paired = isinstance(query_s, (list, tuple))
    pairs = 1
    if paired:
        layers = {name: arguments.tensor_list(op, name, value) for name, value in named.items()}
        pairs = len(layers["query_s"])
        for name, value in layers.items():
            if len(value) != pairs:
                raise ValueError(
                    f"{op}: {name} has {len(value)} tensors but query_s has {pairs}; each should "
                    "have one per layer pair"
                )
        labelled = [
            (f"{name}[{index}]", x)
            for name, value in layers.items()
            for index, x in enumerate(value)
        ]
    else:
        for name, value in named.items():
            if isinstance(value, (list, tuple)):
                raise TypeError(
                    f"{op}: {name} is a {type(value).__name__} but query_s is one tensor; pass "
                    "four tensors or four sequences"
                )
        labelled = list(named.items())

    tensors = arguments.two_models(op, labelled[: 2 * pairs], labelled[2 * pairs :])
    labels = [label for label, _ in labelled]
    # Ordered by argument, so the tensors of pair i are every `pairs`-th one from i.
    for pair in range(pairs):
        _check_pair(
            op,
            dict(zip(labels[pair::pairs], tensors[pair::pairs], strict=True)),
            packed=cu_seqlens is not None,
            relation_heads=relation_heads,
            match_heads=match_heads,
        )
    queries_s, keys_s, queries_t, keys_t = (
        tensors[side * pairs : (side + 1) * pairs] for side in range(4)
    )
    for pair in range(1, pairs):
        for name, first, other in (
            ("query_s", queries_s[0], queries_s[pair]),
            ("key_s", keys_s[0], keys_s[pair]),
        ):
            if _batch_and_length(first) != _batch_and_length(other):
                raise ValueError(
                    f"{op}: {name}[{pair}] has shape {list(other.shape)} but {name}[0] "
                    f"{list(first.shape)}; layer pairs should share batch and length"
                )
    arguments.no_teacher_grad(
        op, list(zip(labels, tensors, strict=True))[2 * pairs :], teacher_grad
    )

    device = queries_s[0].device
    if cu_seqlens is None:
        batch, _, queries, _ = queries_s[0].shape
        keys = keys_s[0].shape[2]
        attention_mask = arguments.boolean_mask(
            op, "attention_mask", attention_mask, (batch, keys), "[B, Nk]", device
        )
        query_mask = arguments.boolean_mask(
            op, "query_mask", query_mask, (batch, queries), "[B, Nq]", device
        )
    else:
        if attention_mask is not None:
            raise ValueError(
                f"{op}: attention_mask is given beside cu_seqlens, should be None: packed "
                "sequences hold no padding (query_mask [total] selects queries)"
            )
        total = queries_s[0].shape[0]
        query_mask = arguments.boolean_mask(
            op, "query_mask", query_mask, (total,), "[total]", device
        )
        _check_cu_seqlens(op, cu_seqlens, total, device)

    divergence: Tensor | list[Tensor] = dispatch.run(
        op,
        backend,
        device,
        query_s=queries_s if paired else queries_s[0],
        key_s=keys_s if paired else keys_s[0],
        query_t=queries_t if paired else queries_t[0],
        key_t=keys_t if paired else keys_t[0],
        attention_mask=attention_mask,
        query_mask=query_mask,
        causal=bool(causal),
        window=window,
        cu_seqlens=cu_seqlens,
        scale_s=_check_scale(op, "scale_s", scale_s, pairs if paired else None),
        scale_t=_check_scale(op, "scale_t", scale_t, pairs if paired else None),
        temperature=temperature,
        direction=direction,
        reduction=reduction,
        relation_heads=relation_heads,
        match_heads=match_heads,
        teacher_grad=bool(teacher_grad),
    )
    return divergence


def _check_pair(
    op: str,
    named: dict[str, Tensor],
    *,
    packed: bool,
    relation_heads: int | None,
    match_heads: str | None,
) -> None:
    """Shapes of one layer pair; `named` holds query_s, key_s, query_t, key_t in this order."""
    layout = "[total, H, d] (packed by cu_seqlens)" if packed else "[B, H, N, d]"
    for name, x in named.items():
        if x.dim() != (3 if packed else 4):
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)} ({x.dim()} dimensions), should be {layout}"
            )
        sizes = x.shape[1:]  # the batch, or the packed total, may be empty
        if 0 in sizes:
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)}; heads, length and width should be "
                f"at least 1 ({layout})"
            )
    (name_qs, query_s), (name_ks, key_s), (name_qt, query_t), (name_kt, key_t) = named.items()

    for (name_q, query), (name_k, key) in (
        ((name_qs, query_s), (name_ks, key_s)),
        ((name_qt, query_t), (name_kt, key_t)),
    ):
        heads, key_heads = query.shape[1], key.shape[1]
        if query.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"{op}: {name_k} has width {key.shape[-1]} but {name_q} {query.shape[-1]}; queries "
                "and keys of one model should have one width"
            )
        if heads % key_heads:
            raise ValueError(
                f"{op}: {name_q} has {heads} heads but {name_k} {key_heads}; the query heads "
                "should be a multiple of the key heads"
            )
        if query.shape[0] != key.shape[0]:
            raise ValueError(
                f"{op}: {name_k} has shape {list(key.shape)} but {name_q} {list(query.shape)}; "
                f"{'the packed total' if packed else 'the batch'} should agree"
            )
        if relation_heads is not None and heads * query.shape[-1] % relation_heads:
            raise ValueError(
                f"{op}: relation_heads is {relation_heads}, should divide the {heads} x "
                f"{query.shape[-1]} = {heads * query.shape[-1]} features of {name_q}"
            )

    for (name_a, a), (name_b, b) in (
        ((name_qs, query_s), (name_qt, query_t)),
        ((name_ks, key_s), (name_kt, key_t)),
    ):
        if _batch_and_length(a) != _batch_and_length(b):
            raise ValueError(
                f"{op}: {name_b} has shape {list(b.shape)} but {name_a} {list(a.shape)}; batch and "
                f"length of teacher and student should agree ({layout})"
            )
    heads_s, heads_t = query_s.shape[1], query_t.shape[1]
    if heads_s != heads_t and relation_heads is None and match_heads is None:
        raise ValueError(
            f"{op}: {name_qt} has {heads_t} heads but {name_qs} {heads_s}; pass relation_heads=R "
            "to regroup both sides into R heads, or match_heads='mean' to compare with the "
            "teacher's average map"
        )


def _batch_and_length(x: Tensor) -> tuple[int, ...]:
    return (x.shape[0],) if x.dim() == 3 else (x.shape[0], x.shape[2])


def _check_cu_seqlens(op: str, cu_seqlens: Any, total: int, device: torch.device) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{op}: cu_seqlens is {kind}, should be an int32 or int64 tensor")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"{op}: cu_seqlens has shape {list(cu_seqlens.shape)}, should be [sequences + 1]"
        )
    if cu_seqlens.device != device:
        raise ValueError(
            f"{op}: cu_seqlens is on {cu_seqlens.device}, should be on {device} like the inputs"
        )
    if device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends != sorted(ends) or ends[-1] > total:
            raise ValueError(
                f"{op}: cu_seqlens is {ends}, should start at 0, never decrease, and end at or "
                f"before the packed total {total}"
            )


def _check_scale(op: str, name: str, scale: Any, pairs: int | None) -> float | list[float] | None:
    if scale is None:
        return None
    if not isinstance(scale, (list, tuple)):
        return arguments.finite(op, name, scale)
    if pairs is None:
        raise TypeError(f"{op}: {name} is a {type(scale).__name__}, should be a number or None")
    if len(scale) != pairs:
        raise ValueError(f"{op}: {name} has {len(scale)} numbers, should have {pairs}, one a pair")
    return [arguments.finite(op, f"{name}[{i}]", value) for i, value in enumerate(scale)]


# The kernels. They see [B, H, N, d] tensors of any strides with a dense last dimension (packed
# sequences as one batch element), masks that are bool, scales that include the temperature, and a
# query mask that already says which rows padding takes out. All of the teacher's tensors have one
# dtype, and all of the student's; one may be float32 and the other of 16 bits (cuda: never). Over P
# pairs, with heads concatenated:
#
#   forward   -> rows [B, sum H, Nq], inner, lse_s [B, sum H, Nq], lse_t [B, sum H_t, Nq]; float32
#                (float64 for float64). inner is KL(s || m) per row for "js", else empty. A row that
#                takes no part has rows = inner = 0 and lse_s = +inf.
#   backward  from these statistics, or what it makes anew:
#             grad_rows [B, sum H, Nq], of any strides -> the gradients of all student queries, and
#                of all student keys, one after the other in one flat tensor of the student's dtype,
#                each [B, H, N, d], or [B, N, H, d] with tokens_first.
#   fused     (cpp and triton) for "mean" and "sum": losses [P] and both gradients, for an upstream
#                gradient of 1, laid out as those of backward, in float32 (float64).

_INPUTS = (
    "Tensor[] query_s, Tensor[] key_s, Tensor[] query_t, Tensor[] key_t, Tensor? attention_mask, "
    "Tensor? query_mask, Tensor? cu_seqlens, float[] scale_s, float[] scale_t, bool causal, "
    "int? window, bool mean_heads, str direction"
)


def _statistics(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _fake_forward(query_s: list[Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    query_t, direction = inputs[1], inputs[-1]
    batch, _, queries, _ = query_s[0].shape
    dtype = _statistics(query_s[0])
    rows, lse_s, inner = (
        query_s[0].new_empty((batch, sum(x.shape[1] for x in query_s), queries), dtype=dtype)
        for _ in range(3)
    )
    if direction != "js":
        inner = query_s[0].new_empty((0,), dtype=dtype)
    heads_t = sum(x.shape[1] for x in query_t)
    return rows, inner, lse_s, query_s[0].new_empty((batch, heads_t, queries), dtype=dtype)


def _fake_gradients(
    query_s: list[Tensor], key_s: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    grad_query, grad_key = (
        query_s[0].new_empty((sum(x.numel() for x in side),), dtype=dtype)
        for side in (query_s, key_s)
    )
    return grad_query, grad_key


def _fake_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    query_s, key_s = inputs[5:7]
    return _fake_gradients(query_s, key_s, query_s[0].dtype)


def _fake_fused(query_s: list[Tensor], key_s: list[Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    dtype = _statistics(query_s[0])
    losses = query_s[0].new_empty((len(query_s),), dtype=dtype)
    return losses, *_fake_gradients(query_s, key_s, dtype)


_FORWARD = library.define(
    "attention_kl_forward", f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)", _fake_forward
)
_BACKWARD = library.define(
    "attention_kl_backward",
    "(Tensor grad_rows, Tensor rows, Tensor inner, Tensor lse_s, Tensor lse_t, "
    f"{_INPUTS}, bool tokens_first) -> (Tensor, Tensor)",
    _fake_backward,
)
_FUSED = library.define(
    "attention_kl_fused",
    f"({_INPUTS}, str reduction, bool tokens_first) -> (Tensor, Tensor, Tensor)",
    _fake_fused,
    ("cpp", "triton"),
)
SWAPPED = {"forward": "reverse", "reverse": "forward", "js": "js"}


class _AttentionKL(torch.autograd.Function):
    """Losses [P], or rows [B, sum H, Nq], of P layer pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        fused: bool,
        reduction: str,
        scale_s: list[float],
        scale_t: list[float],
        causal: bool,
        window: int | None,
        mean_heads: bool,
        direction: str,
        attention_mask: Tensor | None,
        query_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.backend, ctx.fused, ctx.reduction = backend, fused, reduction
        ctx.options = (causal, window, mean_heads)
        ctx.scales, ctx.direction = (scale_s, scale_t), direction
        # Hooks may give saved tensors other strides, so the layout is not asked of them later.
        ctx.pairs, ctx.tokens_first = len(tensors) // 4, _tokens_first(tensors[0])
        masks = (attention_mask, query_mask, cu_seqlens)
        sides = _sides(tensors)
        inputs = (*sides, *masks, scale_s, scale_t, *ctx.options, direction)
        if fused:
            losses, *gradients = _FUSED[backend](*inputs, reduction, ctx.tokens_first)
            # Beside the saved tensors, so that backward may scale the gradients where they lie;
            # what packs saved tensors (offloading) does not see them. The teacher is let go.
            compiling = torch.compiler.is_compiling()
            ctx.made = None if compiling else gradients
            extra = gradients if compiling else ()
            ctx.save_for_backward(*dispatch.kept(ctx, [*tensors[: 2 * ctx.pairs], *extra]))
            return losses
        rows, inner, lse_s, lse_t = _FORWARD[backend](*inputs)
        heads = [query.shape[1] for query in sides[0]]
        counts = _counts(lse_s, heads) if reduction == "mean" else None
        statistics = (rows, inner, lse_s, lse_t, counts)
        ctx.save_for_backward(*dispatch.kept(ctx, [*masks, *tensors, *statistics]))
        if reduction == "none":
            return rows.clone()  # what is returned may be changed in place
        losses = torch.stack([part.sum() for part in rows.split(heads, 1)])
        return losses if counts is None else losses / counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        restored = dispatch.restored(ctx)
        gradients: list[Tensor | None]
        with torch.no_grad():
            if ctx.fused:
                tensors, made = restored[: 2 * ctx.pairs], restored[2 * ctx.pairs :]
                gradients = _scaled(ctx, grad, tensors, made)
            else:
                masks, tensors = restored[:3], restored[3 : 3 + 4 * ctx.pairs]
                gradients = _recomputed(ctx, grad, masks, tensors, restored[3 + 4 * ctx.pairs :])
        wanted = ctx.needs_input_grad[-4 * ctx.pairs :][: len(tensors)]
        gradients = [x if wants else None for x, wants in zip(gradients, wanted, strict=True)]
        gradients = dispatch.first_derivatives("attention_kl", gradients, tensors)
        return (None,) * 12 + tuple(gradients) + (None,) * (4 * ctx.pairs - len(tensors))


def _scaled(
    ctx: Any, grad: Tensor, tensors: tuple[Tensor, ...], saved: tuple[Tensor, ...]
) -> list[Tensor | None]:
    """The gradients made in forward, of the student's tensors, times the upstream gradient."""
    flat = saved or ctx.made
    keep = bool(saved) or dispatch.keeps_graph()
    if not keep:
        ctx.made = None
    upstream = grad.unbind()
    gradients: list[Tensor | None] = []
    for side, first in zip(flat, (0, ctx.pairs), strict=True):
        like = tensors[first : first + ctx.pairs]
        pieces = _cut(side, like, ctx.tokens_first)
        for piece, x, factor in zip(pieces, like, upstream, strict=True):
            if keep:
                piece = piece * factor
            elif x.device.type != "cpu" or factor != 1:
                piece.mul_(factor)
            gradients.append(piece.to(x.dtype))
    return gradients


def _recomputed(
    ctx: Any,
    grad: Tensor,
    masks: tuple[Tensor | None, ...],
    tensors: tuple[Tensor, ...],
    saved: tuple[Tensor, ...],
) -> list[Tensor | None]:
    """The gradients from the statistics of forward; scores are computed again, tile by tile."""
    rows, inner, lse_s, lse_t, counts = saved
    query_s, key_s, query_t, key_t = _sides(tensors)
    scale_s, scale_t = ctx.scales
    tokens_first = ctx.tokens_first
    if ctx.reduction != "none":
        per_pair = grad if counts is None else grad / counts
        heads = [query.shape[1] for query in query_s]
        grad = torch.cat([x.expand(n) for x, n in zip(per_pair.unbind(), heads, strict=True)])
        grad = grad[None, :, None].expand_as(rows)
    gradients: list[Tensor | None] = [None] * (4 * ctx.pairs)
    student, teacher = slice(0, 2 * ctx.pairs), slice(2 * ctx.pairs, None)
    needs = ctx.needs_input_grad[-4 * ctx.pairs :]
    backward = _BACKWARD[ctx.backend]
    if any(needs[student]):
        flat = backward(
            grad, rows, inner, lse_s, lse_t, query_s, key_s, query_t, key_t, *masks,
            scale_s, scale_t, *ctx.options, ctx.direction, tokens_first,
        )  # fmt: skip
        pieces = zip(flat, (query_s, key_s), strict=True)
        gradients[student] = [x for side, like in pieces for x in _cut(side, like, tokens_first)]
    if any(needs[teacher]):
        # The other side's gradient is the student's with the roles exchanged.
        inner_t = 2 * rows - inner if ctx.direction == "js" else inner
        flat = backward(
            grad, rows, inner_t, lse_t, lse_s, query_t, key_t, query_s, key_s, *masks,
            scale_t, scale_s, *ctx.options, SWAPPED[ctx.direction], tokens_first,
        )  # fmt: skip
        pieces = zip(flat, (query_t, key_t), strict=True)
        gradients[teacher] = [x for side, like in pieces for x in _cut(side, like, tokens_first)]
    return gradients


def _sides(tensors: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    pairs = len(tensors) // 4
    return tuple(list(tensors[side * pairs : (side + 1) * pairs]) for side in range(4))


def _tokens_first(query: Tensor) -> bool:
    """Gradients lie as the queries do: projections give [B, N, H, d] seen as [B, H, N, d]."""
    return bool(query.stride(1) < query.stride(2))


def _cut(flat: Tensor, like: Sequence[Tensor], tokens_first: bool) -> list[Tensor]:
    pieces = flat.split([x.numel() for x in like])
    if not tokens_first:
        return [piece.view(x.shape) for piece, x in zip(pieces, like, strict=True)]
    return [
        piece.view(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        for piece, x in zip(pieces, like, strict=True)
    ]


def _counts(lse_s: Tensor, heads: list[int]) -> Tensor:
    """Rows that take part [P], at least 1; the same rows in every head and pair."""
    rows = (lse_s[:, 0] != torch.inf).sum().clamp(min=1)
    return torch.stack([rows * n for n in heads]).to(lse_s.dtype)


def _serve(
    backend: str,
    fuses: Callable[..., bool],
    *,
    query_s: Tensor | list[Tensor],
    key_s: Tensor | list[Tensor],
    query_t: Tensor | list[Tensor],
    key_t: Tensor | list[Tensor],
    attention_mask: Tensor | None,
    query_mask: Tensor | None,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    scale_s: float | list[float] | None,
    scale_t: float | list[float] | None,
    temperature: float,
    direction: str,
    reduction: str,
    relation_heads: int | None,
    match_heads: str | None,
    teacher_grad: bool,
) -> Tensor | list[Tensor]:
    paired = isinstance(query_s, list)
    sides = [x if isinstance(x, list) else [x] for x in (query_s, key_s, query_t, key_t)]
    packed = cu_seqlens is not None
    if cu_seqlens is not None:
        # [total, H, d]: one batch element whose sequences do not see each other
        sides = [[x.transpose(0, 1).unsqueeze(0) for x in side] for side in sides]
        query_mask = None if query_mask is None else query_mask.unsqueeze(0)
        cu_seqlens = cu_seqlens.contiguous()
    elif query_mask is None and sides[0][0].shape[2] == sides[1][0].shape[2]:
        query_mask = attention_mask
    if relation_heads is not None:
        heads = [[x.shape[1] for x in side] for side in (sides[0], sides[2]) for _ in range(2)]
        sides = [
            [_relation_heads(x, h, relation_heads) for x, h in zip(side, many, strict=True)]
            for side, many in zip(sides, heads, strict=True)
        ]
    if not teacher_grad:
        sides[2:] = [[x.detach() for x in side] for side in sides[2:]]
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for side in sides for x in side]

    def scales(scale: float | list[float] | None, queries: list[Tensor]) -> list[float]:
        each = scale if isinstance(scale, list) else [scale] * len(queries)
        return [
            (query.shape[-1] ** -0.5 if factor is None else factor) / temperature
            for factor, query in zip(each, queries, strict=True)
        ]

    masks = [attention_mask, query_mask, cu_seqlens]
    if torch.compiler.is_compiling():  # refuses one tensor in two places
        masks, tensors = dispatch.distinct(masks), dispatch.distinct(tensors)
    mean_heads = match_heads == "mean"
    fused = (
        reduction != "none"
        and torch.is_grad_enabled()
        and any(x.requires_grad for side in sides[:2] for x in side)
        and not any(x.requires_grad for side in sides[2:] for x in side)
        and fuses(*sides[:3], direction, mean_heads, packed)
    )
    result: Tensor = _AttentionKL.apply(
        backend, fused, reduction, scales(scale_s, sides[0]), scales(scale_t, sides[2]),
        causal, window, mean_heads, direction,
        *masks, *tensors,
    )  # fmt: skip
    if reduction != "none":
        return result if paired else result[0]
    rows = [result] if len(sides[0]) == 1 else result.split([x.shape[1] for x in sides[0]], 1)
    rows = [x.squeeze(0) if packed else x for x in rows]
    return rows if paired else rows[0]


def _relation_heads(x: Tensor, heads: int, relation_heads: int) -> Tensor:
    """MiniLMv2: concatenate the heads, cut into relation heads."""
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], dim=1)
    return x.transpose(1, 2).flatten(2).unflatten(2, (relation_heads, -1)).transpose(1, 2)


def _kernel(backend: str) -> dispatch.Kernel:
    def load() -> Callable[..., Any]:
        names = ["forward", "backward", *(["fused"] if backend in _FUSED else [])]
        library.load(backend, "attention_kl", [f"attention_kl_{name}" for name in names])
        if backend == "cuda" and not library.has_sm_90a():
            raise ImportError(
                "kdfast/_cuda was built without code for Hopper; with 9.0a in TORCH_CUDA_ARCH_LIST "
                "install again: pip install --no-build-isolation kdfast"
            )
        return functools.partial(_serve, backend, _fuses(backend))

    return dispatch.Kernel(load, functools.partial(_refuses, backend))


def _fuses(backend: str) -> Callable[..., bool]:
    """Says whether the gradient of a scalar loss is made in the forward sweep."""
    if backend == "triton":
        fuses: Callable[..., bool] = importlib.import_module("kdfast.kernels.attention_kl").fuses
        return fuses
    return lambda *_: backend == "cpp"


def _refuses(backend: str, **arguments: Any) -> str | None:
    query = arguments["query_s"]
    query = query[0] if isinstance(query, list) else query
    reason = library.refuses(backend, query)
    if reason is None and arguments["match_heads"] == "mean" and arguments["teacher_grad"]:
        return "match_heads='mean' with teacher_grad=True is left to the reference"
    return _refused_by_hopper(**arguments) if reason is None and backend == "cuda" else reason


def _refused_by_hopper(
    *,
    query_s: Tensor | list[Tensor],
    key_s: Tensor | list[Tensor],
    query_t: Tensor | list[Tensor],
    cu_seqlens: Tensor | None,
    scale_s: float | list[float] | None,
    scale_t: float | list[float] | None,
    temperature: float,
    direction: str,
    relation_heads: int | None,
    match_heads: str | None,
    **others: Any,
) -> str | None:
    """What the tensor-core kernels of csrc/cuda do not serve.

    They copy what is not aligned to 16 bytes, so that strides and addresses are no reason.
    """
    queries = [x if isinstance(x, list) else [x] for x in (query_s, query_t)]
    first = queries[0][0]
    if first.dtype not in (torch.bfloat16, torch.float16):
        return f"{first.dtype} is not bfloat16 or float16"
    if queries[1][0].dtype != first.dtype:
        return f"a teacher in {queries[1][0].dtype} and a student in {first.dtype}"
    if torch.cuda.get_device_capability(first.device) != (9, 0):
        return "the GPU is not of compute capability 9.0 (Hopper)"
    if direction == "js" or cu_seqlens is not None or match_heads is not None:
        return "direction='js', cu_seqlens and match_heads are left to triton"
    keys = (key_s[0] if isinstance(key_s, list) else key_s).shape[2]
    if max(first.shape[2], keys) > 200_000:
        return "a sequence has more than 200000 tokens"
    for side, scale in zip(queries, (scale_s, scale_t), strict=True):
        factors = scale if isinstance(scale, list) else [scale] * len(side)
        for query, factor in zip(side, factors, strict=True):
            heads, width = query.shape[1], query.shape[3]
            if relation_heads is not None:
                heads, width = relation_heads, heads * width // relation_heads
            if width % 8 or width > 128:
                return f"a head of width {width} is not a multiple of 8 up to 128"
            if max(query.shape[0], heads) > 65535:
                return "there are more than 65535 heads, or samples in the batch"
            factor = (width**-0.5 if factor is None else factor) / temperature
            if not 1e-6 <= factor <= 1e6:
                return f"scale / temperature = {factor:g} is outside 1e-6 ... 1e6"
    return None


for _backend in library.KERNEL_BACKENDS:
    dispatch.KERNELS["attention_kl", _backend] = _kernel(_backend)
