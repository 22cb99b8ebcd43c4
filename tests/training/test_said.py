"""What a run says while it starts: what it waits for, what its teachers are worth, and numbers that are the rules'."""

import pytest
import torch

from mealfast.machine import waiting
from mealfast.models import parity
from mealfast.models.parity import Parity
from mealfast.recipe import make_recipe
from mealfast.training.finish import worse_than_its_start
from mealfast.training.loop import train
from mealfast.training.scoring import Score, is_chance
from mealfast.training.where import Scores, Where


def test_every_long_wait_of_a_start_and_the_teachers_scores_are_said(fields, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    (tmp_path / "cache").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where nothing is remembered of teachers
    summary = train(make_recipe(**{**fields, "run_dir": str(tmp_path / "run"), "epochs": 1}))
    said = capfd.readouterr().err.splitlines()
    one, two = fields["teachers"]
    waits = [line.removesuffix(" ...") for line in said if line.endswith(" ...")]
    expected = [
        f"loading the student {fields['student']}", f"loading teacher 1 of 2: {one}", f"loading teacher 2 of 2: {two}",
        "reading images to measure and check the teachers on", f"tuning teacher 1 of 2: {one}, by measuring it in more "
        "than one layout", "running the teachers together for the first time", "evaluating student and teachers on 11 "
        "images", "reading the first batch of images", "the first step",
    ]  # fmt: skip
    assert [wait for wait in waits if wait in expected][: len(expected)] == expected
    scores = {row["model"]: row["top1"] for row in summary["teachers"]}
    for spec in (one, two):
        assert (
            sum(line.startswith(f"evaluated teacher {spec}:  top-1 {scores[spec]:.2f}%  top-5 ") for line in said) == 1
        )
    assert sum(line.startswith(f"evaluated ensemble:  top-1 {summary['ensemble']['top1']:.2f}%") for line in said) == 1
    warned = {line.split()[2] for line in said if line.startswith("warning: teacher ")}
    assert warned == {spec for spec in (one, two) if scores[spec] / 100 * 11 <= 11 / 3 + 2 * (11 * 2 / 9) ** 0.5}


def test_chance_is_what_coin_tossers_reach():
    tossed = torch.distributions.Binomial(1000, torch.tensor(1 / 7)).sample((20_000,))
    share = sum(is_chance(Score(hits / 10, 0.0, 1000), 7) for hits in tossed.tolist()) / 20_000
    assert 0.95 < share < 0.99  # two standard deviations, one side
    assert not is_chance(Score(70.0, 99.0, 17), 7)
    assert is_chance(Score(0.0, 0.0, 17), 7)
    assert not is_chance(Score(0.5, 2.0, 50_000), 1000)


def test_the_number_beside_a_rule_is_the_rules():
    found = Parity("t", 1000, 4e-3, agreement=0.964, agreement_or_tie=0.98996, finite=True, finite_in_float32=True)
    assert str(found).startswith("98.9% of 1000 images agree with eager float32 but for ties")  # not 99.0: it fails
    assert parity.wanted(0.5) == "99.0% but for ties, at most 5.0e-03"
    assert not found.holds(0.5)
    assert found.holds(1.0)
    assert found.to_json()["agreement_or_tie"] == 0.98996


@pytest.mark.parametrize(
    ("start", "best", "final", "said"),
    [
        (50.0, 40.0, 30.0, "top-1 30.00% after 50.00%; best.pt has 40.00%: try a lower --lr"),
        (50.0, 30.0, 30.0, "top-1 30.00% after 50.00%: try a lower --lr"),
        (50.0, 60.0, 50.0, None),
        (None, 30.0, 30.0, None),  # --no-eval-start
    ],
)
def test_a_student_that_has_lost_is_told(start, best, final, said):
    start, best, final = (None if top1 is None else {"top1": top1, "step": 0} for top1 in (start, best, final))
    found = worse_than_its_start(Where(9, 0, Scores(start=start, latest=final, best=best)))
    assert said in found if said else found is None
