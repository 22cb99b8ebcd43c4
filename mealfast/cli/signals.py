"""SIGINT, SIGTERM, SIGHUP and SIGUSR1 end any command: in order, and within seconds where order takes longer.

A training run puts handlers of its own in their place while it can save (mealfast.machine.stop_signal).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mealfast.machine.stop_signal import SIGNALS

PATIENCE = 4.0  # seconds that closing loaders, files and process groups may take


class Interrupted(KeyboardInterrupt):
    """A signal that ends a command; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible(leave: Callable[[int], None]) -> Iterator[None]:
    """Within the block the signals raise `Interrupted` in the main thread; a second one, or `PATIENCE` seconds after
    the first, calls `leave(number)`, which ends the process. A signal that is ignored (SIGHUP under nohup) stays so."""
    if threading.current_thread() is not threading.main_thread():  # Python lets no other thread set handlers
        yield
        return
    first: list[threading.Timer] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if first:
            leave(number)
        timer = threading.Timer(PATIENCE, leave, (number,))
        timer.daemon = True
        first.append(timer)
        timer.start()
        raise Interrupted(number)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, earlier in previous.items():
            if earlier is not signal.SIG_IGN:
                signal.signal(number, handle)
        yield
    finally:
        for timer in first:
            timer.cancel()
        for number, earlier in previous.items():
            if earlier is not None:  # None: a handler that C code has set
                signal.signal(number, earlier)


@contextmanager
def noticed() -> Iterator[Callable[[], int | None]]:
    """Yields a function that says which stopping signal came last within the block, whoever handled it; None: none.

    A run that is asked to stop after its last step has nothing left to stop, and ends well: this tells its caller.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    reading, writing = os.pipe()
    for descriptor in (reading, writing):
        os.set_blocking(descriptor, False)
    earlier = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    came: list[int] = []

    def last() -> int | None:
        with suppress(BlockingIOError):
            came.extend(number for number in os.read(reading, 1 << 16) if number in SIGNALS)
        return came[-1] if came else None

    try:
        yield last
    finally:
        signal.set_wakeup_fd(earlier)
        os.close(reading)
        os.close(writing)
