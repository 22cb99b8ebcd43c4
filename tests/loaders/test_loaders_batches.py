"""Batches: the same global batches for any ranks and start, exact evaluation, files that break during a run."""

import ctypes
import fcntl
import logging
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mealfast.loaders import (
    DataError,
    EvalViews,
    ImageIndex,
    LoaderStopped,
    LoaderTimeoutError,
    ViewPlan,
    dali_pipeline,
    eval_loader,
    pack,
    threads_are_blocked,
    train_loader,
)
from mealfast.loaders.dali import copy_into
from mealfast.loaders.steps import EvalSteps, TrainSteps

BACKENDS = ["pillow", "dali"]
N, SIZE = 50, 16


@pytest.fixture
def tree(tmp_path):
    """50 JPEGs of noise in 5 classes, one of them a PNG, so that Pillow's overlay takes part everywhere."""
    rng = np.random.default_rng(0)
    root = tmp_path / "data"
    for k in range(N):
        path = root / f"class{k % 5}" / f"{k:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + k, 60 - k, 3), np.uint8)
        Image.fromarray(pixels).save(path, "PNG" if k == 7 else "JPEG")
    return root


@pytest.fixture
def index(tree):
    return ImageIndex.scan(tree)


def make_plan(index, seed=5, **options):
    return ViewPlan(index.widths, index.heights, seed=seed, size=SIZE, **options)


def train(backend, index, **options):
    options = {"batch_size": 8, "stop_step": 12, "threads": 2, **options}
    return train_loader(backend, index, make_plan(index), **options)


def run(loader):
    batches = list(loader)
    loader.close()
    return batches


def position(index, name):
    return [index.relative_path(i) for i in range(len(index))].index(name)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_global_batches_are_the_same_for_any_ranks_and_start(index, world_size, start):
    plan = make_plan(index)
    stop = 7
    parts = [
        TrainSteps(index, plan, batch_size=24, start_step=start, stop_step=stop, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert all(len(part) == stop - start for part in parts)
    for k in range(stop - start):
        epoch, step = divmod(start + k, N // 24)  # straight from the plan's definition
        rows = plan.order(epoch)[24 * step : 24 * (step + 1)]
        boxes, flips = plan.views(epoch)
        views = [part.views(k) for part in parts]
        np.testing.assert_array_equal(np.concatenate([view.indices for view in views]), rows)
        np.testing.assert_array_equal(np.concatenate([view.boxes for view in views]), boxes[rows])
        np.testing.assert_array_equal(np.concatenate([view.flips for view in views]), flips[rows])
    for part in parts:
        part.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_resumed_runs_see_the_same_pixels(index, backend):
    whole = run(train(backend, index))
    assert len(whole) == 12  # two epochs of six batches: the loader runs on over the boundary
    resumed = run(train(backend, index, start_step=5))
    ranks = [run(train(backend, index, rank=rank, world_size=2, threads=1)) for rank in range(2)]
    for step, batch in enumerate(whole):
        assert batch.images.shape == (8, SIZE, SIZE, 3)
        assert (batch.images.dtype, batch.labels.dtype, batch.indices.dtype) == (torch.uint8, torch.int64, torch.int64)
        assert batch.labels.tolist() == index.labels[batch.indices.numpy()].tolist()
        others = [torch.cat([ranks[0][step].images, ranks[1][step].images])]
        others += [resumed[step - 5].images] if step >= 5 else []
        for other in others:
            assert torch.equal(batch.images, other)
    for epoch in (whole[:6], whole[6:]):
        assert len(set(torch.cat([batch.indices for batch in epoch]).tolist())) == 48  # no image twice
    assert not torch.equal(whole[0].indices, whole[6].indices)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 50), (1, 7), (3, 4), (64, 3)])
