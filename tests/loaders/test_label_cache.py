"""The label cache on disk: its page, its size, kills at any moment, and every kind of damage."""

import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import signal
import struct
import time
import zlib
from contextlib import ExitStack, closing
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
        "made_with": {"batch_size": 3, "precision": "float32", "loader": "pillow"},
    }
    return CacheHeader(**{**fields, **changes})


def targets(view: int, header: CacheHeader) -> tuple[np.ndarray, np.ndarray]:
    """What the teachers would say: distinct ids and descending probabilities that sum to less than one."""
    rng = np.random.default_rng(view)
    ids = np.stack([rng.permutation(header.classes)[: header.top_k] for _ in range(header.images)])
    p = -np.sort(-rng.dirichlet(np.ones(header.classes), header.images)[:, : header.top_k], axis=1)
    return ids.astype(np.int32), p.astype(np.float32)


def add(writer: LabelWriter, view: int, images: np.ndarray) -> None:
    ids, probabilities = targets(view, writer.header)
    writer.add(view, images, ids[images], probabilities[images])


def write(folder: Path, header: CacheHeader, ranks: int = 1, rows: int = 6) -> None:
    """A build by `ranks` processes, one after the other, which add `rows` images at a time."""
    with claim_label_cache(folder, header), ExitStack() as stack:
        writers = [stack.enter_context(closing(LabelWriter(folder, rank))) for rank in range(ranks)]
        missing = {view: np.asarray(writers[0].missing(view)) for view in writers[0].incomplete}
        for view, images in missing.items():
            for number, first in enumerate(range(0, len(images), rows)):
                add(writers[number % ranks], view, images[first : first + rows])
            for writer in writers:
                writer.flush()
            writers[0].complete(view)


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
    assert 180 * make_header(images=1_281_167, classes=1000, top_k=10).bytes_per_view == 9_224_402_400
    many = make_header(classes=70_000, views=1)
    write(tmp_path / "many", many)
    assert LabelCache(tmp_path / "many").view(0)["ids"].dtype == np.int32
    assert (tmp_path / "many" / "view-0000.bin").stat().st_size == 6 * K * N == many.bytes_per_view


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

    dies("write", lambda real, fd, data: real(fd, data[: len(data) // 2]))
    for name in ("fsync", "replace", "truncate", "unlink"):
        dies(name)
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
    assert kills >= 1
    assert content(folder) == content(finished)


def test_a_process_that_is_killed_leaves_what_others_go_on_with(finished, tmp_path):
    """SIGKILL at any moment of a build, again and again; then another number of writers, other batches."""
    began = time.monotonic()
    write(tmp_path / "cache-0", make_header())
    whole, kills, caches = time.monotonic() - began, 0, 1
    for attempt in range(20):
        if not (child := os.fork()):
            write(tmp_path / f"cache-{caches}", make_header(), ranks=1 + attempt % 2, rows=1 + attempt % 5)
            os._exit(0)
        time.sleep(whole * (attempt % 10) / 10)
        os.kill(child, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        kills, caches = kills + killed, caches + (not killed)
    assert kills >= 5
    for path in tmp_path.iterdir():
        write(path, make_header(), ranks=3)
        assert content(path) == content(finished)


def test_only_missing_rows_are_written_again(finished, tmp_path):
    folder, header = tmp_path / "cache", make_header()
    with claim_label_cache(folder, header) as claim, closing(LabelWriter(folder)) as writer:
        assert (claim.bytes_left, claim.note) == (N * V * header.row.itemsize, "")
        assert len(writer.missing(0)) == N
        add(writer, 0, np.random.default_rng(0).permutation(N))  # in any order
        writer.complete(0)
        add(writer, 1, np.arange(12, 18))
        with pytest.raises(DataError, match="17 targets of view 1 are missing; run the same command again"):
            writer.complete(1)
    with (folder / "rows-0001-0.bin").open("ab") as file:
        file.write(struct.pack("<II", 1, 0) + b"half")  # what a kill leaves of a record
    with claim_label_cache(folder, header) as claim, closing(LabelWriter(folder, 1)) as writer:
        assert claim.bytes_left == (N * 2 - 6) * header.row.itemsize
        assert writer.incomplete == [1, 2]
        np.testing.assert_array_equal(writer.missing(1), [*range(12), *range(18, N)])
        add(writer, 1, np.arange(3))
    assert (folder / "rows-0001-0.bin").stat().st_size == 8 + 6 * (8 + 4 * K)  # what follows is found again
    with pytest.raises(DataError, match="1 of its 3 views are complete"):
        LabelCache(folder).require_complete()
    data = bytearray((folder / "rows-0001-0.bin").read_bytes())
    data[8 + 6 * 8 + 5] ^= 1  # of a row: the record's CRC-32 says so
    (folder / "rows-0001-0.bin").write_bytes(data)
    with claim_label_cache(folder, header), closing(LabelWriter(folder)) as writer:
        np.testing.assert_array_equal(writer.missing(1), range(3, N))
    write(folder, header)
    assert content(folder) == content(finished)


def raw_record(images: list[int], rows: bytes, count: int | None = None) -> bytes:
    content = np.array(images, "<i8").tobytes() + rows
    return struct.pack("<II", len(images) if count is None else count, zlib.crc32(content)) + content


ROW = np.zeros(1, make_header().row)
HOSTILE = {
    "count": raw_record([0], ROW.tobytes(), count=(1 << 32) - 1),
    "image": raw_record([N], ROW.tobytes()),
    "negative image": raw_record([-1], ROW.tobytes()),
    "id": raw_record([0], (np.full(K, C, "<u2").tobytes() + bytes(2 * K))),
    "NaN": raw_record([0], bytes(2 * K) + np.full(K, np.nan, "<f2").tobytes()),
    "other bytes": os.urandom(999),
    "zeros": bytes(64),  # empty records, as a machine that lost power can leave them
}


@pytest.mark.parametrize("case", HOSTILE)
def test_rows_that_are_none_count_for_nothing(finished, tmp_path, case):
    folder = tmp_path / "cache"
    with claim_label_cache(folder, make_header()), closing(LabelWriter(folder)) as writer:
        add(writer, 1, np.arange(5))
    with (folder / "rows-0001-0.bin").open("ab") as file:
        file.write(HOSTILE[case])
    with claim_label_cache(folder, make_header()), closing(LabelWriter(folder)) as writer:
        np.testing.assert_array_equal(writer.missing(1), range(5, N))
        add(writer, 1, np.arange(5, 9))
        np.testing.assert_array_equal(writer.missing(1), range(9, N))
    write(folder, make_header())
    assert content(folder) == content(finished)


def test_a_view_larger_than_what_is_held_in_memory_is_the_same(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("mealfast.loaders.label_rows.ROWS", 4)
    monkeypatch.setattr("mealfast.loaders.label_rows._GATHERED", 1)
    write(tmp_path / "cache", make_header(), ranks=2)
    for view in range(V):
        assert content(tmp_path / "cache")[f"view-{view:04}.bin"] == content(finished)[f"view-{view:04}.bin"]


def test_what_an_earlier_version_had_begun(finished, tmp_path):
    """Parts in place with a journal are made anew, and one line says so; rows that it called spools are taken up."""
    folder, header = Path(shutil.copytree(finished, tmp_path / "cache")), make_header()
    edited(folder, complete=json.loads((folder / "header.json").read_text())["complete"][:1])
    (folder / "view-0001.bin").write_bytes(bytes(header.bytes_per_view))
    (folder / "journal-0.txt").write_text("1 0 0badf00d\n1 3 00")
    ids, p = targets(2, header)
    rows = np.zeros(4, header.row)
    rows["ids"], rows["probabilities"] = ids[7:11], p[7:11]
    (folder / "spool-0002-3.bin").write_bytes(raw_record([7, 8, 9, 10], rows.tobytes()) + b"half")
    with claim_label_cache(folder, header) as claim, closing(LabelWriter(folder)) as writer:
        begun = "what an earlier mealfast had begun besides its 1 complete views is made anew"
        assert claim.note == f"note: --out {folder}: {begun}"
        assert claim.bytes_left == (2 * N - 4) * header.row.itemsize
        assert not (folder / "view-0001.bin").exists()
        np.testing.assert_array_equal(writer.missing(2), [*range(7), *range(11, N)])
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
    folder, header, real = tmp_path / "cache", make_header(), os.write
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(DataError, match=r"--out .*: 0.00 GB are to be written, but the disk has 0.00 GB free"):
        write(folder, header)
    assert not folder.exists()
    monkeypatch.undo()

    writes = iter(range(100))

    def full(descriptor, data):
        if (number := next(writes)) >= 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:11] if number == 6 else data)  # some of it fits

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match=r"No space left on device; what is complete is kept") as caught:
        write(folder, header)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert len(LabelCache(folder).header.complete) == 1
    record = 8 + 6 * (8 + header.row.itemsize)
    assert (folder / "rows-0001-0.bin").stat().st_size == 2 * record  # no half one
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
    images = np.arange(4, 10)
    with claim_label_cache(tmp_path / "cache", make_header()), closing(LabelWriter(tmp_path / "cache")) as writer:
        ids, p = targets(0, make_header())
        for harmed, place, value in ((p, (6, 1), np.nan), (p, (6, 1), 1.5), (ids, (6, 0), C)):
            before, harmed[place] = harmed[place], value
            with pytest.raises(DataError, match="--teachers: the target of view 0, image 6, is no distribution"):
                writer.add(0, images, ids[images], p[images])
            harmed[place] = before
        assert len(writer.missing(0)) == N
        add(writer, 0, images)
        assert len(writer.missing(0)) == N - 6


def edited(cache: Path, **changes) -> None:
    header = json.loads((cache / "header.json").read_text())
    (cache / "header.json").write_text(json.dumps({**header, **changes}))


def edited_text(cache: Path, old: str, new: str) -> None:
    text = (cache / "header.json").read_text()
    assert old in text
    (cache / "header.json").write_text(text.replace(old, new))


def nested(levels: int) -> list:
    return [nested(levels - 1)] if levels else []


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
    "made with": (lambda c: edited(c, made_with={}), "batch_size is missing"),
    "batch size": (lambda c: edited(c, made_with={"batch_size": 0}), "batch_size must be 1 or more"),
    "record": (lambda c: edited(c, complete=[{"view": 0}]), "is damaged"),
    "record out of order": (lambda c: edited(c, views=2), "numbers of the complete views"),
    "no JSON": (lambda c: (c / "header.json").write_bytes(b"\x80\x02}q\x00."), "no JSON"),
    "nested": (lambda c: (c / "header.json").write_bytes(b"[" * 200_000), "no JSON"),
    "nested rightly": (lambda c: (c / "header.json").write_text("[" * 200_000 + "]" * 200_000), "no JSON"),
    "nested a little": (lambda c: edited(c, made_with={"x": nested(900)}), "in one another, deeper than"),
    "a list": (lambda c: (c / "header.json").write_text("[1, 2]"), "no header of a label cache"),
    "a long text": (lambda c: edited(c, version="3" * 70_000), "a text of 70000 characters"),
    "a long version": (lambda c: edited(c, version=["3"] * 70_000), r"version \['3', '3', .*\.\.\.\]"),
    "odd record": (lambda c: edited(c, complete=[{"view\x1b[31m": 0}]), r"view\\x1b\[31m"),
    "digits": (lambda c: edited_text(c, '"top_k": 4', '"top_k": ' + "4" * 5000), "no JSON|top_k must be"),
    "endless": (lambda c: os.truncate(c / "header.json", 1 << 30), "is larger than"),
    "no header": (lambda c: (c / "header.json").unlink(), "has no header.json"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named_in_one_line(cache, case):
    damage, message = DAMAGE[case]
    damage(cache)
    with pytest.raises(DataError, match=message) as caught:
        LabelCache(cache).view(1)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def test_what_a_header_says_cannot_steer_a_terminal(cache):
    escape = "\x1b]0;owned\x07\r\n"
    edited(cache, teachers=[{"spec": escape, "digest": escape}], made_with={"batch_size": 8, "precision": escape,
           "loader": escape, "layouts": {escape: [escape]}}, images_digest=escape,
           plan={**make_header().plan, "interpolation": escape})  # fmt: skip
    header = LabelCache(cache).header
    assert "\x1b" not in json.dumps(header.to_json(), ensure_ascii=False)
    assert header.teachers[0]["spec"] == r"\x1b]0;owned\x07\r\n"
    with pytest.raises(DataError) as caught:
        write(cache, make_header())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("harm", ["cut", "changed", "gone", "unreadable"])
def test_a_file_that_changes_under_a_run(cache, monkeypatch, harm):
    """No signal, and nothing of it in a target: what is in use is held in memory, the rest is checked as it is read."""
    read, path = LabelCache(cache), cache / "view-0001.bin"
    rows = np.arange(N)
    first = read.targets(1, rows)
    {
        "cut": lambda: os.truncate(path, 0),
        "changed": lambda: path.write_bytes(bytes(path.stat().st_size)),
        "gone": path.unlink,
        "unreadable": lambda: monkeypatch.setattr(Path, "open", broken_disk),
    }[harm]()
    for found, before in zip(read.targets(1, rows), first, strict=True):
        np.testing.assert_array_equal(found, before)
    for view in (0, 2) if harm != "unreadable" else ():
        read.targets(view, rows)
    reader = read if harm != "unreadable" else LabelCache(cache)
    with pytest.raises(DataError, match=r"view-0001.bin: (holds 0 bytes|is damaged|cannot be read)") as caught:
        reader.targets(1, rows)
    assert "\n" not in str(caught.value)


def broken_disk(path: Path, *arguments, **options):
    if path.suffix == ".bin":
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return open(path, *arguments, **options)


def test_two_views_are_held(cache):
    read = LabelCache(cache)
    held = [read.view(view) for view in (0, 1)]
    assert all(read.view(view) is held[view] for view in (0, 1, 0))
    assert not held[0].flags.writeable
    assert read.view(2) is read.view(2)
    assert read.view(1) is held[1]
    assert read.view(0) is not held[0]


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


# -- names of classes -------------------------------------------------------------------------------------------------


def test_names_of_classes_are_kept_and_change_nothing_of_caches_without(tmp_path):
    assert "class_names" not in make_header().to_json()
    # What mealfast gave before there were names; runs on such caches go on.
    assert make_header().digest == "e06a5bbb595f52e393fea4306698bfc6018b9d834586fab80615aa8c0645a1a0"
    names = ("B\x1b[2J", "\udce9", *(f"class {n}" for n in range(C - 2)))  # whatever bytes a folder is called
    header = make_header(class_names=names)
    assert header.digest != make_header().digest
    with claim_label_cache(tmp_path / "cache", header):
        pass
    assert LabelCache(tmp_path / "cache").header == header
    with claim_label_cache(tmp_path / "cache", make_header()):  # of a mealfast that knows none
        pass
    assert LabelCache(tmp_path / "cache").header.class_names == names
    with (
        pytest.raises(DataError, match=r"--class-map \(class_names 0 is B\\x1b\[2J there, 0 is x here\)"),
        claim_label_cache(tmp_path / "cache", make_header(class_names=("x", *names[1:]))),
    ):
        pass


@pytest.mark.parametrize(
    "names", [["a"] * C, ["a"], "a" * C, [*map(str, range(C - 1)), 3], [*map(str, range(C - 1)), "x" * 1001], {"a": 1}]
)
def test_names_that_are_no_names_are_refused(tmp_path, names):
    with claim_label_cache(tmp_path / "cache", make_header()):
        pass
    path = tmp_path / "cache" / "header.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "class_names": names}))
    with pytest.raises(DataError, match=r"header\.json: is damaged \(.*; copy or build the cache again"):
        LabelCache(tmp_path / "cache")


def test_targets_can_be_renumbered(tmp_path):
    header = make_header(views=1)
    with claim_label_cache(tmp_path / "cache", header):
        writer = LabelWriter(tmp_path / "cache")
        add(writer, 0, np.arange(N))
        writer.complete(0)
        writer.close()
    cache, order = LabelCache(tmp_path / "cache"), np.random.default_rng(0).permutation(C)
    ids, p = cache.targets(0, np.arange(N))
    cache.renumber(order.tolist())
    found, q = cache.targets(0, np.arange(N))
    assert np.array_equal(found, order[ids])
    assert found.dtype == np.int32
    assert np.array_equal(p, q)
