"""Kernel alignment: HSIC and CKA, biased and unbiased, with linear and RBF kernels.

With row-centred kernels K_c = C K C and L_c = C L C over the n valid rows,

    biased HSIC    <K_c, L_c> / (n - 1)^2                  (Gretton et al. 2005)
    unbiased HSIC  <K_u, L_u> / (n (n - 3))                (Song et al. 2012)
    CKA            HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))  (Kornblith et al. 2019)

where K_u has a zero diagonal and K_ij - (r_i + r_j) / (n - 2) + R / ((n - 1)(n - 2)) elsewhere, r
and R being the row sums and total of K without its diagonal (Szekely and Rizzo 2014; equal to Song
et al.'s three terms, but small numbers are added instead of large ones cancelled).

Linear kernels need no Gram matrix: <K_c, L_c> = |X_c^T Y_c|^2, and with squared row norms a, b of
the centred features

    <K_u, L_u> = |X_c^T Y_c|^2 - n/(n-2) sum(a b) + sum(a) sum(b) / ((n-1)(n-2)).

The unbiased self-terms are small differences of large numbers where few rows carry most of the
norm, of relative error up to n eps |X_c^T X_c|^2 / HSIC. Below that error they count as zero.

Features are centred before any product, also where the formula does not ask for it: hidden states
have dimensions whose mean is hundreds of standard deviations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdfast.reference.product import product

MINIMUM_ROWS = {"biased": 2, "unbiased": 4}

Layers = Tensor | Sequence[Tensor]


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    side: str | None = None,
) -> Tensor:
    """Reference of `kdfast.ops.hsic`; `side` ("gram" | "feature") overrides the choice."""
    rows = _valid_rows(x, mask)
    bandwidth_x, bandwidth_y = _two_bandwidths(bandwidth)
    centred_x, centred_y = _centre_features(x, rows), _centre_features(y, rows)
    if kernel == "linear":
        side = side or cheaper_side(x.shape[-2], [x.shape[-1], y.shape[-1]], [0, 1])
    if kernel == "linear" and side == "feature":
        inner = _feature_inner(centred_x, centred_y, rows, estimator)
    else:
        gram_x = _gram(centred_x, rows, kernel, bandwidth_x, estimator)
        gram_y = _gram(centred_y, rows, kernel, bandwidth_y, estimator)
        inner = _inner(_centre_gram(gram_x, rows, estimator), _centre_gram(gram_y, rows, estimator))
    n = rows.count
    enough = n >= MINIMUM_ROWS[estimator]
    normaliser = (n - 1) ** 2 if estimator == "biased" else n * (n - 3)
    value = inner / torch.where(enough, normaliser, torch.ones_like(normaliser))
    return torch.where(enough, value, torch.zeros_like(value))


def cka(
    x_s: Layers,
    x_t: Layers,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    terms_t: dict[str, Any] | None = None,
    side: str | None = None,
) -> Tensor:
    """Reference of `kdfast.ops.cka`."""
    values, _ = _by_pairs(
        x_s, x_t, mask=mask, kernel=kernel, bandwidth=bandwidth, estimator=estimator,
        teacher_grad=teacher_grad, terms_t=terms_t, side=side,
    )  # fmt: skip
    return values


def gram_distance(
    x_s: Layers,
    x_t: Layers,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    teacher_grad: bool = False,
    side: str | None = None,
) -> Tensor:
    """Reference of `kdfast.ops.gram_distance`: |K / |K| - L / |L||^2 = 2 - 2 <K, L> / (|K| |L|)."""
    values, undefined = _by_pairs(
        x_s, x_t, mask=mask, kernel=kernel, bandwidth=bandwidth, estimator="biased",
        teacher_grad=teacher_grad, terms_t=None, side=side,
    )  # fmt: skip
    return (2 - 2 * values).masked_fill(undefined, 0.0)


def _by_pairs(x_s: Layers, x_t: Layers, **options: Any) -> tuple[Tensor, Tensor]:
    """CKA of each pair, and where it is not defined."""
    layers_s, layers_t = ([x] if isinstance(x, Tensor) else list(x) for x in (x_s, x_t))
    cross = [(i, len(layers_s) + i) for i in range(len(layers_s))]
    found = _terms(layers_s, layers_t, cross, **options)
    sides = list(zip(found.own_s, found.own_t, strict=True))
    values = [ratio(inner, *own) for inner, own in zip(found.cross, sides, strict=True)]
    undefined = [own_s * own_t <= 0 for own_s, own_t in sides]
    if isinstance(x_s, Tensor):
        return values[0], undefined[0]
    return torch.stack(values), torch.stack(undefined)


def cka_matrix(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    terms_t: dict[str, Any] | None = None,
    side: str | None = None,
) -> Tensor:
    """Reference of `kdfast.ops.cka_matrix`: every layer's own terms are computed once."""
    many_s, many_t = len(layers_s), len(layers_t)
    cross = [(i, many_s + j) for i in range(many_s) for j in range(many_t)]
    found = _terms(
        layers_s, layers_t, cross, mask=mask, kernel=kernel, bandwidth=bandwidth,
        estimator=estimator, teacher_grad=teacher_grad, terms_t=terms_t, side=side,
    )  # fmt: skip
    values = [
        ratio(inner, found.own_s[i], found.own_t[j - many_s])
        for inner, (i, j) in zip(found.cross, cross, strict=True)
    ]
    return torch.stack(values, dim=-1).unflatten(-1, (many_s, many_t))


