"""FKD's label files: their own loader's pixels and targets, every flavour, and files that are something else."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from mealfast.__main__ import dispatch
from mealfast.cli.labels_import import _FLAVOURS
from mealfast.errors import UsageError
from mealfast.kernels import reference
from mealfast.labels.fkd_files import FLAVOURS
from mealfast.loaders import DataError, ExplicitViews, ImageIndex, LabelCache, LabelWriter, train_loader
from mealfast.recipe import make_recipe
from mealfast.training.loop import train

CROPS, C = 4, 12


def fkd_crops(width: int, height: int, rng) -> np.ndarray:
    """float32 [CROPS, 4]: top, left, height, width as shares, of whole pixels as RandomResizedCrop draws them."""
    tall, wide = rng.integers(1, height + 1, CROPS), rng.integers(1, width + 1, CROPS)
    top = [rng.integers(0, height - one + 1) for one in tall]
    left = [rng.integers(0, width - one + 1) for one in wide]
    return np.array([top, left, tall, wide], np.float64).T.astype(np.float32) / np.float32([height, width] * 2)


def quantized(full: torch.Tensor, flavour: str) -> np.ndarray:
    """What FKD saves of probabilities [CROPS, C]."""
    if flavour == "hard":
        return full.argmax(1).numpy()
    values, ids = full.topk(FLAVOURS[flavour], dim=1)
    both = torch.stack((ids.float(), values), dim=1)
    return (both[:, :, 0] if flavour == "smoothing" else both).numpy()


def recovered(labels: np.ndarray, flavour: str) -> torch.Tensor:
    """The target [CROPS, C] that FKD trains on."""
    labels = torch.from_numpy(labels)
    if flavour == "hard":
        return F.one_hot(labels, C).double()
    labels = labels.double().reshape(CROPS, 2, -1)
    ids, values = labels[:, 0].long(), labels[:, 1]
    if "renorm" in flavour:
        return torch.zeros(CROPS, C, dtype=torch.float64).scatter(1, ids, values / values.sum(1, keepdim=True))
    rest = (1 - values.sum(1, keepdim=True)) / (C - ids.shape[1])
    return rest.repeat(1, C).scatter(1, ids, values)


def write_labels(root: Path, index: ImageIndex, flavour: str, save=torch.save) -> dict[int, tuple]:
    """FKD's tree for the images of an index; what it holds, by image."""
    rng, generator = np.random.default_rng(5), torch.Generator().manual_seed(5)
    written = {}
    for i in range(len(index)):
        coordinates = fkd_crops(int(index.widths[i]), int(index.heights[i]), rng)
        flips = rng.random(CROPS) < 0.5
        full = (2 * torch.randn(CROPS, C, generator=generator)).softmax(1)
        path = (root / index.relative_path(i)).with_suffix(".tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        written[i] = coordinates, flips, quantized(full, flavour)
        save(list(written[i]), path)
    return written


@pytest.fixture(scope="module")
def index(tree):
    return ImageIndex.scan(tree / "train")


@pytest.fixture(scope="module")
def labels(index, tmp_path_factory):
    """FKD's most used kind, and what it holds."""
    folder = tmp_path_factory.mktemp("fkd")
    return folder, write_labels(folder / "imagenet" / "train", index, "marginal_smoothing_k5")


def command(folder, tree, out, *more):
    return ["labels", "import-fkd", str(folder), "--data", str(tree), "--out", str(out), "--classes", str(C), *more]


@pytest.fixture(scope="module")
def cache(labels, tree, tmp_path_factory):
    out = tmp_path_factory.mktemp("imported") / "cache"
    assert dispatch(command(labels[0], tree, out)) == 0
    return out


def test_views_are_the_pixels_that_fkd_crops(labels, cache, index):
    """Its loader's own arithmetic: shares times the size, floats handed to torchvision's resized_crop, the flip."""
    plan = ExplicitViews(index.widths, index.heights, LabelCache(cache), seed=3, size=20, interpolation="bilinear")
    loader = train_loader("pillow", index, plan, batch_size=5, stop_step=5 * (CROPS + 1), label_cache=LabelCache(cache))
    seen = set()
    for step, batch in enumerate(loader):
        crop = step // 5 % CROPS
        for row, i in enumerate(batch.indices.tolist()):
            coordinates, flips, _ = labels[1][i]
            image = Image.open(index.path(i)).convert("RGB")
            top, left, tall, wide = (torch.from_numpy(coordinates)[crop][n].item() for n in range(4))
            view = vision.resized_crop(
                image, top * image.size[1], left * image.size[0], tall * image.size[1], wide * image.size[0],
                [20, 20], InterpolationMode.BILINEAR,
            )  # fmt: skip
            view = vision.hflip(view) if flips[crop] else view
            np.testing.assert_array_equal(batch.images[row].numpy(), np.asarray(view))
            seen.add((i, crop))
    loader.close()
    assert len(seen) == len(index) * CROPS


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_targets_are_those_that_fkd_recovers(index, tree, tmp_path, flavour):
    written = write_labels(tmp_path / "fkd" / "train", index, flavour)
    more = ["--label-type", flavour] if "renorm" in flavour else []
    assert dispatch(command(tmp_path / "fkd", tree, tmp_path / "cache", *more)) == 0
    cache = LabelCache(tmp_path / "cache")
    assert cache.header.top_k == FLAVOURS[flavour]
    for crop in range(CROPS):
        ids, p = cache.targets(crop, np.arange(len(index)))
        assert (np.diff(p, axis=1) <= 0).all()
        found = reference.densified(torch.from_numpy(ids), torch.from_numpy(p).double(), C, "spread")
        wanted = torch.stack([recovered(written[i][2], flavour)[crop] for i in range(len(index))])
        torch.testing.assert_close(found, wanted, rtol=2**-10, atol=2**-11)  # float16


def test_the_flavours_are_one_list():
    assert tuple(FLAVOURS) == _FLAVOURS


def test_tensors_lists_and_half_precision_are_the_same(labels, cache, index, tree, tmp_path):
    """Other ways in which such files are saved: tensors, the old format without a zip archive, float16."""

    def save(content, path):
        kind = len(list(tmp_path.rglob("*.tar"))) % 3
        if kind == 0:
            content = [torch.from_numpy(one) for one in content]
        elif kind == 1:
            content = [list(torch.from_numpy(content[0])), content[1].tolist(), content[2].astype(np.float16)]
        torch.save(content, path, _use_new_zipfile_serialization=kind != 2)

    write_labels(tmp_path / "fkd", index, "marginal_smoothing_k5", save)
    assert dispatch(command(tmp_path / "fkd", tree, tmp_path / "cache")) == 0
    ours, theirs = LabelCache(tmp_path / "cache"), LabelCache(cache)
    for crop in range(CROPS):
        np.testing.assert_array_equal(ours.view(crop), theirs.view(crop))


def test_the_file_is_as_its_page_says(cache, index):
    header = json.loads((cache / "header.json").read_text())
    assert (header["version"], header["plan"]) == (2, {"law": "explicit", "images": len(index)})
    row = [("ids", "<u2", (5,)), ("probabilities", "<f2", (5,)), ("box", "<u2", (4,)), ("flip", "u1")]
    assert np.dtype(row).itemsize == 29
    for view in range(CROPS):
        assert (cache / f"view-{view:04}.bin").stat().st_size == 29 * len(index)


def test_a_student_of_other_classes_is_refused(cache, options):
    with pytest.raises(UsageError, match=r"is of 12 classes, but --student .* has 3"):
        train(make_recipe(**{**options, "label_cache": str(cache), "size": 48}))


@pytest.mark.parametrize("cutmix", [False, True])
def test_a_student_learns_from_it(index, fields, tree, tmp_path, capsys, cutmix):
    """Teachers that the recipe names are not looked at, crop options neither; a stopped run goes on."""
    rng = np.random.default_rng(1)
    for i in range(len(index)):
        path = (tmp_path / "fkd" / index.relative_path(i)).with_suffix(".tar")
        path.parent.mkdir(parents=True, exist_ok=True)
        crops = fkd_crops(int(index.widths[i]), int(index.heights[i]), rng)
        smooth = np.array([[index.labels[i], 0.9]] * CROPS, np.float32)
        torch.save([crops, rng.random(CROPS) < 0.5, smooth], path)
    assert dispatch([*command(tmp_path / "fkd", tree, tmp_path / "cache")[:-1], "3", "--views", "2"]) == 0
    options = {
        **fields, "label_cache": str(tmp_path / "cache"), "run_dir": str(tmp_path / "run"), "crop_scale": (0.5, 1.0),
        "log_every": 1, "cutmix": cutmix, "discriminator": "off", "epochs": 8, "lr": 0.02,
    }  # fmt: skip
    train(make_recipe(**options, max_steps=4))
    summary = train(make_recipe(**options))
    assert summary["finished"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 24
    assert np.mean(losses[-6:]) < np.mean(losses[:6])
    assert "its own crop boxes" in capsys.readouterr().err


def test_an_import_that_stops_anywhere_ends_as_the_same_bytes(labels, cache, tree, tmp_path, monkeypatch):
    from mealfast.labels import fkd_import

    monkeypatch.setattr(fkd_import, "BLOCK_BYTES", 7 * CROPS * 29)  # four blocks
    assert dispatch(command(labels[0], tree, tmp_path / "whole")) == 0
    real, left = LabelWriter.add, [0]

    def add(self, *arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(self, *arguments)

    monkeypatch.setattr(LabelWriter, "add", add)
    for now in (3, 0, 6, 5, 99):
        left[0] = now
        try:
            dispatch(command(labels[0], tree, tmp_path / "stopped"))
        except KeyboardInterrupt:
            with pytest.raises(DataError, match=r"views are complete; run the same `mealfast labels import-fkd` again"):
                LabelCache(tmp_path / "stopped").require_complete()
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "stopped" / path.name).read_bytes()
        if path.suffix == ".bin":
            assert path.read_bytes() == (cache / path.name).read_bytes()


def test_info_and_verify(cache, tree, capsys):
    assert dispatch(["labels", "info", str(cache)]) == 0
    assert "views of its own crop boxes and flips" in capsys.readouterr().out
    assert dispatch(["labels", "verify", str(cache), "--data", str(tree)]) == 0
    with pytest.raises(UsageError, match=r"label cache .*: is of 25 images, but .*val holds 11"):
        dispatch(["labels", "verify", str(cache), "--data", str(tree / "val")])
    with pytest.raises(UsageError, match=r"--teachers: the targets of .* were imported"):
        dispatch(["labels", "verify", str(cache), "--data", str(tree), "--teachers", "resnet18"])


def test_a_box_outside_of_its_image_is_refused(cache, index, tmp_path):
    """A hostile cache: checksums that are right, of a box that is not."""
    import hashlib

    other = Path(shutil.copytree(cache, tmp_path / "cache"))
    rows = np.fromfile(other / "view-0001.bin", LabelCache(other).header.row)
    rows["box"][7] = (5, 0, index.widths[7], 1)
    rows.tofile(other / "view-0001.bin")
    header = json.loads((other / "header.json").read_text())
    header["complete"][1]["sha256"] = hashlib.sha256((other / "view-0001.bin").read_bytes()).hexdigest()
    (other / "header.json").write_text(json.dumps(header))
    plan = ExplicitViews(index.widths, index.heights, LabelCache(other), seed=0, size=20, interpolation="bilinear")
    plan.views(0)
    with pytest.raises(DataError, match="the box of view 1, image 7, lies outside of the image"):
        plan.views(1)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("mealfast-was-here"),))


