"""A trained model with what is known of it: from a run directory or from a model spec."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from mealfast.errors import UsageError
from mealfast.loaders import EvalViews
from mealfast.machine.files import brief, read_object
from mealfast.models import normalised as models
from mealfast.models.normalised import NormalizedModel
from mealfast.models.spec import ModelSpec, parse

_LARGEST = 64 << 20  # bytes of a config.json or summary.json that is read


@dataclass(frozen=True)
class Trained:
    """A model that can be handed on. `config` and `summary` are a run's config.json and summary.json, else {}."""

    name: str  # as the user named it
    spec: ModelSpec  # as it was built
    model: NormalizedModel  # float32, on the CPU, in evaluation mode
    views: EvalViews  # that it is evaluated on
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


def open_trained(name: str, size: int | None = None) -> Trained:
    """The model in a run directory, or of a model spec; evaluated at `size` pixels a side (None: the run's, or timm's
    for that model).

    A run's student is evaluated as the run evaluated it, other models as timm evaluates them. Raises UsageError: no
    such model, one without weights, or one that cannot take images of that size.
    """
    folder = Path(name).expanduser()
    if is_run(folder):
        config, summary = _object(folder / "config.json"), _object(folder / "summary.json", missing_is_empty=True)
        recipe = _recipe(config, folder)
        views = EvalViews.from_crop_pct(size or recipe["size"], recipe["eval_crop_pct"], recipe["eval_interpolation"])
        spec = student_spec(config, folder)
        model = models.build(spec, views.size)
    else:
        config, summary, spec = {}, {}, name
        if models.is_random(spec) and timm.is_model(parse(spec).architecture):  # of other names `build` says more
            raise UsageError(
                f"model spec '{brief(spec)}': has no weights; give a run directory, a tag or a checkpoint, for "
                f"instance {brief(spec)}@FILE"
            )
        model = models.build(spec, size)
        views = _own_views(model, size)
    models.probe(model, spec, views.size)
    return Trained(name, parse(spec), model.eval(), views, config, summary)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory."""
    try:
        return folder.is_dir() and (folder / "config.json").is_file() and (folder / "metrics.jsonl").exists()
    except OSError:  # a name too long for a file: a spec
        return False


def student_spec(config: Mapping[str, Any], run: Path) -> str:
    """The model spec of a run's student. Raises UsageError where the run has not written it yet."""
    weights = run / "student.safetensors"
    if not weights.is_file():
        raise UsageError(
            f"{brief(str(run))}: has no student.safetensors yet: it is written when the run ends or is stopped"
        )
    if isinstance(config.get("model"), dict):
        return str(weights)  # which says by itself what it is
    return f"{str(config['recipe']['student']).partition('@')[0]}@{weights}"  # of an earlier mealfast


def _recipe(config: Mapping[str, Any], run: Path) -> Mapping[str, Any]:
    """The recipe in a config.json, whose fields that are used here are what they should be. Raises UsageError."""
    recipe = config.get("recipe")
    if not isinstance(recipe, dict):
        raise UsageError(f"{brief(str(run))}/config.json: is damaged (its recipe)")
    kinds: dict[str, Any] = {
        "student": str,
        "size": int,
        "eval_interpolation": str,
        "eval_crop_pct": (int, float, type(None)),
    }
    for name, kind in kinds.items():
        value = recipe.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{brief(str(run))}/config.json: is damaged (its recipe's {name})")
    return recipe


def _object(path: Path, *, missing_is_empty: bool = False) -> dict[str, Any]:
    try:
        if missing_is_empty and not path.exists():
            return {}
        if path.stat().st_size > _LARGEST:
            raise ValueError
        return read_object(path)
    except OSError as error:
        raise UsageError(f"{brief(str(path))}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UsageError(f"{brief(str(path))}: is damaged") from error


def _own_views(model: NormalizedModel, size: int | None) -> EvalViews:
    own = models.evaluation_config(model)
    size = size or getattr(model, "trained_size", None)
    interpolation = own["interpolation"] if own["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    return EvalViews.from_crop_pct(size or own["size"], own["crop_pct"], interpolation)


def data_config(trained: Trained) -> dict[str, Any]:
    """How images become the model's input, in timm's words: input_size (C, H, W), mean, std, interpolation, crop_pct,
    crop_mode. timm's evaluation transform of it makes the views that mealfast evaluates on."""
    views = trained.views
    return {
        "input_size": (3, views.size, views.size),
        "mean": trained.model.mean,
        "std": trained.model.std,
        "interpolation": views.interpolation,
        "crop_pct": crop_pct(views),
        "crop_mode": "center",
    }


def crop_pct(views: EvalViews) -> float:
    """The share of the resized shorter side that is kept, as timm has it: floor(size / share) is `views.resize`."""
    share = views.size / views.resize
    if int(views.size / share) != views.resize:  # the quotient was rounded up, and the next one down
        share = views.size / (views.resize + 0.5)
    return share
