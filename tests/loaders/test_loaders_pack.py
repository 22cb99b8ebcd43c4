"""Packed data: the same images, views and pixels as the tree; readable by others; never half."""

import dataclasses
import errno
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mealfast.loaders import (
    DataError,
    EvalViews,
    ImageIndex,
    ViewPlan,
    eval_loader,
    index_store,
    pack,
    packing,
    train_loader,
)
from mealfast.loaders.packed import INDEX, UNFINISHED

N = 40


@pytest.fixture
def index(tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "tree"
    for k in range(N):
        name = f"class {k % 3}/ä {k:02}" + (".png" if k % 10 == 4 else ".JPEG")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (7, 9, 3), np.uint8)  # smooth, so that resizing keeps what it shows
        image = Image.fromarray(small).resize((60 + k, 90 - k), Image.Resampling.BICUBIC)
        image.save(root / name, "PNG" if k % 10 == 4 else "JPEG", quality=95)
    (root / "class 1/broken.jpg").write_bytes(b"broken")
    Image.fromarray(small).save(root / "loose.jpg")
    (root / "class 0" / ("long" * 40 + ".jpg")).write_bytes((root / "class 0/ä 00.JPEG").read_bytes())
    return ImageIndex.scan(root)


@pytest.fixture
def packed(index, tmp_path):
    pack(index, tmp_path / "packed", shard_bytes=20_000)
    return ImageIndex.scan(tmp_path / "packed")


def images(loader):
    batches = list(loader)
    loader.close()
    return torch.cat([b.images for b in batches]), torch.cat([b.indices for b in batches])


def test_a_pack_holds_the_same_images(index, packed):
    assert packed.digest == index.digest
    assert packed.classes == index.classes
    assert packed.labels.tolist() == index.labels.tolist()
    assert packed.quarantined == index.quarantined
    assert packed.plain.tolist() == index.plain.tolist()
    assert len(list(packed.root.glob("shard-*.tar"))) > 2
    for i in range(len(index)):
        assert packed.encoded(i).tobytes() == Path(index.path(i)).read_bytes()


@pytest.mark.parametrize("backend", ["pillow", "dali"])
def test_both_backends_read_it_with_the_same_pixels(index, packed, backend):
    plan = ViewPlan(index.widths, index.heights, seed=1, size=24)
    options = {"batch_size": 10, "stop_step": 8}
    for expected, found in zip(
        images(train_loader(backend, index, plan, **options)),
        images(train_loader(backend, packed, plan, **options)),
        strict=True,
    ):
        assert torch.equal(expected, found)
    views = EvalViews(24, 28)
    for expected, found in zip(
        images(eval_loader(backend, index, views, batch_size=16)),
        images(eval_loader(backend, packed, views, batch_size=16)),
        strict=True,
    ):
        assert torch.equal(expected, found)


def test_tar_readers_understand_the_shards(index, packed):
    found = {}
    for shard in sorted(packed.root.glob("*.tar")):
        with tarfile.open(shard) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    for i in range(len(index)):
        name = index.relative_path(i)
        assert found.pop(name) == Path(index.path(i)).read_bytes()
        assert int(found.pop(os.path.splitext(name)[0] + ".cls")) == index.labels[i]
    assert found == {}


def test_dalis_webdataset_reader_understands_the_shards(index, packed):
    import nvidia.dali.fn as fn
    from nvidia.dali import Pipeline

    pipe = Pipeline(batch_size=len(index), num_threads=1, device_id=None)
    with pipe:
        shards = sorted(str(path) for path in packed.root.glob("*.tar"))
        files = fn.readers.webdataset(
            paths=shards, index_paths=[path[:-3] + "idx" for path in shards], ext=["jpeg;jpg;png", "cls"]
        )
        pipe.set_outputs(*files)
    encoded, labels = pipe.run()
    for i in range(len(index)):
        assert np.asarray(encoded[i]).tobytes() == Path(index.path(i)).read_bytes()
        assert int(np.asarray(labels[i]).tobytes()) == index.labels[i]


def test_reencoding_bounds_the_shorter_side(index, tmp_path):
    pack(index, tmp_path / "small", shorter_side=40, quality=92, workers=2)
    small = ImageIndex.scan(tmp_path / "small")
    shorter = np.minimum(index.widths, index.heights)
    assert (shorter > 40).sum() > 10
    assert (np.minimum(small.widths, small.heights) == np.minimum(shorter, 40)).all()
    assert small.labels.tolist() == index.labels.tolist()
    assert small.digest != index.digest
    views = EvalViews(32, 36)
    expected, _ = images(eval_loader("pillow", index, views, batch_size=64))
    for backend in ("pillow", "dali"):
        found, _ = images(eval_loader(backend, small, views, batch_size=64))
        # Random colours at the limit of what chroma subsampling keeps; another image would differ by 60.
        assert (found.float() - expected.float()).abs().mean() < 8
    untouched = np.flatnonzero(shorter <= 40)
    assert len(untouched)
    for i in untouched:
        assert small.encoded(i).tobytes() == Path(index.path(i)).read_bytes()


