"""The objects of a run: all that is made once and stays what it is, tensors apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mealfast.labels.write_through import WritePlan
from mealfast.loaders import LabelCache, Loader, ViewPlan, train_loader
from mealfast.machine.processes import Runtime
from mealfast.method.data import Splits
from mealfast.method.inputs import CutMix, MakeInputs, unmixed
from mealfast.method.student import Student
from mealfast.method.targets import GivenTargets, LiveTargets, TargetSource
from mealfast.models.class_order import Order
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.models.tuning import TeacherReport
from mealfast.recipe import Recipe
from mealfast.training.meter import Meter
from mealfast.training.optimiser import Optimiser
from mealfast.training.step import Step
from mealfast.training.step_calendar import Calendar


@dataclass(frozen=True)
class Job:
    """What was made for a run. Only tensors change in it, by steps; `Where` holds all else that changes."""

    recipe: Recipe
    runtime: Runtime
    data: Splits  # labels as the student numbers them
    calendar: Calendar
    class_orders: tuple[Order | None, ...]  # of teachers' and cache's outputs, in which the student's are
    class_notes: tuple[str, ...]  # for the user
    views: ViewPlan  # of the training images
    student: Student
    optimiser: Optimiser
    meter: Meter
    live_teachers: tuple[str, ...]  # specs of those that run
    teacher_digests: tuple[str, ...]  # of their weights
    teachers: FrozenEnsemble | None  # ready to be called
    reports: tuple[TeacherReport, ...]  # on how they run
    label_cache: LabelCache | None  # that stands in for the teachers throughout
    writing: WritePlan | None  # of the label cache that the run writes
    compiled: bool

    def loader(
        self, first: int, stop: int, label_cache: LabelCache | None = None, stopping: Callable[[], bool] | None = None
    ) -> Loader:
        """This process's batches of the steps numbered `first` to `stop` - 1; close it. `label_cache` is the one that
        the run writes. While a batch is waited for, `stopping` may end that: LoaderStopped is raised."""
        recipe, runtime = self.recipe, self.runtime
        return train_loader(
            recipe.loader,
            self.data.train,
            self.views,
            batch_size=recipe.batch_size,
            start_step=first,
            stop_step=stop,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
            threads=recipe.loader_threads,
            timeout=recipe.loader_timeout,
            stopping=stopping,
            label_cache=label_cache or self.label_cache,
            live_epochs=self.writing.live_epochs if self.writing else range(0),
        )

    def target_source(self) -> TargetSource:
        """Live teachers, or what comes with the batches."""
        return LiveTargets(self.teachers) if self.teachers else GivenTargets()

    def inputs(self) -> MakeInputs:
        """CutMix, or batches as they are."""
        return CutMix(self.recipe.seed, self.runtime.rank) if self.recipe.cutmix else unmixed

    def step(self, target_source: TargetSource | None = None) -> Step:
        """A step of this job; its targets are from `target_source`, by default the job's own."""
        return Step(
            self.recipe,
            self.runtime.world_size,
            inputs=self.inputs(),
            target_source=target_source or self.target_source(),
            student=self.student,
            optimiser=self.optimiser,
            meter=self.meter,
        )

    def cuda_graph(self, step: Step) -> str | None:
        """What of a step a CUDA graph replays by now: "step", the teachers' "ensemble", or None."""
        if step.captured:
            return "step"
        return "ensemble" if self.teachers and self.teachers.captured else None
