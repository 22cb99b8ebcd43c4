"""The recording target source: what the student is compared with in a step, and what of it reaches the cache."""

from contextlib import closing

import numpy as np
import pytest
import torch

from mealfast.errors import UsageError
from mealfast.kernels import ensemble_topk
from mealfast.labels.labelling import LabelTeachers, described
from mealfast.labels.write_through import RecordingTargets, WritePlan
from mealfast.loaders import Batch, DataError, ImageIndex, LabelCache, LabelWriter
from mealfast.machine.processes import Runtime
from mealfast.method.data import view_plan
from mealfast.method.inputs import Inputs
from mealfast.method.targets import LiveTargets
from mealfast.recipe import make_recipe

B, C, K, SIZE = 6, 5, 2, 8
PLAN = WritePlan(first=0, views=2, top_k=K, seed=0)


class Teachers:
    """Two of them, linear in an image's mean; notes how many images they are shown at a time."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.scale = 0.01

    def __call__(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.seen.append(len(images))
        means = images.float().mean(dim=(1, 2, 3))[:, None] * self.scale
        return [means * torch.linspace(-2, 1, C), means * torch.linspace(1, -3, C)]


@pytest.fixture(scope="module")
def index(tree):
    return ImageIndex.scan(tree / "train")


@pytest.fixture
def opened(index, tmp_path):
    """`opened(**changes of the recipe)`: the target source and its teachers; 4 steps of 6 an epoch, of 25 images."""
    made = []

    def make(**changes):
        recipe = make_recipe(
            student="s", teachers=("a", "b"), size=SIZE, batch_size=B, loader="pillow", amp="off",
            label_cache=str(tmp_path / "cache"), **changes,
        )  # fmt: skip
        teachers = Teachers()
        ready = LabelTeachers(teachers, described("ab", ("01", "02")), C, compiled=False)
        runtime = Runtime(0, 1, torch.device("cpu"))
        plan = view_plan(recipe, index, seed=PLAN.seed, cycle=PLAN.views)
        made.append(RecordingTargets(recipe, runtime, ready, index, plan, PLAN))
        return made[-1], teachers

    yield make
    for source in made:
        source.close()


@pytest.fixture
def batch():
    images = torch.randint(0, 255, (B, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return Batch(images, torch.zeros(B, dtype=torch.int64), torch.tensor([3, 1, 24, 0, 9, 8]))


def step(source, batch, number, accumulate=1, mix=lambda images: images):
    """As training calls it; the parts' targets."""
    inputs = Inputs(mix(batch.images), batch.labels, cached=source.before(batch))
    made = [source(part) for part, _ in inputs.parts(accumulate)]
    source.after(batch, number)
    source.flush()
    return made


def written(folder, view) -> np.ndarray:
    """The images of which the cache has the targets of a view."""
    with closing(LabelWriter(folder)) as writer:
        return np.setdiff1d(np.arange(25), writer.missing(view))


def test_targets_are_the_live_teachers_and_their_top_k_is_written(opened, batch, tmp_path):
    source, teachers = opened()
    (target,) = step(source, batch, 5)  # of the second epoch
    logits = Teachers()(batch.images)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(target.logits, logits, strict=True))
    ids, probabilities = ensemble_topk(logits, K)
    assert torch.equal(target.top_k[0], ids)
    assert torch.equal(target.top_k[1], probabilities)
    assert teachers.seen == [B]
    assert written(tmp_path / "cache", 0).size == 0
    np.testing.assert_array_equal(written(tmp_path / "cache", 1), sorted(batch.indices.tolist()))


def test_under_cutmix_they_are_the_top_k_of_the_images_as_they_are(opened, batch, tmp_path):
    source, teachers = opened(cutmix=True, accumulate=2)
    parts = step(source, batch, 0, accumulate=2, mix=lambda images: 255 - images)
    ids, probabilities = ensemble_topk(Teachers()(batch.images), K)
    assert teachers.seen == [B // 2, B // 2]
    assert all(not part.logits for part in parts)
    assert torch.equal(torch.cat([part.top_k[0] for part in parts]), ids)
    assert torch.equal(torch.cat([part.top_k[1] for part in parts]), probabilities)
    assert written(tmp_path / "cache", 0).size == B


@pytest.mark.parametrize("cutmix", [False, True])
def test_a_batch_that_brings_its_targets_needs_no_teacher(opened, batch, tmp_path, cutmix):
    source, teachers = opened(cutmix=cutmix)
    given = ensemble_topk(Teachers()(batch.images), K)
    batch = Batch(batch.images, batch.labels, batch.indices, given)
    (target,) = step(source, batch, 0)
    assert target.top_k == given
    assert not target.logits
    assert teachers.seen == []
    assert written(tmp_path / "cache", 0).size == 0


@pytest.mark.parametrize("cutmix", [False, True])
def test_steps_that_are_only_measured_write_nothing(opened, batch, tmp_path, cutmix):
    """A stage report and a replay take the teachers alone beside a cache that is open."""
    recording, teachers = opened(cutmix=cutmix)
    source = LiveTargets(teachers)
    target = source(Inputs(batch.images, batch.labels, cached=source.before(batch)))
    source.after(batch, 0)
    recording.flush()
    assert len(target.logits) == 2
    assert target.top_k == ()
    assert teachers.seen == [B]
    assert written(tmp_path / "cache", 0).size == 0


def test_what_is_not_finite_stays_missing_and_is_not_completed(opened, batch, tmp_path):
    source, teachers = opened()
    ids, probabilities = ensemble_topk(Teachers()(batch.images), K)
    probabilities[2, 0] = torch.nan
    source.add(0, batch.indices, [(ids, probabilities)])
    source.flush()
    np.testing.assert_array_equal(written(tmp_path / "cache", 0), [0, 1, 3, 8, 9])
    teachers.scale = torch.nan
    with pytest.raises(DataError, match=r"--teachers: the target of view 0, image 2, is no distribution"):
        source.finish(range(1))


def test_after_its_epochs_it_writes_no_more_and_reads(opened, batch, tmp_path):
    source, teachers = opened()
    step(source, batch, 8)  # of the third epoch: two views are written
    assert not list((tmp_path / "cache").glob("rows-*"))
    assert source.finish(range(2)) == [
        f"label cache: view {view + 1} of 2 is complete; 25 of 25 targets were made outside of the steps"
        for view in range(2)
    ]
    assert teachers.seen == [B, *2 * [6, 6, 6, 6, 1]]
    assert source.finish(range(2)) == []
    assert LabelCache(tmp_path / "cache").header.is_complete
    assert source.cache.has(1)


def test_two_programs_at_once_are_refused(opened):
    opened()
    with pytest.raises(DataError, match=r"--label-cache .*: another build is writing there"):
        opened()


def test_more_entries_than_classes_are_refused(index, opened, monkeypatch):
    monkeypatch.setitem(globals(), "PLAN", WritePlan(0, 2, C + 1, 0))
    with pytest.raises(UsageError, match="--label-cache-top-k 6: the teachers have 5 classes"):
        opened()


@pytest.mark.parametrize("stored", [{"first": 0}, {**PLAN.to_json(), "views": "2"}, {**PLAN.to_json(), "more": 1}])
def test_a_plan_of_something_else_is_no_plan(stored):
    with pytest.raises(TypeError):
        WritePlan(**stored)
