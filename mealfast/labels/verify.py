"""Checks a label cache: every file's bytes, and a sample of its targets made anew by the teachers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mealfast.errors import UsageError
from mealfast.labels.build import LabelTeachers, compare, load_teachers, top_k_targets
from mealfast.loaders import CacheHeader, ImageIndex, LabelCache, ViewPlan, label_loader
from mealfast.machine.precision import name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.models.layout import is_layout
from mealfast.recipe import Recipe

# Mean total variation between stored and recomputed targets. The same machine gives what float16 rounds away, another
# precision about a tenth of this; the view next to the right one is far beyond it.
TOLERANCE = 0.02


def check_files(cache: LabelCache) -> int:
    """Reads every complete view; how many there are. Raises DataError at the first that is damaged."""
    for record in cache.header.complete:
        cache.check(record.view)
    return len(cache.header.complete)


def check_images(cache: LabelCache, index: ImageIndex, data: str) -> None:
    """Raises UsageError unless the cache is of these images."""
    header = cache.header
    if len(index) != header.images:
        raise UsageError(f"--data {data}: {len(index):,} images, but {cache.folder} was made of {header.images:,}")
    if index.images_digest != header.images_digest:
        raise UsageError(f"--data {data}: not the images (paths, sizes) that {cache.folder} was made of")


def dtypes_of(header: CacheHeader, otherwise: str) -> list[str]:
    """What each teacher computed in, of teacher_layout.DTYPES; `otherwise` where the header does not say."""
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
    check_images(cache, index, recipe.data)
    header = cache.header
    dtypes = dtypes or [name_of(precision(recipe.amp, runtime.device))] * len(recipe.teachers)
    teachers = load_teachers(recipe, runtime).as_they_are(runtime, dtypes)
    for given, known in zip(teachers.described, header.teachers, strict=False):
        if given["digest"] != known["digest"]:
            raise UsageError(
                f"--teachers {given['spec']}: not the weights of {known['spec']} that {cache.folder} is of"
            )
    if len(teachers.described) != len(header.teachers):
        raise UsageError(
            f"--teachers: {len(teachers.described)} models, but {cache.folder} is of {len(header.teachers)}"
        )
    differences = np.concatenate(_differences(cache, recipe, runtime, index, teachers, batches))
    result = {
        "images": len(differences),
        "mean_total_variation": float(differences.mean()),
        "largest_total_variation": float(differences.max()),
    }
    if result["mean_total_variation"] > TOLERANCE:
        raise UsageError(
            f"label cache {cache.folder}: {len(differences)} recomputed targets differ by {differences.mean():.3f} "
            f"(mean total variation; at most {TOLERANCE} is rounding): build it again"
        )
    return result


def _differences(
    cache: LabelCache, recipe: Recipe, runtime: Runtime, index: ImageIndex, teachers: LabelTeachers, batches: int
) -> list[np.ndarray]:
    header = cache.header
    plan = ViewPlan(
        index.widths, index.heights,
        **{name: header.plan[name] for name in ("seed", "size", "scale", "ratio", "flip", "interpolation")},
    )  # fmt: skip
    batch_size = header.made_with["batch_size"]
    places = [(record.view, first) for record in header.complete for first in range(0, header.images, batch_size)]
    if not places:
        raise UsageError(f"label cache {cache.folder}: no view is complete; there is nothing to recompute")
    sample = [places[place] for place in np.linspace(0, len(places) - 1, min(batches, len(places))).astype(int)]
    loader = label_loader(
        recipe.loader, index, plan, sample, batch_size=batch_size, device=runtime.device, threads=recipe.loader_threads
    )
    found = []
    try:
        for (view, _), batch in zip(sample, loader, strict=True):
            pad_to = batch_size if teachers.compiled else None
            made = [part.cpu().numpy() for part in top_k_targets(teachers, batch.images, header.top_k, pad_to)]
            found.append(compare(made, cache.targets(view, batch.indices.cpu().numpy()), header.classes))
    finally:
        loader.close()
    return found
