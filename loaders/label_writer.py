"""Writing a label cache, by one process or many, so that a kill at any moment loses only the record being written.

Every process appends rows (label_rows.py). A view of which all rows are there is written as its file in one piece, and
entered into the header. A finished cache is the same bytes however often the work was interrupted.

Shape legend: N images of the index, B images that are added together, k entries kept of each target.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np

from .batch import DataError
from .files import replacing, words
from .label_cache import bad_rows, blocks, means
from .label_header import HEADER, CacheHeader, CompleteView, differences, read_header, view_name, write_header
from .label_rows import gathered, name_of, present, record, row_files

# Fields of a header that are not called as the option of `labels build` that sets them.
_OPTIONS = {
    "images": "--data", "images_digest": "--data", "scale": "--crop-scale", "ratio": "--crop-ratio",
    "classes": "--teachers", "class_names": "--class-map", "precision": "--amp", "compiled": "--compile",
}  # fmt: skip
_JOURNALS = "journal-*.txt"  # of views that mealfast once filled in place


@dataclasses.dataclass(frozen=True)
class Claim:
    """What was found in a folder that now is this process's to write."""

    bytes_left: int  # of the views' files
    note: str  # for the user, or empty


@contextmanager
def claim_label_cache(folder: Path, header: CacheHeader, option: str = "--out") -> Iterator[Claim]:
    """Makes `folder` ready for the targets of `header`, or ready to go on; the main process does it before all others.

    Keeps complete views and the rows of others. The folder is locked until the block ends. `option` is the one that
    named the folder. Raises DataError: the folder holds something else or other targets, another process writes there,
    the disk cannot hold the rest.
    """
    with ExitStack() as stack:
        if folder.is_dir():
            stack.enter_context(_locked(folder, option))
        with clear_errors(folder, option):
            header = _stored(folder, header, option)
            complete = {one.view for one in header.complete}
            incomplete = [view for view in range(header.views) if view not in complete]
            files = row_files(folder) if folder.is_dir() else {}
            rows = header.images * len(incomplete)
            rows -= sum(int(present(folder, header, view, repair=True).sum()) for view in incomplete if view in files)
            _check_space(folder, header, rows, option)
            if not folder.is_dir():
                folder.mkdir(parents=True)
                stack.enter_context(_locked(folder, option))
            journals = list(folder.glob(_JOURNALS))
            note = f"what an earlier mealfast had begun besides its {len(complete)} complete views is made anew"
            note = f"note: {option} {folder}: {note}" if journals and incomplete else ""
            named = set(map(view_name, complete))
            leftovers = [path for path in folder.glob("view-*.bin") if path.name not in named]
            leftovers += [path for view in files.keys() - set(incomplete) for path in files[view]]
            write_header(folder, header)
            for path in [*folder.glob(".*.tmp"), *journals, *leftovers]:
                path.unlink()
        yield Claim(rows * header.row.itemsize, note)


class LabelWriter:
    """What one process adds to a cache that the main process, rank 0, has claimed."""

    def __init__(self, folder: Path, rank: int = 0, option: str = "--out"):
        """`option` is the one that named the folder. Raises DataError where it holds no cache."""
        self._folder, self._rank, self._option = folder, rank, option
        self.header = read_header(folder)
        self._open: tuple[int, int] | None = None  # view, file descriptor

    @property
    def incomplete(self) -> list[int]:
        """The views that are not complete, ascending."""
        complete = {one.view for one in self.header.complete}
        return [view for view in range(self.header.views) if view not in complete]

    def missing(self, view: int) -> range | np.ndarray:
        """The images, ascending (integers [m]), whose rows no process has added yet. Raises DataError."""
        with clear_errors(self._folder, self._option):
            have = present(self._folder, self.header, view)
        return np.flatnonzero(~have) if have.any() else range(len(have))

    def add(
        self,
        view: int,
        images: np.ndarray,
        ids: np.ndarray,
        probabilities: np.ndarray,
        boxes: np.ndarray | None = None,
        flips: np.ndarray | None = None,
    ) -> None:
        """Appends the targets of `images` (integers [B]) in a view: ids integer [B, k], probabilities float [B, k].

        An explicit cache takes boxes integer [B, 4] and flips bool [B] too. Raises DataError: a target that is no
        distribution, a full disk.
        """
        rows = np.empty(len(images), self.header.row)
        rows["ids"], rows["probabilities"] = ids, probabilities
        if self.header.explicit:
            rows["box"], rows["flip"] = boxes, flips
        if bad := bad_rows(rows, self.header.classes):
            first = next(i for i in range(len(rows)) if bad_rows(rows[i : i + 1], self.header.classes))
            raise DataError(
                f"--teachers: the target of view {view}, image {int(images[first])}, is no distribution ({bad}); look "
                "for damaged weights, or use --amp off"
            )
        with clear_errors(self._folder, self._option):
            _append(self._descriptor(view), record(images, rows))

    def flush(self) -> None:
        """Has what was added on disk, whatever happens to the machine. Raises DataError."""
        if self._open is not None:
            with clear_errors(self._folder, self._option):
                os.fsync(self._open[1])

    def complete(self, view: int) -> None:
        """Makes the view's file of all rows that were added and enters it into the header.

        The main process only, once all have added theirs. Raises DataError: rows are missing, a full disk.
        """
        path, sha = self._folder / view_name(view), hashlib.sha256()

        def written() -> Iterator[np.ndarray]:
            with temporary.open("wb") as file:
                for rows in gathered(self._folder, self.header, view):
                    data = rows.view(np.uint8).data
                    file.write(data)
                    sha.update(data)
                    yield from blocks(rows)

        if left := len(self.missing(view)):
            raise DataError(
                f"label cache {self._folder}: {left} targets of view {view} are missing; run the same command again"
            )
        with clear_errors(self._folder, self._option):
            with replacing(path) as temporary:
                kept, entropy = means(written(), self.header.classes)
            made = CompleteView(view, sha.hexdigest(), kept, entropy)
            complete = tuple(sorted((*self.header.complete, made), key=lambda one: one.view))
            self.header = dataclasses.replace(self.header, complete=complete)
            write_header(self._folder, self.header)
            self.close()
            for path in row_files(self._folder).get(view, []):
                path.unlink()

    def close(self) -> None:
        """Closes the file; what was added stays."""
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def _descriptor(self, view: int) -> int:
        if self._open is None or self._open[0] != view:
            self.flush()
            self.close()
            path = self._folder / name_of(view, self._rank)
            self._open = view, os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        return self._open[1]