def hsic_matrix(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    side: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `kdfast.ops.hsic_matrix`: `hsic` of every pair."""
    if not teacher_grad:
        layers_t = [y.detach() for y in layers_t]
    sigma_s, sigma_t = _two_bandwidths(bandwidth)

    def terms(xs: Sequence[Tensor], ys: Sequence[Tensor], sigma: Any) -> list[list[Tensor]]:
        return [
            [
                hsic(
                    x, y, mask=mask, kernel=kernel, bandwidth=sigma, estimator=estimator, side=side
                )
                for y in ys
            ]
            for x in xs
        ]

    cross = terms(layers_s, layers_t, None if sigma_s is None else (sigma_s, sigma_t))
    own_s = [terms([x], [x], sigma_s)[0][0] for x in layers_s]
    own_t = [terms([y], [y], sigma_t)[0][0] for y in layers_t]
    matrix = torch.stack([torch.stack(row, dim=-1) for row in cross], dim=-2)
    return matrix, torch.stack(own_s, dim=-1), torch.stack(own_t, dim=-1)


@dataclass(frozen=True)
class _Terms:
    cross: list[Tensor]  # of the pairs asked for
    own_s: list[Tensor]  # of each layer with itself, 0 where that vanishes
    own_t: list[Tensor]


def _terms(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    pairs: list[tuple[int, int]],
    *,
    mask: Tensor | None,
    kernel: str,
    bandwidth: float | tuple[float, float] | None,
    estimator: str,
    teacher_grad: bool,
    terms_t: dict[str, Any] | None,
    side: str | None,
) -> _Terms:
    """Inner products of the centred Gram matrices of all layers, each at a unit of its own."""
    if not teacher_grad:
        layers_t = [y.detach() for y in layers_t]
    rows = _valid_rows(layers_s[0], mask)
    if kernel == "linear":
        own = [i for k in range(len(layers_s) + len(layers_t)) for i in (k, k)]
        widths = [x.shape[-1] for x in (*layers_s, *layers_t)]
        flat = [i for pair in pairs for i in pair]
        side = side or cheaper_side(layers_s[0].shape[-2], widths, flat + own)
    feature_side = kernel == "linear" and side == "feature"
    sigma_s, sigma_t = _two_bandwidths(bandwidth)

    def one(layers: Sequence[Tensor], sigma: float | None) -> tuple[list[Tensor], list[Tensor]]:
        """What inner products are taken of, and those of each layer with itself."""
        features = [_centre_features(x, rows) for x in layers]
        if kernel == "linear":
            # CKA does not depend on the scale of the features, nor on that of the Gram matrices;
            # at unit scale neither large nor tiny ones can leave float32 in the powers below. The
            # scale may be held constant in backward for the same reason.
            features = [_unit_scale(x) for x in features]
        if feature_side:
            sizes = [_feature_inner(x, x, rows, "biased") for x in features]
            own = sizes
            if estimator == "unbiased":
                pairs = zip(sizes, features, strict=True)
                own = [_unbiased(size, x, x, rows) for size, x in pairs]
            terms = features
        else:
            grams = [_unit_scale(_gram(x, rows, kernel, sigma, estimator)) for x in features]
            terms = [_centre_gram(gram, rows, estimator) for gram in grams]
            own = [_inner(term, term) for term in terms]
            sizes = [_inner(gram, gram) for gram in grams]
        enough = rows.count >= MINIMUM_ROWS[estimator]
        own = [
            own_.masked_fill(_vanishes(own_, size, rows) | ~enough, 0.0)
            for own_, size in zip(own, sizes, strict=True)
        ]
        return terms, own

    terms_of_s, own_s = one(layers_s, sigma_s)
    key = f"reference {'feature' if feature_side else 'gram'} {layers_t[0].dtype}"
    if terms_t is None:
        terms_of_t, own_t = one(layers_t, sigma_t)
    else:
        if key not in terms_t:
            # What is made in inference mode could not serve a later call with gradients.
            with torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode(False):
                terms_t[key] = one(layers_t, sigma_t)
        terms_of_t, own_t = terms_t[key]
    terms = [*terms_of_s, *terms_of_t]
    if feature_side:
        cross = [_feature_inner(terms[i], terms[j], rows, estimator) for i, j in pairs]
    else:
        cross = [_inner(terms[i], terms[j]) for i, j in pairs]
    return _Terms(cross, own_s, own_t)


def pair_indices(pairs: Sequence[int]) -> list[tuple[int, int]]:
    """(i, j) of each pair, which lie flat: [i0, j0, i1, j1, ...]."""
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def cheaper_side(n: int, widths: Sequence[int], pairs: Sequence[int]) -> str:
    """The side, "gram" or "feature", that needs fewer multiplications for linear kernels.

    Gram side: a symmetric n x n matrix, of cost n^2 d / 2, for every layer, whatever the number of
    pairs. Feature side: a product of cost n d_i d_j for every pair, half of that for a layer with
    itself. Those of backward are in the same proportion.
    """
    gram = n * sum(widths)
    feature = sum(
        widths[i] ** 2 if i == j else 2 * widths[i] * widths[j] for i, j in pair_indices(pairs)
    )
    return "gram" if gram <= feature else "feature"


@dataclass(frozen=True)
class _Rows:
    valid: Tensor  # [..., n] bool
    count: Tensor  # [...] number of valid rows, in the dtype of the statistics


def _valid_rows(x: Tensor, mask: Tensor | None) -> _Rows:
    if mask is None:
        valid = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    else:
        valid = mask.bool()
    return _Rows(valid, valid.sum(-1).to(torch.promote_types(x.dtype, torch.float32)))


def _two_bandwidths(
    bandwidth: float | tuple[float, float] | None,
) -> tuple[float | None, float | None]:
    return bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)


def _centre_features(x: Tensor, rows: _Rows) -> Tensor:
    """X_c [..., n, d] in float32 or better; zero in the rows that are dropped.

    The first valid row is subtracted before the mean is taken: a constant that centring removes
    anyway, it keeps the digits of features far from zero, and makes equal rows exactly zero.
    """
    x = x.to(rows.count.dtype)
    dropped = ~rows.valid.unsqueeze(-1)
    first = rows.valid.to(torch.uint8).argmax(dim=-1)[..., None, None]
    shifted = (x - torch.take_along_dim(x.detach(), first, dim=-2)).masked_fill(dropped, 0.0)
    mean = shifted.sum(-2, keepdim=True) / rows.count.clamp(min=1)[..., None, None]
    return (shifted - mean).masked_fill(dropped, 0.0)


def _unit_scale(x: Tensor) -> Tensor:
    largest = x.detach().abs().amax(dim=(-2, -1), keepdim=True)
    return x / torch.where(largest > 0, largest, torch.ones_like(largest))


def _gram(
    centred: Tensor, rows: _Rows, kernel: str, bandwidth: float | None, estimator: str
) -> Tensor:
    """K [..., n, n] up to a constant, which centring removes; zero where the estimator has none."""
    gram = product(centred, centred)
    dropped = ~_entries(rows, estimator)
    if kernel == "linear":
        return gram.masked_fill(dropped, 0.0)
    norms = gram.diagonal(dim1=-2, dim2=-1)
    distances = (norms.unsqueeze(-1) + norms.unsqueeze(-2) - 2 * gram).clamp(min=0)
    # Mean squared distance of two different valid rows: sum_ij |x_i - x_j|^2 = 2 n sum_i |x_i|^2.
    typical = 2 * norms.detach().sum(-1) / (rows.count - 1).clamp(min=1)
    typical = typical[..., None, None]
    if bandwidth is None:
        variance = torch.where(typical > 0, typical, torch.ones_like(typical))
    else:
        variance = torch.ones_like(typical) * bandwidth**2
    exponent, typical = -distances / (2 * variance), -typical / (2 * variance)
    # exp(exponent) - exp(typical), by expm1 where the two are close: a bandwidth much larger than
    # the distances makes all entries nearly equal, and the digits that differ are all that counts.
    offset = exponent - typical
    close = typical.exp() * torch.expm1(offset.clamp(max=1))
    kernel_values = torch.where(offset < 1, close, exponent.exp() - typical.exp())
    return kernel_values.masked_fill(dropped, 0.0)


def _entries(rows: _Rows, estimator: str) -> Tensor:
    """The entries of K [..., n, n] that the estimator uses."""
    pairs = rows.valid.unsqueeze(-1) & rows.valid.unsqueeze(-2)
    if estimator == "biased":
        return pairs
    return pairs & ~torch.eye(pairs.shape[-1], dtype=torch.bool, device=pairs.device)


def _centre_gram(gram: Tensor, rows: _Rows, estimator: str) -> Tensor:
    """K_c (biased) or K_u (unbiased) [..., n, n]."""
    n = rows.count[..., None, None]
    if estimator == "biased":
        row_divisor, total_divisor = n.clamp(min=1), (n * n).clamp(min=1)
    else:
        row_divisor, total_divisor = (n - 2).clamp(min=1), ((n - 1) * (n - 2)).clamp(min=1)
    sums = gram.sum(-1, keepdim=True)
    total = sums.sum(-2, keepdim=True) / total_divisor
    means = sums / row_divisor
    centred = gram - means - means.transpose(-1, -2) + total
    return centred.masked_fill(~_entries(rows, estimator), 0.0)


def _inner(k: Tensor, c: Tensor) -> Tensor:
    return (k * c).sum((-2, -1))


def _feature_inner(x: Tensor, y: Tensor, rows: _Rows, estimator: str) -> Tensor:
    """<K_c, L_c> or <K_u, L_u> [...] from the centred features alone."""
    inner = product(x.transpose(-1, -2), y.transpose(-1, -2)).square().sum((-2, -1))
    return inner if estimator == "biased" else _unbiased(inner, x, y, rows)


def _unbiased(inner: Tensor, x: Tensor, y: Tensor, rows: _Rows) -> Tensor:
    """<K_u, L_u> from <K_c, L_c> and the centred features."""
    n = rows.count
    norms_x, norms_y = x.square().sum(-1), y.square().sum(-1)
    return (
        inner
        - n / (n - 2).clamp(min=1) * (norms_x * norms_y).sum(-1)
        + norms_x.sum(-1) * norms_y.sum(-1) / ((n - 1) * (n - 2)).clamp(min=1)
    )


def _vanishes(own: Tensor, size: Tensor, rows: _Rows) -> Tensor:
    """Whether a self-HSIC is zero, up to the rounding of the numbers it is the difference of.

    False for NaN, which must come out again.
    """
    return own <= 2 * torch.finfo(own.dtype).eps * rows.count * size


def ratio(cross: Tensor, own_s: Tensor, own_t: Tensor) -> Tensor:
    """CKA; 0 with zero gradient where a self term is 0 (no 0/0 on the untaken branch)."""
    squared = own_s * own_t
    undefined = squared <= 0  # false for NaN, which must come out again
    value = cross / squared.masked_fill(undefined, 1.0).sqrt()
    return value.masked_fill(undefined, 0.0)