def test_images_of_one_stem_stay_two_samples(tmp_path):
    for name in ("a.png", "a.jpg", "a_.jpg"):
        (tmp_path / "tree/c").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "tree/c" / name)
    pack(ImageIndex.scan(tmp_path / "tree"), tmp_path / "packed")
    packed = ImageIndex.scan(tmp_path / "packed")
    stems = {os.path.splitext(packed.relative_path(i))[0] for i in range(len(packed))}
    assert len(stems) == len(packed) == 3


def test_an_interrupted_packing_starts_over(index, tmp_path, monkeypatch):
    folder = tmp_path / "packed"
    encode, count = packing._encode, []

    def interrupted(*arguments):
        count.append(1)
        if len(count) == 30:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pack(index, folder, shard_bytes=20_000, workers=1)
    assert (folder / UNFINISHED).exists()
    assert list(folder.glob("*.tar"))
    with pytest.raises(DataError, match="interrupted"):
        ImageIndex.scan(folder)
    pack(index, folder, shard_bytes=1 << 20)
    assert ImageIndex.scan(folder).digest == index.digest
    assert sorted(path.name for path in folder.iterdir()) == [INDEX, "shard-000000.idx", "shard-000000.tar"]


@pytest.mark.parametrize("backend", ["pillow", "dali"])
@pytest.mark.parametrize("how", ["shrinks", "fails"])
def test_a_shard_that_breaks_during_a_run_costs_its_images_only(index, packed, backend, how, monkeypatch):
    plan = ViewPlan(index.widths, index.heights, seed=1, size=24)
    whole, shown = images(train_loader(backend, packed, plan, batch_size=10, stop_step=8))
    loader = train_loader(backend, packed, plan, batch_size=10, stop_step=8)  # has opened the pack before it breaks
    shards = sorted(packed.root.glob("*.tar"))
    broken = [i for i in range(len(packed)) if os.fsdecode(packed.file_of(i)) == str(shards[-1])]
    lost = broken[-1]
    end = shards[-1].stat().st_size
    if how == "shrinks":
        with tarfile.open(shards[-1]) as tar:
            place = tar.getmember(packed.relative_path(lost)).offset_data
        os.truncate(shards[-1], place + 100)
        why = f"the file ends {packed.file_sizes[lost] - 100} bytes too early"
    else:
        read = os.preadv

        def failing(descriptor, buffers, offset):
            if os.fstat(descriptor).st_size == end and len(buffers[0]) == packed.file_sizes[lost]:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return read(descriptor, buffers, offset)

        monkeypatch.setattr(os, "preadv", failing)
        why = "Input/output error"
    found, replaced = images(loader)
    assert loader.replaced == {packed.display_path(lost): f"{shards[-1].name}: {why}"}
    assert loader.replaced_count == int((shown == lost).sum()) > 0
    assert lost not in replaced.tolist()
    kept = shown != lost
    assert torch.equal(replaced[kept], shown[kept])
    assert torch.equal(found[kept], whole[kept])


def test_a_pack_of_many_shards_keeps_few_open(index, tmp_path, monkeypatch):
    monkeypatch.setattr("mealfast.loaders.packed._OPEN", 3)
    pack(index, tmp_path / "many", shard_bytes=1)
    many = ImageIndex.scan(tmp_path / "many")
    assert len(list(many.root.glob("*.tar"))) == len(index)
    assert images(train_loader("pillow", many, ViewPlan(many.widths, many.heights, seed=1, size=8), batch_size=10,
                               stop_step=12))[1].shape == (120,)  # fmt: skip
    links = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert len([link for link in links if link.startswith(str(many.root))]) == 3


def test_what_a_pack_says_reaches_no_terminal_raw(packed):
    path = packed.root / INDEX
    stored = index_store.load(path)
    hostile = "\x1b]0;owned\x07\n\x9b2J" + "x" * 10_000
    reasons = [hostile if reason else "" for reason in stored.reasons]
    assert index_store.save(dataclasses.replace(stored, reasons=reasons), path)
    ((_, reason),) = ImageIndex.scan(packed.root).quarantined
    assert reason.startswith(r"\x1b]0;owned\x07\n\x9b2J")
    assert reason.isprintable()
    assert len(reason) < 1100


def test_bad_packs_and_folders_get_one_line(index, packed, tmp_path):
    with pytest.raises(DataError, match="not empty"):
        pack(index, packed.root)
    with pytest.raises(DataError, match="quality"):
        pack(index, tmp_path / "new", quality=0)
    Path(index.path(5)).unlink()
    with pytest.raises(DataError, match="mend or remove"):
        pack(index, tmp_path / "other")

    shard = sorted(packed.root.glob("*.tar"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:2000])
    with pytest.raises(DataError, match=f"{shard.name}: holds 2000 bytes") as error:
        ImageIndex.scan(packed.root)
    assert "\n" not in str(error.value)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name}: cannot be read"):
        ImageIndex.scan(packed.root)
    (packed.root / INDEX).write_bytes(b"no index")
    with pytest.raises(DataError, match=f"{INDEX}: is damaged"):
        ImageIndex.scan(packed.root)
