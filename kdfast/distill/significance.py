"""Differences between ways of distilling, tested over test sentences and seeds.

d[k, i] is what way A measures on sentence i with seed k, less what its reference does. Sentences
and seeds are crossed, each drawn from more of their kind, so with S seeds and n sentences

    SE² = var_i(mean_k d) / n + var_k(mean_i d) / S

t = mean(d) / SE has Satterthwaite's degrees of freedom, SE⁴ / Σ v²/(m − 1) over the two parts v of
m values each. The sum counts the interaction twice, so the test errs to the side of caution. Words
of a sentence and candidates of a query are no independent draws: sentences and queries are drawn as
wholes there, which makes F1 of entities, too, a mean over sentences (grouped.ratio_by_group). What
is no mean over sentences (a correlation, F1 of classes, CKA) has the second part alone, d being one
value a seed. p-values are two-sided; Holm's correction takes all ways of a table as one family.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from scipy import stats

from kdfast.distill.grouped import (
    ENTITY_F1,
    entity_counts,
    mean_by_group,
    ranking,
    ratio_by_group,
)

LEVEL = 0.05


def differences(
    run_dir: Path, results: dict[str, Any], measures: Sequence[str], references: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """{way: {"reference", "seeds", measure: its test}} on the seeds that both ways have.

    references: way to the way that it is compared with.
    """
    teacher = load_file(run_dir / "teacher_predictions.safetensors")
    students: dict[str, dict[int, dict[str, Any]]] = {}
    for record in results["students"]:
        path = run_dir / "students" / record["way"] / f"seed-{record['seed']}.safetensors"
        each = {m: torch.tensor(record[m]) for m in measures if m in record}
        predictions = load_file(path)
        own = per_sentence(predictions, teacher)
        each |= {m: value for m, value in own.items() if m in each}
        students.setdefault(record["way"], {})[record["seed"]] = each
    found: dict[str, dict[str, Any]] = {}
    for way, reference in references.items():
        seeds = [seed for seed in students[way] if seed in students[reference]]
        found[way] = {"reference": reference, "seeds": seeds}
        for m in measures:
            pairs = [(students[way][k], students[reference][k]) for k in seeds]
            if pairs and all(m in s for pair in pairs for s in pair):
                tested = test(torch.stack([a[m] - b[m] for a, b in pairs]).double())
                if tested is not None:
                    found[way][m] = tested
    for m in measures:
        tests = [entry[m] for entry in found.values() if m in entry]
        for entry, p in zip(tests, holm(entry["p"] for entry in tests), strict=True):
            entry |= {"p_holm": p, "noise": p >= LEVEL}
    return found


def per_sentence(
    student: dict[str, torch.Tensor], teacher: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What can be told of each sentence, [sentences] each, from outputs [sentences, C].

    With `groups` (see Predictions) of each sentence of words, or of each query: nDCG@10 and MRR@10
    of those that can be ranked, the others of all.
    """
    own, theirs = student["logits"], teacher["logits"]
    groups = student.get("groups")
    found = {}
    if own.shape == theirs.shape:
        log_s, log_t = own.log_softmax(-1), theirs.log_softmax(-1)
        found = {
            "agreement": (own.argmax(-1) == theirs.argmax(-1)).float(),
            "kl_to_teacher": (log_t.exp() * (log_t - log_s)).sum(-1),
            "mse_to_teacher": (own - theirs).square().mean(-1),
            "cosine_to_teacher": torch.cosine_similarity(own, theirs),
        }
    if not student["labels"].is_floating_point():
        found["accuracy"] = (own.argmax(-1) == student["labels"]).float()
    if groups is None:
        return found
    found = {name: mean_by_group(values, groups) for name, values in found.items()}
    if student["labels"].is_floating_point():
        found |= ranking(own[:, 0], student["labels"], groups)
    elif "tags" in student:
        counts = entity_counts(student["tags"], own.argmax(-1), student["labels"], groups)
        found[ENTITY_F1] = ratio_by_group(2 * counts[:, 0], counts[:, 1] + counts[:, 2])
    return found


def test(d: torch.Tensor) -> dict[str, Any] | None:
    """The test of d, [seeds, sentences] or [seeds]; None where no error can be estimated."""
    sentences = d.shape[1] if d.dim() == 2 else 0
    parts: list[tuple[float, int]] = []
    if sentences > 1:
        parts.append((float(d.mean(0).var()) / sentences, sentences - 1))
    if len(d) > 1:
        over_seeds = d.mean(1) if sentences else d
        parts.append((float(over_seeds.var()) / len(d), len(d) - 1))
    if not parts:
        return None
    mean, variance = float(d.mean()), sum(v for v, _ in parts)
    error = math.sqrt(variance)
    if error == 0:
        freedom, p, reach = float(parts[-1][1]), float(mean == 0), 0.0
    else:
        freedom = variance**2 / sum(v**2 / m for v, m in parts)
        p = float(2 * stats.t.sf(abs(mean) / error, freedom))
        reach = float(stats.t.ppf(1 - LEVEL / 2, freedom)) * error
    return {
        "difference": mean,
        "standard_error": error,
        "degrees_of_freedom": freedom,
        "interval": [mean - reach, mean + reach],
        "p": p,
    }


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's correction: the k-th smallest of m is multiplied by m − k + 1, in rising order."""
    p = list(p_values)
    corrected, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, p[place] * (len(p) - rank)))
        corrected[place] = highest
    return corrected
