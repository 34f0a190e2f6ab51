"""The command line: kdfast distill | finetune | evaluate."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on standard error for bad input."""
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
    sub = command("finetune", "fine-tune a classifier, such as a teacher")
    sub.add_argument("config", help="a YAML file, or the name of a shipped configuration")
    sub.add_argument("override", nargs="*", metavar="key=value", help=keys)
    sub = command("evaluate", "score a saved classifier, alone or against its teacher")
    sub.add_argument("model", help="a folder that save_pretrained wrote, or a hub name")
    sub.add_argument("override", nargs="*", metavar="key=value", help=keys)

    options = parser.parse_args(arguments)
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
        goes_on = options.command in ("distill", "finetune")
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

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "the command line runs in one process: to train on several, use DistillationTrainer in "
            "a script under accelerate launch or torchrun"
        )
    # One GPU of several, before torch looks: otherwise the Trainer would run them as threads.
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
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
    elif options.command == "finetune":
        run.finetune(
            configuration.read_config(
                configuration.FinetuneConfig, options.config, options.override
            )
        )
    else:
        run.evaluate(
            options.model,
            configuration.read_config(configuration.EvaluateConfig, None, options.override),
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
