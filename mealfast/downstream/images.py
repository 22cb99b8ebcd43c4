"""Image files as a model sees them, and what it takes them for.

Shape legend: B images, C classes, H and W pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from mealfast.loaders import EvalViews
from mealfast.loaders.probe import reason

BATCH = 32  # images that go through the model at once
_LARGEST = 1 << 26  # pixels of a resized image: a strip of 1 x 5,000 would become a gigabyte


def classify(
    model: torch.nn.Module, pixels: Sequence[np.ndarray], device: torch.device, top: int
) -> list[list[tuple[int, float]]]:
    """For each of B images, uint8 [H, W, 3], its `top` most probable (class, probability), best first.

    `model` takes uint8 [B, H, W, 3] on `device` and returns logits [B, C].
    """
    with torch.inference_mode():
        probabilities = model(torch.from_numpy(np.stack(pixels)).to(device)).float().softmax(dim=1)
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
    return [
        list(zip(classes, values, strict=True))
        for classes, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def view_of(path: str | Path, views: EvalViews) -> np.ndarray:
    """The evaluation view of an image file, uint8 [size, size, 3]. Raises what Pillow raises, or ValueError."""
    path = Path(path)
    if not path.is_file():  # opening a pipe would wait for ever
        raise ValueError("no such file" if not path.exists() else "not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            image.load()
            shorter, longer = sorted(image.size)
            if views.resize * views.resize * longer > _LARGEST * shorter:
                raise ValueError(f"{image.width} x {image.height} pixels are too long and narrow")
            rgb = image.convert("RGB")
    resized = resize(rgb, views.resize, InterpolationMode(views.interpolation))
    return np.asarray(center_crop(resized, [views.size, views.size]))


def in_batches(files: Sequence[str], views: EvalViews) -> Iterator[tuple[list[str], list[np.ndarray | str]]]:
    """`BATCH` files at a time and, for each, its view, uint8 [size, size, 3], or why there is none."""

    def outcome(file: str) -> np.ndarray | str:
        try:
            return view_of(file, views)
        except Exception as error:  # hostile files raise anything
            return reason(error)

    remaining = iter(files)
    while batch := list(islice(remaining, BATCH)):
        yield batch, [outcome(file) for file in batch]
