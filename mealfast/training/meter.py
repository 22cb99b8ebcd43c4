"""What a run adds up between two lines of its log, on the device: nothing here waits for it."""

from __future__ import annotations

import torch

from mealfast.machine.processes import Runtime
from mealfast.method.objective import TERMS


class Meter:
    """Sums of the objective's terms over the steps since the last log, and how many steps were skipped in all."""

    def __init__(self, device: torch.device) -> None:
        # float64 [terms + 1]: the sums, then how many steps are in them; skipped steps are not.
        self.sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._held: torch.Tensor | None = None  # float64 [terms]: of the step that is under way

    def hold(self, terms: torch.Tensor) -> None:
        """Float [terms]: a part's share in the step's means."""
        self._held = terms.double() if self._held is None else self._held + terms

    def add(self, skipped: torch.Tensor) -> None:
        """Adds what the step's parts were; nothing of a step that was skipped, a bool scalar on the device."""
        held, self._held = self._held, None
        assert held is not None
        self.skipped += skipped
        self.sums += torch.cat((held, held.new_ones(1))).masked_fill(skipped, 0.0)

    def drop(self) -> None:
        """Forgets the step that is under way."""
        self._held = None

    def means(self, runtime: Runtime) -> dict[str, float | None]:
        """Each term's mean over all processes since the last `clear`; None where every step was skipped. Waits for the
        device; every process must call it."""
        *sums, steps = runtime.sum(self.sums.clone()).tolist()
        return {name: value / steps if steps else None for name, value in zip(TERMS, sums, strict=True)}

    def clear(self) -> None:
        """Starts the next window."""
        self.sums.zero_()
