"""Writes an image tree into tar shards; see `packed` for the format."""

from __future__ import annotations

import io
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from . import index_store
from .batch import DataError
from .cores import core_share
from .index import ImageIndex
from .index_store import Stored
from .packed import INDEX, UNFINISHED, shard_name
from .probe import PLAIN, open_image


def pack(
    index: ImageIndex,
    folder: str | os.PathLike,
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
        raise DataError(f"{error.filename or folder}: {error.strerror or error}") from None


def _claim(folder: Path) -> None:
    """Make `folder` ours: new, empty, or left by an interrupted packing, whose files go."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()) and not (folder / UNFINISHED).exists():
        raise DataError(f"{folder}: is not empty; give a new folder to pack into")
    (folder / UNFINISHED).touch()
    for path in [*folder.glob("shard-*.tar*"), *folder.glob("shard-*.idx"), folder / INDEX]:
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
        ahead: deque[Future] = deque()
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
        source = index.source(i)
        if shorter_side is not None and min(width, height) > shorter_side:
            return _reencode(source, shorter_side, quality)
        data = source.getvalue() if isinstance(source, io.BytesIO) else Path(os.fsdecode(source)).read_bytes()
    except Exception as error:  # hostile files raise anything
        raise DataError(f"{index.root}/{index.display_path(i)}: {error}; mend or remove the file") from None
    if len(data) != index.file_sizes[i]:
        raise DataError(f"{index.root}/{index.display_path(i)}: changed since it was indexed; start again")
    return _Encoded(data, width, height, bool(index.plain[i]), None)


def _reencode(source: bytes | io.BytesIO, shorter_side: int, quality: int) -> _Encoded:
    with open_image(source) as image:
        shrink = shorter_side / min(image.size)
        size = tuple(max(shorter_side, round(side * shrink)) for side in image.size)
        image = image if image.mode in ("RGB", "L") else image.convert("RGB")
        image = image.resize(size, Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=quality)
    return _Encoded(jpeg.getvalue(), *size, True, ".jpg")


def _write_shards(index: ImageIndex, folder: Path, images: Iterator[_Encoded], shard_bytes: int) -> Stored:
    names, places, sizes = [], [], []
    stems: set[str] = set()
    shard = None
    for i, image in enumerate(images):
        if shard is None or shard.size >= shard_bytes:
            if shard is not None:
                shard.finish()
            shard = _Shard(folder, 0 if shard is None else shard.number + 1)
        stem, extension = os.path.splitext(index.relative_path(i))
        # A sample of WebDataset is the files of one stem: a.jpg beside a.png must not become one.
        while stem in stems:
            stem += "_"
        stems.add(stem)
        extension = image.extension or extension
        names.append(os.fsencode(stem + extension))
        places.append((shard.number, shard.add(stem, extension, image.data, int(index.labels[i]))))
        sizes.append((len(image.data), image.width, image.height, PLAIN if image.plain else 0))
    if shard is not None:
        shard.finish()
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


class _Shard:
    """One tar file and its index for DALI's WebDataset reader; both get their names when they are complete."""

    def __init__(self, folder: Path, number: int):
        self.number = number
        self._path = folder / shard_name(number)
        self._tar = tarfile.open(f"{self._path}.tmp", "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 (closed by finish)
        self._lines: list[str] = []

    @property
    def size(self) -> int:
        return self._tar.offset

    def add(self, stem: str, extension: str, data: bytes, label: int) -> int:
        """Append an image and its label; returns where the image's bytes begin."""
        label_bytes = str(label).encode()
        at, label_at = self._add(stem + extension, data), self._add(f"{stem}.cls", label_bytes)
        self._lines.append(f"{extension[1:].lower()} {at} {len(data)} cls {label_at} {len(label_bytes)}")
        return at

    def _add(self, name: str, data: bytes) -> int:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        header = len(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
        at = self._tar.offset + header
        self._tar.addfile(info, io.BytesIO(data))
        return at

    def finish(self) -> None:
        """Complete both files and give them their names."""
        self._tar.close()
        self._path.with_suffix(".idx").write_text("\n".join([f"v1.1 {len(self._lines)}", *self._lines]) + "\n")
        os.replace(f"{self._path}.tmp", self._path)
