"""Live teachers whose targets also go to a label cache: the third source of targets.

Shape legend: B images of this process, K teachers, C classes, k entries kept of each target.
"""

from __future__ import annotations

import torch

from mealfast.labels.build import LabelTeachers
from mealfast.labels.write_through import WriteThrough
from mealfast.loaders import Batch
from mealfast.method.inputs import Inputs
from mealfast.method.targets import Target
from mealfast.models import tuning
from mealfast.training.job import Job


class Recording(WriteThrough):
    """The label cache that a run writes, as a source of targets: the cache's own where a batch brings them, else the
    teachers'."""

    def __init__(self, job: Job) -> None:
        """Claims the cache, all processes together. Raises UsageError or DataError: it is of other targets."""
        assert job.teachers is not None
        assert job.writing is not None
        described = tuple(
            {"spec": spec, "digest": digest}
            for spec, digest in zip(job.live_teachers, job.teacher_digests, strict=True)
        )
        layouts = tuning.layouts(job.reports)
        teachers = LabelTeachers(job.teachers, described, job.student.num_classes, job.compiled, layouts)
        super().__init__(job.recipe, job.runtime, teachers, job.data.train, job.views, job.writing)
        self._unmixed = job.recipe.cutmix
        self._accumulate = job.recipe.accumulate
        self._made: list[tuple[torch.Tensor, torch.Tensor]] = []  # the step's targets, [B / accumulate, k] each
        self._steps_per_epoch = job.calendar.steps_per_epoch

    def before(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Under CutMix a run that writes a label cache learns from what it writes: the targets of the images as they
        are, mixed by area as a run from the cache mixes them."""
        self._made = []
        if batch.targets or not self._unmixed:
            return batch.targets or ()
        for part in batch.images.chunk(self._accumulate):
            self._made.append(self.top_k(self.teachers.ensemble(part)))
        return tuple(torch.cat(one) for one in zip(*self._made, strict=True))

    def __call__(self, part: Inputs) -> Target:
        if part.cached:
            return Target(top_k=part.cached)
        logits = self.teachers.ensemble(part.images)
        self._made.append(self.top_k(logits))
        return Target(logits, self._made[-1])

    def after(self, batch: Batch, step: int) -> None:
        """Has the step's targets written; raises DataError where an earlier write has failed."""
        if self._made:
            self.add(step // self._steps_per_epoch, batch.indices, self._made)
