"""Views whose crop boxes and flips stand in a label cache, as imported ones do, instead of following from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .batch import DataError
from .label_cache import LabelCache
from .label_header import EXPLICIT
from .views import ViewPlan


class ExplicitViews(ViewPlan):
    """A ViewPlan that has its boxes from a cache; the order of each epoch's images is that of `seed`.

    The boxes are pixels of the images as they are stored, so any `size` of the views fits.
    """

    def __init__(
        self, widths: np.ndarray, heights: np.ndarray, cache: LabelCache, *, seed: int, size: int, interpolation: str
    ):
        super().__init__(widths, heights, seed=seed, size=size, interpolation=interpolation, cycle=cache.header.views)
        self._cache = cache

    def fingerprint(self) -> dict[str, Any]:
        """What a label cache compares: its own boxes are right by themselves."""
        return {"law": EXPLICIT, "images": len(self), "cycle": self.cycle}

    def views(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """View number `view` of every image: boxes int32 [N, 4] (x, y, width, height, pixels) and flips bool [N].

        Raises DataError where a box does not lie within its image.
        """
        rows = self._cache.view(view)
        boxes = rows["box"].astype(np.int32)
        ends = boxes[:, :2] + boxes[:, 2:]
        bad = (boxes[:, 2:] < 1).any(axis=1) | (ends[:, 0] > self.widths) | (ends[:, 1] > self.heights)
        if bad.any():
            raise DataError(
                f"label cache {self._cache.folder}: the box of view {view}, image {int(np.argmax(bad))}, lies outside "
                "of the image; import the cache again"
            )
        return boxes, rows["flip"].astype(bool)
