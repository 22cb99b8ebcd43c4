"""JPEGs like ImageNet's, for measuring on: sizes and bytes distributed as in its training set."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from mealfast.loaders.cores import core_count

# Widths and heights as ImageNet's training set has them: mostly 500 x 375 and its like, a mean near 400 x 350.
SIZES = [(500, 375), (500, 333), (375, 500), (333, 500), (500, 500), (400, 300), (320, 240), (256, 256), (200, 250)]
SHARES = [0.30, 0.14, 0.10, 0.06, 0.03, 0.12, 0.10, 0.09, 0.06]


CLASSES = tuple(f"class{number}" for number in range(10))


def make_images(root: Path, count: int, classes: Sequence[str] = CLASSES) -> None:
    """`count` JPEGs in class folders: textures with the spectrum of photographs, about 110 KB each."""
    rng = np.random.default_rng(0)
    textures = [texture(rng, 1024) for _ in range(min(12, 1 + count // 50))]
    jobs = []
    for i in range(count):
        width, height = SIZES[rng.choice(len(SIZES), p=SHARES)]
        x, y = rng.integers(0, 1024 - width), rng.integers(0, 1024 - height)
        pixels = textures[rng.integers(len(textures))][y : y + height, x : x + width]
        path = root / classes[i % len(classes)] / f"{i:06}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        jobs.append((pixels, path, int(rng.choice([85, 92, 95, 96]))))
    with ThreadPoolExecutor(core_count()) as pool:
        for _ in pool.map(lambda job: Image.fromarray(job[0]).save(job[1], "JPEG", quality=job[2]), jobs):
            pass


def texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """uint8 [side, side, 3]: noise whose amplitude falls as 1 / frequency, in three correlated channels."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :])
    frequency[0, 0] = 1
    channels = []
    for _ in range(4):
        phase = rng.uniform(0, 2 * np.pi, frequency.shape)
        field = np.fft.irfft2(np.exp(1j * phase) / frequency, s=(side, side))
        channels.append(field / field.std())
    shared = channels[3]
    pixels = np.stack([128 + 48 * (0.9 * shared + 0.3 * channel) for channel in channels[:3]], axis=-1)
    return np.clip(pixels + rng.normal(0, 3, pixels.shape), 0, 255).astype(np.uint8)
