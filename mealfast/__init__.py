"""mealfast: distil an ensemble of pretrained image classifiers into a small one (MEAL V2), fast.

    import mealfast

    made = mealfast.distill("photos", ["resnet50@big.pth"], "resnet18.tv_in1k", epochs=30)
    made.scores["final"]["top1"], mealfast.predict(made, "photo.jpg")[0].guesses[0].name

Errors are exceptions of one line: UsageError, DataError and RunError. Signal handlers, random numbers, threads and
torch's settings are afterwards as they were. torch is imported by the first call.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mealfast.downstream.keywords import checked as _checked
from mealfast.downstream.keywords import fields as _fields
from mealfast.downstream.keywords import takes_fields as _takes_fields
from mealfast.errors import RunError, UsageError
from mealfast.machine.version import VERSION
from mealfast.recipe import make_recipe as _make_recipe

if TYPE_CHECKING:
    from torch import nn

    from mealfast.downstream.distilling import Distilled
    from mealfast.downstream.prediction import Prediction
    from mealfast.loaders import CacheHeader, DataError

__all__ = [
    "DataError",
    "RunError",
    "UsageError",
    "__version__",
    "build_labels",
    "distill",
    "evaluate",
    "load",
    "predict",
]

__version__ = VERSION
_Path = str | os.PathLike[str]


@_takes_fields(set(_fields()))
def distill(
    data: _Path, teachers: str | Sequence[str] = (), student: str = "", *, recipe: str | None = None, **options: Any
) -> Distilled:
    """Distils teachers into a student, as `mealfast train` does.

    `data` is a folder of images, `teachers` and `student` are model specs, `recipe` is the name of settings that the
    options override. Returns the student, ready for use, with its scores and its run directory. The same call goes on
    with a run that was stopped, and returns at once where it has finished. Ctrl-C (a notebook's stop button) saves, and
    then is a KeyboardInterrupt.

    Raises UsageError or DataError for what the caller can mend, RunError where the run could not go on, TypeError for a
    keyword that is no option.
    """
    from mealfast.downstream.distilling import distill

    given = {"data": data, **options}
    given |= {"teachers": teachers} if teachers else {}
    given |= {"student": student} if student else {}
    return distill(_make_recipe(recipe, **_checked("distill", given, _fields())))


def evaluate(models: _Path | Distilled | Sequence[_Path | Distilled], data: _Path, **options: Any) -> dict[str, Any]:
    """Top-1 and top-5 of models on a folder of class folders, each alone and as an ensemble.

    `models` are model specs, run directories or what `distill` returned. `options` are those of `mealfast evaluate`,
    with `_` for `-`: size, crop_pct, interpolation, own_views, per_class, confusion, loader, loader_threads,
    batch_size, device, amp, compile. Returns what `mealfast evaluate --json` prints: {"models": [{"model", "top1",
    "top5" (percent), "images"}], "ensemble": ...}. Raises UsageError or DataError.
    """
    from mealfast.cli.from_python import evaluate

    return evaluate(models, data, options)


def load(model: _Path, size: int | None = None) -> nn.Module:
    """timm's module of a model spec or of a run's student, on the CPU, in evaluation mode.

    It takes normalised float32 [B, 3, S, S] and gives logits [B, C]. `model.pretrained_cfg` says how images become
    that: `timm.data.create_transform(**timm.data.resolve_model_data_config(model))` is the transform. `size` is S in
    pixels (None: the run's, or the model's own). Raises UsageError.
    """
    from mealfast.downstream.prediction import load

    return load(model, size)


def predict(
    model: _Path | Distilled | nn.Module, files: _Path | Sequence[_Path], *, top: int = 5, keep_broken: bool = False
) -> list[Prediction]:
    """The `top` most probable classes of each image file, in their order.

    `model` is what `distill` or `load` returned (it runs on the device where it is), a model spec or a run directory. A
    prediction has `file` and `guesses`, each with `name`, `probability` and `number` (of the output). Raises UsageError
    for a file that cannot be read; with `keep_broken` its prediction has no guesses, and says why in `error`.
    """
    from mealfast.downstream.prediction import predict

    return predict(model, files, top=top, keep_broken=keep_broken)


def build_labels(
    data: _Path, teachers: str | Sequence[str], out: _Path, *, views: int, top_k: int | None = None,
    batch_size: int = 64, recipe: str | None = None, **options: Any,
) -> CacheHeader:  # fmt: skip
    """Keeps what teachers say of `views` views of every training image in the folder `out`, as `mealfast labels build`
    does: `distill(..., label_cache=out)` then runs no teacher. `top_k` probabilities of each (None: 10, or all of fewer
    classes).

    `options` are fields of the recipe that decide what teachers see: size, crop_scale, crop_ratio, flip, interpolation,
    loader, loader_threads, loader_timeout, device, amp, compile, cuda_graphs, tune_teachers, seed. It can be stopped at
    any time; the same call goes on. Returns the cache's header. Raises UsageError, DataError.
    """
    from mealfast.cli.from_python import build_labels

    return build_labels(data, teachers, out, views, top_k, batch_size, recipe, options)


def __getattr__(name: str) -> Any:
    """DataError, which comes with torch."""
    if name == "DataError":
        from mealfast.loaders import DataError

        return DataError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
