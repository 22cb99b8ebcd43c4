"""Lists the image files of a folder tree with their sizes and times: names only, no file is opened."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .batch import DataError
from .files import printable

# By name, as every folder dataset does: what a file really holds is found out when it is probed.
IMAGE_SUFFIXES = frozenset(
    b".jpg .jpeg .jpe .jfif .jpg_large .png .webp .bmp .gif .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif .mpo".split()
)


# Folders listed at a time where a file takes longer than SLOW: on a network disk every question waits for its answer.
# On a local disk threads would only take turns.
THREADS, SLOW = 16, 30e-6  # seconds


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
    if not root.is_dir():
        what = "is not a folder" if root.exists() else "does not exist"
        raise DataError(f"{root}: {what}; give a folder that holds one folder of images a class")
    began = time.perf_counter()
    found, folders = _files_and_folders(top, b"")
    parents = (_identity(top),)
    while folders and (len(found) < 100 or time.perf_counter() - began < SLOW * len(found)):
        folder, prefix = folders.pop()
        found += _walk(folder, prefix, parents)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="mealfast-walk") as pool:
        for more in pool.map(lambda folder: _walk(folder[0], folder[1], parents), folders):
            found += more
    found.sort()
    return Listing(
        [path for path, _, _ in found],
        np.array([size for _, size, _ in found], np.int64),
        np.array([mtime for _, _, mtime in found], np.int64),
    )


def _walk(folder: bytes, prefix: bytes, parents: tuple[tuple[int, int], ...]) -> list[tuple[bytes, int, int]]:
    """(path, size, time) of every image below a folder."""
    identity = _identity(folder)
    if identity in parents:  # a link to a folder above: what it leads to is listed already
        return []
    found, folders = _files_and_folders(folder, prefix)
    for inner in folders:
        found += _walk(*inner, (*parents, identity))
    return found


def _files_and_folders(folder: bytes, prefix: bytes) -> tuple[list[tuple[bytes, int, int]], list[tuple[bytes, bytes]]]:
    """The images that lie in a folder itself, and the folders in it with their prefixes."""
    files, folders = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(b"."):
                    continue
                if entry.is_dir():
                    folders.append((entry.path, prefix + name + b"/"))
                elif name[name.rfind(b".") :].lower() in IMAGE_SUFFIXES:
                    files.append((prefix + name, *_size_and_time(entry)))
    except OSError as error:
        raise _unreadable(folder, error) from None
    return files, folders


def _size_and_time(entry: os.DirEntry[bytes]) -> tuple[int, int]:
    try:
        status = entry.stat()
    except OSError:  # a dangling link: probing it will tell
        return -1, 0
    return status.st_size, status.st_mtime_ns


def _identity(folder: bytes) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return status.st_dev, status.st_ino


def _unreadable(folder: bytes, error: OSError) -> DataError:
    return DataError(f"{printable(folder.decode('utf-8', 'backslashreplace'))}: cannot be read ({error.strerror})")
