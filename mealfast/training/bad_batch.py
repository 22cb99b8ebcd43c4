"""The end of a run of bad steps only: what its last batch looks like, and what its checkpoint holds.

Shape legend: B images of this process, C classes.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn

from mealfast.loaders import Batch
from mealfast.machine.files import write_json
from mealfast.record import checkpoint
from mealfast.record.run_directory import RunDirectory
from mealfast.training.job import Job

_SHOWN = 8  # images named in the message; the file has all


def report(job: Job, batch: Batch, step: int, directory: RunDirectory) -> str:
    """What there is to say after `step` and its batch, one line; bad_batch.json has all of it. Every process must call
    it. It waits, and ends the training: the student's running statistics change."""
    weights = largest_weights(job.student.model)  # skipped steps have changed none
    found = diagnose(job, batch)
    path, lr = directory.path / "bad_batch.json", job.optimiser.lr
    if job.runtime.is_main:
        with suppress(OSError):
            write_json(path, {"step": step, "lr": lr, "weights": weights, **found})
    earlier = [one.name for one in checkpoint.candidates(directory.checkpoints)[1:]]
    return (
        f"{job.recipe.max_bad_steps} steps in a row had a non-finite loss or gradient and were skipped; at step {step} "
        f"(lr {lr:g}) {words(found)}; all of it is in {path}; the weights before these steps, largest |weight| "
        f"{_figure(weights, 'largest_weight', 'weights')} ({weights['name']}), are in {directory.checkpoints}"
        f"{', earlier ones in ' + ', '.join(earlier) if earlier else ''}; lower --lr, or allow more with "
        "--max-bad-steps"
    )


def largest_weights(model: nn.Module) -> dict[str, Any]:
    """The largest finite |weight| of a model, whose it is, and how many of its weights are not finite."""
    found = {name: weight.detach().float() for name, weight in model.named_parameters()}
    sizes = {name: float(weight.abs().where(weight.isfinite(), 0.0).max()) for name, weight in found.items()}
    name = max(sizes, key=lambda one: sizes[one])
    return {
        "largest_weight": sizes[name],
        "name": name,
        "not_finite": sum(int((~weight.isfinite()).sum()) for weight in found.values()),
        "weights": sum(weight.numel() for weight in found.values()),
    }


def diagnose(job: Job, batch: Batch) -> dict[str, Any]:
    """Image indices and paths of the global batch, and the largest finite |logit| of student and teachers on it, with
    how many logits are not finite. Every process must call it. Compiles nothing."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = {"student": [job.student.logits(batch.images)]}
        if job.teachers:
            logits["teachers"] = job.teachers(batch.images)
    own = {name: [_extremes(one.float()) for one in some] for name, some in logits.items()}
    mine: dict[str, Any] = {"indices": batch.indices.tolist(), "logits": own}
    shares = job.runtime.gather(mine)
    indices = [i for share in shares for i in share["indices"]]
    found: dict[str, Any] = {"indices": indices, "paths": [job.data.train.display_path(i) for i in indices]}
    for name, some in own.items():
        found[name] = [_together([share["logits"][name][k] for share in shares]) for k in range(len(some))]
    return found


def words(found: dict[str, Any]) -> str:
    """What `diagnose` found, for a message."""
    parts = [
        f"largest |logit| {name} {', '.join(map(_figure, found[name]))}"
        for name in ("student", "teachers")
        if name in found
    ]
    named = ", ".join(f"{i} ({p})" for i, p in list(zip(found["indices"], found["paths"], strict=True))[:_SHOWN])
    more = len(found["indices"]) - _SHOWN
    return f"{'; '.join(parts)}; images {named}{f' and {more} more' if more > 0 else ''}"


def _extremes(logits: torch.Tensor) -> dict[str, float]:
    finite = logits.isfinite()
    return {
        "largest_logit": float(logits.abs().where(finite, 0.0).max()),
        "not_finite": int((~finite).sum()),
        "logits": logits.numel(),
    }


def _together(shares: list[dict[str, float]]) -> dict[str, float]:
    return {
        "largest_logit": max(share["largest_logit"] for share in shares),
        "not_finite": sum(share["not_finite"] for share in shares),
        "logits": sum(share["logits"] for share in shares),
    }


def _figure(one: dict[str, Any], largest: str = "largest_logit", count: str = "logits") -> str:
    if one["not_finite"]:
        return f"{one[largest]:.4g} ({one['not_finite']} of {one[count]} are not finite)"
    return f"{one[largest]:.4g}"
