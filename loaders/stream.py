"""What both backends share: a window of batches in flight, in the order of the steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch

from .batch import Batch
from .faults import Faults
from .index import ImageIndex
from .render import RowRenderer
from .steps import Steps, Views


class StreamLoader(ABC):
    """A Loader that keeps `prefetch` batches in flight ahead of its consumer. Each `iter` starts at the first step."""

    def __init__(self, index: ImageIndex, steps: Steps, device: torch.device, threads: int, prefetch: int):
        self._index, self._steps, self._device = index, steps, device
        self._threads, self._prefetch = threads, prefetch
        self._labels = torch.from_numpy(index.labels)
        self._faults = Faults(index)
        self._pending: deque = deque()  # of the iteration that runs
        self._render = RowRenderer(index, steps, self._faults)

    @property
    def replaced(self) -> dict[str, str]:
        """Relative path -> reason of the files that broke or vanished after the scan; other views stand in for them."""
        return self._faults.reasons

    @property
    def replaced_count(self) -> int:
        """Views replaced so far."""
        return self._faults.views

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[Batch]:
        if self._pending:  # an earlier iteration was left half-way and still lives
            self._abandon(self._pending)
        self._pending = pending = deque()
        todo = iter(range(len(self._steps)))
        finished = False
        try:
            for k in islice(todo, self._prefetch):
                pending.append(self._submit(k))
            while pending:
                batch = self._collect(pending)
                for k in islice(todo, 1):
                    pending.append(self._submit(k))
                yield batch
                if self._pending is not pending:
                    raise RuntimeError("the loader was started again: it serves one iteration at a time")
            finished = True
        finally:
            if not finished and self._pending is pending:
                self._abandon(pending)
                pending.clear()

    @abstractmethod
    def _submit(self, k: int):
        """Start work on the batch of step k; returns what `_collect` needs."""

    @abstractmethod
    def _collect(self, pending: deque) -> Batch:
        """Take the first submitted batch off `pending` and finish it."""

    @abstractmethod
    def _abandon(self, pending: deque) -> None:
        """Forget what is in flight: the consumer left early, or something failed."""

    def _batch(self, images: torch.Tensor, shown: np.ndarray, views: Views) -> Batch:
        """`shown`: the images in it, which differ from the planned `views` where one was replaced."""
        self._faults.views += int((shown != views.indices).sum())
        indices = torch.from_numpy(shown)
        targets = self._steps.targets(views, shown)
        return Batch(
            images,
            self._to_device(self._labels[indices]),
            self._to_device(indices),
            None if targets is None else tuple(self._to_device(torch.from_numpy(part)) for part in targets),
        )

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def close(self) -> None:
        """Stop the loader's threads."""
        self._steps.close()
