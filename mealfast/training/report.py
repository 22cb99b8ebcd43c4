"""What a run says of itself: config.json and the first lines of its log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mealfast.loaders import LabelCache
from mealfast.machine import processes as runtimes
from mealfast.machine.version import VERSION
from mealfast.machine.wording import counted
from mealfast.models import normalised as models
from mealfast.models.description import Description
from mealfast.models.spec import without_folders
from mealfast.recipe import Recipe
from mealfast.training.job import Job
from mealfast.training.scoring import Evaluation, is_chance


def identity(job: Job) -> dict[str, Any]:
    """What a checkpoint must agree with beside the recipe: the same images, the same teachers or cached targets."""
    cache = job.label_cache
    return {
        "images": {"train": job.data.train.digest, "val": job.data.val.digest},
        "targets": job.writing.to_json() if job.writing else None if cache is None else cache.header.digest,
        "teachers": dict(zip(job.live_teachers, job.teacher_digests, strict=True)),
    }


def description(job: Job) -> Description:
    """What the student's file says of it: the same wherever images, teachers and cache lie."""
    if job.label_cache is not None:
        given = [(teacher["spec"], teacher["digest"]) for teacher in job.label_cache.header.teachers]
    else:
        given = list(zip(job.live_teachers, job.teacher_digests, strict=True))
    teachers = [{"spec": without_folders(spec), "digest": digest} for spec, digest in given]
    return job.student.normalised.description(job.recipe.size, teachers)


def config(job: Job) -> dict[str, Any]:
    """The content of config.json: the full recipe, versions, hardware, digests, and how each teacher runs."""
    same = identity(job)
    return {
        "mealfast": VERSION,
        "recipe": job.recipe.to_json(),
        "model": description(job).to_json(),
        "processes": job.runtime.world_size,
        "device": job.runtime.device.type,
        "precision": job.student.precision,
        "compiled": job.compiled,
        "teachers": [report.to_json() for report in job.reports],
        "versions": runtimes.describe(job.runtime.device),
        "images": {"train": len(job.data.train), "val": len(job.data.val)},
        "image_digests": same["images"],
        "teacher_digests": same["teachers"],
        "label_cache": None if job.label_cache is None else job.label_cache.header.to_json(),
        "write_through": job.writing.to_json() if job.writing else None,
    }


def stored_summary(path: Path) -> dict[str, Any]:
    """The summary.json of an earlier process; {} where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def introduction(job: Job) -> list[str]:
    """The log's first lines: notes first, then what is trained on what, then how each teacher runs."""
    recipe, data = job.recipe, job.data
    lines = [*models.random_notes((recipe.student, *job.live_teachers)), *job.class_notes]
    lines += [
        f"note: {counted(len(index.quarantined), 'file')} below {index.root} cannot be read: see mealfast index "
        f"{index.root}"
        for index in (data.train, data.val)
        if index.quarantined
    ]
    teachers = " + ".join(job.live_teachers) or "none (labels alone)"
    discriminator = recipe.discriminator_mode
    if job.label_cache is not None:
        lines += _cache_notes(recipe, job.label_cache)
        teachers = f"none runs (label cache {recipe.label_cache})"
    if recipe.label_cache and discriminator != "off":
        discriminator += " (on log-probabilities: a cache holds no logits)"
    return [
        *lines,
        f"student {recipe.student}  teachers {teachers}  discriminator {discriminator}",
        f"{counted(len(data.train), 'image')}, {counted(recipe.epochs, 'epoch')} of "
        f"{counted(job.calendar.steps_per_epoch, 'step')} of {recipe.batch_size} at {recipe.size} px  |  "
        f"{job.runtime.world_size} x {job.runtime.device.type}, {job.student.precision}, {recipe.loader} loader  |  "
        f"{recipe.run_dir}",
        *map(str, job.reports),
    ]


def teachers_scores(job: Job, result: Evaluation) -> list[str]:
    """What each teacher and the ensemble reach on the validation images, and a warning of one that only guesses."""
    classes, scores = job.student.num_classes, result.models[1:]
    lines = [
        f"evaluated teacher {spec}:  top-1 {score.top1:.2f}%  top-5 {score.top5:.2f}%"
        for spec, score in zip(job.live_teachers, scores, strict=True)
    ]
    if result.ensemble:
        lines.append(f"evaluated ensemble:  top-1 {result.ensemble.top1:.2f}%  top-5 {result.ensemble.top5:.2f}%")
    return lines + [
        f"warning: teacher {spec} is no better than chance ({100 / classes:.3g}%): are its classes those of the "
        "folders, in the same order, and its weights trained?"
        for spec, score in zip(job.live_teachers, scores, strict=True)
        if is_chance(score, classes)
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
