"""SIGTERM and SIGINT: finish the step, save, end well. A second SIGINT ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

import torch
import torch.distributed as dist

from mealfast.machine.processes import Runtime


class StopSignal:
    """Catches the signals until `restore`, and lets all processes agree on the step to stop after."""

    def __init__(self, runtime: Runtime) -> None:
        self._asked = False
        self._pending: tuple[torch.Tensor, dist.Work] | None = None
        # Gloo, so that the agreement never waits for a GPU.
        self._group = dist.new_group(backend="gloo", timeout=runtime.timeout) if runtime.world_size > 1 else None
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True

    def agreed(self) -> bool:
        """Whether to stop after this step: called once a step, and the same on every process.

        With several processes the answer is what they knew a step ago, so that nobody waits for the slowest one.
        """
        if self._group is None:
            return self._asked
        flag = torch.tensor([int(self._asked)])
        earlier, self._pending = self._pending, (flag, dist.all_reduce(flag, group=self._group, async_op=True))
        return self._answer(earlier)

    def _answer(self, asked: tuple[torch.Tensor, dist.Work] | None) -> bool:
        if asked is None:
            return False
        flag, work = asked
        work.wait()
        return flag.item() > 0

    def restore(self) -> None:
        """Puts the earlier handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
