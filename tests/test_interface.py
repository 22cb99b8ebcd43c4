"""`import mealfast`: the same results as the commands, in a process that stays its owner's."""

import inspect
import json
import os
import random
import signal
import subprocess
import sys
import threading
import typing
import warnings
from dataclasses import fields as fields_of
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from PIL import Image

import mealfast
from mealfast.__main__ import dispatch
from mealfast.cli.endings import run_command
from mealfast.machine.unchanged import unchanged
from mealfast.recipe import Recipe, make_recipe
from mealfast.training.loop import train
from mealfast.training.step import Step


@pytest.fixture(scope="module")
def short(fields) -> dict:
    """Fields of a run of two epochs, without what `distill` takes by position."""
    changed = {**fields, "epochs": 2, "lr_decay_epochs": (1,)}
    return {name: value for name, value in changed.items() if name not in ("data", "teachers", "student")}


@pytest.fixture(scope="module")
def made(fields, short, tmp_path_factory):
    """(what `distill` returned, the folder of the same run as `mealfast train` makes it)"""
    folder = tmp_path_factory.mktemp("interface")
    plain = {name: fields[name] for name in ("data", "teachers", "student")}
    train(make_recipe(None, **plain, **short, run_dir=str(folder / "command")))
    by_python = mealfast.distill(
        Path(fields["data"]), list(fields["teachers"]), fields["student"], **short, run_dir=folder / "python"
    )
    return by_python, folder / "command"


def surroundings() -> dict:
    """What a program may rely on that a library leaves as it was."""
    return {
        "handlers": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)],
        "environment": dict(os.environ),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "torch": torch.get_rng_state().tolist(),
        "threads": torch.get_num_threads(),
        "filters": list(warnings.filters),
        "grad": torch.is_grad_enabled(),
        "group": dist.is_initialized(),
        "benchmark": torch.backends.cudnn.benchmark,
        "folder": os.getcwd(),
        "wakeup": signal.set_wakeup_fd(-1),
    }


def test_importing_it_is_quick_and_brings_no_torch():
    code = (
        "import sys, time; before = time.process_time(); import mealfast; took = time.process_time() - before;"
        "heavy = {'torch', 'numpy', 'timm', 'PIL', 'tqdm'} & set(sys.modules); print(took); assert not heavy, heavy"
    )
    times = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        times.append(float(done.stdout))
    assert min(times) < 0.2


def test_a_run_is_the_one_that_the_command_makes(made):
    result, command = made
    name = "student.safetensors"
    assert (result.run_dir / name).read_bytes() == (command / name).read_bytes()
    summary = json.loads((command / "summary.json").read_text())
    assert result.scores == {key: summary[key] for key in ("start", "final", "best", "teachers", "ensemble")}
    assert result.finished
    plain = timm.create_model("test_efficientnet", num_classes=3, checkpoint_path=str(command / name)).eval()
    assert not result.student.training
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(result.student(images), plain(images))
        assert torch.equal(mealfast.load(command)(images), plain(images))


def test_again_in_the_same_process_and_in_another_thread(made, fields, short, tmp_path):
    """Both runs stay in their own folder; a thread may set no signal handlers."""
    random.seed(1)
    before = surroundings()
    plain = {name: fields[name] for name in ("data", "teachers", "student")}
    results = [mealfast.distill(**plain, **short, run_dir=tmp_path / "main")]
    thread = threading.Thread(
        target=lambda: results.append(mealfast.distill(**plain, **short, run_dir=tmp_path / "thread"))
    )
    thread.start()
    thread.join()
    assert surroundings() == before
    files = {(result.run_dir / "student.safetensors").read_bytes() for result in (*results, made[0])}
    assert len(results) == 2
    assert len(files) == 1


def interrupt_at(monkeypatch, number: int, at: int) -> None:
    step = Step.__call__

    def interrupted(self, batch, index):
        if index == at:
            signal.raise_signal(number)
        return step(self, batch, index)

    monkeypatch.setattr(Step, "__call__", interrupted)


