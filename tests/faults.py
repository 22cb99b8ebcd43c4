"""The long fault campaigns, as a script; `make test` runs a short form of each.

.venv/bin/python tests/faults.py CAMPAIGN [--times N] [--seed S]

kill        SIGKILL at N random moments, checkpoint writes included
processes   two workers of a torchrun: killed, failed, hung, orphaned, stopped (N 1: the quick ones only)
fuzz        N mutations each of checkpoints, weights, label caches, indexes, packs and images
soak        a run of N steps: memory, open files, and that no epoch's order comes again
nodes       two torchrun nodes, one of which is lost N times and comes back
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time

# Name: (module, how often or how long the full campaign is).
CAMPAIGNS = {
    "kill": ("fault_kill", 20),
    "processes": ("fault_processes", 2),
    "nodes": ("fault_nodes", 3),
    "fuzz": ("fault_fuzz", 3000),
    "soak": ("fault_soak", 20_000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--times", type=int, help="how often, or how long; the default is the full campaign")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    module, times = CAMPAIGNS[chosen.campaign]
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported: see fault_runs.py
    began = time.monotonic()
    result = importlib.import_module(module).campaign(chosen.times or times, chosen.seed)
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
