"""Daemon threads: one that a stalled disk blocks for ever keeps neither a loader's `close` nor the process."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Task = tuple["Future[Any]", Callable[[], object]]


class WorkerThreads:
    """Threads that run what is submitted to them, first come, first served.

    Not concurrent.futures' pool, whose threads the interpreter joins at its exit, however long they block.
    """

    def __init__(self, count: int, name: str) -> None:
        """Starts `count` threads named `name`_0, ... They end with `close`, or with this object."""
        tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._tasks = tasks
        self._threads = [
            threading.Thread(target=_serve, args=(tasks,), name=f"{name}_{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()
        self._end = weakref.finalize(self, _end, tasks, count)
        self._lock = threading.Lock()  # no task may come behind the end: it would be waited for in vain

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Has a thread call `function(*arguments)`; what it returns or raises is the future's result.

        Raises RuntimeError after `cancel`.
        """
        future: Future[T] = Future()
        with self._lock:
            if not self._end.alive:
                raise RuntimeError("the threads are closed")
            self._tasks.put((future, functools.partial(function, *arguments)))
        return future

    def cancel(self) -> None:
        """Cancels what no thread has begun, and has each thread end after what it is at."""
        with self._lock:
            if self._end.alive:
                with suppress(Empty):
                    while (task := self._tasks.get_nowait()) is not None:
                        task[0].cancel()
                self._end()

    def close(self) -> None:
        """`cancel`, and waits for the threads, for ever where one is blocked."""
        self.cancel()
        for thread in self._threads:
            thread.join()


def _end(tasks: SimpleQueue[_Task | None], count: int) -> None:
    for _ in range(count):
        tasks.put(None)


def _serve(tasks: SimpleQueue[_Task | None]) -> None:
    while (task := tasks.get()) is not None:
        _run(*task)
        del task  # or what it refers to would live until the next one comes


def _run(future: Future[Any], function: Callable[[], object]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except BaseException as error:
        future.set_exception(error)
