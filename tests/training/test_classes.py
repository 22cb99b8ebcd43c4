"""Runs whose teachers number the classes otherwise than the folders lie: names decide, and runs of before go on."""

import json
import shutil

import numpy as np
import pytest
import torch

from mealfast.errors import UsageError
from mealfast.labels.build import build
from mealfast.loaders import LabelCache
from mealfast.machine import processes as runtimes
from mealfast.models import normalised as models
from mealfast.models import weights as weights_files
from mealfast.recipe import make_recipe
from mealfast.record import checkpoint
from mealfast.record.run_directory import RunDirectory
from mealfast.training import report
from mealfast.training.assemble import make_job
from mealfast.training.loop import train

from ..conftest import write_tree
from ..runs import differences, last

BYTES, NATURAL = ("B1", "a0", "c2"), ("a0", "B1", "c2")
ROWS = [1, 0, 2]  # of a classifier, from one order to the other


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = tmp_path_factory.mktemp("mixed")
    for seed, part in enumerate(("train", "val")):
        write_tree(root / part, dict.fromkeys(NATURAL, 8), seed=seed)
    return root


@pytest.fixture(scope="module")
def natural(weights, tmp_path_factory):
    """Teachers' files: as timm trained it; the same with the classifier's rows in byte order; one that has names."""
    folder = tmp_path_factory.mktemp("teachers")
    state = torch.load(weights("test_resnet", 2), weights_only=True)
    torch.save(state, folder / "natural.pth")
    torch.save({**state, "fc.weight": state["fc.weight"][ROWS], "fc.bias": state["fc.bias"][ROWS]}, folder / "byte.pth")
    model = models.build(f"test_resnet@{folder / 'natural.pth'}")
    model.classes = NATURAL
    weights_files.save(model.model, folder / "named.safetensors", model.description(32))
    return folder


@pytest.fixture
def recipe_of(options, mixed, natural, tmp_path):
    """`recipe_of(teacher's file, run's name, ...)`."""

    def make(teacher, run, **changes):
        spec = str(natural / teacher) if teacher == "named.safetensors" else f"test_resnet@{natural / teacher}"
        fields = {
            **options, "data": str(mixed), "teachers": (spec,),
            "student": "test_efficientnet?num_classes=3&weights=random", "epochs": 2, "hard_label_weight": 0.25,
            "tune_teachers": False, "eval_start": False,
            "run_dir": str(tmp_path / run),
        }  # fmt: skip
        return make_recipe(**{**fields, **changes})

    return make


def job_of(recipe):
    return make_job(recipe, runtimes.start("cpu"), RunDirectory(recipe.run_dir))[0]


def test_a_teacher_in_another_order_teaches_as_one_in_the_students(recipe_of, tmp_path):
    """Against the same teacher with the rows of its classifier moved in the file."""
    with pytest.raises(UsageError, match="does not say which output is which class, and output 0 is a0 in natural"):
        train(recipe_of("natural.pth", "refused"))
    runs = {
        run: train(recipe_of(teacher, run, class_map=word))
        for run, teacher, word in (
            ("a", "natural.pth", "natural"), ("b", "byte.pth", "byte"), ("c", "named.safetensors", ""),
            ("wrong", "natural.pth", "byte"),
        )
    }  # fmt: skip
    a, b, c, wrong = (last(tmp_path / run)["student"] for run in runs)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert differences(a, c) == []
    assert max(float((a[key] - wrong[key]).abs().max()) for key in a if a[key].is_floating_point()) > 1e-3
    assert runs["a"]["teachers"][0]["top1"] == runs["b"]["teachers"][0]["top1"]
    digests = [json.loads((tmp_path / run / "config.json").read_text())["teacher_digests"].values() for run in "ac"]
    assert set(digests[0]) == set(digests[1]), "of the file's weights, in whatever order they are used"
    found = models.build(str(tmp_path / "a"))
    assert (found.classes, found.trained_size) == (BYTES, 32)
    assert json.loads((tmp_path / "a" / "config.json").read_text())["model"]["classes"] == list(BYTES)


def test_a_run_goes_on_in_the_orders_it_had(recipe_of, tmp_path):
    train(recipe_of("natural.pth", "whole", class_map="natural"))
    recipe = recipe_of("natural.pth", "stopped", class_map="natural", max_steps=2)
    train(recipe)
    with pytest.raises(UsageError, match="with --class-map natural, not none"):
        train(recipe_of("natural.pth", "stopped"))
    folder = tmp_path / "stopped" / "checkpoints"
    content = checkpoint.newest(folder)[1]
    for change in ({"class_orders": [[0, 0, 1]]}, {"class_orders": [None, None]}, {"class_orders": 3}, {"model": []}):
        checkpoint.save(tmp_path / "bad", 2, {**content, **change}, keep=1)
        bad = checkpoint.candidates(tmp_path / "bad")[0]
        with pytest.raises(UsageError, match=r"is damaged \("):
            train(recipe_of("natural.pth", "stopped", class_map="natural", resume=str(bad)))
        shutil.rmtree(tmp_path / "bad")
    train(recipe_of("natural.pth", "stopped", class_map="natural"))
    whole, stopped = (last(tmp_path / run) for run in ("whole", "stopped"))
    del whole["recipe"], stopped["recipe"]
    assert differences(whole, stopped) == []


