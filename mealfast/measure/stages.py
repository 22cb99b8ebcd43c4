"""Where a step's time goes: each stage measured alone, then the whole step, with the run's own models and batch.

Shape legend: B images of this process, C classes, K teachers, k entries of a cached target.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from mealfast.kernels import ensemble_topk
from mealfast.loaders import Batch
from mealfast.machine.cuda_graphs import eager_steps
from mealfast.machine.processes import Runtime
from mealfast.method.inputs import unmixed
from mealfast.method.targets import GivenTargets, LiveTargets, Target
from mealfast.training.job import Job

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


def measure(job: Job, seconds: float, first: int = 0) -> Iterator[Stage]:
    """Yields the stages as they are measured, `seconds` each (warm-up apart), with batches from the step `first` on. It
    trains: nothing of it is kept.

    Every process must call it. Live teachers or none: a run from a label cache has no teacher's stages.
    """
    timer = Timer(job.runtime, job.recipe.batch_size, seconds)
    student, optimiser, step, steps = job.student, job.optimiser, job.step(), itertools.count(first)
    loader = job.loader(first, first + 1_000_000)
    try:
        batches = iter(loader)
        yield timer(DECODE, lambda: next(batches))
        batch = next(batches)
        images = batch.images
        yield from _teachers(job, timer, images)

        def forward() -> torch.Tensor:
            return student.logits(images)

        def forward_backward() -> None:
            logits = forward()
            logits.backward(torch.ones_like(logits))
            optimiser.zero_grad()

        yield timer(FORWARD, forward)
        yield timer(FORWARD_BACKWARD, forward_backward)
        yield timer(LOSS, _loss(job, batch, forward().detach()))
        yield timer(STEP_REPLAYED, lambda: step(batch, next(steps)))
        yield timer(OPTIMISER, optimiser.finish)  # with the last step's gradients
        yield timer(STEP, lambda: step(next(batches), next(steps)))
        if job.teachers:
            targets = _top_k(job.teachers(images))
            cached = job.step(GivenTargets())
            yield timer(CACHED_STEP, lambda: cached(replace(next(batches), targets=targets), next(steps)))
    finally:
        loader.close()
        optimiser.zero_grad()


class Timer:
    """Measures calls in windows of several, and waits for the device only at a window's end."""

    def __init__(self, runtime: Runtime, batch_size: int, seconds: float) -> None:
        self.runtime, self.batch_size, self.seconds = runtime, batch_size, seconds
        self.warm_up = eager_steps(runtime.world_size) + 3 if runtime.device.type == "cuda" else 2  # calls

    def __call__(self, name: str, call: Callable[[], object]) -> Stage:
        """The stage called `name`; a call is one step's worth of it, on every process."""
        self.runtime.barrier()
        self.window(call, self.warm_up)  # compiles, fills queues, captures a step's CUDA graph
        calls = self._calls(call, self.seconds / WINDOWS)
        times = [self.window(call, calls) / calls for _ in range(WINDOWS)]
        low, middle, high = statistics.quantiles(times, n=4)
        rate, p25, p75 = (self.batch_size / one for one in (middle, high, low))
        return Stage(name, rate, p25, p75, middle)

    def _calls(self, call: Callable[[], object], seconds: float) -> int:
        """How many calls take about that long. A few alone would not tell: a loader has some batches ready."""
        calls = 1
        while True:
            # The main process's, for all: with different numbers their collectives would not meet.
            taken = self.runtime.gather(self.window(call, calls))[0]
            if taken > seconds / 4:
                return max(1, round(calls * seconds / taken))
            calls *= 2

    def window(self, call: Callable[[], object], calls: int) -> float:
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


def _teachers(job: Job, timer: Timer, images: torch.Tensor) -> Iterator[Stage]:
    ensemble = job.teachers
    if ensemble is None:
        return
    with torch.no_grad():
        members = ensemble.module.teachers
        if len(members) > 1:
            for report, teacher in zip(job.reports, members, strict=True):
                # Alone it is compiled alone; the ensemble below is what a step runs.
                call = torch.compile(teacher, dynamic=False) if report.choice.layout.compiled else teacher
                yield timer(f"teacher {report.spec}", partial(call, images))
        yield timer(ENSEMBLE, lambda: ensemble(images))


def _loss(job: Job, batch: Batch, logits: torch.Tensor) -> Callable[[], None]:
    """Loss with discriminator and the gradient of both, on fixed logits [B, C]."""
    logits.requires_grad_()
    part = unmixed(batch, batch.targets or (), 0)
    source = LiveTargets(job.teachers) if job.teachers else GivenTargets()
    said = source(part)
    target = Target([one.clone() for one in said.logits], said.top_k)  # a CUDA graph would overwrite them

    def call() -> None:
        loss, _ = job.student.objective(logits, target, part)
        loss.backward()
        logits.grad = None

    return call


def _top_k(logits: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """K logits [B, C] -> ids int32 [B, k] and probabilities float32 [B, k], as a label cache would bring them."""
    ids, probabilities = ensemble_topk(logits, min(_TOP_K, logits[0].shape[1]))
    return ids, probabilities
