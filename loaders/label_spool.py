"""Rows of a label cache in any order, as a training run makes them, and the views that they are gathered into.

Every process appends records to a file of its own a view, `spool-VIEW-RANK.bin`. A record is its number of images and
the CRC-32 of what follows (uint32 each), the images' numbers (int64) and their rows. What a kill leaves of the last
record counts for nothing.

Shape legend: N images of the index, B images of a record, k entries kept of each target.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .batch import DataError
from .label_cache import means
from .label_header import CacheHeader, CompleteView, read_header, view_name, write_header
from .label_journal import Journals
from .label_writer import clear_errors

_HEAD = struct.Struct("<II")
SPOOLS = "spool-*.bin"
_OPTION = "--label-cache"


class LabelSpool:
    """One process's hand on a cache that a training run has claimed (`claim_label_cache(..., by_training=True)`)."""

    def __init__(self, folder: Path, rank: int = 0):
        self._folder, self._rank = folder, rank
        self.header = read_header(folder)
        self._open: tuple[int, int] | None = None  # view, file descriptor

    def add(self, view: int, images: np.ndarray, ids: np.ndarray, probabilities: np.ndarray) -> None:
        """Appends the targets of `images` (integers [B]) in a view: ids integer [B, k], probabilities float [B, k].

        A target that is not finite is left out: it stays missing. Raises DataError: a full disk.
        """
        finite = np.isfinite(probabilities).all(axis=1)
        images, rows = images[finite].astype("<i8"), np.empty(int(finite.sum()), self.header.row)
        rows["ids"], rows["probabilities"] = ids[finite], probabilities[finite]
        with clear_errors(self._folder, _OPTION):
            _write_all(self._descriptor(view), _record(images, rows))

    def flush(self) -> None:
        """Has what was added on disk, whatever happens to the machine."""
        if self._open is not None:
            with clear_errors(self._folder, _OPTION):
                os.fsync(self._open[1])

    def missing(self, view: int) -> np.ndarray:
        """int64, ascending: the images whose targets no process has added yet."""
        return np.flatnonzero(~_gathered(self._folder, self.header, view)[1])

    def complete(self, view: int) -> None:
        """Makes the view of all that was added and enters it into the header. The main process only, others waiting.

        Raises DataError: targets are missing, a full disk.
        """
        rows, have = _gathered(self._folder, self.header, view)
        if not have.all():
            raise DataError(
                f"--teachers: the target of view {view}, image {int(np.argmin(have))}, is not finite; look for damaged "
                "weights, or use --amp off"
            )
        record = CompleteView(view, hashlib.sha256(rows).hexdigest(), *means(rows, self.header.classes))
        with clear_errors(self._folder, _OPTION):
            _replace(self._folder / view_name(view), rows.tobytes())
            # The file may be as it was before only in the header of a cache that was damaged: the new record counts.
            others = tuple(one for one in read_header(self._folder).complete if one.view != view)
            complete = tuple(sorted((*others, record), key=lambda one: one.view))
            self.header = dataclasses.replace(self.header, complete=complete)
            write_header(self._folder, self.header)
            self.close()
            for path in spools(self._folder, view):
                path.unlink()
            if self.header.is_complete:
                for path in Journals(self._folder).paths():
                    path.unlink()

    def close(self) -> None:
        """Closes the file; what was added stays."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _descriptor(self, view: int) -> int:
        if self._open is None or self._open[0] != view:
            self.close()
            path = self._folder / f"spool-{view:04}-{self._rank}.bin"
            self._open = view, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return self._open[1]


def spools(folder: Path, view: int | None = None) -> list[Path]:
    """The spools there are, of all views or of one."""
    return sorted(folder.glob(SPOOLS if view is None else f"spool-{view:04}-*.bin"))


def gather_spools(folder: Path, header: CacheHeader) -> None:
    """Leaves one spool a view that is not complete, without the half records of a kill. Before any process adds."""
    complete = {one.view for one in header.complete}
    views = {int(path.name.split("-")[1]) for path in spools(folder) if path.name.split("-")[1].isdecimal()}
    for view in views:
        old = spools(folder, view)
        first = folder / f"spool-{view:04}-0.bin"
        keep = view < header.views and view not in complete
        if keep:
            rows, have = _gathered(folder, header, view)
            _replace(first, _record(np.flatnonzero(have).astype("<i8"), rows[have]))
        for path in old:
            if path != first or not keep:
                path.unlink()


def _gathered(folder: Path, header: CacheHeader, view: int) -> tuple[np.ndarray, np.ndarray]:
    """A view's rows [N], zeros where none was added, and bool [N]: whether one was."""
    rows, have = np.zeros(header.images, header.row), np.zeros(header.images, bool)
    for path in spools(folder, view):
        for images, added in _records(path.read_bytes(), header):
            rows[images], have[images] = added, True
    return rows, have


def _records(data: bytes, header: CacheHeader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    at = 0
    while at + _HEAD.size <= len(data):
        count, crc = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        size = count * (8 + header.row.itemsize)
        if zlib.crc32(data[at : at + size]) != crc or at + size > len(data):
            return
        images = np.frombuffer(data, "<i8", count, at)
        if count and not 0 <= images.min() <= images.max() < header.images:
            return
        yield images, np.frombuffer(data, header.row, count, at + 8 * count)
        at += size


def _record(images: np.ndarray, rows: np.ndarray) -> bytes:
    content = images.tobytes() + rows.tobytes()
    return _HEAD.pack(len(images), zlib.crc32(content)) + content


def _replace(path: Path, data: bytes) -> None:
    """Puts a file in place in one piece, synced to disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)


def _write_all(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
