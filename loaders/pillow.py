"""The reference backend: Pillow in a pool of threads (it decodes and resizes without the interpreter's lock)."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import torch

from .batch import Batch
from .prefetch import InFlight, PrefetchLoader
from .steps import BatchViews


@dataclass
class _Rendering(InFlight):
    images: torch.Tensor  # uint8 [B, size, size, 3], in the host's memory
    shown: np.ndarray  # int64 [B], the images in it
    tasks: list[Future[None]]


class PillowLoader(PrefetchLoader[_Rendering]):
    """Views rendered by Pillow, copied to the device without waiting for it."""

    def _submit(self, step: int) -> _Rendering:
        views = self._steps.views(step)
        size = self._steps.size
        images = torch.empty(len(views), size, size, 3, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        shown = views.indices.copy()
        # Several tasks a thread level out uneven images; one task an image would spend its time in the queue.
        rows = max(1, len(views) // (self._options.threads * 4))
        tasks = [
            self._pool.submit(self._fill, views, range(first, min(first + rows, len(views))), images, shown)
            for first in range(0, len(views), rows)
        ]
        return _Rendering(step, views, images, shown, tasks)

    def _fill(self, views: BatchViews, rows: range, images: torch.Tensor, shown: np.ndarray) -> None:
        pixels = images.numpy()
        for row in rows:
            pixels[row], shown[row] = self._render(views, row)

    def _collect(self, pending: deque[_Rendering]) -> Batch:
        first = pending[0]
        for task in first.tasks:
            task.result()
        pending.popleft()
        return self._batch(first.images.to(self._device, non_blocking=True), first.shown, first.views)

    def _abandon(self, pending: deque[_Rendering]) -> None:
        for rendering in pending:
            for task in rendering.tasks:
                task.cancel()
