"""What a batch that gives no finite gradient looks like.

Shape legend: B images of this process, C classes.
"""

from __future__ import annotations

from typing import Any

import torch

from mealfast.loaders import Batch, ImageIndex
from mealfast.machine.processes import Runtime
from mealfast.training.job import Parts

_SHOWN = 8  # images named in the message; the file has all


def diagnose(batch: Batch, runtime: Runtime, parts: Parts, index: ImageIndex) -> dict[str, Any]:
    """Image indices and paths of the global batch, and the largest finite |logit| of student and teachers on it, with
    how many logits are not finite. Every process must call it. It waits, compiles nothing and ends the training: the
    student's running statistics change."""
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        logits = {"student": [parts.trainee.logits(batch.images)]}
        if parts.teachers:
            logits["teachers"] = parts.teachers(batch.images)
    own = {name: [_extremes(one.float()) for one in some] for name, some in logits.items()}
    shares = runtime.gather({"indices": batch.indices.tolist(), "logits": own})
    indices = [i for share in shares for i in share["indices"]]
    found: dict[str, Any] = {"indices": indices, "paths": [index.display_path(i) for i in indices]}
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


def _figure(one: dict[str, float]) -> str:
    if one["not_finite"]:
        return f"{one['largest_logit']:.4g} ({one['not_finite']} of {one['logits']} are not finite)"
    return f"{one['largest_logit']:.4g}"
