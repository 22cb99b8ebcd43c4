"""Which images of a folder are trained on and which are for validation: the one place that decides it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mealfast.errors import UsageError
from mealfast.loaders import ImageIndex
from mealfast.loaders.packed import INDEX as PACK
from mealfast.machine.files import brief, printable
from mealfast.machine.wording import counted
from mealfast.recipe import VAL_SHARE

# Names in any case, the first that is there.
TRAIN = ("train", "training")
VAL = ("val", "validation", "valid", "test", "testing")
_OFTEN_UNLABELLED = ("test", "testing")
_NAMED = 5  # classes that one line names
WHOLE = "note: all images of {} count; --val-share takes only those that `mealfast train` keeps for validation"


@dataclass(frozen=True)
class Folders:
    """Where the images lie. `val` is None where some of those in `train` are to be kept for validation."""

    train: Path
    val: Path | None


def find(data: str, val: str = "") -> Folders:
    """The folders of `--data` and `--val`: DATA/train and what lies beside it, or DATA itself where it holds class
    folders (or images) alone. DATA may be such a train/ too. Raises UsageError."""
    root = _folder(data, "--data", "name a folder with train/ and val/, or one of class folders")
    train, beside = _called(root, TRAIN), root
    if train is None:
        train = root
        if Path(os.path.abspath(root)).name.lower() in TRAIN:
            beside = root.parent if root.name not in ("", ".", "..") else Path(os.path.abspath(root)).parent
        elif not val and (names := _subfolders(root)) and all(name.lower() in VAL for name in names):
            raise UsageError(f"--data {data}: has no train/ beside {printable(names[0])}/; it must hold both")
    if not val:
        return Folders(train, None if beside == root == train else _called(beside, VAL))
    named = _folder(val, "--val", "")
    if named.resolve().is_relative_to(train.resolve()):
        raise UsageError(f"--val {val}: lies within the training images of {train}; move it out of them")
    return Folders(train, named)


def parts_of(root: Path) -> list[Path]:
    """Training and validation folder of `root`, whichever there are; `root` itself where there is neither."""
    if not root.is_dir():
        return [root]
    train, val, names = _called(root, TRAIN), _called(root, VAL), _subfolders(root)
    if train is None and not all(name.lower() in VAL for name in names):  # classes that are called so
        return [root]
    return [part for part in (train, val) if part is not None] or [root]


def cut(index: ImageIndex, share: float) -> tuple[ImageIndex, ImageIndex]:
    """Training and validation images of a tree without a validation folder. Raises UsageError: none is left for one.

    An image is for validation where the SHA-256 of its path below the root, as a number in [0, 1), is below `share`:
    the same on every machine, and whatever is added. Images without a class are for training, and so is the last one of
    a class that would have none.
    """
    places = _places(index)
    chosen = (places < share) & (index.labels >= 0)
    _keep_one_of_each(index, chosen, places)
    if not (index.labels >= 0).any():
        raise UsageError(
            f"--data {index.root}: its images lie in no class folders, so that none can be kept for validation; name a "
            "folder of labelled ones with --val"
        )
    if not chosen.any():
        raise UsageError(
            f"--val-share {share:g}: keeps none of the {counted(len(index), 'image')} in {index.root} for validation; "
            "give a larger share, or name a folder of others with --val"
        )
    train, val = index.select(np.flatnonzero(~chosen)), index.select(np.flatnonzero(chosen))
    return train, dataclasses.replace(val, quarantined=[])  # said once


def cut_notes(train: ImageIndex, val: ImageIndex, share: float) -> list[str]:
    """What to tell the user of `cut`."""
    lines = [
        f"{train.root} has no validation folder: {len(val):,} of {counted(len(train) + len(val), 'image')} are kept "
        f"for validation (--val-share {share:g}, by a hash of their names; --val DIR names others)"
    ]
    here = np.bincount(val.labels, minlength=len(val.classes)) > 0
    absent = [brief(name, 40) for name, present in zip(val.classes, here, strict=True) if not present]
    if absent:
        more = f" and {len(absent) - _NAMED:,} more" if len(absent) > _NAMED else ""
        lines.append(
            f"note: no validation image is of {counted(len(absent), 'class')}: {', '.join(absent[:_NAMED])}{more}; a "
            "larger --val-share would have some"
        )
    return lines


def kept(root: Path, index: ImageIndex) -> int:
    """How many images of a folder's only tree `mealfast train` keeps for validation by default; 0: it keeps none."""
    try:
        return len(cut(index, VAL_SHARE)[1]) if find(str(root)).val is None else 0
    except UsageError:
        return 0


def _places(index: ImageIndex) -> np.ndarray:
    """float64 [N] in [0, 1): of each image, by its path alone."""
    names = (os.fsencode(index.relative_path(i)) for i in range(len(index)))
    first = b"".join(hashlib.sha256(name).digest()[:6] + b"\0\0" for name in names)  # 48 bits are exact in a float64
    return np.frombuffer(first, ">u8").astype(np.float64) / 2.0**64


def _keep_one_of_each(index: ImageIndex, chosen: np.ndarray, places: np.ndarray) -> None:
    """Takes one image back, the highest of `places`, of each class that `chosen`, bool [N], holds all of."""
    labels = index.labels
    left = np.bincount(labels[(labels >= 0) & ~chosen], minlength=len(index.classes))
    for label in np.flatnonzero(left == 0).tolist():
        rows = np.flatnonzero(labels == label)
        if len(rows):
            chosen[rows[places[rows].argmax()]] = False


def _folder(path: str, option: str, right: str) -> Path:
    if not path:
        raise UsageError(f"{option} is missing: {right}")
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        raise UsageError(f"{option} {path}: {'is a file; name a folder' if folder.exists() else 'no such folder'}")
    return folder


def _called(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder in `root` that bears the first of `names`, in lower case or else in any."""
    found = _subfolders(root)
    for wanted in names:
        for name in sorted((one for one in found if one.lower() == wanted), reverse=True):  # lower case first
            if wanted in _OFTEN_UNLABELLED and not (_subfolders(root / name) or (root / name / PACK).is_file()):
                continue  # of a competition: images without labels
            return root / name
    return None


def _subfolders(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UsageError(f"{root}: cannot be read ({error.strerror})") from error
