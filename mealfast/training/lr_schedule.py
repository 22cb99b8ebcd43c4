"""The paper's learning rate: constant, times a factor at given epochs. No warm-up, no cosine."""

from __future__ import annotations

from collections.abc import Sequence


def lr_factor(epoch: int, decay_epochs: Sequence[int], decay: float) -> float:
    """What the base learning rate is multiplied by during `epoch` (from 0): 0.1 from epoch 100 on for (100,), 0.1."""
    return decay ** sum(epoch >= milestone for milestone in decay_epochs)
