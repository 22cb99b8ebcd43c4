"""`mealfast forecast`: how fast each stage runs here, what limits the run, and how long the recipe will take."""

from __future__ import annotations

import dataclasses
import json

from mealfast.cli.options import Parser, add_recipe_options, recipe_from
from mealfast.cli.view_options import check_positive
from mealfast.errors import UsageError

DESCRIPTION = """\
Measures every stage of a training step with the recipe's own models, images and batch: decoding, each teacher, the
student, the loss, the optimiser and the whole step. Names the bottleneck and predicts how many hours the recipe takes,
with live teachers and from a label cache. It takes the options of `mealfast train` and writes nothing; under torchrun
it measures all processes together."""


def make_parser() -> Parser:
    """The options of `mealfast forecast`."""
    parser = Parser(
        prog="mealfast forecast", usage="mealfast forecast --data DIR --recipe NAME [OPTIONS]", description=DESCRIPTION
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="seconds to measure each stage for (default: 5)"
    )
    parser.add_argument("--gpus", type=int, metavar="N", help="also predict the hours on N devices like this one")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    add_recipe_options(parser)
    return parser


def forecast_command(argv: list[str]) -> int:
    """Runs the command; exit status 0. Raises UsageError or DataError."""
    options = make_parser().parse_args(argv)
    if not 0 < options.seconds < 1e6:
        raise UsageError(f"--seconds {options.seconds}: must be more than 0")
    check_positive(options, "gpus")
    recipe = dataclasses.replace(recipe_from(options), resume="never", max_steps=None)

    from mealfast.machine import processes as runtimes
    from mealfast.measure import forecast
    from mealfast.record.run_directory import RunDirectory
    from mealfast.training import report
    from mealfast.training.assemble import make_job

    runtime = runtimes.start(recipe.device)
    try:
        job, _, _ = make_job(recipe, runtime, RunDirectory(recipe.run_dir))

        def say(line: str) -> None:
            if runtime.is_main:
                print(line, flush=True)

        for line in report.introduction(job):
            say(line)
        made = forecast.forecast(job, options.seconds, say)
        for line in forecast.lines(job, made, options.gpus):
            say(line)
        if options.json:
            say(json.dumps(made.to_json()))
    finally:
        runtimes.stop()
    return 0
