"""The run's table and plots, made from its results alone."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter
from safetensors.torch import load_file

# Column, how it is shown, and whether it is a share (shown in percent).
COLUMNS = {
    "accuracy": ("accuracy %", True),
    "pearson": ("Pearson", False),
    "spearman": ("Spearman", False),
    "agreement": ("agreement with teacher %", True),
    "kl_to_teacher": ("KL to teacher", False),
    "mse_to_teacher": ("squared difference to teacher", False),
    "cka_to_teacher": ("CKA to teacher", False),
}
# No value of one sentence: their standard error counts seeds alone.
OVER_ALL_SENTENCES = ("pearson", "spearman", "cka_to_teacher")
PER_SENTENCE = ("accuracy", "agreement", "kl_to_teacher", "mse_to_teacher")


def write_report(run_dir: Path, results: dict[str, Any], results_file: str) -> str:
    """Write the plots, results.md and, last, the JSON; returns the table."""
    results["comparison"] = compare(run_dir, results)
    table = markdown(results)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    shown = [
        _plot_scores(plots, results),
        _plot_losses(plots, results),
        _plot_alignment(plots, results),
        _plot_projection(plots, results),
    ]
    images = "\n\n".join(f"![{p.stem.replace('_', ' ')}](plots/{p.name})" for p in shown if p)
    _replace(run_dir / "results.md", f"# {results['title']}\n\n{table}\n\n{images}\n")
    _replace(run_dir / results_file, json.dumps(results, indent=1))
    return table


def ways_of(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in results["students"]:
        ways.setdefault(record["way"], []).append(record)
    return ways


def compare(run_dir: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Each way less the reference way (soft_labels, else the first), seed by seed.

    The standard error of a difference d counts test sentences and seeds:
    √(var over sentences of the seed mean / n + var over seeds of the mean / S).
    """
    ways = ways_of(results)
    reference = "soft_labels" if "soft_labels" in ways else next(iter(ways))
    if len(ways) < 2:
        return {}
    teacher = load_file(run_dir / "teacher_predictions.safetensors")
    sentences = {
        way: torch.stack([_per_sentence(run_dir, r, teacher, results) for r in records])
        for way, records in ways.items()
    }  # [seeds, measures, sentences]
    measures = [m for m in PER_SENTENCE if m in results["students"][0]]
    differences: dict[str, dict[str, Any]] = {}
    for way in ways:
        if way == reference:
            continue
        difference = sentences[way] - sentences[reference]
        seeds, _, n = difference.shape
        mean = difference.mean((0, 2))
        variance = difference.mean(0).var(-1) / n
        if seeds > 1:
            variance = variance + difference.mean(-1).var(0) / seeds
        differences[way] = {
            measure: {
                "difference": float(mean[k]),
                "standard_error": float(variance[k].sqrt()),
                "noise": bool(mean[k].abs() <= 2 * variance[k].sqrt()),
            }
            for k, measure in enumerate(measures)
        }
        for measure in OVER_ALL_SENTENCES:
            if seeds == 1 or measure not in results["students"][0]:
                continue
            each = torch.tensor(
                [a[measure] - b[measure] for a, b in zip(ways[way], ways[reference], strict=True)]
            )
            error = float(each.std() / math.sqrt(seeds))
            differences[way][measure] = {
                "difference": float(each.mean()),
                "standard_error": error,
                "noise": bool(each.mean().abs() <= 2 * error),
            }
    return {"reference": reference, "differences": differences}


def _per_sentence(
    run_dir: Path, record: dict[str, Any], teacher: dict[str, Any], results: dict[str, Any]
) -> torch.Tensor:
    """[measures, sentences] of one student, in the order of PER_SENTENCE."""
    path = run_dir / "students" / record["way"] / f"seed-{record['seed']}.safetensors"
    student = load_file(path)
    if results["regression"]:
        return (student["logits"] - teacher["logits"]).square().mean(-1)[None]
    chosen = student["logits"].argmax(-1)
    log_s, log_t = student["logits"].log_softmax(-1), teacher["logits"].log_softmax(-1)
    return torch.stack(
        [
            (chosen == student["labels"]).float(),
            (chosen == teacher["logits"].argmax(-1)).float(),
            (log_t.exp() * (log_t - log_s)).sum(-1),
        ]
    )


