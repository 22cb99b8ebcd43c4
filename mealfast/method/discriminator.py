"""The paper's discriminator on logits (MEAL V2, Eq. 4 and 5): three fully connected layers, one sigmoid, BCE.

Shape legend: B images of this process, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

DEAD_LOSS = math.log(2)  # the loss of a discriminator whose output is 0 whatever it sees
DEAD_WITHIN = 1e-3


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient


class Discriminator(nn.Module):
    """Tells the student's logits from the teachers' mean logits; returns its loss, a float32 scalar.

    cooperative: the released code. Nothing is detached and no sign flipped, so the student is pushed to stay
    distinguishable: a regulariser. adversarial: as Eq. 5 reads; the gradient is reversed on its way to the student.
    The released widths for C = 1000 are 1000-125-15-2 with a ReLU on the output too, which can die: see `is_dead`.
    """

    def __init__(self, num_classes: int, mode: str) -> None:
        super().__init__()
        if mode not in ("cooperative", "adversarial"):
            raise ValueError(f"mode {mode!r}: must be cooperative or adversarial")
        self.mode = mode
        # 1000 / 8 = 125 and 1000 / 64 = 15 as released; a few classes still get a hidden layer worth the name.
        wide, narrow = max(num_classes // 8, 16), max(num_classes // 64, 8)
        self.layers = nn.Sequential(
            nn.Linear(num_classes, wide), nn.ReLU(), nn.Linear(wide, narrow), nn.ReLU(), nn.Linear(narrow, 2), nn.ReLU()
        )

    def forward(self, student_logits: torch.Tensor, teacher_mean_logits: torch.Tensor) -> torch.Tensor:
        """Two float tensors [B, C] -> scalar. Gradient flows to the student's logits and to this module."""
        student_logits = student_logits.float()
        if self.mode == "adversarial":
            student_logits = _ReverseGradient.apply(student_logits)
        logits = self.layers(torch.cat((student_logits, teacher_mean_logits.float())))  # [2B, 2]
        student_side = torch.arange(len(logits), device=logits.device) < len(student_logits)
        labels = torch.stack((student_side, ~student_side), dim=1).to(logits.dtype)  # student [1, 0], teacher [0, 1]
        return F.binary_cross_entropy_with_logits(logits, labels)


def mean_logits(teacher_logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """K tensors [B, C] -> their mean, float32 [B, C]: what the released code shows its discriminator."""
    total = teacher_logits[0].float()
    for logits in teacher_logits[1:]:
        total = total + logits.float()
    return total / len(teacher_logits)


def is_dead(loss: float) -> bool:
    """Whether a (mean) discriminator loss sits at ln 2, where its output ReLU passes no gradient any more."""
    return abs(loss - DEAD_LOSS) <= DEAD_WITHIN
