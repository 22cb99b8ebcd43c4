"""How every command ends: a status, and for what the user can mend one line on stderr instead of a traceback."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from mealfast.errors import RunError, UsageError

_OTHERS_WAIT = 5.0  # seconds that other processes leave the main one to say what all of them have met


def run_command(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a command; 0 where it succeeded, 2 for bad input and 1 for what else ended it (one line on stderr), 130
    after Ctrl-C."""
    # How long idle OpenMP threads spin: long enough for the next small operation, too short to take the cores from
    # decoding threads and neighbours (the default costs a factor of up to 8 on a busy CPU). Read at torch's import.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return _run(command, argv)
    status = _run_among_others(command, argv)
    if status != 0:  # without the orderly end, which can wait for the other processes
        os._exit(status)
    return status


def _run(command: Callable[[list[str]], int], argv: list[str]) -> int:
    try:
        return command(argv)
    except KeyboardInterrupt:
        _say("mealfast: interrupted")
        return 130
    except (ValueError, RunError) as error:
        if not _is_for_the_user(error):
            raise
        rank = int(os.environ.get("RANK", 0))
        if rank > 0:
            time.sleep(_OTHERS_WAIT)
        place = f" (process {rank})" if rank > 0 else ""
        _say(f"mealfast: {error}{place}")
        return 1 if isinstance(error, RunError) else 2


def _run_among_others(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """The same for one of several processes: the one that failed says so before the others, who only notice."""
    rank = os.environ.get("RANK", "?")
    try:
        return _run(command, argv)
    except Exception as error:
        if (trouble := lost_process(error)) is not None:
            time.sleep(_OTHERS_WAIT)
            _say(f"mealfast: process {rank}: {trouble}")
        else:
            said = "".join(traceback.format_exception(error)).rstrip()
            _say(f"{said}\nmealfast: process {rank} failed with the error above")
        return 1


def lost_process(error: Exception) -> str | None:
    """One line where an error says that another process is gone or hangs, else None."""
    text = " ".join(str(error).split())
    if "Timed out waiting" in text or "Watchdog caught collective operation timeout" in text:
        return f"has waited in vain for another process, which hangs or is slow (--collective-timeout): {text[:300]}"
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL")
    if isinstance(error, RuntimeError) and any(words in text for words in gone):
        return f"has lost another process, whose error is the one that matters: {text[:300]}"
    return None


def _say(text: str) -> None:
    with suppress(OSError):  # stderr may be a file on a full disk; the status still tells
        print(text, file=sys.stderr, flush=True)


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, (UsageError, RunError)):
        return True
    loaders = sys.modules.get("mealfast.loaders")  # not imported just to ask: it brings torch
    return loaders is not None and isinstance(error, loaders.DataError)
