"""The views of a recipe: its own, a label cache's, or those that a run writes; and the folder of its images."""

import shutil

import numpy as np
import pytest

from mealfast.errors import UsageError
from mealfast.loaders import EXPLICIT, CacheHeader, ExplicitViews, ImageIndex, ViewPlan, plan_fields
from mealfast.machine.processes import start
from mealfast.method.data import scan_images, view_plan
from mealfast.recipe import make_recipe

CHANGES = {"size": 48, "crop_scale": (0.2, 0.9), "crop_ratio": (0.8, 1.2), "flip": 0.3, "interpolation": "bicubic"}


@pytest.fixture(scope="module")
def index(tree):
    return ImageIndex.scan(tree / "train")


class Cache:
    def __init__(self, header):
        self.header = header


def test_every_option_of_the_views_is_the_recipes(index):
    recipe = make_recipe(student="s", hard_label_weight=1.0, seed=5, **CHANGES)
    views = {"size": 48, "scale": (0.2, 0.9), "ratio": (0.8, 1.2), "flip": 0.3, "interpolation": "bicubic"}
    same = ViewPlan(index.widths, index.heights, seed=5, **views)
    assert view_plan(recipe, index).fingerprint() == same.fingerprint()
    for ours, theirs in zip(view_plan(recipe, index).views(3), same.views(3), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    written = ViewPlan(index.widths, index.heights, seed=9, cycle=4, **views)
    assert view_plan(recipe, index, seed=9, cycle=4).fingerprint() == written.fingerprint()


def test_a_cache_decides_the_seed_and_the_number(index):
    recipe = make_recipe(student="s", hard_label_weight=1.0, seed=5, **CHANGES)
    stored = plan_fields(view_plan(recipe, index, seed=7))
    header = CacheHeader(len(index), "", stored, 3, 3, 1, ({"spec": "t", "digest": ""},), {})
    plan = view_plan(recipe, index, Cache(header))
    assert plan.fingerprint() == {**stored, "cycle": 3}
    explicit = CacheHeader(len(index), "", {"law": EXPLICIT}, 6, 3, 1, ({"spec": "t", "digest": ""},), {})
    plan = view_plan(recipe, index, Cache(explicit))
    assert isinstance(plan, ExplicitViews)
    assert (plan.seed, plan.size, plan.interpolation, plan.cycle) == (5, 48, "bicubic", 6)


def test_a_folder_of_images_or_one_that_holds_it(tree, tmp_path):
    runtime = start("cpu")
    assert scan_images(str(tree), "train", runtime).root == tree / "train"
    assert scan_images(str(tree), "val", runtime).root == tree / "val"
    shutil.copytree(tree / "val", tmp_path / "images")
    assert len(scan_images(str(tmp_path / "images"), "val", runtime, workers=1)) == 11
    for data, message in (("", "--data is missing"), (str(tmp_path / "none"), "--data .*none: no such folder")):
        with pytest.raises(UsageError, match=message):
            scan_images(data, "train", runtime)
