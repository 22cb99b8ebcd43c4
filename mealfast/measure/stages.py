"""Where a step's time goes: each stage measured alone, then the whole step, with the run's own models and batch.

Shape legend: B images of this process, C classes, K teachers, k entries of a cached target.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from mealfast.kernels import ensemble_topk
from mealfast.loaders import Batch
from mealfast.machine.cuda_graphs import eager_steps
from mealfast.machine.processes import Runtime
from mealfast.training.step import TrainStep

if TYPE_CHECKING:
    from mealfast.training.loop import Run

WINDOWS = 5  # of which the median counts
_TOP_K = 10  # entries of a cached target, as `mealfast labels build` keeps by default

DECODE, ENSEMBLE, LOSS, OPTIMISER = "decode", "ensemble", "loss", "optimiser"
FORWARD, FORWARD_BACKWARD = "student forward", "student forward and backward"
STEP_REPLAYED, STEP, CACHED_STEP = "step, one batch replayed", "step", "step from a label cache"


@dataclass(frozen=True)
class Stage:
    """Images/s over all processes: median and quartiles of the windows; and the median's seconds a step."""

    name: str
    images_per_second: float
    p25: float
    p75: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(run: Run, seconds: float) -> Iterator[Stage]:
    """Yields the stages as they are measured, `seconds` each (warm-up apart). It trains: nothing of it is kept.

    Every process must call it. Live teachers or none: a run from a label cache has no teacher's stages.
    """
    timer = Timer(run.runtime, run.recipe.batch_size, seconds)
    parts, train_step, steps = run.parts, run.train_step, itertools.count(run.step)
    loader = run.loader(run.step, run.step + 1_000_000)
    try:
        batches = iter(loader)
        yield timer(DECODE, lambda: next(batches))
        batch = next(batches)
        images = batch.images
        yield from _teachers(run, timer, images)

        def forward() -> torch.Tensor:
            return parts.trainee.logits(images)

        def forward_backward() -> None:
            logits = forward()
            logits.backward(torch.ones_like(logits))
            parts.optimizer.zero_grad(set_to_none=True)

        yield timer(FORWARD, forward)
        yield timer(FORWARD_BACKWARD, forward_backward)
        yield timer(LOSS, _loss(run, batch, forward().detach()))
        yield timer(STEP_REPLAYED, lambda: train_step(batch, next(steps)))
        yield timer(OPTIMISER, train_step.update)  # with the last step's gradients
        yield timer(STEP, lambda: train_step(next(batches), next(steps)))
        if parts.teachers:
            targets = _targets(run, images)
            cached = TrainStep(run.recipe, run.runtime, replace(parts, teachers=None), run.steps_per_epoch)
            yield timer(CACHED_STEP, lambda: cached(replace(next(batches), targets=targets), next(steps)))
    finally:
        loader.close()
        parts.optimizer.zero_grad(set_to_none=True)
        train_step.start_anew()  # gradients that a CUDA graph has captured are gone


class Timer:
    """Measures calls in windows of several, and waits for the device only at a window's end."""

    def __init__(self, runtime: Runtime, batch_size: int, seconds: float) -> None:
        self.runtime, self.batch_size, self.seconds = runtime, batch_size, seconds
        self.warm_up = eager_steps(runtime.world_size) + 3 if runtime.device.type == "cuda" else 2  # calls

    def __call__(self, name: str, call: Callable[[], Any]) -> Stage:
        """The stage called `name`; a call is one step's worth of it, on every process."""
        self.runtime.barrier()
        self.window(call, self.warm_up)  # compiles, fills queues, captures a step's CUDA graph
        calls = self._calls(call, self.seconds / WINDOWS)
        times = [self.window(call, calls) / calls for _ in range(WINDOWS)]
        low, middle, high = statistics.quantiles(times, n=4)
        return Stage(name, *(self.batch_size / one for one in (middle, high, low)), middle)

    def _calls(self, call: Callable[[], Any], seconds: float) -> int:
        """How many calls take about that long. A few alone would not tell: a loader has some batches ready."""
        calls = 1
        while True:
            # The main process's, for all: with different numbers their collectives would not meet.
            taken = self.runtime.gather(self.window(call, calls))[0]
            if taken > seconds / 4:
                return max(1, round(calls * seconds / taken))
            calls *= 2

    def window(self, call: Callable[[], Any], calls: int) -> float:
        """Seconds that `calls` calls take, the device's work included."""
        self._wait()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.runtime.device.type == "cuda":
            torch.cuda.synchronize(self.runtime.device)


def _teachers(run: Run, timer: Timer, images: torch.Tensor) -> Iterator[Stage]:
    ensemble = run.parts.teachers
    if ensemble is None:
        return
    with torch.no_grad():
        members = ensemble.module.teachers
        if len(members) > 1:
            for report, teacher in zip(run.teacher_reports, members, strict=True):
                # Alone it is compiled alone; the ensemble below is what a step runs.
                call = torch.compile(teacher, dynamic=False) if report.choice.layout.compiled else teacher
                yield timer(f"teacher {report.spec}", lambda call=call: call(images))
        yield timer(ENSEMBLE, lambda: ensemble(images))


def _loss(run: Run, batch: Batch, logits: torch.Tensor) -> Callable[[], None]:
    """Loss with discriminator and the gradient of both, on fixed logits [B, C]."""
    logits.requires_grad_()
    teachers = [one.clone() for one in run.parts.teachers(batch.images)] if run.parts.teachers else []
    cached = batch.targets or ()

    def call() -> None:
        loss, _ = run.parts.trainee.objective(logits, teachers, 1.0, batch.labels, batch.labels, cached)
        loss.backward()
        logits.grad = None

    return call


def _targets(run: Run, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int32 [B, k] and probabilities float32 [B, k], as a label cache would bring them."""
    logits = run.parts.teachers(images)
    return ensemble_topk(logits, min(_TOP_K, logits[0].shape[1]))
