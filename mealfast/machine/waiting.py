"""Says what is waited for where it takes long, and nothing where it does not."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mealfast.machine import terminal

PATIENCE = 2.0  # seconds


@contextmanager
def waiting(what: str, say: Callable[[str], None] = terminal.say, *, enabled: bool = True) -> Iterator[None]:
    """Has a line "WHAT ..." said, by the job's first process alone, if the block takes more than PATIENCE seconds.

    `say` is called from another thread.
    """
    if not enabled or int(os.environ.get("RANK") or 0) > 0:
        yield
        return
    timer = threading.Timer(PATIENCE, say, (f"{what} ...",))
    timer.daemon = True
    timer.name = "mealfast-waiting"
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
