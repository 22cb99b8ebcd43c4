"""`mealfast figures`: draws the curves of one or more runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mealfast.cli.options import Parser
from mealfast.errors import UsageError
from mealfast.figures.curves import draw_curves, read_evaluations


def make_parser() -> Parser:
    """The command's options."""
    parser = Parser(
        prog="mealfast figures",
        usage="mealfast figures RUN [RUN ...] --out FILE",
        description="Draws validation top-1 and KL to the ensemble against steps, one curve a run directory.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument("--out", default="curves.png", metavar="FILE", help=".png, .svg or .pdf (default: curves.png)")
    return parser


def figures_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError for a folder without metrics, or without matplotlib."""
    options = make_parser().parse_args(argv)
    out = Path(options.out)
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out {out}: must end in .png, .svg or .pdf")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: no such folder")
    folders = [Path(run) for run in options.runs]
    curves = dict(zip(names(folders), map(read_evaluations, folders), strict=True))
    try:
        draw_curves(curves, out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written ({error.strerror})") from error
    print(out)
    return 0


def names(folders: Sequence[Path]) -> list[str]:
    """What each run is called in a figure: as many of its last folders as tell it from the others.

    Raises UsageError for a run that is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise UsageError(f"{folders[number]}: is given twice")
    found = []
    for path in paths:
        count = 1
        while sum(other.parts[-count:] == path.parts[-count:] for other in paths) > 1:
            count += 1
        found.append(str(Path(*path.parts[-count:])))
    return found
