"""A process's batches, with what it could not read known to all processes before a step waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from mealfast.errors import RunError
from mealfast.loaders import Batch, DataError, Loader, LoaderStopped
from mealfast.machine.processes import Runtime


class Feed:
    """Hands batches out one by one, and has `ahead` more in hand.

    A process whose loader fails says so as many steps ahead: nobody then begins a step that it cannot take part in, and
    all save together what they have reached.
    """

    def __init__(self, loader: Loader, ahead: int) -> None:
        self.error: Exception | None = None  # what the loader has raised, `ahead` steps before its batch is due
        self._stopped = False  # a signal came while the loader was waited for
        self._batches: Iterator[Batch] = iter(loader)
        self._ahead = ahead
        self._in_hand: deque[Batch] = deque()

    def next(self) -> Batch:
        """The next batch. Raises what the loader raised, where there is none; LoaderStopped after a signal."""
        self.fill(self._ahead + 1)
        if not self._in_hand:
            if self._stopped:
                raise LoaderStopped
            assert self.error is not None
            raise self.error
        return self._in_hand.popleft()

    def fill(self, count: int) -> None:
        """Has `count` batches in hand, fewer where the loader ends or fails."""
        while len(self._in_hand) < count and self.error is None and not self._stopped:
            try:
                self._in_hand.append(next(self._batches))
            except StopIteration:
                return
            except LoaderStopped:  # with batches in hand the loop goes on until all processes have agreed to stop
                self._stopped = True
            except Exception as error:
                self.error = error

    def raise_for_all(self, runtime: Runtime) -> None:
        """Raises, on every process, what one of them has met; all processes together."""
        said = runtime.gather(None if self.error is None else (isinstance(self.error, DataError), str(self.error)))
        if self.error is not None:
            raise self.error
        rank, (is_data, text) = next((rank, one) for rank, one in enumerate(said) if one is not None)
        raise DataError(text) if is_data else RunError(f"process {rank} has failed: {text}")
