"""The package as users get it: what the wheel holds, that it runs, and that no module hides another's."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"mealfast": "mealfast", "mealfast/loaders": "loaders", "mealfast/kernels": "kernels"}
TAKEN = {"datasets", "evaluate", "trainer", "config", "schedule", "distributed"}  # other projects' top-level names


def modules(folder: str) -> set[str]:
    """Every file of a folder, those of its rooms too, relative to it."""
    return {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing that lies about in the checkout gets in or is left behind."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in (*FOLDERS.values(), "tests", "benchmarks"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True, timeout=120, capture_output=True)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_has_one_top_level_name_and_every_module(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in names} == {"mealfast"}
    wanted = {f"{place}/{name}" for place, folder in FOLDERS.items() for name in modules(folder)}
    assert {name for name in names if name.endswith(".py")} == wanted
    assert "mealfast/py.typed" in names


def test_the_wheel_says_under_which_licence_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = [name for name in archive.namelist() if Path(name).name == "LICENSE"]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        (metadata,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        assert "Apache-2.0" in archive.read(metadata).decode().partition("\n\n")[0]
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_installed_program_runs_outside_the_checkout(wheel, tmp_path):
    """Unpacked like an installation, and before the checkout on the path; its console script is the wheel's."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (entry,) = importlib.metadata.PathDistribution(next((tmp_path / "site").glob("*.dist-info"))).entry_points
    assert (entry.group, entry.name, entry.value) == ("console_scripts", "mealfast", "mealfast.__main__:main")
    code = (
        f"import sys; sys.argv = ['mealfast', *sys.argv[1:]]; sys.path.insert(0, {str(tmp_path / 'site')!r});"
        "import mealfast; print(mealfast.__file__); import mealfast.loaders, mealfast.kernels;"
        f"print(mealfast.loaders.__file__, mealfast.kernels.__file__); from {entry.module} import {entry.attr};"
        f"{entry.attr}()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    places, usage = done.stdout.split("usage: ", 1)
    assert all(Path(place).is_relative_to(tmp_path / "site") for place in places.split())
    assert usage.startswith("mealfast train")


def test_a_checkout_does_not_hide_an_installation_that_is_not_editable(wheel, tmp_path):
    """`python -m mealfast` in a checkout, whose folder mealfast/ lacks loaders and kernels and comes first on the path.

    Without the site-packages that these tests run with, which may hold an editable installation; what the commands here
    need of others is the standard library."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    for argv in (["--version"], ["train", "--help"]):
        argv = [sys.executable, "-S", "-m", "mealfast", *argv]
        done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
    code = "import runpy, sys; sys.argv = ['mealfast', '--version']\n"
    code += "try: runpy.run_module('mealfast', run_name='__main__', alter_sys=True)\n"
    code += "except SystemExit: print(sys.modules['mealfast.cli'].__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == str(tmp_path / "site" / "mealfast" / "cli" / "__init__.py"), done.stderr
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    argv = [sys.executable, "-S", "-E", "-m", "mealfast", "--version"]
    done = subprocess.run(argv, cwd=ROOT, env=alone, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert "not installed" in line


def test_the_console_script_is_installed():
    script = Path(sys.executable).parent / "mealfast"
    if not script.exists():
        pytest.skip(f"mealfast is not installed beside {Path(sys.executable).name}")
    for argv in (["train", "--recipe", "none"], ["nonsense"]):
        done = subprocess.run([str(script), *argv], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.startswith("mealfast: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("argv", [["-m", "mealfast"], ["mealfast/train.py"]], ids=" ".join)
def test_other_ways_in(argv):
    done = subprocess.run([sys.executable, *argv, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mealfast")


def test_not_installed_is_one_line(tmp_path):
    """-S leaves site-packages out; what Python itself holds is enough to say so."""
    for folder in (ROOT, tmp_path):
        done = subprocess.run(
            [sys.executable, "-S", "-E", str(ROOT / "mealfast" / "train.py"), "--help"],
            cwd=folder, capture_output=True, text=True, timeout=60,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        )  # fmt: skip
        assert done.returncode != 0
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert "not installed" in line
        assert "pip install" in line


def test_no_module_hides_another():
    """`torchrun mealfast/train.py` puts mealfast/ first on the path: there, every file and room is a top-level module.

    Files within a room are held to the same: someone may start one of them by its path.
    """
    names = {part for name in modules("mealfast") for part in Path(name).with_suffix("").parts} - {
        "__init__",
        "__main__",
    }
    assert not names & set(sys.stdlib_module_names)
    assert not {Path(name).with_suffix("").parts[0] for name in modules("mealfast")} & TAKEN
    installed = set(importlib.metadata.packages_distributions())
    assert not names & installed


def test_the_entry_file_stays_small():
    assert len((ROOT / "mealfast" / "train.py").read_text().splitlines()) < 80


def test_lint_does_not_depend_on_what_lies_in_the_checkout(tmp_path):
    """A folder with the name of any module of tests/ or benchmarks/ (the demo leaves runs/), notes, a notebook, another
    environment: ruff must find what it finds in a fresh clone."""
    ruff = Path(sys.executable).parent / "ruff"
    if not ruff.exists():
        pytest.skip(f"ruff is not installed beside {Path(sys.executable).name}")
    for name in ("pyproject.toml", "setup.py", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (*FOLDERS.values(), "tests", "benchmarks", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for folder in ("tests", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            (tmp_path / path.stem).mkdir(exist_ok=True)
    for name in ("build/lib/mealfast", "dist", ".venv2/lib", "htmlcov"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "bad.py").write_text("import   os,sys")
    (tmp_path / "notes.py").write_text("import   os,sys")
    (tmp_path / "notes.ipynb").write_text('{"cells": [{"cell_type": "code", "source": ["import   os,sys"]}]}')
    for argv in (["check"], ["format", "--check"]):
        done = subprocess.run([str(ruff), *argv, "--no-cache", "."], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_layers_import_downwards_only():
    """loaders imports neither mealfast nor kernels, kernels imports neither mealfast nor loaders."""
    for folder in ("loaders", "kernels"):
        for path in (ROOT / folder).glob("*.py"):
            lines = [line.strip() for line in path.read_text().splitlines()]
            upward = [line for line in lines if line.startswith(("import mealfast", "from mealfast", "from .."))]
            assert not upward, f"{path.name}: {upward}"
