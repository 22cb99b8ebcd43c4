"""The short forms of the fault campaigns of `tests/faults.py`, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

FAULTS = Path(__file__).parents[1] / "faults.py"


def campaign(name: str, times: int) -> dict:
    done = subprocess.run(
        [sys.executable, str(FAULTS), name, "--times", str(times)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout)


def test_runs_killed_at_random_moments_end_as_if_nothing_had_happened():
    assert campaign("kill", 6)["injected"] == 6


def test_workers_that_fail_are_started_again_and_none_outlives_its_torchrun():
    campaign("processes", 1)


def test_mutated_files_are_refused_set_aside_or_harmless():
    counts = campaign("fuzz", 40)["counts"]
    assert all(sum(v for k, v in count.items() if k != "peak MiB") == 40 for count in counts.values())
    assert counts["checkpoints"]["refused"] > 20
    assert counts["images"]["quarantined"] > 5


def test_open_files_stay_flat_and_no_order_comes_twice():
    campaign("soak", 501)
