"""What a run says of itself: config.json and the first lines of its log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mealfast
from mealfast.labels.write_through import WritePlan
from mealfast.loaders import LabelCache
from mealfast.machine import processes as runtimes
from mealfast.machine.processes import Runtime
from mealfast.method.data import Splits
from mealfast.models import normalised as models
from mealfast.models.tuning import TeacherReport
from mealfast.recipe import Recipe
from mealfast.training.job import Parts


def identity(parts: Parts, data: Splits, writing: WritePlan | None) -> dict[str, Any]:
    """What a checkpoint must agree with beside the recipe: the same images, the same teachers or cached targets."""
    cache = parts.label_cache
    return {
        "images": {"train": data.train.digest, "val": data.val.digest},
        "targets": writing.to_json() if writing else None if cache is None else cache.header.digest,
        "teachers": dict(zip(parts.live_teachers, parts.teacher_digests, strict=True)),
    }


def config(
    recipe: Recipe,
    runtime: Runtime,
    parts: Parts,
    data: Splits,
    teachers: Sequence[TeacherReport],
    writing: WritePlan | None = None,
) -> dict[str, Any]:
    """The content of config.json: the full recipe, versions, hardware, digests, and how each teacher runs."""
    same = identity(parts, data, writing)
    return {
        "mealfast": mealfast.__version__,
        "recipe": recipe.to_json(),
        "processes": runtime.world_size,
        "device": runtime.device.type,
        "precision": parts.trainee.precision,
        "compiled": parts.compiled,
        "teachers": [report.to_json() for report in teachers],
        "versions": runtimes.describe(runtime.device),
        "images": {"train": len(data.train), "val": len(data.val)},
        "image_digests": same["images"],
        "teacher_digests": same["teachers"],
        "label_cache": None if parts.label_cache is None else parts.label_cache.header.to_json(),
        "write_through": writing.to_json() if writing else None,
    }


def stored_summary(path: Path) -> dict[str, Any]:
    """The summary.json of an earlier process; {} where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def introduction(recipe: Recipe, runtime: Runtime, parts: Parts, data: Splits, steps_per_epoch: int) -> list[str]:
    """The log's first lines: notes first, then what is trained on what."""
    lines = [
        f"note: {spec} has random weights (no tag and no checkpoint)"
        for spec in (recipe.student, *parts.live_teachers)
        if models.is_random(spec)
    ]
    lines += [
        f"note: {len(index.quarantined)} files below {index.root} cannot be read: see mealfast index {index.root}"
        for index in (data.train, data.val)
        if index.quarantined
    ]
    teachers = " + ".join(parts.live_teachers) or "none (labels alone)"
    discriminator = recipe.discriminator_mode
    if parts.label_cache is not None:
        lines += _cache_notes(recipe, parts.label_cache)
        teachers = f"none runs (label cache {recipe.label_cache})"
    if recipe.label_cache and discriminator != "off":
        discriminator += " (on log-probabilities: a cache holds no logits)"
    return [
        *lines,
        f"student {recipe.student}  teachers {teachers}  discriminator {discriminator}",
        f"{len(data.train):,} images, {recipe.epochs} epochs of {steps_per_epoch} steps of {recipe.batch_size} at "
        f"{recipe.size} px  |  {runtime.world_size} x {runtime.device.type}, {parts.trainee.precision}, "
        f"{recipe.loader} loader  |  {recipe.run_dir}",
    ]


def _cache_notes(recipe: Recipe, cache: LabelCache) -> list[str]:
    header = cache.header
    specs = " + ".join(teacher["spec"] for teacher in header.teachers)
    boxes = "its own crop boxes" if header.explicit else f"views of its seed {header.plan['seed']}"
    lines = [
        f"label cache: {header.views} views, top {header.top_k} of {header.classes} classes, by {specs}; {boxes}; the "
        "KL to the live ensemble on val/ is not measured"
    ]
    if header.explicit:
        return lines
    made_by = header.made_with.get("loader")
    if made_by != recipe.loader:
        lines.append(
            f"note: the cache was made with --loader {made_by}; {recipe.loader} rounds pixels a little differently"
        )
    return lines
