"""`hsic`, `cka` and `cka_matrix`: kernel alignment, batched over problems and layer pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kdfast.ops import arguments, dispatch
from kdfast.reference.cka import MINIMUM_ROWS

KERNELS = ("linear", "rbf")


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    backend: str = "auto",
) -> Tensor:
    """Hilbert-Schmidt independence criterion of two sets of features of the same rows.

    Biased ⟨K_c, L_c⟩ / (n - 1)²; unbiased as Song et al., with 1 / (n (n - 3)), which may be
    negative and is never clamped. Both sides get gradients. Too few valid rows under a mask give 0
    with zero gradient; NaN in a valid row gives NaN.

    Args:
        x: [..., n, d_x]; leading dimensions are independent problems.
        y: [..., n, d_y]; d_y may differ from d_x.
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
    x_s: Tensor,
    x_t: Tensor,
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
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
        x_s: [..., n, d_s]; leading dimensions are independent problems.
        x_t: [..., n, d_t]; d_t may differ from d_s.
        mask: [..., n], bool or 0/1, 1 = the row takes part. Masked rows are dropped before
            centring: n is the number of valid rows.
        kernel: "linear" ⟨x_i, x_j⟩ or "rbf" exp(-‖x_i - x_j‖² / (2 σ²)).
        bandwidth: σ of "rbf" in the units of the features, or (σ_s, σ_t). None: σ² is the mean
            squared distance of two different valid rows, per problem and side, constant in
            backward.
        estimator: "biased" (n >= 2) or "unbiased" (n >= 4).
        teacher_grad: give x_t a gradient too. By default an x_t that requires grad is refused.
        backend: "auto" | "reference" | "cpp" | "triton" | "cuda". The reference of "rbf" keeps
            n x n matrices.

    Returns:
        [...], float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above, or n is too small; the message names it.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Kornblith et al., "Similarity of neural network representations revisited", ICML 2019,
        eq. 2-4; the unbiased ratio Nguyen et al., "Do wide and deep networks learn the same
        things?", ICLR 2021.
    """
    x_s, x_t, options = _check("cka", "x_s", x_s, "x_t", x_t, mask, kernel, bandwidth, estimator)
    arguments.no_teacher_grad("cka", [("x_t", x_t)], teacher_grad)
    options["teacher_grad"] = bool(teacher_grad)
    value: Tensor = dispatch.run("cka", backend, x_s.device, x_s=x_s, x_t=x_t, **options)
    return value


def cka_matrix(
    layers_s: Sequence[Tensor],
    layers_t: Sequence[Tensor],
    *,
    mask: Tensor | None = None,
    kernel: str = "linear",
    bandwidth: float | tuple[float, float] | None = None,
    estimator: str = "biased",
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """`cka` of every student layer with every teacher layer, each layer's own terms computed once.

    Args:
        layers_s: L_s tensors [..., n, d_i], never stacked; widths may differ between layers.
        layers_t: L_t tensors [..., n, d_j] of the same rows.
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
    layers_s = arguments.tensor_list(op, "layers_s", layers_s)
    layers_t = arguments.tensor_list(op, "layers_t", layers_t)
    names = [f"layers_s[{i}]" for i in range(len(layers_s))]
    names += [f"layers_t[{j}]" for j in range(len(layers_t))]
    layers = arguments.floating(op, zip(names, [*layers_s, *layers_t], strict=True))
    options = _check_options(op, names, layers, mask, kernel, bandwidth, estimator)
    teacher = list(zip(names, layers, strict=True))[len(layers_s) :]
    arguments.no_teacher_grad(op, teacher, teacher_grad)
    options["teacher_grad"] = bool(teacher_grad)
    matrix: Tensor = dispatch.run(
        op,
        backend,
        layers[0].device,
        layers_s=layers[: len(layers_s)],
        layers_t=layers[len(layers_s) :],
        **options,
    )
    return matrix


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
    x, y = arguments.floating(op, [(name_x, x), (name_y, y)])
    options = _check_options(op, [name_x, name_y], [x, y], mask, kernel, bandwidth, estimator)
    return x, y, options


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
    if bandwidth is not None:
        if kernel != "rbf":
            raise ValueError(
                f"{op}: bandwidth is {bandwidth!r}, should be None for kernel={kernel!r}"
            )
        if isinstance(bandwidth, (list, tuple)):
            if len(bandwidth) != 2:
                raise ValueError(f"{op}: bandwidth is {bandwidth!r}, should be a number or a pair")
            bandwidth = tuple(arguments.positive(op, "bandwidth", value) for value in bandwidth)
        else:
            bandwidth = arguments.positive(op, "bandwidth", bandwidth)
    mask = arguments.boolean_mask(op, "mask", mask, rows, "[..., n]", features[0].device)
    return {"mask": mask, "kernel": kernel, "bandwidth": bandwidth, "estimator": estimator}
