"""Checkpoints: whole or absent, checked when read, never run as code."""

import os
from pathlib import Path

import pytest
import torch

from mealfast.errors import UsageError
from mealfast.machine.files import replacing, write_json
from mealfast.models.normalised import build
from mealfast.models.spec import parse
from mealfast.models.weights import read
from mealfast.record import checkpoint


def state(value: float) -> dict:
    return {"student": {"w": torch.full((100,), value)}, "scores": {"best": None}}


def steps(folder: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.candidates(folder)]


def flip_a_bit(path: Path, place: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)


def test_what_is_saved_is_read(tmp_path):
    saved = state(1.5)
    path = checkpoint.save(tmp_path / "new", 7, saved, keep=2)
    found, content = checkpoint.newest(tmp_path / "new")
    assert found == path
    assert content["step"] == 7
    assert torch.equal(content["student"]["w"], saved["student"]["w"])
    assert checkpoint.read(path)["scores"] == {"best": None}
    assert checkpoint.newest(tmp_path / "nowhere") is None


def test_the_newest_are_kept_and_best_besides(tmp_path):
    for step in (1, 2, 3, 10, 100_000_000):
        checkpoint.save(tmp_path, step, state(step), keep=2, best=step == 2)
    assert steps(tmp_path) == [100_000_000, 10]
    assert float(checkpoint.read(tmp_path / "best.pt")["student"]["w"][0]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in checkpoint.candidates(tmp_path)} | {"best.pt"}


def test_best_is_replaced_whole(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step), keep=1, best=True)
        assert checkpoint.read(tmp_path / "best.pt")["step"] == step


@pytest.mark.parametrize("damage", ["bit", "truncated", "empty"])
def test_a_damaged_newest_is_named_and_the_one_before_used(tmp_path, capfd, damage):
    checkpoint.save(tmp_path, 1, state(1), keep=2)
    path = checkpoint.save(tmp_path, 2, state(2), keep=2)
    if damage == "bit":
        flip_a_bit(path)
    else:
        os.truncate(path, 0 if damage == "empty" else path.stat().st_size // 2)
    _, content = checkpoint.newest(tmp_path)
    assert content["step"] == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert str(path) in line
    assert "damaged" in line


@pytest.mark.parametrize("damage", ["overwritten", "truncated"])
def test_the_best_survives_what_happens_to_the_others_and_is_named(tmp_path, capfd, damage):
    """Damage in place, which a hard link would share."""
    checkpoint.save(tmp_path, 1, state(1), keep=2, best=True)
    checkpoint.save(tmp_path, 2, state(2), keep=2)
    for path in checkpoint.candidates(tmp_path):
        with path.open("rb+") as file:
            file.truncate(1000) if damage == "truncated" else file.write(b"\0" * 4096)
    with pytest.raises(UsageError) as caught:
        checkpoint.newest(tmp_path)
    best = tmp_path / "best.pt"
    assert str(caught.value) == (
        f"{tmp_path}: every checkpoint is damaged but best.pt, that of the best evaluation: go on from there, after 1 "
        f"steps, by --resume {best}"
    )
    assert len(capfd.readouterr().err.splitlines()) == 2
    assert float(checkpoint.read(best)["student"]["w"][0]) == 1
    flip_a_bit(best)  # inside the tensor, where torch reads on
    with pytest.raises(UsageError, match="every checkpoint is damaged; start anew in another --run-dir"):
        checkpoint.newest(tmp_path)
    with pytest.raises(UsageError, match=r"best\.pt: is damaged \(checksum\)"):
        checkpoint.read(best)


@pytest.mark.parametrize("kept", [1, 2])
def test_no_moment_of_a_kill_leaves_a_best_that_is_neither_the_old_nor_the_new(tmp_path, monkeypatch, kept):
    """The process ends at each rename in turn: best.pt is whole, and not older than a checkpoint says."""
    checkpoint.save(tmp_path, 1, {**state(1), "best": 1}, keep=kept, best=True)
    replace, seen = Path.replace, []

    def look(self, target):
        seen.append((checkpoint.read(tmp_path / "best.pt")["step"], steps(tmp_path)))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", look)
    checkpoint.save(tmp_path, 2, {**state(2), "best": 2}, keep=kept, best=True)
    assert seen == [(1, [1]), (2, [1])]
    assert checkpoint.read(tmp_path / "best.pt")["step"] == 2


def test_a_run_that_went_back_keeps_what_it_writes_and_not_what_lay_ahead(tmp_path):
    """After a damaged newest checkpoint or `--resume PATH` the steps written next are older than what lies there."""
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, step, state(step), keep=3)
    flip_a_bit(checkpoint.candidates(tmp_path)[0])
    checkpoint.save(tmp_path, 15, state(-1), keep=1, best=True)
    assert steps(tmp_path) == [15]
    assert checkpoint.newest(tmp_path)[1]["step"] == 15


