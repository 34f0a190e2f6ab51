"""The results in benchmarks/README.md, made from the committed JSON alone: `make report`.

Each folder of results/ is a machine: results.json of the operators, step.json and scale.json of the
suites, each with the plots that `kdfast bench --report` drew beside it; or it is what
`make distill` or `kdfast compare` left.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from kdfast.benchmarks import report, scaling, step
from kdfast.errors import InputError

BEGIN = "<!-- results: made by `make report`, not by hand -->"
END = "<!-- end of results -->"
# By file: its title and its text.
PARTS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "results.json": ("Operators", lambda found: operators(found)),
    "step.json": ("Whole steps", lambda found: steps(found)),
    "scale.json": ("Growth", scaling.markdown),
}
# By name of the report on trained students: what makes it, and the plots that are shown.
OF_STUDENTS = {
    "quickstart": ("make distill", ("scores", "losses")),
    "comparison": ("kdfast compare comparison", ("differences", "fidelity")),
}
SUITES = {"step.json": step, "scale.json": scaling}
# BERT-base to 6 layers, 256 samples of 128 tokens a GPU. Its operations: 12·D² weights of a layer
# and attention, of the teacher forward, of the student forward and twice that backward.
JOB = scaling.Job(parameters=66_956_546, batch=256, length=128, width=768)
OPERATIONS = 256 * 128 * (2 * 12 * 768**2 + 4 * 128 * 768) * (12 + 3 * 6)


def text(results: Path) -> str:
    """All that lies between BEGIN and END."""
    lines = ["## Results", ""]
    lines += [
        "Everything here is made from the JSON under `results/` by `make report`; each table names "
        "its machine and versions, and its command where the JSON does. Ratios are medians over "
        "rounds of one run; absolute times of such machines vary from day to day. Of operators "
        "they say how many times faster kdfast is, of steps what its step costs over another's.",
        "",
    ]
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    for folder in folders:
        files = {name: folder / name for name in PARTS if (folder / name).is_file()}
        if not files:
            continue
        lines += [f"### {folder.name}", ""]
        _one_machine(files.values())
        for name, file in files.items():
            title, made = PARTS[name]
            found = report.read_json(file)
            if "command" in found:
                lines += [f"#### {title}: `{found['command']}`", ""]
            else:
                lines += [f"#### {title}", "", "Older results: they do not name their command.", ""]
            lines += [*report.setting(found), ""]
            if not found["complete"]:
                lines += ["The run was not finished: rows are missing.", ""]
            lines += [made(found), ""]
            plots = _plots(folder, name)
            lines += [f"![{p.stem}]({p.relative_to(results.parent)})" for p in plots] + [""] * bool(
                plots
            )
    for name, (command, shown) in OF_STUDENTS.items():
        for file in (folder / f"{name}.md" for folder in folders):
            if not file.is_file():
                continue
            title = file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
            lines += [f"### {title}: `{command}`", ""]
            lines += [f"[The whole report]({file.relative_to(results.parent)}).", ""]
            plots = [file.parent / "plots" / f"{plot}.png" for plot in shown]
            lines += [f"![{p.stem}]({p.relative_to(results.parent)})" for p in plots] + [""]
    if not any("cuda" in _devices(folder) for folder in folders):
        lines += ["### GPUs", "", "No GPU has run the suite yet: there is no figure to show.", ""]
    return "\n".join([*lines, *_eight_gpus()])


def _one_machine(files: Iterable[Path]) -> None:
    """InputError where what stands under one heading is of several machines."""
    said: dict[str, tuple[Any, str]] = {}  # older results say less of their machine
    for file in files:
        for key, value in report.read_json(file)["machine"].items():
            known, name = said.setdefault(key, (value, file.name))
            if value != known:
                raise InputError(
                    f"{file}: its {key} is {value!r}, that of {name} beside it {known!r}: results "
                    "of another machine go into a folder of their own"
                )


def operators(results: dict[str, Any]) -> str:
    """Each row and backend of kdfast, against every baseline."""
    parts = report.wrong(results)
    for name in dict.fromkeys(row["operator"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["operator"] == name]
        parts += [f"`{name}`", "", report.times(rows), "", *report.skipped(rows)]
    return "\n".join(parts[:-1])


def steps(results: dict[str, Any]) -> str:
    """The suite's tables, and how whole steps grow with length where three lengths were run."""
    text = step.markdown(results)
    if not (growth := _growth(results["rows"])):
        return text
    return (
        f"{text}\n\nGrowth of whole steps with length, all else alike: the slope of a line through "
        f"the logarithms, with its standard error.\n\n{growth}"
    )


def _growth(rows: list[dict[str, Any]]) -> str:
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        # Padded to the longest of a batch, sentences are not of one length.
        if row["skipped"] or row["tokens"] != row["shape"]["B"] * row["shape"]["N"]:
            continue
        name = f"{row['pair']} {row['method']} B{row['shape']['B']} {row['dtype']}"
        for variant, record in row["variants"].items():
            if record["seconds"]:
                point = row["shape"]["N"], statistics.median(record["seconds"])
                found.setdefault((name, variant), []).append(point)
    body = []
    for (name, variant), points in found.items():
        if len({length for length, _ in points}) < 3:
            continue
        lengths, times = zip(*sorted(points), strict=True)
        cells = [", ".join(map(str, lengths)), ", ".join(map(report.milliseconds, times))]
        body.append([name, variant, *cells, scaling._exponent(scaling.exponent(points))])
    return report._table(["steps", "variant", "lengths", "ms", "time grows by"], body)


