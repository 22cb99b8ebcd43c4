"""What a model file says of itself, so that it can be used without knowing where it came from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mealfast.machine.files import brief, parsed_object
from mealfast.models.class_names import Names, check_names
from mealfast.models.spec import is_plain

KEY = "mealfast"  # of a safetensors file's metadata
LARGEST = 1 << 24  # characters of JSON
_LARGEST_NUMBER = 1 << 20  # of a constructor's arguments: a stranger's file must not take all memory
_MOST = 64  # arguments, teachers


@dataclass(frozen=True)
class Description:
    """A timm model: what it is built from, what its input and its outputs mean, who taught it."""

    architecture: str  # timm's name, without a tag
    kwargs: dict[str, Any]  # of timm.create_model
    mean: tuple[float, ...]  # of pixels in [0, 1], one a channel
    std: tuple[float, ...]
    size: int | None  # pixels a side that it was trained at; None: not known
    classes: Names | None  # name of each output; None: not known
    teachers: tuple[dict[str, str], ...] = ()  # {"spec" (without folders), "digest" (SHA-256 of the weights)} each

    def to_json(self) -> dict[str, Any]:
        """Plain values, for config.json and checkpoints."""
        return {
            "architecture": self.architecture,
            "kwargs": {key: _listed(value) for key, value in self.kwargs.items()},
            "mean": list(self.mean),
            "std": list(self.std),
            "size": self.size,
            "classes": None if self.classes is None else list(self.classes),
            "teachers": [dict(teacher) for teacher in self.teachers],
        }

    def dumps(self) -> str:
        """JSON of ASCII characters, the same for equal descriptions."""
        return json.dumps(self.to_json(), sort_keys=True)

    @classmethod
    def loads(cls, text: str) -> Description:
        """What `dumps` gave. Raises ValueError, however the text is wrong: it may be a stranger's."""
        if len(text) > LARGEST:
            raise ValueError(f"it is longer than {LARGEST} characters")
        return cls.of(parsed_object(text))

    @classmethod
    def of(cls, content: object) -> Description:
        """What `to_json` gave; keys of a later mealfast are passed over. Raises ValueError."""
        if not isinstance(content, Mapping):
            raise ValueError("it is no JSON object")
        architecture, size, classes = content.get("architecture"), content.get("size"), content.get("classes")
        if not isinstance(architecture, str) or not 0 < len(architecture) <= 200:
            raise ValueError("its architecture must be a text")
        if size is not None and not (type(size) is int and 1 <= size <= 8192):
            raise ValueError("its size must be from 1 to 8192")
        return cls(
            architecture,
            _kwargs(content.get("kwargs", {})),
            _channels(content.get("mean"), "mean"),
            _channels(content.get("std"), "std", above=0.0),
            size,
            None if classes is None else check_names(classes),
            _teachers(content.get("teachers", [])),
        )


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _listed(one) for key, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, (list, tuple)) else value


def _kwargs(content: object) -> dict[str, Any]:
    if not isinstance(content, Mapping) or len(content) > _MOST:
        raise ValueError(f"its kwargs must be an object of at most {_MOST}")
    for key, value in content.items():
        if not isinstance(key, str) or not key.isidentifier() or len(key) > 200:
            raise ValueError(f"{brief(str(key), 60)} is no name of an argument")
        if not is_plain(value) or not _is_small(value):
            raise ValueError(f"its argument {brief(key, 60)} must be a number, a text or a list of them, and small")
    return {key: _tupled(value) for key, value in content.items()}


def _is_small(value: object) -> bool:
    if isinstance(value, dict):
        return _is_small([*value, *value.values()])
    if isinstance(value, (list, tuple)):
        return len(value) <= _MOST and all(map(_is_small, value))
    if isinstance(value, str):
        return len(value) <= 1000
    return not isinstance(value, int) or abs(value) <= _LARGEST_NUMBER


def _tupled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tupled(one) for key, one in value.items()}
    return tuple(map(_tupled, value)) if isinstance(value, (list, tuple)) else value


def _channels(content: object, name: str, above: float = -math.inf) -> tuple[float, ...]:
    if not isinstance(content, (list, tuple)) or len(content) != 3:
        raise ValueError(f"its {name} must be three numbers")
    if not all(type(one) in (int, float) and math.isfinite(one) and one > above for one in content):
        raise ValueError(f"its {name} must be three numbers")
    return tuple(map(float, content))


def _teachers(content: object) -> tuple[dict[str, str], ...]:
    if not isinstance(content, (list, tuple)) or len(content) > _MOST:
        raise ValueError(f"its teachers must be a list of at most {_MOST}")
    keys = ("spec", "digest")
    if not all(isinstance(one, Mapping) and all(isinstance(one.get(key), str) for key in keys) for one in content):
        raise ValueError("its teachers must be specs and digests")
    return tuple({key: one[key] for key in keys} for one in content)
