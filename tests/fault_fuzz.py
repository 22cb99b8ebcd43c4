"""Files of others, mutated: each is refused in a line, set aside, or harmless; none crashes, hangs or eats the memory.

Each kind runs in a forked process of its own, with a limit on its memory and on the time of each mutation.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import fault_runs
import fault_soak
import numpy as np
import torch
from PIL import Image

import mealfast.models.weights
from mealfast.errors import UsageError
from mealfast.loaders import (
    DataError,
    ImageIndex,
    LabelCache,
    LabelWriter,
    ViewPlan,
    claim_label_cache,
    pack,
    train_loader,
)
from mealfast.machine import lock
from mealfast.machine import processes as runtimes
from mealfast.recipe import make_recipe
from mealfast.record import checkpoint
from mealfast.record.metrics import Telemetry
from mealfast.record.run_directory import RunDirectory
from mealfast.training import resume
from mealfast.training.assemble import make_job
from mealfast.training.loop import train

MEMORY = 2 << 30  # bytes beyond what the process has when it starts
SECONDS = 20  # for one mutation
EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def campaign(times: int, seed: int) -> dict[str, object]:
    """`times` mutations of each kind. Raises AssertionError where one does what none may."""
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="mealfast-fuzz-") as name:
        for kind, fuzz in KINDS.items():
            folder = Path(name) / kind
            folder.mkdir()
            log = folder / "log"
            pid = fault_runs.fork(lambda fuzz=fuzz, folder=folder: limited(fuzz, folder, times, seed), log)
            status = fault_runs.wait(pid, 60 + times * 2, log)
            assert status == 0, f"{kind}: status {status}: {log.read_text()[-4000:]}"
            outcomes[kind] = json.loads((folder / "result.json").read_text())
    return {
        "fault": f"mutated {', '.join(KINDS)}",
        "injected": times * len(KINDS),
        "outcome": "no crash, hang, code run or memory beyond the limit",
        "lost": "nothing",
        "counts": outcomes,
    }


def limited(fuzz: Callable, folder: Path, times: int, seed: int) -> None:
    """Runs one kind under the limits; what is wrong with a mutation is an exception or a signal."""
    faulthandler.enable()
    signal.signal(signal.SIGALRM, hung)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    counts: Counter = Counter()
    mutations = fuzz(folder, times, random.Random(f"{fuzz.__name__}-{seed}"))
    next(mutations)  # what is mutated has been made, and threads have started
    size = max(size, int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    before = fault_soak.resident_kib()
    while True:
        signal.alarm(SECONDS)
        outcome = next(mutations, None)
        signal.alarm(0)
        if outcome is None:
            break
        counts[outcome] += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {**counts, "peak MiB": max(peak - before, 0) // 1024}
    (folder / "result.json").write_text(json.dumps(result))


def hung(number, frame):
    raise AssertionError(f"a mutation took more than {SECONDS} seconds")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of the ways in which files go wrong, or are made to."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        if not content:
            break
        place = rng.randrange(len(content)) if rng.random() < 0.6 else min(int(rng.expovariate(0.02)), len(content) - 1)
        length = min(rng.choice((1, 1, 2, 4, 16, 256)), len(content) - place)
        match rng.randrange(7):
            case 0 | 1:
                content[place] ^= 1 << rng.randrange(8)
            case 2:
                content[place : place + length] = rng.randbytes(length)
            case 3:
                size = rng.choice((1, 2, 4, 8))
                value = (rng.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, rng.choice(("little", "big")))
                content[place : place + size] = value
            case 4:
                del content[place : place + length]
            case 5:
                content[place:place] = content[place : place + length]
            case 6 if rng.random() < 0.3:
                del content[place:]
    return bytes(content)


def one_line(error: Exception) -> str:
    assert "\n" not in str(error), repr(error)
    assert len(str(error)) > 10, repr(error)
    assert str(error).isprintable(), repr(error)
    return "refused"


def mutated_member(data: bytes, rng: random.Random) -> bytes:
    """A zip file with right checksums and one member mutated: one that says how to read others, where there is one."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        names = archive.namelist()
        chosen = rng.choice([name for name in names if name.endswith((".pkl", ".npy"))] or names)
        for name in names:
            content = archive.read(name)
            target.writestr(name, mutate(content, rng) if name == chosen else content)
    return out.getvalue()