def _plots(folder: Path, name: str) -> list[Path]:
    if name == "results.json":
        return sorted(folder.glob("*_ratios.png"))
    return [folder / x for x in SUITES[name].FILES[1:] if (folder / x).is_file()]


def _devices(folder: Path) -> set[str]:
    files = [folder / name for name in PARTS if (folder / name).is_file()]
    return {report.read_json(file)["device"] for file in files}


def draw(results: Path) -> None:
    """The tables and plots beside each JSON, anew."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if (folder / "results.json").is_file():
            report.write_report(folder, report.read_json(folder / "results.json"))
        for name, module in SUITES.items():
            if (folder / name).is_file():
                report.write_suite(folder, module, report.read_json(folder / name))


def beside(results: Path) -> dict[Path, str]:
    """What `draw` writes as text beside each JSON, but for its plots."""
    found = {}
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if (file := folder / "results.json").is_file():
            found[folder / "report.md"] = report.markdown(report.read_json(file))
        for name, module in SUITES.items():
            if (file := folder / name).is_file():
                text = report.suite_text(module, report.read_json(file), [])
                found[folder / module.FILES[0]] = text
    return found


def _without_plots(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else []
    return "".join(line for line in lines if not line.startswith("!["))


def _eight_gpus() -> list[str]:
    """On paper: what several GPUs add to the step of one."""
    cluster, coupled = scaling.Cluster(), replace(JOB, pairs=1)
    one = OPERATIONS / cluster.products
    body = []
    for bandwidth, link in ((450e9, "NVLink, 450 GB/s"), (50e9, "a network, 50 GB/s")):
        for job, losses in ((JOB, "of each sample"), (coupled, "and local structure")):
            for overlap, hidden in ((0.0, "nothing"), (1.0, "all")):
                on = replace(cluster, bandwidth=bandwidth, overlap=overlap)
                parts = scaling.longer(on, job)
                more = sum(parts.values())
                times = [*parts.values(), more, one + more]
                share = f"{100 * one / (one + more):.0f} %"
                body.append([link, losses, hidden, *(f"{1e3 * t:.1f}" for t in times), share])
    gpus, states = cluster.gpus, coupled.states / 1e6
    header = [
        "link, each way", "losses", "gradients hidden", "gradients, ms", "states, ms",
        "products, ms", "longer by, ms", "step, ms", f"throughput of {gpus} times one GPU's",
    ]  # fmt: skip
    return [
        "### Eight GPUs, on paper",
        "",
        "**A model of which nothing was measured**: neither a step of one such GPU, nor any of "
        f"{gpus}, nor a link.",
        "",
        f"Assumed: BERT-base to 6 layers, {JOB.batch} samples of {JOB.length} tokens a GPU, models "
        f"in bfloat16, so {JOB.size} bytes of each of {JOB.parameters / 1e6:.0f} M gradients and "
        "of each state (twice as many under autocast); matrix products at "
        f"{cluster.products / 1e12:.0f} TFLOP/s, 40 % of the peak of an H100 or H200; so a step "
        f"of one GPU of {1e3 * one:.0f} ms, {OPERATIONS / 1e12:.1f} T operations of both models at "
        f"that rate; collectives that reach {100 * cluster.reached:.0f} % of the link and take "
        f"{1e6 * cluster.latency:.0f} µs besides, gradients in buckets of "
        f"{JOB.bucket >> 20} MiB; of their exchange nothing or all hidden behind the backward "
        "pass, as the two ends. Left out: reading data, and waiting for the slowest.",
        "",
        "From the code: DistributedDataParallel sends the student's gradients round a ring. A loss "
        "that couples the samples of a batch (here the local structure of one layer pair) gathers "
        f"the states of student and teacher, {states:.0f} MB of each GPU and side, before it can "
        "begin; backward sends nothing more, for every GPU computes the loss of the whole batch "
        "and takes its own part of that gradient. So its products, 4·(GB)²·N·D on G GPUs, grow "
        f"with the square of their number, from {coupled.operations(1) / 1e12:.2f} to "
        f"{coupled.operations(gpus) / 1e12:.2f} T operations on each, and its states and their "
        f"gradient with the number, to {coupled.memory(gpus) / 1e9:.1f} GB on each.",
        "",
        report._table(header, body),
        "",
    ]


def main(arguments: list[str]) -> int:
    """Write the results into README.md of the benchmarks' folder, and the tables and plots beside
    the JSON; with --check only compare the texts, and name those that differ."""
    root = Path(arguments[0]) if arguments and not arguments[0].startswith("-") else None
    root = root or Path(__file__).resolve().parent
    readme = root / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    if not rest or not after:
        print(f"{readme} should hold the lines {BEGIN} and {END}", file=sys.stderr)
        return 2
    try:
        if "--check" not in arguments:
            draw(root / "results")  # first: the text shows what is there
        found = f"{before}{BEGIN}\n\n{text(root / 'results')}\n{END}{after}"
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if "--check" in arguments:
        stale = [file for file, made in beside(root / "results").items()
                 if made != _without_plots(file)]  # fmt: skip
        stale += [readme] * (found != readme.read_text(encoding="utf-8"))
        for file in stale:
            print(f"{file} is not what the JSON says: `make report`", file=sys.stderr)
        return int(bool(stale))
    partial = readme.with_name("README.md.partial")
    partial.write_text(found, encoding="utf-8")
    os.replace(partial, readme)
    print(f"written: {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
