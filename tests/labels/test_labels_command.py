"""`mealfast labels`: killed builds, one and two processes, info, verify, and what is refused."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mealfast.__main__ import dispatch
from mealfast.errors import UsageError
from mealfast.kernels import ensemble_target
from mealfast.loaders import DataError, ImageIndex, LabelCache, LabelWriter, ViewPlan, train_loader
from mealfast.models import normalised as models

VIEWS, K = 2, 2


@pytest.fixture(scope="module")
def teachers(weights):
    return [f"test_resnet@{weights('test_resnet', 2)}", f"test_efficientnet@{weights('test_efficientnet', 3)}"]


@pytest.fixture(scope="module")
def argv(tree, teachers):
    """`labels build` of 2 views of 25 images in batches of 1, which go to disk 16 and 9 at a time."""
    return [
        "labels", "build", "--data", str(tree), "--teachers", *teachers, "--size", "32", "--views", str(VIEWS),
        "--top-k", str(K), "--batch-size", "1", "--seed", "4", "--amp", "off", "--device", "cpu", "--no-compile",
        "--no-tune-teachers", "--loader", "pillow", "--loader-threads", "2", "--out",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def built(argv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built") / "cache"
    assert dispatch([*argv, str(folder)]) == 0
    return folder


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(argv, option, *values):
    """`argv` with the value of an option replaced."""
    at = argv.index(option)
    return [*argv[: at + 1], *values, *argv[at + 2 :]]


def test_targets_are_those_of_the_views_that_a_run_shows(built, tree, teachers):
    """The mean of the teachers' softmaxes on the training loader's own images, epoch e showing view e mod V."""
    index = ImageIndex.scan(tree / "train")
    cache = LabelCache(built)
    plan = ViewPlan(index.widths, index.heights, seed=4, size=32, cycle=VIEWS)
    loaded = [models.build(spec, 32).eval() for spec in teachers]
    loader = train_loader("pillow", index, plan, batch_size=5, stop_step=15, label_cache=cache)
    orders = set()
    for step, batch in enumerate(loader):
        with torch.no_grad():
            target = ensemble_target([model(batch.images) for model in loaded])
        ids, probabilities = batch.targets
        expected = target.topk(K, dim=1)
        assert torch.equal(ids.long(), expected.indices)
        torch.testing.assert_close(probabilities, expected.values, rtol=1e-3, atol=1e-6)
        stored = cache.targets(step // 5 % VIEWS, batch.indices.numpy())
        np.testing.assert_array_equal(stored[1], probabilities.numpy())
        orders.add(tuple(batch.indices.tolist()))
    loader.close()
    assert len(orders) == 15  # the third epoch shows the first's views in another order


@pytest.mark.parametrize("seed", range(3))
def test_a_build_that_stops_anywhere_ends_as_the_same_bytes(argv, built, tmp_path, monkeypatch, seed):
    folder, rng, real = tmp_path / "cache", np.random.default_rng(seed), LabelWriter.add
    left = [0]

    def add(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(LabelWriter, "add", add)
    written = 0
    while not (folder / "header.json").exists() or not LabelCache(folder).header.is_complete:
        left[0] = now = int(rng.integers(0, 3))
        try:
            dispatch([*argv, str(folder)])
        except KeyboardInterrupt:
            written += now
    assert written < 2 * VIEWS  # nothing was made twice
    assert content(folder) == content(built)


def test_two_processes_and_a_kill(argv, built, tmp_path):
    """SIGKILL to torchrun's two processes as soon as a target is on disk, then two processes again: the same bytes."""
    folder = tmp_path / "cache"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python",
        sys.executable, "-m", *("mealfast", *argv, str(folder)),
    ]  # fmt: skip
    first = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while first.poll() is None and not list(folder.glob("rows-*.bin")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert content(folder) == content(built)


def test_info(built, capsys):
    assert dispatch(["labels", "info", str(built), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["views"], facts["complete_views"], facts["complete"]) == (25, VIEWS, VIEWS, True)
    assert (facts["top_k"], facts["classes"], facts["bytes_per_view_and_image"]) == (K, 3, 4 * K)
    assert facts["bytes"] == facts["bytes_when_complete"] == 25 * VIEWS * 4 * K
    assert 2 / 3 <= facts["mean_kept"] <= 1
    assert 0 < facts["mean_entropy"] <= np.log(3)
    assert [teacher["spec"].partition("@")[0] for teacher in facts["teachers"]] == ["test_resnet", "test_efficientnet"]
    assert facts["plan"]["seed"] == 4
    assert dispatch(["labels", "info", str(built)]) == 0
    assert "2 of 2 views of 25 images, top 2 of 3 classes" in capsys.readouterr().out


def test_verify(built, tree, capsys):
    assert dispatch(["labels", "verify", str(built), "--data", str(tree), "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["checked"] == VIEWS
    assert result["recomputed"]["images"] == 4
    assert result["recomputed"]["mean_total_variation"] < 1e-3
    assert dispatch(["labels", "verify", str(built)]) == 0
    assert "2 of 2 views complete" in capsys.readouterr().out


def test_verify_takes_the_dtypes_of_the_build(argv, tree, needs_float32, tmp_path, capsys):
    """A teacher that ran in float32 because bfloat16 rounds away what it says: in bfloat16 it would not be itself."""
    cache = str(tmp_path / "cache")
    argv = changed(changed(argv, "--amp", "bf16"), "--batch-size", "5")
    at = argv.index("--teachers")
    assert dispatch([*argv[: at + 1], f"test_resnet@{needs_float32}", *argv[at + 3 :], cache]) == 0
    assert "is taken in float32" in capsys.readouterr().err
    verify = ["labels", "verify", cache, "--data", str(tree), "--device", "cpu"]
    assert dispatch([*verify, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recomputed"]["mean_total_variation"] < 1e-3
    with pytest.raises(UsageError, match="recomputed targets differ"):
        dispatch([*verify, "--amp", "bf16"])


def test_verify_finds_targets_of_something_else(built, tree, tmp_path):
    """Checksums that are right, of targets that the teachers never gave."""
    folder = shutil.copytree(built, tmp_path / "cache")
    header = json.loads((folder / "header.json").read_text())
    for record in header["complete"]:
        path = folder / f"view-{record['view']:04}.bin"
        rows = np.fromfile(path, LabelCache(built).header.row)
        rows["ids"] = (rows["ids"] + 1) % 3
        rows.tofile(path)
        record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "header.json").write_text(json.dumps(header))
    assert dispatch(["labels", "verify", str(folder)]) == 0
    with pytest.raises(UsageError, match="4 recomputed targets differ by"):
        dispatch(["labels", "verify", str(folder), "--data", str(tree), "--device", "cpu"])


def test_verify_refuses_other_teachers_and_images(built, tree, weights, tmp_path):
    base = ["labels", "verify", str(built), "--device", "cpu"]
    other = f"test_resnet@{weights('test_resnet', 9)}"
    with pytest.raises(UsageError, match=r"--teachers test_resnet@.* not the weights of test_resnet@"):
        dispatch([*base, "--data", str(tree), "--teachers", other, other.replace("-9-", "-2-")])
    with pytest.raises(UsageError, match=r"label cache .*: is of 25 images, but .*val holds 11"):
        dispatch([*base, "--data", str(tree / "val")])
    with pytest.raises(UsageError, match="give --data too"):
        dispatch([*base, "--teachers", other])


def test_a_moved_tree_is_the_same_and_goes_on(argv, built, tree, tmp_path):
    shutil.copytree(tree, tmp_path / "moved")
    folder = shutil.copytree(built, tmp_path / "cache")
    assert dispatch([*changed(argv, "--data", str(tmp_path / "moved")), str(folder)]) == 0
    assert content(folder) == content(built)
    (tmp_path / "moved" / "train" / "ant" / "000.jpg").rename(tmp_path / "moved" / "train" / "ant" / "new.jpg")
    with pytest.raises(DataError, match=r"--data \(images_digest"):
        dispatch([*changed(argv, "--data", str(tmp_path / "moved")), str(folder)])


def test_a_file_that_broke_stops_the_build(argv, tree, tmp_path):
    """Another image's target must not stand in its place; once it is mended the build goes on."""
    root = shutil.copytree(tree, tmp_path / "tree")
    ImageIndex.scan(root / "train")
    path = root / "train" / "bee" / "004.jpg"
    data, times = path.read_bytes(), path.stat()
    command = [*changed(argv, "--data", str(root)), str(tmp_path / "cache")]
    path.write_bytes(b"not an image".ljust(len(data)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DataError, match=r"bee/004.jpg: .*; mend or remove the file and start again"):
        dispatch(command)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert dispatch(command) == 0


REFUSED = {
    "views": (["--views", "0"], "--views 0: must be 1 or more"),
    "k": (["--top-k", "4"], "--top-k 4: the teachers have 3 classes"),
    "no k": (["--top-k", "0"], "--top-k 0: must be 1 or more"),
    "size": (["--size", "0"], "--size 0: must be 1 or more"),
    "data": (["--data", "/no/such"], "--data /no/such: no such folder"),
    "same teacher": (
        ["--teachers", "test_resnet?num_classes=3&weights=random", "test_resnet?num_classes=3@X"],
        "checkpoint X",
    ),
    "scale": (["--crop-scale", "0.9", "0.1"], "--crop-scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(argv, tmp_path, case):
    options, message = REFUSED[case]
    with pytest.raises((UsageError, DataError), match=message) as caught:
        dispatch([*argv, str(tmp_path / "cache"), *options])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_no_teachers(tree, tmp_path):
    with pytest.raises(UsageError, match="--teachers names no model"):
        dispatch(["labels", "build", "--data", str(tree), "--views", "1", "--out", str(tmp_path / "cache")])


def test_usage(capsys):
    assert dispatch(["labels"]) == 2
    assert dispatch(["labels", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in ("build", "import-fkd", "info", "verify")), shown
