"""Batch, epochs, learning rate and intervals that suit few images, where neither a recipe nor an option says them.

The defaults are the paper's, for 1.28 million images: 512 of them are no batch of 168.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mealfast.errors import UsageError
from mealfast.machine.wording import counted
from mealfast.models.spec import parse
from mealfast.recipe import Recipe

STEPS = 8  # to an epoch, at least, where the batch may be chosen
LEAST_BATCH = 8  # of which BatchNorm can still take a mean
LEAST_EPOCHS = 60
_LINES = 20  # of the log, at least, in a run whose intervals may be chosen
_BETWEEN_EVALUATIONS = 50  # steps: each writes a checkpoint of everything


def fitting_batch(images: int, unit: int) -> int:
    """The largest power of two times `unit` that makes STEPS steps of an epoch, LEAST_BATCH at least; 0 where there is
    no batch of so few images. `unit` is what a batch must be a multiple of: processes x --accumulate."""
    default = int(Recipe.batch_size)
    wanted = min(default, max(images // STEPS, min(LEAST_BATCH, images)))
    if unit > images:
        return 0
    batch = unit
    while 2 * batch <= wanted:
        batch *= 2
    return batch


def fit(recipe: Recipe, processes: int, images: int, folder: Path) -> tuple[Recipe, list[str]]:
    """The recipe with what it leaves open settled for the training images of a folder, and a line on what was chosen.

    From STEPS x 512 images on it is the defaults. Raises UsageError: the images do not make a batch.
    """
    unit = processes * recipe.accumulate
    few = images < STEPS * int(Recipe.batch_size)
    chosen: dict[str, Any] = {}
    if few and "batch_size" in recipe.left_open:
        chosen["batch_size"] = fitting_batch(images, unit) or recipe.batch_size
    batch = chosen.get("batch_size", recipe.batch_size)
    check_batch(batch, processes, recipe.accumulate)
    if batch > images:
        right = fitting_batch(images, unit)
        raise UsageError(
            f"--batch-size {batch}: {folder} holds only {counted(images, 'training image')}: "
            + (f"use --batch-size {right}" if right else f"give {unit} or more")
        )
    if few:
        chosen |= _calendar(recipe, images // batch, batch) | _fine_tuning(recipe, batch)
    chosen = {name: value for name, value in chosen.items() if value != getattr(recipe, name)}
    line = ", ".join(f"--{name.replace('_', '-')} {_typed(value)}" for name, value in chosen.items())
    said = [f"chosen for {counted(images, 'image')}: {line}"] if chosen else []
    return replace(recipe, left_open=(), **chosen), said


def adopt(recipe: Recipe, stored: dict[str, Any]) -> Recipe:
    """The recipe with what it leaves open as a run has it that goes on: `stored` are that run's checked fields. What is
    not among them is younger than the run, which had the default."""
    return replace(recipe, left_open=(), **{name: stored[name] for name in recipe.left_open if name in stored})


def check_batch(batch: int, processes: int, accumulate: int) -> None:
    """Raises UsageError where the processes cannot share a batch evenly."""
    unit = processes * accumulate
    if batch % unit:
        raise UsageError(
            f"--batch-size {batch}: must be a multiple of processes x --accumulate = {processes} x {accumulate}: use "
            f"--batch-size {max(batch // unit, 1) * unit}"
        )


def _calendar(recipe: Recipe, steps: int, batch: int) -> dict[str, Any]:
    """Epochs and intervals for `steps` an epoch, of those that are left open."""
    epochs = recipe.epochs
    chosen: dict[str, Any] = {}
    if "epochs" in recipe.left_open:
        # At the same learning rate a smaller batch goes further in an epoch, since it takes more steps.
        epochs = min(recipe.epochs, max(LEAST_EPOCHS, recipe.epochs * batch // int(Recipe.batch_size)))
        chosen["epochs"] = epochs
        if "lr_decay_epochs" in recipe.left_open:
            chosen["lr_decay_epochs"] = tuple(round(at * epochs / recipe.epochs) for at in recipe.lr_decay_epochs)
        if "eval_every" in recipe.left_open:
            chosen["eval_every"] = max(1, min(-(-_BETWEEN_EVALUATIONS // steps), epochs // 10))
    if "log_every" in recipe.left_open:
        chosen["log_every"] = max(1, min(recipe.log_every, epochs * steps // _LINES))
    return chosen


def _fine_tuning(recipe: Recipe, batch: int) -> dict[str, Any]:
    """How a student whose every weight has learnt something goes on from there by small batches of few images.

    By the paper's settings it loses more than it gains in the first hundred steps (docs/data.md has the figures).
    """
    student = parse(recipe.student)
    if not student.checkpoint and (not student.tag or "num_classes" in student.kwargs):
        return {}
    settings = {"lr": recipe.lr * batch / int(Recipe.batch_size), "student_bn": "eval"}  # lr: the linear scaling rule
    return {name: value for name, value in settings.items() if name in recipe.left_open}


def _typed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
