"""What the stages mean: which of them limits the run, how many hours it takes, how much memory it needs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mealfast.machine import memory
from mealfast.measure import stages
from mealfast.measure.stages import Stage
from mealfast.record.console import size_text
from mealfast.training.job import Job
from mealfast.training.resume import capture, restore
from mealfast.training.where import Where

HOUR = 3600.0
_FASTER_LOADER = 1.03  # a loader this much faster than the step is none that a step waits for


@dataclass(frozen=True)
class Forecast:
    """Stages by name, and what follows for this run on the processes that measured."""

    stages: dict[str, Stage]
    bottleneck: str
    hours: float  # to the end of the recipe, evaluations included
    cached_hours: float | None  # the same from a label cache
    cache_build_hours: float | None  # of a label cache with a view an epoch
    peak_bytes: int  # of one process
    capacity_bytes: int | None
    largest_batch: int | None  # images over all processes, estimated from the peak

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "stages": [stage.to_json() for stage in self.stages.values()]}


def forecast(job: Job, seconds: float, say: Callable[[str], None] = lambda line: None, first: int = 0) -> Forecast:
    """Measures a job for about `seconds` a stage, saying a line for each; `first` steps of it are taken already. The
    run goes on as if nothing had been."""
    runtime, calendar, recipe = job.runtime, job.calendar, job.recipe
    state = copy.deepcopy(capture(job))
    peak = memory.Peak(runtime.device)
    found: dict[str, Stage] = {}
    try:
        say(f"{'stage':<44} {'images/s':>10}  {'quartiles':>17}  {'ms/step':>9}")
        for stage in stages.measure(job, seconds, first):
            found[stage.name] = stage
            spread = f"{stage.p25:,.1f} to {stage.p75:,.1f}"
            say(f"{stage.name:<44} {stage.images_per_second:>10,.1f}  {spread:>17}  {1e3 * stage.seconds:>9,.2f}")
    finally:
        restore(state, job, "the stage report")
    weights = sum(p.numel() * p.element_size() for p in job.student.parameters())
    fixed, capacity = peak.before + 2 * weights, memory.capacity(runtime.device)  # + gradients and momentum
    local = recipe.batch_size // runtime.world_size
    fits = None if capacity is None else memory.largest_batch(peak.bytes(), fixed, local, capacity)
    steps, images = calendar.total_steps - first, len(job.data.train) * recipe.epochs
    evaluating = _evaluation_seconds(calendar.evaluations, len(job.data.val), found)
    cached, ensemble = found.get(stages.CACHED_STEP), found.get(stages.ENSEMBLE)
    labelling = None if ensemble is None else min(ensemble.images_per_second, found[stages.DECODE].images_per_second)
    return Forecast(
        found,
        bottleneck(list(found.values())),
        (steps * found[stages.STEP].seconds + evaluating) / HOUR,
        None if cached is None else (steps * cached.seconds + evaluating) / HOUR,
        None if labelling is None else images / labelling / HOUR,
        peak.bytes(),
        capacity,
        None if fits is None else fits * runtime.world_size,
    )


def stage_report(job: Job, where: Where, say: Callable[[str], None]) -> None:
    """What `--stage-report` shows before the first step: a second a stage, and the forecast made of it. Every process
    must call it."""
    for line in lines(job, forecast(job, 1.0, say, where.step), first=where.step):
        say(line)


def bottleneck(found: Sequence[Stage]) -> str:
    """The loader where the step waits for it; else the largest part of the step, with its share."""
    by_name = {stage.name: stage for stage in found}
    step = by_name[stages.STEP_REPLAYED]
    if by_name[stages.DECODE].images_per_second < _FASTER_LOADER * step.images_per_second:
        return f"{stages.DECODE}: the loader is no faster than the step"
    wholes = {
        stages.DECODE, stages.FORWARD, stages.STEP_REPLAYED, stages.STEP, stages.CACHED_STEP,
        *([stages.ENSEMBLE] if any(name.startswith("teacher ") for name in by_name) else []),
    }  # fmt: skip
    largest = max((stage for stage in found if stage.name not in wholes), key=lambda stage: stage.seconds)
    return f"{largest.name}: {100 * largest.seconds / step.seconds:.0f}% of the step"


def lines(job: Job, made: Forecast, gpus: int | None = None, first: int = 0) -> list[str]:
    """The forecast in words; `gpus` adds the hours on so many, if speed grows with their number."""
    processes, device, recipe = job.runtime.world_size, job.runtime.device.type, job.recipe
    found = [f"bottleneck: {made.bottleneck}"]
    here = f"{processes} x {device}"
    left = f"{job.calendar.total_steps - first:,} steps of {recipe.batch_size} and their evaluations"
    live = "live teachers: " if job.live_teachers else ""
    found.append(f"{live}{_duration(made.hours)} for {left} on {here}")
    if made.cached_hours is not None and made.cache_build_hours is not None:
        found.append(
            f"from a label cache: {_duration(made.cached_hours)} a student, after {_duration(made.cache_build_hours)} "
            f"once for a cache of {recipe.epochs} views"
        )
    if gpus:
        scale = processes / gpus
        cached = "" if made.cached_hours is None else f", from a label cache {_duration(made.cached_hours * scale)}"
        found.append(f"on {gpus} x {device}, if speed grows with them: {_duration(made.hours * scale)}{cached}")
    of = "" if made.capacity_bytes is None else f" of {size_text(made.capacity_bytes)}"
    found.append(f"memory at the peak: {size_text(made.peak_bytes)}{of} a process")
    if made.largest_batch is not None:
        found.append(f"largest batch that fits, estimated: {made.largest_batch:,} images")
    return found


def _evaluation_seconds(times: int, images: int, found: dict[str, Stage]) -> float:
    # The teachers run in the first evaluation only.
    teachers = 1 / found[stages.ENSEMBLE].images_per_second if stages.ENSEMBLE in found else 0.0
    each = max(1 / found[name].images_per_second for name in (stages.FORWARD, stages.DECODE))
    return images * (times * each + teachers)


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.1f} seconds"
