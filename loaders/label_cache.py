"""Reading a label cache: the teachers' targets of planned views, checked. NumPy only.

Shape legend: N images of the index, V views, k entries kept of each target, B images of a batch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .batch import DataError
from .label_header import CacheHeader, read_header, view_name

ROWS = 1 << 16  # that are looked at together, so that checking a view takes little memory


class LabelCache:
    """The complete views of a cache. A view is read, and its checksum checked, when it is used."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Opens `folder`. Raises DataError where it is no cache, or where a file of it is missing or cut short."""
        self.folder = Path(folder)
        self.header: CacheHeader = read_header(self.folder)
        self._records = {record.view: record for record in self.header.complete}
        self._held: dict[int, np.ndarray] = {}  # the views used last
        self._ids: np.ndarray | None = None  # int32 [C]: what `targets` gives for each stored id; None: itself
        for view in self._records:
            self._check_size(view)

    def renumber(self, ids: Sequence[int] | None) -> None:
        """From now on `targets` gives `ids[i]` where i is stored; None: i."""
        self._ids = None if ids is None else np.asarray(ids, np.int32)

    def refresh(self) -> None:
        """Takes up the views that have become complete since."""
        self.header = read_header(self.folder)
        self._records = {record.view: record for record in self.header.complete}

    def has(self, view: int) -> bool:
        """Whether a view is complete."""
        return view in self._records

    def require_complete(self) -> None:
        """Raises DataError where views are missing."""
        have, views = len(self._records), self.header.views
        if have < views and self.header.explicit:
            raise DataError(
                f"label cache {self.folder}: {have} of its {views} views are complete; run the same `mealfast labels "
                "import-fkd` again"
            )
        if have < views:
            raise DataError(
                f"label cache {self.folder}: {have} of its {views} views are complete; run the same `mealfast labels "
                f"build` again{f', or with --views {have} to make do with these' if have else ''}; or train with the "
                "--teachers that it is of, which adds the missing ones"
            )

    def view(self, view: int) -> np.ndarray:
        """[N] of `header.row`: every image's target in a view, in memory, read-only.

        Two views are held. What is read is checked first: size, SHA-256, ids are classes, probabilities are from 0 to
        1. Raises DataError where it is damaged or cannot be read.
        """
        rows = self._held.get(view)
        if rows is None:
            rows = self._read(view)
            # Of an explicit cache the next epoch's boxes are planned, in a thread, while this one's targets are read.
            self._held = {**dict([*self._held.items()][-1:]), view: rows}
        return rows

    def targets(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids int32 [B, k] and probabilities float32 [B, k], descending, of the images `rows` (integers [B]).

        Raises DataError as `view` does.
        """
        found = self.view(view)[rows]
        ids = found["ids"].astype(np.int32)
        return ids if self._ids is None else self._ids[ids], found["probabilities"].astype(np.float32)

    def check(self, view: int) -> None:
        """Reads a view's file as `view` does, and forgets it. Raises DataError."""
        self._read(view)

    def _read(self, view: int) -> np.ndarray:
        # Read, not mapped: a mapped file that is cut off later ends the process, and one that is overwritten later
        # would reach the loss.
        if view not in self._records:
            raise DataError(f"label cache {self.folder}: view {view} is not complete")
        self._check_size(view)
        path, sha, damaged = self._path(view), hashlib.sha256(), ""
        try:
            rows = np.empty(self.header.images, self.header.row)
            with path.open("rb") as file:
                if (size := file.readinto(rows.view(np.uint8).data)) != rows.nbytes:
                    raise DataError(f"{path}: holds {size} bytes, not {rows.nbytes}; copy it again, or build")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); copy or build it again") from None
        except MemoryError:
            raise DataError(f"{path}: a view of {self.header.bytes_per_view} bytes does not fit in memory") from None
        for block in blocks(rows):
            sha.update(block.view(np.uint8).data)
            damaged = damaged or bad_rows(block, self.header.classes)
        if sha.hexdigest() != self._records[view].sha256:
            damaged = "its SHA-256 is not the header's"
        if damaged:
            raise DataError(f"{path}: is damaged ({damaged}); copy the file again, or remove it and build")
        rows.flags.writeable = False
        return rows

    def _check_size(self, view: int) -> None:
        try:
            size = self._path(view).stat().st_size
        except OSError as error:
            raise DataError(f"{self._path(view)}: cannot be read ({error.strerror}); copy or build it again") from None
        if size != self.header.bytes_per_view:
            raise DataError(
                f"{self._path(view)}: holds {size} bytes, not {self.header.bytes_per_view}; copy it again, or build"
            )

    def _path(self, view: int) -> Path:
        return self.folder / view_name(view)


def bad_rows(rows: np.ndarray, classes: int) -> str:
    """What is wrong with targets, [B] of `CacheHeader.row`; empty where nothing is."""
    if int(rows["ids"].max(initial=0)) >= classes or int(rows["ids"].min(initial=0)) < 0:
        return f"an id is not one of the {classes} classes"
    if "flip" in (rows.dtype.names or ()) and int(rows["flip"].max(initial=0)) > 1:
        return "a flip is neither 0 nor 1"
    # Of non-negative float16 numbers the order is that of their bits; a sign bit or a NaN makes them larger than one's.
    if (rows["probabilities"].copy().view("<u2") > np.float16(1).view(np.uint16)).any():
        return "a probability is not from 0 to 1"
    return ""


def means(rows: Iterable[np.ndarray], classes: int) -> tuple[float, float]:
    """Mean probability kept by the top k, and mean entropy (nats) with the rest spread evenly, of targets in blocks."""
    images, kept_sum, entropy_sum = 0, 0.0, 0.0
    for block in rows:
        p = block["probabilities"].astype(np.float64)
        others = max(classes - p.shape[1], 1)
        kept = p.sum(axis=1)
        rest = np.clip(1 - kept, 0, None)
        images += len(block)
        kept_sum += float(kept.sum())
        entropy_sum -= float((p * np.log(np.where(p > 0, p, 1))).sum())
        entropy_sum -= float((rest * np.log(np.where(rest > 0, rest / others, 1))).sum())
    return kept_sum / images, entropy_sum / images


def blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """ROWS rows at a time."""
    for first in range(0, len(rows), ROWS):
        yield rows[first : first + ROWS]
