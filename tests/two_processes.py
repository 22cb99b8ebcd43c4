"""What `test_distributed.py` runs under torchrun: the recipes of a JSON file, one after the other, in one group.

torchrun --nproc-per-node 2 tests/two_processes.py RECIPES.json

A recipe may have {"fails": [RANK, STEP]}: that process's loader has no batch for that step; what is left is noted.
"""

import json
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "50000")  # read when torch is first imported

import torch

from mealfast.loaders import Batch, DataError, Loader
from mealfast.machine.processes import start, stop
from mealfast.recipe import make_recipe
from mealfast.record.run_directory import RunDirectory
from mealfast.training import job
from mealfast.training.loop import run
from mealfast.training.step import Step

sys.path.insert(0, str(Path(__file__).parent))
from runs import last


class Failing:
    """A training loader without a batch for one step."""

    def __init__(self, loader: Loader, batches: int) -> None:
        self.loader, self.batches = loader, batches
        self.close, self.replaced, self.replaced_count = loader.close, {}, 0

    def __iter__(self) -> Iterator[Batch]:
        yield from islice(self.loader, self.batches)
        raise DataError("no seventh batch")


def main() -> None:
    runtime = start("cpu")
    step, folder = Step.__call__, Path()

    def recorded(self, batch, number):
        """Also writes which images this process was given at each step."""
        with (folder / f"indices-{runtime.rank}.jsonl").open("a") as file:
            file.write(json.dumps([number, batch.indices.tolist()]) + "\n")
        return step(self, batch, number)

    Step.__call__ = recorded
    loader = job.train_loader
    for fields in json.loads(Path(sys.argv[1]).read_text()):
        fails = fields.pop("fails", [None, None])
        job.train_loader = loader
        if fails[0] == runtime.rank:

            def failing(*arguments, step=fails[1], **options):
                few = step - options["start_step"] if options["stop_step"] > 1 else 1  # one to measure teachers on
                return Failing(loader(*arguments, **options), few)

            job.train_loader = failing
        recipe = make_recipe(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
        torch.manual_seed(123 + runtime.rank)  # processes that agree must owe it to the recipe's seed
        directory = RunDirectory(recipe.run_dir)
        directory.check(recipe)
        runtime.barrier()
        folder = directory.path
        try:
            run(recipe, runtime, directory)
        except DataError as error:
            assert fails != [None, None]
            if runtime.is_main:
                left = last(folder)
                found = {"step": left["step"], "processes": len(left["processes"]), "error": str(error)}
                (folder / "failed.json").write_text(json.dumps(found))
        runtime.barrier()
    stop()


if __name__ == "__main__":
    main()
