"""What a run directory says is data: wrong, deep or hostile, it is one line, and none of it reaches a terminal raw."""

import json

import pytest
import torch

from mealfast.errors import UsageError
from mealfast.machine import lock
from mealfast.machine.files import brief, reason, shown
from mealfast.recipe import make_recipe
from mealfast.record.metrics import Telemetry
from mealfast.record.run_directory import RunDirectory, refuse_other_recipe
from mealfast.training.loop import train


@pytest.fixture
def recipe(options):
    return make_recipe(**options)


def test_a_run_holds_its_folder_from_before_it_reads_to_its_end(recipe, monkeypatch):
    """A second is refused, whatever lies there; an ended one, well or not, lets go."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    directory = RunDirectory(recipe.run_dir)
    directory.path.mkdir()
    directory.config.write_text("{")
    with lock.hold(directory.path), pytest.raises(UsageError, match=r"is in use by process \d+ on .+, started "):
        train(recipe)
    with pytest.raises(UsageError, match="is damaged"):  # the next gets as far as reading
        train(recipe)
    directory.config.unlink()
    seen = []
    monkeypatch.setattr("mealfast.record.checkpoint.encode", lambda *of: seen.append(is_held(directory.path)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(recipe)
    assert seen[0], "while it writes"
    assert not is_held(directory.path)
    assert [path.name for path in directory.path.iterdir() if path.name.startswith(".")] == []


def is_held(folder) -> bool:
    try:
        with lock.hold(folder):
            return False
    except UsageError:
        return True


def refusal(recipe) -> str:
    with pytest.raises(UsageError) as caught:
        RunDirectory(recipe.run_dir).check(recipe)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 900
    return message


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"3", b'"recipe"', b"{}", b'{"recipe": 3}', b'{"recipe": ["size"]}', b'{"recipe": null}',
        b"\xff\xfe", b"[" * 200_000, b'{"recipe": ' + b'{"a":' * 200_000, b"1" * 10_000,
    ],
    ids=lambda content: content[:12].decode("ascii", "replace"),
)  # fmt: skip
def test_a_config_of_another_shape_is_damaged(recipe, content):
    directory = RunDirectory(recipe.run_dir)
    directory.path.mkdir()
    directory.config.write_bytes(content)
    assert refusal(recipe).startswith(f"{directory.config}: is damaged")


def test_a_config_that_cannot_be_read_is_named(recipe):
    directory = RunDirectory(recipe.run_dir)
    directory.config.mkdir(parents=True)
    assert refusal(recipe) == f"{directory.config}: cannot be read (Is a directory); name another --run-dir"


def test_a_stored_option_is_escaped_and_cut(recipe):
    directory = RunDirectory(recipe.run_dir)
    directory.path.mkdir()
    stored = recipe.to_json()
    for value in ("\x1b]0;title\x07\x1b[31m", "a\nb", "x" * 10_000, ["\x1b[2J"] * 3, {"a": [["\x1b"]]}, [[1]] * 999):
        directory.config.write_text(json.dumps({"recipe": {**stored, "student": value}}))
        assert "holds a run with --student " in refusal(recipe)
    directory.config.write_text(json.dumps({"recipe": {**stored, "lr_decay_epochs": [1, 2]}}))
    assert "with --lr-decay-epochs 1 2, not 2: use the same" in refusal(recipe)


def test_a_stored_option_that_holds_itself_or_lists_in_lists_is_no_trap(recipe):
    """As a checkpoint's recipe can: 2 ** 40 elements for whoever prints them."""
    value, cycle = [], []
    for _ in range(40):
        value = [value, value]
    cycle.append(cycle)
    for one in (value, cycle, (torch.zeros(3),)):
        with pytest.raises(UsageError) as caught:
            refuse_other_recipe(recipe, {**recipe.to_json(), "student": one}, "x")
        assert len(str(caught.value)) < 900
        assert str(caught.value).isprintable()


def test_lines_of_metrics_that_are_none_are_dropped(tmp_path):
    good = '{"kind": "train", "step": 1}\n'
    wrong = ['{"kind": "train", "step": "x"}', "[" * 200_000, "3", '{"kind": "train"}', '{"step": null}', "{"]
    (tmp_path / "metrics.jsonl").write_text(good + "\n".join(wrong) + "\n")
    Telemetry(tmp_path, 5, lambda line: line["step"] < 5, lambda line: None).close()
    assert (tmp_path / "metrics.jsonl").read_text() == good


def test_words_of_others_are_one_short_line():
    assert brief("a\x1b[31m\nb") == r"a\x1b[31m\nb"
    assert brief("x" * 1000, 10) == "xxxxx ... xxxxx"
    assert reason(ValueError("first\nsecond")) == "first"
    assert reason(KeyError("k")) == "KeyError 'k'"
    assert reason(AssertionError()) == "AssertionError"
    assert reason(ValueError("\n \x1b[0m")) == r"\x1b[0m"
    assert len(shown(dict.fromkeys(range(1000), "x" * 1000))) < 400
