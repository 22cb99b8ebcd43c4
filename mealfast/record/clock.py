"""Where the time of a run's steps went."""

from __future__ import annotations

import statistics


class Clock:
    """Seconds of steps and of waiting for the loader, in windows between logs; evaluating and saving do not count."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._waiting = 0, 0.0, 0.0
        self._windows: list[tuple[float, float]] = []

    def add(self, seconds: float, waiting: float) -> None:
        """One step that took `seconds` in all, `waiting` of them for its batch."""
        self._steps += 1
        self._seconds += seconds
        self._waiting += waiting

    def close_window(self, batch_size: int) -> tuple[float, float]:
        """Images/s over all processes, and the fraction of the time spent waiting for data, since the last call."""
        seconds = max(self._seconds, 1e-9)
        self._windows.append((self._steps * batch_size / seconds, self._waiting / seconds))
        self._steps, self._seconds, self._waiting = 0, 0.0, 0.0
        return self._windows[-1]

    def medians(self) -> tuple[float | None, float | None]:
        """Median images/s and data-wait fraction; the first window, which warms up, counts only if it is alone."""
        windows = self._windows[1:] or self._windows
        if not windows:
            return None, None
        rates, waits = zip(*windows, strict=True)
        return statistics.median(rates), statistics.median(waits)
