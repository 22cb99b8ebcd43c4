"""What torchrun starts in the fault campaigns: runs one after the other, in one of which a process comes to grief.

torchrun ... tests/fault_worker.py WORK.json, a list of {"fields": ..., "fault": null or [KIND, ATTEMPT, RANK, STEP]}.
KIND is "raise", "kill" (SIGKILL to itself) or "hang"; ATTEMPT counts torchrun's restarts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from mealfast.cli.endings import run_command


def work(argv: list[str]) -> int:
    from mealfast.recipe import make_recipe
    from mealfast.training.loop import train
    from mealfast.training.step import Step

    step, rank = Step.__call__, int(os.environ["RANK"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    for one in json.loads(Path(argv[0]).read_text()):
        kind, *place = one["fault"] or [None]

        def call(self, batch, now, kind=kind, place=place):
            if [attempt, rank, now] == place:
                if kind == "raise":
                    raise ArithmeticError("this rank failed first")
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1000)
            return step(self, batch, now)

        Step.__call__ = call
        fields = {key: tuple(value) if isinstance(value, list) else value for key, value in one["fields"].items()}
        train(make_recipe(**fields))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(work, sys.argv[1:]))
