"""Every command: its help, and for bad input one line on stderr, status 2, no traceback, the option or file named."""

import json
import shutil

import pytest
import torch

from mealfast.__main__ import COMMANDS, dispatch
from mealfast.cli.endings import run_command
from mealfast.errors import UsageError
from mealfast.machine import processes as runtimes
from mealfast.recipe import make_recipe
from mealfast.record.run_directory import RunDirectory

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run(capfd, *argv) -> tuple[int, str, str]:
    """(status, stdout, stderr) of a command."""
    capfd.readouterr()
    try:
        status = run_command(dispatch, [str(one) for one in argv])
    except SystemExit as end:
        status = end.code
    return status, *capfd.readouterr()


def refused(capfd, *argv) -> str:
    """The line that a command is refused with."""
    status, out, err = run(capfd, *argv)
    assert status == 2, err
    assert out == ""
    assert err.startswith("mealfast: ")
    assert err.count("\n") == 1, err
    return err


@pytest.fixture
def good(options):
    """Options of `mealfast train` that would run."""
    return {
        "--data": options["data"], "--student": options["student"], "--teachers": options["teachers"][0],
        "--size": 32, "--batch-size": 8, "--run-dir": options["run_dir"], "--device": "cpu", "--loader": "pillow",
        "--epochs": 1, "--amp": "off",
    }  # fmt: skip


def train(capfd, good, **changes) -> str:
    argv = {**good, **{"--" + name.replace("_", "-"): value for name, value in changes.items()}}
    line = refused(capfd, "train", *[one for name, value in argv.items() for one in (name, value)])
    assert not RunDirectory(good["--run-dir"]).path.exists(), "a refused run writes nothing"
    return line


def test_help_and_version(capfd):
    status, out, err = run(capfd, "--help")
    assert (status, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)
    assert run(capfd)[0] == 2
    assert run(capfd, "--version")[1].startswith("mealfast ")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help(capfd, name):
    status, out, err = run(capfd, name, "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: mealfast {name}")
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["trian"], "trian: no such command; did you mean train?"),
        (["labels", "bild"], "labels bild: no such command; did you mean build?"),
        (["predict", "resnet18", "x.jpg"], "'resnet18': has no weights"),
        (["predict", "resnet18.tv_in1k@w.pth", "x.jpg", "--top", "0"], "--top 0"),
        (["evaluate", "--data", "x", "--model", "y", "--confusion", "c.bmp"], "--confusion c.bmp: must end in .png"),
        (
            ["evaluate", "--data", "x", "--model", "y", "--confusion", "no/c.png"],
            "--confusion no/c.png: no such folder",
        ),
        (["index", "x", "--workers", "0"], "--workers 0"),
        (["train", "--no-such"], "--no-such"),
        (["train", "--size", "big"], "--size"),
        (["train", "--crop-scale", "0.5"], "--crop-scale"),
        (["train", "--amp", "fp8"], "--amp"),
        (["train", "--recipe", "resnet51"], "--recipe resnet51: unknown"),
        (["train", "--recipe", "resnet50-224", "--lr", "-1"], "--lr -1.0"),
        (["train", "--recipe", "demo"], "--teachers"),
        (["train"], "--teachers"),
        (["train", "--recipe", "resnet50-224", "--device", "cpu"], "--data is missing"),
        (["evaluate"], "--data"),
        (["evaluate", "--data", "x", "--model", "resnet18", "--size", "0"], "--size 0"),
        (["evaluate", "--data", "x", "--model", "resnet18", "--crop-pct", "9"], "--crop-pct 9"),
        (["evaluate", "--data", "no-such-folder", "--model", "resnet18"], "--data no-such-folder: no such folder"),
        (["index", "no-such-folder"], "no-such-folder"),
        (["figures", "no-such-run"], "no-such-run: is no run directory"),
        (["figures", "x", "--out", "curves.bmp"], "--out curves.bmp"),
        (["figures", "x", "--out", "no-such-folder/curves.png"], "--out no-such-folder/curves.png"),
        (["demo", "--seed", "-1"], "--seed -1"),
        (["pack", "no-such-folder", "--out", "x"], "no-such-folder"),
    ],
    ids=" ".join,
)
def test_bad_options_get_one_line(capfd, argv, named):
    assert named in refused(capfd, *argv)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": "no-such-folder"}, "--data no-such-folder: no such folder"),
        ({"student": "resnet5o"}, "no architecture 'resnet5o'; did you mean"),
        ({"student": "resnet18.nope"}, "no tag 'nope'"),
        ({"teachers": "test_resnet@nowhere.pth"}, "checkpoint nowhere.pth: no such file"),
        ({"teachers": "test_resnet?num_classes=4&weights=random"}, "num_classes=4&weights=random has 4 classes"),
        ({"teachers": "resnet50"}, "did you mean resnet50.a1_in1k, or a checkpoint, resnet50@FILE? For random"),
        ({"student": "resnet18?num_classes=3"}, "--student resnet18?num_classes=3: names no weights; did you mean"),
        ({"student": "resnet18.tv_in1k?weights=random"}, "neither a tag nor a checkpoint"),
        ({"student": "resnet18?weights=a.pth"}, "weights= can only be random"),
        ({"batch_size": 26}, "--batch-size 26"),
        ({"batch_size": 8, "accumulate": 3}, "--batch-size 8: must be a multiple"),
        ({"amp": "fp16"}, "--amp fp16 needs a GPU"),
        ({"resume": "nowhere.pt"}, "--resume nowhere.pt: no such file"),
        ({"optimizer": "apex-fused-sgd"}, "--optimizer apex-fused-sgd needs a GPU"),
        ({"student": "vit_tiny_patch16_224?num_classes=3&depth=1&img_size=64&weights=random"}, "change --size"),
        ({"student": "test_efficientnet?num_classes=3&in_chans=1&weights=random"}, "in_chans cannot be set"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_runs_get_one_line_and_write_nothing(capfd, good, changes, named):
    assert named in train(capfd, good, **changes)


@WITHOUT_GPU
def test_cuda_without_a_gpu(capfd, good):
    assert "--device cuda: PyTorch sees no CUDA device" in train(capfd, good, device="cuda")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="4 processes on a machine with 2 GPUs: use --nproc-per-node 2"):
        runtimes.start("auto")


