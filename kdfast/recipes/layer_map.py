"""Which student layer learns from which teacher layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdfast.captured import ModelShape
from kdfast.errors import InputError, nearest

# (student layer, teacher layer), counted from 1; hidden_states has layer i at index i.
LayerMap = tuple[tuple[int, int], ...]

STRATEGIES = {
    "uniform": "student i from teacher i·T/S rounded half up (12 → 6: 2, 4, ..., 12)",
    "skip": "as uniform without the last pair, as PKD does (12 → 6: 2, 4, ..., 10)",
    "last": "the last S teacher layers",
    "first": "the first S teacher layers",
}


def layer_map(strategy: Any, student: ModelShape, teacher: ModelShape) -> LayerMap:
    """The pairs that a strategy name or an explicit list [[student, teacher], ...] stands for.

    Raises InputError for an unknown strategy, a layer out of range, too few layers, or a pair that
    is there twice.
    """
    s, t = student.layers, teacher.layers
    if isinstance(strategy, str):
        if strategy not in STRATEGIES:
            raise InputError(
                f"layer_map '{strategy}' is unknown{nearest(strategy, STRATEGIES)}: it must be one "
                f"of {', '.join(STRATEGIES)}, or a list of [student, teacher] pairs"
            )
        if strategy in ("last", "first"):
            if s > t:
                raise InputError(
                    f"layer_map '{strategy}' needs at least as many teacher layers as student "
                    f"layers, was {s} student and {t} teacher layers"
                )
            offset = t - s if strategy == "last" else 0
            return tuple((i, i + offset) for i in range(1, s + 1))
        pairs = tuple((i, max(1, (2 * i * t + s) // (2 * s))) for i in range(1, s + 1))
        if strategy == "skip":
            if s < 2:
                raise InputError("layer_map 'skip' leaves the last pair out and needs 2 layers")
            return pairs[:-1]
        return pairs
    if (
        not isinstance(strategy, Sequence)
        or not strategy
        or not all(
            isinstance(pair, Sequence)
            and len(pair) == 2
            and all(type(layer) is int for layer in pair)
            for pair in strategy
        )
    ):
        raise InputError(
            f"layer_map must be one of {', '.join(STRATEGIES)}, or a list of [student, teacher] "
            f"pairs of layer numbers, was {strategy!r}"
        )
    for i, j in strategy:
        for role, layer, layers in (("student", i, s), ("teacher", j, t)):
            if not 1 <= layer <= layers:
                raise InputError(
                    f"layer_map names {role} layer {layer}; the {role} has layers 1 to {layers}"
                )
    pairs = tuple((i, j) for i, j in strategy)
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise InputError(f"layer_map names the pair {list(pair)} twice: name each pair once")
    return pairs
