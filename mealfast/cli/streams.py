"""Standard output and error that cannot stop a command: closed, full or read by nobody, they cost the text alone."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress
from typing import Any

from mealfast.machine.terminal import open_closed_streams


class _Sink(io.RawIOBase):
    """A file descriptor whose first failing write is remembered, and raised by nobody."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        """Bytes of any buffer; those of a failed write count as written."""
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


_sinks: dict[str, _Sink] = {}  # by the name in `sys`


def secure_streams() -> None:
    """Makes stdout and stderr streams that raise no OSError, once; what others have put in their place stays."""
    open_closed_streams()
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if name in _sinks or getattr(sys, f"__{name}__") not in (stream, None):
            continue
        with suppress(OSError, ValueError):
            stream.flush()
        sink = _sinks[name] = _Sink(descriptor)
        secured = io.TextIOWrapper(
            io.BufferedWriter(sink),
            encoding=stream.encoding,
            errors="backslashreplace",  # of a file name, say, that the terminal's encoding has no letters for
            line_buffering=descriptor == 2 or sink.isatty(),
        )
        setattr(sys, name, secured)


def flush_streams() -> str | None:
    """Writes what is buffered. What stdout could not take, in words; None where all arrived or nobody reads it."""
    for name in ("stdout", "stderr"):
        with suppress(OSError, ValueError):
            getattr(sys, name).flush()
    sink = _sinks.get("stdout")
    if sink is None or sink.error is None or sink.error.errno in (errno.EPIPE, errno.EIO):  # EIO: a terminal that went
        return None
    return f"standard output: cannot be written ({sink.error.strerror})"
