"""`torchrun [...] mealfast/train.py OPTIONS`, the same as `mealfast train OPTIONS`."""

import os
import sys

if __name__ == "__main__":
    # Python puts a script's folder on the path: every file and room of mealfast/ would be a top-level module.
    _here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.realpath(folder) != _here]

from typing import NoReturn

try:
    from mealfast.cli import endings
    from mealfast.cli.options import Parser, add_recipe_options, recipe_from
    from mealfast.machine.waiting import waiting
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] != "mealfast":
        raise
    sys.exit("mealfast: the package is not installed for this Python: run `make install`, or `pip install .`")

DESCRIPTION = """\
Distils an ensemble of pretrained teachers into a student (MEAL V2), from a folder of images. One process drives one
GPU: `torchrun --standalone --nproc-per-node 8 mealfast/train.py ...` uses eight. A model spec is
NAME[.TAG][?key=value&...][@CHECKPOINT], for instance senet154.gluon_in1k or
resnet18?num_classes=10@runs/mine/student.safetensors."""


def make_parser(prog: str = "mealfast train") -> Parser:
    """The options of `mealfast train`: one for each field of the recipe."""
    parser = Parser(prog=prog, usage=f"{prog} --data DIR --recipe NAME [OPTIONS]", description=DESCRIPTION)
    add_recipe_options(parser)
    return parser


def train_command(argv: list[str]) -> int:
    """Parses the options and runs the recipe. Exit status 0. Raises UsageError, DataError or RunError."""
    recipe = recipe_from(make_parser().parse_args(argv))

    # torch and timm take seconds to import: not for --help and typing errors.
    with waiting("loading PyTorch and timm"):
        from mealfast.measure.forecast import stage_report
        from mealfast.training.loop import train

    train(recipe, stage_report if recipe.stage_report else None)
    return 0


def main() -> NoReturn:
    """The entry point of `torchrun mealfast/train.py`."""
    endings.main(train_command)


if __name__ == "__main__":
    main()
