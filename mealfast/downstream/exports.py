"""Exports a model into a new folder: the form that was asked for, checked, with a model card."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from mealfast.downstream.model_card import card
from mealfast.downstream.new_folder import check_new, new_folder
from mealfast.downstream.trained import open_trained
from mealfast.errors import UsageError, alternatives

LIBRARIES = {"timm": "timm", "onnx": "onnx", "torchvision": "torchvision", "torchscript": "pytorch"}  # of the hub


def export(
    name: str, to: str, out: str | Path, *, size: int | None = None, with_preprocessing: bool = False
) -> dict[str, Any]:
    """Writes the model in a run directory, or of a model spec, into the folder `out`, which is new or empty.

    `to` is a key of `LIBRARIES`; `size` the side of its input in pixels (None: the run's, or the model's own);
    `with_preprocessing` puts normalisation inside (onnx, torchscript): the input is uint8 [N, S, S, 3]. Returns
    {"folder", "files": {name: bytes}, "found": [lines]}. Raises UsageError, and then writes nothing.
    """
    if to not in LIBRARIES:
        raise UsageError(f"--to {to}: {alternatives(to, LIBRARIES)}")
    out = Path(out).expanduser()
    check_new(out)
    module = import_module(f"mealfast.downstream.export_{to}")
    getattr(module, "check_installed", bool)()
    trained = open_trained(name, size)
    write: Callable[..., str] = module.write
    with new_folder(out) as folder:
        found = write(trained, folder, with_preprocessing=with_preprocessing)
        side = trained.views.size
        images = f"normalised float32 [N, 3, {side}, {side}]"
        if with_preprocessing:
            images = f"uint8 [N, {side}, {side}, 3], RGB"
        usage = module.USAGE.replace("IMAGES", images).replace("[B, 3, S, S]", f"[B, 3, {side}, {side}]")
        (folder / "README.md").write_text(card(trained, LIBRARIES[to], usage, out.name), encoding="utf-8")
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    return {"folder": str(out), "files": files, "found": found.splitlines()}
