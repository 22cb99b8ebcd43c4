"""The house: a room imports only itself, the rooms before it, and what all may import; no files import in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("machine", "models", "method", "record", "labels", "training", "measure", "downstream", "figures", "cli")
COMMON = {"mealfast", "mealfast.recipe", "mealfast.errors", "mealfast.loaders", "mealfast.kernels"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted((ROOT / "mealfast").rglob("*.py"))}


def imports(name: str) -> set[str]:
    """The files of mealfast that one imports, wherever in it, for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            found |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in FILES else node.module
                for alias in node.names
            }
    return {one for one in found if one.partition(".")[0] == "mealfast"}


def room_of(name: str) -> str | None:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("name", [name for name in FILES if room_of(name)])
def test_a_room_imports_only_what_stands_before_it(name):
    room = ROOMS.index(room_of(name))
    for one in imports(name):
        if room_of(one) is None:
            assert ".".join(one.split(".")[:2]) in COMMON, f"{name} imports {one}"
        else:
            assert ROOMS.index(room_of(one)) <= room, f"{name} imports {one}"


def test_no_files_import_in_a_circle():
    rest = {name: {one for one in imports(name) if one in FILES and one != name} for name in FILES}
    while free := [name for name, needs in rest.items() if not needs & rest.keys()]:
        for name in free:
            del rest[name]
    assert not rest, f"a circle among {sorted(rest)}"


def test_mealfast_holds_its_rooms_and_five_files():
    top = {path.name for path in (ROOT / "mealfast").glob("*.py")}
    assert top == {"__init__.py", "__main__.py", "train.py", "recipe.py", "errors.py"}
    assert {path.parent.name for path in (ROOT / "mealfast").glob("*/__init__.py")} == set(ROOMS)
