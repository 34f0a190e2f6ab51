"""Kernel alignment, batched over problems and layer pairs: `hsic`, `hsic_matrix`, `cka`,
`cka_matrix`, `gram_distance`; `CKATeacher` keeps a teacher's terms, `MinibatchCKA` adds up batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdfast.ops import arguments, dispatch, library
from kdfast.reference.cka import MINIMUM_ROWS, cheaper_side, pair_indices, ratio

KERNELS = ("linear", "rbf")

Bandwidth = float | tuple[float, float] | None
Layers = Tensor | Sequence[Tensor]


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: Bandwidth = None,
    estimator: str = "biased",
    backend: str = "auto",
) -> Tensor:
    """Hilbert-Schmidt independence criterion of two sets of features of the same rows.

    Biased ⟨K_c, L_c⟩ / (n - 1)²; unbiased as Song et al., with 1 / (n (n - 3)), which may be
    negative and is never clamped. Both sides get gradients. Too few valid rows under a mask give 0
    with zero gradient; NaN in a valid row gives NaN.

    Args:
        x: [..., n, d_x]; leading dimensions are independent problems.
        y: [..., n, d_y]; d_y may differ from d_x, and its dtype.
        mask: [..., n], bool or 0/1, 1 = the row takes part. Masked rows are dropped before
            centring: n is the number of valid rows.
        kernel: "linear" ⟨x_i, x_j⟩ or "rbf" exp(-‖x_i - x_j‖² / (2 σ²)).
        bandwidth: σ of "rbf" in the units of the features, or (σ_x, σ_y). None: σ² is the mean
            squared distance of two different valid rows, per problem and side, constant in
            backward.
        estimator: "biased" (n >= 2) or "unbiased" (n >= 4).
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda". The reference of "rbf" keeps
            n x n matrices.

    Returns:
        [...], float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above, or n is too small; the message names it.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Gretton et al., "Measuring statistical dependence with Hilbert-Schmidt norms", ALT 2005;
        Song et al., "Feature selection via dependence maximization", JMLR 2012, eq. 5.
    """
    x, y, options = _check("hsic", "x", x, "y", y, mask, kernel, bandwidth, estimator)
    value: Tensor = dispatch.run("hsic", backend, x.device, x=x, y=y, **options)
    return value


def cka(
    x_s: Layers,
    x_t: Layers,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: Bandwidth = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Centered kernel alignment of student and teacher features of the same rows.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)): 1 for features that agree up to rotation and scale.
    Where a side's own HSIC is 0 up to rounding (equal rows; too few valid rows under a mask), CKA
    is not defined and the result is 0 with zero gradient. NaN in a valid row gives NaN.

    The biased value of independent data tends to 1 as n falls below d (at n = 32, d = 768 it is
    near 1 whatever the features, and almost flat as a loss); the unbiased one is then near 0, may
    be negative, and is never clamped.

    Args:
        x_s: [..., n, d_s]; leading dimensions are independent problems. Or a sequence of such
            tensors, one per layer pair, of the same rows; widths may differ between layers.
        x_t: [..., n, d_t], or as many of them; d_t may differ from d_s, and their dtype from the
            student's.
        mask: [..., n], bool or 0/1, 1 = the row takes part. Masked rows are dropped before
            centring: n is the number of valid rows.
        kernel: "linear" ⟨x_i, x_j⟩ or "rbf" exp(-‖x_i - x_j‖² / (2 σ²)).
        bandwidth: σ of "rbf" in the units of the features, or (σ_s, σ_t). None: σ² is the mean
            squared distance of two different valid rows, per problem and side, constant in
            backward.
        estimator: "biased" (n >= 2) or "unbiased" (n >= 4).
        teacher_grad: give x_t a gradient too. By default an x_t that requires grad is refused.
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda". Linear kernels are computed from
            n x n or d x d matrices, whichever needs fewer multiplications. The kernels keep no
            n x n matrix for n > 1024, nor for "rbf"; the reference does, on that side.

    Returns:
        [...], for sequences [pairs, ...]; float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above, or n is too small; the message names it.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Kornblith et al., "Similarity of neural network representations revisited", ICML 2019,
        eq. 2-4; the unbiased ratio Nguyen et al., "Do wide and deep networks learn the same
        things?", ICLR 2021.
    """
    options = _check_pairs("cka", x_s, x_t, mask, kernel, bandwidth, estimator, teacher_grad)
    value: Tensor = dispatch.run("cka", backend, _device(options["x_s"]), **options)
    return value


