"""The training run: read, step, log, evaluate, save."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mealfast
from mealfast import checkpoint, models, run_state, splits, weights
from mealfast import runtime as runtimes
from mealfast.assembly import assemble
from mealfast.clock import Clock
from mealfast.discriminator import DEAD_LOSS, is_dead
from mealfast.errors import UsageError
from mealfast.evaluation import evaluate
from mealfast.kernels import ensemble_target
from mealfast.loaders import EvalViews, ViewPlan, eval_loader, train_loader
from mealfast.objective import TERMS
from mealfast.progress import Progress
from mealfast.recipe import Recipe
from mealfast.run_directory import RunDirectory, refuse_other_recipe
from mealfast.runtime import Runtime
from mealfast.stop_signal import StopSignal
from mealfast.telemetry import Telemetry
from mealfast.train_step import TrainStep

_PICTURES = 4  # validation images shown in TensorBoard with their target's top-5


def train(recipe: Recipe) -> dict[str, Any]:
    """Runs a recipe to its end, or to where it is stopped. Returns the content of summary.json.

    Raises UsageError or DataError for what the user can mend, before anything is written.
    """
    run_directory = RunDirectory(recipe.run_dir)
    run_directory.check(recipe)
    runtime = runtimes.start(recipe.device, recipe.amp)
    try:
        return Run(recipe, runtime, run_directory).train()
    finally:
        runtimes.stop()


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
        self.parts = assemble(recipe, runtime)
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
        self.train_step = TrainStep(recipe, runtime, self.parts, self.steps_per_epoch)
        self.scores: dict[str, Any] = {"start": None, "latest": None, "best": None}
        self.step = self._resume()
        self.clock = Clock()
        self.dead_lines = 0

    def train(self) -> dict[str, Any]:
        recipe, runtime = self.recipe, self.runtime
        if runtime.is_main:
            self.directory.claim(self._config())
        self.telemetry = Telemetry(self.directory.path, self.step, self._belongs) if runtime.is_main else None
        self.progress = Progress(self.last_step, self.step, recipe.batch_size, enabled=runtime.is_main)
        self.began, self.stop_signal = time.perf_counter(), StopSignal()
        loader = None
        try:
            self._introduce()
            if self.step == 0 and recipe.eval_start:
                self._evaluate()
            if self.step < self.last_step:
                loader = train_loader(
                    recipe.loader,
                    self.data.train,
                    self._plan(),
                    batch_size=recipe.batch_size,
                    start_step=self.step,
                    stop_step=self.last_step,
                    rank=runtime.rank,
                    world_size=runtime.world_size,
                    device=runtime.device,
                    threads=recipe.loader_threads,
                )
                self._loop(iter(loader))
            return self._finish(loader)
        finally:
            if loader is not None:
                loader.close()
            self.stop_signal.restore()
            self.progress.close()
            if self.telemetry:
                self.telemetry.close()

    def _loop(self, batches: Any) -> None:
        stopping = False
        while self.step < self.last_step and not stopping:
            began = time.perf_counter()
            batch = next(batches)
            waited = time.perf_counter() - began
            self.train_step(batch, self.step)
            self.step += 1
            stopping = self._log_if_due(began, waited)
            evaluating = self._evaluates_at(self.step) or self.step == self.last_step
            if evaluating:
                self._evaluate()
            if evaluating or stopping or self.step % self.recipe.checkpoint_every == 0:
                self._save()

    # -- what the loop reads and writes ------------------------------------------------------------------------------

    def _plan(self) -> ViewPlan:
        recipe, index = self.recipe, self.data.train
        return ViewPlan(
            index.widths,
            index.heights,
            seed=recipe.seed,
            size=recipe.size,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            flip=recipe.flip,
            interpolation=recipe.interpolation,
        )

    def _log_if_due(self, began: float, waited: float) -> bool:
        """Logs at every `log_every` steps and at the end; True where the run is to stop because it was asked to."""
        scheduled = self.step % self.recipe.log_every == 0
        if not (scheduled or self.step == self.last_step):
            self.clock.add(time.perf_counter() - began, waited)
            self.progress.advance()
            return self.runtime.world_size == 1 and bool(self.stop_signal)
        # One reduction carries the means and whether any process was asked to stop: they stop at the same step.
        asked = self.train_step.meter.new_tensor([float(bool(self.stop_signal))])
        *sums, steps, asked = self.runtime.sum(torch.cat((self.train_step.meter, asked))).tolist()  # the host sync
        if scheduled:
            self.train_step.meter.zero_()
        self.clock.add(time.perf_counter() - began, waited)
        rate, waiting = self.clock.close_window(self.recipe.batch_size)
        self.progress.advance()
        self._write_train_line({name: value / steps for name, value in zip(TERMS, sums, strict=True)}, rate, waiting)
        return asked > 0

    def _write_train_line(self, means: dict[str, float], rate: float, waiting: float) -> None:
        recipe = self.recipe
        if not recipe.teachers:
            means["soft_ce"] = means["kl"] = None
        if recipe.discriminator_mode == "off":
            means["discriminator_loss"] = None
        else:
            self._watch_discriminator(means["discriminator_loss"])
        if recipe.hard_label_weight == 0:
            del means["hard_ce"]
        epoch, step = (self.step - 1) // self.steps_per_epoch, self.step - 1
        if self.telemetry:
            lr = self.parts.optimizer.param_groups[0]["lr"]
            speed = {"images_per_second": rate, "data_wait_fraction": waiting}
            self.telemetry.write({"kind": "train", "epoch": epoch, "step": step, **means, "lr": lr, **speed})
        shown = {name: value for name, value in means.items() if value is not None}
        self.progress.line(f"epoch {epoch + 1}/{recipe.epochs}", shown, rate)

    def _watch_discriminator(self, loss: float) -> None:
        """Warns where two logged means in a row sit at ln 2."""
        self.dead_lines = self.dead_lines + 1 if is_dead(loss) else 0
        if self.dead_lines == 2:
            self.progress.say(
                f"warning: the discriminator's loss stays at ln 2 = {DEAD_LOSS:.4f}: it is dead or cannot tell student "
                "from teachers; try another --discriminator-lr or --seed, or --discriminator off"
            )

    def _evaluates_at(self, step: int) -> bool:
        every = self.recipe.eval_every * self.steps_per_epoch
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _evaluate(self) -> None:
        recipe, runtime, parts = self.recipe, self.runtime, self.parts
        run_state.share_buffers(parts.student, runtime)
        teachers = parts.teachers
        batch_size = recipe.batch_size // runtime.world_size
        views = EvalViews.from_crop_pct(recipe.size, recipe.eval_crop_pct, recipe.eval_interpolation)

        def predict(images: torch.Tensor) -> list[torch.Tensor]:
            with runtime.autocast():
                student_logits = parts.student(images)
            return [student_logits, *(teachers(images) if teachers else [])]

        parts.student.eval()
        members = range(1, 1 + len(recipe.teachers))
        loader = eval_loader(
            recipe.loader,
            self.data.val,
            views,
            batch_size=batch_size,
            rank=runtime.rank,
            world_size=runtime.world_size,
            device=runtime.device,
            threads=recipe.loader_threads,
        )
        try:
            result = evaluate(
                predict,
                1 + len(members),
                [loader],
                runtime,
                ensemble=members,
                student=0 if members else None,
                pad_to=batch_size if parts.compiled else None,
                on_batch=self._show_pictures(),
            )
        finally:
            loader.close()
            parts.student.train()
        line = {
            "epoch": self.step // self.steps_per_epoch,
            "step": self.step,
            **result.models[0].to_json(),
            "kl": result.kl,
        }
        teacher_scores = [
            {"model": spec, **score.to_json()} for spec, score in zip(recipe.teachers, result.models[1:], strict=True)
        ]
        ensemble = result.ensemble.to_json() if result.ensemble else None
        self.scores["teachers"], self.scores["ensemble"] = teacher_scores, ensemble
        self.scores["latest"] = line
        if self.step == 0:
            self.scores["start"] = line
        if self.telemetry:
            self.telemetry.write({"kind": "eval", **line})
            self.telemetry.weights(parts.student.model, self.step)
        kl = "" if result.kl is None else f"  kl {result.kl:.4f}"
        self.progress.say(
            f"evaluated after {self.step} steps:  top-1 {line['top1']:.2f}%  top-5 {line['top5']:.2f}%{kl}"
        )

    def _show_pictures(self) -> Any:
        """A callback that sends the first batch's pictures to TensorBoard; None where there is nothing to show."""
        if not self.telemetry or not self.parts.teachers:
            return None
        shown = False

        def show(images: torch.Tensor, logits: list[torch.Tensor]) -> None:
            nonlocal shown
            if not shown:
                shown = True
                names = splits.class_names(self.data, self.parts.student.num_classes)
                targets = ensemble_target([one[:_PICTURES] for one in logits[1:]])
                self.telemetry.pictures(images[:_PICTURES], targets, names, self.step)

        return show

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must agree with beside the recipe: the same images, the same teachers."""
        return {
            "images": {"train": self.data.train.digest, "val": self.data.val.digest},
            "teachers": dict(zip(self.recipe.teachers, self.parts.teacher_digests, strict=True)),
        }

    def _save(self) -> None:
        scheduled = self._evaluates_at(self.step) and self.scores["latest"]
        best = self.scores["best"]
        is_best = bool(scheduled) and (best is None or self.scores["latest"]["top1"] > best["top1"])
        if is_best:
            self.scores["best"] = self.scores["latest"]
        state = run_state.capture(self.runtime, self.parts, self.train_step)
        if not self.runtime.is_main:
            return
        state |= {"recipe": self.recipe.to_json(), "identity": self._identity(), "scores": self.scores}
        path = checkpoint.save(self.directory.checkpoints, self.step, state, self.recipe.keep)
        if is_best:
            checkpoint.mark_best(path)

    def _resume(self) -> int:
        """Takes up the checkpoint that --resume asks for; the number of steps it had taken, 0 without one."""
        resume = self.recipe.resume
        if resume == "never":
            return 0
        if resume == "auto":
            found = checkpoint.newest(self.directory.checkpoints)
            if found is None:
                return 0
            path, state = found
        else:
            path = Path(resume)
            state = checkpoint.read(path)
        refuse_other_recipe(self.recipe, state.get("recipe", {}), f"checkpoint {path}: of a run")
        stored = state.get("identity", {})
        for what, option in (("images", "--data"), ("teachers", "--teachers")):
            if stored.get(what) != self._identity()[what]:
                raise UsageError(f"{option}: not the {what} that the run of checkpoint {path} has seen")
        run_state.restore(state, self.runtime, self.parts, self.train_step, f"checkpoint {path}")
        self.scores = state["scores"]
        return state["step"]

    def _belongs(self, line: dict[str, Any]) -> bool:
        """Whether a line of metrics.jsonl is one that an uninterrupted run would have written by now."""
        step = line.get("step", -1)
        if line.get("kind") == "eval":
            return step <= self.step and (self._evaluates_at(step) or (step == 0 and self.recipe.eval_start))
        return step < self.step and ((step + 1) % self.recipe.log_every == 0 or step + 1 == self.total_steps)

    # -- the run directory -------------------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        index = self.data
        return {
            "mealfast": mealfast.__version__,
            "recipe": self.recipe.to_json(),
            "processes": self.runtime.world_size,
            "device": str(self.runtime.device.type),
            "amp": str(self.runtime.amp_dtype).removeprefix("torch.") if self.runtime.amp_dtype else "off",
            "compiled": self.parts.compiled,
            "versions": runtimes.describe(self.runtime.device),
            "images": {"train": len(index.train), "val": len(index.val)},
            "image_digests": self._identity()["images"],
            "teacher_digests": self._identity()["teachers"],
        }

    def _introduce(self) -> None:
        recipe, runtime, say = self.recipe, self.runtime, self.progress.say
        precision = str(runtime.amp_dtype).removeprefix("torch.") if runtime.amp_dtype else "float32"
        for spec in (recipe.student, *recipe.teachers):
            if models.is_random(spec):
                say(f"note: {spec} has random weights (no tag and no checkpoint)")
        for name, index in (("train", self.data.train), ("val", self.data.val)):
            if index.quarantined:
                say(f"note: {len(index.quarantined)} files of {name}/ cannot be read: mealfast index {index.root}")
        teachers = " + ".join(recipe.teachers) or "none (labels alone)"
        say(f"student {recipe.student}  teachers {teachers}  discriminator {recipe.discriminator_mode}")
        say(
            f"{len(self.data.train):,} images, {recipe.epochs} epochs of {self.steps_per_epoch} steps of "
            f"{recipe.batch_size} at {recipe.size} px  |  {runtime.world_size} x {runtime.device.type}, {precision}, "
            f"{recipe.loader} loader  |  {self.directory.path}"
        )
        if self.step:
            say(f"resuming after {self.step} of {self.total_steps} steps")

    def _finish(self, loader: Any) -> dict[str, Any]:
        """Writes student.safetensors and summary.json; says where they are, or how to go on."""
        rate, waiting = self.clock.medians()
        replaced = dict(
            pair for found in self.runtime.gather(getattr(loader, "replaced", {})) for pair in found.items()
        )
        summary = {
            "finished": self.step == self.total_steps,
            "steps": self.step,
            "total_steps": self.total_steps,
            "epochs": self.step / self.steps_per_epoch,
            "start": self.scores["start"],
            "final": self.scores["latest"],
            "best": self.scores["best"],
            "teachers": self.scores.get("teachers", []),
            "ensemble": self.scores.get("ensemble"),
            "images_per_second": rate,
            "data_wait_fraction": waiting,
            "skipped_steps": int(self.train_step.skipped),
            "replaced_images": replaced,
            "quarantined_images": len(self.data.train.quarantined) + len(self.data.val.quarantined),
            "seconds": time.perf_counter() - self.began,
        }
        if self.runtime.is_main:
            kept = self.clock.medians()[0] is None and self.directory.summary.exists()
            if kept:  # nothing was left to do: the figures of the run itself stay
                summary = json.loads(self.directory.summary.read_text(encoding="utf-8"))
            weights.save(self.parts.student.model, self.directory.student)
            checkpoint.write_json(self.directory.summary, summary)
        done = "finished" if self.step == self.total_steps else f"stopped after {self.step} of {self.total_steps} steps"
        again = "" if self.step == self.total_steps else "; the same command goes on from here"
        self.progress.say(f"{done}{again}: {self.directory.student}")
        return summary
