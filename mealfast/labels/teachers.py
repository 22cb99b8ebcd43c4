"""The teachers of a label cache: loaded, made ready, and asked for the top k of their target.

Shape legend: B images of a batch, H and W pixels, K teachers, k entries kept of each target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mealfast.kernels import ensemble_topk
from mealfast.machine.processes import Runtime
from mealfast.models import normalised as models
from mealfast.models import tuning
from mealfast.models.ensemble import FrozenEnsemble, padded
from mealfast.models.layout import default_layout
from mealfast.models.tuning import TeacherReport
from mealfast.recipe import Recipe


@dataclass(frozen=True)
class LabelTeachers:
    """An ensemble ready to label, and what a cache's header says of it."""

    ensemble: Callable[[torch.Tensor], Sequence[torch.Tensor]]  # uint8 [B, H, W, 3] -> K logits [B, C], no autograd
    described: tuple[dict[str, str], ...]  # {"spec", "digest"} each
    classes: int
    compiled: bool
    layouts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # as `tuning.layouts` gives them

    def top_k(self, images: torch.Tensor, k: int, pad_to: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 images [B, H, W, 3] -> ids int32 [B, k], probabilities float32 [B, k] of the mean of the softmaxes.

        `pad_to` adds black images up to that many, for the teachers only.
        """
        logits = self.ensemble(padded(images, pad_to))
        return ensemble_topk([one[: len(images)] for one in logits], k)


@dataclass(frozen=True)
class LoadedTeachers:
    """Models that are yet to be laid out on their device."""

    models: list[models.NormalizedModel]
    described: tuple[dict[str, str], ...]
    classes: int
    compile: bool

    def as_they_are(self, runtime: Runtime, dtypes: Sequence[str]) -> LabelTeachers:
        """In the default layout, unmeasured, each in its dtype of layout.DTYPES."""
        layouts = [default_layout(dtype, self.compile) for dtype in dtypes]
        ensemble = FrozenEnsemble(self.models, runtime, compile=self.compile, layouts=layouts)
        return LabelTeachers(ensemble, self.described, self.classes, self.compile)

    def prepared(
        self, recipe: Recipe, runtime: Runtime, images: torch.Tensor, earlier: Mapping[str, Any]
    ) -> tuple[LabelTeachers, list[TeacherReport]]:
        """As fast as they run on images like these, uint8 [B, H, W, 3] on the device, and how that is; all processes
        together. `earlier` are the layouts that a build which goes on had. Raises UsageError."""
        ensemble, reports = tuning.prepare(
            recipe, runtime, self.models, images, compile=self.compile, earlier=earlier, specs=recipe.teachers
        )
        layouts = {**earlier, **tuning.layouts(reports)}
        return LabelTeachers(ensemble, self.described, self.classes, self.compile, layouts), reports


def load_teachers(recipe: Recipe, runtime: Runtime) -> LoadedTeachers:
    """The recipe's teachers. Raises UsageError for wrong specs, weights or sizes."""
    torch.manual_seed(recipe.seed)  # random weights, where a spec has no others
    teachers = [models.build(spec, recipe.size) for spec in recipe.teachers]
    classes = models.check_classes(recipe.teachers, teachers)
    for spec, teacher in zip(recipe.teachers, teachers, strict=True):
        models.probe(teacher, spec, recipe.size)
    digests = [models.digest(teacher) for teacher in teachers]
    models.check_distinct(recipe.teachers, digests)
    for note in models.random_notes(recipe.teachers) if runtime.is_main else ():
        print(note, file=sys.stderr)
    compiled = runtime.device.type == "cuda" if recipe.compile is None else recipe.compile
    return LoadedTeachers(teachers, described(recipe.teachers, digests), classes, compiled)


def described(specs: Sequence[str], digests: Sequence[str]) -> tuple[dict[str, str], ...]:
    """Teachers as a cache's header has them."""
    return tuple({"spec": spec, "digest": digest} for spec, digest in zip(specs, digests, strict=True))
