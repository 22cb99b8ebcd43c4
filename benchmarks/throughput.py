"""Images per second of a whole distillation step, mealfast's beside others', on the same images in one run.

    python benchmarks/throughput.py --sizes 224 380 --batch 256 --sweep 128 512 --out FILE       # the recipes' models
    python benchmarks/throughput.py --sizes 224 --batch 32 --student resnet18 --teachers resnet34 resnet26

`baseline` is the method as the paper's code runs it (baseline.py), `timm-style` a usual loop with the same teachers
(timm_style.py). `mealfast` is what `mealfast train` runs, decoding included; `mealfast-replayed` the same on one batch
in memory; `models-alone` the forward and backward passes in it, so that `overhead` is what mealfast adds to them;
`mealfast-cached` a student from a label cache of random targets. They take turns, round by round, so that a busy
machine slows all of them; the median of the rounds counts. Then come the stages of the step and other batch sizes
(teachers channels-last there, not measured anew). Weights are random. What does not fit into the GPU is left out.
A SIGTERM (`timeout`) ends it after the round in which it came: what was measured by then is written.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from _images import make_images
from _record import _output, record, write
from _specs import bare, measured
from baseline import Baseline
from label_cache import random_cache
from timm_style import TimmStyle

from mealfast.errors import UsageError
from mealfast.loaders.cores import core_count
from mealfast.machine import processes as runtimes
from mealfast.machine.files import replacing
from mealfast.machine.precision import name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.measure import stages
from mealfast.method.data import view_plan
from mealfast.models.spec import parse as parse_spec
from mealfast.recipe import RECIPES, Recipe, make_recipe
from mealfast.record.run_directory import RunDirectory
from mealfast.training.assemble import make_job

RECIPE_OF_SIZE = {224: "resnet50-224", 380: "resnet50-380"}
asked_to_end = threading.Event()


@dataclass
class Contender:
    """One step at a time; `drain` throws away what was decoded ahead during the others' turns."""

    name: str
    step: Callable[[], Any]
    drain: Callable[[], Any] = lambda: None
    close: Callable[[], Any] = lambda: None
    settle: float = 0.0  # seconds that its workers need to fill their queue, before another one's turn
    precision: str | None = None  # where it is not the run's
    compiled: bool = False
    graph: Callable[[], str | None] = lambda: None  # what of a step a CUDA graph replays: known once it has run