def test_the_same_teacher_twice(capfd, good, weights, tmp_path):
    copy = shutil.copy(weights("test_resnet", 2), tmp_path / "copy.pth")
    argv = [one for pair in good.items() for one in pair]
    line = refused(capfd, "train", *argv, "--teachers", good["--teachers"], f"test_resnet@{copy}")
    assert "have the same weights" in line


def test_weights_of_another_architecture(capfd, good, weights):
    path = weights("test_resnet", 2)
    assert f"checkpoint {path} is not one of test_efficientnet" in train(
        capfd, good, student=f"test_efficientnet@{path}"
    )


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda root: shutil.rmtree(root / "train"), "has no train/"),
        (lambda root: [path.unlink() for path in (root / "train").rglob("*.jpg")], "train"),
        (lambda root: shutil.copytree(root / "val" / "ant", root / "val" / "dog"), "dog"),
        (lambda root: shutil.copy(root / "val" / "ant" / "000.jpg", root / "val"), "val/ holds images outside"),
        (
            lambda root: [shutil.copytree(root / part / "ant", root / part / "dog") for part in ("train", "val")],
            "has 4 class folders",
        ),
        (lambda root: [path.write_bytes(b"no image") for path in (root / "train").rglob("*.jpg")], "train"),
    ],
    ids=["no train", "empty train", "a class of val only", "no class folder", "four classes", "no images"],
)
def test_bad_data(capfd, good, tree, tmp_path, change, named):
    root = shutil.copytree(tree, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    change(root)
    line = train(capfd, good, data=root)
    assert str(root) in line
    assert named in line.replace(str(tmp_path), "")


def test_a_run_directory_with_another_configuration(capfd, good):
    directory = RunDirectory(good["--run-dir"])
    directory.claim({"recipe": make_recipe(teachers=("a",), student="b", epochs=1).to_json()})
    argv = [one for pair in good.items() for one in pair]
    line = refused(capfd, "train", *argv)
    assert f"--run-dir {directory.path}: holds a run with --teachers a, not {good['--teachers']}" in line


def test_run_directories_that_cannot_be(capfd, good, tmp_path):
    (tmp_path / "file").write_text("mine")
    argv = [one for pair in good.items() for one in pair]
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refused(capfd, "train", *argv, "--run-dir", place)
        assert f"--run-dir {place}: " in line
    below = tmp_path / "file" / "below"
    assert f"--run-dir {below}: cannot be written" in refused(capfd, "demo", "--run-dir", below)
    assert f"--run-dir {tmp_path / 'file'}: is a file" in refused(capfd, "demo", "--run-dir", tmp_path / "file")
    assert "something other than a demo" in refused(capfd, "demo", "--run-dir", tmp_path)
    assert (tmp_path / "file").read_text() == "mine"


def test_index_counts_and_names_what_cannot_be_read(capfd, tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    broken = root / "train" / "bee" / "broken.jpg"
    broken.write_bytes(b"no image")
    status, out, err = run(capfd, "index", root, "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert (found["images"], found["classes"]) == (36, 3)
    assert found["train"]["images"] == 25
    (entry,) = found["quarantined"]
    assert entry["path"].endswith("bee/broken.jpg")
    assert entry["reason"]
    status, out, _ = run(capfd, "index", root)
    assert status == 0
    assert "bee/broken.jpg" in out


def test_what_the_user_cannot_mend_is_not_hidden():
    def command(_argv):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_command(command, [])


def test_an_interrupted_command(capfd):
    def command(_argv):
        raise KeyboardInterrupt

    assert run_command(command, []) == 130
    assert capfd.readouterr().err == "mealfast: interrupted\n"
