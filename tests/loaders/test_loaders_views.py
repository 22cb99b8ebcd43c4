"""The view plan: torchvision's law, a pure function of seed and epoch, exact evaluation geometry."""

import hashlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import CenterCrop, RandomResizedCrop, Resize

from mealfast.loaders import DataError, EvalViews, ViewPlan
from mealfast.loaders.steps import _PlannedEpochs

# Landscape, portrait, square, tiny, and strips so long that some or all random shapes fail to fit.
SIZES = [(500, 375), (375, 500), (256, 256), (31, 47), (640, 200), (150, 700), (1000, 300), (8, 8)]


def mixed_sizes(n):
    sizes = np.array(SIZES)[np.arange(n) % len(SIZES)]
    return sizes[:, 0], sizes[:, 1]


def torchvision_crops(widths, heights, scale, ratio):
    boxes = []
    for w, h in zip(widths.tolist(), heights.tolist(), strict=True):
        image = torch.empty(1).expand(3, h, w)
        top, left, height, width = RandomResizedCrop.get_params(image, list(scale), list(ratio))
        boxes.append((left, top, width, height))
    return np.array(boxes)


def features(boxes, widths, heights):
    x, y, w, h = boxes.T.astype(float)
    free_x, free_y = widths - w, heights - h
    return {
        "area": w * h / (widths * heights),
        "ratio": w / h,
        "x": (x / np.maximum(free_x, 1))[free_x > 0],
        "y": (y / np.maximum(free_y, 1))[free_y > 0],
    }


@pytest.mark.parametrize(
    ("n", "scale", "ratio"), [(100_000, (0.08, 1.0), (3 / 4, 4 / 3)), (16_000, (0.35, 0.9), (1.0, 2.0))]
)
def test_crops_follow_torchvisions_distribution(n, scale, ratio):
    torch.manual_seed(0)
    widths, heights = mixed_sizes(n)
    boxes, _ = ViewPlan(widths, heights, seed=3, size=224, scale=scale, ratio=ratio).views(0)
    expected = torchvision_crops(widths, heights, scale, ratio)
    ours, theirs = features(boxes, widths, heights), features(expected, widths, heights)
    p = {name: ks_2samp(ours[name], theirs[name]).pvalue for name in ours}
    assert min(p.values()) > 0.01, p
    # Size by size too: a mixture can hide a law that is wrong for one shape.
    for k, size in enumerate(SIZES):
        for side in (2, 3):
            p = ks_2samp(boxes[k :: len(SIZES), side], expected[k :: len(SIZES), side]).pvalue
            assert p > 1e-4, (size, side, p)


def test_the_fallback_crop_is_torchvisions():
    widths, heights = np.array([1000, 50, 999, 51, 1]), np.array([50, 1000, 37, 1001, 90])  # no random shape fits
    boxes, _ = ViewPlan(widths, heights, seed=0, size=224).views(0)
    np.testing.assert_array_equal(boxes, torchvision_crops(widths, heights, (0.08, 1.0), (3 / 4, 4 / 3)))


def test_every_box_lies_in_its_image_and_flips_are_fair():
    widths, heights = mixed_sizes(40_000)
    boxes, flips = ViewPlan(widths, heights, seed=9, size=32).views(5)
    assert boxes.dtype == np.int32
    assert flips.dtype == np.bool_
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, 0] + boxes[:, 2] <= widths).all()
    assert (boxes[:, 1] + boxes[:, 3] <= heights).all()
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(flips))  # 4 standard errors
    assert not ViewPlan(widths, heights, seed=9, size=32, flip=0).views(5)[1].any()


def test_order_is_a_uniform_permutation_for_each_seed_and_epoch():
    n = 5000
    widths, heights = mixed_sizes(n)
    orders = {(s, e): ViewPlan(widths, heights, seed=s, size=8).order(e) for s in (0, 1) for e in (0, 1, 2)}
    for order in orders.values():
        assert order.dtype == np.int64
        np.testing.assert_array_equal(np.sort(order), np.arange(n))
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 4 / np.sqrt(n)
    digests = {hashlib.sha256(order.tobytes()).hexdigest() for order in orders.values()}
    assert len(digests) == len(orders)


def test_views_of_different_epochs_and_seeds_are_independent():
    widths, heights = np.full(4000, 500), np.full(4000, 400)
    areas = []
    for seed, view in [(0, 0), (0, 1), (1, 0), (2**64 - 1, 2**48 - 1)]:
        boxes, _ = ViewPlan(widths, heights, seed=seed, size=8).views(view)
        areas.append(boxes[:, 2].astype(float) * boxes[:, 3])
    correlation = np.corrcoef(areas) - np.eye(len(areas))
    assert np.abs(correlation).max() < 4 / np.sqrt(4000)


def plan_digest():
    widths, heights = mixed_sizes(1000)
    plan = ViewPlan(widths, heights, seed=42, size=224)
    boxes, flips = plan.views(7)
    return hashlib.sha256(plan.order(7).astype("<i8").tobytes() + boxes.astype("<i4").tobytes() + flips.tobytes())


