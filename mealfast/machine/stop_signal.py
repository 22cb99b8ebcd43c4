"""Signals that ask a program to stop: finish what is under way, keep it, end well.

SIGTERM, SIGINT, SIGHUP (a closed terminal) and SIGUSR1 (what Slurm's `--signal=USR1@120` sends) mean the same. A second
SIGINT ends at once. Under nohup SIGHUP is ignored, and stays so.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):  # noqa: N818  (what happened, not an error)
    """Work that gives nothing when it is cut short was cut short by a signal."""


class CutShort(KeyboardInterrupt):
    """A signal came within `StopSignal.at_once`. A KeyboardInterrupt, so that no compiler on its way keeps it."""


class StopSignal:
    """Catches the signals while it is entered: `with StopSignal() as stop: ... if stop.asked: ...`.

    In a thread other than the main one, where Python lets nobody set handlers, it hears nothing.
    """

    def __init__(self) -> None:
        self.asked = False  # whether a signal has come
        self.number: int | None = None  # of the first that came
        self._at_once = False  # whether what is under way may be cut short
        self._previous: dict[int, Any] = {}  # signal -> the handler in whose place ours stands

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                ignored = before is signal.SIG_IGN and number not in (signal.SIGTERM, signal.SIGINT)
                if before is not None and not ignored:  # None: C code's, which could not be put back
                    self._previous[number] = before
                    signal.signal(number, self._handle)
        return self

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within the block, which may take minutes (models compile) and has nothing to keep, a signal raises CutShort;
        one that came before, too."""
        if self.asked:
            raise CutShort
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False

    def __exit__(self, *error: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked, self.number = True, self.number or number
        if self._at_once:
            self._at_once = False
            raise CutShort
