"""`evaluate` and `predict` by names: of files that explain themselves, trees that lack a class, numbered folders."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets

from mealfast.__main__ import dispatch
from mealfast.cli.endings import run_command
from mealfast.models import normalised as models
from mealfast.models import weights as weights_files

from ..conftest import write_tree

SEVEN = ("daisy", "Rose", "tulip", "aster", "Iris", "lily2", "lily10")
VIEWS = ("--size", 32, "--crop-pct", 1, "--loader", "pillow")


def command(capfd, *argv) -> tuple[int, str, str]:
    capfd.readouterr()
    return run_command(dispatch, [*map(str, argv), "--device", "cpu"]), *capfd.readouterr()


def pixels_of(root, config) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a tree, which are 32 pixels a side, normalised, and their classes as timm numbers the folders."""
    found, _ = find_images_and_targets(str(root))
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    pixels = torch.tensor(np.stack([np.asarray(Image.open(path)) for path, _ in found])).permute(0, 3, 1, 2) / 255
    return (pixels - mean) / std, torch.tensor([label for _, label in found])


def timms(root, classes: int, path) -> float:
    """Writes a state dict that knows the tree's classes by their mean features, as timm numbers them; its top-1, %."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=classes).eval()
    images, labels = pixels_of(root, timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        means = torch.stack([features[labels == c].mean(dim=0) for c in range(classes)])
        model.fc.weight.copy_(1e4 * 2 * means)
        model.fc.bias.copy_(-1e4 * means.square().sum(dim=1))
        torch.save(model.state_dict(), path)
        return 100 * float((model(images).argmax(dim=1) == labels).double().mean())


def squares(root, names):
    """A tree whose images are 32 pixels a side, so that no resizing stands between two programs."""
    write_tree(root, dict.fromkeys(names, 6), seed=5)
    for path in root.glob("*/*.jpg"):
        Image.open(path).resize((32, 32)).save(path.with_suffix(".png"))
        path.unlink()
    return root


@pytest.mark.parametrize(("names", "word"), [(SEVEN, "natural"), (tuple(map(str, range(12))), "")])
def test_a_model_of_timms_scores_what_timm_says(tmp_path, capfd, names, word):
    root, spec = squares(tmp_path / "val", names), f"test_resnet@{tmp_path / 'timm.pth'}"
    wanted = timms(root, len(names), tmp_path / "timm.pth")
    assert wanted > 30
    argv = ["evaluate", "--data", root, "--model", spec, *VIEWS, "--json"]
    status, out, err = command(capfd, *argv, *(["--class-map", word] if word else []))
    assert (status, json.loads(out)["models"][0]["top1"]) == (0, pytest.approx(wanted))
    if not word:
        assert err == f"note: {root}: the class folders are numbers, and taken as the numbers of the model's outputs\n"
        return
    status, out, err = command(capfd, *argv)
    assert (status, out) == (2, "")
    assert err.startswith(
        f"mealfast: --model {spec}: does not say which output is which class, and output 0 is aster in"
    )
    status, out, _ = command(capfd, *argv, "--class-map", "byte")
    assert json.loads(out)["models"][0]["top1"] < wanted - 10


@pytest.fixture
def run_dir(weights, tmp_path):
    """What a run leaves that distilled SEVEN in byte order, and another model that has them in another order."""
    model = models.build(f"test_resnet@{weights('test_resnet', 2, 7)}")
    model.classes = tuple(sorted(SEVEN))
    (tmp_path / "run").mkdir()
    weights_files.save(model.model, tmp_path / "run" / "student.safetensors", model.description(32))
    order = [3, 1, 0, 6, 5, 2, 4]
    state = model.model.state_dict()
    for name in ("fc.weight", "fc.bias"):
        state[name] = state[name][order]
    model.model.load_state_dict(state)
    model.classes = tuple(sorted(SEVEN)[number] for number in order)
    weights_files.save(model.model, tmp_path / "other.safetensors", model.description(32))
    return tmp_path / "run"


def test_a_tree_that_lacks_a_class_is_scored_by_names(run_dir, tmp_path, capfd):
    root = squares(tmp_path / "val", SEVEN[:-1])
    argv = ["evaluate", "--data", root, "--model", run_dir, tmp_path / "other.safetensors", "--crop-pct", 1]
    status, out, err = command(capfd, *argv, "--loader", "pillow", "--json", "--per-class")
    assert status == 0
    assert err.splitlines() == [
        "note: at 32 px, as the model's file says (--size: another)",
        f"note: {root}: no image of 1 of 7 classes: lily10",
    ]
    result = json.loads(out)
    assert result["absent_classes"] == ["lily10"]
    one, other = result["models"]
    assert one["classes"] == other["classes"], "the same model, with its outputs in another order"
    assert (one["top1"], one["top5"]) == (other["top1"], other["top5"])
    assert one["top1"] == pytest.approx(result["ensemble"]["top1"])
    assert {row["name"] for row in one["classes"]} == set(SEVEN[:-1])
    squares(tmp_path / "val", ["zinnia"])
    status, _, err = command(capfd, *argv)
    said = (
        f"mealfast: {root}: class folder zinnia is none of the 7 classes of --model {run_dir}: Iris, Rose, aster and "
    )
    assert (status, err.splitlines()[-1]) == (2, said + "4 more")


def test_predictions_of_a_run_have_its_names(run_dir, tmp_path, capfd):
    root = squares(tmp_path / "val", SEVEN[:2])
    files = sorted(root.glob("*/*.png"))[:3]
    status, out, err = command(capfd, "predict", run_dir, *files, "--crop-pct", 1, "--json", "--top", 7)
    assert (status, err) == (0, "note: at 32 px, as the model's file says (--size: another)\n")
    plain = timm.create_model("test_resnet", num_classes=7, checkpoint_path=str(run_dir / "student.safetensors")).eval()
    mean, std = (torch.tensor(plain.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    for file, found in zip(files, json.loads(out)["images"], strict=True):
        pixels = torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            best = plain((pixels - mean) / std).softmax(dim=1)[0].sort(descending=True)
        assert [one["name"] for one in found["classes"]] == [sorted(SEVEN)[n] for n in best.indices.tolist()]
        assert [one["probability"] for one in found["classes"]] == pytest.approx(best.values.tolist(), rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "why"),
    [("no_such_folder", "timm has no architecture 'no_such_folder'"), ("resnet18", "has no weights; give a tag or a")],
)
def test_what_is_no_model_is_one_line(capfd, spec, why):
    status, out, err = command(capfd, "predict", spec, "x.png")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert why in err
