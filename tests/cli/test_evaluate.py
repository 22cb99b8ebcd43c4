"""Evaluation against NumPy in float64, exact counts on any number of processes, and real weights on real photos."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from mealfast.__main__ import dispatch
from mealfast.cli.endings import run_command
from mealfast.loaders import Batch, EvalViews, ImageIndex, eval_loader
from mealfast.machine.processes import start
from mealfast.training.scoring import evaluate


def batches(labels, sizes):
    """Batches of `sizes` rows whose pixels carry their row number."""
    made, first = [], 0
    for size in sizes:
        rows = torch.arange(first, first + size)
        made.append(Batch(rows[:, None, None, None].to(torch.uint8).expand(-1, 2, 2, 3), labels[rows], rows))
        first += size
    return made


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def accuracy(scores, labels, k):
    return 100 * np.mean([label in np.argsort(-row)[:k] for row, label in zip(scores, labels, strict=True)])


@pytest.mark.parametrize("classes", [3, 11])
@pytest.mark.parametrize("pad_to", [None, 8])
def test_scores_and_kl_are_numpys(classes, pad_to):
    """Three models on 23 images in batches of 8, 8 and 7; the black rows of padding must count for nothing."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 23, classes)).astype(np.float32)
    labels = rng.integers(0, classes, 23)
    seen = []

    def predict(images):
        rows = images[:, 0, 0, 0].long()
        seen.append(len(rows))
        return [torch.from_numpy(one)[rows] for one in logits]

    result = evaluate(
        predict, 3, [batches(torch.from_numpy(labels), (8, 8, 7))], start("cpu"), ensemble=(1, 2), student=0,
        pad_to=pad_to,
    )  # fmt: skip
    assert seen == ([8, 8, 8] if pad_to else [8, 8, 7])
    for score, one in zip(result.models, logits, strict=True):
        assert score.images == 23
        assert score.top1 == pytest.approx(accuracy(one, labels, 1))
        assert score.top5 == pytest.approx(accuracy(one, labels, min(5, classes)))
    exact = logits.astype(np.float64)
    target = (softmax(exact[1]) + softmax(exact[2])) / 2
    assert result.ensemble.top1 == pytest.approx(accuracy(target, labels, 1))
    assert result.ensemble.top5 == pytest.approx(accuracy(target, labels, 5))
    kl = (target * (np.log(target) - np.log(softmax(exact[0])))).sum(axis=1).mean()
    assert result.kl == pytest.approx(kl, rel=1e-5)


def test_one_teacher_has_a_kl_and_no_ensemble():
    labels = torch.zeros(4, dtype=torch.int64)
    logits = [torch.randn(4, 6), torch.randn(4, 6)]
    result = evaluate(lambda _: logits, 2, [batches(labels, (4,))], start("cpu"), ensemble=(1,), student=0)
    assert result.ensemble is None
    p, q = (torch.softmax(one.double(), 1) for one in reversed(logits))
    assert result.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    alone = evaluate(lambda _: logits, 2, [batches(labels, (4,))], start("cpu"))
    assert alone.ensemble is alone.kl is None


def totals(tree, world_size: int):
    """Right guesses, images and KL, added up over all processes; the class is the brightest channel."""
    index = ImageIndex.scan(tree / "val")
    found = np.zeros(3)
    for rank in range(world_size):
        loader = eval_loader(
            "pillow", index, EvalViews(16, 20), batch_size=2, rank=rank, world_size=world_size, threads=1
        )

        def predict(images):
            means = images.float().mean(dim=(1, 2))
            return [means, means / 2]

        result = evaluate(predict, 2, [loader], start("cpu"), ensemble=(1,), student=0)
        loader.close()
        score = result.models[0]
        found += np.array([score.top1 / 100, 1, result.kl]) * score.images
    return found.tolist()


@pytest.mark.parametrize("world_size", [2, 3, 11])
def test_every_image_counts_once_on_any_number_of_processes(tree, world_size):
    """11 images in batches of 2."""
    one = totals(tree, 1)
    assert one[:2] == pytest.approx([11, 11])
    assert totals(tree, world_size) == pytest.approx(one, rel=1e-9)


# -- real weights, real photos ---------------------------------------------------------------------------------------


def command(capfd, *argv) -> dict:
    capfd.readouterr()
    assert run_command(dispatch, ["evaluate", "--device", "cpu", "--json", *map(str, argv)]) == 0
    return json.loads(capfd.readouterr().out)


def timms_predictions(photos, lite):
    """Logits of each model on the photos in the order of their paths, through timm's own evaluation transform."""
    paths = sorted(photos.glob("*/*.jpg"))
    images = [Image.open(path).convert("RGB") for path in paths]
    wnids = timm.data.ImageNetInfo("imagenet-1k").label_names()
    labels = np.array([wnids.index(path.parent.name) for path in paths])
    logits = []
    for name, checkpoint in lite.items():
        model = timm.create_model(name, checkpoint_path=str(checkpoint)).eval()
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
        with torch.inference_mode():
            logits.append(model(torch.stack([transform(image) for image in images])).double().numpy())
    return logits, labels


