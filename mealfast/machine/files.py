"""Atomic writes and the escaping of what files say, for all of mealfast; they live in `mealfast.loaders.files`."""

import json
import reprlib
from pathlib import Path
from typing import Any

from mealfast.loaders.files import printable, replacing, sync_folder, words, write_json

__all__ = [
    "brief",
    "parsed_object",
    "printable",
    "read_object",
    "reason",
    "replacing",
    "shown",
    "sync_folder",
    "words",
    "write_json",
]

LONGEST = 300  # characters of a file's, a spec's or a library's words in one of our lines
_repr = reprlib.Repr()
_repr.maxlevel = 2  # a list of a few bytes may hold itself, or others ten deep that each hold the next ten times


def brief(text: str, most: int = LONGEST) -> str:
    """`text` for a line of ours: `printable`, and its middle left out where it is longer than `most` characters."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    return printable(text)


def reason(error: BaseException) -> str:
    """What an exception of a library says, for a line of ours: its first line, `brief`; its name where it says none."""
    said = str(error).strip()
    if isinstance(error, KeyError) or not said:  # a KeyError says the key alone
        said = f"{type(error).__name__} {said}".strip()
    return brief(said.splitlines()[0])


def shown(value: object) -> str:
    """A value that a file holds, of any type and depth, as Python writes it, for a line of ours."""
    return brief(_repr.repr(value))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises OSError; ValueError for anything else, however it is wrong."""
    return parsed_object(path.read_text(encoding="utf-8"))


def parsed_object(text: str) -> dict[str, Any]:
    """The JSON object that `text` is. Raises ValueError for anything else, brackets 200,000 deep among it."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("its brackets are too deep") from error
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content
