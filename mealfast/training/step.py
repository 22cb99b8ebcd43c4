"""One optimiser step, top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from mealfast.loaders import Batch
from mealfast.machine.cuda_graphs import CapturedStep
from mealfast.method.inputs import Inputs, MakeInputs
from mealfast.method.student import Student
from mealfast.method.targets import TargetSource
from mealfast.recipe import Recipe
from mealfast.training.meter import Meter
from mealfast.training.optimiser import Optimiser


class Step:
    """Trains the student on one batch. Its parts are made elsewhere; nothing here asks of which kind they are.

    No host sync.
    """

    taken: int | None  # the number of the last step that the device was given whole; set by `__call__`
    cuttable: Callable[[], AbstractContextManager[None]]  # around what `undo` can put back

    def __init__(
        self,
        recipe: Recipe,
        world_size: int,
        *,
        inputs: MakeInputs,
        target_source: TargetSource,
        student: Student,
        optimiser: Optimiser,
        meter: Meter,
    ) -> None:
        self.inputs, self.target_source = inputs, target_source
        self.student, self.optimiser, self.meter = student, optimiser, meter
        self.accumulate = recipe.accumulate
        self._captured = CapturedStep(self.learn, world_size) if recipe.cuda_graphs == "step" else None
        self.run = self._captured or self.learn
        self.taken, self.cuttable = None, nullcontext
        self._random: list[torch.Tensor] | None = None  # the generators, as the step that is under way found them

    def __call__(self, batch: Batch, step: int) -> None:
        """Takes the step numbered `step`, from 0, with this process's part of its batch."""
        self._random = _random_states(batch.images.device)
        self.optimiser.set_lr(step)
        self.run(self.inputs(batch, self.target_source.before(batch), step))  # learn, or a CUDA graph of it
        self.taken, self._random = step, None
        self.target_source.after(batch, step)  # a cache takes what was said; else nothing

    @property
    def captured(self) -> bool:
        """Whether the step replays a CUDA graph by now."""
        return self._captured is not None and self._captured.captured

    def learn(self, inputs: Inputs) -> None:
        """All that the device does, so that a graph can replay it; what changes between steps comes in as tensors."""
        self.optimiser.begin()
        with self.cuttable():
            for part, last in inputs.parts(self.accumulate):
                with self.student.reducing_gradients(last):
                    loss, terms = self.student(part, self.target_source(part))
                    self.optimiser.backward(loss / self.accumulate)
                self.meter.hold(terms / self.accumulate)
        self.meter.add(skipped=self.optimiser.finish())  # decided on the device

    def undo(self) -> None:
        """Puts back what a step that failed half-way has changed: running statistics and random numbers."""
        if self._random is None:
            return
        self.optimiser.undo()
        self.meter.drop()
        torch.set_rng_state(self._random[0])
        for state in self._random[1:]:
            torch.cuda.set_rng_state(state)
        self._random = None


def _random_states(device: torch.device) -> list[torch.Tensor]:
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_device]
