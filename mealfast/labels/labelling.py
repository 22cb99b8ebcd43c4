"""Has teachers label what a label cache lacks, in batches that are dealt to the processes.

Shape legend: B images of a batch, m images that a view lacks, k entries kept of each target.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import overload

import numpy as np
import torch

from mealfast.labels.teachers import LabelTeachers
from mealfast.loaders import ImageIndex, ViewPlan, label_loader
from mealfast.machine.processes import Runtime
from mealfast.recipe import Recipe

TOGETHER = 16  # batches that go to disk together: what a kill can lose

Target = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # images int64 [B], ids int32 [B, k], probabilities [B, k]


class MissingBatches(Sequence[tuple[int, np.ndarray]]):
    """One process's batches (view, images int64 [B]) of what views lack, view by view, each made as it is asked for.

    The batches do not depend on the number of processes.
    """

    def __init__(self, missing: Mapping[int, range | np.ndarray], rows: int, runtime: Runtime) -> None:
        """`missing`: view -> images [m], ascending; `rows` is B, of all batches of a view but its last."""
        self._missing, self._rows = list(missing.items()), rows
        self._rank, self._world_size = runtime.rank, runtime.world_size
        numbers = (range(-(-len(images) // rows)) for images in missing.values())
        shares = [len(batches[runtime.rank :: runtime.world_size]) for batches in numbers]
        self.counts = dict(zip(missing, shares, strict=True))  # view -> how many batches
        self._ends = list(accumulate(shares))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, k: int) -> tuple[int, np.ndarray]: ...
    @overload
    def __getitem__(self, k: slice) -> Sequence[tuple[int, np.ndarray]]: ...
    def __getitem__(self, k: int | slice) -> tuple[int, np.ndarray] | Sequence[tuple[int, np.ndarray]]:
        if isinstance(k, slice):
            return [self[one] for one in range(*k.indices(len(self)))]
        place = bisect_right(self._ends, k)
        view, images = self._missing[place]
        batch = self._rank + (k - (self._ends[place - 1] if place else 0)) * self._world_size
        return view, np.asarray(images[batch * self._rows : (batch + 1) * self._rows], np.int64)


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

    def __call__(self, batches: Sequence[tuple[int, np.ndarray]]) -> Iterator[Target]:
        """The targets of batches (view, images int64 [B]), on the device. Raises DataError for a broken file: a
        stand-in's target must not be taken for its."""
        if not batches:
            return
        loader = label_loader(
            self.recipe.loader, self.index, self.plan, batches, batch_size=self.batch_size, device=self.runtime.device,
            threads=self.recipe.loader_threads,
        )  # fmt: skip
        pad_to = self.batch_size if self.teachers.compiled else None  # compiled models see one shape only
        try:
            for batch in loader:
                yield (batch.indices, *self.teachers.top_k(batch.images, self.top_k, pad_to))
        finally:
            loader.close()


def together(targets: Iterable[Target], count: int) -> Iterator[list[np.ndarray]]:
    """Takes `count` batches' targets off `targets`; yields those of up to TOGETHER batches at a time, on the host."""
    targets = iter(targets)
    for first in range(0, count, TOGETHER):
        some = list(islice(targets, min(TOGETHER, count - first)))
        yield [torch.cat(part).cpu().numpy() for part in zip(*some, strict=True)]
