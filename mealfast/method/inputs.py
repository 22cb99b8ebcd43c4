"""What one process learns from in a step.

Shape legend: B images of this process, H and W pixels, k entries of a cached target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Inputs:
    """What one process learns from in a step: see `Objective.forward`."""

    images: torch.Tensor  # uint8 [B, H, W, 3]
    labels: torch.Tensor  # int64 [B]
    partner_labels: torch.Tensor | None = None  # int64 [B], under CutMix
    cached: tuple[torch.Tensor, ...] = ()  # ids and probabilities [B, k], under CutMix the partners' too
    kept: float | torch.Tensor = 1.0  # share of the area that is each image's own; float32 scalar in a CUDA graph

    def part(self, number: int, parts: int) -> Inputs:
        """The `number`-th of `parts` equal parts of the batch."""
        if parts == 1:
            return self

        def cut(rows: torch.Tensor | None) -> torch.Tensor | None:
            return None if rows is None else rows.chunk(parts)[number]

        cached = tuple(cut(rows) for rows in self.cached)
        return Inputs(cut(self.images), cut(self.labels), cut(self.partner_labels), cached, self.kept)

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
        if self.partner_labels is not None:
            self.partner_labels.copy_(other.partner_labels)
        for mine, theirs in zip(self.cached, other.cached, strict=True):
            mine.copy_(theirs)
        self.kept.fill_(other.kept)
