"""What one process learns from in a step, and how it is made of a batch: as it is, or mixed by CutMix.

Shape legend: B images of this process, H and W pixels, k entries of a cached target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mealfast.loaders import Batch
from mealfast.method import cutmix


@dataclass(frozen=True)
class Inputs:
    """Images, their labels and, where targets come with the batch, those."""

    images: torch.Tensor  # uint8 [B, H, W, 3]
    labels: torch.Tensor  # int64 [B]
    partner_labels: torch.Tensor | None = None  # int64 [B], under CutMix
    cached: tuple[torch.Tensor, ...] = ()  # ids and probabilities [B, k], under CutMix the partners' too
    kept: float | torch.Tensor = 1.0  # share of the area that is each image's own; float32 scalar in a CUDA graph

    def parts(self, count: int) -> Iterator[tuple[Inputs, bool]]:
        """`count` equal parts of the batch, in order, each with whether it is the last."""
        if count == 1:
            yield self, True
            return
        columns = [self.images, self.labels, self.partner_labels, *self.cached]
        cut = [[None] * count if column is None else column.chunk(count) for column in columns]
        for number, (images, labels, partner_labels, *cached) in enumerate(zip(*cut, strict=True)):
            yield Inputs(images, labels, partner_labels, tuple(cached), self.kept), number == count - 1

    def clone(self) -> Inputs:
        """The same in memory of its own, all of it on the device."""
        return Inputs(
            self.images.clone(),
            self.labels.clone(),
            None if self.partner_labels is None else self.partner_labels.clone(),
            tuple(rows.clone() for rows in self.cached),
            torch.tensor(self.kept, dtype=torch.float32, device=self.images.device),
        )

    def copy_(self, other: Inputs) -> None:
        """Takes over what `other` holds, in place; `self` is a clone."""
        self.images.copy_(other.images)
        self.labels.copy_(other.labels)
        if self.partner_labels is not None and other.partner_labels is not None:
            self.partner_labels.copy_(other.partner_labels)
        for mine, theirs in zip(self.cached, other.cached, strict=True):
            mine.copy_(theirs)
        assert isinstance(self.kept, torch.Tensor)
        self.kept.fill_(other.kept)


class MakeInputs(Protocol):
    """Makes a step's inputs: a pure function of its arguments."""

    def __call__(self, batch: Batch, cached: Sequence[torch.Tensor], step: int) -> Inputs:
        """`cached`: ids and probabilities [B, k] of the batch's images as they are, or nothing."""


def unmixed(batch: Batch, cached: Sequence[torch.Tensor], step: int) -> Inputs:
    """The batch as it is, in every step."""
    return Inputs(batch.images, batch.labels, cached=tuple(cached))


class CutMix:
    """Images with a box of their partner's, beside the partner's labels and cached targets."""

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank = seed, rank

    def __call__(self, batch: Batch, cached: Sequence[torch.Tensor], step: int) -> Inputs:
        """The box is that of (seed, step, rank)."""
        _, height, width, _ = batch.images.shape
        box = cutmix.draw_box(self._seed, step, self._rank, height, width)
        return Inputs(
            cutmix.mix(batch.images, box),
            batch.labels,
            cutmix.partner(batch.labels),
            (*cached, *map(cutmix.partner, cached)),
            box.kept,
        )
