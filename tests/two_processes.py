"""What `test_distributed.py` runs under torchrun: the recipes of a JSON file, one after the other, in one group.

torchrun --nproc-per-node 2 tests/two_processes.py RECIPES.json
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # read when torch is first imported

import torch

from mealfast.machine.processes import start, stop
from mealfast.recipe import make_recipe
from mealfast.record.run_directory import RunDirectory
from mealfast.training.loop import run
from mealfast.training.step import Step


def main() -> None:
    runtime = start("cpu")
    step, folder = Step.__call__, Path()

    def recorded(self, batch, number):
        """Also writes which images this process was given at each step."""
        with (folder / f"indices-{runtime.rank}.jsonl").open("a") as file:
            file.write(json.dumps([number, batch.indices.tolist()]) + "\n")
        return step(self, batch, number)

    Step.__call__ = recorded
    for fields in json.loads(Path(sys.argv[1]).read_text()):
        recipe = make_recipe(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
        torch.manual_seed(123 + runtime.rank)  # processes that agree must owe it to the recipe's seed
        directory = RunDirectory(recipe.run_dir)
        directory.check(recipe)
        runtime.barrier()
        folder = directory.path
        run(recipe, runtime, directory)
        runtime.barrier()
    stop()


if __name__ == "__main__":
    main()
