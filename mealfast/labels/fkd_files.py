"""FKD's label files (Shen & Xing, "A Fast Knowledge Distillation Framework", github.com/szq0214/FKD), read safely.

One file an image, written by `torch.save`: [coordinates, flips, labels] of its M crops. A crop's coordinates are top,
left, height and width as shares of the image's height and width; labels come in the flavours of `FLAVOURS`.
"""

from __future__ import annotations

import _codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealfast.loaders import DataError
from mealfast.models.torch_files import torch_load, why_unreadable

# FKD's names -> k. Smoothing spreads the rest evenly over the other classes, renorm scales the k values to sum to one.
FLAVOURS = {
    "hard": 1,
    "smoothing": 1,
    "marginal_smoothing_k5": 5,
    "marginal_smoothing_k10": 10,
    "marginal_renorm_k5": 5,
}
LARGEST_FILE = 1 << 26  # bytes; 500 crops of top 5 take 28 kB

_RECONSTRUCT = np.zeros(1).__reduce__()[0]  # whose module NumPy has renamed
# What an array of numbers is pickled by. None of it runs code; an array of objects holds only what is allowed itself.
_ARRAYS: list[Any] = [
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    _codecs.encode,
    *(type(np.dtype(name)) for name in ("?", "u1", "i4", "i8", "f2", "f4", "f8")),
]


@dataclass(frozen=True)
class FkdLabels:
    """The first V crops of one image."""

    boxes: np.ndarray  # int64 [V, 4] x, y, width, height, pixels
    flips: np.ndarray  # bool [V]
    ids: np.ndarray  # int64 [V, k], of descending probability
    probabilities: np.ndarray  # float32 [V, k]


def flavour_of(path: Path) -> tuple[str, int]:
    """Flavour and number of crops of a label file, by its shape: labels [M], [M, 2] or [M, 2, k]. Raises DataError."""
    labels = _content(path)[2]
    if labels.ndim == 1:
        return "hard", len(labels)
    if labels.ndim == 2:
        return "smoothing", len(labels)
    return f"marginal_smoothing_k{labels.shape[2]}", len(labels)


def read_labels(path: Path, width: int, height: int, views: int, flavour: str, classes: int) -> FkdLabels:
    """The first `views` crops of an image of `width` x `height` pixels. Raises DataError: damaged, or of another shape,
    flavour, image or number of classes."""
    coordinates, flips, labels = _content(path)
    if len(labels) < views:
        raise DataError(f"{path}: holds {len(labels)} crops; --views {views} needs as many (lower it)")
    ids, probabilities = _target(path, labels[:views], flavour, classes)
    return FkdLabels(_boxes(path, coordinates[:views], width, height), flips[:views] != 0, ids, probabilities)


def _content(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates float64 [M, 4], flips [M] and labels [M, ...] of numbers, in shapes that go together."""
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DataError(f"{path}: is larger than {LARGEST_FILE} bytes; it is no label file of FKD's")
        with torch.serialization.safe_globals(_ARRAYS):
            content = torch_load(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; the labels must cover every image of --data") from None
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: cannot be read ({why_unreadable(error)})") from None
    if not isinstance(content, (list, tuple)) or len(content) != 3:
        raise DataError(f"{path}: is no label file of FKD's: it must hold coordinates, flips and labels")
    coordinates, flips, labels = (_numbers(path, one) for one in content)
    crops = len(labels) if labels.ndim in (1, 2, 3) else 0
    right = crops > 0 and coordinates.shape == (crops, 4) and flips.shape == (crops,)
    if not right or (labels.ndim > 1 and labels.shape[1] != 2):
        shapes = ", ".join(str(list(one.shape)) for one in (coordinates, flips, labels))
        raise DataError(
            f"{path}: holds arrays {shapes}; FKD's are coordinates [crops, 4], flips [crops] and labels [crops], "
            "[crops, 2] or [crops, 2, k]"
        )
    return coordinates, flips, labels


def _numbers(path: Path, content: Any) -> np.ndarray:
    """float64 of an array, a tensor, or a list of numbers or tensors."""
    try:
        array = np.asarray([np.asarray(one) for one in content] if isinstance(content, (list, tuple)) else content)
        if array.dtype.kind not in "biuf":
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError):
        raise DataError(f"{path}: is no label file of FKD's: it holds something else than arrays of numbers") from None


def _boxes(path: Path, coordinates: np.ndarray, width: int, height: int) -> np.ndarray:
    """As FKD's loader crops: top and left, bottom and right in pixels, each rounded half to even (Pillow's rule)."""
    if not (np.isfinite(coordinates).all() and (coordinates >= 0).all() and (coordinates <= 1).all()):
        raise DataError(f"{path}: coordinates must be shares of the image, from 0 to 1")
    top, left, tall, wide = (coordinates * (height, width, height, width)).T
    corners = np.rint([left, top, left + wide, top + tall]).astype(np.int64)
    boxes = np.stack([corners[0], corners[1], corners[2] - corners[0], corners[3] - corners[1]], axis=1)
    if (corners[2] > width).any() or (corners[3] > height).any() or (boxes[:, 2:] < 1).any():
        raise DataError(f"{path}: a crop does not lie within its image of {width} x {height} pixels")
    return boxes


def _target(path: Path, labels: np.ndarray, flavour: str, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """ids int64 [V, k] and probabilities float32 [V, k], descending."""
    views, k = len(labels), FLAVOURS[flavour]
    if labels.shape != {"hard": (views,), "smoothing": (views, 2)}.get(flavour, (views, 2, k)):
        raise DataError(f"{path}: holds labels {list(labels.shape)}, which are not of --label-type {flavour}")
    if flavour == "hard":
        ids, p = labels[:, None], np.ones((views, 1))
    else:
        ids, p = labels.reshape(views, 2, k).swapaxes(0, 1)
    if not np.isfinite(ids).all() or (ids != np.floor(ids)).any() or ids.min() < 0 or ids.max() >= classes:
        raise DataError(f"{path}: an id is not one of the {classes} classes (--classes)")
    if (np.diff(np.sort(ids, axis=1), axis=1) == 0).any():
        raise DataError(f"{path}: names a class twice for one crop")
    # A sum may exceed one by the rounding of float16, in which FKD can save.
    if not (np.isfinite(p).all() and (p >= 0).all() and (p.sum(axis=1) <= 1.01).all() and (p.sum(axis=1) > 0).all()):
        raise DataError(f"{path}: probabilities must be from 0 to 1, and their sum too")
    if flavour.startswith("marginal_renorm"):
        p = p / p.sum(axis=1, keepdims=True)
    order = np.argsort(-p, axis=1, kind="stable")
    p = np.take_along_axis(p, order, axis=1).clip(max=1)
    return np.take_along_axis(ids, order, axis=1).astype(np.int64), p.astype(np.float32)
