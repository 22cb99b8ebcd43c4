"""A run as a function: from images and models to a student that can be used."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mealfast.downstream.plain import plain_model
from mealfast.downstream.trained import open_trained
from mealfast.errors import UsageError
from mealfast.machine.stop_signal import StopSignal
from mealfast.machine.unchanged import unchanged
from mealfast.measure.forecast import stage_report
from mealfast.recipe import Recipe
from mealfast.training.loop import train

_SCORES = ("start", "final", "best", "teachers", "ensemble")


@dataclass(frozen=True)
class Distilled:
    """What a run has made."""

    student: nn.Module = field(repr=False)
    """timm's module, on the CPU, in evaluation mode: normalised float32 [B, 3, S, S] -> logits [B, C]. Its
    `pretrained_cfg` says how images become its input: timm's `create_transform(**resolve_model_data_config(student))`
    makes that, and `mealfast.predict(student, files)` needs no more."""

    scores: dict[str, Any]
    """{"start", "final", "best": {"top1", "top5" (percent), "images", "kl", "epoch", "step"}, "teachers": [...],
    "ensemble"}, on the validation images; None where something was not measured."""

    run_dir: Path
    """Checkpoints, metrics, TensorBoard's files, student.safetensors, summary.json."""

    finished: bool
    """False where `max_steps` ended the run before its last epoch: the same call with more goes on from there."""


def distill(recipe: Recipe) -> Distilled:
    """Runs a recipe in this process, or goes on with what its run directory holds. Raises what `loop.train` raises.

    A signal ends it as it ends `mealfast train`: the run saves. Then the signal is given to whoever handled it before,
    so that Ctrl-C, or a notebook's stop button, is a KeyboardInterrupt; the same call goes on from there.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError(
            "mealfast.distill runs in one process, on one device: for several start `torchrun ... -m mealfast train`"
        )
    stop = StopSignal()
    with unchanged():
        summary = train(recipe, stage_report if recipe.stage_report else None, stop)
        if stop.number is None:
            student = plain_model(open_trained(recipe.run_dir))
    if stop.number is not None:
        signal.raise_signal(stop.number)
        with unchanged():  # its handler has let the program go on
            student = plain_model(open_trained(recipe.run_dir))
    scores = {name: summary.get(name) for name in _SCORES}
    return Distilled(student, scores, Path(recipe.run_dir), bool(summary["finished"]))
