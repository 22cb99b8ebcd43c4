"""Probes many files in parallel, in processes that end when this one does and may die of a file without harm."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from . import probe as probe_module
from .batch import DataError
from .files import printable
from .probe import probe

CHUNK = 32  # paths handed over at a time: well under a pipe's buffer, so neither side can block the other
CRASHED = "the image library crashed on it"
IN_PROCESS = 256  # as many files are probed faster than processes start
KILLS = 3  # processes in a row that may be killed at one file, before the scan gives up

# What a process dies of by its own fault. Any other death came from outside: the out-of-memory killer, a person, a
# job's time limit, a Python that cannot start; it says nothing about the file.
_CRASHES = frozenset(
    -getattr(signal, name) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP")
)

Found = tuple[int, int, int] | str  # width, height and bits of a usable file, or why it is unusable


def probe_all(
    paths: Sequence[bytes],
    *,
    decode: bool,
    workers: int,
    isolated: bool = False,
    done: Callable[[int], None] = lambda count: None,
) -> list[Found]:
    """`probe.probe` of every path, in order, reasons printable; `done(count)` is called as files are finished.

    `isolated` has even a few files probed by processes of their own, as one is known to crash. Raises DataError where
    probing processes are killed or cannot start: then nothing is known of the file that they had in hand.
    """
    results: list[Found] = [""] * len(paths)
    if not sys.executable or ((workers <= 1 or len(paths) <= IN_PROCESS) and not isolated):
        for i, path in enumerate(paths):
            results[i] = _escaped(probe(path, decode))
            done(1)
        return results
    lock = threading.Lock()
    starts = iter(range(0, len(paths), CHUNK))
    failures: list[BaseException] = []
    stop = threading.Event()

    def serve() -> None:
        try:
            with _Worker(decode) as worker:
                while not stop.is_set():
                    with lock:
                        start = next(starts, None)
                    if start is None:
                        return
                    chunk = paths[start : start + CHUNK]
                    results[start : start + len(chunk)] = worker.probe(chunk, stop)
                    with lock:
                        done(len(chunk))
        except BaseException as error:
            failures.append(error)
            stop.set()

    count = min(max(workers, 1), -(-len(paths) // CHUNK))
    threads = [threading.Thread(target=serve, daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:  # also on Ctrl-C: the threads leave after their chunk and close their processes
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return results


class _Worker:
    """One probing process, started again when it dies."""

    def __init__(self, decode: bool) -> None:
        self._decode = decode
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, probe_module.__file__, "decode" if self._decode else "headers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # image libraries print their warnings there
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _stop(self) -> int:
        """Ends the process; its exit status, negative the signal that it died of."""
        self._process.communicate()
        return self._process.returncode

    def probe(self, paths: Sequence[bytes], stop: threading.Event) -> list[Found]:
        """What the process finds of each path; ends early, with fewer, once `stop` is set."""
        answers = self._ask(paths)
        while len(answers) < len(paths) and not stop.is_set():
            answers.append(self._ask_alone(paths[len(answers)], stop))
            answers += self._ask(paths[len(answers) :])
        return answers

    def _ask_alone(self, path: bytes, stop: threading.Event) -> Found:
        """Of the file at which the process died: a new process is asked about nothing else, then one for the rest.

        A file is to blame only where a process crashes on it that has seen no other.
        """
        status = self._stop()
        for _ in range(KILLS):
            self._process = self._start()
            if answers := self._ask([path]):
                return answers[0]
            status = self._stop()
            if status in _CRASHES:
                self._process = self._start()
                return CRASHED
            if stop.is_set():
                break
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        name = printable(path.decode("utf-8", "backslashreplace"))
        raise DataError(
            f"{name}: the process that looks into it {how}, {KILLS + 1} times; "
            "nothing is known against the file: start again, where memory is short with fewer processes "
            "(--loader-threads; --workers of index and pack)"
        )

    def _ask(self, paths: Sequence[bytes]) -> list[Found]:
        """What the process says of the paths, up to the one at which it dies."""
        answers: list[Found] = []
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(b"".join(path + b"\0" for path in paths))
            stdin.flush()
            while len(answers) < len(paths) and (line := stdout.readline()).endswith(b"\n"):
                answer = json.loads(line)
                answers.append(_escaped(answer) if isinstance(answer, str) else tuple(answer))
        except BrokenPipeError:
            pass
        return answers


def _escaped(found: Found) -> Found:
    return printable(found) if isinstance(found, str) else found
