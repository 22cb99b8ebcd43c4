"""Writes an image tree into tar shards; see `packed` for the format."""

from __future__ import annotations

import io
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from . import index_store
from .batch import DataError
from .cores import core_share
from .files import printable, replacing
from .index import ImageIndex
from .index_store import Stored
from .packed import INDEX, UNFINISHED, shard_name
from .probe import PLAIN, open_image, reason


def pack(
    index: ImageIndex,
    folder: str | os.PathLike[str],
    *,
    shard_bytes: int = 1 << 30,
    shorter_side: int | None = None,
    quality: int = 90,
    workers: int | None = None,
    progress: bool = False,
) -> None:
    """Write the images of `index` into `folder` as tar shards of about `shard_bytes`, in the index's order.

    Files are copied as they are; with `shorter_side`, images whose shorter side is longer are resized to it and
    written as JPEG of `quality` (1 to 100). `ImageIndex.scan(folder)` opens the result, with the same views where
    nothing was resized. A folder whose packing was interrupted is packed from the start again. Raises DataError: the
    folder holds something else, a file broke, no space.
    """
    if shard_bytes < 1 or not 1 <= quality <= 100 or (shorter_side is not None and shorter_side < 1):
        raise DataError("pack: shard size and shorter side must be at least 1, quality from 1 to 100")
    folder = Path(folder)
    try:
        _claim(folder)
        images = _encoded_images(index, shorter_side, quality, workers or core_share())
        if progress:
            from tqdm import tqdm

            images = tqdm(images, total=len(index), desc=f"packing {folder}", unit=" images", mininterval=0.5)
        stored = _write_shards(index, folder, images, shard_bytes)
        if not index_store.save(stored, folder / INDEX):
            raise DataError(f"{folder / INDEX}: cannot be written")
        (folder / UNFINISHED).unlink()
    except OSError as error:
        raise DataError(f"{printable(str(error.filename or folder))}: {error.strerror or error}") from None


def _claim(folder: Path) -> None:
    """Make `folder` ours: new, empty, or left by an interrupted packing, whose files go."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / UNFINISHED).exists():
        raise DataError(f"{folder}: is not empty; give a new folder to pack into")
    (folder / UNFINISHED).touch()
    names = ("shard-*.tar*", "shard-*.idx", INDEX, ".*.tmp")  # the last are what a killed process had begun
    for path in [path for name in names for path in folder.glob(name)]:
        path.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Encoded:
    data: bytes
    width: int
    height: int
    plain: bool
    extension: str | None  # a new one, where the image was written anew


def _encoded_images(index: ImageIndex, shorter_side: int | None, quality: int, workers: int) -> Iterator[_Encoded]:
    """The images in order, a few of them worked on ahead."""
    with ThreadPoolExecutor(workers, thread_name_prefix="mealfast-pack") as pool:
        rows = iter(range(len(index)))
        ahead: deque[Future[Any]] = deque()
        try:
            while True:
                for i in islice(rows, 4 * workers - len(ahead)):
                    ahead.append(pool.submit(_encode, index, i, shorter_side, quality))
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _encode(index: ImageIndex, i: int, shorter_side: int | None, quality: int) -> _Encoded:
    width, height = int(index.widths[i]), int(index.heights[i])
    try:
        with index.open(i) as file:
            if shorter_side is not None and min(width, height) > shorter_side:
                return _reencode(file, shorter_side, quality)
            data = file.read()
    except Exception as error:  # hostile files raise anything
        why = printable(reason(error))
        raise DataError(f"{index.root}/{index.display_path(i)}: {why}; mend or remove the file") from None
    if len(data) != index.file_sizes[i]:
        raise DataError(f"{index.root}/{index.display_path(i)}: changed since it was indexed; start again")
    return _Encoded(data, width, height, bool(index.plain[i]), None)


def _reencode(file: BinaryIO, shorter_side: int, quality: int) -> _Encoded:
    with open_image(file) as image:
        shrink = shorter_side / min(image.size)
        width, height = (max(shorter_side, round(side * shrink)) for side in image.size)
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality)
    return _Encoded(jpeg.getvalue(), width, height, True, ".jpg")


def _write_shards(index: ImageIndex, folder: Path, images: Iterator[_Encoded], shard_bytes: int) -> Stored:
    names: list[bytes] = []
    places: list[tuple[int, int]] = []
    sizes: list[tuple[int, int, int, int]] = []
    stems: set[str] = set()
    rows = enumerate(images)
    number, next_row = 0, next(rows, None)
    while next_row is not None:
        with _new_shard(folder / shard_name(number)) as shard:
            while next_row is not None and shard.size < shard_bytes:
                i, image = next_row
                stem, extension = os.path.splitext(index.relative_path(i))
                # A sample of WebDataset is the files of one stem: a.jpg beside a.png must not become one.
                while stem in stems:
                    stem += "_"
                stems.add(stem)
                extension = image.extension or extension
                names.append(os.fsencode(stem + extension))
                places.append((number, shard.add(stem, extension, image.data, int(index.labels[i]))))
                sizes.append((len(image.data), image.width, image.height, PLAIN if image.plain else 0))
                next_row = next(rows, None)
        number += 1
    bad = index.quarantined
    lengths, widths, heights, bits = np.array(sizes + [(0, 0, 0, 0)] * len(bad), np.int64).T
    shards, offsets = np.array(places + [(0, 0)] * len(bad), np.int64).T
    return Stored(
        paths=names + [name.encode() for name, _ in bad],
        reasons=[""] * len(names) + [reason for _, reason in bad],
        bytes=lengths,
        mtimes=np.zeros(len(lengths), np.int64),
        widths=widths,
        heights=heights,
        bits=bits,
        shards=shards,
        offsets=offsets,
    )


@contextmanager
def _new_shard(path: Path) -> Iterator[_Shard]:
    """A tar file to add images to and its index for DALI's WebDataset reader; both get their names when complete."""
    with replacing(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        shard = _Shard(tar)
        yield shard
    with replacing(path.with_suffix(".idx")) as temporary:
        temporary.write_text("\n".join([f"v1.1 {len(shard.lines)}", *shard.lines]) + "\n")


class _Shard:
    """A tar file that grows, and the lines of its index."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.lines: list[str] = []

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._tar.offset

    def add(self, stem: str, extension: str, data: bytes, label: int) -> int:
        """Append an image and its label; returns where the image's bytes begin."""
        label_bytes = str(label).encode()
        at, label_at = self._add(stem + extension, data), self._add(f"{stem}.cls", label_bytes)
        self.lines.append(f"{extension[1:].lower()} {at} {len(data)} cls {label_at} {len(label_bytes)}")
        return at

    def _add(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        header = len(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        at = self._tar.offset + header
        self._tar.addfile(info, io.BytesIO(data))
        return at
