"""Live teachers whose targets also go to a label cache: the third source of targets.

Shape legend: B images of this process, K teachers, C classes, k entries kept of each target.
"""

from __future__ import annotations

import torch

from mealfast.labels.build import LabelTeachers
from mealfast.labels.write_through import WritePlan, WriteThrough
from mealfast.loaders import Batch, ImageIndex, ViewPlan
from mealfast.machine.processes import Runtime
from mealfast.method.inputs import Inputs
from mealfast.method.targets import Target
from mealfast.models import tuning
from mealfast.recipe import Recipe
from mealfast.training.job import Job


class RecordingTargets(WriteThrough):
    """The label cache that a run writes, as a source of targets: the cache's own where a batch brings them, else the
    teachers'."""

    def __init__(
        self, recipe: Recipe, runtime: Runtime, teachers: LabelTeachers, index: ImageIndex, views: ViewPlan,
        plan: WritePlan,
    ) -> None:  # fmt: skip
        """Claims the cache, all processes together. Raises UsageError or DataError: it is of other targets."""
        super().__init__(recipe, runtime, teachers, index, views, plan)
        self._made: list[tuple[torch.Tensor, torch.Tensor]] = []  # the step's targets, [B / accumulate, k] each
        self._steps_per_epoch = len(index) // recipe.batch_size

    def before(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Under CutMix a run that writes a label cache learns from what it writes: the targets of the images as they
        are, mixed by area as a run from the cache mixes them."""
        self._made = []
        if batch.targets or not self.recipe.cutmix:
            return batch.targets or ()
        for part in batch.images.chunk(self.recipe.accumulate):
            self._made.append(self.top_k(self.teachers.ensemble(part)))
        return tuple(torch.cat(one) for one in zip(*self._made, strict=True))

    def __call__(self, part: Inputs) -> Target:
        """The given target; else the teachers' logits, with the top k that the cache will hold."""
        if part.cached:
            return Target(top_k=part.cached)
        logits = self.teachers.ensemble(part.images)
        self._made.append(self.top_k(logits))
        return Target(logits, self._made[-1])

    def after(self, batch: Batch, step: int) -> None:
        """Has the step's targets written. Raises DataError where an earlier write has failed."""
        if self._made:
            self.add(step // self._steps_per_epoch, batch.indices, self._made)


def recording_targets(job: Job) -> RecordingTargets | None:
    """The label cache that a run writes, if it writes one; claims it. Raises UsageError or DataError."""
    if job.writing is None or job.teachers is None:
        return None
    described = tuple(
        {"spec": spec, "digest": digest} for spec, digest in zip(job.live_teachers, job.teacher_digests, strict=True)
    )
    layouts = tuning.layouts(job.reports)
    teachers = LabelTeachers(job.teachers, described, job.student.num_classes, job.compiled, layouts)
    return RecordingTargets(job.recipe, job.runtime, teachers, job.data.train, job.views, job.writing)
