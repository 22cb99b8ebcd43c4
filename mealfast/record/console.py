"""A progress bar with images/s and time left on a terminal; plain lines in a log."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from datetime import timedelta

from tqdm import tqdm

from mealfast.machine import terminal

SILENCE = 30.0  # seconds after which a log gets a line out of turn


class Progress:
    """Shows optimiser steps, or what else `unit` names. `enabled` is False on all processes but the main one."""

    def __init__(
        self, total_steps: int, first_step: int, batch_size: int, *, enabled: bool, unit: str = "step"
    ) -> None:
        self.total_steps, self.step, self.batch_size = total_steps, first_step, batch_size
        self.enabled, self.unit = enabled, unit
        self.bar = None
        self._said_at, self._said_step = time.perf_counter(), first_step  # of the last line
        if enabled and terminal.is_terminal(sys.stderr):
            self.bar = tqdm(total=total_steps, initial=first_step, unit=unit, dynamic_ncols=True, smoothing=0.05)

    def advance(self) -> None:
        """One more step is done."""
        self.step += 1
        if self.bar is not None:
            self.bar.update()

    def line(self, title: str, values: dict[str, float], images_per_second: float) -> None:
        """Title, named values and images/s: in the bar, or as a line with the time left."""
        if not self.enabled:
            return
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_description_str(title, refresh=False)
            self.bar.set_postfix_str(f"{images_per_second:,.0f} images/s  {text}")
            return
        left = timedelta(seconds=round((self.total_steps - self.step) * self.batch_size / images_per_second))
        self._said_at, self._said_step = time.perf_counter(), self.step
        where = f"{self.unit} {self.step}/{self.total_steps}"
        rate = f"{images_per_second:,.{0 if images_per_second >= 10 else 1}f} images/s"
        self.say("  ".join(filter(None, (title, where, text, rate, f"{left} left"))))

    def line_if_silent(self, title: str) -> None:
        """A line without values in a log that has had none for SILENCE seconds; a bar moves by itself."""
        seconds = time.perf_counter() - self._said_at
        if self.enabled and self.bar is None and seconds >= SILENCE and self.step > self._said_step:
            self.line(title, {}, (self.step - self._said_step) * self.batch_size / seconds)

    def say(self, text: str) -> None:
        """A line that does not break the bar. Where stderr is closed or on a full disk, it is lost."""
        if not self.enabled:
            return
        if self.bar is None:
            terminal.say(text)
            return
        with suppress(OSError, ValueError):
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def size_text(size: int) -> str:
    """Bytes in the unit that suits them: "9.22 GB"."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}"
    return f"{size} bytes"