def test_the_plan_is_the_same_in_any_process():
    code = f"""
import hashlib, numpy as np
from mealfast.loaders import ViewPlan
sizes = np.array({SIZES})[np.arange(1000) % {len(SIZES)}]
plan = ViewPlan(sizes[:, 0], sizes[:, 1], seed=42, size=224)
plan.order(3), plan.views(2)  # what was planned before has no influence
boxes, flips = plan.views(7)
data = plan.order(7).astype("<i8").tobytes() + boxes.astype("<i4").tobytes() + flips.tobytes()
print(hashlib.sha256(data).hexdigest())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == plan_digest().hexdigest()


def test_the_plan_never_changes_meaning_silently():
    # Label caches and resumed runs rest on these views: whoever changes them must raise views.LAW too.
    assert plan_digest().hexdigest()[:16] == PINNED


PINNED = "f2ab30e6c1f99941"


def test_cycle_repeats_views_and_is_in_the_fingerprint():
    widths, heights = mixed_sizes(10)
    plan = ViewPlan(widths, heights, seed=0, size=8, cycle=3)
    assert [plan.view_of_epoch(e) for e in range(5)] == [0, 1, 2, 0, 1]
    assert ViewPlan(widths, heights, seed=0, size=8).view_of_epoch(4) == 4
    base = {"seed": 0, "size": 8}
    variants = [
        base,
        {**base, "seed": 1},
        {**base, "size": 9},
        {**base, "scale": (0.1, 1.0)},
        {**base, "ratio": (0.8, 1.25)},
        {**base, "flip": 0.0},
        {**base, "interpolation": "bicubic"},
        {**base, "cycle": 2},
    ]
    prints = [repr(ViewPlan(widths, heights, **options).fingerprint()) for options in variants]
    assert len(set(prints)) == len(variants)


def test_the_next_epoch_is_planned_in_the_background():
    planned = {epoch: threading.Event() for epoch in range(4)}

    class Recording(ViewPlan):
        def order(self, epoch):
            order = super().order(epoch)
            assert threading.current_thread() is not threading.main_thread()
            planned[epoch].set()
            return order

    epochs = _PlannedEpochs(Recording(*mixed_sizes(100), seed=0, size=8), last=2)
    epochs.get(0)
    assert planned[1].wait(30)
    assert not planned[2].is_set()
    epochs.get(1)
    assert planned[2].wait(30)
    epochs.get(2)
    epochs.close()
    assert not planned[3].is_set()  # no epoch beyond the last step


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (380, 434), (224, 235), (100, 60), (33, 48), (48, 33)])
def test_eval_geometry_is_torchvisions(size, resize):
    shapes = [*SIZES, (501, 333), (333, 501), (97, 98), (100, 61), (7, 300)]
    widths, heights = np.array(shapes).T
    resized, offsets = EvalViews(size, resize).geometry(widths, heights)
    for (w, h), (rw, rh), (x, y) in zip(shapes, resized.tolist(), offsets.tolist(), strict=True):
        # An image whose pixels say where they are: red counts columns, green rows, blue their hundreds.
        image = Resize(resize)(Image.new("RGB", (w, h)))
        assert image.size == (rw, rh)
        columns, rows = np.meshgrid(np.arange(rw) + 1, np.arange(rh) + 1)
        coded = np.stack([columns % 251, rows % 251, columns // 251 * 16 + rows // 251], axis=-1).astype(np.uint8)
        expected = np.asarray(CenterCrop(size)(Image.fromarray(coded)))
        ours = np.asarray(Image.fromarray(coded).crop((x, y, x + size, y + size)))
        np.testing.assert_array_equal(ours, expected)


def test_crop_pct_is_the_papers_or_timms():
    assert EvalViews.from_crop_pct(224) == EvalViews(224, 256)
    assert EvalViews.from_crop_pct(380) == EvalViews(380, 434)
    assert EvalViews.from_crop_pct(224, 0.875, "bicubic") == EvalViews(224, 256, "bicubic")
    assert EvalViews.from_crop_pct(380, 0.922) == EvalViews(380, 412)
    assert EvalViews.from_crop_pct(224, 1.0).resize == 224
    assert EvalViews.from_crop_pct(240, 0.882).resize == 272


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"seed": -1}, "--seed"),
        ({"size": 0}, "--size"),
        ({"scale": (0.5, 0.1)}, "scale"),
        ({"ratio": (0, 1)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"interpolation": "nearest"}, "--interpolation"),
        ({"cycle": 0}, "views"),
        ({"heights": np.ones(3, int)}, "one length"),
    ],
)
def test_bad_options_get_one_line(options, word):
    options = {"widths": np.ones(2, int), "heights": np.ones(2, int), "seed": 0, "size": 8, **options}
    with pytest.raises(DataError, match=word) as error:
        ViewPlan(**options)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="crop-pct"):
        EvalViews.from_crop_pct(224, 0.0)
