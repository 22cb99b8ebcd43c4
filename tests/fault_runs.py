"""What the fault campaigns share: a tiny run, lives of it in forked processes, and its comparison with another.

Forking after torch and mealfast are imported makes a life cost a second instead of seven. The parent must never have
computed anything with more than one thread.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import mealfast.training.loop
from mealfast.recipe import make_recipe

with suppress(ImportError):
    import nvidia.dali  # noqa: F401  (config.json names its version, which costs a second of every life)

torch.set_num_threads(1)
CLASSES = ("ant", "bee", "cat")


def write_images(root: Path, per_class: dict[str, int], side: int = 32, seed: int = 0) -> None:
    """ROOT/train and ROOT/val, a folder a class, of noisy JPEGs."""
    rng = np.random.default_rng(seed)
    for part, count in per_class.items():
        for place, name in enumerate(CLASSES):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 120, (side, side, 3))
                pixels[..., place] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=90)


def tiny_fields(root: Path, **changes) -> dict:
    """Fields of a recipe whose steps take milliseconds. Writes its images and weights below `root`."""
    import timm

    data = root / "data"
    if not data.exists():
        write_images(data, {"train": 9, "val": 3})
    for name, seed in (("test_efficientnet", 1), ("test_resnet", 2)):
        torch.manual_seed(seed)
        torch.save(timm.create_model(name, num_classes=3).state_dict(), root / f"{name}.pth")
    return {
        "data": str(data),
        "student": f"test_efficientnet?drop_rate=0.3&drop_path_rate=0.3@{root}/test_efficientnet.pth",
        "teachers": (f"test_resnet@{root}/test_resnet.pth",),
        "size": 32, "epochs": 3, "batch_size": 8, "lr": 0.05, "lr_decay_epochs": (2,), "amp": "off", "compile": False,
        "device": "cpu", "loader": "pillow", "loader_threads": 1, "log_every": 1, "cutmix": True,
        "hard_label_weight": 0.2, "tune_teachers": False, **changes,
    }  # fmt: skip


def options(fields: dict) -> list[str]:
    """The command line of a recipe's fields."""
    argv = []
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            argv += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    return argv


def fork(work: Callable[[], object], log: Path) -> int:
    """Starts `work` in a child process that writes its stdout and stderr to `log`; its process id.

    Its status is 0, or 1 after an exception, whose traceback is in the log.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def train(fields: dict, run_dir: Path) -> Callable[[], object]:
    """Work for `fork`: the run in that directory, or what is left of it."""
    return lambda: mealfast.training.loop.train(make_recipe(**{**fields, "run_dir": str(run_dir)}))


def wait(pid: int, seconds: float, log: Path) -> int:
    """The exit status of a child; a negative one is the signal that ended it. Fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"hung for {seconds} s: {log.read_text()[-2000:]}")


def trained_lines(run_dir: Path) -> list[int]:
    """The steps that metrics.jsonl holds, whole lines only."""
    found = []
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if content["kind"] == "train":
            found.append(content["step"])
    return found
