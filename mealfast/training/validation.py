"""Evaluation within a run: the student beside its live teachers on val/, with pictures for TensorBoard.

Shape legend: B images of this process, H and W pixels, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from mealfast.kernels import ensemble_target
from mealfast.loaders import Batch, EvalViews, eval_loader
from mealfast.machine.stop_signal import CutShort, Stopped
from mealfast.models.class_names import readable
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.record.metrics import Picture
from mealfast.training.job import Job
from mealfast.training.resume import share_buffers
from mealfast.training.scoring import Evaluation, evaluate

_PICTURES = 4  # of as many classes
_ROOM = 2 << 30  # bytes of each process for what its teachers said

ShowPictures = Callable[[list[Picture], list[str]], None]


class Validation:
    """Scores the student, each teacher and their ensemble, and the student's KL to it, on every validation image."""

    def __init__(self, job: Job, cuttable: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """`cuttable`: around the evaluation, which then ends as if `stopping` had said so, where it raises CutShort."""
        self._job, self._cuttable = job, cuttable
        # The teachers' logits of every batch, K x [B, C] each, from the first evaluation: the images and the teachers
        # are the same in all of them. Without this an ImageNet run spends 3% of its time on hearing them again.
        self._kept: list[list[torch.Tensor]] = []
        share = -(-len(job.data.val) // job.runtime.world_size)
        self._keeps = len(job.live_teachers) * share * job.student.num_classes * 4 <= _ROOM
        self._number = 0  # of the batch that comes next

    def __call__(self, show: ShowPictures | None = None, stopping: Callable[[], bool] = lambda: False) -> Evaluation:
        """Models in the order student, teachers. `show` gets some images, what is said of them, and the class names.

        Raises Stopped where `stopping` says so before a batch, DataError where an image cannot be read.
        """
        job, recipe, runtime, student = self._job, self._job.recipe, self._job.runtime, self._job.student
        share_buffers(student.normalised, runtime)
        batch_size = recipe.batch_size // runtime.world_size // recipe.accumulate  # of a step's parts: compiled already
        teachers = range(1, 1 + len(job.live_teachers))
        loader = eval_loader(
            recipe.loader,
            job.data.val,
            EvalViews.from_crop_pct(recipe.size, recipe.eval_crop_pct, recipe.eval_interpolation),
            batch_size=batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
            threads=recipe.loader_threads,
            timeout=recipe.loader_timeout,
            stopping=stopping,
        )
        self._number = 0
        pictures = _Pictures(job.data.val.labels) if show and teachers else None
        student.eval()
        try:
            with self._cuttable():
                result = evaluate(
                    self._predict,
                    1 + len(teachers),
                    [loader],
                    runtime,
                    ensemble=teachers,
                    student=0 if teachers else None,
                    pad_to=batch_size if job.compiled else None,
                    on_batch=pictures,
                    stopping=stopping,
                )
        except CutShort:
            raise Stopped from None
        finally:
            student.train()
            loader.close()
        if show and pictures:
            show(pictures.found(), self._names())
        return result

    def _predict(self, images: torch.Tensor) -> list[torch.Tensor]:
        teachers = self._job.teachers
        return [self._job.student.logits(images), *(self._teacher_logits(teachers, images) if teachers else [])]

    def _teacher_logits(self, teachers: FrozenEnsemble, images: torch.Tensor) -> list[torch.Tensor]:
        number = self._number
        self._number += 1
        if number < len(self._kept):
            return [logits.to(images.device, non_blocking=True) for logits in self._kept[number]]
        found = teachers(images)
        if self._keeps:
            self._kept.append([logits.to("cpu", copy=True) for logits in found])
        return found

    def _names(self) -> list[str]:
        return readable(self._job.student.normalised.classes, self._job.student.num_classes)


class _Pictures:
    """Takes the first image of some classes, spread over those that there are, out of an evaluation's batches."""

    def __init__(self, labels: np.ndarray) -> None:
        """`labels`: int64 [N], of every image."""
        present = np.unique(labels)
        spread = np.linspace(0, len(present) - 1, _PICTURES).round().astype(int)
        self._wanted = [int(present[place]) for place in dict.fromkeys(spread.tolist())]
        self._found: dict[int, Picture] = {}

    def __call__(self, batch: Batch, logits: list[torch.Tensor]) -> None:
        labels = batch.labels.tolist() if len(self._found) < len(self._wanted) else []
        for label in self._wanted:
            if label in labels and label not in self._found:
                row = labels.index(label)
                student, *teachers = [one[row : row + 1] for one in logits]
                target = ensemble_target(teachers)[0].cpu()
                image = batch.images[row].to("cpu", copy=True)
                self._found[label] = Picture(image, label, student.softmax(dim=1)[0].cpu(), target)

    def found(self) -> list[Picture]:
        """In the order of their labels."""
        return [self._found[label] for label in sorted(self._found)]
