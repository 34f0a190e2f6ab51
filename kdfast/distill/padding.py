"""What must be known of a batch, found where it is made; on a GPU, asking would wait for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from kdfast.recipes.terms import check_relevance

MASKS = ("attention_mask", "teacher_attention_mask")
# A batch's key for the masks, by name, that leave tokens out: a frozenset, which those who move
# batches to a device leave alone.
PADDED_MASKS = "kdfast_padded_masks"
# Of the teacher's inputs: whether its mask does.
PADDED = "kdfast_padded"


class PaddingCollator:
    """Any collator whose batches also say which of their masks leave tokens out.

    relevance: labels are those of a reranker; InputError for one beyond [0, 1].
    """

    def __init__(self, collate: Callable[[list[Any]], Any], *, relevance: bool = False) -> None:
        self.collate = collate
        self.relevance = relevance

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        if not isinstance(batch, Mapping):
            return batch
        masks = {name: batch[name] for name in MASKS if isinstance(batch.get(name), torch.Tensor)}
        if any(mask.device.type != "cpu" for mask in masks.values()):
            return batch
        if self.relevance and isinstance(labels := batch.get("labels"), torch.Tensor):
            check_relevance(labels)
        padded = frozenset(name for name, mask in masks.items() if not mask.all())
        return {**batch, PADDED_MASKS: padded}
