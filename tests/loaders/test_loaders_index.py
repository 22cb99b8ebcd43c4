"""The image index: what is found, what is quarantined, and when a stored index is believed."""

import io
import os
import shutil
import struct
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mealfast.loaders import DataError, ImageIndex, index, index_store, probe_pool, walk

DATA = Path(os.environ.get("MEALFAST_TEST_DATA") or Path(__file__).parents[2] / "../shared/data")


def write(path, size=(12, 9), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(os.fsencode(path.name))).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **{"format": "JPEG", **options})


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "data"
    write(root / "b/z.jpg", (80, 60))
    write(root / "b/a.JPEG", (11, 31))
    write(root / "a/deep/er/x.png", format="PNG")
    return root


@pytest.fixture
def probed(monkeypatch):
    """The paths that scans look into from now on, relative to nothing."""
    seen = []

    def recording(paths, **options):
        seen.extend(os.fsdecode(path) for path in paths)
        return probe_pool.probe_all(paths, **options)

    monkeypatch.setattr(index, "probe_all", recording)
    return seen


def names(found):
    return [found.relative_path(i) for i in range(len(found))]


def test_files_labels_and_sizes(tree):
    write(tree / "loose.jpg", (5, 6))
    found = ImageIndex.scan(tree)
    assert names(found) == ["a/deep/er/x.png", "b/a.JPEG", "b/z.jpg", "loose.jpg"]
    assert found.classes == ("a", "b")
    assert found.labels.tolist() == [0, 1, 1, -1]
    assert found.labels.dtype == np.int64
    assert list(zip(found.widths.tolist(), found.heights.tolist(), strict=True)) == [
        (12, 9),
        (11, 31),
        (80, 60),
        (5, 6),
    ]
    assert found.widths.dtype == found.heights.dtype == np.int32
    assert found.path(2) == str(tree.resolve() / "b/z.jpg")
    assert found.path(-1) == str(tree.resolve() / "loose.jpg")
    assert found.quarantined == []
    with pytest.raises(IndexError):
        found.path(4)


def test_names_of_every_kind(tmp_path):
    root = tmp_path / "with space"
    for name in ("ä ö/ü 中文.jpg", "UPPER/A.JPG", "c/line\nbreak.jpg", "c/double  space .Jpeg", "d/x.webp", "e/y.PNG"):
        write(root / name)
    raw = os.fsencode(root) + b"/c/\xff\xfe.jpg"  # no UTF-8
    shutil.copy(root / "UPPER/A.JPG", raw)
    for ignored in ("c/notes.txt", "c/.hidden.jpg", ".cache/x.jpg", "f/readme.md"):
        write(root / ignored)
    (root / "empty").mkdir()
    found = ImageIndex.scan(root)
    assert found.classes == ("UPPER", "c", "d", "e", "ä ö")
    assert len(found) == 7
    assert all(Path(found.path(i)).exists() for i in range(len(found)))
    assert sum("\\xff\\xfe" in found.display_path(i) for i in range(len(found))) == 1
    assert found.digest == ImageIndex.scan(root).digest
    assert all(found.display_path(i).isprintable() for i in range(len(found)))


def test_a_slow_disk_is_listed_alike(tmp_path, monkeypatch):
    for k in range(120):
        write(tmp_path / f"data/{k // 9}/{k % 4}/{k}.jpg")
    names_of = walk.list_images(tmp_path / "data").paths
    assert len(names_of) == 120
    monkeypatch.setattr(walk, "SLOW", 0)
    assert walk.list_images(tmp_path / "data").paths == names_of


