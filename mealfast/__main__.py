"""`mealfast COMMAND`, also `python -m mealfast COMMAND`: one subcommand a job."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import NoReturn

import mealfast

if __name__ == "__main__" and find_spec("mealfast.loaders") is None:
    # Started in a checkout, whose folder mealfast/ comes before the installed package and is not all of it.
    _checkout = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != _checkout]
    for _name in [name for name in sys.modules if name.partition(".")[0] == "mealfast"]:
        del sys.modules[_name]
    if find_spec("mealfast") is None:
        sys.exit("mealfast: the package is not installed for this Python: run `make install`, or `pip install .`")
    import mealfast

from mealfast.cli import endings
from mealfast.errors import UsageError, alternatives

# Name: (module, function, what it does). Imported on use: torch and timm take seconds.
COMMANDS = {
    "train": ("mealfast.train", "train_command", "distil an ensemble of teachers into a student"),
    "evaluate": (
        "mealfast.cli.evaluate",
        "evaluate_command",
        "measure the accuracy of models and of their ensemble",
    ),
    "predict": ("mealfast.cli.predict", "predict_command", "predict the classes of image files"),
    "index": ("mealfast.cli.index", "index_command", "describe a folder of images, and what in it cannot be read"),
    "pack": ("mealfast.cli.pack", "pack_command", "pack a folder of images into a few large tar files"),
    "labels": ("mealfast.cli.labels", "labels_command", "build, import, describe or verify a label cache"),
    "forecast": (
        "mealfast.cli.forecast",
        "forecast_command",
        "measure the stages of a step, predict a run's hours",
    ),
    "export": ("mealfast.cli.export", "export_command", "write a model for timm, ONNX, torchvision or TorchScript"),
    "figures": ("mealfast.cli.figures", "figures_command", "draw the curves of one or more runs"),
    "demo": ("mealfast.cli.demo", "demo_command", "distil handwritten digits, in about three minutes on two cores"),
}


def usage() -> str:
    """What `mealfast --help` prints."""
    lines = [f"  {name:<10} {help_text}" for name, (_, _, help_text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mealfast COMMAND [OPTIONS]",
            "",
            "Distils ensembles of pretrained image classifiers into small ones (MEAL V2), fast.",
            "",
            *lines,
            "",
            "`mealfast COMMAND --help` lists a command's options, `mealfast --version` prints the version.",
        ]
    )


def dispatch(argv: list[str]) -> int:
    """Runs the command that `argv` begins with, on the rest. Returns its exit status. Raises UsageError."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"mealfast {mealfast.__version__}")
        return 0
    if argv[0] not in COMMANDS:
        raise UsageError(f"{argv[0]}: no such command; {alternatives(argv[0], COMMANDS)}")
    module, function, _ = COMMANDS[argv[0]]
    command: endings.Command = getattr(import_module(module), function)
    return command(argv[1:])


def main() -> NoReturn:
    """The console script."""
    endings.main(dispatch)


if __name__ == "__main__":
    main()
