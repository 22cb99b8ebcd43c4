"""Where a run stands: all that changes besides tensors, and all that a checkpoint holds beside them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

Line = dict[str, Any]  # an evaluation: {"epoch", "step", "top1", "top5", "images", "kl"}


@dataclass
class Scores:
    """Of the evaluations so far; the loop sets them after each."""

    start: Line | None = None  # before the first step
    latest: Line | None = None
    best: Line | None = None  # of those that belong to the recipe
    teachers: list[dict[str, Any]] = field(default_factory=list)  # {"model", "top1", "top5", "images"}
    ensemble: dict[str, Any] | None = None

    @classmethod
    def of(cls, content: dict[str, Any]) -> Scores:
        """What a checkpoint holds; an older one lacks fields."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__ if name in content})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def evaluated(self) -> int | None:
        """After how many steps the latest evaluation was."""
        return self.latest["step"] if self.latest else None

    @property
    def best_at(self) -> int | None:
        """After how many steps the best one was."""
        return self.best["step"] if self.best else None


@dataclass
class Where:
    """Three fields, which the loop changes."""

    step: int = 0  # optimiser steps taken
    bad_in_a_row: int = 0  # of them skipped just now, one after the other
    scores: Scores = field(default_factory=Scores)
