"""The images' labels as the student numbers its classes, and which classes have no image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mealfast.errors import UsageError
from mealfast.loaders import ImageIndex
from mealfast.machine.wording import counted
from mealfast.method.data import Splits
from mealfast.models.class_names import Names, said
from mealfast.models.class_order import Agreed


def number_classes(splits: Splits, agreed: Agreed, *, labels_needed: bool) -> Splits:
    """The same images, labelled by the student's outputs. Raises UsageError where labels are needed and missing."""
    if labels_needed and (splits.train.labels < 0).any():
        raise UsageError(
            f"{splits.train.root}: holds images outside class folders, but --hard-label-weight needs labels"
        )
    return replace(splits, train=splits.train.relabel(agreed.labels), val=splits.val.relabel(agreed.labels))


def absent(index: ImageIndex, names: Names) -> list[str]:
    """The names of the classes that no image of an index, labelled by outputs, belongs to."""
    present = set(np.unique(index.labels).tolist())
    return [name for output, name in enumerate(names) if output not in present]


def absent_note(root: object, lacking: Sequence[str], classes: int) -> str:
    """The line on classes without images."""
    return f"note: {root}: no image of {len(lacking)} of {counted(classes, 'class')}: {said(lacking)}"


def absent_notes(splits: Splits, names: Names) -> list[str]:
    """A line on the classes without a training image, and one on those that have some but no validation image, unless
    `Splits.notes` says that; images without labels lack none."""
    train = absent(splits.train, names) if (splits.train.labels >= 0).all() else []
    known = set(train)
    val = [name for name in absent(splits.val, names) if name not in known]
    cut = splits.val.root == splits.train.root  # one folder, whose cutting says so
    found = ((splits.train.root, train), (splits.val.root, [] if cut else val))
    return [absent_note(root, lacking, len(names)) for root, lacking in found if lacking]
