"""What a checkpoint costs the training: how long the loop stands still, and by how much its thread slows the steps.

.venv/bin/python benchmarks/saving.py [--student resnet50] [--size 96] [--batch 1] [--saves 6] [--folder DIR]

The steps are plain forward and backward passes of the student on the CPU, in one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import timm
import torch
from _record import record

from mealfast.record.checkpoint_writer import CheckpointWriter

QUIET_STEPS = 20  # between two saves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="resnet50")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--saves", type=int, default=6)
    parser.add_argument("--folder", help="disk to write to; default: the system's temporary folder")
    options = parser.parse_args()
    model = timm.create_model(options.student)
    momentum = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    images = torch.randn(options.batch, 3, options.size, options.size)

    def step() -> float:
        began = time.perf_counter()
        model(images).sum().backward()
        model.zero_grad()
        return time.perf_counter() - began

    quiet, beside, still, whole = [], [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        writer = CheckpointWriter(Path(folder), 2, print)
        step()
        for number in range(options.saves):
            quiet += [step() for _ in range(QUIET_STEPS)]
            began = time.perf_counter()
            writer.save(number + 1, {"student": model.state_dict(), "momentum": momentum}, best=False)
            still.append(time.perf_counter() - began)
            while writer.writing:
                beside.append(step())
            whole.append(time.perf_counter() - began)
        writer.wait()
        size = max(path.stat().st_size for path in Path(folder).iterdir())
    alone = statistics.median(quiet)
    slower = sum(seconds - alone for seconds in beside) / options.saves
    cost = statistics.median(still) + max(slower, 0.0)
    result = record(
        "saving",
        student=options.student,
        bytes=size,
        saves=options.saves,
        still_s=statistics.median(still),
        written_after_s=statistics.median(whole),
        step_alone_s=alone,
        step_beside_s=statistics.median(beside),
        slower_s_a_save=slower,
        cost_s_a_save=cost,
        one_percent_of_interval_s=100 * cost,  # a save every so many seconds costs 1%
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
