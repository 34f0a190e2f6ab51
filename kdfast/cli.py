"""The command line: kdfast distill | compare | finetune | evaluate | analyze | bench | doctor."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on standard error for bad input; 1 where
    `bench` or `doctor --check` found a wrong output, or `bench --against` a slower one."""
    parser = argparse.ArgumentParser(
        prog="kdfast", description="Distil transformers from their internal representations."
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    keys = "key=value overrides the configuration, such as data.path=my.csv seeds=[1,2]"

    def command(name: str, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return sub

    sub = command("distill", "distil a student as a configuration says, and report what it bought")
    sub.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    sub.add_argument("override", nargs="*", metavar="key=value", help=keys)
    sub = command("compare", "train several ways over seeds, tuned on the dev part, and test them")
    sub.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    sub.add_argument("override", nargs="*", metavar="key=value", help=keys)
    sub = command("finetune", "fine-tune a classifier, such as a teacher")
    sub.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    sub.add_argument("override", nargs="*", metavar="key=value", help=keys)
    sub = command("evaluate", "score a saved classifier, alone or against its teacher")
    sub.add_argument("model", help="a folder that save_pretrained wrote, or a hub name")
    sub.add_argument("override", nargs="*", metavar="key=value", help=keys)
    sub = command("analyze", "how alike the layers of two models are, by CKA")
    sub.add_argument("model_a", help="a folder that save_pretrained wrote, or a hub name")
    sub.add_argument("model_b", help="the other one, such as the teacher")
    sub.add_argument(
        "--data",
        metavar="PATH",
        help="sentences: data.path=PATH (default: those model_a was made with, or a demo)",
    )
    sub.add_argument("--output", metavar="DIR", help="where to write: output_dir=DIR")
    sub.add_argument("--recipe", metavar="NAME", help="show its layer-projection weights as well")
    sub.add_argument("override", nargs="*", metavar="key=value", help=keys)
    sub = command(
        "bench", "measure operators side by side with eager, torch.compile and stock ones"
    )
    sub.add_argument(
        "operator", nargs="*",
        help="operators to measure (default: all), or one suite: step (whole training steps), "
        "scale (how losses grow)",
    )  # fmt: skip
    sub.add_argument("--device", metavar="cpu|cuda", help="default: cuda where there is one")
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    sub.add_argument("--report", type=Path, metavar="DIR", help="write report.md and plots")
    sub.add_argument(
        "--from", type=Path, metavar="FILE", dest="source", action="append",
        help="measure nothing: show and report the results of an earlier --json, or of several "
        "(--from A --from B), all of one machine",
    )  # fmt: skip
    sub.add_argument(
        "--against", metavar="REV",
        help="compare this checkout, as it is now, with another revision of its git, in one "
        "interleaved run; exits with 1 where it is slower",
    )  # fmt: skip
    sub.add_argument(
        "--backend", metavar="NAME",
        help="of --against: the backend to compare (default: the one that auto takes)",
    )  # fmt: skip
    sub.add_argument(
        "--tolerance", type=float, metavar="PERCENT",
        help="of --against: a row may be so much slower (default: 3)",
    )  # fmt: skip
    sub.add_argument(
        "--only", metavar="TEXT", default="", help="rows, or entries, whose name holds TEXT"
    )
    sub.add_argument(
        "--quick", action="store_true", help="tiny rows without torch.compile: seconds"
    )
    sub.add_argument(
        "--tune", action="store_true",
        help="measure other entries for the launch tables of the Triton kernels instead",
    )  # fmt: skip
    sub.add_argument("--seconds", type=float, help="time for the rounds of each row")
    sub.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    sub.add_argument("--force", action="store_true", help="overwrite files that exist")
    sub = command("doctor", "what is installed, and which backend serves each operator and why")
    sub.add_argument("--check", action="store_true", help="run every available backend and compare")
    sub.add_argument("--json", action="store_true", help="print JSON")

    options, rest = parser.parse_known_args(arguments)
    # argparse takes no positionals after an option that follows the first ones: kdfast analyze A B
    # --data PATH key=value.
    if not hasattr(options, "override") or not all("=" in r and r[0] != "-" for r in rest):
        options = parser.parse_args(arguments)
    else:
        options.override += rest
    if options.version:
        from importlib.metadata import version

        print(f"kdfast {version('kdfast')}")
        return 0
    if options.command is None:
        parser.print_help()
        return 2

    from kdfast.errors import InputError

    try:
        return _run(options)
    except KeyboardInterrupt:
        if options.debug:
            raise
        goes_on = options.command in ("distill", "compare", "finetune")
        how = "; the same command goes on from the last checkpoint" if goes_on else ""
        print(f"\nkdfast: interrupted{how}", file=sys.stderr)
        return 2
    except Exception as error:
        if options.debug:
            raise
        message = " ".join(str(error).split())
        if not isinstance(error, (InputError, OSError)):
            message = f"{type(error).__name__}: {message} (--debug shows where)"
        print(f"kdfast: {message}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    from kdfast.errors import InputError

    if options.command == "doctor":
        return _doctor(options)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "the command line runs in one process: to train on several, use DistillationTrainer in "
            "a script under accelerate launch or torchrun"
        )
    # One GPU of several, before torch looks: otherwise the Trainer would run them as threads.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if options.command == "bench":
        return _bench(options)
    # Imported here: `kdfast --help` answers at once.
    from transformers.utils import logging

    from kdfast.distill import config as configuration
    from kdfast.distill import run

    if not options.debug:
        # Bars and results are for the reader; library notices are for --debug.
        logging.set_verbosity_error()
        logging.disable_progress_bar()  # of loading and saving weights
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    if options.command == "distill":
        run.distill(
            configuration.read_config(configuration.DistillConfig, options.config, options.override)
        )
    elif options.command == "compare":
        from kdfast.distill import compare

        compare.compare(
            configuration.read_config(
                configuration.CompareConfig, options.config, options.override
            ),
            command=shlex.join(["kdfast", "compare", options.config, *options.override]),
        )
    elif options.command == "analyze":
        from kdfast.distill import analyze

        flags = (("data.path", "data"), ("output_dir", "output"), ("recipe", "recipe"))
        given = [f"{key}={getattr(options, name)}" for key, name in flags if getattr(options, name)]
        analyze.analyze(
            options.model_a,
            options.model_b,
            configuration.read_config(
                configuration.AnalyzeConfig,
                None,
                [*given, *options.override],
                data_of=options.model_a,
            ),
        )
    elif options.command == "finetune":
        run.finetune(
            configuration.read_config(
                configuration.FinetuneConfig, options.config, options.override
            )
        )
    else:
        run.evaluate(
            options.model,
            configuration.read_config(
                configuration.EvaluateConfig, None, options.override, data_of=options.model
            ),
        )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    import json

    from kdfast import doctor

    found = doctor.report()
    if not options.json:
        print(doctor.text(found))
    failed = False
    if options.check:
        checks = []
        if not options.json:
            print()
        for check in doctor.check():
            failed |= not check.passed
            checks.append(check._asdict())
            if not options.json:
                print(check, flush=True)
        found["checks"] = checks
    if options.json:
        print(json.dumps(found, indent=1))
    return int(failed)


def _bench(options: argparse.Namespace) -> int:
    import torch

    from kdfast.errors import InputError, nearest

    try:
        from kdfast.benchmarks import harness, report
    except ModuleNotFoundError as error:
        if error.name != "kdfast.benchmarks":
            raise
        raise InputError(
            "kdfast.benchmarks is not there: this kdfast is a checkout that is not installed; "
            "pip install --no-build-isolation --editable . (`make bench` does)"
        ) from error

    for name in options.operator:
        if name not in (known := (*harness.OPERATORS, *harness.SUITES)):
            raise InputError(
                f"operator or suite {name!r} has no benchmark{nearest(name, known)}; those that "
                f"have: {', '.join(known)}"
            )
    if suites := [name for name in options.operator if name in harness.SUITES]:
        if len(options.operator) > 1 or options.tune:
            raise InputError(
                f"{suites[0]} is a suite of its own: give no other operator, no --tune"
            )
        if options.against is not None and (suites != ["step"] or options.backend is not None):
            raise InputError(
                "--against compares operators or the suite step, and --backend is of operators: "
                "leave one of them out"
            )
    if suites and options.against is None:
        for name in ("backend", "tolerance"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name} is of --against REV, which is not given")
        return _bench_suite(options, suites[0])
    operators = options.operator or list(harness.OPERATORS)
    if options.tune and (options.source or options.report or options.operator):
        raise InputError("--tune takes --json and --only, no operator, --from or --report")
    if options.source and options.json:
        raise InputError("--from measures nothing: --json has nothing to write, leave it out")
    if options.against is not None:
        for name in ("tune", "source", "report"):
            if getattr(options, name):
                flag = "from" if name == "source" else name
                raise InputError(f"--against takes no --{flag}; it prints a table, and --json FILE")
    else:
        for name in ("backend", "tolerance"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name} is of --against REV, which is not given")
    _bench_files(options, report.files_of(options.report, operators) if options.report else [])

    if options.source:
        results = report.read_runs(options.source)
        if suite := results.get("suite"):
            file = options.source[0]
            raise InputError(
                f"--from {file} holds results of the suite {suite}: kdfast bench {suite} "
                f"--from {file}"
            )
        if options.operator:
            results["rows"] = [row for row in results["rows"] if row["operator"] in operators]
    else:
        device = torch.device(_bench_device(options))
        if options.tune:
            from kdfast.benchmarks import tune

            write = _bench_given(options)["write"]
            print(tune.text(tune.run(device, only=options.only, write=write)))
            return 0
        given = _bench_given(options)
        if options.against is None:
            results = harness.run(operators, device, **given)
        else:
            from kdfast.benchmarks import against

            if options.backend is not None:
                given["backend"] = options.backend
            if options.tolerance is not None:
                given["tolerance"] = options.tolerance / 100
            results = against.run(options.against, operators, device, **given)
        # The table of the file is this one, digit by digit.
        results = harness.rounded(results | _bench_origin(options))
    if results.get("kind") == "against":
        from kdfast.benchmarks import against

        print(against.text(results))
        return against.status(results)
    if options.report:
        report.write_report(options.report, results)
    print(report.markdown(results))
    wrong = harness.wrong_rows(results)
    for row in wrong:
        print(f"kdfast: wrong: {row}", file=sys.stderr)
    return int(bool(wrong))


def _bench_suite(options: argparse.Namespace, name: str) -> int:
    import importlib

    import torch

    from kdfast.benchmarks import harness, report
    from kdfast.errors import InputError

    module = importlib.import_module(f"kdfast.benchmarks.{harness.SUITES[name]}")
    if options.source and options.json:
        raise InputError("--from measures nothing: --json has nothing to write, leave it out")
    _bench_files(options, [options.report / x for x in module.FILES] if options.report else [])
    if options.source:
        results = report.read_runs(options.source)
        if results.get("suite") != name:
            file, own = options.source[0], "kdfast bench"
            if suite := results.get("suite"):
                held, own = f"those of the suite {suite}", f"{own} {suite}"
            else:
                held = "a comparison of revisions" if "kind" in results else "results of operators"
            raise InputError(
                f"--from {file} holds no results of the suite {name}, but {held}: {own} --from "
                f"{file}"
            )
    else:
        results = module.run(torch.device(_bench_device(options)), **_bench_given(options))
        results = harness.rounded(results | _bench_origin(options))
    if options.report:
        report.write_suite(options.report, module, results)
    print(module.markdown(results))
    wrong = [f"{row['name']}: {text}" for row in results["rows"] for text in row.get("wrong", ())]
    for text in wrong:
        print(f"kdfast: wrong: {text}", file=sys.stderr)
    return int(bool(wrong))


def _bench_files(options: argparse.Namespace, reported: Sequence[Path]) -> None:
    """Before measuring, which takes minutes: InputError for files that are there."""
    from kdfast.errors import InputError

    if options.json and options.json.is_dir():
        raise InputError(f"--json {options.json} is a folder, should be a file")
    for file in [*([options.json] if options.json else []), *reported]:
        if file.exists() and not options.force:
            raise InputError(f"{file} exists; give another name, or --force to overwrite it")
    for folder in filter(None, (options.json and options.json.parent, options.report)):
        folder.mkdir(parents=True, exist_ok=True)


def _bench_origin(options: argparse.Namespace) -> dict[str, str]:
    """The command without its files, and the code, that results are of."""
    from kdfast.distill.provenance import code_version

    given = {
        name: getattr(options, name) for name in ("against", "device", "only", "seconds", "threads")
    }
    command = ["kdfast bench", *options.operator, *["--quick"] * options.quick]
    command += [f"--{name} {shlex.quote(str(x))}" for name, x in given.items() if x]
    return {"command": " ".join(command), "code": code_version()}


def _bench_given(options: argparse.Namespace) -> dict[str, Any]:
    """What all that measures is given."""
    from kdfast.benchmarks import harness

    def write(state: dict[str, Any]) -> None:
        if options.json:
            harness.write_json(options.json, state | _bench_origin(options))

    return {
        "which": "quick" if options.quick else None,
        "only": options.only,
        "seconds": options.seconds,
        "write": write,
    }


def _bench_device(options: argparse.Namespace) -> str:
    """The device to measure, after what measuring needs is checked; sets the threads."""
    import torch

    from kdfast.errors import InputError, nearest

    known = ("cpu", "cuda")
    device: str = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in known:
        raise InputError(
            f"--device {device}: unknown{nearest(device, known)}; known are {', '.join(known)}"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here; --device cpu measures the CPU")
    for name in ("threads", "seconds"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} is {value}, should be above 0")
    if options.tolerance is not None and not options.tolerance >= 0:
        raise InputError(f"--tolerance is {options.tolerance}, should be 0 or more, in percent")
    if options.tune and device != "cuda":
        raise InputError(f"--tune on {device}: launch tables are those of GPUs")
    if options.threads:
        torch.set_num_threads(options.threads)
    return device


if __name__ == "__main__":
    sys.exit(main())
