"""The recipe's fields as keyword arguments of Python functions. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import operator
import os
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from mealfast.errors import UsageError
from mealfast.recipe import Recipe

F = TypeVar("F", bound=Callable[..., Any])


def fields(but: Collection[str] = ()) -> dict[str, dataclasses.Field[Any]]:
    """The recipe's fields that are options, by name, without those named in `but`."""
    return {one.name: one for one in dataclasses.fields(Recipe) if one.metadata and one.name not in but}


def takes_fields(names: Collection[str]) -> Callable[[F], F]:
    """Has `help` and `inspect.signature` show these fields of the recipe in place of a function's `**options`."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = {name: one for name, one in signature.parameters.items() if one.kind is not one.VAR_KEYWORD}
        shown = {name: one for name, one in fields().items() if name in names and name not in own}
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=one.default, annotation=one.type)
            for name, one in shown.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own.values(), *keywords])  # type: ignore[attr-defined]
        lines = [f"    {name}: {one.metadata['help']}" for name, one in shown.items()]
        function.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n" + "\n".join(lines)
        return function

    return decorate


def checked(function: str, given: Mapping[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Keyword arguments as fields of the recipe have them: lists as tuples, paths as strings, NumPy's numbers as plain.

    Raises TypeError, as Python does, for a name that is not among the `known`; UsageError for a value of another type.
    """
    known, hints = list(known), typing.get_type_hints(Recipe)
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
    return {name: _of_type(name, value, hints[name]) for name, value in given.items()}


def _of_type(name: str, value: Any, hint: Any) -> Any:
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    for kind in allowed:
        try:
            return _converted(value, kind)
        except (TypeError, ValueError):
            continue
    raise UsageError(f"{name}={value!r}: must be {' or '.join(map(_named, allowed))}")


def _converted(value: Any, kind: Any) -> Any:
    """`value` as `kind`. Raises TypeError or ValueError where it is none: a text is no number, and True is none."""
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        if isinstance(value, (str, os.PathLike)):
            value = [value]  # one teacher
        if items[-1] is not Ellipsis and len(value) != len(items):
            raise ValueError
        return tuple(_converted(one, items[0]) for one in value)
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool):
        raise TypeError
    if kind is str:
        return os.fsdecode(os.fspath(value))
    if kind is int:
        return operator.index(value)
    if kind is float and not isinstance(value, (str, bytes)):
        return float(value)
    raise TypeError


def _named(kind: Any) -> str:
    if kind is type(None):
        return "None"
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        return f"a list of {items[0].__name__}" if items[-1] is Ellipsis else f"{len(items)} {items[0].__name__}s"
    return {bool: "True or False", str: "a string", int: "a whole number", float: "a number"}[kind]