def gram_distance(
    x_s: Layers,
    x_t: Layers,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: Bandwidth = None,
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Squared Frobenius distance of the centred Gram matrices, each divided by its norm.

    ‖K_c / ‖K_c‖ - L_c / ‖L_c‖‖² = 2 - 2 CKA (biased), between 0 and 2; squared, since the distance
    itself has an infinite gradient where the two agree. 0 with zero gradient where a side has no
    norm (equal rows; too few valid rows under a mask).

    Args: as `cka`; the estimator is the biased one.

    Returns:
        [...], for sequences [pairs, ...]; float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above, or n is too small; the message names it.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        The Gram matrix distance of Bhattarai et al., arXiv 2509.25253 (2025), of centred and
        normalised matrices as in Kornblith et al., ICML 2019.
    """
    op = "gram_distance"
    options = _check_pairs(op, x_s, x_t, mask, kernel, bandwidth, "biased", teacher_grad)
    del options["estimator"]
    value: Tensor = dispatch.run(op, backend, _device(options["x_s"]), **options)
    return value


def cka_matrix(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: Bandwidth = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`cka` of every student layer with every teacher layer, each layer's own terms computed once.

    Args:
        layers_s: L_s tensors [..., n, d_i], never stacked; widths may differ between layers.
        layers_t: L_t tensors [..., n, d_j] of the same rows; their dtype may differ.
        mask: [..., n], bool or 0/1, shared by all layers.
        kernel, bandwidth, estimator, teacher_grad, backend: as in `cka`; bandwidth (σ_s, σ_t) is
            one per side. The reference of "rbf" keeps n x n matrices of all layers.

    Returns:
        [..., L_s, L_t], float32, float64 for float64 inputs; undefined pairs are 0 as in `cka`.

    Raises:
        ValueError, TypeError: an argument is not as above (the message names the layer), or n is
            too small.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Kornblith et al., ICML 2019.
    """
    op = "cka_matrix"
    options = _check_matrix(
        op, layers_s, layers_t, mask, kernel, bandwidth, estimator, teacher_grad
    )
    matrix: Tensor = dispatch.run(op, backend, options["layers_s"][0].device, **options)
    return matrix


def hsic_matrix(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: Bandwidth = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`hsic` of every student layer with every teacher layer, and of each layer with itself.

    Args: as `cka_matrix`.

    Returns:
        HSIC(K_i, L_j) [..., L_s, L_t], HSIC(K_i, K_i) [..., L_s], HSIC(L_j, L_j) [..., L_t], all
        float32, float64 for float64 inputs; 0 as in `hsic`.

    Raises: as `cka_matrix`.

    Source:
        As `hsic`; sums of these over batches make the minibatch CKA of Nguyen et al., ICLR 2021.
    """
    op = "hsic_matrix"
    options = _check_matrix(
        op, layers_s, layers_t, mask, kernel, bandwidth, estimator, teacher_grad
    )
    terms: tuple[Tensor, Tensor, Tensor] = dispatch.run(
        op, backend, options["layers_s"][0].device, **options
    )
    return terms


class MinibatchCKA:
    """CKA of all layer pairs over more rows than fit at once.

    HSIC terms are averaged over batches before the ratio is taken; with the unbiased estimator the
    expectation does not depend on the batch size. Terms are added in float64, without gradients.

        total = MinibatchCKA()
        for batch in batches:
            total.update(layers_s, layers_t)
        total.compute()

    Args:
        kernel, bandwidth, estimator, backend: as in `cka_matrix`.

    Source:
        Nguyen et al., "Do wide and deep networks learn the same things?", ICLR 2021, eq. 3.
    """

    def __init__(
        self,
        *,
        kernel: str = "linear",
        bandwidth: Bandwidth = None,
        estimator: str = "unbiased",
        backend: str = "auto",
    ) -> None:
        op = "MinibatchCKA"
        arguments.one_of(op, "kernel", kernel, KERNELS)
        arguments.one_of(op, "estimator", estimator, tuple(MINIMUM_ROWS))
        self._options: dict[str, Any] = {
            "kernel": kernel,
            "bandwidth": _check_bandwidth(op, kernel, bandwidth),
            "estimator": estimator,
            "backend": backend,
        }
        self.batches = 0
        self._sums: tuple[Tensor, ...] | None = None

    @torch.no_grad()
    def update(
        self,
        layers_s: Sequence[Tensor],
        layers_t: Sequence[Tensor],
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch of rows.

        Args:
            layers_s, layers_t, mask: as in `cka_matrix`; leading dimensions are batches of their
                own, whose terms are averaged. Batches with too few valid rows add 0.

        Raises: as `cka_matrix`; ValueError when the number of layers differs from the first batch.
        """
        terms = hsic_matrix(layers_s, layers_t, mask=mask, teacher_grad=True, **self._options)
        kept = [2, 1, 1]
        batch = [
            x.double().reshape(-1, *x.shape[x.dim() - k :]).sum(0)
            for x, k in zip(terms, kept, strict=True)
        ]
        if self._sums is None:
            self._sums = tuple(batch)
        else:
            wanted, found = (tuple(x[0].shape) for x in (self._sums, batch))
            if wanted != found:
                raise ValueError(
                    f"MinibatchCKA.update: layers_s and layers_t have {found[0]} and {found[1]} "
                    f"layers, should have {wanted[0]} and {wanted[1]} as in the first batch"
                )
            self._sums = tuple(x + y for x, y in zip(self._sums, batch, strict=True))
        self.batches += math.prod(terms[1].shape[:-1])

    def compute(self) -> Tensor:
        """[L_s, L_t], float64; 0 where a layer's own HSIC adds up to nothing.

        Raises: RuntimeError before the first update.
        """
        if self._sums is None:
            raise RuntimeError("MinibatchCKA.compute: no batch yet; call update first")
        cross, own_s, own_t = self._sums
        return ratio(cross, own_s.unsqueeze(-1), own_t)

    def reset(self) -> None:
        """Forget all batches."""
        self.batches, self._sums = 0, None


class CKATeacher:
    """`cka` and `cka_matrix` against one teacher's features, whose own terms are computed once.

    The teacher's self-HSIC, and on the Gram side its Gram matrices, are kept from the first call
    on: worth it where the same teacher features meet several students, or come again each epoch.
    Features must not change in the meantime.

    Args:
        layers_t: a tensor [..., n, d_t], or a sequence of them, one per teacher layer.
        mask, kernel, bandwidth, estimator, backend: as in `cka`, for every call.
    """

    def __init__(
        self,
        layers_t: Layers,
        *,
        mask: Tensor | None = None,
        kernel: str = "linear",
        bandwidth: Bandwidth = None,
        estimator: str = "biased",
        backend: str = "auto",
    ) -> None:
        op = "CKATeacher"
        single = isinstance(layers_t, Tensor)
        layers = [layers_t] if single else arguments.tensor_list(op, "layers_t", layers_t)
        names = ["layers_t"] if single else [f"layers_t[{j}]" for j in range(len(layers))]
        layers = arguments.floating(op, zip(names, layers, strict=True))
        options = _check_options(op, names, layers, mask, kernel, bandwidth, estimator)
        arguments.no_teacher_grad(op, list(zip(names, layers, strict=True)), None)
        self.layers_t = [x.detach() for x in layers]
        self._single = single
        self._options: dict[str, Any] = {**options, "backend": backend}
        self._terms: dict[str, Any] = {}

    def cka(self, x_s: Layers) -> Tensor:
        """As `kdfast.cka(x_s, x_t)` of these features, pair by pair.

        Args:
            x_s: as the teacher's: a tensor, or a sequence of as many.
        """
        layers: Any = self.layers_t[0] if self._single else self.layers_t
        options = dict(self._options)
        backend = options.pop("backend")
        checked = _check_pairs("cka", x_s, layers, teacher_grad=False, **options)
        value: Tensor = dispatch.run(
            "cka", backend, _device(checked["x_s"]), **checked, terms_t=self._terms
        )
        return value

    def cka_matrix(self, layers_s: Sequence[Tensor]) -> Tensor:
        """As `kdfast.cka_matrix(layers_s, layers_t)` of these features."""
        options = dict(self._options)
        backend = options.pop("backend")
        checked = _check_matrix(
            "cka_matrix", layers_s, self.layers_t, teacher_grad=False, **options
        )
        value: Tensor = dispatch.run(
            "cka_matrix", backend, self.layers_t[0].device, **checked, terms_t=self._terms
        )
        return value


def _device(x: Tensor | list[Tensor]) -> torch.device:
    return x.device if isinstance(x, Tensor) else x[0].device


def _check(
    op: str,
    name_x: str,
    x: Tensor,
    name_y: str,
    y: Tensor,
    mask: Tensor | None,
    kernel: str,
    bandwidth: Any,
    estimator: str,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    x, y = arguments.two_models(op, [(name_x, x)], [(name_y, y)])
    options = _check_options(op, [name_x, name_y], [x, y], mask, kernel, bandwidth, estimator)
    return x, y, options


def _check_pairs(
    op: str,
    x_s: Any,
    x_t: Any,
    mask: Tensor | None,
    kernel: str,
    bandwidth: Any,
    estimator: str,
    teacher_grad: bool,
) -> dict[str, Any]:
    if not isinstance(x_s, (list, tuple)) and not isinstance(x_t, (list, tuple)):
        x, y, options = _check(op, "x_s", x_s, "x_t", x_t, mask, kernel, bandwidth, estimator)
        arguments.no_teacher_grad(op, [("x_t", y)], teacher_grad)
        return {"x_s": x, "x_t": y, **options, "teacher_grad": bool(teacher_grad)}
    layers_s = arguments.tensor_list(op, "x_s", x_s)
    layers_t = arguments.tensor_list(op, "x_t", x_t)
    if len(layers_s) != len(layers_t):
        raise ValueError(
            f"{op}: x_t has {len(layers_t)} tensors but x_s has {len(layers_s)}; each should have "
            "one per layer pair"
        )
    options = _check_layers(
        op, "x_s", layers_s, "x_t", layers_t, mask, kernel, bandwidth, estimator, teacher_grad
    )
    return options


def _check_matrix(
    op: str,
    layers_s: Any,
    layers_t: Any,
    mask: Tensor | None,
    kernel: str,
    bandwidth: Any,
    estimator: str,
    teacher_grad: bool,
) -> dict[str, Any]:
    return _check_layers(
        op, "layers_s", arguments.tensor_list(op, "layers_s", layers_s),
        "layers_t", arguments.tensor_list(op, "layers_t", layers_t),
        mask, kernel, bandwidth, estimator, teacher_grad,
    )  # fmt: skip


def _check_layers(
    op: str,
    name_s: str,
    layers_s: list[Tensor],
    name_t: str,
    layers_t: list[Tensor],
    mask: Tensor | None,
    kernel: str,
    bandwidth: Any,
    estimator: str,
    teacher_grad: bool,
) -> dict[str, Any]:
    names = [f"{name_s}[{i}]" for i in range(len(layers_s))]
    names += [f"{name_t}[{j}]" for j in range(len(layers_t))]
    named = list(zip(names, [*layers_s, *layers_t], strict=True))
    layers = arguments.two_models(op, named[: len(layers_s)], named[len(layers_s) :])
    options = _check_options(op, names, layers, mask, kernel, bandwidth, estimator)
    teacher = list(zip(names, layers, strict=True))[len(layers_s) :]
    arguments.no_teacher_grad(op, teacher, teacher_grad)
    options["teacher_grad"] = bool(teacher_grad)
    return {name_s: layers[: len(layers_s)], name_t: layers[len(layers_s) :], **options}


def _check_options(
    op: str,
    names: list[str],
    features: list[Tensor],
    mask: Tensor | None,
    kernel: str,
    bandwidth: Any,
    estimator: str,
) -> dict[str, Any]:
    arguments.one_of(op, "kernel", kernel, KERNELS)
    arguments.one_of(op, "estimator", estimator, tuple(MINIMUM_ROWS))
    rows = features[0].shape[:-1]
    for name, x in zip(names, features, strict=True):
        if x.dim() < 2:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}, should be [..., n, d]")
        if x.shape[-1] == 0:
            raise ValueError(f"{op}: {name} has shape {list(x.shape)}, should have a width d >= 1")
        if x.shape[:-1] != rows:
            raise ValueError(
                f"{op}: {name} has shape {list(x.shape)} but {names[0]} {list(features[0].shape)}; "
                "all should describe the same rows [..., n, d] (only d may differ)"
            )
    if rows[-1] < MINIMUM_ROWS[estimator]:
        raise ValueError(
            f"{op}: {names[0]} has n = {rows[-1]} rows, should have at least "
            f"{MINIMUM_ROWS[estimator]} for the {estimator} estimator"
        )
    bandwidth = _check_bandwidth(op, kernel, bandwidth)
    mask = arguments.boolean_mask(op, "mask", mask, rows, "[..., n]", features[0].device)
    return {"mask": mask, "kernel": kernel, "bandwidth": bandwidth, "estimator": estimator}


def _check_bandwidth(op: str, kernel: str, bandwidth: Any) -> Bandwidth:
    if bandwidth is None:
        return None
    if kernel != "rbf":
        raise ValueError(f"{op}: bandwidth is {bandwidth!r}, should be None for kernel={kernel!r}")
    if not isinstance(bandwidth, (list, tuple)):
        return arguments.positive(op, "bandwidth", bandwidth)
    if len(bandwidth) != 2:
        raise ValueError(f"{op}: bandwidth is {bandwidth!r}, should be a number or a pair")
    sigma_s, sigma_t = (arguments.positive(op, "bandwidth", value) for value in bandwidth)
    return sigma_s, sigma_t


# The kernels. They see features [P, n, d] of any strides with a dense last dimension, one tensor
# per layer, and a bool mask [P, n]; what they compute is symmetric in the layers, so that student
# and teacher are only indices. Some layers may be float32 and others of one dtype of 16 bits (cuda:
# all of one). With n' the number of valid rows of a problem, X_c the centred valid
# rows, and G a layer's Gram matrix over its unit,
#
#   linear   G = X_c X_c^T / unit,                     unit = |X_c|^2 (squared Frobenius norm)
#   rbf      G = (exp(-|x_i - x_j|^2 / 2σ²) - c) / unit, c = exp(-m / 2σ²), unit = 1 - c, m being
#            the mean squared distance of two different valid rows, and σ² = m for a bandwidth of 0
#            For unbiased, which leaves out the diagonal of ones, times max(exp(-m / 4σ²), 1e-15):
#            narrow kernels have nothing else that is not tiny.
#   unit     1 where that would be 0
#
# (the constant c goes when G is centred, and with it the digits that all entries share),
#
#   forward   -> inner [pairs, P]: <G_i, G_j>, G centred as the estimator asks (double-centred for
#                biased; U-centred, with a zero diagonal, for unbiased), for the pairs (i, j) that
#                lie flat in `pairs`; 0 for problems of fewer than 2 (biased) or 4 (unbiased) valid
#                rows. Of a layer with itself it is exactly 0 where it vanishes up to rounding: not
#                above 2 eps n' times the sum of squares that it is a difference of.
#                unit [layers, P].
#                means [P, d] of each layer, flat, one layer after the other, and kept: what a
#                backend's own backward needs, in its own form and of this size; both empty without
#                `keep`. kept is, by side, "gram" the double-centred G [layers, P, n, n], "feature"
#                the products X_i^T X_j [P, d_i, d_j] of centred features of each pair, one after
#                the other, "tiles" the sums [layers, P, n] of the rows of G (rbf), or their
#                diagonal (linear), up to units and the order of rows.
#   backward  grad_inner [pairs, P], of any strides -> the gradients of the layers `wanted`, each in
#             its dtype, contiguous, units held constant. 0 in rows that are dropped, and in
#             problems with too few.
#
# inner, unit, means, kept are float32, float64 for float64. `bandwidths` has one σ per layer (0:
# the default), or is empty for linear kernels. The last layers may have their G from an earlier
# call, in `grams` [some, P, n, n] (side "gram" alone): their features are not read and they get no
# gradient; unit, means and kept leave them out.
#
# The sides: "gram" keeps n x n matrices, "feature" d x d ones, "tiles" makes the Gram matrices tile
# by tile, in backward too, and keeps neither.


def _fake_forward(
    layers: list[Tensor],
    grams: Tensor | None,
    mask: Tensor | None,
    pairs: list[int],
    bandwidths: list[float],
    side: str,
    unbiased: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    first = layers[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    problems, n = first.shape[:2]
    made = layers if grams is None else layers[: -grams.shape[0]]
    if side == "gram":
        kept = len(made) * problems * n * n
    elif side == "feature":
        kept = problems * sum(
            layers[i].shape[-1] * layers[j].shape[-1] for i, j in pair_indices(pairs)
        )
    else:
        kept = len(made) * problems * n
    means = problems * sum(x.shape[-1] for x in made)
    if not keep:  # no product with a bool: PyTorch 2.11 refuses it of symbolic sizes
        means = kept = 0
    shapes = ([len(pairs) // 2, problems], [len(made), problems], [means], [kept])
    return tuple(first.new_empty(shape, dtype=dtype) for shape in shapes)


def _fake_backward(*inputs: Any) -> list[Tensor]:
    layers, wanted = inputs[4], inputs[-1]
    return [layers[i].new_empty(layers[i].shape) for i in wanted]


_INPUTS = (
    "Tensor[] layers, Tensor? grams, Tensor? mask, int[] pairs, float[] bandwidths, str side, "
    "bool unbiased"
)
_FORWARD = library.define(
    "cka_forward", f"({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor, Tensor)", _fake_forward
)
_BACKWARD = library.define(
    "cka_backward",
    "(Tensor grad_inner, Tensor unit, Tensor means, Tensor kept, "
    f"{_INPUTS}, int[] wanted) -> Tensor[]",
    _fake_backward,
)


# Gram matrices of up to so many rows are kept for backward; larger ones are made again.
MOST_KEPT_ROWS = 1024
# Fewer problems than this leave a GPU idle unless each is divided further.
MANY_PROBLEMS = 128


def side_for(
    backend: str, problems: int, n: int, widths: Sequence[int], pairs: Sequence[int], kernel: str
) -> str:
    """Which side a kernel backend takes; see above."""
    if kernel == "rbf":
        return "tiles"
    if cheaper_side(n, widths, pairs) == "feature":
        return "feature"
    if n > MOST_KEPT_ROWS:
        return "tiles"
    if backend == "cpp":  # bound by multiplications: none is done twice
        return "gram"
    # Bound by memory: features are read again rather than Gram matrices written and read, where
    # each is compared with one other alone.
    cross = [layer for i, j in pair_indices(pairs) if i != j for layer in (i, j)]
    alone = len(set(cross)) == len(cross)
    return "tiles" if alone and n <= 512 and problems * len(cross) >= MANY_PROBLEMS else "gram"


class _Inner(torch.autograd.Function):
    """inner [pairs, P] and unit [layers, P], which is constant in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        operator: str,
        backend: str,
        pairs: list[int],
        bandwidths: list[float],
        side: str,
        unbiased: bool,
        mask: Tensor | None,
        grams: Tensor | None,
        *layers: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.operator, ctx.backend = operator, backend
        ctx.options = (pairs, bandwidths, side, unbiased)
        keep = any(ctx.needs_input_grad)
        inner, unit, means, kept = _FORWARD[backend](
            list(layers), grams, mask, pairs, bandwidths, side, unbiased, keep
        )
        if keep:
            saved = [mask, grams, unit, means, kept, *layers]
            ctx.save_for_backward(*dispatch.kept(ctx, saved))
        ctx.mark_non_differentiable(unit)
        return inner, unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        mask, grams, unit, means, kept, *layers = dispatch.restored(ctx)
        needs = ctx.needs_input_grad[-len(layers) :]
        wanted = [i for i, needed in enumerate(needs) if needed]
        with torch.no_grad():
            made = _BACKWARD[ctx.backend](
                grad, unit, means, kept, layers, grams, mask, *ctx.options, wanted
            )
        gradients: list[Tensor | None] = [None] * len(layers)
        for i, gradient in zip(wanted, made, strict=True):
            gradients[i] = gradient
        return (None,) * 8 + tuple(dispatch.first_derivatives(ctx.operator, gradients, layers))


def _terms(
    operator: str,
    backend: str,
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    cross: list[tuple[int, int]],
    *,
    own: bool = True,
    mask: Tensor | None,
    kernel: str,
    bandwidth: Bandwidth,
    estimator: str,
    teacher_grad: bool = False,
    terms_t: dict[str, Any] | None = None,
    side: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inner products [pairs, P] of the pairs `cross`, those of each layer with itself [L_s, P] and
    [L_t, P] (unless not `own`), and all units [L_s + L_t, P]."""
    problems, n = math.prod(layers_s[0].shape[:-2]), layers_s[0].shape[-2]
    many_s, many_t = len(layers_s), len(layers_t)
    if not teacher_grad:
        layers_t = [x.detach() for x in layers_t]
    layers = [x if x.stride(-1) == 1 else x.contiguous() for x in (*layers_s, *layers_t)]
    layers = [x.reshape(problems, n, x.shape[-1]) for x in layers]
    if torch.compiler.is_compiling():  # refuses one tensor in two places
        layers = dispatch.distinct(layers)
    mask = None if mask is None else mask.reshape(problems, n)
    bandwidths: list[float] = []
    if kernel == "rbf":
        sigma_s, sigma_t = bandwidth if isinstance(bandwidth, tuple) else (bandwidth, bandwidth)
        bandwidths = [sigma_s or 0.0] * many_s + [sigma_t or 0.0] * many_t
    unbiased = estimator == "unbiased"
    selves = [(i, i) for i in range(len(layers))] if own else []
    pairs = [i for pair in (*cross, *selves) for i in pair]
    if side is None:
        side = side_for(backend, problems, n, [x.shape[-1] for x in layers], pairs, kernel)

    grams = own_t = None
    if terms_t is not None:
        key = f"{backend} {side} {layers[-1].dtype}"  # one call only may promote the teacher
        if key not in terms_t:
            # The teacher alone, whose layers count from 0. What is made in inference mode could not
            # serve a later call with gradients.
            with torch.no_grad() if torch.compiler.is_compiling() else torch.inference_mode(False):
                known, _, _, kept = _FORWARD[backend](
                    layers[many_s:], None, mask, [i for j in range(many_t) for i in (j, j)],
                    bandwidths[many_s:], side, unbiased, side == "gram",
                )  # fmt: skip
            shape = (many_t, problems, n, n)
            terms_t[key] = (known, kept.view(shape) if side == "gram" else None)
        own_t, grams = terms_t[key]
        pairs = pairs[: 2 * (len(cross) + many_s)]
    inner, unit = _Inner.apply(
        operator, backend, pairs, bandwidths, side, unbiased, mask, grams, *layers
    )
    sizes = [len(cross), many_s if own else 0, many_t if own and own_t is None else 0]
    between, own_s, found = inner.split(sizes)
    return between, own_s, found if own_t is None else own_t, unit


def _serve_hsic(backend: str, *, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    inner, _, _, unit = _terms(
        "hsic", backend, [x], [y], [(0, 1)], own=False, teacher_grad=True, **options
    )
    factor = _normaliser(x.shape[-2], options["mask"], options["estimator"], unit.dtype)
    return (inner[0] * unit[0] * factor * unit[1]).reshape(x.shape[:-2])


def _serve_cka(
    operator: str, backend: str, *, x_s: Tensor | list[Tensor], x_t: Tensor | list[Tensor],
    **options: Any,
) -> Tensor:  # fmt: skip
    layers_s, layers_t = (x if isinstance(x, list) else [x] for x in (x_s, x_t))
    many = len(layers_s)
    cross = [(i, many + i) for i in range(many)]
    if operator == "gram_distance":
        options["estimator"] = "biased"
    inner, own_s, own_t, _ = _terms(operator, backend, layers_s, layers_t, cross, **options)
    value = ratio(inner, own_s, own_t)
    if operator == "gram_distance":
        value = (2 - 2 * value).masked_fill(own_s * own_t <= 0, 0.0)
    value = value.reshape(many, *layers_s[0].shape[:-2])
    return value if isinstance(x_s, list) else value[0]


def _serve_matrix(
    operator: str,
    backend: str,
    *,
    layers_s: list[Tensor],
    layers_t: list[Tensor],
    **options: Any,
) -> Any:
    many_s, many_t = len(layers_s), len(layers_t)
    cross = [(i, many_s + j) for i in range(many_s) for j in range(many_t)]
    inner, own_s, own_t, unit = _terms(operator, backend, layers_s, layers_t, cross, **options)
    leading = layers_s[0].shape[:-2]
    inner = inner.view(many_s, many_t, -1)
    if operator == "cka_matrix":
        value = ratio(inner, own_s.unsqueeze(1), own_t)
        return value.permute(2, 0, 1).reshape(*leading, many_s, many_t)
    unit_s, unit_t = unit.split([many_s, many_t])
    factor = _normaliser(layers_s[0].shape[-2], options["mask"], options["estimator"], unit.dtype)
    terms = (
        inner * unit_s.unsqueeze(1) * factor * unit_t,
        own_s * unit_s * factor * unit_s,
        own_t * unit_t * factor * unit_t,
    )
    return tuple(x.movedim(-1, 0).reshape(*leading, *x.shape[:-1]) for x in terms)


def _normaliser(n: int, mask: Tensor | None, estimator: str, dtype: torch.dtype) -> Any:
    """What turns <G_i, G_j> into HSIC: a number, or [P] with a mask; problems with too few valid
    rows have inner products of 0."""
    if mask is None:
        return 1 / (n - 1) ** 2 if estimator == "biased" else 1 / (n * (n - 3))
    rows = mask.sum(-1).reshape(-1)
    factor = (rows - 1).square() if estimator == "biased" else rows * (rows - 3)
    return factor.clamp(min=1).to(dtype).reciprocal()


def _refused_by_cuda(operator: str, arguments: dict[str, Any]) -> str | None:
    """What csrc/cuda, which keeps a problem's Gram matrices on chip, leaves to triton."""
    layers_s, layers_t = (x if isinstance(x, list) else [x] for x in list(arguments.values())[:2])
    layers = [*layers_s, *layers_t]
    first, n, many = layers[0], layers[0].shape[-2], len(layers_s)
    if first.dtype not in (torch.bfloat16, torch.float16):
        return f"{first.dtype} is not bfloat16 or float16"
    if layers[-1].dtype != first.dtype:
        return f"a teacher in {layers[-1].dtype} and a student in {first.dtype}"
    if arguments["kernel"] != "linear":
        return "kernel='rbf' is left to triton"
    if n > 128:
        return f"there are {n} rows, more than 128"
    if first.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(first.device)
        if major < 8:
            return (
                f"{first.device} has compute capability {major}.{minor}; cuda serves 8.0 and later"
            )
    cross = [(i, many + i) for i in range(many)]
    if operator.endswith("matrix"):
        cross = [(i, many + j) for i in range(many) for j in range(len(layers_t))]
        if max(many, len(layers_t)) > 200:
            return f"there are {max(many, len(layers_t))} layers, more than 200"
    own = [] if operator == "hsic" else [(i, i) for i in range(len(layers))]
    pairs = [i for pair in (*cross, *own) for i in pair]
    widths = [x.shape[-1] for x in layers]
    if side_for("cuda", math.prod(first.shape[:-2]), n, widths, pairs, "linear") == "feature":
        return f"{n} rows of width {max(widths)} are cheaper by d x d products, left to triton"
    return None


def _kernel(operator: str, backend: str) -> dispatch.Kernel:
    def load() -> Callable[..., Any]:
        library.load(backend, "cka", ["cka_forward", "cka_backward"])
        if operator == "hsic":
            return functools.partial(_serve_hsic, backend)
        serve = _serve_matrix if operator.endswith("matrix") else _serve_cka
        return functools.partial(serve, operator, backend)

    def refuses(**arguments: Any) -> str | None:
        first = next(iter(arguments.values()))
        reason = library.refuses(backend, first[0] if isinstance(first, list) else first)
        if reason is None and backend == "cuda":
            reason = _refused_by_cuda(operator, arguments)
        return reason

    return dispatch.Kernel(load, refuses)


for _backend in library.KERNEL_BACKENDS:
    for _operator in ("hsic", "hsic_matrix", "cka", "cka_matrix", "gram_distance"):
        dispatch.KERNELS[_operator, _backend] = _kernel(_operator, _backend)
