"""What a run tells: the lines of metrics.jsonl, TensorBoard's scalars, pictures and percentiles."""

import io
import json
import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mealfast.recipe import make_recipe
from mealfast.record.clock import Clock
from mealfast.record.metrics import Picture, Telemetry, middle_convolution
from mealfast.training.loop import train

from ..runs import last, lines

TRAIN = {
    "kind", "epoch", "step", "loss", "soft_ce", "kl", "discriminator_loss", "lr", "images_per_second",
    "data_wait_fraction",
}  # fmt: skip
EVAL = {"kind", "epoch", "step", "top1", "top5", "images", "kl"}


@pytest.fixture(scope="module")
def ran(fields, tmp_path_factory):
    """A run directory, after six steps in two epochs with an interruption, and its TensorBoard."""
    folder = tmp_path_factory.mktemp("run")
    for stop in (4, None):
        train(make_recipe(**{**fields, "epochs": 2, "run_dir": str(folder), "max_steps": stop, "log_every": 1}))
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    board.Reload()
    return folder, board


def test_lines_have_exactly_these_keys_and_sane_values(ran):
    found = lines(ran[0])
    trained = [line for line in found if line["kind"] == "train"]
    evaluated = [line for line in found if line["kind"] == "eval"]
    assert len(trained) + len(evaluated) == len(found)
    assert all(set(line) == TRAIN for line in trained)
    assert all(set(line) == EVAL for line in evaluated)
    assert [(line["epoch"], line["step"]) for line in trained] == [(0, 0), (0, 1), (0, 2), (1, 3), (1, 4), (1, 5)]
    assert [(line["epoch"], line["step"]) for line in evaluated] == [(0, 0), (1, 3), (2, 6)]
    for line in trained:
        assert line["loss"] == pytest.approx(line["soft_ce"] + line["discriminator_loss"], rel=1e-6)
        assert 0 < line["kl"] < line["soft_ce"]
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait_fraction"] <= 1
    assert {line["images"] for line in evaluated} == {11}


def test_metrics_are_json_to_any_parser(ran):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    for line in (ran[0] / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_tensorboard_holds_what_the_lines_say(ran):
    folder, board = ran
    for kind, keys in (("train", TRAIN), ("eval", EVAL)):
        wanted = {line["step"]: line for line in lines(folder) if line["kind"] == kind}
        for key in keys - {"kind", "step", "epoch", "images"}:
            events = {event.step: event.value for event in board.Scalars(f"{kind}/{key}")}
            assert set(events) == set(wanted)
            for step, value in events.items():
                assert value == pytest.approx(wanted[step][key], rel=1e-6)


def test_the_ensembles_accuracy_is_a_line_in_the_students_chart(ran):
    folder, board = ran
    beside = EventAccumulator(str(folder / "tensorboard" / "ensemble"), size_guidance={"scalars": 0})
    beside.Reload()
    summary = json.loads((folder / "summary.json").read_text())
    teaching = summary["ensemble"] or summary["teachers"][0]
    for name in ("top1", "top5"):
        steps = [event.step for event in board.Scalars(f"eval/{name}")]
        assert [(one.step, one.value) for one in beside.Scalars(f"eval/{name}")] == [
            (step, pytest.approx(teaching[name], rel=1e-6)) for step in steps
        ]


def test_percentiles_of_the_middle_convolution_are_numpys(ran):
    folder, board = ran
    state = last(folder)["student"]
    model = timm.create_model("test_efficientnet", num_classes=3)
    convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    middle = convolutions[len(convolutions) // 2]
    weights = state[f"{middle}.weight"].numpy()
    for percent in (10, 25, 50, 75, 90):
        event = board.Scalars(f"weights/{middle}/percentile_{percent}")[-1]
        assert event.step == 6
        assert event.value == pytest.approx(float(np.percentile(weights, percent)), rel=1e-5, abs=1e-9)
    histogram = board.Histograms("weights/classifier")[-1].histogram_value
    values = state["classifier.weight"].double()
    assert histogram.num == values.numel()
    assert histogram.sum == pytest.approx(float(values.sum()), rel=1e-4, abs=1e-6)


def test_pictures_are_of_different_classes_each_above_its_caption(ran):
    """Class k of the tests' images is k's colour (red, green, blue) below noise."""
    _, board = ran
    tags = sorted(tag for tag in board.Tags()["images"] if tag.startswith("target/"))
    assert len(tags) == 3, "one a class"
    for place, tag in enumerate(tags):
        picture = np.asarray(Image.open(io.BytesIO(board.Images(tag)[-1].encoded_image_string)).convert("RGB"))
        assert picture.shape[1] == 224
        assert picture[:224].mean(axis=(0, 1)).argmax() == place
        assert (picture[224:] < 128).any(), "there is no text below the image"


def test_a_caption_names_the_targets_top_five(tmp_path, monkeypatch):
    import mealfast.record.metrics

    captions = []
    monkeypatch.setattr(
        mealfast.record.metrics,
        "_captioned",
        lambda image, rows: captions.append(rows) or np.zeros((8, 8, 3), np.uint8),
    )
    telemetry = Telemetry(tmp_path, 0, lambda line: True)
    target = torch.tensor([0.05, 0.4, 0.2, 0.3, 0.01, 0.04])
    said = torch.tensor([0.1, 0.1, 0.1, 0.6, 0.05, 0.05])
    telemetry.pictures([Picture(torch.zeros(8, 8, 3, dtype=torch.uint8), 4, said, target)], list("abcdef"), 0)
    telemetry.close()
    assert [row.split() for row in captions[0]] == [
        ["e"], ["60.0%", "d", "(student)"],
        ["40.0%", "b"], ["30.0%", "d"], ["20.0%", "c"], ["5.0%", "a"], ["4.0%", "f"],
    ]  # fmt: skip


def test_lines_that_do_not_belong_and_half_lines_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 9}\n[1]\n{"step": 2}\n{"st')
    telemetry = Telemetry(tmp_path, 3, lambda line: line["step"] < 3)
    telemetry.write({"kind": "eval", "step": 3, "kl": None})
    telemetry.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"kind": "eval", "step": 3, "kl": null}\n'


def test_models_without_convolutions_have_a_middle_too():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    assert middle_convolution(model)[0] == "2"
    with pytest.raises(ValueError, match="neither"):
        middle_convolution(torch.nn.ReLU())


def test_the_clock_tells_rates_and_leaves_the_first_window_out():
    clock = Clock()
    assert clock.medians() == (None, None)
    for seconds, waiting in ((9.0, 9.0), (1.0, 0.5), (2.0, 0.0), (4.0, 1.0)):
        clock.add(seconds / 2, waiting)
        clock.add(seconds / 2, 0.0)
        rate, wait = clock.close_window(8)
        assert (rate, wait) == (pytest.approx(16 / seconds), pytest.approx(waiting / seconds))
    assert clock.medians() == (pytest.approx(8.0), pytest.approx(0.25))
    assert not any(math.isnan(value) for value in clock.medians())
