"""Repeats a few batches held in memory: what a training run reaches when data costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from .batch import Batch, DataError, Loader


class ReplayLoader:
    """A Loader of `length` batches: the first `batches` of another one, over and over."""

    def __init__(self, loader: Loader, batches: int, length: int):
        """Takes `batches` from `loader` at once and keeps them on their device. Raises DataError if it has none."""
        if batches < 1 or length < 0:
            raise DataError(f"replay of {batches} batches, {length} times: needs at least 1 batch and 0 steps")
        iterator = iter(loader)
        self._batches = list(islice(iterator, batches))
        if hasattr(iterator, "close"):
            iterator.close()  # the loader stops working ahead
        self._loader, self._length = loader, length
        if not self._batches:
            raise DataError("replay: the loader yields no batch to repeat; give it at least one step")

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self._length):
            yield self._batches[step % len(self._batches)]

    def __len__(self) -> int:
        return self._length

    def close(self) -> None:
        """Forget the batches and close the loader that they came from."""
        self._batches = []
        self._length = 0
        self._loader.close()