def test_lite_models_on_photos_score_as_timm_scores_them(photos, lite, capfd, monkeypatch):
    """18, 18, 18 and together 19 of 20; and with Pillow every prediction is the one of timm's transform."""
    predictions = []

    def watched(predict, *arguments, **options):
        def kept(images, logits):
            predictions.append([one.double().numpy() for one in logits])

        return evaluate(predict, *arguments, **{**options, "on_batch": kept})

    monkeypatch.setattr("mealfast.training.scoring.evaluate", watched)
    specs = [f"{name}@{path}" for name, path in lite.items()]
    found = command(capfd, "--data", photos, "--model", *specs, "--own-views", "--loader", "pillow", "--batch-size", 7)
    ours = [np.concatenate(parts) for parts in zip(*predictions, strict=True)]
    theirs, labels = timms_predictions(photos, lite)
    for model, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a.argmax(axis=1) == b.argmax(axis=1)).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
        assert found["models"][model] == {
            "model": specs[model], "top1": 90.0, "top5": pytest.approx(accuracy(b, labels, 5)), "images": 20,
        }  # fmt: skip
    target = sum(map(softmax, theirs)) / 3
    assert found["ensemble"] == {"top1": 95.0, "top5": pytest.approx(accuracy(target, labels, 5)), "images": 20}


def test_dali_scores_the_photos_alike_and_finds_them_below_val(photos, lite, capfd, tmp_path):
    (tmp_path / "val").symlink_to(photos)
    name, path = next(iter(lite.items()))
    found = command(capfd, "--data", tmp_path, "--model", f"{name}@{path}", "--own-views", "--loader", "dali")
    assert len(found.pop("absent_classes")) == 1000 - 19
    assert found == {
        "models": [{"model": f"{name}@{path}", "top1": 90.0, "top5": pytest.approx(95, abs=5), "images": 20}]
    }


def test_the_papers_views_are_the_default(tree, weights, capfd):
    """Shorter side to int(256 / 224 * 32) = 36, centre 32, bilinear: the same top-1 as by hand with torchvision."""
    from torchvision import transforms

    path = weights("test_resnet", 2)
    found = command(
        capfd,
        "--data",
        tree,
        "--model",
        f"test_resnet@{path}",
        "--size",
        32,
        "--loader",
        "pillow",
        "--loader-threads",
        1,
    )
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(path)).eval()
    config = timm.data.resolve_model_data_config(model)
    transform = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )
    paths = sorted((tree / "val").glob("*/*.jpg"))
    labels = [sorted({p.parent.name for p in paths}).index(p.parent.name) for p in paths]
    with torch.inference_mode():
        scores = model(torch.stack([transform(Image.open(p)) for p in paths])).numpy()
    assert found["models"][0]["top1"] == pytest.approx(accuracy(scores, labels, 1))
    assert found["models"][0]["images"] == 11
    assert "ensemble" not in found


def test_the_table_for_people(tree, weights, capfd):
    spec = f"test_resnet@{weights('test_resnet', 2)}"
    argv = ["evaluate", "--data", str(tree), "--model", spec, "--size", "32", "--loader", "pillow", "--device", "cpu"]
    assert run_command(dispatch, argv) == 0
    header, row = capfd.readouterr().out.splitlines()
    assert header.split() == ["top-1", "%", "top-5", "%", "images"]
    assert row.split()[0] == spec
    assert row.split()[-1] == "11"


def test_classes_and_what_they_are_confused_with(tree, weights, capfd, tmp_path):
    """Counts of two models and their ensemble, against timm's predictions counted one by one."""
    from torchvision import transforms

    names = ("test_resnet", "test_vit")
    specs = [f"{name}@{weights(name, number)}" for number, name in enumerate(names)]
    figure = tmp_path / "confusion.svg"
    options = ["--size", 32, "--loader", "pillow", "--batch-size", 4, "--per-class", "--confusion", figure]
    found = command(capfd, "--data", tree, "--model", *specs, *options)
    paths = sorted((tree / "val").glob("*/*.jpg"))
    transform = transforms.Compose([transforms.Resize(36), transforms.CenterCrop(32), transforms.ToTensor()])
    images = torch.stack([transform(Image.open(path)) for path in paths])
    probabilities = []
    for number, name in enumerate(names):
        size = {"img_size": 32} if "vit" in name else {}
        model = timm.create_model(name, num_classes=3, checkpoint_path=str(weights(name, number)), **size).eval()
        config = timm.data.resolve_model_data_config(model)
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
        with torch.inference_mode():
            probabilities.append(model((images - mean) / std).double().softmax(dim=1))
    classes = ("ant", "bee", "cat")
    for row, p in zip([*found["models"], found["ensemble"]], [*probabilities, sum(probabilities)], strict=True):
        pairs = [(path.parent.name, classes[guess]) for path, guess in zip(paths, p.argmax(dim=1), strict=True)]
        for entry, name in zip(row["classes"], classes, strict=True):
            own = [guess for label, guess in pairs if label == name]
            assert (entry["name"], entry["images"]) == (name, len(own))
            assert entry["top1"] == pytest.approx(100 * own.count(name) / len(own))
        wrong = [pair for pair in pairs if pair[0] != pair[1]]
        assert {(one["label"], one["guess"]): one["images"] for one in row["confused"]} == {
            pair: wrong.count(pair) for pair in wrong
        }
        counts = [one["images"] for one in row["confused"]]
        assert counts == sorted(counts, reverse=True)
    drawn = figure.read_text()  # whose text is paths, with what they write as comments
    assert all(f"<!-- {text} -->" in drawn for text in (*classes, "guess", "label", "the ensemble"))
    status = run_command(
        dispatch, ["evaluate", "--data", str(tree), "--model", *specs, *map(str, options[:-2]), "--device", "cpu"]
    )
    out = capfd.readouterr().out
    assert status == 0
    assert "ensemble, class by class, the worst first" in out
    assert all(f"\n{name} " in out for name in classes)