def test_evaluation_shows_every_image_once(index, backend, world_size, batch_size):
    views = EvalViews(SIZE, 18)
    seen = {}
    ranks = range(world_size) if world_size < 10 else (0, 17, 49, 50, 63)
    for rank in ranks:
        loader = eval_loader(backend, index, views, batch_size=batch_size, rank=rank, world_size=world_size, threads=1)
        expected = list(range(rank, N, world_size))
        assert len(loader) == -(-len(expected) // batch_size)
        for _ in range(2):  # a loader serves every evaluation of a run
            batches = list(loader)
            assert [i for batch in batches for i in batch.indices.tolist()] == expected
        for batch in batches:
            seen.update(zip(batch.indices.tolist(), batch.images, strict=True))
        loader.close()
    if world_size < 10:
        assert sorted(seen) == list(range(N))
        reference = torch.cat([b.images for b in run(eval_loader("pillow", index, views, batch_size=N))])
        together = torch.stack([seen[i] for i in range(N)])
        assert (together.int() - reference.int()).abs().float().mean() < 0.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_stay_as_they_were_while_others_are_made(index, backend):
    loader = train(backend, index)
    held = []
    for batch in loader:
        held.append((batch.images, batch.images.clone()))
    for images, copy in held:
        assert torch.equal(images, copy)
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_consumer_may_leave_early_and_come_back(index, backend, monkeypatch):
    loader = train(backend, index)
    first = next(iter(loader)).images.clone()
    left = iter(loader)
    next(left)
    again = list(loader)  # while the iterator that was left still lives
    assert len(again) == 12
    assert torch.equal(first, again[0].images)
    assert torch.equal(again[6].indices, run(train(backend, index, start_step=6))[0].indices)
    with pytest.raises(RuntimeError, match="one iteration at a time"):
        next(left)
    assert len(list(loader)) == 12
    unheard = []
    monkeypatch.setattr(sys, "unraisablehook", unheard.append)
    left = iter(loader)  # and one that outlives its loader
    next(left)
    loader.close()
    loader.close()
    del left
    assert not unheard
    for thread in threading.enumerate():
        if thread.name.startswith("mealfast"):
            thread.join(10)
    assert not [t.name for t in threading.enumerate() if t.name.startswith("mealfast")]


def damage(path, how):
    data = path.read_bytes()
    if how == "vanished":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":  # as long as it was: nothing tells before it is decoded
        path.write_bytes(bytes(len(data)))
    elif how == "resized":
        Image.new("RGB", (9, 9)).save(path, "JPEG")
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "pipe":  # at which whoever opens it would wait for ever
        path.unlink()
        os.mkfifo(path)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["vanished", "truncated", "empty", "garbage", "resized", "folder", "pipe"])
def test_a_file_that_breaks_during_a_run_is_replaced(tree, index, backend, how, caplog):
    whole = run(train(backend, index))
    broken = "class3/13.jpg"
    damage(tree / broken, how)
    caplog.set_level(logging.WARNING)
    loader = train(backend, index, timeout=10)  # a tenth of it, and DALI is freed of the pipe
    batches = run(loader)
    bad = position(index, broken)
    assert len(batches) == 12
    shown = 0
    for batch, before in zip(batches, whole, strict=True):
        assert bad not in batch.indices.tolist()
        for row, (i, was) in enumerate(zip(batch.indices.tolist(), before.indices.tolist(), strict=True)):
            if was == bad:
                shown += 1
                assert i == (bad + 1) % N  # the next image of the index, its view of this epoch
                assert batch.labels[row] == index.labels[i]
                assert batch.images[row].float().std() > 10
            else:
                assert i == was
                assert torch.equal(batch.images[row], before.images[row])
    assert shown in (1, 2)  # two epochs, each without two of the fifty
    assert list(loader.replaced) == [broken]
    assert loader.replaced[broken]
    assert loader.replaced_count == shown
    assert len([record for record in caplog.records if broken in record.getMessage()]) == 1  # named once
    again = run(train(backend, index, timeout=10))
    assert all(torch.equal(a.images, b.images) for a, b in zip(again, batches, strict=True))


