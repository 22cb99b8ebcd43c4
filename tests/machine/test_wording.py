"""Numbers with their nouns."""

import pytest

from mealfast.machine.wording import counted


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (1, "epoch", "1 epoch"), (0, "image", "0 images"), (1200, "image", "1,200 images"), (1, "class", "1 class"),
        (2, "class", "2 classes"), (3, "batch", "3 batches"), (2, "process", "2 processes"),
        (180, "epoch", "180 epochs"),
    ],
)  # fmt: skip
def test_a_number_and_its_noun_agree(number, noun, text):
    assert counted(number, noun) == text
