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

import torch
from torch import Tensor

from kdfast.reference.product import product

MINIMUM_ROWS = {"biased": 2, "unbiased": 4}


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
        side = side or cheaper_side(x.shape[-2], [x.shape[-1]], [y.shape[-1]], self_terms=False)
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
    x_s: Tensor,
    x_t: Tensor,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    side: str | None = None,
) -> Tensor:
    """Reference of `kdfast.ops.cka`: the matrix of one layer pair."""
    matrix = cka_matrix(
        [x_s],
        [x_t],
        mask=mask,
        kernel=kernel,
        bandwidth=bandwidth,
        estimator=estimator,
        teacher_grad=teacher_grad,
        side=side,
    )
    return matrix[..., 0, 0]


def cka_matrix(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    side: str | None = None,
) -> Tensor:
    """Reference of `kdfast.ops.cka_matrix`: every layer's own terms are computed once."""
    if not teacher_grad:
        layers_t = [y.detach() for y in layers_t]
    rows = _valid_rows(layers_s[0], mask)
    if kernel == "linear":
        side = side or cheaper_side(
            layers_s[0].shape[-2], [x.shape[-1] for x in layers_s], [y.shape[-1] for y in layers_t]
        )
    features = [[_centre_features(x, rows) for x in layers] for layers in (layers_s, layers_t)]
    if kernel == "linear":
        # CKA does not depend on the scale of the features, nor on that of the Gram matrices; at
        # unit scale neither large nor tiny ones can leave float32 in the powers below. The scale
        # may be held constant in backward for the same reason.
        features = [[_unit_scale(x) for x in layers] for layers in features]

    if kernel == "linear" and side == "feature":
        terms_s, terms_t = features
        size_s, size_t = ([_feature_inner(x, x, rows, "biased") for x in f] for f in features)
        own_s, own_t = size_s, size_t
        if estimator == "unbiased":
            own_s, own_t = (
                [_unbiased(size, x, x, rows) for size, x in zip(sizes, f, strict=True)]
                for sizes, f in zip((size_s, size_t), features, strict=True)
            )
        cross = [[_feature_inner(x, y, rows, estimator) for y in terms_t] for x in terms_s]
    else:
        grams = [
            [_unit_scale(_gram(x, rows, kernel, sigma, estimator)) for x in layers]
            for layers, sigma in zip(features, _two_bandwidths(bandwidth), strict=True)
        ]
        terms_s, terms_t = ([_centre_gram(gram, rows, estimator) for gram in g] for g in grams)
        own_s, own_t = ([_inner(term, term) for term in terms] for terms in (terms_s, terms_t))
        size_s, size_t = ([_inner(gram, gram) for gram in g] for g in grams)
        cross = [[_inner(k, c) for c in terms_t] for k in terms_s]

    enough = rows.count >= MINIMUM_ROWS[estimator]
    flat_s = [_vanishes(own, size, rows) for own, size in zip(own_s, size_s, strict=True)]
    flat_t = [_vanishes(own, size, rows) for own, size in zip(own_t, size_t, strict=True)]
    matrix = [
        [
            _ratio(cross[i][j], own_s[i], own_t[j], enough & ~flat_s[i] & ~flat_t[j])
            for j in range(len(layers_t))
        ]
        for i in range(len(layers_s))
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in matrix], dim=-2)


def cheaper_side(
    n: int, widths_s: Sequence[int], widths_t: Sequence[int], *, self_terms: bool = True
) -> str:
    """The side, "gram" or "feature", that needs fewer multiplications for linear kernels.

    Gram side: one n x n matrix of cost n^2 d for every layer, whatever the number of pairs.
    Feature side: one product of cost n d_s d_t for every pair, and n d^2 for every self-term.
    """
    gram = n * (sum(widths_s) + sum(widths_t))
    feature = sum(widths_s) * sum(widths_t)
    if self_terms:
        feature += sum(d * d for d in (*widths_s, *widths_t))
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


def _ratio(cross: Tensor, own_s: Tensor, own_t: Tensor, defined: Tensor) -> Tensor:
    """CKA where it is defined, elsewhere 0 with zero gradient (no 0/0 on the untaken branch)."""
    squared = torch.where(defined, own_s * own_t, torch.ones_like(cross))
    return torch.where(defined, cross / squared.sqrt(), torch.zeros_like(cross))