def test_a_file_that_became_another_kind_is_rendered_by_pillow(tree, index):
    # Still an image of the indexed size, so nothing is replaced; but no longer one that DALI decodes as Pillow does.
    i = position(index, "class3/13.jpg")
    with Image.open(index.path(i)) as image:
        image.convert("CMYK").save(index.path(i), "JPEG", quality=50)
    views = EvalViews(SIZE, 18)
    found, expected = (run(eval_loader(backend, index, views, batch_size=N))[0].images[i] for backend in BACKENDS)
    assert torch.equal(found, expected)


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="needs Linux's file leases, which make an open wait")
def test_a_disk_that_does_not_answer_ends_the_wait_for_it(tree, index, stall, tmp_path):
    pack(index, tmp_path / "packed")
    packed = ImageIndex.scan(tmp_path / "packed")
    places = {id(index): tree / "class3/13.jpg", id(packed): tmp_path / "packed/shard-000000.tar"}
    loaders = [(which, train(backend, which, timeout=1.5)) for which in (index, packed) for backend in BACKENDS]
    for path in places.values():
        stall(path)

    def wait(which, loader):
        began = time.monotonic()
        with pytest.raises(LoaderTimeoutError) as error:
            list(loader)
        assert 1.5 < time.monotonic() - began < 15
        assert str(error.value).startswith(f"{places[id(which)]}: ")
        assert "--loader-timeout" in str(error.value)
        assert "\n" not in str(error.value)
        began = time.monotonic()
        loader.close()
        assert time.monotonic() - began < 10
        assert loader.stuck
        with pytest.raises(RuntimeError, match="closed"):
            next(iter(loader))

    with ThreadPoolExecutor(len(loaders)) as pool:  # at the same time, to wait only once
        for waiting in [pool.submit(wait, *one) for one in loaders]:
            waiting.result()
    assert threads_are_blocked()
    stall()  # the disk answers: everything ends by itself
    for _ in range(100):
        if not any(loader.stuck for _, loader in loaders):
            break
        time.sleep(0.1)
    assert not threads_are_blocked()


@pytest.mark.skipif(not hasattr(fcntl, "F_SETLEASE"), reason="needs Linux's file leases, which make an open wait")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_signal_ends_the_wait_for_a_batch(tree, index, backend, stall):
    received = []
    before = signal.signal(signal.SIGALRM, lambda *_: received.append(time.monotonic()))
    loader = eval_loader(
        backend, index, EvalViews(SIZE, 18), batch_size=8, threads=2, stopping=lambda: bool(received), timeout=60
    )
    stall(tree / index.relative_path(30))
    batches = iter(loader)
    try:
        next(batches)  # a signal that comes while no one waits takes no batch away
        signal.raise_signal(signal.SIGALRM)
        next(batches)
        received.clear()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(LoaderStopped):
            list(batches)
        assert time.monotonic() - received[0] < 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        stall()
        loader.close()
    assert not loader.stuck


@pytest.mark.parametrize("backend", BACKENDS)
def test_too_many_broken_files_end_the_run(tree, index, backend, caplog):
    for name in ("class3/13.jpg", "class0/05.jpg", "class1/06.jpg", "class4/19.jpg"):
        (tree / name).unlink()
    loader = train(backend, index)
    with pytest.raises(DataError, match=r"broke after they were indexed.*0\.1%") as error:
        list(loader)
    assert "\n" not in str(error.value)
    loader.close()
    assert len(caplog.records) == 1  # the rest is in the error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["vanished", "truncated", "garbage", "resized"])
def test_evaluation_refuses_a_broken_file(tree, index, backend, how):
    damage(tree / "class3/13.jpg", how)
    loader = eval_loader(backend, index, EvalViews(SIZE, 18), batch_size=16)
    with pytest.raises(DataError, match=r"class3/13\.jpg") as error:
        list(loader)
    assert "\n" not in str(error.value)
    loader.close()


def test_labels_of_unlabelled_images(tree):
    (tree / "class0/00.jpg").rename(tree / "loose.jpg")
    index = ImageIndex.scan(tree)
    batches = run(eval_loader("dali", index, EvalViews(SIZE, 18), batch_size=N))
    assert batches[0].labels[-1] == -1
    assert batches[0].labels[0] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 51}, "--batch-size 51"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"batch_size": 8, "world_size": 3}, "--batch-size 8.*3 processes"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"start_step": 13}, "steps 13 to 12"),
        ({"threads": 0}, "threads 0"),
        ({"backend": "magic"}, "--loader magic.*dali or pillow"),
    ],
)
def test_bad_options_get_one_line(index, options, words):
    options = {"backend": "pillow", **options}
    with pytest.raises(DataError, match=words) as error:
        train(options.pop("backend"), index, **options)
    assert "\n" not in str(error.value)


def test_decoder_settings_reach_dali(index, monkeypatch):
    build = dali_pipeline.build_pipeline
    decoding = dali_pipeline.GpuDecoding(hardware_share=0.9)
    asked = []
    monkeypatch.setattr(
        "mealfast.loaders.dali.build_pipeline", lambda **options: asked.append(options) or build(**options)
    )
    run(train("dali", index, decoding=decoding))
    assert [options["decoding"] for options in asked] == [decoding]