def holds_label_cache(folder: Path, option: str) -> bool:
    """Whether there is a cache; False where one can be made. Raises DataError: something else lies there."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{option} {folder}: is a file; give a folder for the label cache")
    if not folder.exists() or (folder / HEADER).exists():
        return folder.exists()
    if any(not path.name.endswith(".tmp") for path in folder.iterdir()):
        raise DataError(f"{option} {folder}: holds something else; give a new folder, or one with a label cache")
    return False


def _stored(folder: Path, header: CacheHeader, option: str) -> CacheHeader:
    """The header that lies in `folder`, checked to be of the same targets, with the views that are still there and as
    many as are wanted; `header` where the folder is new."""
    if not holds_label_cache(folder, option):
        return header
    stored = read_header(folder)
    if stored.explicit != header.explicit:
        whose = ("an imported one", "one of `labels build`")[:: 1 if stored.explicit else -1]
        raise DataError(f"{option} {folder}: holds another kind of label cache, {whose[0]}, not {whose[1]}")
    for what, old, new in differences(stored, header):
        raise DataError(
            f"{option} {folder}: holds a label cache with other targets: {_option(what, option)} ({what} {words(old)} "
            f"there, {words(new)} here); use the same options or another folder"
        )
    if stored.complete and stored.complete[-1].view >= header.views:
        raise DataError(
            f"{_option('views', option)} {header.views}: {folder} holds {len(stored.complete)} complete views; ask for "
            "as many or more"
        )
    complete = tuple(one for one in stored.complete if _size(folder, one.view) == header.bytes_per_view)
    return dataclasses.replace(stored, views=header.views, complete=complete)  # what it says of machines stays


def _option(what: str, command: str) -> str:
    """The option that sets a field of a header, of `labels build` or of `train`, which has its cache's by prefix."""
    if command != "--out" and what in ("views", "top_k"):
        return f"{command}-{what.replace('_', '-')}"
    return _OPTIONS.get(what, "--" + what.replace("_", "-"))


def _size(folder: Path, view: int) -> int:
    path = folder / view_name(view)
    return path.stat().st_size if path.is_file() else -1


def _check_space(folder: Path, header: CacheHeader, rows: int, option: str) -> None:
    """Refuses a disk that cannot hold the views that are missing, and one more in the records that it is made of."""
    todo = rows * header.row.itemsize
    records = header.images * (8 + header.row.itemsize) + (8 * rows if header.explicit else 0)  # of all views at once
    present = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(present).free
    if rows and todo + records > free:
        raise DataError(
            f"{option} {folder}: {(todo + records) / 1e9:.2f} GB are to be written, but the disk has {free / 1e9:.2f} "
            f"GB free: free some, or lower {_option('views', option)} or {_option('top_k', option)}"
        )


def _append(descriptor: int, data: bytes) -> None:
    """Writes all of `data` at the end of a file that no other process writes to, or leaves it as it was."""
    start, left = os.fstat(descriptor).st_size, memoryview(data)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, start)  # what is added later must not follow half a record
        raise


@contextmanager
def _locked(folder: Path, option: str) -> Iterator[None]:
    """Keeps other programs from writing to the folder until the block or the process ends, where there are locks."""
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
def clear_errors(folder: Path, option: str) -> Iterator[None]:
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{option} {error.filename or folder}: {error.strerror or error}; what is complete is kept: mend that and "
            "run the same command again"
        ) from None
