"""Command-line options from the recipe's fields: grouped, typed, with the defaults that the code has."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mealfast.errors import UsageError
from mealfast.recipe import RECIPES, Recipe, make_recipe, option_fields


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (status 2), and whose help is as wide as a line of text may be."""

    def __init__(self, prog: str, usage: str | None = None, description: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118),
            allow_abbrev=False,
        )

    def parse_args(  # type: ignore[override]  # argparse's overloads are for namespaces of other classes
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """The options in `args` (None: this process's). Says of one that does not exist which it may have meant."""
        args = sys.argv[1:] if args is None else args
        for text in args:
            flag = text.partition("=")[0]
            if flag == "--":
                break
            if flag.startswith("--") and flag not in self._option_string_actions:
                close = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.75)
                self.error(f"there is no option {flag}" + (f"; did you mean {close[0]}?" if close else ""))
        return super().parse_args(args, namespace)

    def error(self, message: str) -> typing.NoReturn:
        """Ends the process with one line and status 2."""
        self.exit(2, f"mealfast: {message} (see {self.prog} --help)\n")


def add_recipe_options(
    parser: argparse.ArgumentParser, only: Collection[str] | None = None, helps: Mapping[str, str] | None = None
) -> None:
    """Adds `--recipe`, and one option for every field of `Recipe` (or for those named in `only`), in its groups;
    `helps` are other words for what fields mean to a command."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"named settings, which the options below override: {', '.join(RECIPES)} (default: none)",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="TOML file of such options (batch-size = 64), or the config.json of a run; those given here override it "
        "(default: none)",
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(Recipe)
    for field in option_fields():
        if only is not None and field.name not in only:
            continue
        title = field.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        _add_option(group, field, hints[field.name], (helps or {}).get(field.name, field.metadata["help"]))


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the parsed options, and the file that they name, describe. Raises UsageError."""
    name, values = settings(arguments)
    return make_recipe(name, **values)


def settings(arguments: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The recipe's name (None: none) and the fields of `Recipe` that the parsed options name, the file of --config or
    the run of --resume below them. Raises UsageError."""
    given = given_fields(arguments)
    run = given.get("resume", "auto")
    place = os.path.expanduser(run)
    if run not in ("auto", "never") and not os.path.exists(place):
        raise UsageError(f"--resume {run}: no such file or folder; name a run directory, or a checkpoint file")
    if run not in ("auto", "never") and os.path.isdir(place):
        from mealfast.cli.config_file import of_run  # which imports torch

        for option in ("recipe", "config"):
            if getattr(arguments, option):
                raise UsageError(f"--{option} {getattr(arguments, option)}: --resume {run} has its own; leave it out")
        return None, of_run(run, given)
    if not arguments.config:
        return arguments.recipe, given
    from mealfast.cli.config_file import read

    name, values = read(arguments.config)
    return arguments.recipe or name, {**values, **given}


def given_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Recipe` that the parsed options name."""
    return {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in option_fields()
        if (value := getattr(arguments, field.name, None)) is not None
    }


def _add_option(group: Any, field: dataclasses.Field[Any], hint: Any, help_text: str) -> None:
    flag = "--" + field.name.replace("_", "-")
    if "(default: " not in help_text and "(required" not in help_text:  # which says more than the bare value
        help_text += f" (default: {_shown(field.default)})"
    help_text = help_text.replace("%", "%%")
    settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": help_text}
    kind = _plain(hint)
    if word := field.metadata.get("word"):  # a switch that takes one word too
        group.add_argument(flag, nargs="?", const=True, choices=(word,), metavar=word, **settings)
        settings |= {"action": "store_false", "help": argparse.SUPPRESS}
        group.add_argument(flag.replace("--", "--no-", 1), **settings)
        return
    if kind is bool:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        return
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        settings |= {"nargs": "*" if items[-1] is Ellipsis else len(items), "type": items[0]}
    else:
        settings["type"] = kind
    if "choices" in field.metadata:
        settings["choices"] = field.metadata["choices"]
        settings["metavar"] = "|".join(field.metadata["choices"])
    else:
        settings["metavar"] = field.metadata.get("metavar", "N" if kind is int else "X")
    group.add_argument(flag, **settings)


def _plain(hint: Any) -> Any:
    """`int | None` -> int."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(hint) if one is not type(None))
    return hint


def _shown(default: Any) -> str:
    if default is None or default == "" or default == ():
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, Sequence) and not isinstance(default, str):
        return " ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in default)
    return str(default)
