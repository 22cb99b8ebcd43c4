"""What one process wants, made known to all without a wait for the slowest."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from mealfast.machine.processes import Runtime


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
