"""The demo's data: scikit-learn's 1,797 handwritten digits as trees of JPEGs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mealfast.errors import UsageError

TRAIN_IMAGES = 1200  # the other 597 are for validation
FEW_LABELS = 100
SIDE = 32  # pixels; the digits come as 8 x 8
QUALITY = 90  # of the JPEGs


def write_digits(root: Path, seed: int) -> None:
    """Writes `all/` (1,200 labelled), `few/` (100 of them labelled) and `unlabelled/` (the 1,200 in one flat folder),
    each with train/ and the same val/. Which digits go where depends on `seed`. Raises UsageError without
    scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError("the demo's digits come from scikit-learn: pip install 'mealfast[demo]'") from error
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    for place, number in enumerate(order):
        image = Image.fromarray((digits.images[number] * (255 / 16)).round().astype(np.uint8))
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        name, label = f"{number:04d}.jpg", str(digits.target[number])
        if place >= TRAIN_IMAGES:
            for tree in ("all", "few", "unlabelled"):
                _save(image, root / tree / "val" / label / name)
            continue
        _save(image, root / "all" / "train" / label / name)
        _save(image, root / "unlabelled" / "train" / name)
        if place < FEW_LABELS:
            _save(image, root / "few" / "train" / label / name)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=QUALITY)
