"""From loaded teachers to a running ensemble: folded, as precise as it must be, laid out, compiled, captured, checked.

Shape legend: B images of this process's part of a step, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from mealfast.machine import terminal
from mealfast.machine.files import brief, reason
from mealfast.machine.precision import name_of, precision
from mealfast.machine.processes import Runtime
from mealfast.machine.waiting import waiting
from mealfast.models import parity
from mealfast.models.ensemble import FrozenEnsemble, fold, logits_in, measure_layouts
from mealfast.models.layout import Choice, Layout, LayoutStore, default_layout, key_of
from mealfast.models.normalised import NormalizedModel, precision_of
from mealfast.recipe import Recipe


@dataclass(frozen=True)
class TeacherReport:
    """How one teacher runs, and how close to eager float32."""

    spec: str
    key: str  # what the choice depends on: layout.key_of
    choice: Choice
    parity: parity.Parity

    def to_json(self) -> dict[str, Any]:
        """For config.json and for checkpoints, from which a resumed run takes its layouts."""
        return {"model": self.spec, "key": self.key, **self.choice.to_json(), "parity": self.parity.to_json()}

    def __str__(self) -> str:
        choice, own = self.choice, str(self.choice.layout)

        def measured(name: str) -> str:
            won, rounds = choice.faster_in.get(name, (0, 0))
            sure = f", faster in {won} of {rounds} rounds" if rounds else ""
            return f"{choice.images_per_second[name]:,.0f} images/s{sure}"

        others = "; ".join(f"{name}: {measured(name)}" for name in choice.images_per_second if name != own)
        speed = f", {measured(own)} ({others})" if own in choice.images_per_second else ""
        remembered = ", as remembered (--tune-teachers again measures anew)" if choice.remembered else ""
        return f"teacher {self.spec}: {own}{speed}{remembered}; {self.parity}"


def prepare(
    recipe: Recipe,
    runtime: Runtime,
    teachers: Sequence[NormalizedModel],
    images: torch.Tensor,
    *,
    compile: bool,
    earlier: Mapping[str, Any],
    specs: Sequence[str] | None = None,
) -> tuple[FrozenEnsemble, list[TeacherReport]]:
    """Teachers, ready to be called; `images` is one real batch, uint8 [B, H, W, 3] on the device.

    `specs` names them (None: they are the recipe's live ones). `earlier` maps keys to the layouts that the run being
    resumed had: another layout would round differently. Takes the models over. A teacher that does not say in the
    recipe's precision what it says in eager float32 gets a finer one. Raises UsageError for one that never does.
    """
    specs = recipe.live_teachers if specs is None else specs
    names = [f"teacher {number} of {len(specs)}: {brief(spec)}" for number, spec in enumerate(specs, start=1)]
    references = parity.reference_logits(teachers, images, runtime, names)
    for teacher in teachers:
        fold(teacher, runtime.device)
    wanted = [precision_of(teacher, recipe.amp, runtime.device) for teacher in teachers]
    dtypes = [
        _fine_enough(spec, name, teacher, images, reference, dtype, runtime)
        for spec, name, teacher, reference, dtype in zip(specs, names, teachers, references, wanted, strict=True)
    ]
    defaults = [default_layout(dtype, compile) for dtype in dtypes]
    # The main process chooses for all.
    keys = runtime.gather(
        [key_of(spec, images, runtime.device, default) for spec, default in zip(specs, defaults, strict=True)]
    )[0]
    choices: list[Choice] = []
    with runtime.main_first():  # minutes, where it compiles: a collective would time out
        if runtime.is_main:
            for name, teacher, default, key in zip(names, teachers, defaults, keys, strict=True):
                with waiting(f"tuning {name}, by measuring it in more than one layout"):
                    choices.append(_choice(recipe, teacher, images, default, key, earlier))
    choices = runtime.gather(choices)[0]
    ensemble = FrozenEnsemble(teachers, runtime, compile=compile, layouts=[choice.layout for choice in choices])
    with waiting(f"{'compiling' if compile else 'running'} the teachers together for the first time"):
        if runtime.device.type == "cuda" and recipe.cuda_graphs in (None, "ensemble"):
            _capture(ensemble, images, recipe, runtime)
        logits = ensemble(images)
    found = parity.compare(specs, logits, references, runtime)
    parity.check(found, precision(recipe.amp, runtime.device))
    return ensemble, [TeacherReport(*each) for each in zip(specs, keys, choices, found, strict=True)]


def _capture(ensemble: FrozenEnsemble, images: torch.Tensor, recipe: Recipe, runtime: Runtime) -> None:
    """Takes the ensemble's CUDA graph, if it can be had or was asked for."""
    try:
        ensemble.capture(images)
    except RuntimeError as error:
        if recipe.cuda_graphs:
            raise
        if runtime.is_main:  # nobody asked for a graph: it is the run that matters
            terminal.say(f"note: the teachers cannot be captured as a CUDA graph ({reason(error)}): run without")


def _fine_enough(
    spec: str, name: str, teacher: NormalizedModel, images: torch.Tensor, reference: torch.Tensor, wanted: torch.dtype,
    runtime: Runtime,
) -> str:  # fmt: skip
    """`wanted`, or the next finer dtype in which a folded teacher says on these images what it says in float32."""
    dtypes = [name_of(wanted), "float32"]
    if runtime.device.type == "cuda" and wanted == torch.bfloat16:
        dtypes.insert(1, "float16")  # as fast, and rounds an eighth as much: but its range is small
    for dtype, finer in pairwise(dict.fromkeys(dtypes)):
        with waiting(f"checking in {dtype} {name}"):
            ours = logits_in(teacher, default_layout(dtype, compile=False), images)
        (found,) = parity.compare([spec], [ours], [reference], runtime)
        # Within half the bounds: the layout that it gets will round in other places.
        if found.holds(0.5) or not found.finite_in_float32:
            return dtype
        if runtime.is_main:
            terminal.say(
                f"note: teacher {brief(spec)} is taken in {finer}: in {dtype} {found} (wanted: {parity.wanted(0.5)})"
            )
    return "float32"


def _choice(
    recipe: Recipe,
    teacher: NormalizedModel,
    images: torch.Tensor,
    default: Layout,
    key: str,
    earlier: Mapping[str, Any],
) -> Choice:
    if key in earlier:
        return Choice(Layout(**earlier[key]), {}, remembered=True)
    if not recipe.tune_teachers:
        return Choice(default, {})
    store = LayoutStore()
    choice = None if recipe.tune_teachers == "again" else store.get(key, default)
    if choice is None:
        choice = measure_layouts(teacher, images, default)
        store.put(key, choice)
    return choice


def layouts(reports: Sequence[TeacherReport]) -> dict[str, dict[str, Any]]:
    """What `prepare` takes as `earlier`."""
    return {report.key: asdict(report.choice.layout) for report in reports}
