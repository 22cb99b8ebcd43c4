"""Opening image files that others may have changed: none that could wait for ever, and a look at what is waited for."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO


def open_regular(path: bytes) -> BinaryIO:
    """The file at `path`, to be read. Raises OSError where it cannot be opened, or is a pipe or a device: these block.

    On a network disk this is one question, as with `open`; a `stat` before it would be another.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except BlockingIOError:  # a regular file which another program has leased: as soon as that program lets it go
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


class ReadingLog:
    """Which image each of a loader's threads is reading. Safe to use from several threads."""

    def __init__(self) -> None:
        self.latest = time.monotonic()  # seconds, when the last image was done
        self._images: dict[int, int] = {}  # thread -> image

    @contextmanager
    def reading(self, i: int) -> Iterator[None]:
        """The calling thread reads image `i` within the block."""
        thread = threading.get_ident()
        self._images[thread] = i
        try:
            yield
        finally:
            del self._images[thread]
            self.latest = time.monotonic()

    def images(self) -> list[int]:
        """The images that are being read now."""
        return list(self._images.copy().values())


class StallCheck(threading.Thread):
    """Finds the files that a reader waits for, in a thread of its own: asking of a stalled disk is waiting, too.

    A pipe at which DALI waits for a writer gets one that leaves at once: DALI finds it empty, an error like any other.
    """

    def __init__(self, paths: Sequence[bytes]) -> None:
        super().__init__(name="mealfast-stall-check", daemon=True)
        self._paths = paths
        self._current: tuple[bytes, float] | None = None  # what it is asking about, and since when, in seconds
        self._found: list[bytes] = []
        self.start()

    def run(self) -> None:
        for path in self._paths:
            self._current = (path, time.monotonic())
            if _blocks_readers(path):
                self._found.append(path)
        self._current = None

    def suspects(self) -> list[bytes]:
        """The files found so far that do not answer (within half a second), or are no regular files."""
        current = self._current
        waits = current is not None and time.monotonic() - current[1] > 0.5
        return [*self._found, current[0]] if current is not None and waits else self._found.copy()


def _blocks_readers(path: bytes) -> bool:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISFIFO(mode):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        if not stat.S_ISREG(mode):
            return True
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            os.read(descriptor, 1)
        finally:
            os.close(descriptor)
    except BlockingIOError:  # leased
        return True
    except OSError:  # whoever reads it gets the same error, and does not wait; or no one reads the pipe
        return False
    return False
