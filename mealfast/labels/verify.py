"""Checks a label cache: every file's bytes, and a sample of its targets made anew by the teachers.

Shape legend: B images of a batch, k entries kept of each target.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from mealfast.errors import UsageError
from mealfast.labels.fit import check_images
from mealfast.labels.labelling import Labeller, LabelTeachers, load_teachers
from mealfast.loaders import CacheHeader, ImageIndex, LabelCache
from mealfast.machine.precision import name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.method.data import view_plan
from mealfast.models.class_order import Named
from mealfast.models.ensemble import FrozenEnsemble
from mealfast.models.layout import default_layout, is_layout
from mealfast.recipe import Recipe

# Mean total variation between stored and recomputed targets. The same machine gives what float16 rounds away, another
# precision about a tenth of this; the view next to the right one is far beyond it.
TOLERANCE = 0.02


def check_files(cache: LabelCache) -> int:
    """Reads every complete view; how many there are. Raises DataError at the first that is damaged."""
    for record in cache.header.complete:
        cache.check(record.view)
    return len(cache.header.complete)


def dtypes_of(header: CacheHeader, otherwise: str) -> list[str]:
    """What each teacher computed in, of layout.DTYPES; `otherwise` where the header does not say."""
    layouts = header.made_with.get("layouts")
    layouts = {key: one for key, one in layouts.items() if is_layout(one)} if isinstance(layouts, dict) else {}
    found = []
    for teacher in header.teachers:
        model = teacher["spec"].partition("@")[0]
        own = [layout["dtype"] for key, layout in layouts.items() if f" | {model} | " in key]
        found.append(own[-1] if own else otherwise)
    return found


def recompute(
    cache: LabelCache,
    recipe: Recipe,
    runtime: Runtime,
    index: ImageIndex,
    batches: int,
    dtypes: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Labels `batches` whole batches, spread over views and images, anew and compares them with the cache. `dtypes`
    are what the teachers compute in, None: what `--amp` says.

    Returns {"images", "mean_total_variation", "largest_total_variation"}. Raises UsageError: other images, other
    teachers, or targets that differ by more than rounding.
    """
    header, what = cache.header, f"label cache {cache.folder}"
    check_images(header, index, what)
    models, described, classes = load_teachers(recipe, runtime, index, Named(what, header.class_names))
    for given, known in zip(described, header.teachers, strict=False):
        if given["digest"] != known["digest"]:
            raise UsageError(
                f"--teachers {given['spec']}: not the weights of {known['spec']} that {cache.folder} is of"
            )
    if len(described) != len(header.teachers):
        raise UsageError(f"--teachers: {len(described)} models, but {cache.folder} is of {len(header.teachers)}")
    compiled = recipe.compile is True
    dtypes = dtypes or [name_of(precision(recipe.amp, runtime.device))] * len(models)
    layouts = [default_layout(one, compiled) for one in dtypes]
    ensemble = FrozenEnsemble(models, runtime, compile=compiled, layouts=layouts)
    teachers = LabelTeachers(ensemble, described, classes, compiled)
    differences = np.concatenate(_differences(cache, recipe, runtime, index, teachers, batches))
    result = {
        "images": len(differences),
        "mean_total_variation": float(differences.mean()),
        "largest_total_variation": float(differences.max()),
    }
    if result["mean_total_variation"] > TOLERANCE:
        raise UsageError(
            f"{what}: {len(differences)} recomputed targets differ by {differences.mean():.3f} "
            f"(mean total variation; at most {TOLERANCE} is rounding): build it again"
        )
    return result


def _differences(
    cache: LabelCache, recipe: Recipe, runtime: Runtime, index: ImageIndex, teachers: LabelTeachers, batches: int
) -> list[np.ndarray]:
    header, plan = cache.header, cache.header.plan
    rows = min(header.made_with["batch_size"], len(index))
    batches_of_view = -(-len(index) // rows)
    count = len(header.complete) * batches_of_view
    if count == 0:
        raise UsageError(f"label cache {cache.folder}: no view is complete; there is nothing to recompute")
    sample = []
    for place in np.linspace(0, count - 1, min(batches, count)).astype(int):
        record, number = divmod(int(place), batches_of_view)
        images = np.arange(number * rows, min((number + 1) * rows, len(index)))
        sample.append((header.complete[record].view, images))
    of_cache = replace(
        recipe, seed=plan["seed"], size=plan["size"], crop_scale=tuple(plan["scale"]), crop_ratio=tuple(plan["ratio"]),
        flip=plan["flip"], interpolation=plan["interpolation"],
    )  # fmt: skip
    labeller = Labeller(recipe, runtime, index, view_plan(of_cache, index), teachers, header.top_k, rows)
    found = []
    with closing(labeller(sample)) as targets:
        for (view, _), target in zip(sample, targets, strict=True):
            shown, *made = (part.cpu().numpy() for part in target)
            found.append(compare(made, cache.targets(view, shown), header.classes))
    return found


def compare(found: Sequence[np.ndarray], stored: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Total variation, float64 [B], between two top-k targets (ids [B, k], probabilities [B, k]) with the rest spread
    evenly: 0 where they are equal, 1 where they have nothing in common."""
    one, other = (_dense(ids, probabilities, classes) for ids, probabilities in (found, stored))
    return np.abs(one - other).sum(axis=1) / 2


def _dense(ids: np.ndarray, probabilities: np.ndarray, classes: int) -> np.ndarray:
    p = probabilities.astype(np.float64)
    rest = np.clip(1 - p.sum(axis=1, keepdims=True), 0, None) / max(classes - p.shape[1], 1)
    dense = np.repeat(rest, classes, axis=1)
    np.put_along_axis(dense, ids.astype(np.int64), p, axis=1)
    return dense
