"""Orthogonal Procrustes distance: `procrustes_distance`."""

from __future__ import annotations

from torch import Tensor

from kdfast.ops import dispatch
from kdfast.ops.cka import Layers, _check_pairs, _device


def procrustes_distance(
    x_s: Layers,
    x_t: Layers,
    *,
    mask: Tensor | None = None,
    teacher_grad: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Squared orthogonal Procrustes distance of student and teacher features of the same rows.

    min over rotations R of ‖X - Y R‖² = 2 - 2 ‖XᵀY‖_*, X and Y being the centred valid rows over
    their Frobenius norms (the narrower one thought padded with zeros) and ‖·‖_* the sum of singular
    values: 0 for features that agree up to rotation, scale and offset, 2 for unrelated ones of many
    more rows than dimensions; squared, since the distance itself has an infinite gradient where the
    two agree. Unlike CKA it does not hang on the few directions of largest variance alone. 0 with
    zero gradient where a side has no norm (equal rows; too few valid rows under a mask); NaN in a
    valid row gives NaN in its problem.

    The gradient is that of ‖XᵀY‖_* = ⟨XᵀY, Q⟩ with the best rotation Q held constant: right for
    singular values that are equal, and where some are zero the smallest of the subgradients.

    Args:
        x_s: [..., n, d_s], n >= 2; leading dimensions are independent problems. Or a sequence of
            such tensors, one per layer pair, of the same rows; widths may differ between layers.
        x_t: [..., n, d_t], or as many of them; d_t may differ from d_s, and their dtype from the
            student's.
        mask: [..., n], bool or 0/1, 1 = the row takes part. Masked rows are dropped before
            centring.
        teacher_grad: give x_t a gradient too. By default an x_t that requires grad is refused.
        backend: "auto" | "reference". It is a composition of library calls on every device. Of the
            forward and backward of one problem of n = 4096, d = 768 on a CPU thread the SVD alone
            takes 39 %; of those of 192 problems of n = 128, d = 768, the SVD takes 13 % and the QR
            before it 23 %. An SVD on a GPU waits for the device.

    Returns:
        [...], for sequences [pairs, ...]; float32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError: an argument is not as above, or n is too small; the message names it.
        RuntimeError: a backend asked for by name cannot serve the call; second derivatives.

    Source:
        Schönemann, "A generalized solution of the orthogonal Procrustes problem", Psychometrika
        1966; as a distance of representations Ding et al., "Grounding representation similarity
        through statistical testing", NeurIPS 2021.
    """
    op = "procrustes_distance"
    checked = _check_pairs(op, x_s, x_t, mask, "linear", None, "biased", teacher_grad)
    options = {name: checked[name] for name in ("x_s", "x_t", "mask", "teacher_grad")}
    value: Tensor = dispatch.run(op, backend, _device(options["x_s"]), **options)
    return value
