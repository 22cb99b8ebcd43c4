"""One run a folder: a lock that the main process of a job holds from before it reads to its end.

`flock`, not POSIX record locks: those are lost as soon as the process closes any descriptor of the file (somebody
copies the folder), and do not keep two runs of one process apart. A flock belongs to the open file, which a forked
child shares: the child closes it at once, and a program that is started never gets it (close-on-exec). The system lets
go of it whatever ends the process. On NFS the kernel makes a record lock of it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mealfast.errors import UsageError
from mealfast.machine import terminal
from mealfast.machine.files import printable

NAME = ".lock"
PATIENCE = 1.0  # seconds: a process that was killed a moment ago may still be giving its memory back
_held: set[int] = set()  # descriptors that a forked child must not keep


@contextmanager
def hold(folder: str | os.PathLike[str], option: str = "--run-dir") -> Iterator[None]:
    """Keeps every other job out of `folder`, which is made where it is missing, until the block or the process ends.

    Only the first of torchrun's processes (RANK 0) takes the lock. Raises UsageError, naming `option`, with the
    holder's host, process id and start where the folder is in use, and where no lock file can be made. A file system
    without locks gets a note. What the block leaves empty is removed again.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    folder, owner = Path(folder), os.getpid()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(folder, option)
    except FileExistsError:
        raise UsageError(f"{option} {printable(str(folder))}: is a file; name a folder") from None
    except OSError as error:
        raise UsageError(f"{option} {printable(str(folder))}: cannot be written ({error.strerror})") from error
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a forked child that unwinds its parent's stack
            with suppress(OSError):
                (folder / NAME).unlink()  # before the lock goes: whoever waits looks again
            _held.discard(descriptor)
            os.close(descriptor)
            with suppress(OSError):  # those that are not empty
                for path in made:
                    path.rmdir()


def _take(folder: Path, option: str) -> int:
    """The descriptor of the locked file. Raises OSError, and UsageError where another has it."""
    path, deadline = folder / NAME, time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{option} {printable(str(folder))}: is in use by {holder}; wait for its end, or name another"
                ) from None
            time.sleep(PATIENCE / 5)
            continue
        except OSError:
            locks = False
        if locks and not _is(descriptor, path):  # its holder has ended and taken the file away meanwhile
            os.close(descriptor)
            continue
        _held.add(descriptor)
        if not locks:
            terminal.say(
                f"note: {printable(str(folder))}: this file system has no locks: start no other run there meanwhile"
            )
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with suppress(OSError):  # a full disk: the lock holds, its holder is not named
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": now}).encode())
        return descriptor


def _is(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _holder(descriptor: int) -> str:
    with suppress(OSError, ValueError, TypeError, KeyError):
        found = json.loads(os.pread(descriptor, 4096, 0))
        words = (printable(str(found[name]))[:80] for name in ("pid", "host", "start"))
        return "process {} on {}, started {}".format(*words)
    return "another process"


def _close_in_child() -> None:
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)
