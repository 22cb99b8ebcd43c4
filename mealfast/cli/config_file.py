"""Options from files: `--config FILE` (TOML, or a run's config.json), and those of the run that `--resume` names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mealfast.errors import UsageError, alternatives
from mealfast.machine.files import parsed_object, reason, shown
from mealfast.recipe import RECIPES
from mealfast.record.stored_recipe import fields_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LARGEST = 1 << 20  # bytes
_OF_ONE_RUN = ("run_dir", "resume")  # what another run does not take over
CONFIG = "config.json"


def read(path: str) -> tuple[str | None, dict[str, Any]]:
    """The name of a recipe (None: none) and fields of it, of a file of options, or of a run (its folder will do).

    In TOML the keys are options, with - or _ between their words, and `recipe` may name a recipe. Raises UsageError: it
    cannot be read, is no such file, or holds what is no option.
    """
    what = f"--config {path}"
    file = Path(os.path.expanduser(path))
    content = _content(file / CONFIG if file.is_dir() else file, what)
    if isinstance(content.get("recipe"), dict):  # a run's config.json
        fields = fields_of(content["recipe"], what)
        return None, {name: value for name, value in fields.items() if name not in _OF_ONE_RUN}
    name = content.pop("recipe", None)
    if name is not None and name not in RECIPES:
        raise UsageError(f"{what}: recipe = {shown(name)}: unknown; {alternatives(str(name), RECIPES)}")
    return name, fields_of(content, what)


def of_run(folder: str, given: dict[str, Any]) -> dict[str, Any]:
    """The fields with which `--resume FOLDER` goes on: the run's own, and over them those that are given.

    Raises UsageError: the folder holds no run, or another --run-dir is given.
    """
    what = f"--resume {folder}"
    place = Path(os.path.expanduser(folder))
    if not (place / CONFIG).is_file():
        raise UsageError(f"{what}: holds no run (no {CONFIG}); name a run directory, or a checkpoint file")
    if "run_dir" in given and Path(given["run_dir"]).resolve() != place.resolve():
        raise UsageError(f"--run-dir {given['run_dir']}: {what} goes on in its own folder; leave --run-dir out")
    stored = _content(place / CONFIG, what).get("recipe")
    if not isinstance(stored, dict):
        raise UsageError(f"{what}: its {CONFIG} is damaged (its recipe); name a checkpoint file and all options")
    return {**fields_of(stored, what), **given, "run_dir": str(place), "resume": "auto"}


def _content(file: Path, what: str) -> dict[str, Any]:
    """The object that a JSON or a TOML file holds."""
    if not file.is_file():
        raise UsageError(f"{what}: no such file; give a TOML file of options, or the {CONFIG} of a run")
    try:
        with open(file, "rb") as stream:
            data = stream.read(_LARGEST + 1)
    except OSError as error:
        raise UsageError(f"{what}: cannot be read ({error.strerror})") from error
    if len(data) > _LARGEST:
        raise UsageError(f"{what}: has more than {_LARGEST:,} bytes; it is no file of options")
    try:
        text = data.decode("utf-8-sig")
        return parsed_object(text) if text.lstrip().startswith("{") else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what}: is neither TOML nor JSON ({reason(error)})") from error
