"""The engine's GPU path: on a GPU for real, and everywhere on fake CUDA tensors, which notice mixed devices."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mealfast.method.discriminator import Discriminator
from mealfast.method.inputs import Inputs
from mealfast.method.objective import TERMS, Objective
from mealfast.method.targets import Target
from mealfast.models.ensemble import Ensemble
from mealfast.models.normalised import build
from mealfast.recipe import make_recipe
from mealfast.training.loop import train


def lines(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def test_the_forward_path_stays_on_one_cuda_device():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        models = [build(f"{name}?num_classes=10", 32) for name in ("test_efficientnet", "resnet10t", "test_resnet")]
        student, ensemble = models[0], Ensemble(models[1:]).eval()
        objective = Objective(0.5, Discriminator(10, "cooperative"))
        images = torch.zeros(4, 32, 32, 3, dtype=torch.uint8)
        labels = torch.zeros(4, dtype=torch.int64)
        with torch.no_grad():
            teacher_logits = ensemble(images)
            part = Inputs(images, labels, labels.roll(1), kept=0.5)
            loss, terms = objective(student(images), Target(teacher_logits), part)
        assert {tensor.device.type for tensor in (loss, terms, *teacher_logits)} == {"cuda"}
        assert terms.shape == (len(TERMS),)


def test_mixed_devices_are_noticed():
    """The check above can fail: a layer left on the CPU raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer = nn.Linear(4, 4, device="cpu")
        with pytest.raises(RuntimeError, match="device"):
            layer(torch.zeros(2, 4, device="cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
class TestOnAGpu:
    def test_agrees_with_the_cpu(self, fields, tmp_path, exact_cuda):
        settings = {**fields, "amp": "off", "max_steps": 2, "log_every": 1}
        for device in ("cpu", "cuda"):
            train(make_recipe(None, **{**settings, "device": device, "run_dir": str(tmp_path / device)}))
        for kind, keys in (("train", ("loss", "soft_ce", "kl", "discriminator_loss")), ("eval", ("kl",))):
            cpu, gpu = lines(tmp_path / "cpu", kind)[0], lines(tmp_path / "cuda", kind)[0]
            for key in keys:
                assert gpu[key] == pytest.approx(cpu[key], rel=1e-3), key

    @pytest.mark.parametrize(
        "changes",
        [
            {"loader": "dali", "amp": "bf16", "compile": True},
            {"loader": "dali", "amp": "fp16", "compile": False},
            {"loader": "pillow", "amp": "off", "accumulate": 2, "cutmix": True, "discriminator": "adversarial"},
        ],
        ids=lambda changes: "-".join(f"{key}={value}" for key, value in changes.items()),
    )
    def test_trains(self, fields, tmp_path, changes):
        gpu = {"device": "cuda", "run_dir": str(tmp_path), "log_every": 1, "lr": 0.005, "epochs": 10, "eval_every": 0}
        summary = train(make_recipe(None, **{**fields, **gpu, **changes}))
        assert summary["finished"]
        assert summary["skipped_steps"] <= (5 if changes["amp"] == "fp16" else 0)  # a scale that begins too high
        losses = [line["soft_ce"] for line in lines(tmp_path, "train") if line["soft_ce"] is not None]
        assert sum(losses[-6:]) < sum(losses[:6])

    def test_resumes(self, fields, tmp_path):
        settings = {**fields, "device": "cuda", "run_dir": str(tmp_path)}
        train(make_recipe(None, **settings, max_steps=4))
        assert train(make_recipe(None, **settings))["finished"]
