"""CutMix: the law of its box against the released formula, its repeatability, and the pixels it pastes."""

import numpy as np
import pytest
import torch

from mealfast.method.cutmix import Box, draw_box, mix, partner

from .. import released_code

DRAWS, SIDE = 4000, 32


def statistics(boxes) -> np.ndarray:
    """Columns: top, left, height, width, area kept."""
    boxes = np.array(boxes, float)
    top, left, bottom, right = boxes.T
    return np.stack((top, left, bottom - top, right - left, 1 - (bottom - top) * (right - left) / SIDE**2), axis=1)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two distribution functions."""
    points = np.union1d(a, b)
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def test_the_law_of_the_box_is_the_released_one():
    ours = statistics(
        [
            (box.top, box.left, box.bottom, box.right)
            for step in range(DRAWS)
            for box in [draw_box(3, step, 0, SIDE, SIDE)]
        ]
    )
    generator = np.random.default_rng(1)
    theirs = statistics([released_code.rand_bbox(SIDE, generator) for _ in range(DRAWS)])
    # 2.2 / sqrt(n) bounds two samples of n of one law with 99.99%; a beta of 0.5 or 2 is 0.07 and more away.
    bound = 2.2 * np.sqrt(2 / DRAWS)
    for column in range(5):
        assert distance(ours[:, column], theirs[:, column]) < bound


def test_the_kept_area_is_what_the_box_leaves():
    for step in range(200):
        box = draw_box(0, step, 1, 20, 30)
        assert 0 <= box.top <= box.bottom <= 20
        assert 0 <= box.left <= box.right <= 30
        pasted = np.zeros((20, 30))
        pasted[box.top : box.bottom, box.left : box.right] = 1
        assert box.kept == pytest.approx(1 - pasted.mean(), abs=1e-12)


def test_a_box_is_a_pure_function_of_seed_step_and_rank():
    def draw(seed, step, rank):
        return draw_box(seed, step, rank, 97, 101)

    boxes = {
        (seed, step, rank): draw(seed, step, rank)
        for seed in (0, 1, 2**63 - 1)
        for step in (0, 1, 7, 10**6)
        for rank in (0, 1, 63)
    }
    np.random.seed(0)
    torch.manual_seed(0)
    assert all(draw(*key) == box for key, box in reversed(boxes.items()))
    assert len(set(boxes.values())) == len(boxes), "another seed, step or rank must give another box"


def test_pixels_are_pasted_exactly():
    images = torch.randint(0, 256, (5, 9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    mixed = mix(images, Box(2, 1, 6, 5, 0.0))
    assert torch.equal(images, before)
    for row in range(5):
        for y in range(9):
            for x in range(7):
                source = (row - 1) % 5 if 2 <= y < 6 and 1 <= x < 5 else row
                assert mixed[row, y, x].tolist() == images[source, y, x].tolist()


def test_the_labels_partner_is_the_pixels_partner():
    labels = torch.arange(6)
    images = labels.to(torch.uint8)[:, None, None, None].expand(6, 4, 4, 3)
    mixed = mix(images, Box(0, 0, 4, 4, 0.0))
    assert mixed[:, 0, 0, 0].tolist() == partner(labels).tolist() == [5, 0, 1, 2, 3, 4]


def test_an_empty_box_leaves_the_images():
    images = torch.randint(0, 256, (3, 4, 4, 3), dtype=torch.uint8)
    assert torch.equal(mix(images, Box(2, 2, 2, 3, 1.0)), images)
