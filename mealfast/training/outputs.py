"""What a run writes: its log, metrics, checkpoints, and the label cache if it makes one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mealfast.labels.labelling import LabelTeachers, described
from mealfast.labels.write_through import RecordingTargets
from mealfast.models import tuning
from mealfast.record.checkpoint_writer import CheckpointWriter
from mealfast.record.console import Progress
from mealfast.record.metrics import Picture, Telemetry
from mealfast.record.run_directory import RunDirectory
from mealfast.training import report
from mealfast.training.job import Job
from mealfast.training.where import Where


class Outputs:
    """Open files and threads of one process, closed by leaving the `with` block; only the main process writes a run
    directory."""

    directory: RunDirectory
    recording: RecordingTargets | None  # the label cache that the run writes
    progress: Progress  # of the terminal; says nothing on other processes than the main one
    telemetry: Telemetry | None  # on the main process
    checkpoints: CheckpointWriter | None  # on the main process
    saved: int  # the step of the checkpoint that was asked for last; set by `save`

    def __init__(self, job: Job, where: Where, directory: RunDirectory) -> None:
        """Claims label cache and run directory. Raises UsageError or DataError where one cannot be written."""
        self.directory = directory
        self.saved = where.step
        self.recording = recording_targets(job)
        self.telemetry = self.checkpoints = None
        self.progress = Progress(job.calendar.last, where.step, job.recipe.batch_size, enabled=job.runtime.is_main)
        with self._closed_on_error():
            if job.runtime.is_main:
                self._open(job, where)

    def _open(self, job: Job, where: Where) -> None:
        self.directory.claim(report.config(job))
        scores, step, calendar = where.scores, where.step, job.calendar

        def belongs(line: dict[str, Any]) -> bool:
            return calendar.belongs(line, step, scores.evaluated, scores.best_at)

        self.telemetry = self.directory.telemetry(step, belongs, self.say)
        self.checkpoints = CheckpointWriter(
            self.directory.checkpoints, job.recipe.keep, self.say, before=self.telemetry.sync
        )

    def say(self, line: str) -> None:
        """Shows a line to the user."""
        self.progress.say(line)

    def write(self, line: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if self.telemetry:
            self.telemetry.write(line)

    def show_pictures(self, step: int) -> Callable[[list[Picture], list[str]], None] | None:
        """Where an evaluation after `step` steps shows some images; None: nowhere."""
        telemetry = self.telemetry
        if telemetry is None:
            return None
        return lambda pictures, names: telemetry.pictures(pictures, names, step)

    def save(self, step: int, state: dict[str, Any], *, best: bool) -> None:
        """Has a checkpoint written, and the label cache brought to disk before it."""
        if self.checkpoints:
            self.checkpoints.save(step, state, best=best)
        self.saved = step

    def flush(self) -> None:
        """Brings to disk what was added to the label cache: before a checkpoint says that it is there."""
        if self.recording:
            self.recording.flush()

    def finish_views(self, epochs: range) -> None:
        """Completes the label cache's views of epochs that are over, all processes together."""
        if self.recording:
            for line in self.recording.finish(epochs):
                self.say(line)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Leaves no thread or half-written file behind, whatever ended the run."""
        if error is not None:
            with suppress(Exception):  # what ended the run is the news
                self._close(at_once=isinstance(error, KeyboardInterrupt))
        else:
            self._close(at_once=False)

    def _close(self, *, at_once: bool) -> None:
        if self.checkpoints and at_once:  # a second Ctrl-C
            self.checkpoints.abandon(2.0)
        self.progress.close()
        try:
            if self.recording:
                self.recording.close()
        finally:
            try:
                if self.checkpoints and not at_once:
                    self.checkpoints.wait()
            finally:
                if self.telemetry:
                    self.telemetry.close()

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise


def recording_targets(job: Job) -> RecordingTargets | None:
    """The label cache that a run writes, if it writes one; claims it. Raises UsageError or DataError."""
    if job.writing is None or job.teachers is None:
        return None
    layouts = tuning.layouts(job.reports)
    teachers = LabelTeachers(
        job.teachers, described(job.live_teachers, job.teacher_digests), job.student.num_classes, job.compiled, layouts,
        job.student.normalised.classes,
    )  # fmt: skip
    reordered = any(order is not None for order in job.class_orders)
    return RecordingTargets(job.recipe, job.runtime, teachers, job.data.train, job.views, job.writing, reordered)
