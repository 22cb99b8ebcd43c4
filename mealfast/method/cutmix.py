"""CutMix (Yun et al., arXiv 1905.04899) on uint8 images: every batch, beta 1, as MEAL V2's released code uses it.

Shape legend: B images of this process, H and W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_STREAM = 0x6375746D6978  # keeps CutMix's random numbers apart from those of other uses of the same seed


@dataclass(frozen=True)
class Box:
    """The pasted rectangle, pixels, and the share of the area that stays the image's own."""

    top: int
    left: int
    bottom: int
    right: int
    kept: float


def draw_box(seed: int, step: int, rank: int, height: int, width: int) -> Box:
    """The box of one step: a pure function of (seed, step, rank), so that a resumed run draws it again."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, _STREAM], np.uint64), counter=[0, 0, rank, step]))
    cut = np.sqrt(1 - rng.beta(1.0, 1.0))
    half_height, half_width = int(height * cut) // 2, int(width * cut) // 2
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    left, right = max(x - half_width, 0), min(x + half_width, width)
    return Box(top, left, bottom, right, 1 - (bottom - top) * (right - left) / (height * width))


def partner(rows: torch.Tensor) -> torch.Tensor:
    """What each row's partner holds. The batch is in random order already, so the neighbour is a random partner."""
    return rows.roll(1, dims=0)


def mix(images: torch.Tensor, box: Box) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> the same with every image's box taken from its partner; the input is left as it is."""
    rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
    mixed = images.clone()
    mixed[:, rows, columns] = partner(images[:, rows, columns])
    return mixed
