"""The label cache on disk: its page, its size, kills at any moment, and every kind of damage."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mealfast.loaders import (
    CacheHeader,
    DataError,
    LabelCache,
    LabelWriter,
    ViewPlan,
    claim_label_cache,
    forecast_bytes,
    plan_fields,
)

N, V, K, C = 23, 3, 4, 50
PAGE = Path(__file__).parents[2] / "loaders" / "LABEL_CACHE.md"


def make_header(**changes) -> CacheHeader:
    fields = {
        "images": N,
        "images_digest": "ab" * 32,
        "plan": plan_fields(ViewPlan(np.full(N, 40), np.full(N, 40), seed=7, size=32)),
        "views": V,
        "classes": C,
        "top_k": K,
        "teachers": ({"spec": "a@a.pth", "digest": "01" * 32}, {"spec": "b@b.pth", "digest": "02" * 32}),
        "made_with": {"batch_size": 3, "rows_per_part": 6, "precision": "float32", "loader": "pillow"},
    }
    return CacheHeader(**{**fields, **changes})


def targets(view: int, header: CacheHeader) -> tuple[np.ndarray, np.ndarray]:
    """What the teachers would say: distinct ids and descending probabilities that sum to less than one."""
    rng = np.random.default_rng(view)
    ids = np.stack([rng.permutation(header.classes)[: header.top_k] for _ in range(header.images)])
    p = -np.sort(-rng.dirichlet(np.ones(header.classes), header.images)[:, : header.top_k], axis=1)
    return ids.astype(np.int32), p.astype(np.float32)


def write(folder: Path, header: CacheHeader, ranks: int = 1) -> None:
    """A build by `ranks` processes, one after the other."""
    with claim_label_cache(folder, header):
        writers = [LabelWriter(folder, rank) for rank in range(ranks)]
        for rank, writer in reversed(list(enumerate(writers))):
            for view, part in writer.todo[rank::ranks]:
                first, last = writer.rows(part)
                ids, probabilities = targets(view, header)
                writer.write(view, part, ids[first:last], probabilities[first:last])
                if rank == 0:
                    writer.complete_views()
        writers[0].finish()
        for writer in writers:
            writer.close()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "cache"
    write(folder, make_header())
    return folder


@pytest.fixture
def cache(finished, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished, tmp_path / "cache"))


def test_the_page_is_enough_to_read_a_cache(finished):
    """The page's own code, and nothing of mealfast."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"CACHE": str(finished)}
    exec(code, names)
    assert sorted(names["views"]) == list(range(V))
    for view, rows in names["views"].items():
        ids, p = targets(view, make_header())
        np.testing.assert_array_equal(rows["ids"], ids)
        np.testing.assert_array_equal(rows["probabilities"], p.astype(np.float16))


