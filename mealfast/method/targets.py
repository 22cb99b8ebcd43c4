"""Where the student's targets come from: live teachers, a label cache, or nowhere (labels alone).

A third source, live teachers whose targets go to a label cache, is `mealfast.labels.write_through`'s.

Shape legend: B images of this process, H and W pixels, K teachers, C classes, k entries of a cached target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mealfast.loaders import Batch
from mealfast.method.inputs import Inputs


@dataclass(frozen=True)
class Target:
    """What the student is compared with, in one of two forms, or in none (labels alone).

    Where there are both, as in a run that writes a cache, the logits are the target and the discriminator sees what the
    cache will hold: log-probabilities, less their mean.
    """

    logits: Sequence[torch.Tensor] = ()  # of K teachers, [B, C] each
    top_k: tuple[torch.Tensor, ...] = ()  # ids int32 and probabilities float32 [B, k]; under CutMix the partners' too


class TargetSource(Protocol):
    """Called around and within a step; only `__call__` is captured in a CUDA graph."""

    def before(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Ids int32 [B, k] and probabilities float32 [B, k] of the batch's images as they are, to be mixed with them
        under CutMix; () where the targets are made of the mixed images."""

    def __call__(self, part: Inputs) -> Target:
        """The target of a part of the batch."""

    def after(self, batch: Batch, step: int) -> None:
        """Takes note of the step that was just taken with `batch`."""


class GivenTargets:
    """Targets that come with the batch, from a label cache; or none, for training on labels alone."""

    def before(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return batch.targets or ()

    def __call__(self, part: Inputs) -> Target:
        return Target(top_k=part.cached)

    def after(self, batch: Batch, step: int) -> None:
        pass


class LiveTargets:
    """Targets by teachers that run in every step, on the images that the student sees."""

    def __init__(self, teachers: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        """`teachers`: uint8 images [B, H, W, 3] -> K logits [B, C], without autograd."""
        self._teachers = teachers

    def before(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        return ()

    def __call__(self, part: Inputs) -> Target:
        return Target(logits=self._teachers(part.images))

    def after(self, batch: Batch, step: int) -> None:
        pass
