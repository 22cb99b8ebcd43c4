"""Steps whose loss or gradient was not finite: how many in a row, known without waiting for the device."""

from __future__ import annotations

import torch


class Guard:
    """Notes on the device, by one tiny copy a step, how many steps have been skipped in all; read when the run logs."""

    in_a_row: int  # steps skipped just now, one after the other; set by `read`
    too_many: bool  # whether they have ever reached the limit; set by `read`

    def __init__(self, limit: int, capacity: int, skipped: torch.Tensor, in_a_row: int = 0) -> None:
        """`limit` in a row are too many. `capacity`: the most steps between two reads. `skipped`: int64 scalar on the
        device, the steps skipped so far, `in_a_row` of them just now."""
        self.limit, self.in_a_row, self.too_many = limit, in_a_row, False
        self._totals = torch.zeros(capacity, dtype=torch.int64, device=skipped.device)
        self._noted, self._total = 0, int(skipped)

    def note(self, skipped: torch.Tensor) -> None:
        """After each step: `skipped` again. Waits for nothing."""
        self._totals[self._noted].copy_(skipped)
        self._noted += 1

    def read(self) -> list[bool]:
        """Whether each step since the last read was skipped. Waits for the device."""
        bad = []
        for total in self._totals[: self._noted].tolist():
            bad.append(total > self._total)
            self._total = total
            self.in_a_row = self.in_a_row + 1 if bad[-1] else 0
            self.too_many |= self.in_a_row >= self.limit
        self._noted = 0
        return bad
