"""`mealfast COMMAND`, also `python -m mealfast COMMAND`: one subcommand a job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import mealfast
from mealfast.cli.endings import run_command

# Name: (module, function, what it does). Imported on use: torch and timm take seconds.
COMMANDS = {
    "train": ("mealfast.train", "train_command", "distil teachers into a student"),
    "evaluate": (
        "mealfast.cli.evaluate",
        "evaluate_command",
        "top-1 and top-5 of models, alone and as an ensemble",
    ),
    "index": ("mealfast.cli.index", "index_command", "what a folder of images holds, and what cannot be read"),
    "pack": ("mealfast.cli.pack", "pack_command", "an image tree as a few large tar shards"),
    "labels": ("mealfast.cli.labels", "labels_command", "the teachers' targets on disk: build, info, verify"),
    "forecast": ("mealfast.cli.forecast", "forecast_command", "each stage's speed, the bottleneck, the hours"),
    "figures": ("mealfast.cli.figures", "figures_command", "curves of one or more runs"),
    "demo": ("mealfast.cli.demo", "demo_command", "the whole job on real handwritten digits, in about three minutes"),
}


def usage() -> str:
    lines = [f"  {name:<10} {help_text}" for name, (_, _, help_text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mealfast COMMAND [OPTIONS]",
            "",
            "Distil ensembles of pretrained image classifiers into small ones (MEAL V2), fast.",
            "",
            *lines,
            "",
            "`mealfast COMMAND --help` lists a command's options.",
        ]
    )


def dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mealfast {mealfast.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"mealfast: {argv[0]}: no such command; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, function, _ = COMMANDS[argv[0]]
    command: Callable[[list[str]], int] = getattr(import_module(module), function)
    return command(argv[1:])


def main() -> None:
    sys.exit(run_command(dispatch, sys.argv[1:]))


if __name__ == "__main__":
    main()