def checkpoints(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """Taken up by a run, under a name without checksum, so that nothing but their reader stands between."""
    fields = fault_runs.tiny_fields(folder, max_steps=1, eval_start=False, run_dir=str(folder / "run"))
    train(make_recipe(**fields))
    (path,) = checkpoint.candidates(folder / "run" / "checkpoints")
    data, target = path.read_bytes(), folder / "c.pt"
    recipe = make_recipe(**{**fields, "resume": str(target)})
    directory = RunDirectory(folder / "run")
    job, _, _ = make_job(make_recipe(**fields), runtimes.start("cpu"), directory)
    yield ""
    for number in range(times):
        target.write_bytes(mutate(data, rng) if number % 2 else mutated_member(data, rng))
        try:
            found = resume.find(recipe, directory)
            resume.calendar(recipe, len(job.data.train), found)
            resume.take_up(found, job)
            yield "taken up"
        except UsageError as error:
            yield one_line(error)


def weights(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """Of timm's keys, as .pth and as .safetensors."""
    fault_runs.tiny_fields(folder)
    state = torch.load(folder / "test_resnet.pth", weights_only=True)
    from safetensors.torch import save

    both = {".pth": (folder / "test_resnet.pth").read_bytes(), ".safetensors": save(state)}
    yield ""
    for number in range(times):
        suffix = rng.choice(list(both))
        target = folder / f"w{suffix}"
        inside = suffix == ".pth" and number % 2
        target.write_bytes(mutated_member(both[suffix], rng) if inside else mutate(both[suffix], rng))
        try:
            mealfast.models.weights.read(target)
            yield "read"
        except UsageError as error:
            yield one_line(error)


def run_directories(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """What a run reads again of its own folder: config.json, metrics.jsonl, and what a holder's lock says."""
    fields = fault_runs.tiny_fields(folder, max_steps=1, eval_start=False, run_dir=str(folder / "run"))
    recipe, directory = make_recipe(**fields), RunDirectory(folder / "run")
    train(recipe)
    paths = (directory.config, directory.path / "metrics.jsonl", directory.path / lock.NAME)
    lock.PATIENCE = 0.0
    with lock.hold(directory.path):
        whole = {path: path.read_bytes() for path in paths}
        yield ""
        for number in range(times):
            for path, data in whole.items():
                path.write_bytes(mutate(data, rng))
            try:
                if number % 3 == 0:
                    with lock.hold(directory.path):
                        raise AssertionError("two hold one folder")
                elif number % 3 == 1:
                    Telemetry(directory.path, 5, lambda line: line["step"] < 5, lambda line: None).close()
                else:
                    directory.check(recipe)
                yield "read"
            except UsageError as error:
                yield one_line(error)


def label_caches(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """Header or targets."""
    from loaders.test_label_cache import make_header, write  # of tests/, whose programs have it first on sys.path

    whole, target = folder / "whole", folder / "cache"
    write(whole, make_header())
    names = [path.name for path in whole.iterdir()]
    rows = np.arange(5)
    yield ""
    for _ in range(times):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(whole, target)
        name = rng.choice([*names, "header.json", "header.json"])
        (target / name).write_bytes(mutate((target / name).read_bytes(), rng))
        try:
            cache = LabelCache(target)
            cache.require_complete()
            for view in range(cache.header.views):
                ids, probabilities = cache.targets(view, rows[: cache.header.images])
                assert ids.min() >= 0
                assert ids.max() < cache.header.classes
                assert np.isfinite(probabilities).all()
            yield "read"
        except DataError as error:
            yield one_line(error)


def growing_label_caches(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """Header or rows of views that are not complete: what they lose is made again, and the views are the same."""
    from loaders.test_label_cache import N, add, content, make_header, write

    whole, begun, target = folder / "whole", folder / "begun", folder / "cache"
    write(whole, make_header())
    with claim_label_cache(begun, make_header()), closing(LabelWriter(begun)) as writer:
        for view, first, last in ((0, 0, 9), (0, 9, 20), (2, 5, N), (0, 18, N)):
            add(writer, view, np.arange(first, last))
    views = {name: data for name, data in content(whole).items() if name.startswith("view")}
    yield ""
    for _ in range(times):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(begun, target)
        name = rng.choice(["header.json", "rows-0000-0.bin", "rows-0000-0.bin", "rows-0002-0.bin"])
        (target / name).write_bytes(mutate((target / name).read_bytes(), rng))
        try:
            write(target, make_header())
        except DataError as error:
            yield one_line(error)
        else:
            made = content(target)
            assert made.keys() == views.keys() | {"header.json"}
            assert all(made[name] == data for name, data in views.items())
            yield "made"


def indexes(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """The stored index of a tree: the scan finds what it found without, or takes sizes from it that batches refute."""
    fault_runs.write_images(folder / "data", {"train": 3})
    root = folder / "data" / "train"
    right = ImageIndex.scan(root, workers=1).digest
    stored = root / ".mealfast-index.npz"
    data = stored.read_bytes()
    yield ""
    for number in range(times):
        stored.write_bytes(mutate(data, rng) if number % 2 else mutated_member(data, rng))
        try:
            index = ImageIndex.scan(root, workers=1)
            yield "right" if index.digest == right else use(index)
        except DataError as error:
            yield one_line(error)


def packs(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """Index or shards of a pack, and its images read."""
    fault_runs.write_images(folder / "data", {"train": 3})
    whole, target = folder / "whole", folder / "pack"
    pack(ImageIndex.scan(folder / "data" / "train", workers=1), whole, workers=1)
    names = [path.name for path in whole.iterdir() if path.suffix != ".idx"]
    yield ""
    for number in range(times):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(whole, target)
        name = rng.choice(names)
        data = (target / name).read_bytes()
        inside = name.endswith(".npz") and number % 2
        (target / name).write_bytes(mutated_member(data, rng) if inside else mutate(data, rng))
        try:
            yield use(ImageIndex.scan(target, workers=1))
        except DataError as error:
            yield one_line(error)


def use(index: ImageIndex) -> str:
    """Two batches of an index whose content may be wrong."""
    plan = ViewPlan(index.widths, index.heights, seed=1, size=16)
    loader = train_loader("pillow", index, plan, batch_size=min(4, len(index)), stop_step=2, threads=1)
    try:
        for batch in loader:
            assert batch.images.shape[1:] == (16, 16, 3)
    finally:
        loader.close()
    return "used"


def images(folder: Path, times: int, rng: random.Random) -> Iterator[str]:
    """Of six formats, set aside by the scan or shown by both loaders, which replace what they cannot open."""
    from mealfast.loaders.broken_files import BrokenFiles

    originals = {}
    rng_pixels = np.random.default_rng(0)
    for number, (suffix, kind) in enumerate(
        {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}.items()
    ):
        out = io.BytesIO()
        pixels = rng_pixels.integers(0, 256, (40 + number, 56, 3), np.uint8)
        Image.fromarray(pixels).save(out, kind, **({"progressive": True} if number % 2 else {}))
        originals[suffix] = out.getvalue()
    grown = io.BytesIO()
    Image.fromarray(pixels).save(grown, "JPEG", quality=80, progressive=True)
    originals["jpeg"] = grown.getvalue()
    root = folder / "images"
    (root / "a").mkdir(parents=True)
    for number in range(4):
        (root / "a" / f"whole-{number}.jpg").write_bytes(originals["jpg"])
    BrokenFiles.add = no_limit(BrokenFiles.add)
    for backend in ("dali", "pillow"):
        show(ImageIndex.scan(root, workers=1), backend)
    yield ""
    for first in range(0, times, 50):  # a tree at a time: building DALI's pipeline takes longer than reading
        paths = []
        for number in range(first, min(first + 50, times)):
            suffix = rng.choice([*originals, "jpg", "jpeg", "png"])
            paths.append(root / "a" / f"{number}.{suffix}")
            paths[-1].write_bytes(mutate(originals[suffix], rng))
        index = ImageIndex.scan(root, workers=1)
        kept = len(index) - 4
        shown = 0
        for backend in ("dali", "pillow"):
            replaced = show(index, backend)
            shown = max(shown, kept - replaced)
        yield from ["quarantined"] * (len(paths) - kept)
        yield from ["replaced"] * (kept - shown)
        yield from ["shown"] * shown
        for path in paths:
            path.unlink()


def no_limit(add: Callable) -> Callable:
    """Files that break after the scan end a run beyond 0.1%: here all are to be tried."""

    def called(self, i, reason):
        self._limit = 1 << 30
        return add(self, i, reason)

    return called


def show(index: ImageIndex, backend: str) -> int:
    """Every image once; how many were replaced."""
    plan = ViewPlan(index.widths, index.heights, seed=1, size=16)
    loader = train_loader(backend, index, plan, batch_size=1, stop_step=len(index), threads=1)
    try:
        for batch in loader:
            assert batch.images.shape == (1, 16, 16, 3)
        return len(loader.replaced)
    finally:
        loader.close()


KINDS = {
    "checkpoints": checkpoints, "weights": weights, "run directories": run_directories, "label caches": label_caches,
    "growing label caches": growing_label_caches, "indexes": indexes, "packs": packs, "images": images,
}  # fmt: skip
