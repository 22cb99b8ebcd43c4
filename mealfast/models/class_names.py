"""Names of classes: ImageNet's, those of a file, and the orders in which others number class folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo
from timm.utils.misc import natural_key

from mealfast.errors import UsageError
from mealfast.machine.files import brief

LONGEST_NAME = 1000  # characters
MOST_NAMES = 1 << 17
_LARGEST_MAP = 1 << 24  # bytes
_SAID = 3  # names in a line

Names = tuple[str, ...]  # of a model's outputs, in their order


@cache
def imagenet() -> Names:
    """The wnids of ImageNet-1k in the order of its labels."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


def readable(names: Names | None, outputs: int) -> list[str]:
    """A name for people of each output: ImageNet's words for its wnids, and numbers where nothing is known."""
    if names is None:
        return [str(number) for number in range(outputs)]
    if names == imagenet():
        info = ImageNetInfo("imagenet-1k")
        return [info.index_to_description(number).partition(",")[0] for number in range(outputs)]
    return list(names)


def natural_order(names: Iterable[str]) -> Names | None:
    """As timm numbers class folders: numbers by value, letters without case. None where that leaves it open."""
    try:
        keys = {name: natural_key(name) for name in names}
    except ValueError:  # a digit that is no decimal one, like ²
        return None
    if len(set(map(repr, keys.values()))) < len(keys):  # "a" and "A": timm's order of these two is by chance
        return None
    return tuple(sorted(keys, key=keys.__getitem__))


def read_class_map(path: str) -> Names:
    """The names in a text file, one a line. Raises UsageError where it cannot be read."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_LARGEST_MAP + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"--class-map {brief(path)}: cannot be read ({reason}); give a text file with one class name a line, in "
            "the order of the model's outputs, or natural, or byte"
        ) from error
    if len(data) > _LARGEST_MAP:
        raise UsageError(f"--class-map {brief(path)}: is larger than {_LARGEST_MAP} bytes; it must hold class names")
    return tuple(name for line in text.split("\n") if (name := line.strip()))


def check_names(names: object) -> Names:
    """Class names from a file. Raises ValueError where they are no list of different texts."""
    if not isinstance(names, (list, tuple)) or not 1 <= len(names) <= MOST_NAMES:
        raise ValueError(f"class names must be a list of 1 to {MOST_NAMES}")
    if not all(isinstance(name, str) and 0 < len(name) <= LONGEST_NAME for name in names):
        raise ValueError(f"class names must be texts of at most {LONGEST_NAME} characters")
    if len(set(names)) < len(names):
        raise ValueError("class names must differ from one another")
    return tuple(names)


def said(names: Sequence[str]) -> str:
    """The first few of some names, for a line: they may be a stranger's."""
    more = f" and {len(names) - _SAID} more" if len(names) > _SAID else ""
    return ", ".join(brief(name, 60) for name in names[:_SAID]) + more