def test_the_header_has_the_keys_that_the_page_lists(finished):
    listed = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?`) \|", PAGE.read_text(), re.MULTILINE))))
    assert set(json.loads((finished / "header.json").read_text())) <= listed | {"views"}


def test_targets_come_back_as_float16_has_them(finished):
    cache = LabelCache(finished)
    rows = np.array([5, 0, 22, 5])
    for view in range(V):
        ids, p = targets(view, make_header())
        found_ids, found = cache.targets(view, rows)
        assert (found_ids.dtype, found.dtype) == (np.int32, np.float32)
        np.testing.assert_array_equal(found_ids, ids[rows])
        np.testing.assert_array_equal(found, p[rows].astype(np.float16).astype(np.float32))


def test_bytes(finished, tmp_path):
    """4k bytes a view and image, nothing more; ImageNet at the paper's 180 epochs takes 9.2 GB."""
    for view in range(V):
        assert (finished / f"view-{view:04}.bin").stat().st_size == 4 * K * N
    assert make_header(top_k=10).row.itemsize == 40
    assert forecast_bytes(1_281_167, 180, 10, 1000) == 9_224_402_400
    many = make_header(classes=70_000, views=1)
    write(tmp_path / "many", many)
    assert LabelCache(tmp_path / "many").view(0)["ids"].dtype == np.int32
    assert (tmp_path / "many" / "view-0000.bin").stat().st_size == 6 * K * N == forecast_bytes(N, 1, K, 70_000)


def test_means_of_a_view(finished):
    for record in LabelCache(finished).header.complete:
        p = targets(record.view, make_header())[1].astype(np.float16).astype(np.float64)
        rest = 1 - p.sum(axis=1)
        entropy = -(p * np.log(p)).sum(axis=1) - rest * np.log(rest / (C - K))
        assert record.mean_kept == pytest.approx(p.sum(axis=1).mean(), rel=1e-12)
        assert record.mean_entropy == pytest.approx(entropy.mean(), rel=1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_bytes(finished, tmp_path, ranks):
    write(tmp_path / "cache", make_header(), ranks)
    assert content(tmp_path / "cache") == content(finished)


def test_building_a_finished_cache_again_changes_nothing(cache, finished):
    """Not even what it says of the machine that made it, or where the teachers lay."""
    moved = tuple({**teacher, "spec": "elsewhere"} for teacher in make_header().teachers)
    write(cache, make_header(teachers=moved, made_with={**make_header().made_with, "torch": "9"}))
    assert content(cache) == content(finished)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_random_moments(finished, tmp_path, monkeypatch, seed):
    """Before any system call that writes, syncs or renames; half of what was to be written is then on disk."""
    folder, rng = tmp_path / "cache", np.random.default_rng(seed)
    left = [0]

    def dies(name, half=None):
        real = getattr(os, name)

        def call(*arguments):
            left[0] -= 1
            if left[0] == 0:
                if half is not None:
                    half(real, *arguments)
                raise Killed
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    dies("pwrite", lambda real, fd, data, offset: real(fd, data[: len(data) // 2], offset))
    dies("write", lambda real, fd, data: real(fd, data[: len(data) // 2]))
    dies("fsync")
    dies("replace")
    dies("ftruncate")
    kills = 0
    for ranks in [1, 2] * 20:
        left[0] = int(rng.integers(1, 25))
        try:
            write(folder, make_header(), ranks)
            break
        except Killed:
            kills += 1
            (folder / ".header.json.x.tmp").write_text("{")  # what a real kill leaves
    else:
        pytest.fail("never finished")
    assert kills >= 2
    assert content(folder) == content(finished)


def test_only_missing_parts_are_written_again(finished, tmp_path):
    folder, header = tmp_path / "cache", make_header()
    with claim_label_cache(folder, header) as todo:
        assert todo == N * V * header.row.itemsize
        writer = LabelWriter(folder)
        ids, p = targets(0, header)
        for part in range(4):
            first, last = writer.rows(part)
            writer.write(0, part, ids[first:last], p[first:last])
        ids, p = targets(1, header)
        writer.write(1, 2, ids[12:18], p[12:18])
        writer.complete_views()
        writer.close()
    with (folder / "journal-0.txt").open("ab") as journal:
        journal.write(b"1 3 0011")  # the half line of a kill
    with claim_label_cache(folder, header) as todo:
        assert LabelWriter(folder).todo == [(1, 0), (1, 1), (1, 3), *((2, part) for part in range(4))]
        assert todo == (N * 2 - 6) * header.row.itemsize
    with pytest.raises(DataError, match="1 of its 3 views are complete"):
        LabelCache(folder).require_complete()
    data = bytearray((folder / "view-0001.bin").read_bytes())
    data[13 * header.row.itemsize] ^= 1  # in the part that the journal has: its CRC says so
    (folder / "view-0001.bin").write_bytes(data)
    with claim_label_cache(folder, header):
        assert (1, 2) in LabelWriter(folder).todo
    write(folder, header)
    assert content(folder) == content(finished)


def test_more_views_extend_a_cache_and_fewer_finish_an_interrupted_one(finished, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "cache"))
    write(folder, make_header(views=V + 2))
    assert {name: content(folder)[name] for name in content(finished) if "view" in name} == {
        name: data for name, data in content(finished).items() if "view" in name
    }
    assert LabelCache(folder).header.is_complete
    with pytest.raises(DataError, match=r"--views 4: .* holds 5 complete views"):
        write(folder, make_header(views=4))
    edited(folder, complete=json.loads((folder / "header.json").read_text())["complete"][:4])  # killed in the fifth
    write(folder, make_header(views=4))
    write(tmp_path / "four", make_header(views=4))
    assert content(folder) == content(tmp_path / "four")


def test_a_full_disk_keeps_what_is_complete(finished, tmp_path, monkeypatch):
    folder, header, real = tmp_path / "cache", make_header(), os.pwrite
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DataError, match=r"--out .*: 0.00 GB are to be written, but the disk has 0.00 GB free"):
        write(folder, header)
    assert not folder.exists()
    monkeypatch.undo()

    writes = iter(range(100))

    def full(*arguments):
        if next(writes) >= 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DataError, match=r"No space left on device; what is complete is kept") as caught:
        write(folder, header)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert len(LabelCache(folder).header.complete) == 1
    write(folder, header)
    assert content(folder) == content(finished)


def test_two_builds_at_once_are_refused(tmp_path):
    with (
        claim_label_cache(tmp_path / "cache", make_header()),
        pytest.raises(DataError, match="another build is writing there"),
    ):
        write(tmp_path / "cache", make_header())
    write(tmp_path / "cache", make_header())


DIFFERENT = {
    "images": ({"images": 24}, "--data"),
    "data": ({"images_digest": "cd" * 32}, "--data"),
    "seed": ({"plan": {**make_header().plan, "seed": 8}}, r"--seed \(seed 7 there, 8 here\)"),
    "scale": ({"plan": {**make_header().plan, "scale": [0.1, 1.0]}}, "--crop-scale"),
    "classes": ({"classes": 51}, r"--teachers \(classes"),
    "k": ({"top_k": 5}, "--top-k"),
    "teachers": ({"teachers": make_header().teachers[:1]}, "--teachers"),
    "batch": ({"made_with": {**make_header().made_with, "batch_size": 6}}, "--batch-size"),
    "precision": ({"made_with": {**make_header().made_with, "precision": "bfloat16"}}, "--amp"),
    "loader": ({"made_with": {**make_header().made_with, "loader": "dali"}}, "--loader"),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_other_targets_do_not_go_into_a_cache(cache, case):
    changes, message = DIFFERENT[case]
    before = content(cache)
    with pytest.raises(DataError, match=message) as caught:
        write(cache, make_header(**changes))
    assert "\n" not in str(caught.value)
    assert content(cache) == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="holds something else"):
        write(tmp_path, make_header())
    with pytest.raises(DataError, match="is a file"):
        write(tmp_path / "thesis.tex", make_header())
    assert content(tmp_path) == {"thesis.tex": b"x"}


def test_targets_that_are_no_distribution_are_not_written(tmp_path):
    with claim_label_cache(tmp_path / "cache", make_header()):
        writer = LabelWriter(tmp_path / "cache")
        ids, p = targets(0, make_header())
        p[2, 1] = np.nan
        with pytest.raises(DataError, match="--teachers: the target of view 0, images 0 to 5"):
            writer.write(0, 0, ids[:6], p[:6])
        writer.close()


def edited(cache: Path, **changes) -> None:
    header = json.loads((cache / "header.json").read_text())
    (cache / "header.json").write_text(json.dumps({**header, **changes}))


def rehashed(cache: Path, at: int, value: int) -> None:
    """A hostile file: two bytes changed, and the header's SHA-256 with them."""
    data = bytearray((cache / "view-0001.bin").read_bytes())
    data[at : at + 2] = value.to_bytes(2, "little")
    (cache / "view-0001.bin").write_bytes(data)
    complete = json.loads((cache / "header.json").read_text())["complete"]
    complete[1]["sha256"] = hashlib.sha256(data).hexdigest()
    edited(cache, complete=complete)


def flip_bit(cache: Path) -> None:
    data = bytearray((cache / "view-0001.bin").read_bytes())
    data[100] ^= 4
    (cache / "view-0001.bin").write_bytes(data)


DAMAGE = {
    "truncated": (lambda c: os.truncate(c / "view-0001.bin", 100), "view-0001.bin: holds 100 bytes, not 368"),
    "missing view": (lambda c: (c / "view-0002.bin").unlink(), "view-0002.bin: cannot be read"),
    "flipped bit": (flip_bit, "view-0001.bin: is damaged .its SHA-256 is not the header's"),
    "id": (lambda c: rehashed(c, 0, C), "view-0001.bin: is damaged .an id is not one of the 50 classes"),
    "NaN": (lambda c: rehashed(c, 2 * K, 0x7E00), "a probability is not from 0 to 1"),
    "negative": (lambda c: rehashed(c, 2 * K, 0xB800), "a probability is not from 0 to 1"),
    "more than one": (lambda c: rehashed(c, 2 * K, 0x3C01), "a probability is not from 0 to 1"),
    "big endian": (lambda c: edited(c, byte_order="big"), "byte order 'big'; it must be 'little'"),
    "version": (lambda c: edited(c, version=3), "version 3; this mealfast reads versions 1 and 2"),
    "another version's": (lambda c: edited(c, version=2), "plan's law 1 does not go with version 2"),
    "format": (lambda c: edited(c, format="other"), "no header of a label cache"),
    "wrong k": (lambda c: edited(c, top_k=K + 1), "holds 368 bytes, not 460"),
    "k above C": (lambda c: edited(c, top_k=C + 1), "top_k 51 of 50 classes"),
    "k of another type": (lambda c: edited(c, top_k=True), "top_k must be from 1 to 4096"),
    "huge": (
        lambda c: edited(c, images=1 << 39, plan={**make_header().plan, "images": 1 << 39}),
        "holds 368 bytes, not 8796093022208",
    ),
    "larger": (lambda c: edited(c, images=1 << 41), "images must be from 1 to"),
    "id dtype": (lambda c: edited(c, id_dtype="int32"), "id_dtype must be uint16"),
    "no teachers": (lambda c: edited(c, teachers=[]), "it names no teacher"),
    "teachers": (lambda c: edited(c, teachers=[3]), "is damaged"),
    "plan": (lambda c: edited(c, plan=[]), "plan and made_with must be objects"),
    "seed": (lambda c: edited(c, plan={**make_header().plan, "seed": -1}), "seed must be from 0"),
    "size": (lambda c: edited(c, plan={**make_header().plan, "size": "32"}), "size must be from 1"),
    "plan's images": (lambda c: edited(c, plan={**make_header().plan, "images": 1}), "plan's images"),
    "scale": (lambda c: edited(c, plan={**make_header().plan, "scale": [1]}), "scale must hold 2"),
    "flip": (lambda c: edited(c, plan={**make_header().plan, "flip": None}), "flip must hold 1"),
    "made with": (lambda c: edited(c, made_with={"batch_size": 8}), "rows_per_part is missing"),
    "record": (lambda c: edited(c, complete=[{"view": 0}]), "is damaged"),
    "record out of order": (lambda c: edited(c, views=2), "numbers of the complete views"),
    "no JSON": (lambda c: (c / "header.json").write_bytes(b"\x80\x02}q\x00."), "no JSON"),
    "nested": (lambda c: (c / "header.json").write_bytes(b"[" * 200_000), "no JSON"),
    "endless": (lambda c: os.truncate(c / "header.json", 1 << 30), "is larger than"),
    "no header": (lambda c: (c / "header.json").unlink(), "has no header.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_in_one_line(cache, case):
    damage, message = DAMAGE[case]
    damage(cache)
    with pytest.raises(DataError, match=message) as caught:
        LabelCache(cache).view(1)
    assert "\n" not in str(caught.value)


def test_a_file_is_no_cache(tmp_path):
    (tmp_path / "step-00000001.pt").write_bytes(b"PK")
    with pytest.raises(DataError, match="is a file; a cache is a folder"):
        LabelCache(tmp_path / "step-00000001.pt")


def test_a_damaged_view_leaves_the_others_usable_and_is_built_again(cache, finished):
    os.truncate(cache / "view-0001.bin", 100)
    write(cache, make_header())
    assert content(cache) == content(finished)
    flip_bit(cache)
    assert LabelCache(cache).targets(2, np.arange(3))[0].shape == (3, K)
    (cache / "view-0001.bin").unlink()
    write(cache, make_header())
    assert content(cache) == content(finished)


def test_the_digest_is_that_of_the_targets():
    header = make_header()
    moved = dataclasses.replace(
        header, teachers=tuple({**teacher, "spec": "elsewhere"} for teacher in header.teachers), made_with={}
    )
    assert moved.digest == header.digest != make_header(top_k=5).digest
