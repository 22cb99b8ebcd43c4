"""Makes a label cache of FKD's label files: their crops and flips come along, so that training shows the same views.

Shape legend: N images of the index, V views (FKD's crops), k entries of each label.
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from pathlib import Path

import numpy as np

from mealfast.errors import UsageError
from mealfast.labels.fkd_files import FLAVOURS, flavour_of, read_labels
from mealfast.loaders import (
    EXPLICIT,
    CacheHeader,
    DataError,
    ImageIndex,
    LabelWriter,
    claim_label_cache,
)
from mealfast.machine.terminal import say
from mealfast.record.console import Progress, size_text

BLOCK_BYTES = 1 << 28  # of rows that are held before they go to disk
LARGEST_SIDE = (1 << 16) - 1  # pixels, of a box


def import_fkd(
    folder: Path, index: ImageIndex, out: Path, *, views: int | None, flavour: str | None, classes: int
) -> CacheHeader:
    """Makes, or goes on making, the cache of the labels in `folder` (or its train/, or imagenet/train/) in `out`.

    `views` of each image's crops are taken (None: as many as the first file has), labels are of `flavour` (None: as the
    first file's shape says). Returns the finished header. Raises UsageError or DataError, one line.
    """
    if max(index.widths.max(), index.heights.max()) > LARGEST_SIDE:
        raise DataError(f"{index.root}: has an image of more than {LARGEST_SIDE} pixels a side, which no box can name")
    root = _root(folder, index)
    guessed, crops = flavour_of(root / _name(index, 0))
    flavour, views = flavour or guessed, views or crops
    if flavour not in FLAVOURS:
        raise DataError(f"{root / _name(index, 0)}: holds labels of {flavour}; FKD's are {', '.join(FLAVOURS)}")
    top_k = FLAVOURS[flavour]
    if top_k > classes:
        raise UsageError(f"--classes {classes}: {flavour} has {top_k} a crop; give as many or more")
    header = _header(folder, root, index, views, flavour, classes)
    with claim_label_cache(out, header) as claim:
        if claim.note:
            say(claim.note)
        say(
            f"{views} views of {len(index):,} images, {flavour}: {size_text(header.bytes_per_view * views)}, "
            f"{size_text(claim.bytes_left)} of it left to write"
        )
        with closing(LabelWriter(out)) as writer:
            _copy(root, index, writer, flavour)
            for view in writer.incomplete:
                writer.complete(view)
            return writer.header


def _copy(root: Path, index: ImageIndex, writer: LabelWriter, flavour: str) -> None:
    """Block by block of images, all views of it: a file is read once."""
    header, views = writer.header, writer.incomplete
    wanted = np.zeros(len(index), bool)
    for view in views:
        wanted[np.asarray(writer.missing(view))] = True
    images = np.flatnonzero(wanted)
    block = max(1, BLOCK_BYTES // (header.views * header.row.itemsize))
    with closing(Progress(len(images), 0, 1, enabled=True, unit="image")) as progress:
        for first in range(0, len(images), block):
            some = images[first : first + block]
            rows = np.empty((header.views, len(some)), header.row)
            for place, i in zip(rows.T, some.tolist(), strict=True):
                labels = read_labels(
                    root / _name(index, i), int(index.widths[i]), int(index.heights[i]), header.views, flavour,
                    header.classes,
                )  # fmt: skip
                place["ids"], place["probabilities"] = labels.ids, labels.probabilities
                place["box"], place["flip"] = labels.boxes, labels.flips
                progress.advance()
            for view in views:
                row = rows[view]
                writer.add(view, some, row["ids"], row["probabilities"], row["box"], row["flip"])


def _root(folder: Path, index: ImageIndex) -> Path:
    """The folder below which the labels lie in class folders."""
    if not folder.is_dir():
        raise UsageError(f"labels import-fkd {folder}: no such folder")
    name = _name(index, 0)
    for root in (folder, folder / "train", *sorted(folder.glob("*/train"))):
        if (root / name).is_file():
            return root
    raise UsageError(
        f"labels import-fkd {folder}: holds no {name}, train/{name} or */train/{name}; name the folder of FKD's "
        "labels, and as --data the images that they are of"
    )


def _name(index: ImageIndex, i: int) -> str:
    """Path of image i's labels: FKD cuts a file's name at its first dot."""
    parent, _, name = index.relative_path(i).rpartition("/")
    return f"{parent}/{name.partition('.')[0]}.tar".lstrip("/")


def _header(folder: Path, root: Path, index: ImageIndex, views: int, flavour: str, classes: int) -> CacheHeader:
    sha = hashlib.sha256(flavour.encode())
    for i in range(len(index)):
        path = root / _name(index, i)
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; the labels must cover every image of --data") from None
        sha.update(f"{_name(index, i)}\0{size}\0".encode("utf-8", "surrogateescape"))
    return CacheHeader(
        images=len(index),
        images_digest=index.images_digest,
        plan={"law": EXPLICIT, "images": len(index)},
        views=views,
        classes=classes,
        top_k=FLAVOURS[flavour],
        teachers=({"spec": f"FKD {flavour} ({folder.name})", "digest": sha.hexdigest()},),
        made_with={"batch_size": 1, "precision": "imported", "loader": "imported", "compiled": False},
    )
