"""What a model takes image files for, from Python.

Shape legend: B images, C classes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

from mealfast.downstream.distilling import Distilled
from mealfast.downstream.images import classify, in_batches
from mealfast.downstream.plain import plain_model
from mealfast.downstream.trained import open_trained
from mealfast.errors import UsageError
from mealfast.loaders import EvalViews
from mealfast.machine.files import printable
from mealfast.machine.unchanged import unchanged
from mealfast.models.normalised import NormalizedModel

Model = Distilled | nn.Module | str | os.PathLike[str]


@dataclass(frozen=True)
class Guess:
    """A class that an image may be of."""

    name: str  # the number where the model's classes have no names
    probability: float
    number: int  # the model's output


@dataclass(frozen=True)
class Prediction:
    """What an image is taken for, most probable first; nothing where `error` says why its file could not be read."""

    file: str
    guesses: tuple[Guess, ...]
    error: str | None = None


def load(name: str | os.PathLike[str], size: int | None = None) -> nn.Module:
    """The student of a run directory, or the model of a spec, as `plain_model` gives it. Raises UsageError."""
    with unchanged():
        return plain_model(open_trained(os.fspath(name), size))


def predict(
    model: Model, files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], *, top: int, keep_broken: bool
) -> list[Prediction]:
    """See `mealfast.predict`."""
    if top < 1:
        raise UsageError(f"top={top}: must be 1 or more")
    files = [files] if isinstance(files, (str, os.PathLike)) else list(files)
    module = model.student if isinstance(model, Distilled) else model
    module = module if isinstance(module, nn.Module) else load(module)
    normalised, views, names = _ready(module)
    device = next(module.parameters()).device
    training = module.training
    found = []
    try:
        normalised.eval()
        for paths, outcomes in in_batches([os.fspath(file) for file in files], views):
            pixels = [one for one in outcomes if not isinstance(one, str)]
            guesses = iter(classify(normalised, pixels, device, top) if pixels else ())
            for path, outcome in zip(paths, outcomes, strict=True):
                if isinstance(outcome, str):
                    if not keep_broken:
                        raise UsageError(f"{printable(path)}: {outcome} (keep_broken=True passes over such files)")
                    found.append(Prediction(path, (), outcome))
                    continue
                found.append(Prediction(path, tuple(Guess(names[c], p, c) for c, p in next(guesses))))
    finally:
        module.train(training)
    return found


def _ready(module: nn.Module) -> tuple[NormalizedModel, EvalViews, list[str]]:
    """A timm module behind its own preprocessing, on its device, its views, and a name for each output."""
    if not hasattr(module, "pretrained_cfg"):
        raise UsageError(
            f"{type(module).__name__}: is no model of timm or of mealfast.load: nothing says how its images are made"
        )
    config: dict[str, Any] = timm.data.resolve_model_data_config(module)
    size = config["input_size"][-1]
    interpolation = config["interpolation"] if config["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    views = EvalViews.from_crop_pct(size, config["crop_pct"], interpolation)
    normalised = NormalizedModel(module, config["mean"], config["std"], size)
    normalised.to(next(module.parameters()).device)
    return normalised, views, _names(module, normalised.num_classes)


def _names(module: Any, outputs: int) -> list[str]:
    """A readable name for every output: those that the model knows, ImageNet's, else numbers."""
    info = timm.data.ImageNetInfo("imagenet-1k")
    own = module.pretrained_cfg.get("label_names")
    names = list(map(str, own)) if isinstance(own, (list, tuple)) else []
    if len(names) == outputs and names != list(info.label_names()):
        return names
    if outputs == info.num_classes():
        return [info.index_to_description(number).partition(",")[0] for number in range(outputs)]
    return [str(number) for number in range(outputs)]
