"""The exceptions that users see, one line each."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong option, file or combination: one line that names it and says what would be right (exit status 2)."""


class RunError(RuntimeError):
    """What ended a run that was asked for rightly: one line that says what happened and what is left (status 1)."""


def alternatives(wrong: str, known: Iterable[str]) -> str:
    """What a name may have meant that is not among the known ones: "did you mean A? One of A, B, C", or the latter."""
    known = list(known)
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"did you mean {close[0]}? One of {', '.join(known)}" if close else f"one of {', '.join(known)}"
