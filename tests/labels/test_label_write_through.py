"""Write-through: a live run leaves the cache that `labels build` makes, whatever stops it, and learns what it would."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from mealfast.__main__ import dispatch
from mealfast.errors import UsageError
from mealfast.loaders import DataError, ImageIndex, LabelCache, LabelWriter, ViewPlan
from mealfast.measure import forecast
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.recipe import make_recipe
from mealfast.training.loop import train
from mealfast.training.outputs import Outputs
from mealfast.training.step import Step

from ..runs import assert_same_run, die, differences, last, lines_but_speeds

VIEWS, K = 2, 2


@pytest.fixture(scope="module")
def teachers(weights):
    return f"test_resnet@{weights('test_resnet', 2)}", f"test_efficientnet@{weights('test_efficientnet', 3)}"


@pytest.fixture(scope="module")
def writing(fields, teachers):
    """Fields of a run of three epochs, three steps each, that writes two views: 24 of 25 images in steps."""
    return fields | {
        "teachers": teachers, "log_every": 1, "discriminator": "off", "lr": 0.01, "eval_start": False,
        "label_cache_views": VIEWS, "label_cache_top_k": K, "tune_teachers": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def everything(writing):
    """Dropout, CutMix, discriminator, labels, accumulation: all that a resumed run could lose the thread of."""
    spec = writing["student"].replace("@", "?drop_rate=0.3@")
    changes = {"student": spec, "cutmix": True, "discriminator": "cooperative", "hard_label_weight": 0.2}
    return writing | changes | {"accumulate": 2}


def run(fields, folder, cache=None, **changes):
    """A run in `folder` that writes `folder`-cache, or another."""
    cache = cache or f"{folder}-cache"
    return train(make_recipe(**{**fields, "run_dir": str(folder), "label_cache": str(cache), **changes}))


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def whole(writing, tmp_path_factory):
    """A run that never stopped, with its cache beside it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(writing, folder)
    return folder


@pytest.fixture(scope="module")
def left(writing, tmp_path_factory):
    """A run that stopped after two steps of the second epoch, with its cache beside it."""
    folder = tmp_path_factory.mktemp("left") / "run"
    run(writing, folder, max_steps=5)
    return folder


@pytest.fixture
def taken_up(left, tmp_path):
    """A copy of it to go on with, and the copy's cache."""
    return Path(shutil.copytree(left, tmp_path / "run")), Path(shutil.copytree(f"{left}-cache", tmp_path / "run-cache"))


