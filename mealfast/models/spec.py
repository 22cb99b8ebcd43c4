"""Model specs: `NAME[.TAG][?key=value&...][@CHECKPOINT]`, the way models are named on the command line."""

from __future__ import annotations

import ast
import os
from dataclasses import dataclass
from typing import Any

from mealfast.errors import UsageError
from mealfast.machine.files import brief


@dataclass(frozen=True)
class ModelSpec:
    """A parsed model spec: timm's architecture, pretrained tag, keyword arguments of its constructor, weights file.

    Tag and file are "" where there are none; the file's `~` is expanded.
    """

    text: str
    architecture: str
    tag: str
    kwargs: dict[str, Any]
    checkpoint: str
    random: bool = False  # ?weights=random: random weights are what is wanted

    @property
    def timm_name(self) -> str:
        """NAME or NAME.TAG."""
        return f"{self.architecture}.{self.tag}" if self.tag else self.architecture


def parse(text: str) -> ModelSpec:
    """`senet154.gluon_in1k`, `tf_efficientnet_lite1@~/lite1.pth`, `resnet18?num_classes=10@runs/a/student.safetensors`.

    Raises UsageError with the grammar where the text does not follow it.
    """
    name, _, checkpoint = text.partition("@")
    name, has_kwargs, query = name.partition("?")
    architecture, _, tag = name.partition(".")
    if not architecture or text.endswith("@") or (has_kwargs and not query):
        raise UsageError(f"model spec '{brief(text)}': must be NAME[.TAG][?key=value&...][@CHECKPOINT]")
    kwargs: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise UsageError(f"model spec '{brief(text)}': '{brief(pair)}' must be key=value")
        kwargs[key] = _literal(value)
    random = "weights" in kwargs
    if random and (kwargs.pop("weights") != "random" or tag or checkpoint):
        raise UsageError(
            f"model spec '{brief(text)}': weights= can only be random, for a spec with neither a tag nor a checkpoint"
        )
    return ModelSpec(text, architecture, tag, kwargs, os.path.expanduser(checkpoint), random)


def _literal(value: str) -> Any:
    """Numbers, booleans, None and tuples as Python writes them (true, false, none too); the rest are strings."""
    plain = {"true": True, "false": False, "none": None}
    if value.lower() in plain:
        return plain[value.lower()]
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two of a thousand brackets
        return value
