"""The images a run learns from and is measured on, with labels as the student numbers its classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from timm.data import ImageNetInfo

from mealfast.errors import UsageError
from mealfast.loaders import ExplicitViews, ImageIndex, LabelCache, ViewPlan
from mealfast.recipe import Recipe


@dataclass(frozen=True)
class Splits:
    """The two indexes of a data folder."""

    train: ImageIndex
    val: ImageIndex


class Written(Protocol):
    """The views of a label cache that a run writes."""

    @property
    def seed(self) -> int: ...
    @property
    def views(self) -> int: ...


def view_plan(
    recipe: Recipe, index: ImageIndex, *, cache: LabelCache | None = None, writing: Written | None = None
) -> ViewPlan | ExplicitViews:
    """The views of a recipe's training images: its own, those of the label cache that it reads, or of the one that it
    writes."""
    if cache and cache.header.explicit:
        return ExplicitViews(
            index.widths, index.heights, cache, seed=recipe.seed, size=recipe.size, interpolation=recipe.interpolation
        )
    return ViewPlan(
        index.widths,
        index.heights,
        seed=cache.header.plan["seed"] if cache else writing.seed if writing else recipe.seed,
        size=recipe.size,
        scale=recipe.crop_scale,
        ratio=recipe.crop_ratio,
        flip=recipe.flip,
        interpolation=recipe.interpolation,
        cycle=cache.header.views if cache else writing.views if writing else None,
    )


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


def number_classes(splits: Splits, num_classes: int, *, labels_needed: bool, student: str) -> Splits:
    """Labels as a model with `num_classes` outputs numbers them; see `label_map`. Raises UsageError."""
    mapping = label_map(splits.val.classes, num_classes, splits.val.root.parent, student)
    if labels_needed and (splits.train.labels < 0).any():
        raise UsageError(
            f"{splits.train.root}: holds images outside class folders, but --hard-label-weight needs labels"
        )
    return Splits(splits.train.relabel(mapping), splits.val.relabel(mapping))


def label_map(classes: tuple[str, ...], num_classes: int, root: Path, model: str) -> dict[str, int]:
    """Class folder -> output of the model: ImageNet-1k's number for wnids and 1000 outputs, else alphabetical order."""
    imagenet = {wnid: label for label, wnid in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    if num_classes == len(imagenet) and all(name in imagenet for name in classes):
        return {name: imagenet[name] for name in classes}
    if len(classes) != num_classes:
        raise UsageError(
            f"{root}: has {len(classes)} class folders, {model} has {num_classes} outputs: they must agree "
            f"(?num_classes={len(classes)} in the spec), or the folders be named by ImageNet wnids"
        )
    return {name: label for label, name in enumerate(sorted(classes))}


def class_names(splits: Splits, num_classes: int) -> list[str]:
    """A readable name for every output of the model, for pictures."""
    mapping = label_map(splits.val.classes, num_classes, splits.val.root.parent, "the student")
    info = ImageNetInfo("imagenet-1k")
    names = np.array([str(number) for number in range(num_classes)], dtype=object)
    if num_classes == info.num_classes() and set(mapping) <= set(info.label_names()):
        return [info.index_to_description(number).split(",")[0] for number in range(num_classes)]
    for name, number in mapping.items():
        names[number] = name
    return list(names)
