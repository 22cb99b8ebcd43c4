"""A file that grows by lines or records, on a disk that may be full for a while."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LIMIT = 1 << 26  # bytes kept in memory; a run's metrics are a few megabytes


class AppendLog:
    """Appends to a file at once. What the disk does not take is kept in memory and written, in order, when it does."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """`say` is given one line when writing fails, and one when it works again."""
        self.path, self._say = path, say
        self._file: int | None = None
        self._pending = bytearray()
        self._failing = False
        self._dropped = 0  # bytes beyond LIMIT
        self._lock = threading.Lock()  # the thread that writes checkpoints syncs this file before

    def write(self, data: bytes) -> None:
        """Appends `data`, in one piece unless the disk fills up within it; never raises OSError."""
        with self._lock:
            if self._pending:
                self._flush()
            if len(self._pending) + len(data) > LIMIT:
                self._dropped += len(data)
            else:
                self._pending += data
            self._flush()

    def sync(self) -> None:
        """Brings to the disk what was written, so far as the disk allows."""
        with self._lock:
            self._flush()
            if self._file is not None:
                with suppress(OSError):
                    os.fsync(self._file)

    def close(self) -> int:
        """Tries once more and closes. Returns how many bytes were lost."""
        self.sync()
        with self._lock:
            self._close_file()
            return len(self._pending) + self._dropped

    def _flush(self) -> None:
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            while self._pending:  # the bytes that a nearly full disk took are not written twice
                del self._pending[: os.write(self._file, self._pending)]
        except OSError as error:
            self._close_file()
            if not self._failing:
                self._say(
                    f"warning: {self.path}: cannot be written ({error.strerror}); needs {len(self._pending):,} bytes; "
                    "the run goes on, keeps them in memory and tries again"
                )
            self._failing = True
            return
        if self._failing:
            self._say(f"{self.path}: is written again" + (f"; {self._dropped:,} bytes are lost" * bool(self._dropped)))
        self._failing = False

    def _close_file(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                os.close(self._file)
            self._file = None
