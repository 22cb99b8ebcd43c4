"""The long fault campaigns, as a script; `make test` runs a short form of each.

.venv/bin/python tests/faults.py kill [--times 20] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import time

CAMPAIGNS = {"kill": ("fault_kill", 20, "SIGKILL at random moments, checkpoint writes included")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--times", type=int, help="how often, or how long; the default is the full campaign")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    module, times, _ = CAMPAIGNS[chosen.campaign]
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported: see fault_runs.py
    began = time.monotonic()
    result = importlib.import_module(module).campaign(chosen.times or times, chosen.seed)
    print(json.dumps({**result, "seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main()
