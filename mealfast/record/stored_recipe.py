"""Fields of a recipe as a file holds them: in a run's config.json, a checkpoint, or a file of options."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Any

from mealfast.errors import UsageError, alternatives
from mealfast.machine.files import brief, shown
from mealfast.recipe import Recipe, option_fields

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}


def fields_of(content: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The recipe's fields among the keys of `content`: options, with - or _ between their words.

    Lists become tuples. Raises UsageError, which begins with `what` (the file) and names the key: there is no such
    option, or its value has another type.
    """
    hints = typing.get_type_hints(Recipe)
    known = [one.name for one in option_fields()]
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UsageError(f"{what}: there is no option {brief(str(key), 60)}; {_close(name, known)}")
        if name in found:
            raise UsageError(f"{what}: {brief(str(key), 60)} stands there twice; once is enough")
        if not _fits(hints[name], value):
            raise UsageError(f"{what}: {brief(str(key), 60)} = {shown(value)}: must be {_words(hints[name])}")
        found[name] = _converted(hints[name], value)
    return found


def _close(name: str, known: list[str]) -> str:
    said = alternatives(name, known)
    return said.partition(" One of")[0] if said.startswith("did you mean") else "`mealfast train --help` lists them"


def _kinds(hint: Any) -> tuple[Any, ...]:
    """`int | None` -> int, NoneType."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _fits(hint: Any, value: Any) -> bool:
    for kind in _kinds(hint):
        if kind is float and type(value) in (int, float):
            return True
        if kind in (bool, int, str, type(None)) and type(value) is kind:
            return True
        if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
            items = typing.get_args(kind)
            many = items[-1] is Ellipsis
            return (many or len(value) == len(items)) and all(_fits(items[0], one) for one in value)
    return False


def _converted(hint: Any, value: Any) -> Any:
    for kind in _kinds(hint):
        if typing.get_origin(kind) is tuple:
            return tuple(_converted(typing.get_args(kind)[0], one) for one in value)
        if kind is float and type(value) is int:
            return float(value) if abs(value) < 2**53 else value
    return value


def _words(hint: Any) -> str:
    said = []
    for kind in _kinds(hint):
        if typing.get_origin(kind) is tuple:
            items = typing.get_args(kind)
            count = "" if items[-1] is Ellipsis else f"{len(items)} "
            said.append(f"a list of {count}values, each {_WORDS[items[0]]}")
        elif kind is not type(None):
            said.append(_WORDS[kind])
    return " or ".join(said)
