"""What every loader yields, and the protocol that every loader follows.

Shape legend: B images of this rank, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch


class DataError(ValueError):
    """Bad data or a bad loader option: one line that names the file or option and what would be right."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of one global batch, all on the loader's device."""

    images: torch.Tensor  # uint8 [B, H, W, 3], RGB
    labels: torch.Tensor  # int64 [B], -1 where the image has no label
    indices: torch.Tensor  # int64 [B], rows of the ImageIndex
    # From a label cache, where the loader was given one: ids int32 [B, k] and probabilities float32 [B, k].
    targets: tuple[torch.Tensor, torch.Tensor] | None = None


class Loader(Protocol):
    """Yields batches in the plan's order; `len` is their number. Close it to stop its threads and processes."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...

    def close(self) -> None: ...

    @property
    def replaced(self) -> dict[str, str]:
        """Relative path -> reason of the files that broke or vanished after the scan."""

    @property
    def replaced_count(self) -> int:
        """Views that others stood in for."""
