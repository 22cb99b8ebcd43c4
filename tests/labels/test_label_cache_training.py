"""Training from a label cache: the live run's losses, CutMix, the discriminator, and caches that do not fit."""

import json
import shutil

import numpy as np
import pytest
import torch

from mealfast.__main__ import dispatch
from mealfast.errors import UsageError
from mealfast.loaders import DataError, ImageIndex, LabelCache, ViewPlan, train_loader
from mealfast.loaders.steps import TrainSteps
from mealfast.method.cutmix import partner
from mealfast.method.discriminator import Discriminator
from mealfast.method.inputs import Inputs
from mealfast.method.objective import TERMS, Objective
from mealfast.method.targets import Target
from mealfast.recipe import make_recipe
from mealfast.training.loop import train

B, C = 6, 11
VIEWS = 3


@pytest.fixture(scope="module")
def teachers(weights):
    return f"test_resnet@{weights('test_resnet', 2)}", f"test_efficientnet@{weights('test_efficientnet', 3)}"


@pytest.fixture(scope="module")
def cache(tree, teachers, tmp_path_factory):
    """Every class of three kept, three views."""
    folder = tmp_path_factory.mktemp("cached") / "cache"
    argv = [
        "labels", "build", "--data", str(tree), "--teachers", *teachers, "--size", "32", "--views", str(VIEWS),
        "--top-k", "3", "--batch-size", "8", "--amp", "off", "--device", "cpu", "--no-compile", "--no-tune-teachers",
        "--loader", "pillow",
        "--out", str(folder),
    ]  # fmt: skip
    assert dispatch(argv) == 0
    return folder


@pytest.fixture
def cached(options, cache):
    return {**options, "teachers": (), "label_cache": str(cache), "log_every": 1, "discriminator": "off"}


def lines(options, kind):
    with open(f"{options['run_dir']}/metrics.jsonl") as file:
        return [line for line in map(json.loads, file) if line["kind"] == kind]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_with_every_class_kept_a_run_is_the_live_one(cached, teachers, weights, tmp_path, accumulate):
    """Nine steps over three epochs: every loss within 1e-3 of the live run's, relative."""
    # This student's BatchNorms see 4 x 4 pixels at the end, not 1: float16's rounding of the targets stays small.
    cached |= {"accumulate": accumulate, "lr": 0.01, "student": f"test_resnet@{weights('test_resnet', 1)}"}
    live = {**cached, "teachers": teachers, "label_cache": "", "run_dir": str(tmp_path / "live")}
    train(make_recipe(**cached)), train(make_recipe(**live))
    ours, theirs = lines(cached, "train"), lines(live, "train")
    assert len(ours) == len(theirs) == 9
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "soft_ce"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), (name, one["step"])
        assert one["kl"] == pytest.approx(other["kl"], abs=1e-3 * other["soft_ce"])
    assert lines(cached, "eval")[-1]["kl"] is None
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["label_cache"]["views"] == VIEWS


@pytest.mark.parametrize("mode", ["cooperative", "adversarial"])
def test_with_cutmix_and_a_discriminator(cached, mode, capsys):
    changes = {"discriminator": mode, "cutmix": True, "hard_label_weight": 0.25}
    summary = train(make_recipe(**{**cached, **changes}))
    assert summary["finished"]
    assert all(np.isfinite(line["loss"]) and line["discriminator_loss"] > 0 for line in lines(cached, "train"))
    assert f"discriminator {mode} (on log-probabilities" in capsys.readouterr().err


def test_a_stopped_run_goes_on_as_if_it_had_not(cached, tmp_path):
    whole = {**cached, "run_dir": str(tmp_path / "whole")}
    train(make_recipe(**whole))
    train(make_recipe(**cached, max_steps=5))
    train(make_recipe(**cached))
    assert [line["loss"] for line in lines(cached, "train")] == [line["loss"] for line in lines(whole, "train")]


