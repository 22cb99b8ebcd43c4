"""What is cut out of each image: planned training views and the evaluation crop. NumPy only.

torchvision's laws over whole epochs at once: RandomResizedCrop and RandomHorizontalFlip for training, Resize and
CenterCrop for evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from .batch import DataError

INTERPOLATIONS = ("bilinear", "bicubic")
ATTEMPTS = 10  # of RandomResizedCrop, before it falls back to a centre crop
LAW = 1  # raised whenever the same seed comes to mean other views

# Domains of the random streams: the top bits of Philox's second key word.
_ORDER, _CROPS = 1, 2


class ViewPlan:
    """The pure function (seed, epoch) -> order of the images, box and flip of every view.

    Random numbers are counter-based (Philox keyed by seed and epoch, raw 64-bit words), so that no process, rank,
    NumPy version or earlier epoch has any influence.
    """

    def __init__(
        self,
        widths: np.ndarray,
        heights: np.ndarray,
        *,
        seed: int,
        size: int,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        interpolation: str = "bilinear",
        cycle: int | None = None,
    ):
        """Plan views of `size` x `size` pixels of images of `widths` x `heights` pixels (integers [N]).

        `scale` is the crop's share of the image's area, `ratio` its width by its height, `flip` the probability of
        a mirror image. With `cycle` = V, epoch e shows view e % V of each image, otherwise view e. Raises DataError
        for options out of range.
        """
        self.widths = np.ascontiguousarray(widths, np.int32)
        self.heights = np.ascontiguousarray(heights, np.int32)
        if self.widths.ndim != 1 or self.widths.shape != self.heights.shape:
            raise DataError("view plan: widths and heights must be two arrays [N] of one length")
        _check_size(size)
        _check_interpolation(interpolation)
        if not 0 <= seed < 2**64:
            raise DataError(f"--seed {seed}: must be from 0 to 2**64 - 1")
        if not 0 < scale[0] <= scale[1]:
            raise DataError(f"crop scale {scale}: must be two numbers with 0 < smallest <= largest")
        if not 0 < ratio[0] <= ratio[1]:
            raise DataError(f"crop ratio {ratio}: must be two numbers with 0 < smallest <= largest")
        if not 0 <= flip <= 1:
            raise DataError(f"flip probability {flip}: must be from 0 to 1")
        if cycle is not None and cycle < 1:
            raise DataError(f"views per image {cycle}: must be at least 1")
        self.seed, self.size, self.flip = int(seed), int(size), float(flip)
        self.scale = (float(scale[0]), float(scale[1]))
        self.ratio = (float(ratio[0]), float(ratio[1]))
        self.interpolation, self.cycle = interpolation, cycle

    def __len__(self) -> int:
        return len(self.widths)

    def fingerprint(self) -> dict[str, Any]:
        """Everything, besides the images' sizes, that decides the views: what a label cache or a resume compares."""
        return {
            "law": LAW,
            "images": len(self),
            "seed": self.seed,
            "size": self.size,
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "flip": self.flip,
            "interpolation": self.interpolation,
            "cycle": self.cycle,
        }

    def view_of_epoch(self, epoch: int) -> int:
        """The number of the view that every image shows in `epoch`."""
        return epoch if self.cycle is None else epoch % self.cycle

    def order(self, epoch: int) -> np.ndarray:
        """int64 [N]: the images of `epoch` in the order in which they are shown, a uniform permutation."""
        words = self._words(_ORDER, epoch).random_raw(len(self))
        return np.argsort(words, kind="stable")

    def views(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """View number `view` of every image: boxes int32 [N, 4] (x, y, width, height, pixels) and flips bool [N]."""
        words = self._words(_CROPS, view)
        flips = _uniform(words, len(self)) < self.flip
        return self._crops(words), flips

    def _crops(self, words: np.random.Philox) -> np.ndarray:
        """RandomResizedCrop: the first of ten random shapes that fits, at a uniform position, else the fallback."""
        boxes = self._fallback()
        rows = np.arange(len(self))
        for _ in range(ATTEMPTS):
            if not len(rows):
                break
            image_w, image_h = self.widths[rows], self.heights[rows]
            area = _uniform(words, len(rows))
            area *= self.scale[1] - self.scale[0]
            area += self.scale[0]
            area *= image_w
            area *= image_h
            aspect = _uniform(words, len(rows))
            low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
            aspect *= high - low
            aspect += low
            np.exp(aspect, out=aspect)
            # rint rounds half to even, as Python's round does.
            w = np.rint(np.sqrt(area * aspect)).astype(np.int32)
            h = np.rint(np.sqrt(area / aspect)).astype(np.int32)
            x, y = _uniform(words, len(rows)), _uniform(words, len(rows))
            fits = np.flatnonzero((w > 0) & (w <= image_w) & (h > 0) & (h <= image_h))
            w, h, image_w, image_h, done = w[fits], h[fits], image_w[fits], image_h[fits], rows[fits]
            boxes[done, 0] = x[fits] * (image_w - w + 1)  # truncates: a uniform integer from 0 to image_w - w
            boxes[done, 1] = y[fits] * (image_h - h + 1)
            boxes[done, 2] = w
            boxes[done, 3] = h
            rows = np.delete(rows, fits)
        return boxes

    def _fallback(self) -> np.ndarray:
        """int32 [N, 4]: the centre crop of the whole width or height, its ratio brought into bounds."""
        w, h = self.widths.copy(), self.heights.copy()
        shape = self.widths / self.heights
        tall, wide = shape < self.ratio[0], shape > self.ratio[1]
        h[tall] = np.rint(w[tall] / self.ratio[0])
        w[wide] = np.rint(h[wide] * self.ratio[1])
        return np.stack([(self.widths - w) // 2, (self.heights - h) // 2, w, h], axis=1)

    def _words(self, domain: int, number: int) -> np.random.Philox:
        if not 0 <= number < 2**48:
            raise DataError(f"epoch or view {number}: must be from 0 to 2**48 - 1")
        return np.random.Philox(key=np.array([self.seed, domain << 48 | number], np.uint64))


@dataclass(frozen=True)
class EvalViews:
    """The shorter side resized to `resize` pixels, then the centre `size` x `size`; black beyond the image."""

    size: int
    resize: int
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        _check_size(self.size)
        _check_interpolation(self.interpolation)
        if not 1 <= self.resize <= 16384:
            raise DataError(f"resize {self.resize}: must be from 1 to 16384 pixels")

    @classmethod
    def from_crop_pct(cls, size: int, crop_pct: float | None = None, interpolation: str = "bilinear") -> EvalViews:
        """The paper's crop (size 224 of 256) where `crop_pct` is None, otherwise timm's: floor(size / crop_pct)."""
        _check_size(size)
        if crop_pct is None:
            return cls(size, int(256 / 224 * size), interpolation)
        if not 0.01 <= crop_pct <= 10:
            raise DataError(f"--crop-pct {crop_pct}: must be the crop's share of the shorter side, e.g. 0.875")
        return cls(size, math.floor(size / crop_pct), interpolation)

    def geometry(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Per image: size after resizing, int64 [N, 2] (w, h), and where the crop begins in it, int64 [N, 2] (x, y).

        A crop that is larger than the resized image begins at a negative place: there the view is black.
        """
        sides = np.stack([widths, heights], axis=1).astype(np.int64)
        shorter = sides.min(axis=1, keepdims=True)
        # int(resize * longer / shorter), as torchvision: a true division, truncated.
        resized = (self.resize * sides / shorter).astype(np.int64)
        resized[sides == shorter] = self.resize
        crop = np.rint((resized - self.size) / 2.0).astype(np.int64)
        padding = (self.size - resized) // 2
        return resized, np.where(resized < self.size, -padding, crop)


def _uniform(words: np.random.Philox, count: int) -> np.ndarray:
    """float64 [count] in [0, 1), 53 random bits each; of raw words, whose stream NumPy keeps between versions."""
    raw = words.random_raw(count)
    raw >>= np.uint64(11)
    uniform = raw.astype(np.float64)
    uniform *= 2.0**-53
    return uniform


def _check_size(size: int) -> None:
    if not 1 <= size <= 8192:
        raise DataError(f"--size {size}: must be from 1 to 8192 pixels")


def _check_interpolation(interpolation: str) -> None:
    if interpolation not in INTERPOLATIONS:
        raise DataError(f"--interpolation {interpolation}: must be {' or '.join(INTERPOLATIONS)}")
