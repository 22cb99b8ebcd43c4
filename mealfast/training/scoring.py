"""Exact evaluation: every image once on any number of processes, counts summed as integers.

Shape legend: B images of this process, H and W pixels, M models, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mealfast.kernels import ensemble_soft_cross_entropy, ensemble_target
from mealfast.loaders import Batch, DataError, LoaderStopped
from mealfast.machine.processes import Runtime
from mealfast.machine.stop_signal import Stopped
from mealfast.models.ensemble import padded

Predict = Callable[..., list[torch.Tensor]]
Batches = tuple[Batch, ...]


@dataclass(frozen=True)
class Score:
    """Accuracy in percent of `images` images."""

    top1: float
    top5: float
    images: int

    def to_json(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "images": self.images}


def is_chance(score: Score, classes: int) -> bool:
    """Whether guesses among so many classes would be right as often: up to two standard deviations above the mean."""
    p = 1 / classes
    mean, deviation = score.images * p, math.sqrt(score.images * p * (1 - p))
    return score.top1 / 100 * score.images <= mean + 2 * deviation


@dataclass(frozen=True)
class Evaluation:
    """Each model's score, the ensemble's (of two members or more), the mean KL of the student to the ensemble."""

    models: list[Score]
    ensemble: Score | None
    kl: float | None


@torch.inference_mode()
def evaluate(
    predict: Predict,
    num_models: int,
    loaders: Sequence[Iterable[Batch]],
    runtime: Runtime,
    *,
    ensemble: Sequence[int] = (),
    student: int | None = None,
    pad_to: int | None = None,
    on_batch: Callable[[Batch, list[torch.Tensor]], None] | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Scores M = `num_models` models on the images of the loaders, which run in step (one a kind of preprocessing).

    `predict` takes each loader's uint8 images [B, H, W, 3] and returns M logits [B, C]. `ensemble` names the models
    whose mean softmax is scored too, `student` the one whose KL to that mean is wanted. `pad_to` adds black images up
    to that many, so that compiled models see one shape only. `on_batch(batch, logits)` sees every batch of the first
    loader and the M logits on it.

    Raises Stopped, on every process, where `stopping()`, asked before each batch, says so on one of them, and likewise
    DataError where a loader of one does.
    """
    device = runtime.device
    rows = num_models + bool(ensemble)
    correct = torch.zeros(rows, 2, dtype=torch.int64, device=device)  # right within the first 1 and 5 guesses
    images_seen = torch.zeros((), dtype=torch.int64, device=device)
    kl_sum = torch.zeros((), dtype=torch.float64, device=device)
    ending = _Ending(runtime, stopping)
    for batches in ending.until_one_ends(zip(*loaders, strict=True)):
        labels = batches[0].labels
        count = len(labels)
        logits = predict(*(padded(batch.images, pad_to) for batch in batches))
        logits = [one[:count].float() for one in logits]
        if on_batch is not None:
            on_batch(batches[0], logits)
        members = [logits[member] for member in ensemble]
        guesses = [*logits, ensemble_target(members)] if members else logits
        correct += torch.stack([_hits(one, labels) for one in guesses])
        images_seen += count
        if members and student is not None:
            kl_sum += ensemble_soft_cross_entropy(logits[student], members, reduction="none", return_kl=True)[1].sum()
    ending.agree()
    runtime.sum(correct), runtime.sum(images_seen), runtime.sum(kl_sum)
    images = int(images_seen)
    if images == 0:
        raise ValueError("evaluate: the loaders yielded no image")
    scores = [Score(100 * one / images, 100 * five / images, images) for one, five in correct.tolist()]
    return Evaluation(
        scores[:num_models],
        scores[num_models] if len(ensemble) > 1 else None,
        float(kl_sum) / images if ensemble and student is not None else None,
    )


class _Ending:
    """Why one process left its batches before their end, told to all where they meet: nobody waits for the one that is
    gone. In between no process waits for another."""

    def __init__(self, runtime: Runtime, stopping: Callable[[], bool]) -> None:
        self._runtime, self._stopping = runtime, stopping
        self._stopped, self._error = False, ""

    def until_one_ends(self, batches: Iterator[Batches]) -> Iterator[Batches]:
        """This process's batches, until there are no more, one cannot be had, or a signal came."""
        try:
            for one in batches:
                if self._stopping():
                    self._stopped = True
                    return
                yield one
        except LoaderStopped:
            self._stopped = True
        except DataError as error:
            self._error = str(error)

    def agree(self) -> None:
        """All processes together. Raises DataError or Stopped, on every process, if one of them had to leave."""
        everyone = self._runtime.gather((self._stopped, self._error))
        for _, error in everyone:
            if error:
                raise DataError(error)
        if any(stopped for stopped, _ in everyone):
            raise Stopped


def _hits(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Float [B, C], int64 [B] -> int64 [2]: rows whose label is among the first 1 and the first 5."""
    guesses = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack((guesses[:, 0].sum(), guesses.any(dim=1).sum()))