def test_links_are_followed_and_loops_end(tree, tmp_path):
    write(tmp_path / "elsewhere/far.jpg", (40, 30))
    (tree / "b/link.jpg").symlink_to(tmp_path / "elsewhere/far.jpg")
    (tree / "linked").symlink_to(tmp_path / "elsewhere")
    (tree / "b/loop").symlink_to(tree)
    (tree / "b/dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    found = ImageIndex.scan(tree)
    assert names(found) == ["a/deep/er/x.png", "b/a.JPEG", "b/link.jpg", "b/z.jpg", "linked/far.jpg"]
    assert found.quarantined == [("b/dangling.jpg", "No such file or directory")]


def test_classes_fix_the_labels(tree):
    assert ImageIndex.scan(tree, classes=["b", "never", "a"]).labels.tolist() == [2, 0, 0]
    with pytest.raises(DataError, match="class 'a' is not among the 2 classes") as error:
        ImageIndex.scan(tree, classes=["b", "c"])
    assert str(tree) in str(error.value)


def test_relabel(tree):
    write(tree / "loose.jpg")
    found = ImageIndex.scan(tree).relabel({"b": 7, "other": 0, "a": 3})
    assert found.labels.tolist() == [3, 7, 7, -1]
    with pytest.raises(DataError, match="class 'b'"):
        ImageIndex.scan(tree).relabel({"a": 0})
    write(tree / "c\x1b[2J/x.jpg")
    with pytest.raises(DataError, match=r"class 'c\\x1b\[2J'"):
        ImageIndex.scan(tree).relabel({"a": 0, "b": 1})
    with pytest.raises(DataError, match=r"class 'c\\x1b\[2J'"):
        ImageIndex.scan(tree, classes=["a", "b"])


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "broken"])
def test_no_usable_image_is_one_clear_line(tmp_path, kind):
    root = tmp_path / "data"
    if kind == "file":
        root.write_text("no folder")
    elif kind != "missing":
        root.mkdir()
    if kind == "broken":
        (root / "x.jpg").write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        ImageIndex.scan(root)
    message = str(error.value)
    assert str(root) in message
    assert "\n" not in message
    assert {"missing": "exist", "file": "not a folder", "empty": "no usable image", "broken": "x.jpg"}[kind] in message


