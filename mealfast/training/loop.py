"""The training run: read, step, log, evaluate, save."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from mealfast.errors import RunError, UsageError
from mealfast.labels.fit import check_fit
from mealfast.labels.write_through import WriteThrough, write_plan
from mealfast.loaders import Batch, ExplicitViews, ViewPlan, train_loader
from mealfast.machine import processes as runtimes
from mealfast.machine.files import write_json
from mealfast.machine.processes import Runtime
from mealfast.machine.stop_signal import Agreement, StopSignal
from mealfast.measure import forecast
from mealfast.method import data as splits
from mealfast.method.discriminator import DEAD_LOSS, is_dead
from mealfast.method.objective import TERMS
from mealfast.models import tuning as teacher_setup
from mealfast.recipe import Recipe
from mealfast.record import checkpoint
from mealfast.record.checkpoint_writer import CheckpointWriter
from mealfast.record.clock import Clock
from mealfast.record.console import Progress
from mealfast.record.run_directory import RunDirectory, refuse_other_recipe
from mealfast.training import bad_batch
from mealfast.training import report as run_report
from mealfast.training import resume as run_state
from mealfast.training.bad_steps import BadSteps
from mealfast.training.finish import finish
from mealfast.training.job import assemble
from mealfast.training.step import TrainStep
from mealfast.training.validation import Validation


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe to its end, or to where it is stopped. Returns the content of summary.json.

    Raises UsageError or DataError for what the user can mend, before anything is written.
    """
    run_directory = RunDirectory(recipe.run_dir)
    run_directory.check(recipe)
    runtime = runtimes.start(recipe.device, timeout=recipe.collective_timeout)
    summary = Run(recipe, runtime, run_directory).train()
    # Not after an error: leaving can wait for the other processes, and would tell them before the reason is said.
    runtimes.stop()
    return summary


