"""`mealfast figures`: each run is a curve, and a run that is none is one line."""

import json
from pathlib import Path

import pytest

from mealfast.cli.figures import figures_command, names
from mealfast.errors import UsageError
from mealfast.figures import curves


def make_run(folder: Path, *lines: dict) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def evaluation(step: int, top1: float, kl: float | None = None) -> dict:
    return {"kind": "eval", "step": step, "top1": top1, "kl": kl}


def test_two_runs_of_one_name_are_two_curves(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    drawn = {}

    def note(axis, runs, key, *rest):
        drawn[key] = runs
        axis.plot([1], label="x")

    monkeypatch.setattr(curves, "_curves", note)
    runs = [
        make_run(tmp_path / name / "run", evaluation(0, 1.0), evaluation(5, top1, 0.5))
        for name, top1 in (("e1", 2.0), ("e2", 3.0))
    ]
    out = tmp_path / "c.png"
    assert figures_command([*map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")
    assert {name: lines[-1]["top1"] for name, lines in drawn["top1"].items()} == {"e1/run": 2.0, "e2/run": 3.0}
    assert [len(lines) for lines in drawn["kl"].values()] == [1, 1], "the start has no KL"


def test_names_take_as_many_folders_as_they_need():
    assert names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert names([Path("/a/b/x"), Path("/c/b/x"), Path("/c/b/z")]) == ["a/b/x", "c/b/x", "z"]
    assert names([Path("/x"), Path("/a/x")]) == ["/x", "a/x"]
    with pytest.raises(UsageError, match=r"b/\.\./a: is given twice"):
        names([Path("/a"), Path("/b/../a")])


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 200_000, b"\xff", b"3", b'{"kind": "eval"}', b'{"kind": "eval", "step": 1, "top1": "high", "kl": null}',
        b'{"kind": "eval", "step": "1", "top1": 3, "kl": null}', b'{"kind": "eval", "step": 1, "top1": 3, "kl": []}',
    ],
    ids=lambda line: line[:40].decode("ascii", "replace"),
)  # fmt: skip
def test_lines_that_are_no_evaluations_are_refused(tmp_path, line):
    (make_run(tmp_path / "run", evaluation(0, 1.0)) / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UsageError, match=r"metrics\.jsonl: is damaged"):
        curves.read_evaluations(tmp_path / "run")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    pytest.importorskip("matplotlib")
    run = make_run(tmp_path / "run", evaluation(0, 1.0), evaluation(1, 2.0))
    with pytest.raises(UsageError, match=r"--out /proc/curves\.png: cannot be written \("):
        figures_command([str(run), "--out", "/proc/curves.png"])