def main() -> None:
    args = parse()
    runtime = runtimes.start(args.device)
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.set())
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than measure what runs eagerly
    with contextlib.ExitStack() as stack:
        if args.compile_cache:
            stack.enter_context(compile_cache(args.compile_cache))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mealfast-benchmark-")))
        try:
            data = args.data or synthetic(scratch / "data", args.images, args.seed)
            for size in args.sizes:
                for row in () if asked_to_end.is_set() else measure_size(args, runtime, data, scratch, size):
                    show(row, args.out)
        except UsageError as error:
            raise SystemExit(f"benchmarks/throughput.py: {error}") from None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[224, 380], help="pixels (default: 224 380)")
    add("--student", help="architecture (default: the recipe's of that size)")
    add("--teachers", nargs="+", help="architectures (default: the recipe's of that size)")
    add("--batch", type=int, help="images of every contender's step (default: 32 on the CPU, 256 on a GPU)")
    add("--sweep", type=int, nargs="*", default=[], help="other batch sizes of mealfast")
    add("--data", type=Path, help="folder with train/ and val/ (default: makes ImageNet-like JPEGs)")
    add("--images", type=int, help="how many JPEGs to make (default: 8 batches; 16384 on a GPU)")
    add("--out", type=Path, help="file to which one JSON line a figure is appended")
    add("--names", nargs="+", choices=NAMES, default=list(NAMES), help="which contenders")
    add("--no-stages", action="store_true", help="leave the stages out")
    add("--tune-teachers", action=argparse.BooleanOptionalAction, default=True, help="measure their layouts first")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="of mealfast and timm-style")
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="of mealfast (default: on GPUs)")
    add("--cuda-graphs", choices=("off", "ensemble", "step"), default=None, help="of mealfast (default: its own)")
    add("--loader", choices=("dali", "pillow"), default="dali", help="of mealfast (default: dali)")
    add(
        "--compile-cache", type=Path, metavar="FILE",
        help="compiled code of an earlier run, on the same hardware and versions; is written anew at the end",
    )  # fmt: skip
    add("--workers", type=int, default=core_count(), help="of the others' DataLoaders (default: the cores)")
    add("--rounds", type=int, default=5, help="turns of each (default: 5)")
    add(
        "--on-request", action="store_true",
        help="a round for each line on stdin instead, whose images/s are printed as JSON (for against.py)",
    )  # fmt: skip
    add("--seconds", type=float, default=4.0, help="of a turn at least, three steps at least (default: 4)")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("rounds", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: must be 1 or more")
    if not args.student and any(size not in RECIPE_OF_SIZE for size in args.sizes):
        parser.error(f"--sizes: the recipes have {sorted(RECIPE_OF_SIZE)}; name --student and --teachers for others")
    if bool(args.student) != bool(args.teachers):
        parser.error("--student and --teachers: give both, or neither for the recipe's")
    gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    args.batch = args.batch or (256 if gpu else 32)
    args.images = args.images or (16384 if gpu else 8 * max(args.batch, *args.sweep, 0))
    return args


def synthetic(folder: Path, images: int, seed: int) -> Path:
    """train/ and val/ under ImageNet's own folder names, so that models with 1000 classes accept them."""
    wnids = timm.data.ImageNetInfo("imagenet-1k").label_names()[:10]
    make_images(folder / "train", images, wnids)
    make_images(folder / "val", 20, wnids)
    return folder


def measure_size(
    args: argparse.Namespace, runtime: Runtime, data: Path, scratch: Path, size: int
) -> Iterator[dict[str, Any]]:
    """Rows of one size: the contenders at --batch in turns, the stages, then mealfast at the other batches."""
    recipe = recipe_for(args, data, scratch, size, args.batch)
    facts = {
        "size": size, "batch": args.batch, "precision": name_of(precision(args.amp, runtime.device)),
        "student": bare(recipe.student), "teachers": list(map(bare, recipe.teachers)), "clocks": clocks(),
    }  # fmt: skip
    torch.manual_seed(args.seed)
    job, _, _ = make_job(recipe, runtime, RunDirectory(recipe.run_dir))
    for report in job.reports:
        print(report, file=sys.stderr, flush=True)
    layouts = [str(report.choice.layout) for report in job.reports]
    contenders = [
        make(args, runtime, recipe, job, data, scratch) for name, make in MAKERS.items() if name in args.names
    ]
    rates = take_turns(contenders, args, runtime, args.batch)
    contender = None
    for contender in contenders:
        extra: dict[str, Any] = {"layouts": layouts} if contender.name.startswith("mealfast") else {}
        extra |= {"precision": contender.precision or facts["precision"], "clocks": clocks()}
        extra |= {"compiled": contender.compiled, "cuda_graph": contender.graph()}
        if contender.name == "mealfast-replayed" and "models-alone" in rates:
            pairs = zip(rates["mealfast-replayed"], rates["models-alone"], strict=True)
            extra["overhead"] = round(statistics.median(1 - step / models for step, models in pairs), 4)
        yield row(contender.name, rates[contender.name], facts | extra)
        contender.close()
    del contenders, contender
    if not args.no_stages and not asked_to_end.is_set():
        for stage in stages.measure(job, args.seconds):
            spread = {"p25": round(stage.p25, 1), "p75": round(stage.p75, 1)}
            rate = round(stage.images_per_second, 1)
            yield record(f"stage: {bare(stage.name)}", images_per_second=rate, spread=spread, **facts)
    del job
    for batch in args.sweep:
        if asked_to_end.is_set():
            return
        free(runtime)
        try:
            yield from sweep(args, runtime, data, scratch, recipe_for(args, data, scratch, size, batch), facts)
        except torch.OutOfMemoryError as error:
            left_out(f"size {size}, batch {batch}", error)
    free(runtime)


def sweep(
    args: argparse.Namespace, runtime: Runtime, data: Path, scratch: Path, recipe: Recipe, facts: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of mealfast at another batch size."""
    recipe = dataclasses.replace(recipe, tune_teachers=False)
    job, _, _ = make_job(recipe, runtime, RunDirectory(recipe.run_dir))
    names = [name for name in ("mealfast", "mealfast-replayed", "mealfast-cached") if name in args.names]
    contenders = [MAKERS[name](args, runtime, recipe, job, data, scratch) for name in names]
    rates = take_turns(contenders, args, runtime, recipe.batch_size)
    for contender in contenders:
        used = {"compiled": contender.compiled, "cuda_graph": contender.graph()}
        yield row(contender.name, rates[contender.name], facts | used | {"batch": recipe.batch_size})
        contender.close()


def recipe_for(args: argparse.Namespace, data: Path, scratch: Path, size: int, batch: int) -> Recipe:
    """The recipe of that size, with its architectures' random weights."""
    named = RECIPES[RECIPE_OF_SIZE[size]] if not args.student else {}
    untagged = [parse_spec(spec).architecture for spec in named.get("teachers", ())]
    return make_recipe(
        None,
        data=str(data),
        size=size,
        batch_size=batch,
        student=measured(args.student or parse_spec(named["student"]).architecture),
        teachers=tuple(map(measured, args.teachers or untagged)),
        run_dir=str(scratch / "run"),
        resume="never",
        device=args.device,
        amp=args.amp,
        compile=args.compile,
        cuda_graphs=args.cuda_graphs,
        tune_teachers=args.tune_teachers,
        loader=args.loader,
        seed=args.seed,
    )


# --- the contenders: each takes (args, runtime, recipe, job, data, scratch) -------------------------------------------


def baseline(args, runtime, recipe, job, data, scratch) -> Contender:
    made = Baseline(
        data / "train", bare(recipe.student), list(map(bare, recipe.teachers)), recipe.size, recipe.batch_size,
        runtime.device, args.workers,
    )  # fmt: skip
    drain = repeat(made.next_batch, 2 * args.workers)
    tf32 = runtime.device.type == "cuda" and torch.backends.cudnn.allow_tf32  # mealfast's setting, and this process's
    return Contender(
        "baseline", made.step, drain, made.close, settle=1.0, precision="float32 (TF32)" if tf32 else "float32"
    )


def timm_style(args, runtime, recipe, job, data, scratch) -> Contender:
    made = TimmStyle(
        data / "train", bare(recipe.student), list(map(bare, recipe.teachers)), recipe.size, recipe.batch_size,
        runtime.device,
        args.workers, precision(args.amp, runtime.device),
    )  # fmt: skip
    return Contender("timm-style", made.step, repeat(made.next_batch, 2 * args.workers), made.close, settle=1.0)


def mealfast(args, runtime, recipe, job, data, scratch) -> Contender:
    loader, step = job.loader(0, 1 << 30), job.step()
    batches = iter(loader)
    return Contender(
        "mealfast", lambda: step(next(batches), 0), repeat(lambda: next(batches), 3), loader.close,
        compiled=job.compiled, graph=lambda: job.cuda_graph(step),
    )  # fmt: skip


def mealfast_replayed(args, runtime, recipe, job, data, scratch) -> Contender:
    loader, step = job.loader(0, 1), job.step()
    batch = next(iter(loader))
    loader.close()
    return Contender(
        "mealfast-replayed", lambda: step(batch, 0), compiled=job.compiled, graph=lambda: job.cuda_graph(step)
    )


def models_alone(args, runtime, recipe, job, data, scratch) -> Contender:
    """The teachers, and the student forward and backward: what of a step is not mealfast's own."""
    loader = job.loader(0, 1)
    images = next(iter(loader)).images
    loader.close()

    def step() -> None:
        job.teachers(images)
        logits = job.student.logits(images)
        logits.backward(torch.ones_like(logits))
        job.optimiser.zero_grad()

    return Contender(
        "models-alone", step, compiled=job.compiled, graph=lambda: "ensemble" if job.teachers.captured else None
    )


def mealfast_cached(args, runtime, recipe, job, data, scratch) -> Contender:
    """A run of its own from a label cache of random targets: one view, ten probabilities."""
    cache = scratch / f"cache-{recipe.size}"
    if not cache.exists():
        made = {"views": 1, "top_k": 10, "classes": job.student.num_classes, "loader": recipe.loader}
        plan = view_plan(recipe, job.data.train, cycle=1)
        random_cache(cache, job.data.train, plan, argparse.Namespace(**made))
    fields = {name: value for name, value in recipe.to_json().items() if name not in ("teachers", "lr_decay_epochs")}
    fields |= {"label_cache": str(cache), "run_dir": str(scratch / "cached-run")}
    cached, _, _ = make_job(make_recipe(None, **fields), runtime, RunDirectory(scratch / "cached-run"))
    loader, step = cached.loader(0, 1 << 30), cached.step()
    batches = iter(loader)

    def close() -> None:
        loader.close()
        if recipe.batch_size != args.batch or not args.sweep:
            shutil.rmtree(cache, ignore_errors=True)

    return Contender(
        "mealfast-cached", lambda: step(next(batches), 0), repeat(lambda: next(batches), 3), close,
        compiled=cached.compiled, graph=lambda: cached.cuda_graph(step),
    )  # fmt: skip


MAKERS = {
    "baseline": baseline,
    "timm-style": timm_style,
    "mealfast": mealfast,
    "mealfast-replayed": mealfast_replayed,
    "models-alone": models_alone,
    "mealfast-cached": mealfast_cached,
}
NAMES = tuple(MAKERS)


# --- measuring --------------------------------------------------------------------------------------------------------


def take_turns(contenders: list[Contender], args, runtime: Runtime, batch: int) -> dict[str, list[float]]:
    """Images/s of every contender in every round."""
    timer = stages.Timer(runtime, batch, args.seconds)
    calls = {}
    for contender in list(contenders):
        began = time.perf_counter()
        # Compiles, fills queues, warms up, captures a CUDA graph of the step.
        try:
            timer.window(contender.step, timer.warm_up if runtime.device.type == "cuda" else 1)
            # Three: what its workers have decoded ahead in the others' turns would make or mar a single one.
            calls[contender.name] = max(3, round(args.seconds / timer.window(contender.step, 1)))
        except torch.OutOfMemoryError as error:
            left_out(contender.name, error)
            contenders.remove(contender)
            contender.close()
            continue
        print(
            f"{contender.name}: warmed up in {time.perf_counter() - began:.1f} s, {calls[contender.name]} steps a turn",
            file=sys.stderr,
            flush=True,
        )
    free(runtime)
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for number in requests() if args.on_request else range(args.rounds):
        if number and asked_to_end.is_set():
            break
        for contender in contenders:
            contender.drain()
            steps = calls[contender.name]
            rates[contender.name].append(batch * steps / timer.window(contender.step, steps))
            time.sleep(contender.settle)
        if args.on_request:
            print(json.dumps({name: found[-1] for name, found in rates.items()}), flush=True)
    return rates


def requests() -> Iterator[int]:
    """A number for each line on stdin, after one that says that everything is warm."""
    print(json.dumps({}), flush=True)
    for number, _ in enumerate(sys.stdin):
        yield number


def row(name: str, rates: list[float], facts: dict[str, Any]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else rates * 3
    spread = {"p25": round(low, 1), "p75": round(high, 1)}
    return record(name, images_per_second=round(middle, 1), spread=spread, rounds=len(rates), **facts)


def repeat(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            call()

    return repeated


@contextlib.contextmanager
def compile_cache(file: Path) -> Iterator[None]:
    """Compiled code is taken from a file, where there is one, and written there at the end."""
    if file.exists():
        torch.compiler.load_cache_artifacts(file.read_bytes())
    yield
    if (saved := torch.compiler.save_cache_artifacts()) is not None:
        with replacing(file) as temporary:
            temporary.write_bytes(saved[0])


def clocks() -> str | None:
    """The GPU's clocks now and at most, MHz: what a power limit does to a figure."""
    if not torch.cuda.is_available():
        return None
    query = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit"
    return _output("nvidia-smi", query, "--format=csv,noheader", "--id=0")


def left_out(what: str, error: Exception) -> None:
    print(f"{what}: left out: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)


def free(runtime: Runtime) -> None:
    gc.collect()
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()


def show(found: dict[str, Any], out: Path | None) -> None:
    spread = f"{found['spread']['p25']:,.1f} to {found['spread']['p75']:,.1f}"
    overhead = f"  overhead {100 * found['overhead']:.1f}%" if "overhead" in found else ""
    print(
        f"{found['name']:<44} {found['images_per_second']:>10,.1f} images/s  (quartiles {spread})  "
        f"size {found['size']}, batch {found['batch']}, {found['precision']}{overhead}",
        flush=True,
    )
    if out is not None:
        write(out, [found])


if __name__ == "__main__":
    main()
