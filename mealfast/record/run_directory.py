"""The run directory: whose it is, and where everything in it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mealfast.errors import UsageError
from mealfast.machine.files import brief, read_object, shown, words, write_json
from mealfast.recipe import RESUMABLE_FIELDS, Recipe, option_fields
from mealfast.record import checkpoint
from mealfast.record.metrics import Telemetry


class RunDirectory:
    """Paths of one run. Creating it touches nothing; `claim` does."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.json"
        self.checkpoints = self.path / "checkpoints"
        self.student = self.path / "student.safetensors"
        self.summary = self.path / "summary.json"

    def check(self, recipe: Recipe) -> None:
        """Refuses a directory that holds something other than this run. Raises UsageError; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"--run-dir {self.path}: is a file; name a folder")
        if not self.config.exists():
            return
        if recipe.resume == "never":
            raise UsageError(f"--run-dir {self.path}: already holds a run; name another, or use --resume auto")
        stored = self.stored_recipe("name another --run-dir")
        refuse_other_recipe(recipe, stored, f"--run-dir {self.path}: holds a run")

    def stored_recipe(self, otherwise: str) -> dict[str, Any]:
        """The recipe in config.json as it stands there. Raises UsageError, which says what to do `otherwise`."""
        try:
            stored = read_object(self.config).get("recipe")
        except OSError as error:
            raise UsageError(f"{self.config}: cannot be read ({error.strerror}); {otherwise}") from error
        except ValueError as error:
            raise UsageError(f"{self.config}: is damaged; {otherwise}") from error
        if not isinstance(stored, dict):
            raise UsageError(f"{self.config}: is damaged (its recipe); {otherwise}")
        return stored

    def claim(self, config: dict[str, Any]) -> None:
        """Creates the directory and writes config.json; removes what a killed process left half-written.

        Raises UsageError where nothing can be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for folder in (self.path, self.checkpoints):
                checkpoint.remove_leftovers(folder)
            write_json(self.config, config)
        except OSError as error:
            raise UsageError(f"--run-dir {self.path}: cannot be written ({error.strerror})") from error

    def telemetry(
        self, first_step: int, keep_line: Callable[[dict[str, Any]], bool], say: Callable[[str], None]
    ) -> Telemetry:
        """Opens metrics.jsonl and tensorboard/. Raises UsageError where nothing can be written."""
        try:
            return Telemetry(self.path, first_step, keep_line, say)
        except OSError as error:
            raise UsageError(f"--run-dir {self.path}: cannot be written ({error.strerror})") from error


def refuse_other_recipe(recipe: Recipe, stored: dict[str, Any], what: str) -> None:
    """Raises UsageError that names the first option in which a stored recipe differs, if it decides the result."""
    epochs = stored.get("epochs")
    if isinstance(epochs, int) and recipe.epochs < epochs and "epochs" not in recipe.left_open:
        raise UsageError(
            f"{what} with --epochs {epochs}, not {recipe.epochs}: a run can be given more epochs, not fewer; "
            "--max-steps ends it earlier"
        )
    # Of options that are younger than the run.
    defaults = {
        one.name: list(one.default) if isinstance(one.default, tuple) else one.default for one in option_fields()
    }
    for name, value in recipe.to_json().items():
        if name in RESUMABLE_FIELDS or name in recipe.left_open:
            continue
        if stored.get(name, defaults[name]) != value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{what} with {flag} {_typed(stored.get(name))}, not {words(value) or 'none'}: "
                "use the same options or another --run-dir"
            )


def _typed(value: object) -> str:
    """A stored option as a user would type it; what no option can be, as Python writes it."""
    items = value if isinstance(value, (list, tuple)) else [value]
    plain = all(item is None or isinstance(item, (str, int, float)) for item in items)
    return brief(words(value)) if plain else shown(value)
