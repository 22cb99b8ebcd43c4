"""`mealfast export`: what is written is loaded by the library it is for, and says what the model says."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from mealfast.__main__ import dispatch
from mealfast.cli.endings import run_command
from mealfast.downstream.model_card import card
from mealfast.downstream.new_folder import new_folder
from mealfast.downstream.trained import crop_pct, open_trained
from mealfast.errors import UsageError
from mealfast.loaders import EvalViews
from mealfast.recipe import make_recipe
from mealfast.training.loop import train

SIZE = 32


@pytest.fixture(scope="module")
def run(fields, tmp_path_factory) -> Path:
    """A run directory: test_efficientnet, distilled for an epoch."""
    path = tmp_path_factory.mktemp("run") / "run"
    train(make_recipe(None, **{**fields, "epochs": 1, "lr_decay_epochs": (), "run_dir": str(path)}))
    return path


def export(capfd, *argv):
    status = run_command(dispatch, ["export", *map(str, argv)])
    return status, *capfd.readouterr()


def photo(seed: int = 0, height: int = 50, width: int = 41) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def plain_student(run: Path) -> nn.Module:
    """The run's student as plain timm reads its file."""
    return timm.create_model(
        "test_efficientnet", num_classes=3, checkpoint_path=str(run / "student.safetensors")
    ).eval()


@torch.inference_mode()
def test_timm_loads_the_folder_as_it_is(run, tmp_path, capfd):
    status, out, _ = export(capfd, run, "--to", "timm", tmp_path / "made" / "here")
    folder = tmp_path / "made" / "here"
    assert status == 0
    assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert str(folder) in out
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, SIZE, SIZE)
    own = timm.data.resolve_model_data_config(plain_student(run))
    assert (tuple(config["mean"]), tuple(config["std"])) == (own["mean"], own["std"])
    assert config["interpolation"] == "bilinear"
    # The view that mealfast evaluates: of 36 pixels, by torchvision.
    inputs = timm.data.create_transform(**config, is_training=False)(photo())[None]
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(int(256 / 224 * SIZE)),
            torchvision.transforms.CenterCrop(SIZE),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(own["mean"], own["std"]),
        ]
    )
    assert torch.equal(inputs, transform(photo())[None])
    assert torch.equal(model(inputs), plain_student(run)(inputs))
    text = (folder / "README.md").read_text()
    summary = json.loads((run / "summary.json").read_text())
    assert f"| this model | {summary['final']['top1']:.2f} |" in text
    config = json.loads((run / "config.json").read_text())
    for digest in (*config["teacher_digests"].values(), *config["image_digests"].values()):
        assert digest in text
    assert str(run.parent) not in text, "where files lie is nobody's business"


@torch.inference_mode()
def test_a_model_that_is_built_for_one_size_is_built_again(weights, tmp_path, capfd):
    spec = f"test_vit@{weights('test_vit', 3)}"
    assert export(capfd, spec, "--to", "timm", tmp_path / "vit", "--size", SIZE)[0] == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'vit'}", pretrained=True).eval()
    plain = timm.create_model(
        "test_vit", num_classes=3, img_size=SIZE, checkpoint_path=str(weights("test_vit", 3))
    ).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(model(images), plain(images))


