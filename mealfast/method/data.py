"""The images a run learns from and is measured on, and its views of them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from mealfast.errors import UsageError
from mealfast.loaders import ExplicitViews, ImageIndex, LabelCache, ViewPlan
from mealfast.machine.processes import Runtime
from mealfast.machine.terminal import is_terminal
from mealfast.recipe import Recipe


@dataclass(frozen=True)
class Splits:
    train: ImageIndex
    val: ImageIndex


def scan_splits(root: str, *, workers: int | None = None, progress: bool = False) -> Splits:
    """The indexes of ROOT/train and ROOT/val. Raises UsageError or DataError where either is missing or empty, or
    where val/ has a class that train/ lacks (an unlabelled train/, images with no class folder, lacks none)."""
    folder = Path(root)
    if not root:
        raise UsageError("--data is missing: name a folder with train/ and val/")
    if not folder.is_dir():
        raise UsageError(f"--data {root}: no such folder")
    for part in ("train", "val"):
        if not (folder / part).is_dir():
            raise UsageError(f"--data {root}: has no {part}/; it must hold train/ and val/")
    train = ImageIndex.scan(folder / "train", workers=workers, progress=progress)
    val = ImageIndex.scan(folder / "val", classes=train.classes or None, workers=workers, progress=progress)
    if (val.labels < 0).any():
        raise UsageError(f"--data {root}: val/ holds images outside class folders; put each in its class's folder")
    return Splits(train, val)


def scan_images(data: str, part: str, runtime: Runtime, workers: int | None = None) -> ImageIndex:
    """The index of DATA/PART, or of DATA where it has no folder of that name; all processes together.

    Raises UsageError or DataError.
    """
    folder = Path(data)
    if not data or not folder.is_dir():
        raise UsageError(f"--data {data}: no such folder" if data else "--data is missing: name a folder of images")
    with runtime.main_first():  # the others find the index that the main process has stored
        return ImageIndex.scan(
            folder / part if (folder / part).is_dir() else folder,
            workers=workers,
            progress=runtime.is_main and is_terminal(sys.stderr),
        )


def view_plan(
    recipe: Recipe, index: ImageIndex, cache: LabelCache | None = None, *, seed: int | None = None,
    cycle: int | None = None,
) -> ViewPlan:  # fmt: skip
    """The views that a recipe shows of the images of an index.

    A `cache` decides their seed and their number, an imported one its own boxes too. Without one: `seed` (None: the
    recipe's), and `cycle` views (None: another one in every epoch). Raises DataError.
    """
    if cache is not None and cache.header.explicit:
        return ExplicitViews(
            index.widths, index.heights, cache,
            seed=recipe.seed, size=recipe.size, interpolation=recipe.interpolation,
        )  # fmt: skip
    if cache is not None:
        seed, cycle = cache.header.plan["seed"], cache.header.views
    return ViewPlan(
        index.widths, index.heights, seed=recipe.seed if seed is None else seed, size=recipe.size,
        scale=recipe.crop_scale, ratio=recipe.crop_ratio, flip=recipe.flip, interpolation=recipe.interpolation,
        cycle=cycle,
    )  # fmt: skip