@pytest.fixture(scope="module")
def built(tree, teachers, tmp_path_factory):
    """What `labels build` makes of the same views in batches of the same size."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    argv = [
        "labels", "build", "--data", str(tree), "--teachers", *teachers, "--size", "32", "--views", str(VIEWS),
        "--top-k", str(K), "--batch-size", "8", "--amp", "off", "--device", "cpu", "--no-compile", "--no-tune-teachers",
        "--loader", "pillow",
        "--loader-threads", "2", "--out", str(folder),
    ]  # fmt: skip
    assert dispatch(argv) == 0
    return folder


def assert_close(ours, theirs):
    """Two caches of the same targets, up to the rounding of batches that were put together otherwise."""
    one, other = LabelCache(ours), LabelCache(theirs)
    assert one.header.is_complete
    assert one.header.plan == other.header.plan
    for view in range(VIEWS):
        (ids, p), (other_ids, q) = (cache.targets(view, np.arange(25)) for cache in (one, other))
        np.testing.assert_array_equal(ids, other_ids)
        np.testing.assert_allclose(p, q, rtol=2**-10)  # one step of float16


def test_the_first_student_learns_as_from_live_teachers(writing, whole, tmp_path):
    """Every loss and the weights after the live epochs, to the bit."""
    live = {**writing, "label_cache_views": None, "label_cache_top_k": None, "run_dir": str(tmp_path / "live")}
    train(make_recipe(**live, max_steps=6))
    ours, theirs = (
        [line for line in lines_but_speeds(folder) if line["step"] <= 6 and line["kind"] == "train"][:6]
        for folder in (whole, tmp_path / "live")
    )
    assert ours == theirs
    run(writing, tmp_path / "six", max_steps=6)
    assert differences(last(tmp_path / "six")["student"], last(tmp_path / "live")["student"]) == []


def test_the_cache_is_that_of_labels_build(whole, built):
    """The same bytes but for the 25th image of each epoch, whose batch is another: there one step of float16."""
    ours = f"{whole}-cache"
    assert_close(ours, built)
    one, other = LabelCache(ours).header, LabelCache(built).header
    assert dataclasses.replace(one, complete=()) == dataclasses.replace(other, complete=())
    plan = ViewPlan(np.full(25, 40), np.full(25, 40), seed=0, size=32)  # the order needs no sizes
    for view in range(VIEWS):
        in_steps = plan.order(view)[:24]
        assert (LabelCache(ours).view(view)[in_steps] == LabelCache(built).view(view)[in_steps]).all()
    assert sorted(content(ours)) == sorted(content(built))


def test_no_teacher_runs_once_the_cache_is_there(writing, tmp_path, monkeypatch):
    """The check at the start, two views of three steps and a remainder, then val/: the third epoch needs none."""
    seen, real = [], FrozenEnsemble.__call__

    def counted(self, images):
        seen.append(len(images))
        return real(self, images)

    monkeypatch.setattr(FrozenEnsemble, "__call__", counted)
    run(writing, tmp_path / "run", eval_every=0)
    assert seen == [8, *(8, 8, 8, 1) * 2, 8, 3]
    seen.clear()
    run(writing, tmp_path / "second", tmp_path / "run-cache")  # complete: the same options read it
    assert seen == []
    assert last(tmp_path / "second")["identity"]["teachers"] == {}


def test_steps_that_are_only_measured_write_nothing(writing, whole, tmp_path, monkeypatch):
    measured = forecast.forecast
    monkeypatch.setattr(forecast, "forecast", lambda job, seconds, say, first: measured(job, 0.02, say, first))
    fields = {**writing, "run_dir": str(tmp_path / "run"), "label_cache": str(tmp_path / "run-cache")}
    train(make_recipe(**fields), forecast.stage_report)
    assert_same_run(tmp_path / "run", whole)
    assert content(tmp_path / "run-cache") == content(f"{whole}-cache")


def test_later_epochs_read_what_the_run_wrote(writing, whole, tmp_path):
    """The third epoch is one of a run from the finished cache, taken up from the same weights."""
    six = tmp_path / "six"
    run(writing, six, max_steps=6)
    for name in ("view-0000.bin", "view-0001.bin"):
        (tmp_path / "six-cache" / name).write_bytes((Path(f"{whole}-cache") / name).read_bytes())
    run(writing, six)
    assert_same_run(six, whole)
    targets = LabelCache(f"{whole}-cache").targets(0, np.arange(25))
    seen, real = [], Step.__call__

    def recorded(self, batch, step):
        seen.append((step, batch.targets, batch.indices))
        return real(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", recorded)
        run(writing, tmp_path / "again", f"{whole}-cache", seed=0)
    for step, found, indices in seen[:3] + seen[6:9]:
        assert step in (0, 1, 2, 6, 7, 8)
        np.testing.assert_array_equal(found[0], targets[0][indices])
        np.testing.assert_array_equal(found[1], targets[1][indices])


@pytest.fixture(scope="module")
def whole_everything(everything, tmp_path_factory):
    folder = tmp_path_factory.mktemp("everything") / "run"
    run(everything, folder)
    return folder


@pytest.mark.parametrize("stops", [(3,), (2, 7)], ids=str)
def test_a_stopped_run_goes_on_as_if_it_had_not(everything, whole_everything, tmp_path, stops):
    for stop in stops:
        run(everything, tmp_path / "stopped", max_steps=stop)
    run(everything, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", whole_everything)
    assert content(tmp_path / "stopped-cache") == content(f"{whole_everything}-cache")


@pytest.mark.parametrize("at", [2, 3, 8])
def test_a_run_that_dies_anywhere_goes_on(writing, whole, tmp_path, monkeypatch, at):
    """Checkpoint and cache then disagree; after step 3 the view of a saved epoch is unfinished."""
    finish, step = Outputs.finish_views, Step.__call__

    def dies_between(self, epochs):
        if 3 * epochs.stop == at:
            die()
        return finish(self, epochs)

    def dies_within(self, batch, number):
        if number == at and at % 3:
            die()
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Outputs, "finish_views", dies_between)
        patch.setattr(Step, "__call__", dies_within)
        with pytest.raises(KeyboardInterrupt):
            run(writing, tmp_path / "killed", checkpoint_every=2)
    run(writing, tmp_path / "killed")
    assert_same_run(tmp_path / "killed", whole)
    assert content(tmp_path / "killed-cache") == content(f"{whole}-cache")


def test_sigkill(writing, whole, tmp_path):
    """As soon as targets of the second view are on disk."""
    argv = [sys.executable, "-m", "mealfast", "train", "--no-compile", "--no-eval-start", "--no-tune-teachers"]
    argv += ["--checkpoint-every", "2"]
    for name, value in {**writing, "run_dir": tmp_path / "run", "label_cache": tmp_path / "run-cache"}.items():
        if not isinstance(value, bool):
            argv += ["--" + name.replace("_", "-"), *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if list((tmp_path / "run-cache").glob("rows-0001-*")):
            break
        time.sleep(0.002)
    process.kill()
    process.wait()
    run(writing, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)
    assert content(tmp_path / "run-cache") == content(f"{whole}-cache")


@pytest.mark.parametrize("harm", ["cut", "changed", "no cache"])
def test_a_cache_that_lost_targets_has_them_made_again(writing, whole, taken_up, harm):
    folder, cache = taken_up
    (rows,) = cache.glob("rows-*")
    assert rows.stat().st_size == 2 * 8 + 16 * (8 + 4 * K)
    if harm == "cut":
        os.truncate(rows, rows.stat().st_size - 5)
    elif harm == "changed":
        data = bytearray(rows.read_bytes())
        data[8 + 8 * 8 + 3] ^= 1
        rows.write_bytes(data)
        os.truncate(cache / "view-0000.bin", 9)
    else:
        shutil.rmtree(cache)
    run(writing, folder)
    assert_close(cache, f"{whole}-cache")
    assert sorted(content(cache)) == sorted(content(f"{whole}-cache"))


def test_another_run_goes_on_with_a_cache_that_a_run_left(writing, whole, taken_up, tmp_path, capsys):
    """Teachers run for the second view only; the first is read."""
    assert [one.view for one in LabelCache(taken_up[1]).header.complete] == [0]
    run(writing, tmp_path / "second", taken_up[1], label_cache_views=None, label_cache_top_k=None, seed=3)
    shown = capsys.readouterr().err
    assert "1 of 2 views complete; the teachers run in epochs 2 to 2" in shown
    assert_close(taken_up[1], f"{whole}-cache")
    assert json.loads((tmp_path / "second" / "config.json").read_text())["write_through"]["seed"] == 0


def test_labels_build_goes_on_with_it_and_it_with_a_build(writing, taken_up, built, tree, teachers, tmp_path):
    """In batches of any size."""
    argv = [
        "labels", "build", "--data", str(tree), "--teachers", *teachers, "--size", "32", "--views", str(VIEWS),
        "--top-k", str(K), "--batch-size", "5", "--amp", "off", "--device", "cpu", "--no-compile", "--no-tune-teachers",
        "--loader", "pillow",
    ]  # fmt: skip
    assert dispatch([*argv, "--out", str(taken_up[1])]) == 0
    assert_close(taken_up[1], built)
    assert sorted(content(taken_up[1])) == sorted(content(built))
    part = Path(shutil.copytree(built, tmp_path / "part"))
    header = json.loads((part / "header.json").read_text())
    header["complete"] = header["complete"][:1]
    header["made_with"]["batch_size"] = 5
    (part / "header.json").write_text(json.dumps(header))
    run(writing, tmp_path / "other", part)
    assert_close(part, built)


def test_a_cache_that_was_extended_meanwhile_keeps_its_views(writing, taken_up):
    ran, folder = taken_up
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "views": 3}))
    with closing(LabelWriter(folder, 5)) as writer:
        writer.add(2, np.arange(4), np.zeros((4, K)), np.zeros((4, K)))
    begun = (folder / "rows-0002-5.bin").read_bytes()
    assert run(writing, ran)["finished"]
    cache = LabelCache(folder)
    assert (cache.header.views, [one.view for one in cache.header.complete]) == (3, [0, 1])
    assert (folder / "rows-0002-5.bin").read_bytes() == begun


def test_a_file_that_broke_leaves_its_view_open_and_the_run_goes_on(writing, built, tree, tmp_path, capsys):
    """Its stand-ins' targets are written as theirs; once it is mended the cache is finished."""
    root = shutil.copytree(tree, tmp_path / "tree")
    ImageIndex.scan(root / "train")
    path = root / "train" / "bee" / "004.jpg"
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(b"not an image".ljust(len(data)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert run(writing, tmp_path / "run", data=str(root))["finished"]
    shown = capsys.readouterr().err
    assert "note: label cache: view 0 stays incomplete, and the teachers run where it is shown:" in shown
    assert "bee/004.jpg" in shown
    assert LabelCache(tmp_path / "run-cache").header.complete == ()
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    run(writing, tmp_path / "run", data=str(root))  # nothing is left to train, but the views are completed
    assert_close(tmp_path / "run-cache", built)


def test_two_processes(writing, tmp_path):
    """Each writes its share; stopped in the middle and taken up again they leave the same run and the same bytes."""
    recipes = {
        name: {**writing, "run_dir": str(tmp_path / name), "label_cache": str(tmp_path / f"{name}-cache")}
        for name in ("whole", "stopped", "left")
    }
    four = {"max_steps": 4}
    order = [recipes["whole"], recipes["stopped"] | four, recipes["stopped"], recipes["left"] | four]
    (tmp_path / "recipes.json").write_text(json.dumps(order))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        str(Path(__file__).parents[1] / "two_processes.py"), str(tmp_path / "recipes.json"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        shown, _ = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, shown[-4000:]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    assert content(tmp_path / "stopped-cache") == content(tmp_path / "whole-cache")
    run(writing, tmp_path / "one")
    assert_close(tmp_path / "whole-cache", tmp_path / "one-cache")
    assert len(list((tmp_path / "left-cache").glob("rows-0001-*"))) == 2
    assert run(writing, tmp_path / "left")["finished"]  # by one process, which takes up what two have written
    assert_close(tmp_path / "left-cache", tmp_path / "one-cache")


@pytest.mark.parametrize("rows", [8, 1], ids=["in a step", "between epochs"])
def test_a_full_disk_ends_the_run_and_keeps_what_was_written(writing, whole, tmp_path, monkeypatch, rows):
    real = os.write

    def full(descriptor, data):
        second_view = "rows-0001" in os.readlink(f"/proc/self/fd/{descriptor}")
        if second_view and len(data) == 8 + rows * (8 + 4 * K):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        DataError, match=r"--label-cache .*: No space left on device; what is complete is kept"
    ) as caught:
        run(writing, tmp_path / "run")
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert len(LabelCache(tmp_path / "run-cache").header.complete) == 1
    run(writing, tmp_path / "run")
    assert_same_run(tmp_path / "run", whole)


REFUSED = {
    "teachers": (
        {"teachers": ("test_resnet?num_classes=3&weights=random",)},
        r"holds a label cache with other targets: --teachers",
    ),
    "size": ({"size": 48}, r"other targets: --size \(size 32 there, 48 here\)"),
    "scale": ({"crop_scale": (0.2, 1.0)}, "other targets: --crop-scale"),
    "loader": ({"loader": "dali"}, "other targets: --loader"),
    "views": ({"label_cache_views": 5}, "has --label-cache-views 2, not 5: leave the option out"),
    "k": ({"label_cache_top_k": 3}, "has --label-cache-top-k 2, not 3: leave the option out"),
    "no teachers": ({"teachers": ()}, "1 of its 2 views are complete; .* train with the --teachers"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_of_something_else_is_left_alone(writing, left, tmp_path, case):
    changes, message = REFUSED[case]
    begun = f"{left}-cache"
    before = content(begun)
    with pytest.raises((UsageError, DataError), match=message) as caught:
        run(writing, tmp_path / "run", begun, **changes)
    assert "\n" not in str(caught.value)
    assert content(begun) == before
    assert not (tmp_path / "run").exists()


def test_what_is_no_cache_is_refused(writing, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"--label-cache .*thesis: holds something else"):
        run(writing, tmp_path / "run", tmp_path / "thesis")
    with pytest.raises(DataError, match="is a file; a cache is a folder"):
        run(writing, tmp_path / "run", writing["student"].partition("@")[2])
    run(writing, tmp_path / "other", max_steps=1)
    with pytest.raises(DataError, match=r"--label-cache .*other: holds something else"):  # a run directory
        run(writing, tmp_path / "run", tmp_path / "other")
    with pytest.raises(DataError, match=r"label cache .*other: has no header.json"):
        run(writing, tmp_path / "run", tmp_path / "other", teachers=())
    with pytest.raises(UsageError, match="--label-cache-top-k 4: the teachers have 3 classes"):
        run(writing, tmp_path / "run", label_cache_top_k=4)
    with pytest.raises(UsageError, match="--label-cache-views 2: needs --label-cache"):
        make_recipe(**writing)
    assert not (tmp_path / "run").exists()


def test_views_and_k_have_defaults(writing, tmp_path):
    run(writing, tmp_path / "run", label_cache_views=None, label_cache_top_k=None, epochs=1)
    header = LabelCache(tmp_path / "run-cache").header
    assert (header.is_complete, header.views, header.top_k) == (True, 1, 3)


def test_the_run_goes_on_only_with_what_it_began(writing, tmp_path):
    options = {**writing, "label_cache_views": None, "label_cache_top_k": None}
    run(options, tmp_path / "run", max_steps=4)
    with pytest.raises(UsageError, match="--label-cache: not the targets that the run of checkpoint"):
        train(make_recipe(**options, run_dir=str(tmp_path / "run")))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("changes", [{}, {"cutmix": True, "accumulate": 2}], ids=["plain", "CutMix"])
def test_on_a_gpu(writing, tree, teachers, tmp_path, changes):
    """Copies that nothing waits for bring the targets that the teachers give there, and the run is resumed."""
    gpu = {**writing, **changes, "device": "cuda", "discriminator": "cooperative"}
    run(gpu, tmp_path / "run", max_steps=5)
    assert run(gpu, tmp_path / "run")["finished"]
    verified = ["labels", "verify", str(tmp_path / "run-cache"), "--data", str(tree), "--teachers", *teachers]
    assert dispatch([*verified, "--sample", "99", "--device", "cuda"]) == 0