def changed(position, value):
    def change(content):
        content = list(content)
        content[position] = value(content[position]) if callable(value) else value
        return content

    return change


HARM = {
    "code": (lambda content: [*content[:2], Evil()], "cannot be read .it holds more than tensors"),
    "code in an array": (lambda c: [*c[:2], np.array([Evil()], dtype=object)], "cannot be read"),
    "two parts": (lambda content: content[:2], "it must hold coordinates, flips and labels"),
    "a dictionary": (lambda content: {"coords": content[0]}, "it must hold coordinates, flips and labels"),
    "text": (changed(2, "labels"), "something else than arrays of numbers"),
    "fewer crops": (lambda c: [one[:3] for one in c], "holds 3 crops; --views 4 needs as many"),
    "flips": (changed(1, lambda flips: flips[:3]), r"holds arrays \[4, 4\], \[3\], \[4, 2, 5\]"),
    "another flavour": (changed(2, lambda labels: labels[:, :, :3]), "which are not of --label-type"),
    "a class too many": (changed(2, lambda labels: np.add(labels, [[[9], [0]]])), "an id is not one of the 12 classes"),
    "half a class": (changed(2, lambda labels: np.add(labels, [[[0.5], [0]]])), "an id is not one of the 12 classes"),
    "the same class twice": (changed(2, lambda labels: labels * [[[0], [1]]]), "names a class twice"),
    "NaN": (changed(2, lambda labels: labels * [[[1], [np.nan]]]), "probabilities must be from 0 to 1"),
    "more than one": (changed(2, lambda labels: labels * [[[1], [3]]]), "probabilities must be from 0 to 1"),
    "coordinates": (changed(0, lambda coordinates: coordinates + 0.3), "coordinates must be shares|within its image"),
    "NaN coordinates": (changed(0, lambda coordinates: coordinates * np.nan), "coordinates must be shares"),
    "no crop": (changed(0, lambda coordinates: coordinates * 0), "a crop does not lie within its image"),
}


