"""Commands as functions: their options as keyword arguments, exceptions where a command would end the process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mealfast.cli import evaluate as evaluation
from mealfast.cli import labels_build
from mealfast.cli.options import Parser
from mealfast.downstream.distilling import Distilled
from mealfast.downstream.keywords import checked, fields
from mealfast.errors import UsageError
from mealfast.labels.build import build
from mealfast.loaders import CacheHeader, read_header
from mealfast.machine import processes as runtimes
from mealfast.machine.unchanged import unchanged

Named = Distilled | str | os.PathLike[str]


def evaluate(models: Named | Sequence[Named], data: str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any]:
    """The content of `mealfast evaluate --json`; `options` are the command's. Raises UsageError or DataError."""
    several = [models] if isinstance(models, (Distilled, str, os.PathLike)) else list(models)
    names = [os.fspath(one.run_dir if isinstance(one, Distilled) else one) for one in several]
    given = {"data": data, "model": names, **options}
    parsed = parse(evaluation.make_parser(), "evaluate", given)
    evaluation.check_options(parsed)
    with unchanged():
        runtime = runtimes.start(parsed.device)
        try:
            return evaluation.run(parsed, runtime)
        finally:
            runtimes.stop()


def build_labels(
    data: str | os.PathLike[str], teachers: str | Sequence[str], out: str | os.PathLike[str], views: int,
    top_k: int | None, batch_size: int, recipe: str | None, options: dict[str, Any],
) -> CacheHeader:  # fmt: skip
    """What `mealfast labels build` does. Raises UsageError or DataError."""
    known = set(fields()) & {action.dest for action in labels_build.make_parser()._actions}
    given = checked("build_labels", {"data": data, **({"teachers": teachers} if teachers else {}), **options}, known)
    labels_build.check_sizes(argparse.Namespace(views=views, top_k=top_k, batch_size=batch_size))
    asked = labels_build.cache_recipe(recipe, given)
    with unchanged():
        runtime = runtimes.start(asked.device)
        try:
            build(asked, runtime, Path(out), views=views, top_k=top_k, batch_size=batch_size)
        finally:
            runtimes.stop()
    return read_header(Path(out))


def parse(parser: Parser, function: str, given: dict[str, Any]) -> argparse.Namespace:
    """A command's options from values: None stands for the default. Raises TypeError for a name that is no option's,
    UsageError for a value that the command would refuse."""
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "json")}
    argv = []
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}; known are {', '.join(known)}")
        flag = known[name].option_strings[0]
        if known[name].nargs == 0:
            argv += [flag] if value else []
        elif isinstance(value, (list, tuple)):
            argv += [flag, *map(str, value)]
        elif value is not None:
            argv.append(f"{flag}={os.fspath(value) if isinstance(value, os.PathLike) else value}")
    parser.error = _refuse  # type: ignore[method-assign]
    return parser.parse_args(argv)


def _refuse(message: str) -> Any:
    raise UsageError(message)
