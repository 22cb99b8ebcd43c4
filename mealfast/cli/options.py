"""Command-line options from the recipe's fields: grouped, typed, with the defaults that the code has."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Collection, Sequence
from typing import Any

from mealfast.recipe import RECIPES, Recipe, make_recipe


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line (status 2), and whose help shows what a line's worth of text holds."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=118))
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> typing.NoReturn:
        self.exit(2, f"mealfast: {message} (see {self.prog} --help)\n")


def add_recipe_options(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """`--recipe`, and one option for every field of `Recipe` (or for those named in `only`), in its groups."""
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help=f"the paper's settings for a student: {', '.join(RECIPES)}; options override them",
    )
    groups: dict[str, Any] = {}
    hints = typing.get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if only is not None and field.name not in only:
            continue
        title = field.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        _add_option(group, field, hints[field.name])


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the parsed options describe. Raises UsageError."""
    return make_recipe(arguments.recipe, **given_fields(arguments))


def given_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Recipe` that the parsed options name."""
    return {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in dataclasses.fields(Recipe)
        if (value := getattr(arguments, field.name, None)) is not None
    }


def _add_option(group: Any, field: dataclasses.Field, hint: Any) -> None:
    flag = "--" + field.name.replace("_", "-")
    help_text = f"{field.metadata['help']} (default: {_shown(field.default)})".replace("%", "%%")
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
