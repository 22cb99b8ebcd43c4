"""What is due when: every question "at step s" and "in epoch e" of a run, answered by one pure object.

A step is named by its number, from 0; a moment by how many steps have been taken by then. The paper's learning rate is
constant, times a factor at given epochs: no warm-up, no cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mealfast.recipe import Recipe


@dataclass(frozen=True)
class Period:
    """How often a run logs and evaluates from its step number `first` on."""

    first: int
    log_every: int  # steps
    eval_every: int  # epochs; 0: never but at the start and at the end


@dataclass(frozen=True)
class Calendar:
    """The dates of one run. A run that was extended or resumed with another --log-every keeps its earlier periods."""

    steps_per_epoch: int
    epochs: int
    periods: tuple[Period, ...]  # in order; the first begins at 0
    checkpoint_every: int  # steps
    eval_start: bool
    max_steps: int | None
    lr_decay_epochs: tuple[int, ...]
    lr_decay: float

    @classmethod
    def of(cls, recipe: Recipe, images: int, earlier: tuple[Period, ...] = (), steps: int = 0) -> Calendar:
        """A recipe's, for so many training images; `earlier` are the periods of a run that goes on after `steps`."""
        return cls(
            images // recipe.batch_size, recipe.epochs, _periods(recipe, earlier, steps), recipe.checkpoint_every,
            recipe.eval_start, recipe.max_steps, recipe.lr_decay_epochs, recipe.lr_decay,
        )  # fmt: skip

    @property
    def total_steps(self) -> int:
        """Of the whole recipe."""
        return self.epochs * self.steps_per_epoch

    @property
    def last(self) -> int:
        """The moment at which the run ends: `--max-steps`, or the recipe's end."""
        return min(self.total_steps, self.max_steps or self.total_steps)

    @property
    def evaluations(self) -> int:
        """How many belong to the whole recipe, the one before the first step included."""
        ends = range(self.steps_per_epoch, self.total_steps + 1, self.steps_per_epoch)
        return int(self.eval_start) + sum(map(self.evaluates, ends))

    # -- of a step ---------------------------------------------------------------------------------------------------

    def epoch(self, step: int) -> int:
        """In which `step` is taken, from 0."""
        return step // self.steps_per_epoch

    def lr_factor(self, step: int) -> float:
        """What the base learning rate is multiplied by in `step`: 0.1 from epoch 100 on for (100,), 0.1."""
        return self.lr_decay ** sum(self.epoch(step) >= milestone for milestone in self.lr_decay_epochs)

    def period(self, step: int) -> Period:
        """The one that `step` belongs to."""
        return [period for period in self.periods if period.first <= max(step, 0)][-1]

    # -- of a moment -------------------------------------------------------------------------------------------------

    def epochs_over(self, steps: int) -> int:
        """How many epochs are over."""
        return steps // self.steps_per_epoch

    def ends_epoch(self, steps: int) -> bool:
        """Whether an epoch's last step has just been taken."""
        return steps % self.steps_per_epoch == 0

    def logs(self, steps: int) -> bool:
        """Whether a line is due and the sums start anew."""
        return steps % self.period(steps - 1).log_every == 0

    def writes_line(self, steps: int) -> bool:
        """Whether a line is due at all: out of turn, with sums that go on, at the end too."""
        return self.logs(steps) or steps == self.last

    def evaluates(self, steps: int) -> bool:
        """Whether an evaluation belongs to the recipe here, so that its score can be the best."""
        every = self.period(steps - 1).eval_every * self.steps_per_epoch
        return steps == self.total_steps or (every > 0 and steps % every == 0)

    def must_evaluate(self, steps: int) -> bool:
        """Whether to evaluate at all: out of turn at the end too."""
        return self.evaluates(steps) or steps == self.last

    def saves(self, steps: int) -> bool:
        """Whether a checkpoint is due, evaluations apart, before and after which there always is one."""
        return steps % self.checkpoint_every == 0

    def belongs(self, line: dict[str, Any], steps: int, evaluated: int | None, best: int | None) -> bool:
        """Whether a line of metrics.jsonl is one that a run without interruption would have written by now.

        `evaluated` and `best` are the moments of the latest and of the best evaluation, None: there is none.
        """
        if steps == 0:
            return False  # no checkpoint: what an earlier process did is done again, the evaluation at the start too
        at = line.get("step", -1)
        if line.get("kind") == "eval":
            done = at < steps or at == steps == evaluated
            return done and (at == best or self.evaluates(at) or (at == 0 and self.eval_start))
        return at < steps and (self.logs(at + 1) or at + 1 == self.total_steps)


def _periods(recipe: Recipe, earlier: tuple[Period, ...], steps: int) -> tuple[Period, ...]:
    """The earlier ones up to this moment; another one from here on where the recipe's differs from the last."""
    kept = tuple(period for period in earlier if period.first < steps)
    now = Period(steps if kept else 0, recipe.log_every, recipe.eval_every)
    if kept and (kept[-1].log_every, kept[-1].eval_every) == (now.log_every, now.eval_every):
        return kept
    return (*kept, now)
