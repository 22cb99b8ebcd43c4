"""The DALI backend: fast, on the CPU or a GPU; what DALI decodes otherwise than Pillow is laid over by Pillow."""

from __future__ import annotations

import io
import os
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from .batch import Batch
from .cpu_resize import resize_into
from .dali_pipeline import GpuDecoding, build_pipeline
from .render import LARGEST_RESIZED
from .steps import Views
from .stream import StreamLoader

LENT = 8  # batches of DALI's whose copies may be outstanding, before the loader waits for the GPU


class DaliLoader(StreamLoader):
    """Views decoded by DALI.

    Some rows are left to Pillow: images that the index does not know to be plain, files that broke, resized images
    too large to hold. DALI decodes a stand-in there, and the row is overwritten. A file that breaks after the scan
    makes DALI's pipeline fail, or shows by its size: it is found, replaced, and the pipeline built anew.

    On the CPU, PyTorch resizes what DALI decoded: in a quarter of the time, and nearer to Pillow. `dali_resizes` has
    DALI do it there too, as on a GPU.
    """

    def __init__(
        self, index, steps, device, threads, prefetch, decoding: GpuDecoding | None = None, dali_resizes: bool = False
    ):
        super().__init__(index, steps, device, threads, prefetch)
        self._dali_resizes = dali_resizes or device.type == "cuda"
        self._decoding = decoding or GpuDecoding()
        self._refused: set[int] = set()  # images that DALI cannot decode though Pillow can
        self._pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="mealfast-overlay")
        self._stand_in = _StandIn()
        self._pipe = None
        self._depth = 0  # of the pipeline's queue
        self._fed = 0  # batches fed to a pipeline that has not run yet
        self._lent: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()  # DALI's GPU memory, and when it is copied

    def _submit(self, k: int) -> tuple[int, Views, dict[int, Future]]:
        # A pipeline built anew near the end of an iteration is too shallow for the next one.
        if self._pipe is None or (k == 0 and self._depth < min(self._prefetch, len(self))):
            self._build(min(self._prefetch, len(self) - k))
        views = self._steps.views(k)
        rows = np.flatnonzero(self._left_to_pillow(views)).tolist()
        overlays = {row: self._pool.submit(self._render, views, row) for row in rows}
        self._feed(self._pipe, views, rows)
        # DALI's first run starts as many batches as its queue is deep, and they must all have been fed.
        self._fed += 1
        if self._fed >= self._depth:
            self._pipe.schedule_run()
        return k, views, overlays

    def _collect(self, pending: deque) -> Batch:
        while True:
            _, views, overlays = pending[0]
            try:
                stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
                outputs, sizes = self._pipe.share_outputs(cuda_stream=stream)
                break
            except RuntimeError as error:
                self._recover(views, error)
                # The pipeline died with everything that it held: start again from this batch.
                again = [step for step, _, _ in pending]
                self._abandon(pending)
                pending.clear()
                self._build(len(again))
                pending.extend(self._submit(step) for step in again)
        images = self._take(outputs) if self._dali_resizes else self._resize(outputs, views, overlays)
        read = np.asarray(sizes.as_tensor()).reshape(-1)
        self._pipe.release_outputs()
        indices = views.indices.copy()
        for row in np.flatnonzero(read != self._index.file_sizes[indices]).tolist():
            if row not in overlays:  # not the file that was indexed: Pillow has the say
                overlays[row] = self._pool.submit(self._render, views, row)
        if overlays:
            rows = sorted(overlays)
            pixels, indices[rows] = zip(*(overlays[row].result() for row in rows), strict=True)
            images.index_copy_(
                0, self._to_device(torch.tensor(rows)), self._to_device(torch.from_numpy(np.stack(pixels)))
            )
        pending.popleft()
        return self._batch(images, indices, views)

    def _take(self, outputs) -> torch.Tensor:
        images = torch.from_dlpack(outputs.as_tensor())
        if not images.is_cuda:
            return images  # DALI gives the memory away: it is freed with the tensor
        # A copy on the consumer's stream (a twentieth of a millisecond) puts the batch into torch's allocator, which
        # knows when work that was only enqueued is done with it; DALI's allocator does not. Its memory goes back once
        # the copy is made: before, DALI would decode another batch into it.
        copy = images.clone()
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self._device))
        self._lent.append((copied, images))
        self._give_back(LENT)
        return copy

    def _give_back(self, most: int) -> None:
        """Returns memory that is copied to DALI, and waits for copies beyond the `most` newest."""
        while self._lent and (len(self._lent) > most or self._lent[0][0].query()):
            self._lent[0][0].synchronize()
            self._lent.popleft()

    def _resize(self, crops, views: Views, overlays: dict[int, Future]) -> torch.Tensor:
        size = self._steps.size
        images = torch.empty(len(views), size, size, 3, dtype=torch.uint8)
        rows = [row for row in range(len(views)) if row not in overlays]
        chunk = max(1, len(rows) // (self._threads * 2))
        pixels = images.numpy()

        def fill(rows: list[int]) -> None:
            for row in rows:
                crop = torch.from_dlpack(crops[row])
                resized, offset = views.resized[row].tolist(), views.offsets[row].tolist()
                resize_into(pixels[row], crop, resized, offset, self._steps.interpolation)

        tasks = [self._pool.submit(fill, rows[first : first + chunk]) for first in range(0, len(rows), chunk)]
        for task in tasks:
            task.result()
        return images

    def _left_to_pillow(self, views: Views) -> np.ndarray:
        left = ~self._index.plain[views.indices]
        left |= views.resized.prod(axis=1) > LARGEST_RESIZED
        for row, i in enumerate(views.indices.tolist()):
            if i in self._refused or i in self._faults:
                left[row] = True
        return left

    def _feed(self, pipe, views: Views, stand_ins: list[int]) -> None:
        packed = self._index.packed
        files = [
            self._index.encoded(i) if packed else np.frombuffer(self._index.path_bytes(i), np.uint8)
            for i in views.indices.tolist()
        ]
        boxes, resized, offsets = views.boxes.copy(), views.resized.astype(np.float32), views.offsets.astype(np.int32)
        for row in stand_ins:
            files[row] = self._stand_in.jpeg if packed else self._stand_in.path
        boxes[stand_ins] = (0, 0, 1, 1)
        resized[stand_ins] = self._steps.size
        offsets[stand_ins] = 0
        pipe.feed_input("encoded" if packed else "paths", files)
        pipe.feed_input("starts", np.ascontiguousarray(boxes[:, :2]))
        pipe.feed_input("shapes", np.ascontiguousarray(boxes[:, 2:]))
        pipe.feed_input("flips", views.flips.astype(np.int32))
        if self._steps.windowed and self._dali_resizes:
            pipe.feed_input("resized", resized)
            pipe.feed_input("offsets", offsets)

    def _build(self, depth: int) -> None:
        self._depth = max(1, depth)
        self._fed = 0
        self._pipe = self._pipeline(self._steps.rows_per_batch, self._threads, self._depth)

    def _pipeline(self, rows: int, threads: int, depth: int):
        return build_pipeline(
            rows=rows,
            size=self._steps.size,
            windowed=self._steps.windowed,
            interpolation=self._steps.interpolation,
            resize=self._dali_resizes,
            packed=self._index.packed,
            device_index=self._device.index if self._device.type == "cuda" else None,
            threads=threads,
            prefetch=depth,
            decoding=self._decoding,
        )

    def _recover(self, views: Views, error: RuntimeError) -> None:
        """Find the images of a failed batch that DALI refuses, so that Pillow renders or replaces them."""
        rows = np.flatnonzero(~self._left_to_pillow(views)).tolist()
        refused = [row for row in rows if self._changed(views.indices[row])]
        if not refused:  # not to be seen from outside: DALI tries them one by one
            refused = [row for row in rows if not self._decodes_alone(views, row)]
        if not refused:
            raise error  # not for a file: a driver, memory or a bug
        self._refused.update(views.indices[refused].tolist())

    def _changed(self, i: int) -> bool:
        if self._index.packed:
            return False
        try:
            return os.stat(self._index.path_bytes(i)).st_size != self._index.file_sizes[i]
        except OSError:
            return True

    def _decodes_alone(self, views: Views, row: int) -> bool:
        parts = (views.indices, views.boxes, views.resized, views.offsets, views.flips)
        one = Views(*(part[row : row + 1] for part in parts))
        try:
            pipe = self._pipeline(1, 1, 1)
            self._feed(pipe, one, [])
            pipe.schedule_run()
            pipe.share_outputs()
            return True
        except RuntimeError:
            return False

    def _abandon(self, pending: deque) -> None:
        for _, _, overlays in pending:
            for overlay in overlays.values():
                overlay.cancel()
        self._pipe = None

    def close(self) -> None:
        super().close()
        self._pipe = None
        self._give_back(0)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._stand_in.close()


class _StandIn:
    """A tiny JPEG for DALI to decode in rows that Pillow renders; in memory, so that nothing is left behind."""

    def __init__(self):
        jpeg = io.BytesIO()
        Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
        fd = os.memfd_create("mealfast-stand-in")
        os.write(fd, jpeg.getvalue())
        self.jpeg = np.frombuffer(jpeg.getvalue(), np.uint8)
        self.path = np.frombuffer(f"/proc/self/fd/{fd}".encode(), np.uint8)
        self.close = weakref.finalize(self, os.close, fd)
