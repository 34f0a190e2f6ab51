"""Measures over rows that belong together: the candidates of a query, the words of a sentence.

Ranking (rerankers), of each query with at least two candidates and a relevant one:

    nDCG@10 = DCG / ideal DCG, DCG = Σ_{r ≤ 10} relevance_r / log2(1 + r)
    MRR@10 = 1 / rank of the first relevant candidate, 0 beyond 10

Entities (token classification with BIO tags): micro precision, recall and F1 of spans that agree in
both ends and type, as conlleval counts them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch

CUTOFF = 10
NDCG, RECIPROCAL_RANK = f"ndcg_at_{CUTOFF}", f"mrr_at_{CUTOFF}"
ENTITY_F1 = "entity_f1"


def lists(labels: torch.Tensor, queries: torch.Tensor) -> list[torch.Tensor]:
    """The rows of each query that can be ranked: two candidates at least, one of them relevant.

    labels: [n] relevance, above 0 relevant; one below 0 is no relevance, and nothing is ranked.
    queries: [n], equal for the candidates of one query. In the order of the queries' numbers.
    """
    if not len(labels) or labels.min() < 0:
        return []  # also where a row has no label
    _, counts = queries.unique(return_counts=True)
    rows = queries.argsort(stable=True).split(counts.tolist())
    return [each for each in rows if len(each) > 1 and labels[each].max() > 0]


def ranking(
    values: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor
) -> dict[str, torch.Tensor]:
    """nDCG@10 (linear gain, the mean over the orders of equal values) and reciprocal rank@10
    (relevant ones last among equal values), of each list that `lists` finds; {} without one.

    values: [n], what is ranked by. A list with a value that is no finite number gets NaN.
    """
    from sklearn.metrics import ndcg_score

    found: list[tuple[float, float]] = []
    for rows in lists(labels, queries):
        own, relevance = values[rows].double(), labels[rows].double()
        if not own.isfinite().all():
            found.append((torch.nan, torch.nan))
            continue
        ndcg = ndcg_score(relevance[None].numpy(), own[None].numpy(), k=CUTOFF)
        relevant = relevance > 0
        rank = 1 + int((own[~relevant] >= own[relevant].max()).sum())
        found.append((ndcg, 1 / rank if rank <= CUTOFF else 0.0))
    if not found:
        return {}
    return dict(zip((NDCG, RECIPROCAL_RANK), torch.tensor(found).double().T, strict=True))


def bio_tags(names: Sequence[str] | None) -> torch.Tensor | None:
    """[C]: 0 for the tag O, k for B- and −k for I- of the k-th type; None for other tags."""
    found = [re.fullmatch(r"O|([BI])-(.+)", name) for name in names or ()]
    if not found or not all(found):
        return None
    types = sorted({match[2] for match in found if match and match[2]})
    sign = {"B": 1, "I": -1}
    return torch.tensor([sign[m[1]] * (types.index(m[2]) + 1) if m and m[1] else 0 for m in found])


def entities(tags: np.ndarray, sentences: np.ndarray) -> dict[tuple[int, int, int], int]:
    """{(first word, words, type): sentence} of words [n], by `bio_tags`' numbers.

    One begins at B-, and at an I- that follows O, another type or the start of its sentence, and
    goes on over I- of its type.
    """
    types = np.abs(tags)
    before = np.where(np.diff(sentences, prepend=-1) == 0, np.roll(types, 1), 0)
    begins = (tags > 0) | ((tags < 0) & (types != before))
    first = np.flatnonzero(begins)
    lengths = np.bincount(begins.cumsum()[types > 0] - 1, minlength=len(first))
    spans = zip(first.tolist(), lengths.tolist(), types[first].tolist(), strict=True)
    return dict(zip(spans, sentences[first].tolist(), strict=True))


def entity_counts(
    tags: torch.Tensor, chosen: torch.Tensor, labels: torch.Tensor, sentences: torch.Tensor
) -> torch.Tensor:
    """[sentences, 3]: entities that are right, chosen, and there.

    tags: [C], see `bio_tags`. chosen, labels: [n] classes.
    """
    numbers, place = sentences.unique(return_inverse=True)
    own, true = (entities(tags[x].numpy(), place.numpy()) for x in (chosen, labels))
    return torch.stack(
        [
            torch.tensor(list(each), dtype=torch.long).bincount(minlength=len(numbers))
            for each in ([own[k] for k in own.keys() & true.keys()], own.values(), true.values())
        ],
        dim=1,
    ).double()


def entity_scores(counts: torch.Tensor) -> dict[str, float]:
    """Micro F1, precision and recall of `entity_counts`; 0 where undefined."""
    right, chosen, there = counts.sum(0).tolist()
    return {
        ENTITY_F1: 2 * right / max(1, chosen + there),
        "entity_precision": right / max(1, chosen),
        "entity_recall": right / max(1, there),
    }


def ratio_by_group(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """[groups]: values whose mean is Σ total / Σ count, and whose spread is that of the ratio.

    R + (total − R · count) / mean(count), the ratio's linearisation (delta method): groups are
    drawn as wholes, and what is counted in them is not independent.
    """
    ratio = total.sum() / count.sum().clamp(min=1)
    return ratio + (total - ratio * count) / count.mean().clamp(min=1 / len(count))


def mean_by_group(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """`ratio_by_group` of the mean over all rows of values [n]."""
    numbers, place = groups.unique(return_inverse=True)
    total = torch.zeros(len(numbers), dtype=torch.double).index_add(0, place, values.double())
    return ratio_by_group(total, place.bincount(minlength=len(numbers)).double())
