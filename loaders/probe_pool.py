"""Probes many files in parallel, in processes that end when this one does and may die of a file without harm."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence

from . import probe as probe_module
from .probe import probe

CHUNK = 32  # paths handed over at a time: well under a pipe's buffer, so neither side can block the other
CRASHED = "the image library crashed on it"
IN_PROCESS = 256  # as many files are probed faster than processes start


def probe_all(
    paths: Sequence[bytes], *, decode: bool, workers: int, done: Callable[[int], None] = lambda count: None
) -> list:
    """`probe.probe` of every path, in order; `done(count)` is called as files are finished."""
    results: list = [None] * len(paths)
    if workers <= 1 or len(paths) <= IN_PROCESS or not sys.executable:
        for i, path in enumerate(paths):
            results[i] = probe(path, decode)
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
                    results[start : start + len(chunk)] = worker.probe(chunk)
                    with lock:
                        done(len(chunk))
        except BaseException as error:
            failures.append(error)
            stop.set()

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(workers)]
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
    """One probing process, started again when a file kills it."""

    def __init__(self, decode: bool):
        self._decode = decode
        self._start()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, probe_module.__file__, "decode" if self._decode else "headers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # image libraries print their warnings there
        )

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def probe(self, paths: Sequence[bytes]) -> list:
        answers = self._ask(paths)
        while len(answers) < len(paths):  # the process died of the first file that it did not answer for
            answers.append(CRASHED)
            self.__exit__()
            self._start()
            answers += self._ask(paths[len(answers) :])
        return answers

    def _ask(self, paths: Sequence[bytes]) -> list:
        answers: list = []
        try:
            self._process.stdin.write(b"".join(path + b"\0" for path in paths))
            self._process.stdin.flush()
            while len(answers) < len(paths) and (line := self._process.stdout.readline()).endswith(b"\n"):
                answer = json.loads(line)
                answers.append(answer if isinstance(answer, str) else tuple(answer))
        except BrokenPipeError:
            pass
        return answers
