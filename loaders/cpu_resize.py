"""Resizing on the CPU by PyTorch's antialiased uint8 kernel: Pillow's filters in vector instructions."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F


def resize_into(
    view: np.ndarray, crop: torch.Tensor, resized: list[int], offset: list[int], interpolation: str
) -> None:
    """Fill `view` (uint8 [size, size, 3]) with the window at `offset` (x, y) of `crop` resized to `resized` (w, h).

    `crop` is uint8 [height, width, 3] on the CPU; what of the window lies outside is black.
    """
    # Channels-last all the way: the kernel works on pixels as they lie in memory.
    image = crop[None].permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(resized[1], resized[0]), mode=interpolation, antialias=True)
    pixels = image[0].permute(1, 2, 0).numpy()
    size = len(view)
    if pixels.shape[:2] == (size, size) and offset == [0, 0]:
        # Copied by NumPy: PyTorch would start its own threads for it in each of the loader's.
        np.copyto(view, pixels)
        return
    left, top = (max(at, 0) for at in offset)
    part = pixels[top : offset[1] + size, left : offset[0] + size]
    at_x, at_y = left - offset[0], top - offset[1]
    view[...] = 0
    view[at_y : at_y + part.shape[0], at_x : at_x + part.shape[1]] = part