class Run:
    """One run in one process. `step` is the number of optimiser steps taken."""

    def __init__(self, recipe: Recipe, runtime: Runtime, directory: RunDirectory) -> None:
        self.recipe, self.runtime, self.directory = recipe, runtime, directory
        if recipe.batch_size % (runtime.world_size * recipe.accumulate):
            raise UsageError(
                f"--batch-size {recipe.batch_size}: must be a multiple of processes x --accumulate = "
                f"{runtime.world_size} x {recipe.accumulate}"
            )
        with runtime.main_first():  # the others find the index that the main process has stored
            found = splits.scan_splits(
                recipe.data, workers=recipe.loader_threads, progress=runtime.is_main and sys.stderr.isatty()
            )
        self.writing = write_plan(recipe, runtime)
        self.parts = assemble(recipe, runtime, writes_cache=self.writing is not None)
        self.data = splits.number_classes(
            found,
            self.parts.student.num_classes,
            labels_needed=recipe.hard_label_weight > 0,
            student=f"--student {recipe.student}",
        )
        self.steps_per_epoch = len(self.data.train) // recipe.batch_size
        if self.steps_per_epoch == 0:
            raise UsageError(
                f"--batch-size {recipe.batch_size}: {self.data.train.root} holds only {len(self.data.train)} images"
            )
        self.total_steps = recipe.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, recipe.max_steps or self.total_steps)
        if self.parts.label_cache is not None:
            check_fit(self.parts.label_cache, recipe, self._plan(), self.data.train, self.parts.student.num_classes)
        self.train_step = TrainStep(recipe, runtime, self.parts, self.steps_per_epoch)
        self.scores: dict[str, Any] = {"start": None, "latest": None, "best": None}
        self.validate = Validation(recipe, runtime, self.parts, self.data)
        self.notes: list[str] = []
        self.layouts: dict[str, Any] = {}  # of the teachers, as the run that is resumed had them
        self.label_writer: WriteThrough | None = None
        self.step = bad_in_a_row = 0
        if (state := self._resume()) is not None:
            self.step, bad_in_a_row = state["step"], state.get("bad_in_a_row", 0)
            self.scores |= state["scores"]
            self.layouts = state.get("layouts", {})
            self.notes = run_state.notes(state, runtime)
        self.first_step = self.step
        self.bad_steps = BadSteps(recipe.max_bad_steps, recipe.log_every, self.train_step.skipped, bad_in_a_row)
        self.teacher_reports = self._prepare_teachers()
        self.batch: Batch | None = None
        self.clock = Clock()
        self.dead_lines = 0

    def train(self) -> dict[str, Any]:
        recipe, runtime = self.recipe, self.runtime
        self.label_writer = label_writer = self._claim_label_cache()
        if runtime.is_main:
            self.directory.claim(
                run_report.config(recipe, runtime, self.parts, self.data, self.teacher_reports, self.writing)
            )
        self.progress = Progress(self.last_step, self.step, recipe.batch_size, enabled=runtime.is_main)
        self.telemetry = self.writer = None
        if runtime.is_main:
            self.telemetry = self.directory.telemetry(self.step, self._belongs, self.progress.say)
            self.writer = CheckpointWriter(
                self.directory.checkpoints, recipe.keep, self.progress.say, before=self.telemetry.sync
            )
        self.began, self.stop_signal, self.agreed = time.perf_counter(), StopSignal().__enter__(), Agreement(runtime)
        loader = None
        try:
            introduction = run_report.introduction(recipe, runtime, self.parts, self.data, self.steps_per_epoch)
            for line in [*self.notes, *introduction]:
                self.progress.say(line)
            if label_writer:
                self.progress.say(label_writer.introduction())
            for report in self.teacher_reports:
                self.progress.say(str(report))
            if recipe.stage_report:
                made = forecast.forecast(self, seconds=1.0, say=self.progress.say)
                for line in forecast.lines(self, made):
                    self.progress.say(line)
            if self.step:
                self.progress.say(f"resuming after {self.step} of {self.total_steps} steps")
            if self.step == 0 and recipe.eval_start:
                self._evaluate()
            self.train_step.writer = label_writer  # from here on: what is only measured is not written
            self._finish_views()  # that a process which was killed had left unfinished
            if self.step < self.last_step:
                loader = self.loader(self.step, self.last_step)
                self._loop(iter(loader))
            if label_writer:
                label_writer.flush()
            self.train_step.writer = None
            summary = finish(self, loader)
        except BaseException as error:
            self._close(loader, error)
            raise
        self._close(loader)
        return summary

    def _loop(self, batches: Any) -> None:
        stopping = False
        while self.step < self.last_step and not stopping:
            began = time.perf_counter()
            self.batch = next(batches)
            waited = time.perf_counter() - began
            self.train_step(self.batch, self.step)
            self.step += 1
            self.bad_steps.note(self.train_step.skipped)
            self._log_if_due(began, waited)
            stopping = bool(self.agreed(self.stop_signal.asked)) or self.bad_steps.too_many
            evaluating = self._evaluates_at(self.step) or self.step == self.last_step
            if evaluating:
                self._evaluate()
            if evaluating or stopping or self.step % self.recipe.checkpoint_every == 0:
                self._save()
            if self.bad_steps.too_many:
                self._give_up()
            if self.step % self.steps_per_epoch == 0:
                self._finish_views(self.step // self.steps_per_epoch - 1)

    # -- what the loop needs, reads and writes -------------------------------------------------------------------------

    def _prepare_teachers(self) -> list[teacher_setup.TeacherReport]:
        """Makes the teachers ready, with the first batch of training images to measure and to check them on."""
        parts, recipe = self.parts, self.recipe
        if not parts.loaded_teachers:
            return []
        loader = self.loader(0, 1)
        try:
            images = next(iter(loader)).images.chunk(recipe.accumulate)[0]
        finally:
            loader.close()
        parts.teachers, reports = teacher_setup.prepare(
            recipe,
            self.runtime,
            parts.loaded_teachers,
            images,
            compile=parts.compiled,
            earlier=self.layouts,
            specs=parts.live_teachers,
        )
        parts.loaded_teachers = []
        return reports

    def loader(self, start_step: int, stop_step: int) -> Any:
        """This process's training batches of steps `start_step` to `stop_step` - 1; close it."""
        recipe, runtime, writer = self.recipe, self.runtime, self.label_writer
        return train_loader(
            recipe.loader,
            self.data.train,
            self._plan(),
            batch_size=recipe.batch_size,
            start_step=start_step,
            stop_step=stop_step,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
            threads=recipe.loader_threads,
            label_cache=writer.cache if writer else self.parts.label_cache,
            live_epochs=self.writing.live_epochs if self.writing else range(0),
        )

    def _claim_label_cache(self) -> WriteThrough | None:
        """The label cache that this run writes, if it writes one."""
        if self.writing is None:
            return None
        return WriteThrough(
            self.recipe, self.runtime, self.parts, self.data.train, self._plan(), self.writing,
            teacher_setup.layouts(self.teacher_reports),
        )  # fmt: skip

    def _finish_views(self, first: int = 0) -> None:
        """Completes the views of the label cache whose epochs, from `first` on, are over."""
        if self.label_writer:
            for line in self.label_writer.finish(range(first, self.step // self.steps_per_epoch)):
                self.progress.say(line)

    def _plan(self) -> ViewPlan:
        recipe, index, cache, writing = self.recipe, self.data.train, self.parts.label_cache, self.writing
        if cache and cache.header.explicit:
            return ExplicitViews(
                index.widths, index.heights, cache,
                seed=recipe.seed, size=recipe.size, interpolation=recipe.interpolation,
            )  # fmt: skip
        return ViewPlan(
            index.widths,
            index.heights,
            seed=cache.header.plan["seed"] if cache else writing.seed if writing else recipe.seed,
            size=recipe.size,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            flip=recipe.flip,
            interpolation=recipe.interpolation,
            cycle=cache.header.views if cache else writing.views if writing else None,
        )

    def _log_if_due(self, began: float, waited: float) -> None:
        """Logs every `log_every` steps and at the end, the only times that the host waits for the device."""
        scheduled = self.step % self.recipe.log_every == 0
        due = scheduled or self.step == self.last_step
        if due:
            *sums, steps = self.runtime.sum(self.train_step.meter.clone()).tolist()
        if due or self.runtime.device.type == "cpu":
            self.bad_steps.read()
        self.clock.add(time.perf_counter() - began, waited)
        self.progress.advance()
        if due:
            means = {name: value / steps if steps else None for name, value in zip(TERMS, sums, strict=True)}
            self._write_train_line(means, *self.clock.close_window(self.recipe.batch_size))
        if scheduled:  # what is logged out of turn, at the end, a resumed run logs again in its turn
            self.train_step.meter.zero_()

    def _write_train_line(self, means: dict[str, float | None], rate: float, waiting: float) -> None:
        recipe = self.recipe
        if not recipe.distils:
            means["soft_ce"] = means["kl"] = None
        if recipe.discriminator_mode == "off":
            means["discriminator_loss"] = None
        else:
            self._watch_discriminator(means["discriminator_loss"])
        if recipe.hard_label_weight == 0:
            del means["hard_ce"]
        epoch, step = (self.step - 1) // self.steps_per_epoch, self.step - 1
        if self.telemetry:
            speed = {"lr": self.train_step.lr, "images_per_second": rate, "data_wait_fraction": waiting}
            self.telemetry.write({"kind": "train", "epoch": epoch, "step": step, **means, **speed})
        shown = {name: value for name, value in means.items() if value is not None}
        self.progress.line(f"epoch {epoch + 1}/{recipe.epochs}", shown, rate)

    def _watch_discriminator(self, loss: float | None) -> None:
        """Warns where two logged means in a row sit at ln 2 (None: every step was skipped)."""
        self.dead_lines = self.dead_lines + 1 if loss is not None and is_dead(loss) else 0
        if self.dead_lines == 2:
            self.progress.say(
                f"warning: the discriminator's loss stays at ln 2 = {DEAD_LOSS:.4f}: it is dead or cannot tell student "
                "from teachers; try another --discriminator-lr or --seed, or --discriminator off"
            )

    def _evaluates_at(self, step: int) -> bool:
        every = self.recipe.eval_every * self.steps_per_epoch
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _evaluate(self) -> None:
        result = self.validate(self._show_pictures if self.telemetry and self.parts.live_teachers else None)
        score = result.models[0].to_json()
        line = {"epoch": self.step // self.steps_per_epoch, "step": self.step, **score, "kl": result.kl}
        self.scores["latest"] = line
        if self.step == 0:
            self.scores["start"] = line
        self.scores["teachers"] = [
            {"model": spec, **score.to_json()}
            for spec, score in zip(self.parts.live_teachers, result.models[1:], strict=True)
        ]
        self.scores["ensemble"] = result.ensemble.to_json() if result.ensemble else None
        if self.telemetry:
            self.telemetry.write({"kind": "eval", **line})
            self.telemetry.weights(self.parts.student.model, self.step)
        kl = "" if result.kl is None else f"  kl {result.kl:.4f}"
        self.progress.say(
            f"evaluated after {self.step} steps:  top-1 {line['top1']:.2f}%  top-5 {line['top5']:.2f}%{kl}"
        )

    def _show_pictures(self, images: torch.Tensor, targets: torch.Tensor, names: list[str]) -> None:
        self.telemetry.pictures(images, targets, names, self.step)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        scheduled = self._evaluates_at(self.step) and self.scores["latest"]
        best = self.scores["best"]
        is_best = bool(scheduled) and (best is None or self.scores["latest"]["top1"] > best["top1"])
        if is_best:
            self.scores["best"] = self.scores["latest"]
        if self.label_writer:
            self.label_writer.flush()
        self.bad_steps.read()
        state = run_state.capture(self.runtime, self.parts, self.train_step)
        if not self.runtime.is_main:
            return
        state |= {
            "recipe": self.recipe.to_json(),
            "identity": run_report.identity(self.parts, self.data, self.writing),
            "scores": self.scores,
            "bad_in_a_row": self.bad_steps.in_a_row,
            "layouts": teacher_setup.layouts(self.teacher_reports),
        }
        self.writer.save(self.step, state, best=is_best)

    def _resume(self) -> dict[str, Any] | None:
        """Takes up the checkpoint that --resume asks for. Returns its content, None without one."""
        resume = self.recipe.resume
        if resume == "never":
            return None
        if resume == "auto":
            found = checkpoint.newest(self.directory.checkpoints)
            if found is None and checkpoint.candidates(self.directory.checkpoints):
                raise UsageError(
                    f"{self.directory.checkpoints}: every checkpoint is damaged; start anew in another --run-dir"
                )
            if found is None:
                return None
            path, state = found
        else:
            path = Path(resume)
            state = checkpoint.read(path)
        run_state.check(state, f"checkpoint {path}")
        refuse_other_recipe(self.recipe, state["recipe"], f"checkpoint {path}: of a run")
        options = {"images": "--data", "targets": "--label-cache", "teachers": "--teachers"}
        for what, option in options.items():
            if state["identity"].get(what) != run_report.identity(self.parts, self.data, self.writing)[what]:
                raise UsageError(f"{option}: not the {what} that the run of checkpoint {path} has seen")
        run_state.restore(state, self.runtime, self.parts, self.train_step, f"checkpoint {path}")
        return state

    def _belongs(self, line: dict[str, Any]) -> bool:
        """Whether a line of metrics.jsonl is one that an uninterrupted run would have written by now."""
        if self.step == 0:
            return False  # no checkpoint: what an earlier process did is done again, the evaluation at the start too
        step = line.get("step", -1)
        if line.get("kind") == "eval":
            return step <= self.step and (self._evaluates_at(step) or (step == 0 and self.recipe.eval_start))
        return step < self.step and ((step + 1) % self.recipe.log_every == 0 or step + 1 == self.total_steps)

    def _give_up(self) -> None:
        """Ends a run of bad steps only. Skipped steps change nothing, so its checkpoint holds the last good weights."""
        if self.writer:
            self.writer.wait()
        found = bad_batch.diagnose(self.batch, self.runtime, self.parts, self.data.train)
        lr = self.train_step.lr
        path = self.directory.path / "bad_batch.json"
        if self.runtime.is_main:
            with suppress(OSError):
                write_json(path, {"step": self.step - 1, "lr": lr, **found})
        raise RunError(
            f"{self.recipe.max_bad_steps} steps in a row had a non-finite loss or gradient and were skipped; at step "
            f"{self.step - 1} (lr {lr:g}) {bad_batch.words(found)}; all of it is in {path}; the weights before these "
            f"steps are in {self.directory.checkpoints}; lower --lr, or allow more with --max-bad-steps"
        )

    def _close(self, loader: Any, error: BaseException | None = None) -> None:
        """Leaves no thread, handler or half-written file behind, whatever ended the run."""
        self.stop_signal.__exit__()
        if self.writer and isinstance(error, KeyboardInterrupt):  # a second Ctrl-C: at once
            self.writer.abandon(2.0)
        if loader is not None:
            loader.close()
        self.progress.close()
        with nullcontext() if error is None else suppress(Exception):  # what ended the run is the news
            if self.label_writer:
                self.label_writer.close()
            if self.writer and not isinstance(error, KeyboardInterrupt):
                self.writer.wait()
            if self.telemetry:
                self.telemetry.close()
