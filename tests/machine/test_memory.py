"""A full device is one line that says what to lower."""

import pytest
import torch

from mealfast.errors import RunError
from mealfast.machine import memory
from mealfast.recipe import make_recipe
from mealfast.training.loop import train
from mealfast.training.step import Step

from ..runs import last


def test_a_full_memory_is_one_line_with_the_options_to_lower(fields, tmp_path, monkeypatch):
    """The first steps fit, a later one does not: what was reached is saved."""
    learn = Step.learn

    def full(self, inputs):
        if self.taken == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")
        learn(self, inputs)

    monkeypatch.setattr(Step, "learn", full)
    recipe = make_recipe(**{**fields, "run_dir": str(tmp_path / "run"), "accumulate": 2})
    with pytest.raises(RunError, match=r"memory of cpu .* lower --batch-size, .*--accumulate 4") as caught:
        train(recipe)
    assert "\n" not in str(caught.value)
    assert last(tmp_path / "run")["step"] == 3


def test_a_gpus_line_has_its_peak_and_its_capacity(monkeypatch):
    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 62 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    line = r"cuda:0 .*62\.0 GiB at the peak, of 80\.0 GiB.*: lower --batch-size$"
    with pytest.raises(RunError, match=line), memory.enough(torch.device("cuda", 0), "lower --batch-size"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="another"), memory.enough(torch.device("cpu"), "lower --batch-size"):
        raise RuntimeError("another")
