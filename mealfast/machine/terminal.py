"""Standard output and error: whether a person sits there, and that a closed one costs only its messages."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; one that is closed, or None as Python has it where it started closed, is none."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def say(text: str) -> None:
    """A line on standard error, at once. Lost where that is closed, or a file on a full disk: nothing is raised."""
    if sys.stderr is not None:  # print would take None for standard output
        with suppress(OSError, ValueError):
            print(text, file=sys.stderr, flush=True)


def open_closed_streams() -> None:
    """Puts the null device in place of standard streams that are closed; to be called first of all.

    Otherwise the next file that is opened gets the number of a closed one, and what a library written in C says there
    (libjpeg, the CUDA driver) goes into a checkpoint.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
            os.set_inheritable(descriptor, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", encoding="utf-8", closefd=False))
