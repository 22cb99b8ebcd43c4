"""The reference for pixels: one view by Pillow, bit-identical to torchvision's transforms on PIL images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .batch import DataError
from .faults import Faults
from .index import ImageIndex
from .probe import open_image, reason
from .steps import Steps, Views

RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

# A strip of 1 x 5000 pixels resized to a shorter side of 256 would take a gigabyte: beyond this many pixels only the
# window is computed, which differs from resizing the whole at the rounding of its edges.
LARGEST_RESIZED = 1 << 26


class RowRenderer:
    """Renders rows of batches; a training image that fails is replaced by a deterministic other view."""

    def __init__(self, index: ImageIndex, steps: Steps, faults: Faults):
        self._index, self._steps, self._faults = index, steps, faults
        self._resampling = RESAMPLING[steps.interpolation]

    def __call__(self, views: Views, row: int) -> tuple[np.ndarray, int]:
        """(uint8 [size, size, 3], index of the image shown). Raises DataError where nothing honest can be shown."""
        if (pixels := self._try(views, row)) is not None:
            return pixels, int(views.indices[row])
        for other in self._steps.substitutes(views, row):
            if (pixels := self._try(other, 0)) is not None:
                return pixels, int(other.indices[0])
        raise DataError(f"{self._index.root}: no image is left that can be opened")

    def _try(self, views: Views, row: int) -> np.ndarray | None:
        i = int(views.indices[row])
        if i in self._faults:
            return None
        try:
            return self._render(i, views, row)
        except Exception as error:  # hostile files raise anything
            if not self._steps.replaceable:
                path = f"{self._index.root}/{self._index.display_path(i)}"
                raise DataError(f"{path}: {reason(error)}; mend or remove the file and start again") from None
            self._faults.add(i, reason(error))
            return None

    def _render(self, i: int, views: Views, row: int) -> np.ndarray:
        with open_image(self._index.source(i)) as image:
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
        if resized[0] * resized[1] <= LARGEST_RESIZED:
            image = image.resize(tuple(resized), self._resampling)
            if resized == [size, size]:
                return image
            return image.crop((offset[0], offset[1], offset[0] + size, offset[1] + size))
        # Per axis, where the window begins and ends in the resized image; then the same in pixels of the source.
        begin = [max(at, 0) for at in offset]
        end = [min(at + size, side) for at, side in zip(offset, resized, strict=True)]
        scale = [side / new for side, new in zip(image.size, resized, strict=True)]
        box = [at * s for at, s in zip((*begin, *end), (*scale, *scale), strict=True)]
        part = image.resize((end[0] - begin[0], end[1] - begin[1]), self._resampling, box=box)
        view = Image.new("RGB", (size, size))
        view.paste(part, (begin[0] - offset[0], begin[1] - offset[1]))
        return view
