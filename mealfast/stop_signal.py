"""SIGTERM and SIGINT: finish the step, save, end well. A second SIGINT ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopSignal:
    """True once the process was asked to stop. Only a main thread may install handlers; elsewhere it stays False."""

    def __init__(self) -> None:
        self._asked = False
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def __bool__(self) -> bool:
        return self._asked

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
