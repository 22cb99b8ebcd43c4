"""Writing a label cache in parts, by one process or many, so that a kill at any moment loses only unfinished parts.

Each view's file is made at its full size and filled in place; what counts is the journals while it grows, and the
header once a view is complete. A finished cache is the same bytes however often its build was interrupted.

Shape legend: N images of the index, V views, k entries kept of each target, B images of a part.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from .batch import DataError
from .files import words
from .label_cache import bad_rows, means
from .label_header import HEADER, CacheHeader, CompleteView, differences, read_header, view_name, write_header
from .label_journal import Journals

# Fields of a header that are not called as the option of `labels build` that sets them.
_OPTIONS = {
    "images": "--data", "images_digest": "--data", "scale": "--crop-scale", "ratio": "--crop-ratio",
    "classes": "--teachers", "precision": "--amp", "compiled": "--compile", "rows_per_part": "--batch-size",
}  # fmt: skip


@contextmanager
def claim_label_cache(folder: Path, header: CacheHeader, *, by_training: bool = False) -> Iterator[int]:
    """Makes `folder` ready for the targets of `header`, or ready to go on; the main process does it before all others.

    Keeps complete views, journaled parts whose bytes are right, and spools. The folder is this process's until the
    block ends; yields how many bytes are still to be written. A training run, which writes by `LabelSpool`, may go on
    with a cache that was begun in batches of another size. Raises DataError: the folder holds something else or other
    targets, another process is at work in it, the disk cannot hold the rest.
    """
    option = "--label-cache" if by_training else "--out"
    with ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(_locked(folder, option))
        with clear_errors(folder, option):
            header, parts = _found(folder, header, option)
            todo = _bytes_to_write(header, parts)
            _check_space(folder, todo + by_training * header.images * (8 + header.row.itemsize), option)
            if not folder.is_dir():
                folder.mkdir(parents=True)
                stack.enter_context(_locked(folder, option))
            views = set(map(view_name, range(header.views)))
            leftovers = [path for path in folder.glob("view-*.bin") if path.name not in views]
            for path in [*folder.glob(".*.tmp"), *leftovers]:
                path.unlink()
            Journals(folder).rewrite({} if header.is_complete else parts)
            write_header(folder, header)
        yield todo


class LabelWriter:
    """One process's hand on a claimed cache. `todo` lists the parts that none had written when it was opened."""

    def __init__(self, folder: Path, rank: int = 0):
        """`folder` is one that the main process, rank 0, has claimed."""
        self._folder, self._rank = folder, rank
        self.header = read_header(folder)
        self._journals = Journals(folder)
        self._journals.refresh()
        self._complete = {view.view: view for view in self.header.complete}
        self.todo = [
            (view, part)
            for view in range(self.header.views)
            for part in range(parts_per_view(self.header))
            if view not in self._complete and (view, part) not in self._journals.parts
        ]

    def rows(self, part: int) -> tuple[int, int]:
        """First row of a part and the row after its last."""
        return _rows(self.header, part)

    def write(
        self,
        view: int,
        part: int,
        ids: np.ndarray,
        probabilities: np.ndarray,
        boxes: np.ndarray | None = None,
        flips: np.ndarray | None = None,
    ) -> None:
        """Puts a part on disk: ids integer [B, k], probabilities float [B, k], for the rows of the part in order.

        An explicit cache takes boxes integer [B, 4] and flips bool [B] too. Raises DataError: a target that is not
        finite, a full disk.
        """
        first, last = self.rows(part)
        rows = np.empty(last - first, self.header.row)
        rows["ids"], rows["probabilities"] = ids, probabilities
        if self.header.explicit:
            rows["box"], rows["flip"] = boxes, flips
        if bad := bad_rows(rows, self.header.classes):
            raise DataError(
                f"--teachers: the target of view {view}, images {first} to {last - 1}, is no distribution ({bad}); "
                "look for damaged weights, or use --amp off"
            )
        with clear_errors(self._folder):
            descriptor = os.open(self._folder / view_name(view), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                if os.fstat(descriptor).st_size != self.header.bytes_per_view:
                    os.ftruncate(descriptor, self.header.bytes_per_view)
                _write_all(descriptor, memoryview(rows.tobytes()), first * self.header.row.itemsize)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            self._journals.add(self._rank, view, part, zlib.crc32(rows))

    def complete_views(self) -> None:
        """Enters into the header every view whose parts all processes have written by now. The main process only."""
        with clear_errors(self._folder):
            self._journals.refresh()
            parts = range(parts_per_view(self.header))
            for view in {view for view, _ in self._journals.parts} - set(self._complete):
                if view < self.header.views and all((view, part) in self._journals.parts for part in parts):
                    self._complete[view] = self._summed_up(view)
                    complete = tuple(self._complete[number] for number in sorted(self._complete))
                    self.header = dataclasses.replace(self.header, complete=complete)
                    write_header(self._folder, self.header)

    def finish(self) -> None:
        """Completes the cache, once every process has written its parts, and removes the journals. The main process."""
        self.complete_views()
        if not self.header.is_complete:
            raise DataError(f"label cache {self._folder}: parts of a process are missing; run the same command again")
        with clear_errors(self._folder):
            for path in (*self._journals.paths(), *self._folder.glob("spool-*.bin")):
                path.unlink()

    def close(self) -> None:
        """Lets go of the folder; what was written stays."""
        self._journals.close()

    def _summed_up(self, view: int) -> CompleteView:
        mapped = np.memmap(self._folder / view_name(view), self.header.row, "r", shape=(self.header.images,))
        for part in range(parts_per_view(self.header)):
            if not _is_sound(mapped, self.header, part, self._journals.parts[view, part]):
                raise DataError(
                    f"{self._folder / view_name(view)}: part {part} is not as it was written (the disk, or another "
                    "program); run the same command again"
                )
        return CompleteView(view, hashlib.sha256(mapped).hexdigest(), *means(mapped, self.header.classes))


def parts_per_view(header: CacheHeader) -> int:
    """Parts that a view is written in; all but the last hold `rows_per_part` images."""
    return -(-header.images // header.made_with["rows_per_part"])


def _rows(header: CacheHeader, part: int) -> tuple[int, int]:
    rows = header.made_with["rows_per_part"]
    return part * rows, min((part + 1) * rows, header.images)


def _found(folder: Path, header: CacheHeader, option: str) -> tuple[CacheHeader, dict[tuple[int, int], int]]:
    """`header` with the views that are complete in `folder`, and the parts of other views whose bytes are right."""
    stored = _stored(folder, header, option)
    complete = tuple(view for view in stored.complete if _size(folder, view.view) == header.bytes_per_view)
    header = dataclasses.replace(stored, views=header.views, complete=complete)  # what it says of machines stays
    journals = Journals(folder)
    journals.refresh()
    return header, _sound_parts(folder, header, journals.parts)


def _bytes_to_write(header: CacheHeader, parts: dict[tuple[int, int], int]) -> int:
    done = sum(last - first for first, last in (_rows(header, part) for _, part in parts))
    return (header.images * (header.views - len(header.complete)) - done) * header.row.itemsize


def _check_space(folder: Path, todo: int, option: str) -> None:
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(present).free
    if todo > free:
        raise DataError(
            f"{option} {folder}: {todo / 1e9:.2f} GB are to be written, but the disk has {free / 1e9:.2f} GB free: "
            f"free some, or lower {_option('views', option)} or {_option('top_k', option)}"
        )


def _stored(folder: Path, header: CacheHeader, option: str) -> CacheHeader:
    """The header that lies in `folder`, checked to be of the same targets; `header` where the folder is new."""
    if not holds_label_cache(folder, option):
        return header
    stored = read_header(folder)
    if stored.explicit != header.explicit:
        whose = ("an imported one", "one of `labels build`")[:: 1 if stored.explicit else -1]
        raise DataError(f"{option} {folder}: holds another kind of label cache, {whose[0]}, not {whose[1]}")
    for what, old, new in differences(stored, header):
        if option != "--out" and what in ("batch_size", "rows_per_part"):
            continue
        raise DataError(
            f"{option} {folder}: holds a label cache with other targets: {_option(what, option)} ({what} {words(old)} "
            f"there, {words(new)} here); use the same options or another folder"
        )
    if stored.complete and stored.complete[-1].view >= header.views:
        raise DataError(
            f"{_option('views', option)} {header.views}: {folder} holds {len(stored.complete)} complete views; ask for "
            "as many or more"
        )
    return stored


def holds_label_cache(folder: Path, option: str) -> bool:
    """Whether there is a cache; False where one can be made. Raises DataError: something else lies there."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{option} {folder}: is a file; give a folder for the label cache")
    if not folder.exists() or (folder / HEADER).exists():
        return folder.exists()
    if any(not path.name.endswith(".tmp") for path in folder.iterdir()):
        raise DataError(f"{option} {folder}: holds something else; give a new folder, or one with a label cache")
    return False


def _option(what: str, command: str) -> str:
    """The option that sets a field of a header, of `labels build` or of `train`, which has its cache's by prefix."""
    if command != "--out" and what in ("views", "top_k"):
        return f"{command}-{what.replace('_', '-')}"
    return _OPTIONS.get(what, "--" + what.replace("_", "-"))


def _sound_parts(folder: Path, header: CacheHeader, parts: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Those of the journaled parts of incomplete views whose bytes are there."""
    complete = {view.view for view in header.complete}
    count = parts_per_view(header)
    sound = {}
    for view in sorted({view for view, _ in parts} - complete):
        if view >= header.views or _size(folder, view) != header.bytes_per_view:
            continue
        mapped = np.memmap(folder / view_name(view), header.row, "r", shape=(header.images,))
        for (number, part), crc in parts.items():
            if number == view and part < count and _is_sound(mapped, header, part, crc):
                sound[view, part] = crc
    return sound


def _is_sound(mapped: np.ndarray, header: CacheHeader, part: int, crc: int) -> bool:
    first, last = _rows(header, part)
    return zlib.crc32(np.array(mapped[first:last])) == crc


def _size(folder: Path, view: int) -> int:
    path = folder / view_name(view)
    return path.stat().st_size if path.is_file() else -1


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _locked(folder: Path, option: str) -> Iterator[None]:
    """Keeps a second build out of the folder as long as this process lives, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{option} {folder}: another build is writing there; wait, or give another folder"
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(descriptor)


@contextmanager
def clear_errors(folder: Path, option: str = "--out") -> Iterator[None]:
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{option} {error.filename or folder}: {error.strerror or error}; what is complete is kept: mend that and "
            "run the same command again"
        ) from None
