"""torchrun in the fault campaigns: started, watched, and whatever happens nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

WORKER = Path(__file__).with_name("fault_worker.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "50000"}


def command(work: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *options, str(WORKER), str(work)]


def write_work(path: Path, *runs: tuple[dict, list | None]) -> Path:
    """What the worker does: (fields, fault) of each run."""
    path.write_text(json.dumps([{"fields": fields, "fault": fault} for fields, fault in runs]))
    return path


@contextmanager
def launched(argv: list[str], log: Path, **environment: str):
    """A process in a session of its own, its output appended to `log`."""
    with log.open("a") as file:
        process = subprocess.Popen(
            argv, env={**ENVIRONMENT, **environment}, stdout=file, stderr=file, start_new_session=True
        )
        try:
            yield process
        finally:
            kill_tree(process.pid)
            process.wait()


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all its descendants: torchrun's workers have sessions of their own."""
    for one in [pid, *descendants(pid)]:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [pid]
    while todo:
        found += (more := children.get(todo.pop(), []))
        todo += more
    return found


def wait_until(true: Callable[[], object], seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s: {log.read_text()[-4000:]}"
        time.sleep(0.02)


def alive(pids: list[int]) -> list[int]:
    """Those that still run; a zombie, whose parent has not asked for it, does not."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found