@torch.inference_mode()
@pytest.mark.parametrize("inside", [False, True], ids=["normalised", "uint8"])
def test_onnx_gives_the_same_logits_for_any_batch(run, tmp_path, capfd, inside):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'mealfast[export]'")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'mealfast[export]'")
    options = ["--with-preprocessing"] if inside else []
    status, out, err = export(capfd, run, "--to", "onnx", tmp_path / "onnx", *options)
    assert status == 0, err
    assert "largest difference" in out
    session = runtime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"))
    model = plain_student(run)
    config = timm.data.resolve_model_data_config(model)
    for count in (1, 3, 7):
        images = np.random.default_rng(count).integers(0, 255, (count, SIZE, SIZE, 3), dtype=np.uint8)
        normalise = torchvision.transforms.Normalize(config["mean"], config["std"])
        normalised = normalise(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        (logits,) = session.run(None, {"images": images if inside else normalised.numpy()})
        wanted = model(normalised).numpy()
        assert wanted.std() > 0.01
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    facts = json.loads(session.get_modelmeta().custom_metadata_map["mealfast"])
    assert facts["input_size"] == [3, SIZE, SIZE]
    assert facts["mean"] == list(config["mean"])


@torch.inference_mode()
def test_torchscript_needs_no_timm(run, tmp_path, capfd):
    status, out, err = export(capfd, run, "--to", "torchscript", tmp_path / "script")
    assert status == 0, err
    assert "deprecated" in out
    model = torch.jit.load(str(tmp_path / "script" / "model.torchscript.pt"))
    for count in (1, 6):
        images = torch.randn(count, 3, SIZE, SIZE)
        torch.testing.assert_close(model(images), plain_student(run)(images), rtol=0, atol=1e-5)


@torch.inference_mode()
def test_torchvision_takes_a_resnets_keys(tmp_path, capfd):
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=5).eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    spec = f"resnet18@{tmp_path / 'resnet18.pth'}"
    assert export(capfd, spec, "--to", "torchvision", tmp_path / "made", "--size", 64)[0] == 0
    other = torchvision.models.resnet18(num_classes=5)
    other.load_state_dict(torch.load(tmp_path / "made" / "model.pth", weights_only=True))
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(other.eval()(images), model(images), rtol=0, atol=1e-5)


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(run, weights, tmp_path, capfd):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").touch()
    (tmp_path / "run").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    vgg = f"test_resnet@{weights('test_resnet', 2)}"
    new = tmp_path / "new"
    before = set(tmp_path.rglob("*"))
    for argv, expected in [
        ([run, "--to", "timm", full], "holds something"),
        ([run, "--to", "timm", full / "mine.txt"], "is a file"),
        ([run, "--to", "timm", full / "mine.txt" / "below"], "cannot be written"),
        ([tmp_path / "run", "--to", "timm", new], "no student.safetensors yet"),
        ([vgg, "--to", "torchvision", new], "torchvision has no model of that name"),
        ([vgg, "--to", "timm", new, "--with-preprocessing"], "--with-preprocessing is for onnx and torchscript"),
        (["resnet18", "--to", "timm", new], "has no weights"),
        (["resnet181", "--to", "timm", new], "did you mean resnet18"),
        ([vgg, "--to", "timm", new, "--size", "0"], "--size 0"),
    ]:
        status, out, err = export(capfd, *argv)
        assert (status, out) == (2, ""), argv
        (line,) = err.splitlines()
        assert expected in line
    assert set(tmp_path.rglob("*")) == before


class Undecided(nn.Module):
    """What no exporter can know: a way that depends on the pixels' values."""

    num_classes = 3

    def __init__(self, count_matters: bool):
        super().__init__()
        self.layer, self.count_matters = nn.Linear(3, 3), count_matters

    def forward(self, images):
        x = self.layer(images.mean(dim=(2, 3)))
        if self.count_matters:
            return x + len(images)
        return x if images.sum() > 0 else -x


@pytest.mark.parametrize(
    ("to", "count_matters", "expected"),
    [("onnx", False, "cannot export it to ONNX"), ("torchscript", True, "its logits differ from PyTorch's")],
)
def test_what_torch_cannot_export_is_one_line(run, tmp_path, capfd, monkeypatch, to, count_matters, expected):
    if to == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'mealfast[export]'")
    trained = open_trained(str(run))
    module = Undecided(count_matters)
    module.pretrained_cfg = dict(trained.model.model.pretrained_cfg)
    trained.model.model = module
    monkeypatch.setattr("mealfast.downstream.exports.open_trained", lambda *_: trained)
    status, out, err = export(capfd, run, "--to", to, tmp_path / "new")
    assert (status, out) == (2, "")
    *waits, line = err.splitlines()
    assert expected in line
    assert len(waits) == (to == "onnx"), "what takes long is said"
    assert not list(tmp_path.iterdir())


def test_onnx_says_what_to_install(run, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("mealfast.downstream.export_onnx.NEEDS", ("onnx_of_nobody",))
    status, _, err = export(capfd, run, "--to", "onnx", tmp_path / "new")
    assert status == 2
    assert err == "mealfast: --to onnx needs onnx_of_nobody: pip install 'mealfast[export]'\n"


def test_timm_resizes_to_what_mealfast_resizes_to():
    """timm: floor(size / crop_pct)."""
    for size in range(1, 1025):
        for views in (EvalViews.from_crop_pct(size), EvalViews.from_crop_pct(size, 0.875)):
            assert math.floor(size / crop_pct(views)) == views.resize


def test_a_card_escapes_what_files_say(run):
    trained = open_trained(str(run))
    score = {"top1": 1, "top5": 2, "images": 3}
    hostile = "a|b\n# <script>`x`"
    trained = type(trained)(
        trained.name, trained.spec, trained.model, trained.views,
        {"teacher_digests": {hostile: hostile}, "versions": [], "images": {hostile: 3}, "image_digests": {}},
        {"final": {"top1": "x", "top5": 1, "images": 2}, "teachers": [{"model": hostile, **score}]},
    )  # fmt: skip
    text = card(trained, "timm", "code", "DIR")
    assert "<script>" not in text
    assert "\n# <" not in text
    assert "a\\|b" in text
    assert "x |" not in text.replace("top5", "")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):

    def interrupted():
        with new_folder(tmp_path / "deep" / "out") as folder:
            (folder / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").write_text("x")
        assert not list((tmp_path / "empty").iterdir())
    assert (tmp_path / "empty" / "file").read_text() == "x"
    assert os.listdir(tmp_path) == ["empty"]
    with pytest.raises(UsageError, match="holds something"), new_folder(tmp_path / "empty"):
        pass
