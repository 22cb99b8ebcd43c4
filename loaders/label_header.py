"""The header of a label cache: what its targets were made of, and which of its views are complete. NumPy only.

The format is written down in LABEL_CACHE.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .batch import DataError
from .files import printable, replacing
from .views import ViewPlan

HEADER = "header.json"
FORMAT = "mealfast label cache"
VERSION = 1  # of caches whose boxes follow from the plan
EXPLICIT_VERSION = 2  # of caches that hold their boxes
EXPLICIT = "explicit"  # the law of such a cache's plan
LARGEST_HEADER = 1 << 26  # bytes; 100,000 views take 20 MB
LARGEST_DEPTH = 8  # of objects and lists within one another
LARGEST_TEXT = 1 << 16  # characters
LARGEST_K = 4096
LONGEST_NAME = 1000  # characters of a class's
_LIMITS = {"images": 1 << 40, "views": 1_000_000, "top_k": LARGEST_K, "classes": (1 << 31) - 1}
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class CompleteView:
    """What is known of a view once all its targets are on disk."""

    view: int
    sha256: str  # of the view's file, hex
    mean_kept: float  # mean over images of the probability that the top k hold
    mean_entropy: float  # nats, mean over images, of the target with the rest spread evenly over the other classes


@dataclasses.dataclass(frozen=True)
class CacheHeader:
    """Everything that makes the targets of a cache what they are."""

    images: int
    images_digest: str  # ImageIndex.images_digest
    plan: dict[str, Any]  # ViewPlan.fingerprint() without its cycle, which is `views`
    views: int
    classes: int
    top_k: int
    teachers: tuple[dict[str, str], ...]  # {"spec", "digest"} each
    made_with: dict[str, Any]  # batch_size, precision, loader, compiled; versions and device
    complete: tuple[CompleteView, ...] = ()  # ascending
    temperature: float = 1.0
    class_names: tuple[str, ...] | None = None  # [C] of the classes that the ids number; None: not known

    @property
    def explicit(self) -> bool:
        """Whether the cache holds its crop boxes and flips, as an imported one does."""
        return self.plan.get("law") == EXPLICIT

    @property
    def row(self) -> np.dtype:
        """One image's target as it lies in a view's file, little-endian: `ids` [k] and `probabilities` [k]; in an
        explicit cache also `box` [4] (x, y, width, height, pixels) and `flip`."""
        ids = "<u2" if self.classes <= 1 << 16 else "<i4"
        target = [("ids", ids, (self.top_k,)), ("probabilities", "<f2", (self.top_k,))]
        return np.dtype([*target, ("box", "<u2", (4,)), ("flip", "u1")] if self.explicit else target)

    @property
    def bytes_per_view(self) -> int:
        """Size of one view's file."""
        return self.images * self.row.itemsize

    @property
    def is_complete(self) -> bool:
        """Whether every view is there."""
        return len(self.complete) == self.views

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides the targets: the same wherever images, teachers and cache lie."""
        content = self.to_json()
        del content["made_with"]
        content["teachers"] = [teacher["digest"] for teacher in self.teachers]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The content of header.json."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("complete", "class_names")
        }
        if self.class_names is not None:  # absent otherwise: the digest of a cache without names is what it was
            fields["class_names"] = list(self.class_names)
        return {
            "format": FORMAT,
            "version": EXPLICIT_VERSION if self.explicit else VERSION,
            "byte_order": "little",
            **fields,
            "teachers": [dict(teacher) for teacher in self.teachers],
            "id_dtype": "uint16" if self.row["ids"].base.itemsize == 2 else "int32",
            "probability_dtype": "float16",
            "complete": [dataclasses.asdict(view) for view in self.complete],
        }


def view_name(view: int) -> str:
    """File name of a view."""
    return f"view-{view:04}.bin"


def plan_fields(plan: ViewPlan) -> dict[str, Any]:
    """A plan as the header has it."""
    return {name: value for name, value in plan.fingerprint().items() if name != "cycle"}


def read_header(folder: Path) -> CacheHeader:
    """The header of the cache in `folder`. Raises DataError: it is no cache, damaged or of another version."""
    path = folder / HEADER
    if folder.is_file():
        raise DataError(f"label cache {folder}: is a file; a cache is a folder that `mealfast labels build` wrote")
    if not path.is_file():
        raise DataError(f"label cache {folder}: has no {HEADER}; name a folder that `mealfast labels build` wrote")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_HEADER + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > LARGEST_HEADER:
        raise DataError(f"{path}: is larger than {LARGEST_HEADER} bytes; it is no label cache's header")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is damaged (no JSON); copy or build the cache again") from None
    # Not tamed: they are compared with the names of folders. Whoever prints one escapes it.
    names = content.pop("class_names", None) if isinstance(content, dict) else None
    try:
        content = _tame(content, LARGEST_DEPTH)
    except ValueError as error:
        raise DataError(f"{path}: is damaged ({error}); copy or build the cache again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(f"{path}: is no header of a label cache (format must be '{FORMAT}')")
    if content.get("version") not in (VERSION, EXPLICIT_VERSION):
        raise DataError(
            f"{path}: version {reprlib.repr(content.get('version'))}; this mealfast reads versions {VERSION} and "
            f"{EXPLICIT_VERSION}"
        )
    if content.get("byte_order") != "little":
        order = reprlib.repr(content.get("byte_order"))
        raise DataError(f"{path}: byte order {order}; it must be 'little': build the cache again")
    try:
        return dataclasses.replace(_parsed(content), class_names=_class_names(names, content["classes"]))
    except (KeyError, TypeError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else error
        raise DataError(f"{path}: is damaged ({reason}); copy or build the cache again") from None


def write_header(folder: Path, header: CacheHeader) -> None:
    """Puts the header in place in one piece, synced to disk. Raises OSError."""
    with replacing(folder / HEADER) as temporary:
        temporary.write_text(json.dumps(header.to_json(), indent=1) + "\n", encoding="utf-8")


def differences(stored: CacheHeader, wanted: CacheHeader) -> Iterator[tuple[str, Any, Any]]:
    """(what, stored value, wanted value) wherever targets of the two could differ; views may be fewer or more."""
    for name in ("images", "images_digest"):
        if (a := getattr(stored, name)) != (b := getattr(wanted, name)):
            yield name, a, b
    for name in wanted.plan:
        if stored.plan.get(name) != wanted.plan[name]:
            yield name, stored.plan.get(name), wanted.plan[name]
    for name in ("classes", "top_k", "temperature"):
        if (a := getattr(stored, name)) != (b := getattr(wanted, name)):
            yield name, a, b
    for number, (a, b) in enumerate(zip(stored.class_names or (), wanted.class_names or (), strict=False)):
        if a != b:  # where both know their names
            yield "class_names", printable(f"{number} is {a}"), printable(f"{number} is {b}")
    ours, theirs = ([teacher["digest"] for teacher in header.teachers] for header in (stored, wanted))
    if ours != theirs:
        there, here = ([teacher["spec"] for teacher in header.teachers] for header in (stored, wanted))
        yield "teachers", there, here
    for name in ("precision", "loader", "compiled"):
        if (a := stored.made_with.get(name)) != (b := wanted.made_with.get(name)):
            yield name, a, b


def _tame(value: Any, depth: int) -> Any:
    """A value of JSON whose texts can be printed: control characters become backslash escapes. Raises ValueError."""
    if depth == 0:
        raise ValueError("lists or objects in one another, deeper than a header's")
    if isinstance(value, dict):
        return {_tame(key, depth): _tame(one, depth - 1) for key, one in value.items()}
    if isinstance(value, list):
        return [_tame(one, depth - 1) for one in value]
    if isinstance(value, str):
        if len(value) > LARGEST_TEXT:
            raise ValueError(f"a text of {len(value)} characters")
        return printable(value)
    return value


def _parsed(content: dict[str, Any]) -> CacheHeader:
    for name, largest in _LIMITS.items():
        if type(content[name]) is not int or not 1 <= content[name] <= largest:
            raise ValueError(f"{name} must be from 1 to {largest}")
    if content["top_k"] > content["classes"]:
        raise ValueError(f"top_k {content['top_k']} of {content['classes']} classes")
    if type(content["temperature"]) not in (int, float) or not 0 < content["temperature"] < math.inf:
        raise ValueError("temperature must be positive")
    plan, made_with = content["plan"], content["made_with"]
    if not isinstance(plan, dict) or not isinstance(made_with, dict):
        raise ValueError("plan and made_with must be objects")
    explicit = content["version"] == EXPLICIT_VERSION
    if (plan["law"] == EXPLICIT) != explicit:
        raise ValueError(f"plan's law {reprlib.repr(plan['law'])} does not go with version {content['version']}")
    if plan["images"] != content["images"]:
        raise ValueError("plan's images must be those of the cache")
    if not explicit:
        _check_plan(plan)
    if type(made_with["batch_size"]) is not int or made_with["batch_size"] < 1:
        raise ValueError("batch_size must be 1 or more")
    _text(made_with["precision"]), _text(made_with["loader"])
    teachers = tuple({"spec": _text(one["spec"]), "digest": _text(one["digest"])} for one in content["teachers"])
    if not teachers:
        raise ValueError("it names no teacher")
    header = CacheHeader(
        images=content["images"],
        images_digest=_text(content["images_digest"]),
        plan=plan,
        views=content["views"],
        classes=content["classes"],
        top_k=content["top_k"],
        teachers=teachers,
        made_with=made_with,
        complete=tuple(_complete_view(one) for one in content["complete"]),
        temperature=content["temperature"],
    )
    numbers = [view.view for view in header.complete]
    if numbers != sorted(set(numbers)) or (numbers and not 0 <= numbers[0] <= numbers[-1] < header.views):
        raise ValueError("numbers of the complete views")
    own = header.to_json()
    for name in ("id_dtype", "probability_dtype"):
        if content[name] != own[name]:
            raise ValueError(f"{name} must be {own[name]}")
    return header


def _class_names(names: Any, classes: int) -> tuple[str, ...] | None:
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != classes or len(set(map(str, names))) != classes:
        raise ValueError(f"class_names must be {classes} different names")
    if not all(0 < len(_text(name)) <= LONGEST_NAME for name in names):
        raise ValueError(f"class_names must be of at most {LONGEST_NAME} characters")
    return tuple(names)


def _check_plan(plan: dict[str, Any]) -> None:
    if type(plan["seed"]) is not int or not 0 <= plan["seed"] < 2**64:
        raise ValueError("plan's seed must be from 0 to 2**64 - 1")
    if type(plan["size"]) is not int or not 1 <= plan["size"] <= 8192:
        raise ValueError("plan's size must be from 1 to 8192")
    for name, count in (("scale", 2), ("ratio", 2), ("flip", 1)):
        values = plan[name] if count == 2 else [plan[name]]
        if not isinstance(values, list) or len(values) != count or any(type(v) not in (int, float) for v in values):
            raise ValueError(f"plan's {name} must hold {count} number(s)")
    _text(plan["interpolation"])


def _complete_view(content: dict[str, Any]) -> CompleteView:
    view = CompleteView(**content)
    if type(view.view) is not int or not _SHA256.fullmatch(_text(view.sha256)):
        raise ValueError("a complete view needs its number and SHA-256")
    if not all(type(value) in (int, float) and math.isfinite(value) for value in (view.mean_kept, view.mean_entropy)):
        raise ValueError("means of a complete view")
    return view


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("text expected")
    return value
