"""`attention_kl`: KL divergence between two attentions, straight from queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import arguments, dispatch

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
        query_t: [B, H_t, Nq, d_t]; the teacher's queries. d_t may differ from d_s.
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

    tensors = arguments.floating(op, labelled)
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
