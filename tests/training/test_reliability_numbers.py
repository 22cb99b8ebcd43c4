"""Steps with non-finite gradients: skipped and counted; too many in a row end the run and say what there was."""

import json

import pytest
import torch

from mealfast.cli.endings import run_command
from mealfast.errors import RunError
from mealfast.method.inputs import Inputs
from mealfast.recipe import make_recipe
from mealfast.training.guard import Guard
from mealfast.training.loop import train
from mealfast.training.step import Step

from ..runs import assert_same_run, differences, last


def poison(monkeypatch, steps):
    """Makes the loss of these steps NaN, through the weight of the labels' part: nothing else is touched."""
    step = Step.__call__

    def call(self, batch, number):
        objective = self.student.objective
        objective.hard_label_weight = float("nan") if number in steps else 0.0
        try:
            return step(self, batch, number)
        finally:
            objective.hard_label_weight = 0.0

    monkeypatch.setattr(Step, "__call__", call)


def run(fields, folder, **changes):
    short = {"teachers": fields["teachers"][:1], "eval_every": 0, "eval_start": False}
    return train(make_recipe(**{**fields, "run_dir": str(folder), **short, **changes}))


def test_too_many_in_a_row_end_the_run_with_the_last_good_weights(fields, tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        poison(patch, range(3, 99))
        status = run_command(lambda argv: run(fields, tmp_path / "bad", max_bad_steps=4) and 0, [])
    assert status == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(
        "mealfast: 4 steps in a row had a non-finite loss or gradient and were skipped; at step 6 (lr"
    )
    found = json.loads((tmp_path / "bad" / "bad_batch.json").read_text())
    assert found["step"] == 6
    # The images that the plan has for step 6, and what the model says of them: computed again, apart from the run.
    seen = {}
    step = Step.__call__

    def watch(self, batch, number):
        if number == 6:
            student, images = self.student.normalised, batch.images
            seen["indices"] = batch.indices.tolist()
            student.load_state_dict(
                {"model." + k: v for k, v in last(tmp_path / "bad")["student"].items()}, strict=False
            )
            with torch.no_grad():
                seen["student"] = float(student(images).abs().max())
                seen["teachers"] = [
                    float(logits.abs().max()) for logits in self.target_source(Inputs(images, batch.labels)).logits
                ]
        return step(self, batch, number)

    monkeypatch.setattr(Step, "__call__", watch)
    run(fields, tmp_path / "good", max_steps=7)
    assert found["indices"] == seen["indices"]
    assert all(path.endswith(".jpg") for path in found["paths"])
    assert found["student"][0]["largest_logit"] == pytest.approx(seen["student"], rel=1e-5)
    assert [one["largest_logit"] for one in found["teachers"]] == pytest.approx(seen["teachers"], rel=1e-5)
    assert f"largest |logit| student {found['student'][0]['largest_logit']:.4g}" in line
    assert f"images {seen['indices'][0]} (" in line
    saved = last(tmp_path / "bad")
    assert (saved["step"], int(saved["skipped"]), saved["bad_in_a_row"]) == (7, 4, 4)
    monkeypatch.undo()
    run(fields, tmp_path / "three", max_steps=3)
    good = last(tmp_path / "three")
    changed = differences(saved["student"], good["student"])
    assert all(name.endswith("num_batches_tracked") for name in changed), changed  # which nothing reads
    assert differences(saved["optimizer"]["state"], good["optimizer"]["state"]) == []


def test_fewer_in_a_row_do_not_however_many_there_are(fields, tmp_path, monkeypatch):
    poison(monkeypatch, {0, 1, 3, 4, 6, 7})
    assert run(fields, tmp_path / "a", max_bad_steps=3)["skipped_steps"] == 6


def test_a_row_is_counted_across_a_stop(fields, tmp_path, monkeypatch):
    """Two before it and one after are three; a limit that is raised lets the same run go on, as if never stopped."""
    poison(monkeypatch, {2, 3, 4})
    run(fields, tmp_path / "a", max_steps=4, max_bad_steps=3)
    with pytest.raises(RunError, match="3 steps in a row"):
        run(fields, tmp_path / "a", max_bad_steps=3)
    assert last(tmp_path / "a")["step"] == 5
    run(fields, tmp_path / "a", max_bad_steps=4)
    run(fields, tmp_path / "whole", max_bad_steps=4)
    assert_same_run(tmp_path / "a", tmp_path / "whole")


def test_steps_are_read_late_and_none_is_forgotten():
    """On a GPU the host reads when the run logs: every fifth step here, whatever lies between."""
    bad = [0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1]
    skipped = torch.zeros((), dtype=torch.int64)
    for limit, wanted in ((4, True), (5, False)):
        skipped.zero_()
        watch, read = Guard(limit, 5, skipped), []
        for step, one in enumerate(bad):
            skipped += one
            watch.note(skipped)
            if step % 5 == 4:
                read += watch.read()
        assert read == [bool(one) for one in bad]
        assert watch.too_many == wanted
        assert watch.in_a_row == 2