def test_gpu_batches_reach_torch_by_one_copy_on_its_stream():
    """A stand-in for DALI's outputs on a GPU, which fills the memory and notes what it was asked for."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 5, 3), np.uint8)
    copies = []

    class Outputs:
        def __len__(self):
            return len(pixels)

        def shape(self):
            return [one.shape for one in pixels]

        def copy_to_external(self, to, stream=None, non_blocking=False):
            copies.append((to.value, stream.value, non_blocking))
            ctypes.memmove(to, pixels.ctypes.data, pixels.nbytes)

    images = torch.zeros(3, 5, 5, 3, dtype=torch.uint8)
    copy_into(images, Outputs(), SimpleNamespace(cuda_stream=0x5EA))
    assert copies == [(images.data_ptr(), 0x5EA, True)]
    assert torch.equal(images, torch.from_numpy(pixels))
    with pytest.raises(RuntimeError, match="shapes"):  # and nothing is written beyond the end
        copy_into(torch.zeros(2, 5, 5, 3, dtype=torch.uint8), Outputs(), None)
    assert len(copies) == 1


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_loader_recovers_wherever_a_batch_fails(tree, index, where):
    # A file that only decoding shows to be broken, in the first or the last batch of an evaluation; then it is mended.
    path = tree / index.relative_path(0 if where == "first" else N - 1)
    good = path.read_bytes()
    loader = eval_loader("dali", index, EvalViews(SIZE, 18), batch_size=4)
    expected = [batch.images for batch in loader]
    path.write_bytes(bytes(len(good)))
    with pytest.raises(DataError):
        list(loader)
    path.write_bytes(good)
    found = [batch.images for batch in loader]
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.int() - theirs.int()).abs().float().mean() < 0.3
    loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_images_get_one_line_instead_of_pillows_warnings(tree, backend, caplog, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1390)  # of 50 images, 20 have more
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        index = ImageIndex.scan(tree)
        run(train(backend, index))
    large = index.widths.astype(int) * index.heights > 1390
    assert 5 < large.sum() < 45
    assert not shown
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{large.sum()} images" in line
    assert index.display_path(int(np.flatnonzero(large)[0])) in line
    assert "\n" not in line


@pytest.mark.parametrize("backend", BACKENDS)
def test_epochs_come_one_at_a_time(index, backend):
    """Of 50 images in batches of 8 an epoch has 6 steps; the rest of an epoch that is left is dropped."""
    plan = make_plan(index)
    with closing(train(backend, index, stop_step=None, epochs=3)) as loader:
        assert len(loader) == 18
        found = {epoch: [batch.indices.tolist() for batch in batches] for epoch, batches in loader.epochs()}
        assert list(found) == [0, 1, 2]
        for epoch, rows in found.items():
            assert np.concatenate(rows).tolist() == plan.order(epoch)[:48].tolist()
        firsts = [(epoch, next(batches).indices.tolist()) for epoch, batches in loader.epochs()]
        assert firsts == [(epoch, rows[0]) for epoch, rows in found.items()]
    with closing(train(backend, index, stop_step=None, start_step=4)) as loader:  # one epoch, where none is said
        assert [(epoch, len(list(batches))) for epoch, batches in loader.epochs()] == [(0, 2)]
    with closing(eval_loader(backend, index, EvalViews(SIZE, 18), batch_size=20)) as loader:
        assert [(epoch, sum(len(b.labels) for b in batches)) for epoch, batches in loader.epochs()] == [(0, 50)]
    with pytest.raises(DataError, match="stop_step or epochs"):
        train(backend, index, epochs=1)


def test_a_plan_for_other_images_is_refused(index):
    plan = ViewPlan(index.widths[1:], index.heights[1:], seed=0, size=SIZE)
    with pytest.raises(DataError, match=r"made for 49 images.*holds 50"):
        train_loader("pillow", index, plan, batch_size=8, stop_step=1)


def test_missing_dali_says_what_to_do(index, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("nvidia.dali", "mealfast.loaders.dali"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(DataError, match=r"--loader dali.*pip install.*--loader pillow") as error:
        train("dali", index)
    assert "\n" not in str(error.value)


def test_eval_steps_hold_no_image_for_a_rank_too_many(index):
    steps = EvalSteps(index, EvalViews(SIZE, 18), batch_size=4, rank=60, world_size=64)
    assert len(steps) == 0
    with pytest.raises(DataError, match="--batch-size 0"):
        eval_loader("pillow", index, EvalViews(SIZE, 18), batch_size=0)
