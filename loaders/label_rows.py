"""A label cache while it grows: rows of any images in any order, appended by each process to a file of its own a view.

A file `rows-VIEW-PROCESS.bin` is a sequence of records. A record is its number of images and the CRC-32 of what follows
(uint32 each), the images' numbers (int64) and their rows. What a kill leaves of the last record counts for nothing: a
process may die at any moment, and any number of processes may go on.

Shape legend: N images of the index, B images of a record.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .label_cache import ROWS, bad_rows
from .label_header import CacheHeader

_HEAD = struct.Struct("<II")
_NAME = re.compile(r"(?:rows|spool)-(\d{4,7})-\d+\.bin")  # mealfast once called these files spools
_GATHERED = 1 << 28  # bytes of a view's rows that are held in memory at once


def name_of(view: int, process: int) -> str:
    """File name of what a process adds to a view."""
    return f"rows-{view:04}-{process}.bin"


def row_files(folder: Path) -> dict[int, list[Path]]:
    """View -> the files that hold rows of it."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if (match := _NAME.fullmatch(path.name)) and path.is_file():
            found.setdefault(int(match[1]), []).append(path)
    return found


def record(images: np.ndarray, rows: np.ndarray) -> bytes:
    """The record of images (integers [B]) and their rows ([B] of `CacheHeader.row`)."""
    content = images.astype("<i8").tobytes() + rows.tobytes()
    return _HEAD.pack(len(images), zlib.crc32(content)) + content


def present(folder: Path, header: CacheHeader, view: int, *, repair: bool = False) -> np.ndarray:
    """bool [N]: the images whose rows of a view are there. `repair` cuts off what a kill left of a record.

    Raises OSError.
    """
    have = np.zeros(header.images, bool)
    for path in row_files(folder).get(view, []):
        whole = 0
        for end, images, _ in _records(path, header):
            have[images], whole = True, end
        if repair and whole < path.stat().st_size:
            os.truncate(path, whole)
    return have


def gathered(folder: Path, header: CacheHeader, view: int) -> Iterator[np.ndarray]:
    """A view's rows in the order of the images, zeros where none is there; a multiple of ROWS at a time but the last.

    Raises OSError.
    """
    paths = row_files(folder).get(view, [])
    block = ROWS * max(1, _GATHERED // (ROWS * header.row.itemsize))
    for first in range(0, header.images, block):
        rows = np.zeros(min(block, header.images - first), header.row)
        for path in paths:
            for _, images, added in _records(path, header):
                here = (images >= first) & (images < first + len(rows))
                rows[images[here] - first] = added[here]
        yield rows


def _records(path: Path, header: CacheHeader) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(end in the file, images int64 [B], rows [B]) of each record, up to the first that is not whole."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            count, crc = _HEAD.unpack(head)
            size = count * (8 + header.row.itemsize)
            left -= _HEAD.size + size
            content = file.read(size) if left >= 0 else b""
            if len(content) != size or zlib.crc32(content) != crc:
                return
            images = np.frombuffer(content, "<i8", count)
            rows = np.frombuffer(content, header.row, count, 8 * count)
            if count and (not 0 <= images.min() <= images.max() < header.images or bad_rows(rows, header.classes)):
                return
            yield file.tell(), images, rows
