"""The reference backend: Pillow in a pool of threads (it decodes and resizes without the interpreter's lock)."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .batch import Batch
from .steps import Views
from .stream import StreamLoader


class PillowLoader(StreamLoader):
    """Views rendered by Pillow, copied to the device without waiting for it."""

    def __init__(self, index, steps, device, threads, prefetch):
        super().__init__(index, steps, device, threads, prefetch)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mealfast-pillow")

    def _submit(self, k: int) -> tuple[torch.Tensor, np.ndarray, list[Future], Views]:
        views = self._steps.views(k)
        size = self._steps.size
        images = torch.empty(len(views), size, size, 3, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        indices = views.indices.copy()
        # Several tasks a thread level out uneven images; one task an image would spend its time in the queue.
        rows = max(1, len(views) // (self._threads * 4))
        tasks = [
            self._pool.submit(self._fill, views, range(first, min(first + rows, len(views))), images, indices)
            for first in range(0, len(views), rows)
        ]
        return images, indices, tasks, views

    def _fill(self, views: Views, rows: range, images: torch.Tensor, indices: np.ndarray) -> None:
        pixels = images.numpy()
        for row in rows:
            pixels[row], indices[row] = self._render(views, row)

    def _collect(self, pending: deque) -> Batch:
        images, indices, tasks, views = pending[0]
        for task in tasks:
            task.result()
        pending.popleft()
        return self._batch(images.to(self._device, non_blocking=True), indices, views)

    def _abandon(self, pending: deque) -> None:
        for _, _, tasks, _ in pending:
            for task in tasks:
                task.cancel()

    def close(self) -> None:
        super().close()
        self._pool.shutdown(wait=True, cancel_futures=True)