def test_unusable_files_are_quarantined_with_their_reason(tree):
    jpeg = (tree / "b/z.jpg").read_bytes()
    png = (tree / "a/deep/er/x.png").read_bytes()
    bad = {
        "b/cut.jpg": jpeg[: len(jpeg) // 2],
        "b/empty.jpg": b"",
        "b/text.jpg": b"<html>404</html>",
        "b/cut.png": png[: len(png) // 2],
        "b/flipped_bit.png": png[:60] + bytes([png[60] ^ 1]) + png[61:],
        "b/postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "b/bomb.png": hostile_png(60_000, 60_000),
    }
    for name, data in bad.items():
        (tree / name).write_bytes(data)
    found = ImageIndex.scan(tree)
    assert names(found) == ["a/deep/er/x.png", "b/a.JPEG", "b/z.jpg"]
    reasons = dict(found.quarantined)
    assert sorted(reasons) == sorted(bad)
    assert "truncated" in reasons["b/cut.jpg"]
    assert reasons["b/empty.jpg"] == "the file is empty"
    assert "decompression bomb" in reasons["b/bomb.png"]
    assert all("\n" not in reason for reason in reasons.values())
    assert ImageIndex.scan(tree).quarantined == found.quarantined  # stored, too


def test_a_refused_file_is_tried_again(tree, probed, monkeypatch):
    (tree / "b/late.jpg").write_bytes(b"")
    first = ImageIndex.scan(tree)
    assert first.quarantined == [("b/late.jpg", "the file is empty")]
    store = tree / index_store.NAME
    written = store.stat().st_mtime_ns
    probed.clear()
    assert ImageIndex.scan(tree).quarantined == first.quarantined
    assert probed == [str(tree / "b/late.jpg")]
    assert store.stat().st_mtime_ns == written  # nothing new to store
    # As after a chmod or on a disk that works again: the same size and time, another verdict.
    with monkeypatch.context() as patch:
        patch.setattr(index, "probe_all", lambda paths, **_: [(3, 4, 0)] * len(paths))
        assert ImageIndex.scan(tree).quarantined == []
    probed.clear()
    assert len(ImageIndex.scan(tree)) == 4
    assert probed == []


def test_pipes_and_folders_do_not_stop_a_scan(tree):
    os.mkfifo(tree / "b/pipe.jpg")
    (tree / "b/folder.jpg").mkdir()
    found = ImageIndex.scan(tree)
    assert found.quarantined == [("b/pipe.jpg", "not a regular file")]
    assert len(found) == 3


def hostile_png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_a_jpeg_broken_inside_is_found_by_decoding_it(tree):
    jpeg = bytearray((tree / "b/z.jpg").read_bytes())
    jpeg[jpeg.index(b"\xff\xc4") + 5] = 255  # a Huffman table that cannot be: no header that Pillow reads tells it
    (tree / "b/inside.jpg").write_bytes(jpeg)
    assert "b/inside.jpg" in names(ImageIndex.scan(tree))
    found = ImageIndex.scan(tree, decode=True)
    assert names(found) == ["a/deep/er/x.png", "b/a.JPEG", "b/z.jpg"]
    assert [name for name, _ in found.quarantined] == ["b/inside.jpg"]


def test_decoding_is_remembered(tree, probed):
    ImageIndex.scan(tree)
    assert len(probed) == 3
    ImageIndex.scan(tree, decode=True)
    assert len(probed) == 3 + 3
    ImageIndex.scan(tree, decode=True)
    ImageIndex.scan(tree)
    assert len(probed) == 6


def test_the_stored_index_is_reused_and_changes_are_noticed(tree, probed):
    first = ImageIndex.scan(tree)
    assert len(probed) == 3
    probed.clear()
    again = ImageIndex.scan(tree)
    assert probed == []
    assert again.digest == first.digest
    assert again.plain.tolist() == first.plain.tolist()

    write(tree / "c/new.jpg", (7, 7))  # added
    (tree / "b/a.JPEG").unlink()  # removed
    second = ImageIndex.scan(tree)
    assert probed == [str(tree / "c/new.jpg")]
    assert names(second) == ["a/deep/er/x.png", "b/z.jpg", "c/new.jpg"]
    assert second.digest != first.digest

    probed.clear()
    old = (tree / "b/z.jpg").stat()
    write(tree / "b/z.jpg", (10, 20))  # replaced
    os.utime(tree / "b/z.jpg", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    third = ImageIndex.scan(tree)
    assert probed == [str(tree / "b/z.jpg")]
    assert (third.widths[1], third.heights[1]) == (10, 20)
    assert len({first.digest, second.digest, third.digest}) == 3


def test_a_file_replaced_by_one_of_the_same_length_is_noticed_by_its_time(tree):
    path = tree / "b/same.ppm"
    write(path, (10, 20), format="PPM")
    first, old = ImageIndex.scan(tree), path.stat()
    write(path, (20, 10), format="PPM")
    assert path.stat().st_size == old.st_size
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1_000_000))
    second = ImageIndex.scan(tree)
    row = names(second).index("b/same.ppm")
    assert (first.widths[row], first.heights[row]) == (10, 20)
    assert (second.widths[row], second.heights[row]) == (20, 10)


def test_the_digest_does_not_depend_on_the_place_but_on_everything_else(tree, tmp_path):
    first = ImageIndex.scan(tree)
    shutil.copytree(tree, tmp_path / "moved" / "away", ignore=shutil.ignore_patterns(".mealfast*"))
    assert ImageIndex.scan(tmp_path / "moved/away").digest == first.digest
    assert len(first.digest) == 64
    assert ImageIndex.scan(tree, classes=["b", "a"]).digest != first.digest
    (tree / "b/z.jpg").rename(tree / "b/y.jpg")
    assert ImageIndex.scan(tree).digest != first.digest


def test_where_the_index_is_stored(tree, tmp_path, monkeypatch, probed):
    ImageIndex.scan(tree)
    hidden = tree / index_store.NAME
    assert hidden.is_file()
    assert [path.name for path in tree.iterdir() if path.name.startswith(".")] == [index_store.NAME]

    ImageIndex.scan(tree, cache_dir=tmp_path / "cache/deep")
    assert len(list((tmp_path / "cache/deep").iterdir())) == 1

    # A tree that cannot be written to (here: the name is taken by a folder): the user's cache folder.
    hidden.unlink()
    hidden.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    ImageIndex.scan(tree)
    assert len(list((tmp_path / "xdg/mealfast").iterdir())) == 1
    probed.clear()
    ImageIndex.scan(tree)
    assert probed == []

    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(DataError, match="blocked"):
        ImageIndex.scan(tree, cache_dir=tmp_path / "blocked/cache")


def test_an_interrupted_scan_leaves_no_index(tree, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index, "probe_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ImageIndex.scan(tree)
    assert not (tree / index_store.NAME).exists()

    def full_disk(file, **_):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full_disk)
        assert len(ImageIndex.scan(tree, cache_dir=None)) == 3  # not stored anywhere, but usable
    assert [path.name for path in tree.iterdir() if path.name.startswith(".")] == []


def stored_bytes(**changes):
    arrays = {
        "version": np.array([index_store.VERSION]),
        **{name: np.zeros(1, dtype) for name, dtype in index_store._COLUMNS.items()},
        "paths": np.frombuffer(b"b/z.jpg\0", np.uint8),
        "reasons": np.zeros(1, np.uint8),
        **changes,
    }
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04 no archive",
        stored_bytes()[:-100],
        stored_bytes(version=np.array([99])),
        stored_bytes(widths=np.zeros(5, np.int32)),
        stored_bytes(),  # an image of 0 x 0 pixels
        stored_bytes(widths=np.zeros(1, np.float32)),
        stored_bytes(widths=np.array([Payload()], dtype=object)),
        stored_bytes(bytes=np.zeros(1)).replace(b"(1,)", b"(9,)"),
        stored_bytes().replace(b"'shape': (1,), }      ", b"'shape': (10**12,), }"[:21] + b" "),
    ],
)
def test_a_damaged_or_hostile_stored_index_is_replaced(tree, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    expected = ImageIndex.scan(tree)
    (tree / index_store.NAME).write_bytes(data)
    assert index_store.load(tree / index_store.NAME) is None
    assert ImageIndex.scan(tree).digest == expected.digest
    assert index_store.load(tree / index_store.NAME) is not None
    assert not Path("pickle-was-run").exists()


def test_parallel_scan_finds_the_same(tmp_path):
    root = tmp_path / "data"
    for k in range(probe_pool.IN_PROCESS + 70):
        write(root / f"{k % 3}/{k}.jpg", (5 + k % 40, 5 + k % 31))
    (root / "1/bad.jpg").write_bytes(b"bad")
    one = ImageIndex.scan(root, workers=1, cache_dir=tmp_path / "a")
    three = ImageIndex.scan(root, workers=3, cache_dir=tmp_path / "b", progress=True)
    assert len(one) == probe_pool.IN_PROCESS + 70
    assert one.digest == three.digest
    assert one.quarantined == three.quarantined != []


@pytest.fixture
def fragile(tmp_path, monkeypatch):
    """Probing processes that die at certain names: `bomb` of an abort, `hit` of SIGKILL as often as its number says."""
    script = tmp_path / "fragile.py"
    script.write_text(
        "import os, signal, sys\n"
        "tail = b''\n"
        "while chunk := os.read(0, 65536):\n"
        "    *paths, tail = (tail + chunk).split(b'\\0')\n"
        "    for path in paths:\n"
        "        if b'bomb' in path:\n"
        "            os.abort()\n"
        "        if b'hit' in path:\n"
        "            mark = __file__ + os.fsdecode(path.rpartition(b'/')[2])\n"
        "            hits = os.path.getsize(mark) if os.path.exists(mark) else 0\n"
        "            if hits < int(path[path.index(b'hit') + 3:][:1]):\n"
        "                open(mark, 'a').write('x')\n"
        "                os.kill(os.getpid(), signal.SIGKILL)\n"
        "        os.write(1, b'[3, 4, 1]\\n')\n"
    )
    monkeypatch.setattr(probe_pool, "probe_module", types.SimpleNamespace(__file__=str(script)))


def test_a_file_at_which_its_process_crashes_is_quarantined(fragile):
    paths = [b"bomb%d" % k if k % 50 == 3 else b"hit1-%d" % k if k % 50 == 4 else b"fine%d" % k for k in range(400)]
    found = probe_pool.probe_all(paths, decode=False, workers=2)
    crashed = [path for path, result in zip(paths, found, strict=True) if result == probe_pool.CRASHED]
    assert crashed == [path for path in paths if b"bomb" in path]
    assert all(result == (3, 4, 1) for result in found if result != probe_pool.CRASHED), "others, killed ones too"


def test_a_file_whose_process_is_always_killed_is_not_judged(fragile):
    with pytest.raises(
        DataError, match=r"^hit9-\\x1b: the process .* killed by signal 9, 4 times; nothing is known"
    ) as error:
        probe_pool.probe_all([b"fine", b"hit9-\x1b"], decode=False, workers=1, isolated=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("decode", [False, True])
def test_a_file_that_once_crashed_is_tried_again_in_a_process_of_its_own(tree, monkeypatch, decode):
    right = ImageIndex.scan(tree, decode=decode, cache_dir=tree.parent / "other")
    with monkeypatch.context() as patch:
        patch.setattr(index, "probe_all", lambda paths, **_: [probe_pool.CRASHED, *[(3, 4, 1)] * (len(paths) - 1)])
        branded = ImageIndex.scan(tree, decode=decode)
    assert branded.quarantined == [("a/deep/er/x.png", probe_pool.CRASHED)]

    def in_this_process(*_):
        raise AssertionError("a crash would end the program")

    monkeypatch.setattr(probe_pool, "probe", in_this_process)
    mended = ImageIndex.scan(tree, decode=decode)
    assert mended.quarantined == []
    assert names(mended) == names(right)


def test_scanning_processes_end_with_the_program(tmp_path):
    # A program that is killed in mid-scan: its probing processes read the end of their input and leave.
    slow = tmp_path / "slow.py"
    slow.write_text("import os\nwhile os.read(0, 65536):\n    pass\n")
    code = (
        "import os, types\n"
        "from mealfast.loaders import probe_pool\n"
        f"probe_pool.probe_module = types.SimpleNamespace(__file__={str(slow)!r})\n"
        "start = probe_pool.subprocess.Popen\n"
        "def recording(*a, **k):\n"
        "    process = start(*a, **k)\n"
        "    print(f'{process.pid}\\n', end='', flush=True)\n"  # in one piece: two threads do
        "    return process\n"
        "probe_pool.subprocess.Popen = recording\n"
        "probe_pool.probe_all([b'x'] * 1000, decode=False, workers=1 + 1)\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    children = [int(program.stdout.readline()) for _ in range(2)]
    program.kill()
    program.wait()
    for _ in range(100):
        if not any(
            Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children
        ):
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"processes {children} are still there")


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO")
@pytest.mark.skipif(not (DATA / "odd-images").is_dir(), reason=f"no {DATA / 'odd-images'}")
def test_odd_images_get_pillows_verdict(tmp_path):
    found = ImageIndex.scan(DATA / "odd-images", cache_dir=tmp_path)
    refused = {"truncated_jpeg.jpg", "ultrahdr.jpg", "truncated_image.png", "broken.png", "broken_data_stream.png"}
    assert {name for name, _ in found.quarantined} == refused
    assert len(found) == 20
    for i in range(len(found)):
        with Image.open(found.path(i)) as image:
            assert image.size == (found.widths[i], found.heights[i])
