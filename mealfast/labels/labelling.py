"""Teachers that label planned views of images: what a label cache is made of, in batches dealt to the processes.

Shape legend: B images of a batch, H and W pixels, m images that a view lacks, K teachers, C classes, k entries kept.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from mealfast.kernels import ensemble_topk
from mealfast.loaders import ImageIndex, ViewPlan, label_loader
from mealfast.machine.files import brief
from mealfast.machine.processes import Runtime
from mealfast.machine.terminal import say
from mealfast.machine.waiting import waiting
from mealfast.models import normalised as models
from mealfast.models.class_names import Names
from mealfast.models.class_order import Named, agree
from mealfast.models.ensemble import padded
from mealfast.models.random_weights import require_weights
from mealfast.recipe import Recipe

TOGETHER = 16  # batches that go to disk together: what a kill can lose

Planned = tuple[int, int | np.ndarray]  # a batch: its view, and its first image, or its images int64 [B]
Labelled = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # images int64 [B], ids int32, probabilities float32 [B, k]


@dataclass(frozen=True)
class LabelTeachers:
    """An ensemble ready to label, and what a cache's header says of it."""

    ensemble: Callable[[torch.Tensor], Sequence[torch.Tensor]]  # uint8 [B, H, W, 3] -> K logits [B, C], no autograd
    described: tuple[dict[str, str], ...]  # {"spec", "digest"} each
    classes: int
    compiled: bool
    layouts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # as `tuning.layouts` gives them
    class_names: Names | None = None  # of their outputs


def load_teachers(
    recipe: Recipe, runtime: Runtime, index: ImageIndex, cache: Named | None = None
) -> tuple[list[models.NormalizedModel], tuple[dict[str, str], ...], int]:
    """The recipe's teachers on the CPU, as a header describes them, and the number of their classes.

    Their outputs are brought into the order of `cache`, the one that there is, or else of the first; one without names
    is of teachers whose outputs were taken as they are. Raises UsageError.
    """
    require_weights(recipe.teachers, "--teachers")
    torch.manual_seed(recipe.seed)  # random weights, where a spec has no others
    teachers = []
    for number, spec in enumerate(recipe.teachers, start=1):
        with waiting(f"loading teacher {number} of {len(recipe.teachers)}: {brief(spec)}"):
            teachers.append(models.build(spec, recipe.size))
    classes = models.check_classes(recipe.teachers, teachers)
    for spec, teacher in zip(recipe.teachers, teachers, strict=True):
        models.probe(teacher, spec, recipe.size)
    digests = [models.digest(teacher) for teacher in teachers]
    if cache is None or cache.classes is not None:
        # Other folders than classes may hold the images: targets need none.
        folders = index.classes if len(index.classes) == classes else ()
        known = [models.named(f"--teachers {spec}", one) for spec, one in zip(recipe.teachers, teachers, strict=True)]
        agreed = agree([*([cache] if cache else []), *known], classes, folders, index.root, recipe.class_map)
        for teacher, order in zip(teachers, agreed.orders[-len(teachers) :], strict=True):
            teacher.take_order(order, agreed.names)
        for note in agreed.notes if runtime.is_main else ():
            say(note)
    models.check_distinct(recipe.teachers, digests)
    return teachers, described(recipe.teachers, digests), classes


def described(specs: Sequence[str], digests: Sequence[str]) -> tuple[dict[str, str], ...]:
    """Teachers as a cache's header has them."""
    return tuple({"spec": spec, "digest": digest} for spec, digest in zip(specs, digests, strict=True))


@dataclass(frozen=True)
class Labeller:
    """Teachers, and the planned views of images that they label."""

    recipe: Recipe  # for its loader
    runtime: Runtime
    index: ImageIndex
    plan: ViewPlan
    teachers: LabelTeachers
    top_k: int
    batch_size: int  # that the teachers see at once

    def share(self, view: int, missing: range | np.ndarray) -> list[Planned]:
        """This process's share of the batches of what a view lacks (integers [m]). One process makes the same ones."""
        firsts = range(0, len(missing), self.batch_size)[self.runtime.rank :: self.runtime.world_size]
        if isinstance(missing, range):  # the whole view
            return [(view, first) for first in firsts]
        return [(view, missing[first : first + self.batch_size]) for first in firsts]

    def __call__(self, batches: Sequence[Planned]) -> Generator[Labelled, None, None]:
        """The top k of batches, on the device. Raises DataError for a broken file: a stand-in's would be another's."""
        if not batches:
            return
        loader = label_loader(
            self.recipe.loader, self.index, self.plan, batches, batch_size=self.batch_size, device=self.runtime.device,
            threads=self.recipe.loader_threads, timeout=self.recipe.loader_timeout,
        )  # fmt: skip
        pad_to = self.batch_size if self.teachers.compiled else None  # compiled models see one shape only
        try:
            for batch in loader:
                logits = self.teachers.ensemble(padded(batch.images, pad_to))
                yield (batch.indices, *ensemble_topk([one[: len(batch.images)] for one in logits], self.top_k))
        finally:
            loader.close()


def together(labelled: Iterable[Labelled], count: int) -> Iterator[list[np.ndarray]]:
    """Takes `count` batches off `labelled`; yields the arrays of up to TOGETHER at a time, on the host."""
    labelled = iter(labelled)
    for first in range(0, count, TOGETHER):
        some = list(islice(labelled, min(TOGETHER, count - first)))
        yield [torch.cat(part).cpu().numpy() for part in zip(*some, strict=True)]
