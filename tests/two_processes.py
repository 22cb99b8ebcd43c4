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
from mealfast.training.loop import Run
from mealfast.training.step import TrainStep


def main() -> None:
    runtime = start("cpu")
    step = TrainStep.__call__

    def recorded(self, batch, number):
        """Also writes which images this process was given at each step."""
        folder = Path(self.recipe.run_dir)
        with (folder / f"indices-{runtime.rank}.jsonl").open("a") as file:
            file.write(json.dumps([number, batch.indices.tolist()]) + "\n")
        return step(self, batch, number)

    TrainStep.__call__ = recorded
    for fields in json.loads(Path(sys.argv[1]).read_text()):
        recipe = make_recipe(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
        torch.manual_seed(123 + runtime.rank)  # processes that agree must owe it to the recipe's seed
        directory = RunDirectory(recipe.run_dir)
        directory.check(recipe)
        runtime.barrier()
        Run(recipe, runtime, directory).train()
        runtime.barrier()
    stop()


if __name__ == "__main__":
    main()
