"""Model specs, the way models are named on the command line: `NAME[.TAG][?key=value&...][@CHECKPOINT]`, or what says by
itself of which architecture it is: a run directory, a file of mealfast's, `local-dir:DIR`, `hf-hub:ORG/NAME`."""

from __future__ import annotations

import ast
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealfast.errors import UsageError
from mealfast.machine.files import brief

PATH, FOLDER, HUB = "path", "local-dir", "hf-hub"  # what explains itself: a file or run directory, timm's two sources
_GRAMMAR = "must be NAME[.TAG][?key=value&...][@CHECKPOINT]"
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".tar", ".ckpt")


@dataclass(frozen=True)
class ModelSpec:
    """A parsed model spec: timm's architecture, pretrained tag, keyword arguments of its constructor, weights file.

    Tag and file are "" where there are none; the file's `~` is expanded. The architecture is "" where `source` says
    what tells it: the file, run directory, folder or repository in `checkpoint`.
    """

    text: str
    architecture: str
    tag: str
    kwargs: dict[str, Any]
    checkpoint: str
    source: str = ""  # PATH, FOLDER, HUB
    random: bool = False  # ?weights=random: random weights are what is wanted

    @property
    def timm_name(self) -> str:
        """NAME or NAME.TAG."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def parse(text: str) -> ModelSpec:
    """`senet154.gluon_in1k`, `tf_efficientnet_lite1@~/lite1.pth`, `runs/a`, `local-dir:exported?drop_rate=0.1`.

    Raises UsageError with the grammar where the text does not follow it. Looks whether a file of that name is there.
    """
    source, place, query = _source(text)
    if source:
        kwargs = _arguments(text, query)
        _random(text, kwargs, has_weights=True)
        return ModelSpec(text, "", "", kwargs, place, source=source)
    name, _, checkpoint = text.partition("@")
    name, has_kwargs, query = name.partition("?")
    architecture, _, tag = name.partition(".")
    if not architecture or text.endswith("@") or (has_kwargs and not query):
        raise UsageError(f"model spec '{brief(text)}': {_GRAMMAR}")
    kwargs = _arguments(text, query)
    random = _random(text, kwargs, bool(tag or checkpoint))
    return ModelSpec(text, architecture, tag, kwargs, os.path.expanduser(checkpoint), random=random)


def _random(text: str, kwargs: dict[str, Any], has_weights: bool) -> bool:
    """Takes `weights=random` out of the arguments; whether it was there."""
    if "weights" not in kwargs:
        return False
    if kwargs.pop("weights") != "random" or has_weights:
        raise UsageError(
            f"model spec '{brief(text)}': weights= can only be random, for a spec with neither a tag nor a checkpoint"
        )
    return True


def without_folders(text: str) -> str:
    """A spec as it is wherever its files lie: `a/b.pth` is `b.pth`."""
    prefix, at, place = text.rpartition("@")
    source, colon, _ = text.partition(":")
    if source in (HUB, "hf_hub"):
        return text
    if colon and source == FOLDER:
        prefix, at, place = source, colon, text.partition(":")[2]
    return prefix + at + os.path.basename(os.path.normpath(place))


def _source(text: str) -> tuple[str, str, str]:
    """What explains itself, where it is, and the arguments after it; "" where the spec names an architecture."""
    prefix, colon, rest = text.partition(":")
    prefix = prefix.lower().replace("_", "-")
    if colon and prefix in (FOLDER, HUB):
        name, has_query, query = rest.rpartition("?") if "?" in rest and not _exists(rest) else (rest, "", "")
        if not name or (has_query and not query):
            raise UsageError(
                f"model spec '{brief(text)}': must be {prefix}:{'DIR' if prefix == FOLDER else 'ORG/NAME'}"
            )
        return prefix, os.path.expanduser(name) if prefix == FOLDER else name, query
    for path, query in ((text, ""), text.rpartition("?")[::2]):
        if path and _exists(path) and not _is_architecture(path):
            return PATH, os.path.expanduser(path), query
    return "", "", ""


def _exists(path: str) -> bool:
    """Whether there is a file, or a folder that a model may lie in."""
    try:
        found = Path(path).expanduser()
        return found.is_file() or (found / "config.json").is_file() or (found / "student.safetensors").is_file()
    except (OSError, RuntimeError, ValueError):  # too long; a home of nobody; a null byte
        return False


def _is_architecture(name: str) -> bool:
    """Whether a name of a file or folder, which exists, is meant as timm's: a run may be called resnet18."""
    if not re.fullmatch(r"\w+(\.\w+)?", name) or name.endswith(_WEIGHTS):
        return False
    from timm import is_model  # takes seconds: not for who only parses

    return bool(is_model(name.partition(".")[0]))


def _arguments(text: str, query: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise UsageError(f"model spec '{brief(text)}': '{brief(pair)}' must be key=value")
        kwargs[key] = _literal(value)
    return kwargs


def _literal(value: str) -> Any:
    """Numbers, booleans, None and tuples as Python writes them (true, false, none too); the rest are strings."""
    plain = {"true": True, "false": False, "none": None}
    if value.lower() in plain:
        return plain[value.lower()]
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two of a thousand brackets
        return value
    return found if is_plain(found) else value


def is_plain(value: object, depth: int = 3) -> bool:
    """Whether an argument is a number, a text, a truth value, None, or a list or object of such: what JSON can hold."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and is_plain(list(value.values()), depth)
    if isinstance(value, (list, tuple)):
        return depth > 0 and all(is_plain(one, depth - 1) for one in value)
    return value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
