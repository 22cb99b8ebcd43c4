"""Whether a label cache is one of this run's images, views, classes and teachers; refused at the first that is not."""

from __future__ import annotations

from pathlib import Path

from mealfast.errors import UsageError
from mealfast.loaders import CacheHeader, ImageIndex, LabelCache, ViewPlan, plan_fields
from mealfast.machine.files import words
from mealfast.models import normalised as models
from mealfast.models.spec import parse
from mealfast.recipe import Recipe

_PLAN_OPTIONS = {"scale": "crop_scale", "ratio": "crop_ratio"}  # called otherwise in a plan than in a recipe


def open_label_cache(recipe: Recipe) -> LabelCache | None:
    """The recipe's cache, every view of it; None where it names none. Raises UsageError or DataError."""
    if not recipe.label_cache:
        return None
    require_cache(recipe)
    cache = LabelCache(recipe.label_cache)
    cache.require_complete()
    _check_teachers(cache, recipe)
    return cache


def require_cache(recipe: Recipe) -> None:
    """Raises UsageError where nothing lies at --label-cache."""
    if not Path(recipe.label_cache).exists():
        raise UsageError(
            f"--label-cache {recipe.label_cache}: no such folder; `mealfast labels build` writes one, and so does a "
            "run with --teachers"
        )


def check_fit(cache: LabelCache, recipe: Recipe, plan: ViewPlan, index: ImageIndex, classes: int) -> None:
    """Raises UsageError at the first of images, views and classes in which the cache and this run differ."""
    header, what = cache.header, f"--label-cache {recipe.label_cache}"
    check_images(header, index, what)
    for name, value in plan_fields(plan).items():
        cached = header.plan.get(name)
        if cached != value:
            option = "--" + _PLAN_OPTIONS.get(name, name).replace("_", "-")
            raise UsageError(
                f"{what}: was made with {option} {words(cached)}, not {words(value)}: use {option} {words(cached)}, "
                "or another cache"
            )
    if header.classes != classes:
        raise UsageError(f"{what}: is of {header.classes} classes, but --student {recipe.student} has {classes}")


def check_images(header: CacheHeader, index: ImageIndex, what: str) -> None:
    """Raises UsageError unless the cache that `what` names is of these images."""
    if header.images != len(index):
        raise UsageError(f"{what}: is of {header.images:,} images, but {index.root} holds {len(index):,}")
    if header.images_digest != index.images_digest:
        raise UsageError(f"{what}: is of other images (paths or file sizes) than {index.root} holds")


def _check_teachers(cache: LabelCache, recipe: Recipe) -> None:
    """Teachers that the recipe names must be the cache's: by name and tag, and by weights where they lie in a file."""
    if not recipe.teachers or cache.header.explicit:  # whose labels were imported: their teachers are not known
        return
    what, cached = f"--label-cache {recipe.label_cache}", cache.header.teachers
    if len(recipe.teachers) != len(cached):
        raise UsageError(f"{what}: is of {len(cached)} teachers, not {len(recipe.teachers)}: leave --teachers out")
    for spec, teacher in zip(recipe.teachers, cached, strict=True):
        given, known = parse(spec), parse(teacher["spec"])
        same = given.architecture == known.architecture or bool(given.source or known.source)
        if given.tag and known.tag:
            same = same and given.tag == known.tag
        if same and (given.checkpoint or known.source):
            same = models.digest(models.build(given, recipe.size)) == teacher["digest"]
        if not same:
            raise UsageError(
                f"{what}: is of teacher {teacher['spec']}, not {spec}: leave --teachers out, or build anew"
            )
