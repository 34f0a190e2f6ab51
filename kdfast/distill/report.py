"""Tables and plots of a run, made from its results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import LogLocator, NullFormatter

from kdfast.distill.grouped import ENTITY_F1, NDCG, RECIPROCAL_RANK
from kdfast.distill.run_directory import write_text
from kdfast.distill.significance import LEVEL, differences

# Column, how it is shown, and whether it is a share (shown in percent).
COLUMNS = {
    NDCG: ("nDCG@10", False),
    RECIPROCAL_RANK: ("MRR@10", False),
    ENTITY_F1: ("entity F1 %", True),
    "matthews": ("Matthews", False),
    "f1": ("F1 %", True),
    "accuracy": ("accuracy %", True),
    "pearson": ("Pearson", False),
    "spearman": ("Spearman", False),
    "agreement": ("agreement with teacher %", True),
    "kl_to_teacher": ("KL to teacher", False),
    "mse_to_teacher": ("squared difference to teacher", False),
    "cosine_to_teacher": ("cosine to teacher", False),
    "cka_to_teacher": ("CKA to teacher", False),
}


def columns_of(results: dict[str, Any]) -> list[str]:
    """What all students were measured by and a table shows: first the primary one, then COLUMNS,
    each with what the further test parts say ("mismatched_accuracy")."""
    students, primary = results["students"], results["primary"]
    measured = [m for m in students[0] if all(m in record for record in students)]
    found = [m for c in COLUMNS for m in measured if m == c or m.endswith(f"_{c}")]
    return list(dict.fromkeys([primary, *found]))


def shown(measure: str) -> tuple[str, bool]:
    """Title of a measure's column, and whether it is a share."""
    plain = _plain(measure) or measure
    title, share = COLUMNS.get(plain, (plain.replace("_", " "), False))
    return (title if plain == measure else f"{title} ({measure[: -len(plain) - 1]})"), share


def _plain(measure: str) -> str | None:
    """The measure without the name of a further test part."""
    if measure in COLUMNS:
        return measure
    return next((c for c in COLUMNS if measure.endswith(f"_{c}")), None)


def write_report(run_dir: Path, results: dict[str, Any], results_file: str) -> str:
    """Write the plots, results.md and, last, the JSON; returns the table."""
    results["comparison"] = compare(run_dir, results)
    text = markdown(results)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    drawn = [
        _plot_scores(plots, results),
        _plot_losses(plots, results),
        _plot_alignment(plots, results),
        plot_projection(plots, results),
    ]
    write_text(run_dir / "results.md", f"# {results['title']}\n\n{text}\n\n{images(drawn)}\n")
    write_text(run_dir / results_file, json.dumps(results, indent=1))
    return text


def images(plots: Sequence[Path | None]) -> str:
    return "\n\n".join(f"![{p.stem.replace('_', ' ')}](plots/{p.name})" for p in plots if p)