def markdown(results: dict[str, Any]) -> str:
    ways = ways_of(results)
    columns = [c for c in COLUMNS if c in results["students"][0]]
    header = ["", *(COLUMNS[c][0] for c in columns), "parameters", "trained", "ms / step"]
    rows = []
    if results["tfidf"]:
        rows.append(["TF-IDF + linear model", *_single(results["tfidf"], columns), "", "", ""])
    for way, records in ways.items():
        rows.append(
            [
                way.replace("_", " "),
                *(_mean_sd([r[c] for r in records], COLUMNS[c][1]) for c in columns),
                f"{records[0]['parameters'] / 1e6:.1f} M",
                f"{records[0]['trained_parameters'] / 1e6:.1f} M",
                _milliseconds([r["milliseconds_per_step"] for r in records]),
            ]
        )
    teacher = results["teacher"]
    size = f"{teacher['parameters'] / 1e6:.1f} M"
    rows.append(["teacher", *_single(teacher, columns), size, "", ""])
    lines = [f"{name}: {text}" for name, text in results["setting"].items()]
    seeds = len(next(iter(ways.values())))
    lines += ["", _table(header, rows), ""]
    lines.append(
        f"Mean ± standard deviation over {seeds} seeds."
        if seeds > 1
        else "One seed: no spread over seeds is known."
    )
    lines.append(
        f"CKA is the unbiased estimate over {results['cka_rows']} of "
        f"{results['cka_sentences']} test sentences, mean over uniformly mapped layers."
    )
    comparison = results.get("comparison")
    if comparison:
        reference = comparison["reference"].replace("_", " ")
        lines += ["", f"Differences to {reference} ± standard error:", ""]
        compared = [c for c in columns if any(c in d for d in comparison["differences"].values())]
        lines.append(
            _table(
                ["", *(COLUMNS[c][0] for c in compared)],
                [
                    [way.replace("_", " "), *(_difference(d.get(c), c) for c in compared)]
                    for way, d in comparison["differences"].items()
                ],
            )
        )
        lines += [
            "",
            "A difference below two standard errors is marked noise. The standard error counts "
            + ("test sentences and seeds." if seeds > 1 else "test sentences alone (one seed).")
            + (" That of CKA and of correlations counts seeds alone." if seeds > 1 else ""),
        ]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join([first, *rest])} |"

    rule = (
        "|"
        + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _single(values: dict[str, float], columns: Sequence[str]) -> list[str]:
    return [
        "" if c not in values else f"{100 * values[c]:.1f}" if COLUMNS[c][1] else f"{values[c]:.3f}"
        for c in columns
    ]


def _mean_sd(values: Sequence[float], percent: bool) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    mean = scale * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {scale * statistics.stdev(values):.{digits}f}"


def _milliseconds(medians: Sequence[float | None]) -> str:
    known = [m for m in medians if m is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def _difference(entry: dict[str, Any] | None, column: str) -> str:
    if entry is None:
        return ""
    scale, digits = (100, 1) if COLUMNS[column][1] else (1, 3)
    text = (
        f"{scale * entry['difference']:+.{digits}f} ± {scale * entry['standard_error']:.{digits}f}"
    )
    return f"{text} (noise)" if entry["noise"] else text


# Plots


def _plot_scores(folder: Path, results: dict[str, Any]) -> Path:
    ways = ways_of(results)
    columns = [c for c in COLUMNS if c in results["students"][0]]
    figure, axes = plt.subplots(
        1, len(columns), figsize=(3.1 * len(columns), 3.2), layout="constrained"
    )
    for axis, column in zip(axes, columns, strict=True):
        scale = 100 if COLUMNS[column][1] else 1
        for k, records in enumerate(ways.values()):
            values = [scale * r[column] for r in records]
            axis.plot([k] * len(values), values, "o", alpha=0.5, color=f"C{k}")
            axis.plot([k - 0.25, k + 0.25], [statistics.mean(values)] * 2, color=f"C{k}")
        if column in results["teacher"]:
            axis.axhline(scale * results["teacher"][column], color="0.5", ls="--", lw=1)
            axis.annotate(
                "teacher",
                (1, scale * results["teacher"][column]),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="top",
                color="0.5",
                fontsize=8,
            )
        axis.set_xticks(
            range(len(ways)), [w.replace("_", " ") for w in ways], rotation=25, ha="right"
        )
        axis.set_xlim(-0.6, len(ways) - 0.4)
        axis.set_title(COLUMNS[column][0], fontsize=10)
    return _finish(figure, folder / "scores.png")


def _plot_losses(folder: Path, results: dict[str, Any]) -> Path | None:
    ways = {w: r for w, r in ways_of(results).items() if r[0]["log"]}
    if not ways:
        return None
    figure, axes = plt.subplots(
        1, len(ways), figsize=(4.2 * len(ways), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (way, records) in zip(axes[0], ways.items(), strict=True):
        terms = [k for k in records[0]["log"][0] if k.startswith("loss_")]
        for k, term in enumerate(terms):
            for record in records:
                log = [e for e in record["log"] if term in e]
                axis.plot(
                    [e["step"] for e in log],
                    [e[term] for e in log],
                    color=f"C{k}",
                    alpha=0.7,
                    lw=1.2,
                    label=term.removeprefix("loss_").replace("_", " ")
                    if record is records[0]
                    else None,
                )
        values = [e[t] for r in records for e in r["log"] for t in terms if t in e]
        if min(values) > 0 and max(values) > 8 * min(values):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_title(way.replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("loss term, unweighted")
    return _finish(figure, folder / "losses.png")


def _plot_alignment(folder: Path, results: dict[str, Any]) -> Path:
    ways = ways_of(results)
    panels = [("before", next(iter(ways.values()))[0]["cka_before"])]
    panels += [
        (way.replace("_", " "), torch.tensor([r["cka_after"] for r in records]).mean(0).tolist())
        for way, records in ways.items()
    ]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.0 * len(panels) + 0.6, 3.0), layout="constrained"
    )
    image = None
    for axis, (title, matrix) in zip(axes, panels, strict=True):
        image = axis.imshow(matrix, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
        for i, row in enumerate(matrix):
            for j, value in enumerate(row):
                axis.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=6,
                    color="white" if value < 0.6 else "black",
                )  # fmt: skip
        axis.set_xticks(range(len(matrix[0])))
        axis.set_yticks(range(len(matrix)))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("teacher layer (0: embeddings)", fontsize=8)
    axes[0].set_ylabel("student layer", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(axes), label="unbiased CKA")
    return _finish(figure, folder / "cka.png")


def _plot_projection(folder: Path, results: dict[str, Any]) -> Path | None:
    ways = {w: r for w, r in ways_of(results).items() if r[0]["projection_weights"]}
    if not ways:
        return None
    figure, axes = plt.subplots(
        1, len(ways), figsize=(4.2 * len(ways), 2.6), squeeze=False, layout="constrained"
    )
    for axis, (way, records) in zip(axes[0], ways.items(), strict=True):
        matrix = torch.tensor([r["projection_weights"] for r in records]).mean(0)
        image = axis.imshow(matrix, vmin=0, origin="lower", aspect="auto", cmap="viridis")
        axis.set_xticks(range(matrix.shape[1]), range(1, matrix.shape[1] + 1))
        axis.set_yticks(range(matrix.shape[0]), range(1, matrix.shape[0] + 1))
        axis.set_xlabel("teacher layer")
        axis.set_ylabel("student layer")
        axis.set_title(f"{way.replace('_', ' ')}: layer-projection weights", fontsize=10)
        figure.colorbar(image, ax=axis)
    return _finish(figure, folder / "projection_weights.png")


def _finish(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
