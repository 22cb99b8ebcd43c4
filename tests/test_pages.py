"""README, CONTRIBUTING and docs/ say what is so: commands that run, files that exist, functions that are described."""

import ast
import re
import shlex
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mealfast
from mealfast.__main__ import COMMANDS, dispatch
from mealfast.cli import labels
from mealfast.cli.endings import run_command
from mealfast.cli.options import recipe_from
from mealfast.models.spec import parse

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NETWORK = "needs a network"


def commands(page: Path) -> list[tuple[str, str]]:
    """(command, comment) of each line in a page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    split = [re.match(r"((?:'[^']*'|[^#'])*)(?:#\s*(.*))?$", line) for line in lines]
    return [(found[1].strip(), found[2] or "") for found in split if found[1].strip()]


ALL = [pytest.param(*found, id=f"{page.name}: {found[0]}") for page in PAGES for found in commands(page)]


@pytest.mark.parametrize(("command", "comment"), ALL)
def test_a_command_is_one(command, comment):
    """It names things that exist, its options fit, and it says so where it downloads weights."""
    argv = shlex.split(command)
    if argv[0] == "make":
        target = argv[1]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if argv[:2] == ["pip", "install"]:
        assert NETWORK in comment
        return
    if argv[0] == "torchrun":
        entry = argv.index("mealfast/train.py") if "mealfast/train.py" in argv else argv.index("-m") + 1
        assert (ROOT / argv[entry]).exists()
        argv = ["mealfast", *argv[entry + (argv[entry] == "mealfast") :]]
        argv[1] = "train"
    assert argv[0] == "mealfast"
    table, rest = (labels.COMMANDS, argv[2:]) if argv[1] == "labels" else (COMMANDS, argv[1:])
    parser = import_module(table[rest[0]][0]).make_parser()
    if "--help" in rest:
        assert NETWORK not in comment
        return
    options = parser.parse_args(rest[1:])
    specs = [*getattr(options, "model", [])] if isinstance(getattr(options, "model", []), list) else [options.model]
    if rest[0] == "train":
        recipe = recipe_from(options)
        specs += [recipe.student, *recipe.live_teachers]
    elif getattr(options, "recipe", None):
        specs += ["senet154.gluon_in1k"]
    downloads = any(parse(spec).tag and not parse(spec).checkpoint for spec in specs)
    assert (NETWORK in comment) == downloads


@pytest.mark.slow
def test_readmes_commands_for_ones_own_images_run(tree, weights, tmp_path, monkeypatch, capfd):
    """In their order, with small models in the places of those that it names."""
    monkeypatch.chdir(tmp_path)
    places = {"resnet18": "test_efficientnet", "resnet50": "test_resnet", "convnext_base": "test_vit", "=37": "=3"}
    for number, (file, name) in enumerate(zip(("start.pth", "big.pth", "other.pth"), places.values(), strict=False)):
        (tmp_path / file).symlink_to(weights(name, number))
    (tmp_path / "DIR").symlink_to(tree)
    (tmp_path / "runs").mkdir()
    for name, run in {"a": "RUN", "b": "other"}.items():
        (tmp_path / "runs" / name).symlink_to(tmp_path / run)
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save("photo.jpg")
    small = ["--size", "32", "--device", "cpu"]
    quick = ["--batch-size", "8", "--epochs", "1", "--loader", "pillow", "--amp", "off", "--no-compile"]
    extra = {"train": [*small, *quick], "evaluate": small, "predict": small}
    run_dirs = iter([["--run-dir", "RUN"], ["--run-dir", "other"]])
    ran = []
    for command, comment in commands(ROOT / "README.md"):
        argv = shlex.split(command)
        if argv[0] != "mealfast" or NETWORK in comment or "--help" in argv:
            continue
        argv = [*argv[1:], *extra.get(argv[1], []), *(next(run_dirs) if argv[1] == "train" else [])]
        for old, new in places.items():
            argv = [one.replace(old, new) for one in argv]
        assert run_command(dispatch, argv) == 0, capfd.readouterr().err
        ran.append(argv[0])
    assert set(ran) == {"index", "train", "evaluate", "predict", "export", "figures", "pack"}
    assert all((tmp_path / name).exists() for name in ("confusion.png", "curves.png", "PACKED", "other", "MODEL"))


def python_blocks(page: Path) -> list[str]:
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [block for block in blocks if "mealfast.kernels" not in block]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "python.md"], ids=lambda page: page.name)
def test_the_python_of_the_pages_runs(page, tree, weights, tmp_path, monkeypatch, capsys):
    """In its order, with small models and options in the places of those that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "DIR").symlink_to(tree)
    (tmp_path / "start.pth").symlink_to(weights("test_efficientnet", 1))
    (tmp_path / "big.pth").symlink_to(weights("test_resnet", 2))
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save("photo.jpg")
    small = {"size": 32, "batch_size": 8, "loader": "pillow", "amp": "off", "compile": False, "run_dir": "RUN"}
    monkeypatch.setattr(mealfast, "distill", partial(mealfast.distill, **small))
    names: dict = {}
    blocks = python_blocks(page)
    assert blocks
    for block in blocks:
        for old, new in {
            "epochs=30": "epochs=1",
            "resnet18": "test_efficientnet",
            "resnet50": "test_resnet",
            "=37": "=3",
        }.items():
            block = block.replace(old, new)
        exec(block, names)
    out = capsys.readouterr().out
    assert "top1" in out or "photo.jpg" in out
    assert (tmp_path / "RUN" / "student.safetensors").exists()


def test_the_kernels_page_runs():
    torch.manual_seed(0)
    student, teacher_a, teacher_b = torch.randn(3, 4, 30)
    names = {"student_logits": student.requires_grad_(), "teacher_a": teacher_a, "teacher_b": teacher_b}
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            if "mealfast.kernels" in block:
                exec(block, {**names, "teachers": [teacher_a, teacher_b]})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:mealfast|loaders|kernels|tests|benchmarks|docs|\.ci)/[\w./-]*)`", text))
    links = {link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")}
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_files_that_the_gpu_check_names_exist():
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    named = set(re.findall(r'\$here"?/([\w.*/-]+)', script))
    assert {"throughput.py", "kernels.py", "../tests/kernels/test_kernels_gpu.py"} <= named
    assert not [name for name in named if not list((ROOT / "benchmarks").glob(name))]
    # Those that hold tests which only a GPU can show.
    assert {path.name for path in (ROOT / "tests").rglob("*.py") if "mark.gpu" in path.read_text()} >= {
        "test_kernels_gpu.py", "test_loaders_pixels.py", "test_engine_gpu.py",
    }  # fmt: skip


def described(path: Path) -> dict[str, bool]:
    """Name -> whether it has a docstring, of a file's public functions and of public classes' public methods."""
    found = {}

    def look(body: list[ast.stmt], place: str) -> None:
        for node in body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                look(node.body, f"{place}.{node.name}")
            else:
                found[f"{place}.{node.name}"] = ast.get_docstring(node) is not None

    look(ast.parse(path.read_text(encoding="utf-8")).body, str(path.relative_to(ROOT)))
    return found


def test_nine_in_ten_public_functions_are_described():
    found = {}
    for folder in ("mealfast", "loaders", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found |= described(path)
    bare = [name for name, has in found.items() if not has]
    share = 1 - len(bare) / len(found)
    print(f"{len(found) - len(bare)} of {len(found)} public functions are described: {100 * share:.1f}%")
    assert share >= 0.9, "\n".join(bare)