def test_a_run_of_an_earlier_mealfast_goes_on_in_byte_order(recipe_of, tmp_path):
    """Which knew no names: neither its checkpoints nor its config.json hold any, and no option said the order."""
    train(recipe_of("byte.pth", "whole", class_map="byte"))
    train(recipe_of("byte.pth", "old", class_map="byte", max_steps=2))
    folder = tmp_path / "old"
    path, content = checkpoint.newest(folder / "checkpoints")
    del content["model"], content["class_orders"], content["recipe"]["class_map"]
    path.unlink()
    checkpoint.save(folder / "checkpoints", content.pop("step"), content, keep=2)
    config = json.loads((folder / "config.json").read_text())
    del config["model"], config["recipe"]["class_map"]
    (folder / "config.json").write_text(json.dumps(config))
    for limit in (3, None):  # once from its checkpoint, once from one of ours
        train(recipe_of("byte.pth", "old", max_steps=limit))
    whole, old = (last(tmp_path / run) for run in ("whole", "old"))
    del whole["recipe"], old["recipe"]
    assert differences(whole, old) == []
    assert models.build(str(folder)).classes == BYTES


def test_a_class_without_images_is_said(recipe_of, mixed, tmp_path):
    shutil.copytree(mixed, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "val" / "c2")
    job = job_of(recipe_of("named.safetensors", "run", data=str(tmp_path / "data")))
    note = f"note: {tmp_path / 'data' / 'val'}: no image of 1 of 3 classes: c2"
    assert note in report.introduction(job)
    assert sorted(set(job.data.val.labels.tolist())) == [0, 1]
    shutil.rmtree(tmp_path / "data" / "train" / "c2")
    job = job_of(recipe_of("named.safetensors", "run", data=str(tmp_path / "data")))
    assert job.student.normalised.classes == BYTES, "the teacher knows the third"


def test_classes_that_differ_are_refused(recipe_of, natural, tmp_path):
    model = models.build(str(natural / "named.safetensors"))
    model.classes = ("a0", "B1", "zebra")
    weights_files.save(model.model, tmp_path / "other.safetensors", model.description(32))
    spec = str(tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match=r"class folder c2 is none of the 3 classes of --teachers .*: a0, B1, zebra"):
        job_of(recipe_of("natural.pth", "run", teachers=(spec,)))
    with pytest.raises(UsageError, match=r"are not those of --student .*: only it has zebra; it lacks c2"):
        job_of(recipe_of("natural.pth", "run", teachers=(spec,), student=str(natural / "named.safetensors")))


# -- label caches -----------------------------------------------------------------------------------------------------


def built(recipe, folder):
    return build(recipe, runtimes.start("cpu"), folder, views=2, top_k=2, batch_size=8)


def test_a_caches_targets_come_in_the_students_order(recipe_of, tmp_path):
    with pytest.raises(UsageError, match="does not say which output is which class"):
        built(recipe_of("natural.pth", "run"), tmp_path / "cache")
    header = built(recipe_of("natural.pth", "run", class_map="natural"), tmp_path / "cache")
    assert header.class_names == NATURAL
    cached = {"label_cache": str(tmp_path / "cache"), "teachers": ()}
    job = job_of(recipe_of("natural.pth", "run", **cached))
    rows = np.arange(len(job.data.train))
    (theirs, p), (ours, q) = (cache.targets(1, rows) for cache in (LabelCache(tmp_path / "cache"), job.label_cache))
    assert np.array_equal(np.array(NATURAL)[theirs], np.array(BYTES)[ours])
    assert np.array_equal(p, q)
    content = json.loads((tmp_path / "cache" / "header.json").read_text())
    assert content.pop("class_names") == list(NATURAL)
    (tmp_path / "cache" / "header.json").write_text(json.dumps(content))  # as an earlier mealfast wrote it
    with pytest.raises(UsageError, match=r"--label-cache .*/cache: does not say which output is which class"):
        job_of(recipe_of("natural.pth", "run", **cached))
    again = job_of(recipe_of("natural.pth", "run", **cached, class_map="natural"))
    assert np.array_equal(again.label_cache.targets(1, rows)[0], ours)
    built(recipe_of("natural.pth", "run"), tmp_path / "cache")  # complete, and goes on without names


def test_a_run_writes_its_cache_in_the_students_order(recipe_of, tmp_path):
    writing = {"label_cache": str(tmp_path / "cache"), "label_cache_top_k": 2, "class_map": "natural"}
    train(recipe_of("natural.pth", "run", **writing))
    cache = LabelCache(tmp_path / "cache")
    assert cache.header.class_names == BYTES
    built(recipe_of("byte.pth", "x", class_map="byte"), tmp_path / "built")
    rows = np.arange(cache.header.images)
    ids, p = cache.targets(0, rows)
    other, q = LabelCache(tmp_path / "built").targets(0, rows)
    assert np.array_equal(ids, other)
    np.testing.assert_allclose(p, q, atol=2e-3)
    content = json.loads((tmp_path / "cache" / "header.json").read_text())
    del content["class_names"]
    content["complete"] = content["complete"][:1]
    (tmp_path / "cache" / "header.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="was begun by an earlier mealfast, with the teachers' outputs in another"):
        train(recipe_of("natural.pth", "second", **writing))
