"""The results in benchmarks/README.md, made from the committed JSON alone: `make report`.

Each folder of results/ is a machine: results.json of the operators, step.json and scale.json of the
suites, each with the plots that `kdfast bench --report` drew beside it; or it is what
`kdfast compare` left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kdfast.benchmarks import report, scaling, step
from kdfast.errors import InputError

BEGIN = "<!-- results: made by `make report`, not by hand -->"
END = "<!-- end of results -->"
# By file: the command that measured it, and its text.
PARTS: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    "results.json": ("Operators", "kdfast bench", lambda found: operators(found)),
    "step.json": ("Whole steps", "kdfast bench step", step.markdown),
    "scale.json": ("Growth", "kdfast bench scale", scaling.markdown),
}
# BERT-base to 6 layers: parameters of the student; features that a GPU hands out for a loss that
# couples the samples of the batch, at 256 samples of 128 tokens in half precision.
STUDENT = 66_956_546
FEATURES = 256 * 128 * 768 * 2


def text(results: Path) -> str:
    """All that lies between BEGIN and END."""
    lines = ["## Results", ""]
    lines += [
        "Everything here is made from the JSON under `results/` by `make report`; each table names "
        "its command, machine and versions. Ratios are medians over rounds of one run; absolute "
        "times of such machines vary from day to day. Of operators they say how many times faster "
        "kdfast is, of steps what its step costs over another's.",
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
            title, command, made = PARTS[name]
            found = report.read_json(file)
            command = found.get("command") or f"{command} --device {found['device']}"
            lines += [f"#### {title}: `{command}`", ""]
            lines += [*report.setting(found), ""]
            if not found["complete"]:
                lines += ["The run was not finished: rows are missing.", ""]
            lines += [made(found), ""]
            plots = _plots(folder, name)
            lines += [f"![{p.stem}]({p.relative_to(results.parent)})" for p in plots] + [""] * bool(
                plots
            )
    for folder in folders:
        if (folder / "comparison.md").is_file():
            title = (folder / "comparison.md").read_text(encoding="utf-8").split("\n", 1)[0]
            lines += [f"### {title.removeprefix('# ')}: `kdfast compare comparison`", ""]
            lines += [
                f"[The whole report]({folder.relative_to(results.parent)}/comparison.md).",
                "",
            ]
            plots = [folder / "plots" / f"{name}.png" for name in ("differences", "fidelity")]
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
    names = dict.fromkeys(row["operator"] for row in results["rows"])
    parts = []
    for name in names:
        rows = [
            row for row in results["rows"] if row["operator"] == name and not row.get("skipped")
        ]
        parts += [f"`{name}`", "", report.times(rows), ""]
    return "\n".join(parts[:-1])


def _plots(folder: Path, name: str) -> list[Path]:
    if name == "results.json":
        return sorted(folder.glob("*_ratios.png"))
    return [folder / x for x in {"step.json": step, "scale.json": scaling}[name].FILES[1:]
            if (folder / x).is_file()]  # fmt: skip


def _devices(folder: Path) -> set[str]:
    files = [folder / name for name in PARTS if (folder / name).is_file()]
    return {report.read_json(file)["device"] for file in files}


def draw(results: Path) -> None:
    """The tables and plots beside each JSON, anew."""
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if (folder / "results.json").is_file():
            report.write_report(folder, report.read_json(folder / "results.json"))
        for name, module in (("step.json", step), ("scale.json", scaling)):
            if (folder / name).is_file():
                report.write_suite(folder, module, report.read_json(folder / name))


def _eight_gpus() -> list[str]:
    """On paper: what several GPUs add to the step of one."""
    body = []
    for gpus, bandwidth, name in (
        (8, 450e9, "NVLink, 450 GB/s each way"),
        (8, 50e9, "a network, 50 GB/s"),
    ):
        cluster = scaling.Cluster(gpus=gpus, bandwidth=bandwidth)
        apart = scaling.step_on(cluster, 0.0, STUDENT)
        coupled = scaling.step_on(cluster, 0.0, STUDENT, FEATURES)
        body.append([f"{gpus}, {name}", "", f"{1e3 * apart:.2f}", f"{1e3 * coupled:.2f}"])
    table = report._table(
        ["GPUs", "", "losses of each sample, ms", "losses that couple samples, ms"], body
    )
    return [
        "### Eight GPUs, on paper",
        "",
        "What a step of each GPU's own batch takes longer on eight of them: BERT-base to 6 layers "
        f"({STUDENT / 1e6:.0f} M trained parameters, gradients of 4 bytes), 256 samples of 128 "
        "tokens a GPU. Assumed: gradients go round a ring and each is sent twice; four fifths of "
        "that hide behind the backward pass; a collective takes 20 µs besides; a loss that couples "
        "the samples of the batch (local structure, CKA over samples) hands each GPU's penultimate "
        "states, 50 MB in half precision, to all others and takes their gradients back, and waits "
        "for both; the teacher is not exchanged. Nothing of this was measured.",
        "",
        table,
        "",
    ]


def main(arguments: list[str]) -> int:
    """Write the results into README.md of the benchmarks' folder, and draw their plots; with
    --check only compare the text."""
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
        return int(found != readme.read_text(encoding="utf-8"))
    partial = readme.with_name("README.md.partial")
    partial.write_text(found, encoding="utf-8")
    os.replace(partial, readme)
    print(f"written: {readme}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
