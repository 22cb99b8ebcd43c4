"""The reference for pixels: one view by Pillow, bit-identical to torchvision's transforms on PIL images."""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image

from .batch import DataError
from .broken_files import BrokenFiles
from .files import printable
from .index import ImageIndex
from .open_files import ReadingLog
from .probe import open_image, reason
from .steps import BatchViews, Steps

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# A strip of 1 x 5000 pixels resized to a shorter side of 256 would take a gigabyte: beyond this many pixels only the
# window is computed, which differs from resizing the whole at the rounding of its edges.
LARGEST_RESIZED = 1 << 26


class RowRenderer:
    """Renders rows of batches; a training image that fails is replaced by a deterministic other view."""

    def __init__(self, index: ImageIndex, steps: Steps, broken: BrokenFiles, log: ReadingLog) -> None:
        """`log` is told which image a thread is reading."""
        self._index, self._steps, self._broken, self._log = index, steps, broken, log
        self._resampling = RESAMPLING[steps.interpolation]
        # Two lines each, from many threads, that name no file. The scan has said which images are large, and a file
        # that cannot be decoded is named.
        warnings.filterwarnings("ignore", module=r"PIL\b")

    def __call__(self, views: BatchViews, row: int) -> tuple[np.ndarray, int]:
        """(uint8 [size, size, 3], index of the image shown). Raises DataError where nothing honest can be shown."""
        if (pixels := self._try(views, row)) is not None:
            return pixels, int(views.indices[row])
        for other in self._steps.substitutes(views, row):
            if (pixels := self._try(other, 0)) is not None:
                return pixels, int(other.indices[0])
        raise DataError(f"{self._index.root}: no image is left that can be opened")

    def _try(self, views: BatchViews, row: int) -> np.ndarray | None:
        i = int(views.indices[row])
        if i in self._broken:
            return None
        try:
            with self._log.reading(i):
                return self._render(i, views, row)
        except Exception as error:  # hostile files raise anything
            why = printable(reason(error))
            if not self._steps.replaceable:
                path = f"{self._index.root}/{self._index.display_path(i)}"
                raise DataError(f"{path}: {why}; mend or remove the file and start again") from None
            self._broken.add(i, why)
            return None

    def _render(self, i: int, views: BatchViews, row: int) -> np.ndarray:
        with self._index.open(i) as file, open_image(file) as image:
            expected = (int(self._index.widths[i]), int(self._index.heights[i]))
            if image.size != expected:
                raise ValueError("its size in pixels changed since it was indexed")
            if image.mode != "RGB":
                image = image.convert("RGB")
            x, y, w, h = views.boxes[row].tolist()
            if (x, y, w, h) != (0, 0, *expected):
                image = image.crop((x, y, x + w, y + h))
            view = self._window(image, views.resized[row].tolist(), views.offsets[row].tolist())
            if views.flips[row]:
                view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return np.asarray(view)

    def _window(self, image: Image.Image, resized: list[int], offset: list[int]) -> Image.Image:
        size = self._steps.size
        width, height = resized
        if width * height <= LARGEST_RESIZED:
            image = image.resize((width, height), self._resampling)
            if resized == [size, size]:
                return image
            return image.crop((offset[0], offset[1], offset[0] + size, offset[1] + size))
        # Per axis, where the window begins and ends in the resized image; then the same in pixels of the source.
        left, top = (max(at, 0) for at in offset)
        right, bottom = (min(at + size, side) for at, side in zip(offset, resized, strict=True))
        scale_x, scale_y = image.width / width, image.height / height
        box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
        part = image.resize((right - left, bottom - top), self._resampling, box=box)
        view = Image.new("RGB", (size, size))
        view.paste(part, (left - offset[0], top - offset[1]))
        return view
