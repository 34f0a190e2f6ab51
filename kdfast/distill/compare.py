"""Ways of distilling side by side: each tuned on the dev part, then trained for its seeds.

The order of a comparison is what makes it honest: first all trials of all ways, scored on the dev
part alone; then the students, one seed after the other, each scored on the test part once.
Everything finished is kept, so the same command goes on after an interruption; with further ways
or seeds in its configuration it trains what is missing.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from kdfast.distill import report
from kdfast.distill.config import CompareConfig, Way, dump_config
from kdfast.distill.fidelity import Predictions
from kdfast.distill.provenance import code_version, environment
from kdfast.distill.run import facts, source, start, teacher_predictions
from kdfast.distill.run_directory import read, say, write_text
from kdfast.distill.significance import LEVEL, differences
from kdfast.distill.student import Job, finish, line, one_student, trained

RESULTS_FILE = "comparison.json"
# In these a comparison may grow: what they say of a student is kept with it, and checked there.
FREE = (
    *("ways", "seeds", "reference", "tuning_seed", "most_seeds", "most_trials"),
    *("student", "training", "keep_students", "tfidf"),
)


def compare(config: CompareConfig, command: str | None = None) -> dict[str, Any]:
    """Run a comparison; returns what comparison.json holds.

    command: how it was called, for the record. Raises InputError for bad input, before any training
    and before anything is overwritten.
    """
    ways = config.chosen()
    job, tfidf = start(config, ways, results=RESULTS_FILE, free=FREE)
    clock = _Clock([way.label for way in ways for _ in (*way.trials, *way.seeds)])

    tuning = {way.label: _tune(job, way, clock) for way in ways if way.trials}
    chosen: list[Way] = []
    for way in ways:
        best = way.trials[tuning[way.label]["chosen"]] if way.trials else way
        chosen.append(replace(best, seeds=way.seeds))

    teacher_test = teacher_predictions(job, "test")
    students: dict[str, list[dict[str, Any]]] = {way.label: [] for way in ways}
    # Seed by seed, so that what an unfinished comparison has is every way.
    for seed in dict.fromkeys(seed for way in chosen for seed in way.seeds):
        for way in chosen:
            if seed in way.seeds:
                clock.next(f"{way.label}, seed {seed}")
                record = one_student(job, way, seed, teacher_test, keep=config.keep_students)
                clock.took(way.label, record["seconds"])
                students[way.label].append(record)

    results: dict[str, Any] = {
        "title": f"Ways of distilling, on {source(config.data)}",
        **facts(job, teacher_test),
        "tfidf": tfidf,
        "students": [record for records in students.values() for record in records],
        "tuning": tuning,
        "tuning_seed": config.tuning_seed,
        "command": command,
        "configuration": yaml.safe_load(dump_config(config)),
        "code": code_version(),
        "environment": environment(),
    }
    references = {way.label: str(way.reference) for way in ways if way.reference != way.label}
    found = differences(job.run_dir, results, report.columns_of(results), references)
    results["comparison"] = {"reference": config.reference, "differences": found}
    text = write_comparison(job.run_dir, results)
    say()
    say(text)
    say(f"written: {job.run_dir / 'comparison.md'}, {job.run_dir / RESULTS_FILE}, plots")
    return results


def _tune(job: Job, way: Way, clock: _Clock) -> dict[str, Any]:
    """All trials of a way with their dev scores, and the place of the best: that of the highest
    primary score; among equals, that nearest to the teacher."""
    dev = teacher_predictions(job, "dev")
    trials = []
    for number, (trial, changes) in enumerate(zip(way.trials, way.changes, strict=True), 1):
        clock.next(f"{way.label}, trial {number} of {len(way.trials)}: {_brief(changes)}")
        record = _one_trial(job, trial, number, dev)
        clock.took(way.label, record["seconds"])
        trials.append({"changes": changes, **record})
    primary = job.setup(way.student).scoring.primary
    found = [trial["scores"] for trial in trials]
    best = max(range(len(trials)), key=lambda k: (found[k][primary], -_distance(found[k]), -k))
    say(f"  {way.label} goes on with trial {best + 1}: {_brief(way.changes[best])}")
    return {"trials": trials, "chosen": best}


def _one_trial(job: Job, trial: Way, number: int, dev: Predictions) -> dict[str, Any]:
    """The record of a trial, scored on the dev part; its weights are dropped."""
    seed = job.config.tuning_seed
    folder = job.run_dir / "tuning" / trial.label / f"trial-{number}"
    known = read(folder.with_name(folder.name + ".json"))
    if known is not None:
        record = json.loads(known)
        if record["settings"] == trial.settings() and record["seed"] == seed:
            say("  done before")
            return record
    began = time.perf_counter()
    trainer, _ = trained(job, trial, seed, folder)
    setup = job.setup(trial.student)
    student: Any = trainer.model
    result = setup.predict(student, setup.dev, progress="dev")
    record = {
        "seed": seed,
        "scores": setup.measures(result, dev),
        "seconds": round(time.perf_counter() - began, 1),
        "code": code_version(),
        "settings": trial.settings(),
    }
    finish(job, folder, record)
    say(f"  dev: {line(record['scores'])}")
    return record


def _distance(found: dict[str, float]) -> float:
    """To the teacher; 0 where none was measured."""
    return next((v for k, v in found.items() if k in ("kl_to_teacher", "mse_to_teacher")), 0.0)


def _brief(changes: dict[str, Any]) -> str:
    return json.dumps(changes)[1:-1].replace('"', "") or "nothing changed"


@dataclass
class _Clock:
    """Counts trainings, and says how long the rest will take by what those before took.

    labels: the way of each training to come.
    """

    labels: list[str]
    done: int = 0
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def next(self, what: str) -> None:
        left = ""
        if known := [s for each in self.seconds.values() for s in each]:
            usual = statistics.mean(known)
            own = {label: statistics.mean(each) for label, each in self.seconds.items()}
            minutes = round(sum(own.get(x, usual) for x in self.labels[self.done :]) / 60)
            hours = f"{minutes // 60} h " if minutes >= 60 else ""
            left = f" ({hours}{minutes % 60} min left)" if minutes else " (a minute left)"
        self.done += 1
        say(f"[{self.done}/{len(self.labels)}] {what}{left}")

    def took(self, label: str, seconds: float) -> None:
        self.seconds.setdefault(label, []).append(seconds)


# What is written


def write_comparison(run_dir: Path, results: dict[str, Any]) -> str:
    """Write the plots, comparison.md and, last, comparison.json; returns the text."""
    text = markdown(results)
    plots = run_dir / "plots"
    plots.mkdir(exist_ok=True)
    drawn = [
        _plot_differences(plots, results),
        _plot_measures(plots, results, [results["primary"]], results["primary"]),
        _plot_measures(plots, results, _secondary(results), "fidelity"),
        report.plot_projection(plots, results),
    ]
    write_text(
        run_dir / "comparison.md", f"# {results['title']}\n\n{text}\n\n{report.images(drawn)}\n"
    )
    write_text(run_dir / RESULTS_FILE, json.dumps(results, indent=1))
    return text


def markdown(results: dict[str, Any]) -> str:
    primary, seeds = results["primary"], [len(r) for r in report.ways_of(results).values()]
    lines = [f"{name}: {text}" for name, text in results["setting"].items()]
    lines += ["", report.scores_table(results, count_seeds=True), ""]
    many = ["Mean ± standard deviation over seeds."] if max(seeds) > 1 else []
    lines += [*many, report.about_cka(results)]
    found = results["comparison"]["differences"]
    if found:
        lines += ["", f"## {report.shown(primary)[0]}: differences", ""]
        lines += [_verdict(results), "", _tests_table(results), ""]
        lines += ["## All differences, ± standard error", ""]
        lines += [report.differences_table(results, report.columns_of(results)), ""]
        lines += [report.about_differences(max(seeds) > 1, report.columns_of(results))]
    if results["tuning"]:
        lines += ["", f"## Trials on the dev part, seed {results['tuning_seed']}", ""]
        lines += [_tuning_table(results)]
    made = ", ".join(f"{name} {value}" for name, value in results["environment"].items())
    codes = dict.fromkeys([*(r["code"] for r in results["students"]), results["code"]])
    lines += ["", f"kdfast {', '.join(codes)}; {made}"]
    if results["command"]:
        lines += [f"`{results['command']}`"]
    return "\n".join(lines)


def _secondary(results: dict[str, Any]) -> list[str]:
    return [c for c in report.columns_of(results) if c.endswith("_to_teacher") or c == "agreement"]


def _verdict(results: dict[str, Any]) -> str:
    """One sentence for each kind of outcome."""
    primary = results["primary"]
    groups: dict[str, list[str]] = {"above": [], "below": [], "noise": []}
    for way, entry in results["comparison"]["differences"].items():
        if primary in entry:
            sign = "above" if entry[primary]["difference"] > 0 else "below"
            name = f"{way.replace('_', ' ')} ({report.difference_value(entry[primary], primary)})"
            groups["noise" if entry[primary]["noise"] else sign].append(name)
    said = {"above": "Above its reference", "below": "Below it", "noise": "Inside the noise"}
    return " ".join(f"{said[key]}: {', '.join(ways) or 'none'}." for key, ways in groups.items())


def _tests_table(results: dict[str, Any]) -> str:
    primary = results["primary"]
    scale, digits = (100, 1) if report.shown(primary)[1] else (1, 3)
    rows = []
    for way, entry in results["comparison"]["differences"].items():
        own = entry.get(primary)
        names = [way.replace("_", " "), entry["reference"].replace("_", " ")]
        if own is None:
            rows.append([*names, str(len(entry["seeds"])), *[""] * 5, "one seed: not tested"])
            continue
        low, high = (f"{scale * value:+.{digits}f}" for value in own["interval"])
        rows.append(
            [
                *names,
                str(len(entry["seeds"])),
                f"{scale * own['difference']:+.{digits}f}",
                f"{low} to {high}",
                f"{own['degrees_of_freedom']:.1f}",
                f"{own['p']:.3f}",
                f"{own['p_holm']:.3f}",
                "noise" if own["noise"] else "gain" if own["difference"] > 0 else "loss",
            ]
        )
    interval = f"{100 * (1 - LEVEL):g} % interval"
    return report.table(
        ["", "less", "seeds", "difference", interval, "df", "p", "p (Holm)", "verdict"],
        rows,
        left=2,
    )


def _tuning_table(results: dict[str, Any]) -> str:
    primary = results["primary"]
    rows = [
        [
            way.replace("_", " "),
            _brief(trial["changes"]),
            report.value(trial["scores"][primary], primary),
            f"{_distance(trial['scores']):.4f}",
            "taken" if k == tuned["chosen"] else "",
        ]
        for way, tuned in results["tuning"].items()
        for k, trial in enumerate(tuned["trials"])
    ]
    return report.table(
        ["", "trial", f"dev {report.shown(primary)[0]}", "distance to teacher", ""], rows, left=2
    )


def _plot_measures(
    folder: Path, results: dict[str, Any], measures: list[str], name: str
) -> Path | None:
    """A row a way: each seed as a dot, mean and standard deviation beside them."""
    if not measures:
        return None
    ways = report.ways_of(results)
    figure, axes = plt.subplots(
        1, len(measures), figsize=(2.2 + 3.2 * len(measures), 1.2 + 0.3 * len(ways)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for axis, measure in zip(axes[0], measures, strict=True):
        title, share = report.shown(measure)
        scale = 100 if share else 1
        for k, records in enumerate(ways.values()):
            values = [scale * r[measure] for r in records]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axis.plot(values, [k] * len(values), "o", color="C0", alpha=0.35, ms=4)
            axis.errorbar(statistics.mean(values), k, xerr=spread, fmt="D", color="C0", ms=4,
                          capsize=3)  # fmt: skip
        for whose, own in (("teacher", results["teacher"]), ("TF-IDF", results["tfidf"] or {})):
            if measure in own:
                axis.axvline(scale * own[measure], color="0.6", ls="--", lw=1)
                axis.annotate(
                    whose, (scale * own[measure], 1), xycoords=("data", "axes fraction"),
                    fontsize=7, color="0.4", ha="center", va="bottom",
                )  # fmt: skip
        axis.set_xlabel(title)
        axis.grid(axis="x", alpha=0.3)
    axes[0][0].set_yticks(range(len(ways)), [w.replace("_", " ") for w in ways])
    axes[0][0].invert_yaxis()
    return report.finish(figure, folder / f"{name}.png")


def _plot_differences(folder: Path, results: dict[str, Any]) -> Path | None:
    """The primary measure of each way less its reference's, with its interval; noise is hollow."""
    primary = results["primary"]
    title, share = report.shown(primary)
    tested = {w: d for w, d in results["comparison"]["differences"].items() if primary in d}
    if not tested:
        return None
    figure, axis = plt.subplots(figsize=(6.4, 1.2 + 0.3 * len(tested)), layout="constrained")
    scale = 100 if share else 1
    for k, entry in enumerate(tested.values()):
        own = entry[primary]
        low, high = (scale * value for value in own["interval"])
        color = "0.55" if own["noise"] else "C2" if own["difference"] > 0 else "C3"
        axis.plot([low, high], [k, k], color=color, lw=1.5)
        axis.plot(scale * own["difference"], k, "o", color=color,
                  mfc="white" if own["noise"] else color)  # fmt: skip
    axis.axvline(0, color="0.3", lw=1)
    axis.set_yticks(
        range(len(tested)),
        [f"{w} − {d['reference']}".replace("_", " ") for w, d in tested.items()],
    )
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel(f"{title}, {100 * (1 - LEVEL):g} % interval (hollow: noise)")
    return report.finish(figure, folder / "differences.png")