@pytest.mark.parametrize("case", HARM)
def test_other_files_are_refused_in_one_line(labels, tree, index, tmp_path, case):
    harm, message = HARM[case]
    folder = shutil.copytree(labels[0], tmp_path / "fkd")
    path = folder / "imagenet" / "train" / Path(index.relative_path(5)).with_suffix(".tar")
    torch.save(harm(list(labels[1][5])), path)
    with pytest.raises(DataError, match=message) as caught:
        dispatch(command(folder, tree, tmp_path / "cache"))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not Path("mealfast-was-here").exists()
    torch.save(list(labels[1][5]), path)  # mended: goes on
    if (tmp_path / "cache").exists():
        shutil.rmtree(tmp_path / "cache")
    assert dispatch(command(folder, tree, tmp_path / "cache")) == 0


def test_damaged_missing_and_misplaced_files(labels, tree, index, tmp_path):
    folder = Path(shutil.copytree(labels[0], tmp_path / "fkd"))
    path = folder / "imagenet" / "train" / Path(index.relative_path(5)).with_suffix(".tar")
    whole = path.read_bytes()
    for content in (whole[:100], whole[:-200], b"", b"not a file of torch"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"\.tar: cannot be read") as caught:
            dispatch(command(folder, tree, tmp_path / "cache"))
        assert "\n" not in str(caught.value)
        shutil.rmtree(tmp_path / "cache")
    path.unlink()
    with pytest.raises(DataError, match="the labels must cover every image of --data"):
        dispatch(command(folder, tree, tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"import-fkd .*: holds no .*\.tar"):
        dispatch(command(tmp_path, tree, tmp_path / "cache"))
    with pytest.raises(UsageError, match="no such folder"):
        dispatch(command(tmp_path / "none", tree, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_it_does_not_mix_with_other_caches(cache, labels, tree, fields, weights, tmp_path):
    argv = ["--data", str(tree), "--teachers", fields["teachers"][0], "--size", "32", "--views", "4", "--device", "cpu"]
    with pytest.raises(DataError, match="holds another kind of label cache, an imported one"):
        dispatch(["labels", "build", *argv, "--top-k", "2", "--out", str(cache)])
    with pytest.raises(DataError, match="holds a label cache with other targets: --teachers"):
        dispatch(command(labels[0], tree, cache, "--label-type", "marginal_renorm_k5"))
    with pytest.raises(DataError, match=r"--views 2: .* holds 4 complete views"):
        dispatch(command(labels[0], tree, cache, "--views", "2"))


def test_the_pickle_test_is_one(tmp_path):
    """Loaded without care such a file would run."""
    torch.save([Evil()], tmp_path / "x.tar")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.tar", weights_only=True)