def test_a_run_does_not_go_on_from_another_cache(cached, cache, tmp_path):
    train(make_recipe(**cached, max_steps=5))
    other = shutil.copytree(cache, tmp_path / "cache")
    train(make_recipe(**{**cached, "label_cache": str(other)}, max_steps=6))  # the same one, moved
    header = json.loads((other / "header.json").read_text())
    header["temperature"] = 2.0
    (other / "header.json").write_text(json.dumps(header))
    with pytest.raises(UsageError, match="--label-cache: not the targets that the run of checkpoint"):
        train(make_recipe(**{**cached, "label_cache": str(other)}))


def test_an_image_that_stands_in_brings_its_own_target(cache, tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    index = ImageIndex.scan(root / "train")
    (root / "train" / "bee" / "004.jpg").unlink()
    plan = ViewPlan(index.widths, index.heights, seed=0, size=32, cycle=VIEWS)
    loader = train_loader("pillow", index, plan, batch_size=8, stop_step=12, label_cache=LabelCache(cache))
    steps = TrainSteps(index, plan, batch_size=8, start_step=0, stop_step=12, rank=0, world_size=1)
    stored, replaced = LabelCache(cache), 0
    for step, batch in enumerate(loader):
        replaced += int((batch.indices.numpy() != steps.views(step).indices).sum())
        ids, probabilities = stored.targets(step // 3 % VIEWS, batch.indices.numpy())
        np.testing.assert_array_equal(batch.targets[0].numpy(), ids)
        np.testing.assert_array_equal(batch.targets[1].numpy(), probabilities)
    loader.close(), steps.close()
    assert replaced > 0


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(4)
    student = (4 * torch.randn(B, C, generator=generator, dtype=torch.float64)).requires_grad_()
    target = (2 * torch.randn(B, C, generator=generator, dtype=torch.float64)).softmax(1)
    return student, target


def part(kept):
    """Inputs of which the objective needs the share that is each image's own."""
    return Inputs(torch.empty(B, 0), torch.zeros(B, dtype=torch.int64), kept=kept)


def split(target, k):
    probabilities, ids = target.topk(k, dim=1)
    return ids.int(), probabilities


def spread(target, k):
    """What k entries of a target stand for."""
    ids, probabilities = split(target, k)
    dense = ((1 - probabilities.sum(1, keepdim=True)) / max(C - k, 1)).repeat(1, C)
    return dense.scatter(1, ids.long(), probabilities)


@pytest.mark.parametrize("k", [1, 3, C])
@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_objective_is_cross_entropy_to_the_mixed_targets(logits, k, kept):
    student, target = logits
    cached, dense = split(target, k), spread(target, k)
    if kept < 1:
        cached, dense = (*cached, *map(partner, cached)), kept * dense + (1 - kept) * partner(dense)
    loss, terms = Objective()(student, Target(top_k=cached), part(kept))
    exact = -(dense * student.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, exact, rtol=1e-9, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(one, student)[0] for one in (loss, exact)), rtol=1e-9, atol=1e-12)
    values = dict(zip(TERMS, terms.tolist(), strict=True))
    divergence = (dense * (dense.log() - student.log_softmax(1))).sum(1).mean()
    assert values["kl"] == pytest.approx(float(divergence.detach()), rel=1e-5)


@pytest.mark.parametrize("kept", [1.0, 0.3])
def test_the_discriminator_tells_log_probabilities_apart(logits, kept):
    student, target = (one.detach().float() for one in logits)
    torch.manual_seed(0)
    discriminator = Discriminator(C, "cooperative")
    cached, dense = split(target, 3), spread(target, 3)
    if kept < 1:
        cached, dense = (*cached, *map(partner, cached)), kept * dense + (1 - kept) * partner(dense)
    _, terms = Objective(0.0, discriminator)(student, Target(top_k=cached), part(kept))
    sides = student.log_softmax(1), dense.log()
    expected = discriminator(*(side - side.mean(1, keepdim=True) for side in sides))
    assert float(terms[TERMS.index("discriminator_loss")]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_a_target_of_one_class_has_finite_log_probabilities(logits):
    student = logits[0].detach().float().requires_grad_()
    cached = torch.zeros(B, 1, dtype=torch.int32), torch.ones(B, 1)
    loss, terms = Objective(0.0, Discriminator(C, "adversarial"))(student, Target(top_k=cached), part(1.0))
    loss.backward()
    assert torch.isfinite(terms).all()
    assert torch.isfinite(student.grad).all()


REFUSED = {
    "size": ({"size": 48}, r"was made with --size 32, not 48: use --size 32"),
    "scale": ({"crop_scale": (0.2, 1.0)}, "--crop-scale 0.08 1.0, not 0.2 1.0"),
    "ratio": ({"crop_ratio": (1.0, 1.0)}, "--crop-ratio 0.75 1.33.*, not 1.0 1.0"),
    "flip": ({"flip": 0.0}, "--flip 0.5, not 0.0"),
    "interpolation": ({"interpolation": "bicubic"}, "--interpolation bilinear, not bicubic"),
    "no such": ({"label_cache": "/no/such"}, "--label-cache /no/such: no such folder"),
    "teachers": ({"teachers": ("resnet18", "resnet34")}, r"is of teacher test_resnet@.*, not resnet18"),
    "one teacher": ({"teachers": ("resnet18",)}, "is of 2 teachers, not 1: leave --teachers out"),
    "labels alone": ({"hard_label_weight": 1.0}, "--hard-label-weight 1 trains on labels alone: leave --label-cache"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_cache_that_does_not_fit_is_refused(cached, case):
    changes, message = REFUSED[case]
    with pytest.raises(UsageError, match=message) as caught:
        train(make_recipe(**{**cached, **changes}))
    assert "\n" not in str(caught.value)


def test_teachers_are_told_by_their_weights(cached, teachers, weights, tmp_path):
    moved = shutil.copy(weights("test_resnet", 2), tmp_path / "moved.pth")
    train(make_recipe(**{**cached, "teachers": (f"test_resnet@{moved}", teachers[1])}, max_steps=1))
    cached["run_dir"] = str(tmp_path / "other")
    other = make_recipe(**{**cached, "teachers": (f"test_resnet@{weights('test_resnet', 9)}", teachers[1])})
    with pytest.raises(UsageError, match=r"is of teacher test_resnet@.*-2-3.pth, not test_resnet@.*-9-3.pth"):
        train(other)


def test_other_images_are_refused(cached, tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    train(make_recipe(**{**cached, "data": str(root)}, max_steps=1))  # moved: the same
    (root / "train" / "bee" / "004.jpg").rename(root / "train" / "bee" / "new.jpg")
    with pytest.raises(UsageError, match="is of other images"):
        train(make_recipe(**{**cached, "data": str(root), "run_dir": str(tmp_path / "b")}))
    (root / "train" / "bee" / "new.jpg").unlink()
    with pytest.raises(UsageError, match=r"is of 25 images, but .* holds 24"):
        train(make_recipe(**{**cached, "data": str(root), "run_dir": str(tmp_path / "c")}))


def test_other_classes_are_refused(cached, cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "cache")
    header = json.loads((other / "header.json").read_text())
    for names in ({"class_names": ["ant", "bee", "cat", "dog"]}, {"class_names": None}):
        (other / "header.json").write_text(json.dumps({**header, "classes": 4, **names}))
        with pytest.raises(UsageError, match=r"is of 4 classes, but --student .* has 3"):
            train(make_recipe(**{**cached, "label_cache": str(other)}))


def test_incomplete_and_damaged_caches_are_refused(cached, cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "cache")
    header = json.loads((other / "header.json").read_text())
    (other / "header.json").write_text(json.dumps({**header, "complete": header["complete"][:2]}))
    with pytest.raises(DataError, match=r"2 of its 3 views are complete; .* or with --views 2 to make do with these"):
        train(make_recipe(**{**cached, "label_cache": str(other)}))
    with pytest.raises(DataError, match="is a file; a cache is a folder"):
        train(make_recipe(**{**cached, "label_cache": cached["student"].partition("@")[2]}))
