"""The images a run learns from and is measured on, and its views of them."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from mealfast.errors import UsageError
from mealfast.loaders import ExplicitViews, ImageIndex, LabelCache, ViewPlan
from mealfast.machine.files import printable
from mealfast.machine.processes import Runtime
from mealfast.machine.terminal import is_terminal, say
from mealfast.machine.waiting import waiting
from mealfast.method import folders
from mealfast.recipe import VAL_SHARE, Recipe


@dataclass(frozen=True)
class Splits:
    train: ImageIndex
    val: ImageIndex
    notes: tuple[str, ...] = ()  # what to tell the user of how they were found


def scan_splits(
    data: str, val: str = "", share: float = VAL_SHARE, *, workers: int | None = None, progress: bool = False
) -> Splits:
    """The indexes of the training and validation images of `--data`, `--val` and `--val-share`; see `folders`.

    Raises UsageError or DataError where either is missing or empty, or where a validation folder has a class that the
    training images lack (unlabelled ones, with no class folder, lack none).
    """
    where = folders.find(data, val)
    with _looking(where.train):
        train = ImageIndex.scan(where.train, workers=workers, progress=progress)
    if where.val is None:
        train, held_out = folders.cut(train, share)
        return Splits(train, held_out, tuple(folders.cut_notes(train, held_out, share)))
    with _looking(where.val):
        held_out = ImageIndex.scan(where.val, classes=train.classes or None, workers=workers, progress=progress)
    if (held_out.labels < 0).any():
        raise UsageError(
            f"{'--val ' + val if val else '--data ' + data}: {where.val.name}/ holds images outside class folders; put "
            "each in its class's folder"
        )
    usual = val or where.val.name == "val"
    return Splits(train, held_out, () if usual else (f"validation images: {printable(str(where.val))}",))


def scan_images(
    data: str, part: str, runtime: Runtime, workers: int | None = None, *, val: str = "", share: float | None = None
) -> ImageIndex:
    """The index of DATA's training ("train") or validation ("val") images, all processes together.

    Where DATA holds class folders alone, the training images are those that `scan_splits` trains on, for a `share`
    (None: the recipe's default) that is kept for validation. "val" with no `share` then means all of DATA: it may be a
    validation folder. Raises UsageError or DataError.
    """
    with runtime.main_first(), _looking(data):  # the others find the index that the main process has stored
        index, notes = _scan_part(data, part, val, share, workers, runtime.is_main and is_terminal(sys.stderr))
    for line in notes if runtime.is_main else ():
        say(line)
    return index


def _scan_part(
    data: str, part: str, val: str, share: float | None, workers: int | None, progress: bool
) -> tuple[ImageIndex, list[str]]:
    root = Path(os.path.expanduser(data))
    if not data or not root.is_dir():
        raise UsageError(f"--data {data}: no such folder" if data else "--data is missing: name a folder of images")
    if part == "val" and not val and share is None:
        last = folders.parts_of(root)[-1]
        if last == root or last.name.lower() in folders.VAL:
            index = ImageIndex.scan(last, workers=workers, progress=progress)
            return index, [folders.WHOLE.format(index.root)] if last == root and _might_be_trained_on(root) else []
    where = folders.find(data, val)
    if where.val is not None:
        return ImageIndex.scan(getattr(where, part), workers=workers, progress=progress), []
    whole = ImageIndex.scan(where.train, workers=workers, progress=progress)
    if part == "train" and ((whole.labels < 0).all() or _name(root) in folders.VAL):
        return whole, []  # nothing to keep; a folder of validation images, which nobody trains on
    share = VAL_SHARE if share is None else share
    train, held_out = folders.cut(whole, share)
    return train if part == "train" else held_out, folders.cut_notes(train, held_out, share)


def _looking(folder: str | Path) -> AbstractContextManager[None]:
    return waiting(f"looking through {printable(str(folder))}", enabled=not is_terminal(sys.stderr))  # which has a bar


def _might_be_trained_on(root: Path) -> bool:
    """Whether nothing says that a folder of class folders is one of validation images, or of training images."""
    return _name(root) not in (*folders.TRAIN, *folders.VAL)


def _name(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name.lower()


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