def test_the_same_step_twice_is_the_later_one(tmp_path):
    for number in (1, 2):
        path = checkpoint.save(tmp_path, 5, state(number), keep=1)
        os.utime(path, ns=(number * 10**9, number * 10**9))
    assert float(checkpoint.newest(tmp_path)[1]["student"]["w"][0]) == 2


def test_a_named_checkpoint_that_is_damaged_is_refused(tmp_path):
    """Any bit: inside a tensor nothing but the checksum shows it."""
    path = checkpoint.save(tmp_path, 1, state(3), keep=1)
    flip_a_bit(path, 0.3)
    with pytest.raises(UsageError, match=r"is damaged|cannot be read") as caught:
        checkpoint.read(path)
    assert str(caught.value).startswith(f"--resume {path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused(tmp_path):
    text, other = tmp_path / "text.pt", tmp_path / "other.pt"
    text.write_text("abc" * 100)
    torch.save({"state_dict": {"w": torch.zeros(1)}}, other)
    for path, reason in ((text, "cannot be read"), (other, "is no mealfast checkpoint"), (tmp_path, "no such file")):
        with pytest.raises(UsageError, match=reason) as caught:
            checkpoint.read(path)
        assert str(caught.value).startswith(f"--resume {path}: ")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_carries_code_is_refused_and_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "it-ran",))

    path = tmp_path / "c.pt"
    torch.save({"format": checkpoint.FORMAT, "step": 1, "student": Bomb()}, path)
    with pytest.raises(UsageError, match="could run code"):
        checkpoint.read(path)
    assert not (tmp_path / "it-ran").exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f.json"
    write_json(path, {"a": 1})

    def write_and_fail():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_save_that_fails_leaves_the_old_checkpoints_and_nothing_else(tmp_path, monkeypatch):
    old = checkpoint.save(tmp_path, 1, state(1), keep=1)

    def half(_content, file):
        file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, state(2), keep=1)
    assert list(tmp_path.iterdir()) == [old]


def test_leftovers_of_a_killed_process_go_and_nothing_else(tmp_path):
    kept = checkpoint.save(tmp_path, 1, state(1), keep=1)
    (tmp_path / ".best.pt.abc.tmp").write_text("half")
    (tmp_path / ".writing-abc").mkdir()
    (tmp_path / ".writing-abc" / "checkpoint.pt").write_text("half")
    (tmp_path / "notes.tmp").write_text("mine")
    checkpoint.remove_leftovers(tmp_path)
    assert set(tmp_path.iterdir()) == {kept, tmp_path / "notes.tmp"}
    checkpoint.remove_leftovers(tmp_path / "nowhere")


def test_a_checkpoint_is_a_weights_file_too(tmp_path):
    model = build("test_resnet?num_classes=4").model
    path = checkpoint.save(tmp_path, 1, {"student": model.state_dict(), "optimizer": {"state": {}}}, keep=1)
    assert set(read(path)) == set(model.state_dict())
    loaded = build(parse(f"test_resnet@{path}"))
    assert loaded.num_classes == 4
    assert torch.equal(loaded.model.fc.weight, model.fc.weight)
