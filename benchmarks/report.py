"""Tables and plots of results, made from their JSON alone."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.benchmarks.harness import ratios, wrong_rows
from kdfast.errors import InputError

BASELINES = ("eager", "compile", "flash", "eager best", "compile best", "loop", "cka loop")
PLOTS = ("ratios", "bound", "memory")
# Of every run, whatever its revision.
ALWAYS = ("time", "complete", "device", "machine", "versions")
BUSY = 0.1  # share of the CPUs that other work may take before the report says so
COLOURS = {
    "kdfast cuda": "C0",
    "kdfast triton": "C9",
    "kdfast cpp": "C0",
    "kdfast reference": "C7",
    "eager": "C1",
    "compile": "C2",
    "flash": "C3",
    "eager best": "C4",
    "compile best": "C5",
    "loop": "C6",
    "cka loop": "C8",
}


def read_json(path: Path) -> dict[str, Any]:
    """The results of `kdfast bench --json`; InputError for a file that holds none."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: should be the JSON of `kdfast bench --json`; {error}") from error
    if not isinstance(results, dict) or results.get("schema") != 1 or "rows" not in results:
        raise InputError(f"{path}: should be the JSON of `kdfast bench --json`, schema 1")
    if missing := [key for key in ALWAYS if key not in results]:
        raise InputError(
            f"{path}: has no {', '.join(missing)}, should have {', '.join(ALWAYS)}, as the JSON of "
            "`kdfast bench --json`"
        )
    return results


def read_runs(paths: Sequence[Path]) -> dict[str, Any]:
    """The results of several runs as one, whose setting is the first one's.

    Raises: InputError for runs of different machines, devices, versions or revisions of the code,
    whose times must not stand side by side, and for a row that two of them have.
    """
    first, *others = runs = [read_json(path) for path in paths]
    for path, run in zip(paths[1:], others, strict=True):
        if any(run.get(key) != first.get(key) for key in ("kind", "suite")) or "kind" in run:
            raise InputError(
                f"--from: {paths[0]} and {path} cannot be shown together: one holds a comparison "
                "of revisions, or they are of different suites"
            )
        for key in ("machine", "device", "versions", "code"):
            if run.get(key) != first.get(key):  # older files do not say their code
                what = [
                    f"{p} is of {_words(r.get(key, f'unknown {key}'))}"
                    for p, r in ((paths[0], first), (path, run))
                ]
                raise InputError(f"{'; '.join(what)}: results of one {key} only are shown together")
    rows = [row for run in runs for row in run["rows"]]
    names = [f"{row.get('operator', '')} {row['name']}".strip() for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"--from: two files have the row {twice[0]}; give one of them")
    complete = all(run["complete"] for run in runs)
    return first | {"rows": rows, "complete": complete}


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {x}" for key, x in value.items() if x is not None)
    return str(value)


def files_of(folder: Path, operators: Sequence[str]) -> list[Path]:
    """What a report may write, so that it can be known beforehand whether something is there."""
    return [folder / "report.md"] + [folder / f"{o}_{p}.png" for o in operators for p in PLOTS]


def write_report(folder: Path, results: dict[str, Any]) -> None:
    """Write report.md and the plots; without matplotlib there are no plots."""
    folder.mkdir(parents=True, exist_ok=True)
    operators = list(dict.fromkeys(row["operator"] for row in results["rows"]))
    images: dict[str, list[Path]] = {}
    if importlib.util.find_spec("matplotlib"):
        images = {operator: plots(folder, operator, results) for operator in operators}
    text = markdown(results, {o: [file.name for file in made] for o, made in images.items()})
    partial = folder / "report.md.partial"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, folder / "report.md")


def write_suite(folder: Path, module: Any, results: dict[str, Any]) -> None:
    """Write what a suite's FILES name: its plots, where matplotlib is, then its table."""
    folder.mkdir(parents=True, exist_ok=True)
    made = module.plot(folder, results) if importlib.util.find_spec("matplotlib") else []
    partial = folder / f"{module.FILES[0]}.partial"
    partial.write_text(suite_text(module, results, made), encoding="utf-8")
    os.replace(partial, folder / module.FILES[0])


def suite_text(module: Any, results: dict[str, Any], made: Sequence[Path]) -> str:
    """What the first of a suite's FILES holds; made: its plots."""
    text = [f"# {module.TITLE}", "", *setting(results), "", module.markdown(results), ""]
    text += [f"![{file.stem}]({file.name})" for file in made]
    return "\n".join(text) + "\n"


def ours(row: dict[str, Any]) -> list[str]:
    """The kdfast variants that were timed: kernels, or the reference where there is none."""
    timed = [n for n, v in row["variants"].items() if n.startswith("kdfast") and v["seconds"]]
    return [name for name in timed if name != "kdfast reference"] or timed


