"""A long run of a tiny model: memory and open files stay flat, and no order of the images comes a second time."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import fault_runs

import mealfast.training.loop
from mealfast.recipe import make_recipe
from mealfast.training.step import Step

SETTLED = 1000  # steps after which memory is flat
EVERY = 250  # steps between two looks
PER_EPOCH = 3  # steps


def campaign(times: int, seed: int) -> dict[str, object]:
    """`times` steps. Raises AssertionError where memory or files grow, or an order repeats."""
    curve: dict[int, tuple[int, int]] = {}  # step -> (resident MiB / 1024, open files)
    orders: list[int] = []
    step = Step.__call__
    seen: list[int] = []

    def watched(self, batch, number):
        if number >= times:  # after the run its speed is measured on the last batch, again and again
            return step(self, batch, number)
        if number % EVERY == 0:
            curve[number] = (resident_kib(), len(os.listdir("/proc/self/fd")))
            print(f"soak: step {number}: {curve[number][0] / 1024:.1f} MiB, {curve[number][1]} files", file=sys.stderr)
        seen.extend(batch.indices.tolist())
        if number % PER_EPOCH == PER_EPOCH - 1:
            orders.append(hash(tuple(seen)))
            assert len(set(seen)) == len(seen), "an image twice in an epoch"
            seen.clear()
        return step(self, batch, number)

    Step.__call__ = watched
    with tempfile.TemporaryDirectory(prefix="mealfast-soak-") as name:
        root = Path(name)
        fields = fault_runs.tiny_fields(
            root, epochs=-(-times // PER_EPOCH), lr=1e-4, lr_decay_epochs=(1000,), log_every=50, checkpoint_every=100,
            eval_every=100, max_steps=times, run_dir=str(root / "run"), loader="dali", seed=seed,
        )  # fmt: skip
        mealfast.training.loop.train(make_recipe(**fields))
    start = curve[SETTLED] if SETTLED in curve else curve[max(curve) // 2 // EVERY * EVERY]
    later = {number: value for number, value in curve.items() if number >= SETTLED} or dict([curve.popitem()])
    growth = max(memory for memory, _ in later.values()) / start[0] - 1
    files = max(files for _, files in later.values()) - start[1]
    assert len(set(orders)) == len(orders) > 1, "an order came twice"
    points = sorted({*range(0, times, max(times // 20, EVERY)), max(curve, default=0)} & curve.keys())
    result = {
        "fault": f"{times} steps of a tiny model, {len(orders)} epochs",
        "injected": times,
        "outcome": f"resident memory after step {SETTLED}: {100 * growth:+.2f}% at most; open files {files:+d}; "
        "no order of images came twice",
        "lost": "nothing",
        "curve": {number: {"MiB": round(curve[number][0] / 1024, 1), "files": curve[number][1]} for number in points},
    }
    assert growth < 0.01 if times > 4 * SETTLED else True, result
    assert files <= 2, result
    return result


def resident_kib() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
