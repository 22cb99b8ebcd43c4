"""`torchrun [...] mealfast/train.py OPTIONS`, the same as `mealfast train OPTIONS`."""

from __future__ import annotations

import sys

try:
    from mealfast.cli.endings import run_command
    from mealfast.cli.options import Parser, add_recipe_options, recipe_from
except ImportError as error:
    if error.name is None or error.name.partition(".")[0] != "mealfast":
        raise
    sys.exit("mealfast: the package is not installed for this Python: run `make install`, or `pip install .`")

DESCRIPTION = """\
Distil an ensemble of pretrained teachers into a student (MEAL V2), from a folder of JPEGs. One process drives one GPU:
`torchrun --standalone --nproc-per-node 8 mealfast/train.py ...` for eight. A model spec is
NAME[.TAG][?key=value&...][@CHECKPOINT], for instance senet154.gluon_in1k or
resnet18?num_classes=10@runs/mine/student.safetensors."""


def make_parser(prog: str = "mealfast train") -> Parser:
    parser = Parser(prog=prog, usage=f"{prog} --data DIR --recipe NAME [OPTIONS]", description=DESCRIPTION)
    add_recipe_options(parser)
    return parser


def train_command(argv: list[str]) -> int:
    """Parses the options, runs the recipe. Exit status 0, or 2 for a wrong option or file."""
    recipe = recipe_from(make_parser().parse_args(argv))

    # torch and timm take seconds to import: not for --help and typing errors.
    from mealfast.measure.forecast import stage_report
    from mealfast.training.loop import train

    train(recipe, stage_report if recipe.stage_report else None)
    return 0


def main() -> None:
    sys.exit(run_command(train_command, sys.argv[1:]))


if __name__ == "__main__":
    main()
