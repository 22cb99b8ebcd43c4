"""Files that broke or vanished after the scan: named once, counted, and too many of them end the run."""

from __future__ import annotations

import logging
import threading

from .batch import DataError
from .index import ImageIndex

log = logging.getLogger("mealfast.loaders")


class BrokenFiles:
    """The broken files of one loader. Safe to use from several threads."""

    def __init__(self, index: ImageIndex) -> None:
        self._index = index
        self._limit = max(1, len(index) // 1000)  # files; 0.1% of an epoch
        self._lock = threading.Lock()
        self._reasons: dict[int, str] = {}
        self.views = 0  # replaced so far, counted as their batches are handed over

    def __contains__(self, i: int) -> bool:
        return i in self._reasons

    def add(self, i: int, reason: str) -> None:
        """Note that image `i` cannot be used, `reason` one printable line. Raises DataError beyond 0.1% of all."""
        with self._lock:
            if i in self._reasons:
                return
            self._reasons[i] = reason
            count = len(self._reasons)
        if count > self._limit:
            raise DataError(
                f"{self._index.root}: {count} of {len(self._index)} images broke after they were indexed, e.g. "
                f"{self._index.display_path(i)} ({reason}); more than 0.1% is not trained on: mend the data"
            )
        log.warning("%s: %s; other views replace this image", self._index.display_path(i), reason)

    @property
    def reasons(self) -> dict[str, str]:
        """Relative path -> reason, in the order of discovery."""
        with self._lock:
            return {self._index.display_path(i): reason for i, reason in self._reasons.items()}
