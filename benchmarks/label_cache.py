"""Images per second of a student that learns from a label cache, against one that has no target at all, in one run.

    python benchmarks/label_cache.py [--data DIR] [--student SPEC] [--out FILE]

`hard-labels` trains on labels alone: no teacher, no target read. `cached` learns top-k targets from a cache on disk
(random ones: no teacher is needed to time reading them), `cached-discriminator` with the discriminator on top. All run
the step and the loader of `mealfast train` on the same images. They take turns, round by round, so that a busy machine
slows them alike; medians of the rounds are reported, and the median of each round's ratio to `hard-labels`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from _images import make_images
from _record import record, write
from _specs import measured

from mealfast.errors import UsageError
from mealfast.loaders import (
    CacheHeader,
    DataError,
    ImageIndex,
    LabelCache,
    LabelWriter,
    ViewPlan,
    claim_label_cache,
    plan_fields,
    train_loader,
)
from mealfast.loaders.cores import core_count
from mealfast.machine import processes as runtimes
from mealfast.machine.precision import name_of, precision
from mealfast.method.inputs import CutMix, unmixed
from mealfast.method.student import Student as Learner
from mealfast.method.targets import GivenTargets
from mealfast.models.normalised import build
from mealfast.recipe import make_recipe
from mealfast.training.meter import Meter
from mealfast.training.optimiser import Optimiser
from mealfast.training.step import Step
from mealfast.training.step_calendar import Calendar

CHANGES = {
    "hard-labels": {"hard_label_weight": 1.0},
    "cached": {"discriminator": "off"},
    "cached-discriminator": {"discriminator": "cooperative"},
}


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory(prefix="mealfast-benchmark-") as folder:
        root = args.data or Path(folder) / "images"
        if args.data is None:
            root.mkdir()
            make_images(root, args.images)
        try:
            index = ImageIndex.scan(root, cache_dir=folder)
            plan = ViewPlan(index.widths, index.heights, seed=1, size=args.size, cycle=args.views)
            cache = random_cache(Path(folder) / "cache", index, plan, args)
            for row in measure(index, plan, cache, args):
                report(row, args.out)
        except (DataError, UsageError) as error:
            raise SystemExit(f"benchmarks/label_cache.py: {error}") from None


def parse() -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="tree of class folders (default: makes an ImageNet-like one)")
    parser.add_argument("--images", type=int, default=1500, help="how many images to make (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to which one JSON line a row is appended")
    parser.add_argument("--names", nargs="+", choices=list(CHANGES), default=list(CHANGES), help="what runs")
    parser.add_argument("--student", default="resnet50" if gpu else "resnet18", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256 if gpu else 16, help="(default: %(default)s)")
    parser.add_argument("--views", type=int, default=4, help="of the cache (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=10, help="of the cache (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=1000, help="of the student (default: %(default)s)")
    parser.add_argument("--loader", choices=("dali", "pillow"), default="dali")
    parser.add_argument("--threads", type=int, default=core_count(), help="that decode (default: the cores)")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="(default: on GPUs)")
    parser.add_argument("--rounds", type=int, default=11, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each turn (default: %(default)s)")
    args = parser.parse_args()
    if "hard-labels" not in args.names:
        parser.error("--names: hard-labels must be among them; the others are compared with it")
    return args


def random_cache(folder: Path, index: ImageIndex, plan: ViewPlan, args: argparse.Namespace) -> LabelCache:
    """A complete cache whose targets say nothing."""
    rng = np.random.default_rng(0)
    header = CacheHeader(
        images=len(index), images_digest=index.images_digest, plan=plan_fields(plan), views=args.views,
        classes=args.classes, top_k=args.top_k, teachers=({"spec": "random", "digest": "0" * 64},),
        made_with={"batch_size": 1024, "precision": "float32", "loader": args.loader},
    )  # fmt: skip
    probabilities = np.tile(0.5 ** np.arange(1, args.top_k + 1), (len(index), 1))
    with claim_label_cache(folder, header), closing(LabelWriter(folder)) as writer:
        for view in writer.incomplete:
            start = rng.integers(0, args.classes, len(index))
            ids = (start[:, None] + np.arange(args.top_k)) % args.classes
            writer.add(view, np.arange(len(index)), ids, probabilities)
            writer.complete(view)
    return LabelCache(folder)


class Student:
    """One student with its loader, to be trained a while at a time."""

    def __init__(self, name: str, index: ImageIndex, plan: ViewPlan, cache: LabelCache, runtime, args) -> None:
        reads = name != "hard-labels"
        recipe = make_recipe(
            data=str(index.root), student=measured(f"{args.student}?num_classes={args.classes}"), size=args.size,
            batch_size=args.batch_size, lr=1e-4, loader=args.loader, amp=args.amp, compile=args.compile,
            label_cache=str(cache.folder) if reads else "", **CHANGES[name],
        )  # fmt: skip
        self.runtime, self.batch_size = runtime, args.batch_size
        compiled = runtime.device.type == "cuda" if recipe.compile is None else recipe.compile
        learner = Learner(recipe, runtime, build(recipe.student, recipe.size), compile=compiled)
        self.meter = Meter(runtime.device)
        self.train_step = Step(
            recipe, 1, inputs=CutMix(0, 0) if recipe.cutmix else unmixed, target_source=GivenTargets(), student=learner,
            optimiser=Optimiser(recipe, runtime, learner, Calendar.of(recipe, len(index)).lr_factor), meter=self.meter,
        )  # fmt: skip
        self.loader = train_loader(
            args.loader, index, plan, batch_size=args.batch_size, stop_step=1 << 40, device=runtime.device,
            threads=args.threads, label_cache=cache if reads else None,
        )  # fmt: skip
        self.batches, self.step = iter(self.loader), 0

    def turn(self, seconds: float) -> float:
        """Images per second over about `seconds`, until the device is done."""
        for _ in range(3):  # what was made ready during the others' turns does not count
            self.train()
        self.wait()
        steps, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds or steps < 2:
            self.train()
            steps += 1
        self.wait()
        return steps * self.batch_size / (time.perf_counter() - start)

    def train(self) -> None:
        self.train_step(next(self.batches), self.step)
        self.step += 1

    def wait(self) -> None:
        self.meter.sums.tolist()

    def close(self) -> None:
        self.batches.close()
        self.loader.close()


def measure(index, plan, cache, args):
    """One row a student, then one with the ratios."""
    runtime = runtimes.start(args.device)
    students = {name: Student(name, index, plan, cache, runtime, args) for name in args.names}
    for student in students.values():
        student.turn(args.seconds / 2)  # compiles, fills queues, reads the cache once
    rates = {name: [] for name in students}
    for turn in range(args.rounds):
        for name in list(students)[:: 1 if turn % 2 else -1]:  # nobody is always the one after the other
            rates[name].append(students[name].turn(args.seconds))
    for student in students.values():
        student.close()
    settings = {
        "rounds": args.rounds, "student": args.student, "size": args.size, "batch_size": args.batch_size,
        "loader": args.loader, "threads": args.threads, "device": args.device,
        "precision": name_of(precision(args.amp, runtime.device)),
        "images": len(index), "views": args.views, "top_k": args.top_k, "classes": args.classes,
    }  # fmt: skip
    for name, values in rates.items():
        yield record(f"label-cache/{name}", images_per_second=round(median(values), 2), **spread(values), **settings)
    for name in [name for name in rates if name != "hard-labels"]:
        ratios = [one / other for one, other in zip(rates[name], rates["hard-labels"], strict=True)]
        yield record(f"label-cache/{name} to hard-labels", ratio=round(median(ratios), 4), **spread(ratios), **settings)


def median(values):
    return float(np.median(values))


def spread(values):
    low, high = np.percentile(values, [25, 75])
    return {"spread": {"p25": round(low, 4), "p75": round(high, 4)}, "min": min(values), "max": max(values)}


def report(row, out):
    value = f"{row['ratio']:.3f} x" if "ratio" in row else f"{row['images_per_second']:.1f} images/s"
    print(
        f"{row['name']:48} {value:>18}  (quartiles {row['spread']['p25']:.4g} to {row['spread']['p75']:.4g})",
        flush=True,
    )
    if out is not None:
        write(out, [row])


if __name__ == "__main__":
    main()
