"""Predictions of single files against timm's own preprocessing, and of files that are none."""

import json
import os

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms

from mealfast.__main__ import dispatch
from mealfast.cli.endings import run_command


def predict(capfd, *argv) -> tuple[int, str, str]:
    capfd.readouterr()
    return run_command(dispatch, ["predict", *map(str, argv), "--device", "cpu"]), *capfd.readouterr()


def test_photos_get_the_names_that_timm_gives_them(photos, lite, capfd):
    name, path = next(iter(lite.items()))
    files = sorted(photos.glob("*/*.jpg"))[:3]
    status, out, err = predict(capfd, f"{name}@{path}", *files, "--own-views", "--json", "--top", 3)
    assert (status, err) == (0, "")
    model = timm.create_model(name, checkpoint_path=str(path)).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    info = timm.data.ImageNetInfo("imagenet-1k")
    for file, found in zip(files, json.loads(out)["images"], strict=True):
        with torch.inference_mode():
            best = model(transform(Image.open(file).convert("RGB"))[None]).softmax(dim=1)[0].topk(3)
        assert found["file"] == str(file)
        assert [one["class"] for one in found["classes"]] == best.indices.tolist()
        assert [one["probability"] for one in found["classes"]] == pytest.approx(best.values.tolist(), rel=1e-3)
        descriptions = [info.index_to_description(c).split(",")[0] for c in best.indices.tolist()]
        assert [one["name"] for one in found["classes"]] == descriptions


def test_files_of_every_kind(weights, tmp_path, capfd):
    """More than a batch; the papers' crop; the bad ones are named, and the rest answered for."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (45, 60, 3), dtype=np.uint8)
    good = [tmp_path / f"image.{kind}" for kind in ("png", "bmp", "webp", "gif")]
    for path in good:
        Image.fromarray(pixels).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (1, 50_000)).save(tmp_path / "strip.png")
    bad = {
        tmp_path / "pipe.jpg": "not a regular file", tmp_path / "text.jpg": "not an image that Pillow can identify",
        tmp_path / "none.jpg": "no such file", tmp_path / "strip.png": "1 x 50000 pixels are too long and narrow",
    }  # fmt: skip
    names = tmp_path / "classes.txt"
    names.write_text("ant\nbee\ncat\n")
    spec, many = f"test_resnet@{weights('test_resnet', 2)}", [good[0]] * 40
    options = ("--size", 64, "--top", 9, "--class-map", names)
    status, out, err = predict(capfd, spec, *many, *bad, *good[1:3], *options)
    assert status == 2
    assert err.splitlines() == [f"mealfast: {path}: {reason}" for path, reason in bad.items()]
    lines = out.splitlines()
    assert len(lines) == 42 * 4, "the file and three classes each"
    assert [lines[4 * number] for number in range(42)] == [*map(str, many), *map(str, good[1:3])]
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(weights("test_resnet", 2))).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = transforms.Compose(
        [
            transforms.Resize(73),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    with torch.inference_mode():
        p = model(transform(Image.fromarray(pixels))[None]).softmax(dim=1)[0]
    order = p.argsort(descending=True).tolist()
    expected = [f"{100 * p[c]:6.2f} %  {('ant', 'bee', 'cat')[c]}" for c in order]
    assert lines[1:4] == lines[-3:] == expected
    names.write_text("ant\nbee\n")
    status, out, err = predict(capfd, spec, good[0], *options)
    assert (status, out) == (2, "")
    assert err == f"mealfast: --class-map {names}: holds 2 names, the model has 3 classes\n"
