"""How every command ends: a status, and for what the user can mend one line on stderr instead of a traceback."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from mealfast.errors import UsageError

_OTHERS_WAIT = 5.0  # seconds that other processes leave the main one to say what all of them have met


def run_command(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a command; 0 where it succeeded, 2 for bad input (one line on stderr), 130 after Ctrl-C."""
    # How long idle OpenMP threads spin: long enough for the next small operation, too short to take the cores from
    # decoding threads and neighbours (the default costs a factor of up to 8 on a busy CPU). Read at torch's import.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    return _run(command, argv)


def _run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return command(argv)
    except KeyboardInterrupt:
        print("mealfast: interrupted", file=sys.stderr)
        return 130
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            time.sleep(_OTHERS_WAIT)
        place = f" (process {rank})" if rank > 0 else ""
        print(f"mealfast: {error}{place}", file=sys.stderr, flush=True)
        return 2


def _is_for_the_user(error: ValueError) -> bool:
    if isinstance(error, UsageError):
        return True
    loaders = sys.modules.get("mealfast.loaders")  # not imported just to ask: it brings torch
    return loaders is not None and isinstance(error, loaders.DataError)
