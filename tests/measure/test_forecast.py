"""The stage report: every stage is there, what follows from them adds up, and a run is not changed by it."""

import json

import pytest
import torch

from mealfast.__main__ import dispatch
from mealfast.cli.endings import run_command
from mealfast.machine import memory
from mealfast.machine import processes as runtimes
from mealfast.measure import forecast, stages
from mealfast.measure.stages import Stage
from mealfast.recipe import make_recipe
from mealfast.record.run_directory import RunDirectory
from mealfast.training.loop import Run, train

from ..runs import assert_same_run

CPU = runtimes.start("cpu")


def made_run(options, **changes):
    return Run(make_recipe(**{**options, **changes}), CPU, RunDirectory(options["run_dir"]))


def stage(name, seconds, batch=8):
    return Stage(name, batch / seconds, 0.9 * batch / seconds, 1.1 * batch / seconds, seconds)


def test_every_stage_is_measured(options):
    run = made_run(options)
    found = list(stages.measure(run, seconds=0.02))
    teachers = [f"teacher {spec}" for spec in run.recipe.teachers]
    assert [one.name for one in found] == [
        "decode", *teachers, "ensemble", "student forward", "student forward and backward", "loss",
        "step, one batch replayed", "optimiser", "step", "step from a label cache",
    ]  # fmt: skip
    for one in found:
        assert 0 < one.p25 <= one.images_per_second <= one.p75
        assert one.images_per_second == pytest.approx(8 / one.seconds)


def test_a_run_that_begins_with_a_report_is_the_run_without(options, tmp_path, monkeypatch):
    measure = stages.measure
    monkeypatch.setattr(stages, "measure", lambda run, seconds: measure(run, 0.02))
    options |= {"cutmix": True, "max_steps": 5, "student": options["student"].replace("@", "?drop_rate=0.3@")}
    for name, report in (("with", True), ("without", False)):
        train(make_recipe(**{**options, "run_dir": str(tmp_path / name), "stage_report": report}))
    assert_same_run(tmp_path / "with", tmp_path / "without")


def test_the_command_prints_a_table_and_json(options, capfd, tmp_path):
    argv = ["forecast", "--seconds", "0.02", "--gpus", "4", "--json"]
    for key, value in (options | {"run_dir": str(tmp_path / "none")}).items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            argv += [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]
    assert run_command(dispatch, argv) == 0
    out = capfd.readouterr().out.splitlines()
    made = json.loads(out[-1])
    by_name = {one["name"]: one for one in made["stages"]}
    steps, images = 9, 25
    assert 3600 * made["hours"] > steps * by_name["step"]["seconds"]
    labelling = min(by_name["ensemble"]["images_per_second"], by_name["decode"]["images_per_second"])
    assert 3600 * made["cache_build_hours"] == pytest.approx(3 * images / labelling)
    text = "\n".join(out)
    for words in ("bottleneck: ", "from a label cache: ", "on 4 x cpu, if speed grows", "memory at the peak: "):
        assert words in text
    assert 50e6 < made["peak_bytes"] < made["capacity_bytes"]
    assert not (tmp_path / "none").exists()


def test_the_bottleneck_is_the_loader_or_the_largest_part():
    parts = [
        stage("teacher a", 3), stage("teacher b", 1), stage("ensemble", 4), stage("student forward", 1),
        stage("student forward and backward", 2.5), stage("loss", 0.1), stage("optimiser", 0.1),
        stage("step, one batch replayed", 6), stage("step", 6), stage("step from a label cache", 3),
    ]  # fmt: skip
    assert forecast.bottleneck([stage("decode", 1), *parts]) == "teacher a: 50% of the step"
    assert forecast.bottleneck([stage("decode", 5.99), *parts]).startswith("decode: ")
    one = [part for part in parts if not part.name.startswith("teacher")]
    assert forecast.bottleneck([stage("decode", 1), *one]) == "ensemble: 67% of the step"


def test_hours_are_steps_and_evaluations(options, monkeypatch):
    run = made_run(options, epochs=4, eval_every=2, lr_decay_epochs=())
    parts = [
        stage("decode", 1), stage("ensemble", 4), stage("student forward", 1), stage("loss", 1), stage("step", 6),
        stage("step, one batch replayed", 5), stage("step from a label cache", 2),
    ]  # fmt: skip
    monkeypatch.setattr(stages, "measure", lambda run, seconds: iter(parts))
    made = forecast.forecast(run, 1.0)
    # 4 epochs of 3 steps; 11 images at the start, after 2 and after 4 epochs, 8 a second, and the teachers once.
    assert 3600 * made.hours == pytest.approx(12 * 6 + 3 * 11 / 8 + 11 * 4 / 8)
    assert 3600 * made.cached_hours == pytest.approx(12 * 2 + 3 * 11 / 8 + 11 * 4 / 8)
    assert 3600 * made.cache_build_hours == pytest.approx(4 * 25 / 2)


def test_memory_is_seen_and_the_batch_follows():
    peak = memory.Peak(torch.device("cpu"))
    before = peak.bytes()
    block = torch.ones(64 << 20, dtype=torch.uint8)
    del block
    assert 60 << 20 < peak.bytes() - before < 70 << 20, "what was freed counts at the peak"
    assert memory.largest_batch(peak=3000, fixed=1000, batch=20, capacity=10000) == 81
    assert memory.largest_batch(peak=1001, fixed=1000, batch=20, capacity=10000) is None


def test_wrong_options_get_one_line(capfd):
    for argv, message in ((["--seconds", "0"], "--seconds 0.0: must be more than 0"), (["--gpus", "0"], "--gpus 0")):
        assert run_command(dispatch, ["forecast", "--data", "x", "--recipe", "demo", *argv]) == 2
        err = capfd.readouterr().err
        assert message in err
        assert "Traceback" not in err
