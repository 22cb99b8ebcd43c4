"""What is due when: the dates of a run, written out by hand."""

import pytest

from mealfast.recipe import make_recipe
from mealfast.training.step_calendar import Calendar, Period

STUDENT = {"student": "resnet18", "hard_label_weight": 1.0}


def calendar(images=26, earlier=(), steps=0, **changes):
    """By default 3 steps an epoch, 5 epochs, a line every 2 steps."""
    fields = {"epochs": 5, "batch_size": 8, "log_every": 2, "eval_every": 2, "checkpoint_every": 4}
    return Calendar.of(make_recipe(**STUDENT, **{**fields, **changes}), images, earlier, steps)


def moments(calendar, question):
    return [steps for steps in range(1, calendar.last + 1) if question(steps)]


def test_every_date_of_a_run():
    one = calendar()
    assert (one.steps_per_epoch, one.total_steps, one.last) == (3, 15, 15)
    assert [one.epoch(step) for step in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [one.epochs_over(steps) for steps in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert moments(one, one.ends_epoch) == [3, 6, 9, 12, 15]
    assert moments(one, one.logs) == [2, 4, 6, 8, 10, 12, 14]
    assert moments(one, one.writes_line) == [2, 4, 6, 8, 10, 12, 14, 15]
    assert moments(one, one.evaluates) == moments(one, one.must_evaluate) == [6, 12, 15]
    assert moments(one, one.saves) == [4, 8, 12]
    assert one.evaluations == 4, "at the start and those"


def test_max_steps_ends_it_out_of_turn():
    one = calendar(max_steps=7)
    assert (one.total_steps, one.last) == (15, 7)
    assert moments(one, one.writes_line) == [2, 4, 6, 7]
    assert moments(one, one.evaluates) == [6]
    assert moments(one, one.must_evaluate) == [6, 7]
    assert calendar(max_steps=99).last == 15


def test_evaluations_can_be_left_to_the_end():
    one = calendar(eval_every=0)
    assert moments(one, one.evaluates) == [15]
    assert one.evaluations == 2
    assert calendar(eval_every=1, eval_start=False).evaluations == 5


def test_the_papers_learning_rate():
    recipe = make_recipe("resnet50-224")
    one = Calendar.of(recipe, 1_281_167)
    assert one.steps_per_epoch == 2502
    rates = [recipe.lr * one.lr_factor(epoch * 2502 + last) for epoch in range(180) for last in (0, 2501)]
    assert rates == [0.01] * 200 + [pytest.approx(0.001, rel=1e-12)] * 160


def test_a_learning_rate_of_several_steps():
    one = calendar(images=8, epochs=6, lr_decay_epochs=(2, 4), lr_decay=0.5)
    assert [one.lr_factor(step) for step in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]
    assert calendar(images=8, lr_decay_epochs=()).lr_factor(7) == 1


def line(kind, step):
    return {"kind": kind, "step": step}


def kept(one, steps, evaluated=None, best=None):
    """The lines of all kinds and steps that belong."""
    every = [line(kind, step) for step in range(16) for kind in ("train", "eval")]
    return [(each["kind"][0], each["step"]) for each in every if one.belongs(each, steps, evaluated, best)]


def test_the_lines_that_a_resumed_run_keeps():
    """Those that it would have written in one go by then: of what was out of turn none, at the end all."""
    one = calendar()
    assert kept(one, 0) == []
    assert kept(one, 7, evaluated=6) == [("e", 0), ("t", 1), ("t", 3), ("t", 5), ("e", 6)]
    assert kept(one, 6, evaluated=None) == [("e", 0), ("t", 1), ("t", 3), ("t", 5)], "it is yet to be evaluated"
    assert kept(one, 15, evaluated=15)[-3:] == [("t", 13), ("t", 14), ("e", 15)]
    assert ("e", 0) not in kept(calendar(eval_start=False, eval_every=0), 7)


def test_another_rhythm_leaves_what_was_done():
    before = calendar().periods
    assert before == (Period(0, 2, 2),)
    one = calendar(earlier=before, steps=7, log_every=5, eval_every=1)
    assert one.periods == (Period(0, 2, 2), Period(7, 5, 1))
    assert moments(one, one.logs) == [2, 4, 6, 10, 15]
    assert moments(one, one.evaluates) == [6, 9, 12, 15]
    assert kept(one, 9, evaluated=9) == [("e", 0), ("t", 1), ("t", 3), ("t", 5), ("e", 6), ("e", 9)]
    again = calendar(earlier=one.periods, steps=11, log_every=5, eval_every=1)
    assert again.periods == one.periods
    back = calendar(earlier=one.periods, steps=6, log_every=2)
    assert back.periods == before, "gone back to before the change"
    assert calendar(earlier=before, steps=0, log_every=3).periods == (Period(0, 3, 2),), "nothing was done yet"


def test_more_epochs_are_the_calendar_that_was_planned_so():
    short, long = calendar(), calendar(epochs=8)
    extended = calendar(earlier=short.periods, steps=15, epochs=8)
    assert extended == long
    assert ("e", 15) in kept(short, 15, evaluated=15)
    assert ("e", 15) not in kept(long, 15, evaluated=15)
    assert ("e", 15) in kept(long, 15, evaluated=15, best=15), "a score that stays the best stays in the file"
