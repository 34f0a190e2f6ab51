"""What must be known of a batch, found where it is made; on a GPU, asking would wait for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from kdfast.distill.data import NO_LABEL
from kdfast.recipes.terms import check_relevance

TEACHER = "teacher_"
MASKS = ("attention_mask", "teacher_attention_mask")
# [B, N] of texts of N tokens.
TOKENS = (
    *("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask"),
    "labels",
)
# A batch's key for the masks, by name, that leave tokens out: a frozenset, which those who move
# batches to a device leave alone.
PADDED_MASKS = "kdfast_padded_masks"
# Of the teacher's inputs: whether its mask does.
PADDED = "kdfast_padded"


class PaddingCollator:
    """Any collator whose batches also say which of their masks leave tokens out.

    relevance: labels are those of a reranker; InputError for one beyond [0, 1].
    cut: columns at the end that a mask leaves out in all rows are cut (of texts padded beforehand),
    from that model's inputs of TOKENS and its labels [B, N]; nothing is cut where anything else has
    that shape. N stays a multiple of the collator's pad_to_multiple_of, and that of both models the
    same if it was.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        *,
        relevance: bool = False,
        cut: bool = False,
    ) -> None:
        self.collate = collate
        self.relevance = relevance
        self.cut = cut
        self.multiple = getattr(collate, "pad_to_multiple_of", None) or 1

    def __call__(self, rows: list[Any]) -> Any:
        batch = self.collate(rows)
        if not isinstance(batch, Mapping):
            return batch
        masks = _masks(batch)
        if any(mask.device.type != "cpu" for mask in masks.values()):
            return batch
        if self.relevance and isinstance(labels := batch.get("labels"), torch.Tensor):
            check_relevance(labels)
        if self.cut:
            batch = _cut(batch, self.multiple)
        padded = frozenset(name for name, mask in _masks(batch).items() if not mask.all())
        return {**batch, PADDED_MASKS: padded}


def _masks(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: batch[name] for name in MASKS if isinstance(batch.get(name), torch.Tensor)}


def _cut(batch: Mapping[str, Any], multiple: int) -> Mapping[str, Any]:
    masks = _masks(batch)
    widths: dict[int, int] = {}
    tensors = {column: x for column, x in batch.items() if isinstance(x, torch.Tensor)}
    sides = {
        name: {
            c: x for c, x in tensors.items() if c.startswith(TEACHER) == name.startswith(TEACHER)
        }
        for name in masks
    }
    if sum(map(len, sides.values())) < len(tensors):  # one model's inputs have no mask
        return batch
    for name, mask in masks.items():
        # What stands along the dimensions of others is not known.
        others = [x for c, x in sides[name].items() if c.removeprefix(TEACHER) not in TOKENS]
        if mask.dim() != 2 or not mask.numel():
            return batch
        if any(x.dim() > 2 or x.shape == mask.shape for x in others):
            return batch
        read = mask.bool().any(0)
        labels = sides[name].get("labels")
        if labels is not None and labels.shape == mask.shape:
            read |= (labels != NO_LABEL).any(0)
        last = int((read * torch.arange(1, len(read) + 1)).max())
        width = min(len(read), multiple * math.ceil(max(1, last) / multiple))
        # Losses that compare by position want widths that were equal to stay so.
        widths[len(read)] = max(width, widths.get(len(read), 0))
    cut = dict(batch)
    for name, mask in masks.items():
        for column, x in sides[name].items():
            if x.shape == mask.shape:  # labels of whole texts are not
                cut[column] = x[:, : widths[mask.shape[1]]].contiguous()
    return cut
