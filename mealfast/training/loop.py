"""The training run: read, step, log, save, evaluate, stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext, suppress
from typing import Any

from mealfast.errors import RunError
from mealfast.loaders import Batch, Loader, LoaderStopped
from mealfast.machine import lock, memory, processes
from mealfast.machine.agreement import Agreement
from mealfast.machine.processes import Runtime
from mealfast.machine.stop_signal import CutShort, Stopped, StopSignal
from mealfast.machine.waiting import waiting
from mealfast.machine.wording import counted
from mealfast.method.discriminator import DEAD_LOSS, is_dead
from mealfast.method.targets import GivenTargets
from mealfast.recipe import Recipe
from mealfast.record.clock import Clock
from mealfast.record.run_directory import RunDirectory
from mealfast.training import bad_batch, report, resume
from mealfast.training.assemble import make_job
from mealfast.training.feed import Feed
from mealfast.training.finish import Figures, finish
from mealfast.training.guard import Guard
from mealfast.training.job import Job
from mealfast.training.outputs import Outputs
from mealfast.training.step import Step
from mealfast.training.validation import Validation
from mealfast.training.where import Where

_STOP, _FAILED = 1, 2  # what a process can wish for after a step

AtStart = Callable[[Job, Where, Callable[[str], None]], None]


def train(recipe: Recipe, at_start: AtStart | None = None, stop: StopSignal | None = None) -> dict[str, Any]:
    """Runs a recipe to its end, or to where it is stopped. Returns the content of summary.json.

    `at_start(job, where, say)` is called before the first step, on every process, and may measure: nothing of what it
    does to tensors may stay. `stop` says afterwards which signal stopped it. Raises UsageError or DataError for what
    the user can mend; before the first step, before anything is written.
    """
    with lock.hold(recipe.run_dir):
        directory = RunDirectory(recipe.run_dir)
        directory.check(recipe)
        runtime = processes.start(recipe.device, timeout=recipe.collective_timeout)
        advice = f"lower --batch-size, or compute it in parts (--accumulate {2 * recipe.accumulate})"
        with memory.enough(runtime.device, advice):
            summary = run(recipe, runtime, directory, at_start, stop)
        # Not after an error: leaving can wait for the other processes, and would tell them before the reason is said.
        processes.stop()
    return summary


def run(
    recipe: Recipe, runtime: Runtime, directory: RunDirectory, at_start: AtStart | None = None,
    stop: StopSignal | None = None,
) -> dict[str, Any]:  # fmt: skip
    """`train` among processes that have found each other, in a directory that was checked."""
    job, where, notes = make_job(recipe, runtime, directory)
    return run_job(job, where, directory, notes, at_start, stop)


def run_job(
    job: Job, where: Where, directory: RunDirectory, notes: list[str] | None = None, at_start: AtStart | None = None,
    stop: StopSignal | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Takes a job from where it stands to its end, and writes what a run writes. `notes` are said first."""
    began = time.perf_counter()
    with Outputs(job, where, directory) as outputs:
        for line in [*(notes or []), *report.introduction(job)]:
            outputs.say(line)
        if outputs.recording:
            for line in outputs.recording.introduction():
                outputs.say(line)
        if at_start:
            at_start(job, where, outputs.say)
        if where.step:
            outputs.say(f"resuming after {where.step} of {job.calendar.total_steps} steps")
        with stop or StopSignal() as stop:  # only from here on is there something to keep
            loop = Loop(job, where, outputs, stop)
            try:
                loop.run()
                outputs.flush()
            except Exception:
                loop.rescue()
                raise
            # Outside: the last step is saved by now, and what is measured at the end trains on.
            with waiting("writing what the run leaves, and measuring its steps without the loader", outputs.say):
                return finish(job, where, outputs, loop.figures(time.perf_counter() - began), loop.replay)


