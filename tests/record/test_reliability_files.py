"""Hostile files: none runs code, and a header takes no more memory than the file is worth."""

import os
import shutil
import struct
import subprocess
import sys
import zlib

import pytest
import torch

from mealfast.errors import UsageError
from mealfast.loaders import ImageIndex
from mealfast.recipe import make_recipe
from mealfast.record import checkpoint
from mealfast.training.loop import train

from ..conftest import write_tree
from ..runs import last

SIDE = 60_000  # pixels


class Command:
    """Runs a shell command when it is unpickled without care."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self):
        return os.system, (self.text,)


@pytest.fixture(scope="module")
def started(fields, tmp_path_factory) -> dict:
    """Fields of a run that has taken its first step."""
    folder = tmp_path_factory.mktemp("started")
    started = {**fields, "teachers": fields["teachers"][:1], "eval_start": False, "run_dir": str(folder)}
    train(make_recipe(**started, max_steps=1))
    return started


@pytest.mark.parametrize("place", ["student", "scores", "recipe"])
def test_a_checkpoint_that_runs_a_command_is_refused(started, tmp_path, place):
    """As it would lie in a run directory that someone handed over, its checksum right."""
    shutil.copytree(started["run_dir"], tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    content = last(tmp_path / "run")
    content[place] = Command(f"touch {tmp_path / 'it-ran'}")
    del content["step"], content["format"]
    for path in folder.iterdir():
        path.unlink()
    checkpoint.save(folder, 1, content, keep=1)
    with pytest.raises(UsageError, match="could run code") as caught:
        train(make_recipe(**{**started, "run_dir": str(tmp_path / "run")}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "it-ran").exists()


def png_header(side: int) -> bytes:
    """A PNG that promises side x side pixels and holds a line of them at most."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(3 * side)))
        + chunk(b"IEND", b"")
    )


def jpeg_header(side: int, small: bytes) -> bytes:
    """A small JPEG whose frame says side x side."""
    place = small.index(b"\xff\xc0") + 5
    return small[:place] + struct.pack(">HH", side, side) + small[place + 4 :]


PROBE = """
import resource, sys
from mealfast.loaders import ImageIndex
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for decode in (False, True):
    index = ImageIndex.scan(sys.argv[1], workers=1, decode=decode)
    print(len(index))
    for name, reason in index.quarantined:
        print(name, reason)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_huge_headers_are_quarantined_without_taking_memory(tmp_path):
    write_tree(tmp_path / "tree", {"a": 3}, seed=1)
    folder = tmp_path / "tree" / "a"
    (folder / "bomb.png").write_bytes(png_header(SIDE))
    (folder / "bomb.jpg").write_bytes(jpeg_header(SIDE, (folder / "000.jpg").read_bytes()))
    command = [sys.executable, "-c", PROBE, str(tmp_path / "tree")]
    *scans, kib = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for count, *reasons in (scans[:3], scans[3:]):
        assert count == "3"
        assert [line.split()[0] for line in reasons] == ["a/bomb.jpg", "a/bomb.png"]
        assert all("decompression bomb" in line for line in reasons), reasons
    assert int(kib) < 100_000


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("step", -1, "its step is -1"),
        ("step", "7", "its step is '7'"),
        ("scores", [], "its scores"),
        ("scores", {"best": {"top1": "high"}}, "its best score"),
        ("optimizer", {"state": {0: {"momentum_buffer": torch.zeros(3)}}}, "momentum buffer"),
        ("processes", [{"meter": torch.zeros(2), "rng": {}}], "sums of its losses"),
        ("student", 3, "does not fit"),
        ("skipped", None, "does not fit"),
    ],
)
def test_a_checkpoint_with_wrong_values_is_refused_in_a_line(started, tmp_path, name, value, words):
    content = last(started["run_dir"])
    content[name] = value
    path = tmp_path / "c.pt"
    torch.save(content, path)
    with pytest.raises(UsageError, match=words) as caught:
        train(make_recipe(**{**started, "resume": str(path)}))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_damaged_stored_index_is_scanned_anew(tmp_path):
    """NumPy's reader of headers tokenizes them: what that raises of an open bracket is none of the usual errors."""
    write_tree(tmp_path, {"a": 3}, seed=1)
    right = ImageIndex.scan(tmp_path).digest
    stored = tmp_path / ".mealfast-index.npz"
    data = stored.read_bytes()
    place = data.index(b"{'descr'")
    stored.write_bytes(data[:place] + b"{('escr'" + data[place + 8 :])
    assert ImageIndex.scan(tmp_path).digest == right


def test_another_number_of_threads_or_processes_is_noted(started):
    from mealfast.machine import processes as runtime
    from mealfast.training import resume as run_state

    here, state = runtime.start("cpu"), last(started["run_dir"])
    assert run_state.notes(state, here) == []
    (note,) = run_state.notes({**state, "threads": torch.get_num_threads() + 3}, here)
    assert f"with {torch.get_num_threads() + 3} CPU threads a process, now there are {torch.get_num_threads()}" in note
    (note,) = run_state.notes({**state, "processes": state["processes"] * 4}, here)
    assert "written by 4 processes, now there are 1" in note
