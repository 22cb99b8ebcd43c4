"""Lists the image files of a folder tree with their sizes and times: names only, no file is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .batch import DataError

# By name, as every folder dataset does: what a file really holds is found out when it is probed.
IMAGE_SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .jpg_large .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .mpo".split()
)


@dataclass(frozen=True)
class Listing:
    """Files in order of their relative paths' bytes."""

    paths: list[bytes]  # relative to the root, '/' between folders
    bytes: np.ndarray  # int64 [N], size of the file; -1 where it cannot be read (a dangling link)
    mtimes: np.ndarray  # int64 [N], nanoseconds

    def __len__(self) -> int:
        return len(self.paths)


def list_images(root: Path) -> Listing:
    """Every file below `root` with an image's suffix (any case), links followed, hidden files and folders left out."""
    top = os.fsencode(root)
    try:
        is_folder = root.is_dir()
        if is_folder:
            os.scandir(top).close()
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror})") from None
    if not is_folder:
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root}: {what}; give a folder that holds one folder of images a class")
    found: list[tuple[bytes, int, int]] = []
    _walk(top, b"", found, ())
    found.sort()
    return Listing(
        [path for path, _, _ in found],
        np.fromiter((size for _, size, _ in found), np.int64, len(found)),
        np.fromiter((mtime for _, _, mtime in found), np.int64, len(found)),
    )


def _walk(folder: bytes, prefix: bytes, found: list, parents: tuple) -> None:
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"{os.fsdecode(folder)}: cannot be read ({error.strerror})") from None
    identity = (status.st_dev, status.st_ino)
    if identity in parents:  # a link to a folder above: what it leads to is listed already
        return
    parents = (*parents, identity)
    for entry in entries:
        name = entry.name
        if name.startswith(b"."):
            continue
        if entry.is_dir():
            _walk(entry.path, prefix + name + b"/", found, parents)
        elif name[name.rfind(b".") :].lower() in IMAGE_SUFFIXES:
            try:
                status = entry.stat()
            except OSError:
                found.append((prefix + name, -1, 0))
                continue
            found.append((prefix + name, status.st_size, status.st_mtime_ns))