class Loop:
    """One process's way through a job."""

    job: Job
    where: Where  # changed here only
    outputs: Outputs
    stop: StopSignal
    step: Step
    guard: Guard
    validation: Validation
    agreed: Agreement  # of the processes, on ending after a step
    clock: Clock
    first: int  # the step that this process began with
    batch: Batch | None  # of the step taken last
    loader: Loader | None  # knows the images that it had to replace
    dead_lines: int  # logged means of the discriminator's loss at ln 2, one after the other
    teachers_said: bool  # whether the teachers' scores, which stay what they are, were said
    began: float  # when the step that is being taken began

    def __init__(self, job: Job, where: Where, outputs: Outputs, stop: StopSignal) -> None:
        self.job, self.where, self.outputs, self.stop = job, where, outputs, stop
        self.step = job.step(outputs.recording)
        self.guard = Guard(job.recipe.max_bad_steps, job.recipe.log_every, job.meter.skipped, where.bad_in_a_row)
        alone = job.runtime.world_size == 1  # else the others would wait for a process that cut something short
        self.validation = Validation(job, stop.at_once if alone else nullcontext)
        if alone and job.recipe.cuda_graphs != "step":
            self.step.cuttable = self.first_is_cuttable
        self.agreed, self.clock = Agreement(job.runtime), Clock()
        self.first, self.batch, self.loader, self.dead_lines, self.began = where.step, None, None, 0, 0.0
        self.teachers_said = False

    def run(self) -> None:
        """What an earlier process left undone, then the steps."""
        job, where, calendar = self.job, self.where, self.job.calendar
        stopping = False
        if where.step == 0 and calendar.eval_start:
            stopping = not self.evaluate()
        elif where.step and calendar.must_evaluate(where.step) and where.scores.evaluated != where.step:
            stopping = not self.evaluate()  # the checkpoint was written before it
        self.outputs.finish_views(range(calendar.epochs_over(where.step)))
        if where.step < calendar.last and not stopping:
            cache = self.outputs.recording.cache if self.outputs.recording else None
            with closing(job.loader(where.step, calendar.last, cache, lambda: self.stop.asked)) as loader:
                self.loader = loader
                try:
                    self.steps(Feed(loader, 2 * self.agreed.delay))
                except CutShort:  # the first step, behind which everything is saved
                    self.step.undo()

    def steps(self, feed: Feed) -> None:
        """Batch, step, log, save, evaluate, until the end or until a process wishes to stop."""
        job, where, calendar = self.job, self.where, self.job.calendar
        stopping = self.agree_on_the_first(feed)
        while where.step < calendar.last and not stopping:
            self.began = time.perf_counter()
            try:
                with self.said_of_the_first("reading the first batch of images"):
                    self.batch = feed.next()
            except LoaderStopped:  # a signal, while no batch came
                if where.step > self.outputs.saved:
                    self.save()
                return
            waited = time.perf_counter() - self.began
            with self.said_of_the_first(f"the first step{' compiles the student' if job.compiled else ''}"):
                self.step(self.batch, where.step)
            self.count_step()
            self.log_if_due(waited)
            wish = self.agreed(_FAILED if feed.error else int(self.stop.asked))
            stopping = wish > 0 or self.guard.too_many
            evaluating = calendar.must_evaluate(where.step)
            if stopping or evaluating or calendar.saves(where.step):
                self.save()
            if wish == _FAILED:
                feed.raise_for_all(job.runtime)
            if self.guard.too_many:
                self.give_up()
            if evaluating and not stopping:
                stopping = not self.evaluate()
            if calendar.ends_epoch(where.step):
                over = calendar.epochs_over(where.step)
                self.outputs.finish_views(range(over - 1, over))

    # -- what the loop does --------------------------------------------------------------------------------------------

    def said_of_the_first(self, what: str) -> AbstractContextManager[None]:
        """Around a part of a step: of the first it is said that it takes long, if it does."""
        return waiting(what, self.outputs.say) if self.where.step == self.first else nullcontext()

    def agree_on_the_first(self, feed: Feed) -> bool:
        """Whether nobody may begin, because a process has not the first batches or was asked to stop."""
        with waiting("reading the first batches of images", self.outputs.say, enabled=self.agreed.delay > 0):
            feed.fill(2 * self.agreed.delay)
        wish = 0
        for _ in range(1 + self.agreed.delay):  # the answer comes one call later
            wish = self.agreed(_FAILED if feed.error else int(self.stop.asked))
        if wish == _FAILED:
            feed.raise_for_all(self.job.runtime)
        return wish > 0

    def first_is_cuttable(self) -> AbstractContextManager[None]:
        """A signal ends the first step, in which the student is compiled, at once."""
        return self.stop.at_once() if self.where.step == self.first else nullcontext()

    def count_step(self) -> None:
        """Counts a step that was taken."""
        self.where.step += 1
        self.guard.note(self.job.meter.skipped)

    def log_if_due(self, waited: float) -> None:
        """Logs when the calendar says so, the only times that the host waits for the device."""
        job, steps = self.job, self.where.step
        due = job.calendar.writes_line(steps)
        means = job.meter.means(job.runtime) if due else {}
        if due or job.runtime.device.type == "cpu":
            self.read_guard()
        self.clock.add(time.perf_counter() - self.began, waited)
        self.outputs.progress.advance()
        if due:
            self.write_line(means, *self.clock.close_window(job.recipe.batch_size))
        else:
            self.outputs.progress.line_if_silent(self.title)
        if job.calendar.logs(steps):  # what is logged out of turn, at the end, a resumed run logs again in its turn
            job.meter.clear()

    @property
    def title(self) -> str:
        """Of a line about the step that was taken last."""
        return f"epoch {self.job.calendar.epoch(self.where.step - 1) + 1}/{self.job.recipe.epochs}"

    def read_guard(self) -> None:
        """Learns which steps were skipped; waits for the device."""
        self.guard.read()
        self.where.bad_in_a_row = self.guard.in_a_row

    def write_line(self, means: dict[str, float | None], rate: float, waiting: float) -> None:
        """A line of the log and of metrics.jsonl, of the terms that this run has."""
        recipe, step = self.job.recipe, self.where.step - 1
        if not recipe.distils:
            means["soft_ce"] = means["kl"] = None
        if recipe.discriminator_mode == "off":
            means["discriminator_loss"] = None
        else:
            self.watch_discriminator(means["discriminator_loss"])
        if recipe.hard_label_weight == 0:
            del means["hard_ce"]
        epoch = self.job.calendar.epoch(step)
        speed = {"lr": self.job.optimiser.lr, "images_per_second": rate, "data_wait_fraction": waiting}
        self.outputs.write({"kind": "train", "epoch": epoch, "step": step, **means, **speed})
        shown = {name: value for name, value in means.items() if value is not None}
        skipped = "  skipped" if means["loss"] is None else ""
        self.outputs.progress.line(self.title + skipped, shown, rate)

    def watch_discriminator(self, loss: float | None) -> None:
        """Warns where two logged means in a row sit at ln 2 (None: every step was skipped)."""
        self.dead_lines = self.dead_lines + 1 if loss is not None and is_dead(loss) else 0
        if self.dead_lines == 2:
            self.outputs.say(
                f"warning: the discriminator's loss stays at ln 2 = {DEAD_LOSS:.4f}: it is dead or cannot tell student "
                "from teachers; try another --discriminator-lr or --seed, or --discriminator off"
            )

    def evaluate(self) -> bool:
        """Scores the models and saves the scores; False where a signal cut it short, and nothing is written."""
        job, where, scores = self.job, self.where, self.where.scores
        show = self.outputs.show_pictures(where.step) if job.live_teachers else None
        count = counted(len(job.data.val), "image")
        try:
            with waiting(f"evaluating student and teachers on {count}", self.outputs.say):
                result = self.validation(show, lambda: self.stop.asked)
        except Stopped:
            return False
        line = {
            "epoch": job.calendar.epochs_over(where.step), "step": where.step, **result.models[0].to_json(),
            "kl": result.kl,
        }  # fmt: skip
        scores.latest = line
        if where.step == 0:
            scores.start = line
        scores.teachers = [
            {"model": spec, **score.to_json()} for spec, score in zip(job.live_teachers, result.models[1:], strict=True)
        ]
        scores.ensemble = result.ensemble.to_json() if result.ensemble else None
        best = job.calendar.evaluates(where.step) and (scores.best is None or line["top1"] > scores.best["top1"])
        if where.step and best:
            scores.best = line
        self.outputs.write({"kind": "eval", **line})
        if self.outputs.telemetry:
            self.outputs.telemetry.weights(job.student.model, where.step)
            if teaching := scores.ensemble or next(iter(scores.teachers), None):
                self.outputs.telemetry.ensemble(teaching, where.step)
        kl = "" if result.kl is None else f"  kl {result.kl:.4f}"
        self.outputs.say(
            f"evaluated after {counted(where.step, 'step')}:  top-1 {line['top1']:.2f}%  top-5 {line['top5']:.2f}%{kl}"
        )
        if not self.teachers_said:
            self.teachers_said = True
            for text in report.teachers_scores(job, result):
                self.outputs.say(text)
        if where.step:
            self.save(best=best)
        return True

    def save(self, *, best: bool = False) -> None:
        """A checkpoint of now; all processes together. `best`: of the best evaluation so far."""
        self.outputs.flush()
        self.write_checkpoint(best)

    def write_checkpoint(self, best: bool = False) -> None:
        self.read_guard()
        self.outputs.save(self.where.step, resume.content(self.job, self.where), best=best)

    def give_up(self) -> None:
        """Ends a run of bad steps only, after its checkpoint was written. Raises RunError, all processes together."""
        if self.outputs.checkpoints:
            self.outputs.checkpoints.wait()
        assert self.batch is not None
        raise RunError(bad_batch.report(self.job, self.batch, self.where.step - 1, self.outputs.directory))

    def rescue(self) -> None:
        """Saves what the steps so far have reached, where an error ended the run.

        With several processes there is nothing to do here: what a loader or an evaluation meets all of them know in
        time, and save together; after another error the state of the others, who wait in a step, cannot be had.
        """
        if self.job.runtime.world_size > 1:
            return
        with suppress(Exception):  # the error is the news
            self.step.undo()
            if self.step.taken == self.where.step:  # taken, and then the error came before it was counted
                self.count_step()
                self.log_if_due(0.0)
            if self.where.step > self.outputs.saved:
                self.write_checkpoint()  # targets that a label cache did not take are made again
            if self.outputs.checkpoints:
                self.outputs.checkpoints.wait()
                if self.where.step and not self.outputs.checkpoints.failure:
                    done, place = counted(self.where.step, "step"), self.outputs.directory.checkpoints
                    self.outputs.say(f"{done} {'is' if self.where.step == 1 else 'are'} saved: {place}")

    def figures(self, seconds: float) -> Figures:
        """Of this process's part of the run."""
        replaced, views = (self.loader.replaced, self.loader.replaced_count) if self.loader else ({}, 0)
        return Figures(*self.clock.medians(), seconds, replaced, views, self.job.cuda_graph(self.step))

    def replay(self) -> float | None:
        """Images/s of a few more steps on the last batch: what this run would reach if data cost nothing. None where
        the run was asked to stop. All processes together."""
        if self.batch is None or self.where.step < self.job.calendar.last:
            return None
        # Not the recording step: what is only measured is not written.
        step = self.step
        if self.outputs.recording:
            step = self.job.step(GivenTargets() if self.batch.targets else None)
        clock = Clock()
        for _ in range(1 + min(max((self.where.step - self.first) // 50, 2), 20)):
            if self.agreed(int(self.stop.asked)):
                return None
            began = time.perf_counter()
            step(self.batch, self.where.step)
            self.job.meter.sums.tolist()  # waits for the device
            clock.add(time.perf_counter() - began, 0.0)
            clock.close_window(self.job.recipe.batch_size)
        return clock.medians()[0]
