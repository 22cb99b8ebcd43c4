"""The DALI backend: fast, on the CPU or a GPU; what DALI decodes otherwise than Pillow is laid over by Pillow."""

from __future__ import annotations

import ctypes
import io
import os
import stat
import weakref
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .batch import Batch
from .cpu_resize import resize_into
from .dali_pipeline import GpuDecoding, build_pipeline
from .index import ImageIndex
from .pillow_render import LARGEST_RESIZED
from .prefetch import InFlight, LoaderOptions, PrefetchLoader
from .steps import BatchViews, Steps

Overlays = dict[int, Future[tuple[np.ndarray, int]]]  # row -> what Pillow renders: pixels, index of the image shown
Files = list[np.ndarray | None]  # uint8 [L] each: a path's bytes, or a packed file; None where it could not be read


@dataclass
class _Decoding(InFlight):
    overlays: Overlays
    files: Files  # of a pack, DALI reads them where they lie: kept until the batch is out


class DaliLoader(PrefetchLoader[_Decoding]):
    """Views decoded by DALI.

    Some rows are left to Pillow: images that the index does not know to be plain, files that broke, resized images
    too large to hold. DALI decodes a stand-in there, and the row is overwritten. A file that breaks after the scan
    makes DALI's pipeline fail, or shows by its size: it is found, replaced, and the pipeline built anew.

    On the CPU, PyTorch resizes what DALI decoded: in a quarter of the time, and nearer to Pillow. `dali_resizes` has
    DALI do it there too, as on a GPU.
    """

    def __init__(
        self,
        index: ImageIndex,
        steps: Steps,
        options: LoaderOptions,
        decoding: GpuDecoding | None = None,
        dali_resizes: bool = False,
    ) -> None:
        super().__init__(index, steps, options)
        self._dali_resizes = dali_resizes or self._device.type == "cuda"
        self._decoding = decoding or GpuDecoding()
        self._refused: set[int] = set()  # images that DALI cannot decode though Pillow can
        self._stand_in = _StandIn()
        self._pipe: Any = None  # DALI's Pipeline
        self._depth = 0  # of the pipeline's queue
        self._fed = 0  # batches fed to a pipeline that has not run yet
        self._ahead: tuple[int, BatchViews, list[Future[Files]]] | None = None  # the step of a pack that is being read

    def _submit(self, step: int) -> _Decoding:
        # A pipeline built anew near the end of an iteration is too shallow for the next one.
        if self._pipe is None or (step == 0 and self._depth < min(self._options.prefetch, len(self))):
            self._build(min(self._options.prefetch, len(self) - step))
        views, files = self._read(step)
        left = self._left_to_pillow(views)
        left[[row for row, file in enumerate(files) if file is None]] = True
        rows = np.flatnonzero(left).tolist()
        overlays = {row: self._pool.submit(self._render, views, row) for row in rows}
        self._feed(self._pipe, views, files, rows)
        # DALI's first run starts as many batches as its queue is deep, and they must all have been fed.
        self._fed += 1
        if self._fed >= self._depth:
            self._pipe.schedule_run()
        return _Decoding(step, views, overlays, files)

    def _collect(self, pending: deque[_Decoding]) -> Batch:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        while True:
            first = pending[0]
            try:
                outputs, sizes = self._pipe.share_outputs(cuda_stream=stream)
                break
            except RuntimeError as error:
                self._recover(first, error)
                # The pipeline died with everything that it held: start again from this batch.
                again = [decoding.step for decoding in pending]
                self._forget(pending)
                self._build(len(again))
                pending.extend(self._submit(step) for step in again)
        views, overlays = first.views, first.overlays
        images = self._take(outputs, stream) if self._dali_resizes else self._resize(outputs, views, overlays)
        read = np.asarray(sizes.as_tensor()).reshape(-1)
        self._pipe.release_outputs()
        shown = views.indices.copy()
        for row in np.flatnonzero(read != self._index.file_sizes[shown]).tolist():
            if row not in overlays:  # not the file that was indexed: Pillow has the say
                overlays[row] = self._pool.submit(self._render, views, row)
        if overlays:
            self._lay_over(images, shown, overlays)
        pending.popleft()
        return self._batch(images, shown, views)

    def _take(self, outputs: Any, stream: torch.cuda.Stream | None) -> torch.Tensor:
        """uint8 [B, size, size, 3]: DALI's batch in torch's memory.

        torch's allocator knows when work that was only enqueued is done with it; DALI's does not, and memory that it
        exports by DLPack it frees by synchronising the device, which no capture of a CUDA graph survives.
        """
        size = self._steps.size
        images = torch.empty(len(outputs), size, size, 3, dtype=torch.uint8, device=self._device)
        copy_into(images, outputs, stream)
        return images

    def _lay_over(self, images: torch.Tensor, shown: np.ndarray, overlays: Overlays) -> None:
        rows = sorted(overlays)
        pixels, shown[rows] = zip(*(overlays[row].result() for row in rows), strict=True)
        if images.is_cuda:
            images.index_copy_(
                0, self._to_device(torch.tensor(rows)), self._to_device(torch.from_numpy(np.stack(pixels)))
            )
        else:  # by NumPy: PyTorch would start threads of its own for it
            images.numpy()[rows] = pixels

    def _resize(self, crops: Any, views: BatchViews, overlays: Overlays) -> torch.Tensor:
        size = self._steps.size
        images = torch.empty(len(views), size, size, 3, dtype=torch.uint8)
        rows = [row for row in range(len(views)) if row not in overlays]
        chunk = max(1, len(rows) // (self._options.threads * 2))
        pixels = images.numpy()

        def fill(rows: list[int]) -> None:
            for row in rows:
                crop = torch.utils.dlpack.from_dlpack(crops[row])
                resized, offset = views.resized[row].tolist(), views.offsets[row].tolist()
                resize_into(pixels[row], crop, resized, offset, self._steps.interpolation)

        tasks = [self._pool.submit(fill, rows[first : first + chunk]) for first in range(0, len(rows), chunk)]
        for task in tasks:
            task.result()
        return images

    def _left_to_pillow(self, views: BatchViews) -> np.ndarray:
        """bool [B]."""
        left: np.ndarray = ~self._index.plain[views.indices]
        left |= views.resized.prod(axis=1) > LARGEST_RESIZED
        for row, i in enumerate(views.indices.tolist()):
            if i in self._refused or i in self._broken:
                left[row] = True
        return left

    def _read(self, step: int) -> tuple[BatchViews, Files]:
        """A step's views and what DALI is fed of each: the path, or the file where it is packed."""
        if not self._index.packed:
            views = self._steps.views(step)
            return views, [np.frombuffer(self._index.path_bytes(i), np.uint8) for i in views.indices.tolist()]
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != step:
            ahead = self._read_ahead(step)
        _, views, tasks = ahead
        files = [file for task in tasks for file in task.result()]
        if step + 1 < len(self):  # its files are read while this batch is decoded
            self._ahead = self._read_ahead(step + 1)
        return views, files

    def _read_ahead(self, step: int) -> tuple[int, BatchViews, list[Future[Files]]]:
        views = self._steps.views(step)
        left = self._left_to_pillow(views)

        def read(rows: range) -> Files:
            return [None if left[row] else self._encoded(int(views.indices[row])) for row in rows]

        chunk = max(1, len(views) // (self._options.threads * 2))
        firsts = range(0, len(views), chunk)
        return step, views, [self._pool.submit(read, range(at, min(at + chunk, len(views)))) for at in firsts]

    def _encoded(self, i: int) -> np.ndarray | None:
        try:
            with self._log.reading(i):
                return self._index.encoded(i)
        except (OSError, MemoryError):  # Pillow will meet the same, and replace the image
            return None

    def _feed(self, pipe: Any, views: BatchViews, files: Files, stand_ins: list[int]) -> None:
        """Gives a pipeline one batch, with the stand-in at rows `stand_ins`."""
        packed = self._index.packed
        files = files.copy()
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
        self._pipe = self._pipeline(self._steps.rows_per_batch, self._options.threads, self._depth)

    def _pipeline(self, rows: int, threads: int, depth: int) -> Any:
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

    def _recover(self, failed: _Decoding, error: RuntimeError) -> None:
        """Find the images of a failed batch that DALI refuses, so that Pillow renders or replaces them."""
        views = failed.views
        rows = [row for row in np.flatnonzero(~self._left_to_pillow(views)).tolist() if failed.files[row] is not None]
        refused = [row for row in rows if self._changed(views.indices[row])]
        if not refused:  # not to be seen from outside: DALI tries them one by one
            refused = [row for row in rows if not self._decodes_alone(views.row(row), [failed.files[row]])]
        if not refused:
            raise error  # not for a file: a driver, memory or a bug
        self._refused.update(views.indices[refused].tolist())

    def _changed(self, i: int) -> bool:
        if self._index.packed:
            return False
        try:
            status = os.stat(self._index.path_bytes(i))
        except OSError:
            return True
        return not stat.S_ISREG(status.st_mode) or status.st_size != self._index.file_sizes[i]

    def _decodes_alone(self, one: BatchViews, files: Files) -> bool:
        try:
            pipe = self._pipeline(1, 1, 1)
            self._feed(pipe, one, files, [])
            pipe.schedule_run()
            pipe.share_outputs()
            return True
        except RuntimeError:
            return False

    def _abandon(self, pending: deque[_Decoding]) -> None:
        for decoding in pending:
            for overlay in decoding.overlays.values():
                overlay.cancel()
        self._ahead = None
        self._pipe = None  # waits for what DALI is at, which may read the files of `pending`

    def _close(self) -> None:
        super()._close()
        self._stand_in.close()


def copy_into(images: torch.Tensor, outputs: Any, stream: torch.cuda.Stream | None) -> None:
    """Copies a DALI TensorList of B views uint8 [H, W, 3] into `images` uint8 [B, H, W, 3], contiguous.

    On a GPU enqueued on `stream`, to which the outputs must be bound (`share_outputs(cuda_stream=stream)`): their
    memory goes back to DALI behind the copy, and no one waits. None: both are in the host's memory.
    """
    if outputs.shape() != [tuple(images.shape[1:])] * len(images):
        raise RuntimeError(f"DALI's batch has shapes {sorted(set(outputs.shape()))}, not {tuple(images.shape[1:])}")
    to = ctypes.c_void_p(images.data_ptr())
    if stream is None:
        outputs.copy_to_external(to)
    else:
        outputs.copy_to_external(to, ctypes.c_void_p(stream.cuda_stream), non_blocking=True)


class _StandIn:
    """A tiny JPEG for DALI to decode in rows that Pillow renders; in memory, so that nothing is left behind."""

    def __init__(self) -> None:
        jpeg = io.BytesIO()
        Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
        fd = os.memfd_create("mealfast-stand-in")
        os.write(fd, jpeg.getvalue())
        self.jpeg = np.frombuffer(jpeg.getvalue(), np.uint8)
        self.path = np.frombuffer(f"/proc/self/fd/{fd}".encode(), np.uint8)
        self.close = weakref.finalize(self, os.close, fd)