def _fastest(row: dict[str, Any]) -> str:
    return min(ours(row), key=lambda name: statistics.median(row["variants"][name]["seconds"]))


# Tables


def markdown(results: dict[str, Any], images: dict[str, list[str]] | None = None) -> str:
    lines = ["# Benchmarks", "", *setting(results), "", *wrong(results)]
    if not results["complete"]:
        lines += ["The run was not finished: rows are missing.", ""]
    for operator in dict.fromkeys(row["operator"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["operator"] == operator]
        lines += [f"## {operator}", "", times(rows), "", *skipped(rows)]
        lines += ["Errors against float64:", "", _errors(rows), ""]
        if memory := _memory(rows):
            lines += [
                "Peak memory beyond inputs / beyond inputs and gradients, MB:",
                "",
                memory,
                "",
            ]
        lines += [f"![{name}]({name})" for name in (images or {}).get(operator, [])] + [""]
    lines += [
        "Ratios are medians over rounds of (time of the baseline / time of kdfast) in the same "
        "round, with the middle half's ends. The bound is the larger of bytes, products and (on "
        "CUDA) exponentials over the ceilings above; a pass cannot be faster. A backward alone is "
        "of rows that are not reduced. Caches are cold.",
        "",
    ]
    return "\n".join(lines)


def wrong(results: dict[str, Any]) -> list[str]:
    """Lines that name wrong outputs of operators, and an empty one; none where all are right."""
    found = [f"- {text}" for text in wrong_rows(results)]
    return ["**Wrong outputs:**", "", *found, ""] if found else []


def skipped(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Likewise the rows that were not run, each with its reason."""
    found = [f"- {row['name']}: {row['skipped']}" for row in rows if row.get("skipped")]
    return [*found, ""] if found else []


def setting(results: dict[str, Any]) -> list[str]:
    """Where, with what and when it was measured; where it is known, what that machine can do."""
    machine, ceilings = results["machine"], results.get("ceilings")
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items() if v)
    cpu = f"{machine['cpu']}, {machine['threads']} threads, {machine['allocator']} allocator"
    device = machine["gpu"] or cpu
    code = f"; code {results['code']}" if results.get("code") else ""
    lines = [f"{device}; {versions}{code}; {results['time'][:10]}."]
    if ceilings:
        found = [f"copy {ceilings['bytes'] / 1e9:,.0f} GB/s"]
        found += [f"{dtype} {x / 1e12:,.3g} TFLOP/s" for dtype, x in ceilings["flops"].items()]
        if ceilings["exponentials"]:
            found.append(f"{ceilings['exponentials'] / 1e12:,.3g} T exponentials/s")
        lines += ["", f"Ceilings: {', '.join(found)}."]
    others = max((row.get("others") or 0 for row in results["rows"]), default=0)
    if others > BUSY:
        share = f"{100 * others:.0f} %"
        lines += ["", f"**The machine was busy with {share} other work in the worst row.**"]
    return lines


def times(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row and backend of kdfast: against every baseline and the bound."""
    baselines = [b for b in BASELINES if any(b in row["variants"] for row in rows)]
    header = ["row", "kdfast", "ms", *(f"vs {b}" for b in baselines), "of bound", "bound by"]
    body = []
    for row in rows:
        for name in ours(row):
            seconds = statistics.median(row["variants"][name]["seconds"])
            body.append(
                [
                    row["name"],
                    name.removeprefix("kdfast "),
                    milliseconds(seconds),
                    *(_ratio(row, name, baseline) for baseline in baselines),
                    f"{100 * row['bound']['seconds'] / seconds:.0f} %",
                    row["bound"]["by"],
                ]
            )
    return _table(header, body)


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def _ratio(row: dict[str, Any], name: str, baseline: str) -> str:
    if baseline not in row["variants"]:
        return ""
    if reason := row["variants"][baseline]["skipped"]:
        return reason if len(reason) < 20 else "failed"
    found = ratios(row, name, baseline)
    if found is None:
        return ""
    return f"{found[0]:.2f} ({found[1]:.2f}-{found[2]:.2f})"


def _errors(rows: Sequence[dict[str, Any]]) -> str:
    header = ["row", "variant", "loss", "gradients"]
    body = []
    for row in rows:
        for name, variant in row["variants"].items():
            if variant["error"] is None:
                continue
            loss, *gradients = variant["error"].values()
            found = " ".join(f"{x:.1e}" for x in gradients)
            body.append([row["name"], name.removeprefix("kdfast "), f"{loss:.1e}", found])
    return _table(header, body)


def _memory(rows: Sequence[dict[str, Any]]) -> str:
    def cell(variant: dict[str, Any]) -> str:
        if variant.get("memory"):
            return " / ".join(f"{x / 1e6:,.0f}" for x in variant["memory"].values())
        return variant.get("memory_skipped") or ""

    rows = [row for row in rows if any(map(cell, row["variants"].values()))]
    tried = (name for row in rows for name, v in row["variants"].items() if cell(v))
    names = list(dict.fromkeys(tried))
    header = ["row", *(name.removeprefix("kdfast ") for name in names)]
    body = [[row["name"], *(cell(row["variants"].get(n, {})) for n in names)] for row in rows]
    return _table(header, body)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            c.rjust(w) if i > 1 else c.ljust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = (
        "|" + "|".join("-" * (w + 1) + (":" if i > 1 else "-") for i, w in enumerate(widths)) + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


# Plots


def plots(folder: Path, operator: str, results: dict[str, Any]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, and none may be there
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["operator"] == operator and ours(row)]
    if not rows:
        return []
    labels = [row["name"] for row in rows]
    figures: dict[str, Any] = {}

    # Ratios: the fastest of ours in each row, against each baseline.
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.5 * len(rows)), layout="constrained")
    best = [_fastest(row) for row in rows]
    baselines = [b for b in BASELINES if any(b in row["variants"] for row in rows)]
    height = 0.8 / max(len(baselines), 1)
    for k, baseline in enumerate(baselines):
        found = [ratios(row, name, baseline) for row, name in zip(rows, best, strict=True)]
        at = [i + (k - (len(baselines) - 1) / 2) * height for i, x in enumerate(found) if x]
        middle = [x[0] for x in found if x]
        spread = [[x[0] - x[1] for x in found if x], [x[2] - x[0] for x in found if x]]
        axis.barh(at, middle, height, xerr=spread, color=COLOURS[baseline], label=f"vs {baseline}")
        for y, value, above in zip(at, middle, spread[1], strict=True):
            axis.annotate(f" {value:.1f}", (value + above, y), va="center", fontsize=7)
    axis.axvline(1, color="0.3", lw=1)
    axis.set_xlabel(f"{operator}, fastest backend: time of the baseline / time")
    axis.legend(fontsize=8)
    figures["ratios"] = figure, axis

    # Fraction of the bound, all variants.
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.6 * len(rows)), layout="constrained")
    names = list(dict.fromkeys(name for row in rows for name in [*ours(row), *baselines]))
    height = 0.8 / len(names)
    for k, name in enumerate(names):
        timed = [
            (i, row["bound"]["seconds"] / statistics.median(row["variants"][name]["seconds"]))
            for i, row in enumerate(rows)
            if row["variants"].get(name, {}).get("seconds")
        ]
        at = [i + (k - (len(names) - 1) / 2) * height for i, _ in timed]
        axis.barh(at, [100 * x for _, x in timed], height, label=name, color=COLOURS[name])
    axis.set_xlabel(f"% of the bound reached: {operator}")
    axis.legend(fontsize=8)
    figures["bound"] = figure, axis

    for _, axis in figures.values():
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.invert_yaxis()

    # Memory per token against N: flat where memory is linear in N.
    plain = [row for row in rows if not row["options"] and row["pass"] == "forward+backward"]
    plain = [
        row
        for row in plain
        if row["dtype"] == plain[0]["dtype"] and row["shape"].get("d") == plain[0]["shape"].get("d")
    ]
    curves: dict[str, list[tuple[int, float]]] = {}
    for name in names:
        points = sorted(
            (row["shape"]["N"], memory["beyond_inputs"] / (row["shape"]["B"] * row["shape"]["N"]))
            for row in plain
            if (memory := (row["variants"].get(name) or {}).get("memory"))
        )
        if len(points) > 1:
            curves[name] = points
    if curves:
        figure, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
        for name, points in curves.items():
            lengths, values = zip(*points, strict=True)
            shown = [max(value, 1) / 1e3 for value in values]
            axis.loglog(lengths, shown, "o-", color=COLOURS[name], label=name)
        ticks = sorted({row["shape"]["N"] for row in plain})
        axis.set_xticks(ticks, [str(t) for t in ticks])
        axis.minorticks_off()
        top = max(v for points in curves.values() for _, v in points)
        axis.set_ylim(top=10 ** math.ceil(math.log10(max(top, 10) / 1e3) + 0.2))
        axis.set_xlabel("N")
        axis.set_ylabel("peak memory beyond inputs, kB per token")
        axis.set_title(f"{operator}, {plain[0]['dtype']}, forward + backward", fontsize=9)
        axis.legend(fontsize=8)
        figures["memory"] = figure, axis

    made = []
    for kind, (figure, _) in figures.items():
        made.append(folder / f"{operator}_{kind}.png")
        figure.savefig(made[-1], dpi=130)
        plt.close(figure)
    return made