def ways_of(results: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    ways: dict[str, list[dict[str, Any]]] = {}
    for record in results["students"]:
        ways.setdefault(record["way"], []).append(record)
    return ways


def compare(run_dir: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Each way less the reference way (soft_labels, else the first)."""
    ways = list(ways_of(results))
    if len(ways) < 2:
        return {}
    reference = "soft_labels" if "soft_labels" in ways else ways[0]
    references = {way: reference for way in ways if way != reference}
    return {
        "reference": reference,
        "differences": differences(run_dir, results, columns_of(results), references),
    }


def markdown(results: dict[str, Any]) -> str:
    ways = ways_of(results)
    lines = [f"{name}: {text}" for name, text in results["setting"].items()]
    seeds = len(next(iter(ways.values())))
    lines += ["", scores_table(results), ""]
    lines.append(
        f"Mean ± standard deviation over {seeds} seeds."
        if seeds > 1
        else "One seed: no spread over seeds is known."
    )
    lines.append(about_cka(results))
    if parts := parts_table(results):
        lines += ["", "Parts of a step, % of its time (first seed):", "", parts]
    comparison = results.get("comparison")
    if comparison:
        reference = comparison["reference"].replace("_", " ")
        lines += ["", f"Differences to {reference} ± standard error:", ""]
        lines.append(differences_table(results, columns_of(results)))
        lines += ["", about_differences(seeds > 1, columns_of(results))]
    return "\n".join(lines)


def parts_table(results: dict[str, Any]) -> str:
    """Where the time of a step goes, a row a way; empty where nobody looked."""
    found = {
        way: record["parts"]
        for way, records in ways_of(results).items()
        for record in records
        if record.get("parts")
    }
    rows = [
        [way.replace("_", " "), *(f"{100 * s / sum(parts.values()):.1f}" for s in parts.values())]
        for way, parts in found.items()
    ]
    return table(["", *next(iter(found.values()))], rows) if rows else ""


def about_cka(results: dict[str, Any]) -> str:
    return (
        f"CKA is the unbiased estimate over {results['cka_rows']} of {results['cka_sentences']} "
        "test sentences, mean over uniformly mapped layers."
    )


def about_differences(seeds: bool, measures: Sequence[str] = ()) -> str:
    """measures: of the table, which say what was drawn and tested."""
    drawn = "queries" if NDCG in measures else "sentences"
    alone = "CKA" if ENTITY_F1 in measures else "CKA, F1 and correlations"
    return (
        f"A difference is marked noise where a paired t test gives p ≥ {LEVEL:g}, corrected for "
        "the number of ways (Holm). Standard error and test count "
        + (f"test {drawn} and seeds." if seeds else f"test {drawn} alone (one seed).")
        + (f" Those of {alone} count seeds alone." if seeds else "")
    )


def scores_table(results: dict[str, Any], *, count_seeds: bool = False) -> str:
    """A row a way: mean ± standard deviation over its seeds; TF-IDF first, the teacher last."""
    columns = columns_of(results)
    counted = ["seeds"] if count_seeds else []
    header = ["", *(shown(c)[0] for c in columns), *counted, "parameters", "trained", "ms / step"]
    blank = [""] * len(counted)
    rows = []
    if results["tfidf"]:
        rows.append(
            ["TF-IDF + linear model", *_single(results["tfidf"], columns), *blank, *[""] * 3]
        )
    for way, records in ways_of(results).items():
        rows.append(
            [
                way.replace("_", " "),
                *(_mean_sd([r[c] for r in records], shown(c)[1]) for c in columns),
                *([str(len(records))] if count_seeds else []),
                f"{records[0]['parameters'] / 1e6:.1f} M",
                f"{records[0]['trained_parameters'] / 1e6:.1f} M",
                _milliseconds([r["milliseconds_per_step"] for r in records]),
            ]
        )
    teacher = results["teacher"]
    size = f"{teacher['parameters'] / 1e6:.1f} M"
    rows.append(["teacher", *_single(teacher, columns), *blank, size, "", ""])
    return table(header, rows)


def differences_table(results: dict[str, Any], columns: Sequence[str]) -> str:
    found = results["comparison"]["differences"]
    compared = [c for c in columns if any(c in d for d in found.values())]
    return table(
        ["", *(shown(c)[0] for c in compared)],
        [
            [way.replace("_", " "), *(difference(d.get(c), c) for c in compared)]
            for way, d in found.items()
        ],
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Markdown; the first `left` columns are aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return f"| {' | '.join(aligned)} |"

    rule = (
        "|"
        + "|".join("-" * (w + 2) if i < left else "-" * (w + 1) + ":" for i, w in enumerate(widths))
        + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def value(number: float, column: str) -> str:
    return f"{100 * number:.1f}" if shown(column)[1] else f"{number:.3f}"


def _single(values: dict[str, float], columns: Sequence[str]) -> list[str]:
    return [value(values[c], c) if c in values else "" for c in columns]


def _mean_sd(values: Sequence[float], percent: bool) -> str:
    scale, digits = (100, 1) if percent else (1, 3)
    mean = scale * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {scale * statistics.stdev(values):.{digits}f}"


def _milliseconds(medians: Sequence[float | None]) -> str:
    known = [m for m in medians if m is not None]
    return f"{statistics.median(known):.0f}" if known else ""


def difference(entry: dict[str, Any] | None, column: str) -> str:
    if entry is None:
        return ""
    text = difference_value(entry, column)
    return f"{text} (noise)" if entry["noise"] else text


def difference_value(entry: dict[str, Any], column: str) -> str:
    scale, digits = (100, 1) if shown(column)[1] else (1, 3)
    found, error = scale * entry["difference"], scale * entry["standard_error"]
    return f"{found:+.{digits}f} ± {error:.{digits}f}"


# Plots


def _plot_scores(folder: Path, results: dict[str, Any]) -> Path:
    ways = ways_of(results)
    columns = columns_of(results)
    figure, axes = plt.subplots(
        1, len(columns), figsize=(3.1 * len(columns), 3.2), layout="constrained", squeeze=False
    )
    for axis, column in zip(axes[0], columns, strict=True):
        scale = 100 if shown(column)[1] else 1
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
        axis.set_title(shown(column)[0], fontsize=10)
    return finish(figure, folder / "scores.png")


def _plot_losses(folder: Path, results: dict[str, Any]) -> Path | None:
    ways = {w: r for w, r in ways_of(results).items() if r[0]["log"]}
    if not ways:
        return None
    figure, axes = plt.subplots(
        1, len(ways), figsize=(4.2 * len(ways), 3.4), squeeze=False, layout="constrained"
    )
    for axis, (way, records) in zip(axes[0], ways.items(), strict=True):
        # A stage logs its own terms.
        terms = list(dict.fromkeys(k for e in records[0]["log"] for k in e if k[:5] == "loss_"))
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
    return finish(figure, folder / "losses.png")


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
        image = heat_map(axis, matrix)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("teacher layer (0: embeddings)", fontsize=8)
    axes[0].set_ylabel("student layer", fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=list(axes), label="unbiased CKA")
    return finish(figure, folder / "cka.png")


def plot_projection(folder: Path, results: dict[str, Any]) -> Path | None:
    ways = {w: r for w, r in ways_of(results).items() if r[0]["projection_weights"]}
    if not ways:
        return None
    figure, axes = plt.subplots(
        1, len(ways), figsize=(4.2 * len(ways), 2.6), squeeze=False, layout="constrained"
    )
    for axis, (way, records) in zip(axes[0], ways.items(), strict=True):
        matrix = torch.tensor([r["projection_weights"] for r in records]).mean(0)
        image = weight_map(axis, matrix)
        axis.set_title(f"{way.replace('_', ' ')}: layer-projection weights", fontsize=10)
        figure.colorbar(image, ax=axis)
    return finish(figure, folder / "projection_weights.png")


def heat_map(axis: Any, matrix: Sequence[Sequence[float]]) -> Any:
    """CKA between layers [S + 1, T + 1], the embeddings first, with its numbers."""
    image = axis.imshow(matrix, vmin=0, vmax=1, origin="lower", aspect="auto", cmap="viridis")
    for i, row in enumerate(matrix):
        for j, number in enumerate(row):
            axis.text(
                j, i, f"{number:.2f}", ha="center", va="center", fontsize=6,
                color="white" if number < 0.6 else "black",
            )  # fmt: skip
    axis.set_xticks(range(len(matrix[0])))
    axis.set_yticks(range(len(matrix)))
    return image


def weight_map(axis: Any, matrix: torch.Tensor) -> Any:
    """Weights of a layer projection [L_s, L_t], from layer 1 on."""
    image = axis.imshow(matrix, vmin=0, origin="lower", aspect="auto", cmap="viridis")
    axis.set_xticks(range(matrix.shape[1]), range(1, matrix.shape[1] + 1))
    axis.set_yticks(range(matrix.shape[0]), range(1, matrix.shape[0] + 1))
    axis.set_xlabel("teacher layer")
    axis.set_ylabel("student layer")
    return image


def finish(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
