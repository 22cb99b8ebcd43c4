"""Which views every step shows: the plan cut into global batches and ranks, and the evaluation crops in order."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from .batch import DataError
from .index import ImageIndex
from .label_cache import LabelCache
from .threads import WorkerThreads
from .views import EvalViews, ViewPlan


@dataclass(frozen=True)
class BatchViews:
    """The views of one batch. Each is cut from its image, resized, windowed to the loader's size, then flipped."""

    indices: np.ndarray  # int64 [B], rows of the ImageIndex
    boxes: np.ndarray  # int32 [B, 4] x, y, width, height: what is cut out of the image
    resized: np.ndarray  # int64 [B, 2] width, height after resizing
    offsets: np.ndarray  # int64 [B, 2] x, y where the window begins in the resized crop; negative: black border
    flips: np.ndarray  # bool [B]
    epoch: int = 0  # in which they are shown

    def __len__(self) -> int:
        return len(self.indices)

    def row(self, row: int) -> BatchViews:
        """A batch of this view only."""
        one = slice(row, row + 1)
        return BatchViews(
            self.indices[one], self.boxes[one], self.resized[one], self.offsets[one], self.flips[one], self.epoch
        )


class TrainSteps:
    """Steps start_step..stop_step of a plan for one rank; the remainder of each epoch is dropped."""

    windowed = False  # views are resized to exactly the loader's size
    replaceable = True  # another view may stand in for one whose file broke

    def __init__(
        self,
        index: ImageIndex,
        plan: ViewPlan,
        *,
        batch_size: int,
        start_step: int,
        stop_step: int,
        rank: int,
        world_size: int,
        label_cache: LabelCache | None = None,
        live_epochs: range = range(0),
    ) -> None:
        """`batch_size` is the global batch. Raises DataError where sizes and ranks do not fit."""
        check_rank(rank, world_size)
        if len(plan) != len(index):
            raise DataError(f"view plan: made for {len(plan)} images, but the index holds {len(index)}")
        if batch_size < 1 or batch_size % world_size:
            raise DataError(f"--batch-size {batch_size}: must be a multiple of the {world_size} processes")
        if batch_size > len(index):
            raise DataError(f"--batch-size {batch_size}: must be at most the {len(index)} training images")
        if not 0 <= start_step <= stop_step:
            raise DataError(f"steps {start_step} to {stop_step}: must be 0 <= start <= stop")
        self.size, self.interpolation = plan.size, plan.interpolation
        self.rows_per_batch = batch_size // world_size
        self._batch_size, self._start, self._stop, self._rank = batch_size, start_step, stop_step, rank
        self._steps_per_epoch = len(index) // batch_size
        self._plan, self._label_cache, self._live_epochs = plan, label_cache, live_epochs
        self._epochs = _PlannedEpochs(plan, last=(stop_step - 1) // self._steps_per_epoch)

    def __len__(self) -> int:
        return self._stop - self._start

    def epochs(self) -> Iterator[tuple[int, int]]:
        """(epoch, how many of these steps are in it), in order."""
        first = self._start
        while first < self._stop:
            epoch = first // self._steps_per_epoch
            last = min((epoch + 1) * self._steps_per_epoch, self._stop)
            yield epoch, last - first
            first = last

    def views(self, k: int) -> BatchViews:
        """The views of step start_step + k."""
        epoch, step = divmod(self._start + k, self._steps_per_epoch)
        order, boxes, flips = self._epochs.get(epoch)
        first = step * self._batch_size + self._rank * self.rows_per_batch
        indices = order[first : first + self.rows_per_batch]
        return _planned(self.size, indices, boxes, flips, epoch)

    def substitutes(self, views: BatchViews, row: int) -> Iterator[BatchViews]:
        """Other views, one at a time, to show instead of `views[row]`: the next images of the index, same epoch."""
        _, boxes, flips = self._epochs.get(views.epoch)
        for distance in range(1, len(boxes)):
            other = np.array([(views.indices[row] + distance) % len(boxes)])
            yield _planned(self.size, other, boxes, flips, views.epoch)

    def targets(self, views: BatchViews, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The label cache's targets of the images `shown` int64 [B] in the epoch of `views`, those of stand-ins too.

        None where the teachers run: in the epochs that make the cache's views, and while a view is not complete.
        """
        view = self._plan.view_of_epoch(views.epoch)
        if self._label_cache is None or views.epoch in self._live_epochs or not self._label_cache.has(view):
            return None
        return self._label_cache.targets(view, shown)

    def close(self) -> None:
        """Ends the thread that plans epochs ahead."""
        self._epochs.close()


class LabelSteps:
    """Whole views of a plan in the index's order, for a label cache: batches that the caller chooses."""

    windowed = False
    replaceable = False  # a target must be of the image it stands for

    def __init__(
        self, index: ImageIndex, plan: ViewPlan, batches: Sequence[tuple[int, int | np.ndarray]], *, batch_size: int
    ) -> None:
        """`batches` lists (view, first row) of each, which then holds `batch_size` images, the last of a view fewer; or
        (view, rows int64 [B])."""
        if len(plan) != len(index):
            raise DataError(f"view plan: made for {len(plan)} images, but the index holds {len(index)}")
        if batch_size < 1:
            raise DataError(f"--batch-size {batch_size}: must be at least 1")
        self.size, self.interpolation = plan.size, plan.interpolation
        self.rows_per_batch = min(batch_size, len(index))
        self._plan, self._batches = plan, batches
        self._latest: tuple[int, np.ndarray, np.ndarray] | None = None  # view, boxes, flips

    def __len__(self) -> int:
        return len(self._batches)

    def epochs(self) -> Iterator[tuple[int, int]]:
        """All batches as one."""
        yield 0, len(self)

    def views(self, k: int) -> BatchViews:
        """The views of batch k."""
        view, first = self._batches[k]
        if self._latest is None or self._latest[0] != view:
            self._latest = (view, *self._plan.views(view))
        _, boxes, flips = self._latest
        if isinstance(first, np.ndarray):
            indices = first
        else:
            indices = np.arange(first, min(first + self.rows_per_batch, len(self._plan)), dtype=np.int64)
        return _planned(self.size, indices, boxes, flips, view)

    def substitutes(self, views: BatchViews, row: int) -> Iterable[BatchViews]:
        """None."""
        return ()

    def targets(self, views: BatchViews, shown: np.ndarray) -> None:
        """None: they are what is being made."""

    def close(self) -> None:
        """Nothing to end."""


class EvalSteps:
    """Every image of the index once over all ranks, in order: rank r shows rows r, r + world_size, ..."""

    windowed = True
    replaceable = False  # an evaluation that leaves an image out is not one

    def __init__(self, index: ImageIndex, views: EvalViews, *, batch_size: int, rank: int, world_size: int) -> None:
        """`batch_size` is this rank's. Raises DataError where it or the rank is out of range."""
        check_rank(rank, world_size)
        if batch_size < 1:
            raise DataError(f"--batch-size {batch_size}: must be at least 1")
        self.size, self.interpolation = views.size, views.interpolation
        self._rows = np.arange(rank, len(index), world_size, dtype=np.int64)
        self.rows_per_batch = min(batch_size, max(len(self._rows), 1))
        self._widths, self._heights = index.widths, index.heights
        self._resized, self._offsets = views.geometry(index.widths, index.heights)

    def __len__(self) -> int:
        return -(-len(self._rows) // self.rows_per_batch)

    def epochs(self) -> Iterator[tuple[int, int]]:
        """All batches as one."""
        yield 0, len(self)

    def views(self, k: int) -> BatchViews:
        """The views of batch k; the last one is smaller where the images do not divide."""
        indices = self._rows[k * self.rows_per_batch : (k + 1) * self.rows_per_batch]
        w, h = self._widths[indices], self._heights[indices]
        boxes = np.stack([np.zeros_like(w), np.zeros_like(w), w, h], axis=1)
        return BatchViews(indices, boxes, self._resized[indices], self._offsets[indices], np.zeros(len(indices), bool))

    def substitutes(self, views: BatchViews, row: int) -> Iterable[BatchViews]:
        """None."""
        return ()

    def targets(self, views: BatchViews, shown: np.ndarray) -> None:
        """None."""

    def close(self) -> None:
        """Nothing to end."""


Steps = TrainSteps | LabelSteps | EvalSteps


_Epoch = tuple[np.ndarray, np.ndarray, np.ndarray]  # order int64 [N], boxes int32 [N, 4], flips bool [N]


class _PlannedEpochs:
    """Plans of the epochs in use; asking for one starts planning the next, so that no step waits for it."""

    def __init__(self, plan: ViewPlan, last: int) -> None:
        self._plan, self._last = plan, last
        self._lock = threading.Lock()
        self._thread = WorkerThreads(1, "mealfast-plan")
        self._plans: dict[int, Future[_Epoch]] = {}

    def get(self, epoch: int) -> _Epoch:
        """The plan of an epoch."""
        with self._lock:
            for number in (epoch, epoch + 1):
                if number not in self._plans and number <= max(epoch, self._last):
                    self._plans[number] = self._thread.submit(self._make, number)
            # The epoch before may still be asked for: a batch planned in it can need a substitute.
            for number in [number for number in self._plans if not epoch - 1 <= number <= epoch + 1]:
                del self._plans[number]
            future = self._plans[epoch]
        return future.result()

    def _make(self, epoch: int) -> _Epoch:
        return self._plan.order(epoch), *self._plan.views(self._plan.view_of_epoch(epoch))

    def close(self) -> None:
        self._thread.cancel()


def _planned(size: int, indices: np.ndarray, boxes: np.ndarray, flips: np.ndarray, epoch: int) -> BatchViews:
    """Rows `indices` of a planned view: `boxes` int32 [N, 4], `flips` bool [N]."""
    resized = np.full((len(indices), 2), size, np.int64)
    return BatchViews(indices, boxes[indices], resized, np.zeros_like(resized), flips[indices], epoch)


def check_rank(rank: int, world_size: int) -> None:
    """Raise DataError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}: must be from 0 to {world_size - 1}")
