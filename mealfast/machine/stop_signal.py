"""Signals that ask a program to stop: finish what is under way, keep it, end well.

SIGTERM, SIGINT, SIGHUP (a closed terminal) and SIGUSR1 (what Slurm's `--signal=USR1@120` sends) mean the same. A second
SIGINT ends at once. Under nohup SIGHUP is ignored, and stays so.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from mealfast.machine.processes import Runtime

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):  # noqa: N818  (what happened, not an error)
    """Work that gives nothing when it is cut short was cut short by a signal."""


class StopSignal:
    """Catches the signals while it is entered: `with StopSignal() as stop: ... if stop.asked: ...`.

    In a thread other than the main one, where Python lets nobody set handlers, it hears nothing.
    """

    def __init__(self) -> None:
        self.asked = False  # whether a signal has come
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

    def __exit__(self, *error: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


class Agreement:
    """Lets all processes know, step by step, what one of them wants. Every one calls it equally often."""

    def __init__(self, runtime: Runtime) -> None:
        self._pending: tuple[torch.Tensor, dist.Work | None] | None = None
        # Gloo, so that the agreement never waits for a GPU.
        self._group: Any = dist.new_group(backend="gloo", timeout=runtime.timeout) if runtime.world_size > 1 else None
        self.delay = 0 if self._group is None else 1  # calls after which a wish is known

    def __call__(self, wish: int) -> int:
        """The largest `wish` (0: none) of any process: with several that of the call before, so that nobody waits for
        the slowest one."""
        if self._group is None:
            return wish
        earlier, tensor = self._pending, torch.tensor([wish])
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._pending = tensor, work
        if earlier is None:
            return 0
        if earlier[1] is not None:
            earlier[1].wait()
        return int(earlier[0].item())
