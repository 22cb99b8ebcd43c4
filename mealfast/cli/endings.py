"""How every command ends: a status, and for what the user can mend one line on stderr instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from mealfast.cli.signals import Interrupted, interruptible
from mealfast.cli.streams import flush_streams, secure_streams
from mealfast.errors import RunError, UsageError
from mealfast.machine.terminal import say

_OTHERS_WAIT = 5.0  # seconds that other processes leave the main one to say what all of them have met
_JOIN = 2.0  # seconds that are left to threads which should have ended

Command = Callable[[list[str]], int]


def main(command: Command) -> NoReturn:
    """Runs a command as this process's job, with the options that it was started with, and leaves."""
    secure_streams()
    try:
        status = run_command(command, sys.argv[1:])
    except Exception:
        traceback.print_exc()
        status = 1
    lost = flush_streams()
    if lost and status == 0:
        say(f"mealfast: {lost}")
        status = 1
    # Without the interpreter's own end, which takes seconds after a signal, and which can wait for the other processes
    # or for a thread that a dead disk holds.
    if status > 128 or (status != 0 and _processes() > 1) or _hangs():
        os._exit(status)
    sys.exit(status)


def run_command(command: Command, argv: list[str]) -> int:
    """Runs a command; 0 where it succeeded, 2 for bad input and 1 for what else ended it (one line on stderr), 128 + n
    after signal n (130 after Ctrl-C)."""
    # How long idle OpenMP threads spin: long enough for the next small operation, too short to take the cores from
    # decoding threads and neighbours (the default costs a factor of up to 8 on a busy CPU). Read at torch's import.
    os.environ.setdefault("GOMP_SPINCOUNT", "50000")
    with interruptible(_leave):
        return _run(command, argv) if _processes() == 1 else _run_among_others(command, argv)


def _run(command: Command, argv: list[str]) -> int:
    rank = int(os.environ.get("RANK", 0))
    try:
        return command(argv)
    except KeyboardInterrupt as interrupt:
        number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
        if rank == 0:  # torchrun hands a signal to all processes
            say(_interrupted(number))
        return 128 + number
    except (ValueError, RunError) as error:
        if not _is_for_the_user(error):
            raise
        place = f" (process {rank})" if rank > 0 else ""
        if rank == 0 or _others_had_time():
            say(f"mealfast: {error}{place}")
        return 1 if isinstance(error, RunError) else 2


def _run_among_others(command: Command, argv: list[str]) -> int:
    """The same for one of several processes: the one that failed says so before the others, who only notice."""
    rank = os.environ.get("RANK", "?")
    try:
        return _run(command, argv)
    except Exception as error:
        if (trouble := lost_process(error)) is not None:
            if _others_had_time():
                say(f"mealfast: process {rank}: {trouble}")
        else:
            said = "".join(traceback.format_exception(error)).rstrip()
            say(f"{said}\nmealfast: process {rank} failed with the error above")
        return 1


def _others_had_time() -> bool:
    """Waits until the process whose error matters has said so; False where torchrun ends the wait, since it has."""
    try:
        time.sleep(_OTHERS_WAIT)
    except KeyboardInterrupt:
        return False
    return True


def lost_process(error: Exception) -> str | None:
    """One line where an error says that another process is gone or hangs, else None."""
    text = " ".join(str(error).split())
    if "Timed out waiting" in text or "Watchdog caught collective operation timeout" in text:
        return f"has waited in vain for another process, which hangs or is slow (--collective-timeout): {text[:300]}"
    gone = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL")
    if isinstance(error, RuntimeError) and any(words in text for words in gone):
        return f"has lost another process, whose error is the one that matters: {text[:300]}"
    return None


def _leave(number: int) -> None:
    """Ends the process at once; by descriptor, since whoever was interrupted may hold the streams."""
    with suppress(OSError):
        os.write(2, f"{_interrupted(number)}\n".encode())
    os._exit(128 + number)


def _interrupted(number: int) -> str:
    return "mealfast: interrupted" + ("" if number == signal.SIGINT else f" by {signal.Signals(number).name}")


def _hangs() -> bool:
    """Whether the interpreter's end would wait for a thread, or a decoder, that does not end."""
    loaders = sys.modules.get("mealfast.loaders")
    if getattr(loaders, "threads_are_blocked", bool)():
        return True
    until = time.monotonic() + _JOIN
    waited_for = [one for one in threading.enumerate() if not one.daemon and one is not threading.main_thread()]
    for thread in waited_for:
        thread.join(max(0.0, until - time.monotonic()))
    return any(thread.is_alive() for thread in waited_for)


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, (UsageError, RunError)):
        return True
    loaders = sys.modules.get("mealfast.loaders")  # not imported just to ask: it brings torch
    return loaders is not None and isinstance(error, loaders.DataError)