def test_ctrl_c_saves_and_is_a_keyboard_interrupt(made, fields, short, tmp_path, monkeypatch):
    call = {name: fields[name] for name in ("data", "teachers", "student")} | short | {"run_dir": tmp_path}
    with monkeypatch.context() as patch:
        interrupt_at(patch, signal.SIGINT, 3)
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            mealfast.distill(**call)
        assert signal.getsignal(signal.SIGINT) is before
    assert list((tmp_path / "checkpoints").glob("*4*.pt"))
    assert mealfast.distill(**call).finished
    name = "student.safetensors"
    assert (tmp_path / name).read_bytes() == (made[1] / name).read_bytes(), "as if it had not been stopped"


def test_a_programs_own_handler_is_called_when_the_run_is_saved(fields, short, tmp_path, monkeypatch):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append((tmp_path / "student.safetensors").exists()))
    interrupt_at(monkeypatch, signal.SIGTERM, 2)
    call = {name: fields[name] for name in ("data", "teachers", "student")} | short | {"run_dir": tmp_path}
    try:
        result = mealfast.distill(**call)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [True]
    assert not result.finished
    assert result.scores["start"] is not None
    assert result.student(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_evaluate_is_the_commands(made, tree, capsys):
    result, command = made
    spec = f"test_efficientnet@{command / 'student.safetensors'}"
    argv = ["evaluate", "--data", str(tree), "--model", spec, "--size", "32", "--loader", "pillow", "--json"]
    assert run_command(dispatch, argv) == 0
    printed = json.loads(capsys.readouterr().out)
    before = surroundings()
    found = mealfast.evaluate(result, tree, loader="pillow")  # at the run's size
    assert surroundings() == before
    for ours, theirs in zip(found["models"], printed["models"], strict=True):
        assert {**ours, "model": ""} == {**theirs, "model": ""}
    assert found["models"][0]["top1"] == result.scores["final"]["top1"]
    two = mealfast.evaluate([spec, command], tree, size=32, loader="pillow", per_class=True)
    assert two["ensemble"]["top1"] == found["models"][0]["top1"]
    assert "classes" in two["models"][0]


def test_a_process_group_of_the_callers_stays(tree, made, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mealfast.evaluate(made[0], tree, loader="pillow")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


@torch.inference_mode()
def test_predict_takes_what_the_others_give(made, tree, tmp_path):
    result, command = made
    files = sorted((tree / "val").glob("*/*.jpg"))[:3]
    student = result.student
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(student), is_training=False)
    wanted = [student(transform(Image.open(file).convert("RGB"))[None]).softmax(dim=1)[0] for file in files]
    for model in (result, student, mealfast.load(command), command, str(command)):
        predictions = mealfast.predict(model, files, top=2)
        assert [one.file for one in predictions] == [str(file) for file in files]
        for one, p in zip(predictions, wanted, strict=True):
            assert [guess.number for guess in one.guesses] == p.argsort(descending=True)[:2].tolist()
            assert [guess.probability for guess in one.guesses] == pytest.approx(
                p.sort(descending=True)[0][:2].tolist()
            )
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    with pytest.raises(mealfast.UsageError, match=r"broken\.jpg: not an image"):
        mealfast.predict(result, [files[0], broken])
    kept = mealfast.predict(result, [broken, files[0]], keep_broken=True)
    assert kept[0].error == "not an image that Pillow can identify"
    assert kept[0].guesses == ()
    assert kept[1].guesses
    assert mealfast.predict(result, files[0])[0].guesses == kept[1].guesses


def test_labels_are_built_and_used(fields, short, tmp_path):
    header = mealfast.build_labels(
        fields["data"], list(fields["teachers"]), tmp_path / "cache", views=2, top_k=3, batch_size=8, size=32,
        amp="off", compile=False, loader="pillow", device="cpu",
    )  # fmt: skip
    assert (header.images, header.views, header.classes, header.top_k) == (25, 2, 3, 3)
    result = mealfast.distill(
        fields["data"], student=fields["student"], **short, label_cache=tmp_path / "cache", run_dir=tmp_path / "run"
    )
    assert result.finished
    assert result.scores["teachers"] == []


def test_what_is_wrong_is_an_exception(made, tree, tmp_path, monkeypatch):
    result = made[0]
    for error, words, call in [
        (TypeError, r"distill\(\) got .* 'epoch'; did you mean epochs", lambda: mealfast.distill(tree, epoch=3)),
        (mealfast.UsageError, "epochs='3': must be a whole", lambda: mealfast.distill(tree, "a", "b", epochs="3")),
        (mealfast.UsageError, "lr=True: must be a number", lambda: mealfast.distill(tree, "a", "b", lr=True)),
        (
            mealfast.UsageError,
            "crop_scale=.*: must be 2 floats",
            lambda: mealfast.distill(tree, "a", "b", crop_scale=1),
        ),
        (mealfast.UsageError, "--lr -1.0: must be 0 or more", lambda: mealfast.distill(tree, "a", "b", lr=-1)),
        (mealfast.UsageError, "--recipe none", lambda: mealfast.distill(tree, recipe="none")),
        (mealfast.UsageError, "no such folder", lambda: mealfast.evaluate(result, tmp_path / "none")),
        (mealfast.UsageError, "invalid choice: 'x'", lambda: mealfast.evaluate(result, tree, amp="x")),
        (TypeError, r"evaluate\(\) got .* 'lader'", lambda: mealfast.evaluate(result, tree, lader="x")),
        (mealfast.DataError, "--size 9000", lambda: mealfast.evaluate(result, tree, size=9000)),
        (mealfast.UsageError, "timm has no architecture", lambda: mealfast.load("resnet181")),
        (mealfast.UsageError, "has no weights", lambda: mealfast.load("resnet18")),
        (mealfast.UsageError, "top=0", lambda: mealfast.predict(result, "x.jpg", top=0)),
        (mealfast.UsageError, "is no model of timm", lambda: mealfast.predict(torch.nn.Linear(1, 1), "x.jpg")),
        (mealfast.UsageError, "--views 0", lambda: mealfast.build_labels(tree, ["a"], tmp_path / "c", views=0)),
        (TypeError, "'epochs'", lambda: mealfast.build_labels(tree, ["a"], tmp_path / "c", views=1, epochs=1)),
    ]:
        with pytest.raises(error, match=words):
            call()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(mealfast.UsageError, match="torchrun"):
        mealfast.distill(tree, ["resnet18"], "resnet18")


def test_a_signature_and_help_list_the_recipes_fields():
    signature = inspect.signature(mealfast.distill)
    assert {one.name for one in fields_of(Recipe) if one.metadata} <= set(signature.parameters)
    assert signature.parameters["lr"].default == Recipe.lr
    assert all(f"    {name}: " in mealfast.distill.__doc__ for name in ("lr", "epochs", "label_cache"))
    for name in mealfast.__all__:
        if inspect.isfunction(one := getattr(mealfast, name)):
            assert one.__doc__
            annotated = set(inspect.signature(one, follow_wrapped=True).parameters) - set(one.__annotations__)
            assert not {parameter for parameter in annotated if name != "distill"}, name
    assert typing.get_origin(mealfast._Path)


def test_numpys_numbers_and_lists_are_taken():
    from mealfast.downstream.keywords import checked, fields

    given = {
        "epochs": np.int64(3),
        "lr": np.float32(0.5),
        "crop_scale": [0.5, 1],
        "teachers": Path("a@b"),
        "loader_threads": None,
    }
    found = checked("distill", given, fields())
    assert found == {"epochs": 3, "lr": 0.5, "crop_scale": (0.5, 1.0), "teachers": ("a@b",), "loader_threads": None}
    assert all(type(found[name]) is kind for name, kind in (("epochs", int), ("lr", float)))


def test_settings_of_torch_are_put_back():
    before = torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32
    state = torch.get_rng_state()

    def fail():
        with unchanged():
            torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = not before[0], not before[1]
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32) == before
    assert torch.equal(torch.get_rng_state(), state)
