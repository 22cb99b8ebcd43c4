"""How commands end: signals, closed and broken standard streams, threads that do not end. As processes of their own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mealfast.cli import demo_runs
from mealfast.cli.endings import run_command
from mealfast.cli.signals import PATIENCE, Interrupted, noticed
from mealfast.machine.stop_signal import SIGNALS

PROGRAM = """
import contextlib, os, signal, sys, threading, time
from mealfast.cli import endings
{setup}
def command(argv):
{body}
endings.main(command)
"""


def program(body: str, setup: str = "") -> list[str]:
    """The command line of a process whose command is `body`."""
    indented = "\n".join("    " + line for line in body.splitlines())
    return [sys.executable, "-c", PROGRAM.format(setup=setup, body=indented)]


def shell(argv: list[str], redirection: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash", *argv],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


# -- streams ---------------------------------------------------------------------------------------------------------

TALKATIVE = """
file = open(sys.argv[1], "w")
for number in range(20_000):
    print("a line of the result")
    if number % 1000 == 0:
        print("a message", file=sys.stderr)
        sys.stdout.flush()
with contextlib.suppress(OSError):
    os.write(2, b"what a library says\\n")
file.write("written")
file.close()
return int(sys.argv[2])
"""


@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -1", "2>/dev/full", "2> >(true)"],
)
@pytest.mark.parametrize("status", [0, 2])
def test_a_stream_that_is_closed_or_gone_costs_its_text_alone(tmp_path, redirection, status):
    done = shell([*program(TALKATIVE), str(tmp_path / "file"), str(status)], redirection)
    assert done.returncode == status
    assert (tmp_path / "file").read_text() == "written"
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    if "2" not in redirection:
        assert done.stderr.count("a message") == 20
    if ">&-" not in redirection.replace("2>&-", ""):
        assert done.stdout.startswith("a line of the result\n")


def test_a_full_disk_under_stdout_is_one_line_and_status_1(tmp_path):
    done = shell([*program(TALKATIVE), str(tmp_path / "file"), "0"], ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "mealfast: standard output: cannot be written (No space left on device)"
    assert (tmp_path / "file").read_text() == "written"


def test_names_that_the_terminal_has_no_letters_for():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    argv = program("print('caf\\u00e9 \\udc80'); return 0")
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\udc80\n")


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>&1 | head -1"])
def test_a_run_without_streams_writes_its_files(options, redirection):
    names = ("data", "student", "teachers", "size", "batch_size", "run_dir", "device", "loader", "amp")
    argv = [sys.executable, "-m", "mealfast", "train", "--epochs", "1"]
    for name in names:
        values = options[name] if isinstance(options[name], tuple) else (options[name],)
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    done = shell(argv, redirection)
    assert done.returncode == 0
    assert "Traceback" not in done.stdout + done.stderr
    written = {path.name for path in Path(options["run_dir"]).iterdir()}
    assert {"config.json", "metrics.jsonl", "student.safetensors", "summary.json"} <= written


# -- signals ---------------------------------------------------------------------------------------------------------

SLEEPING = """
try:
    print("ready", flush=True)
    time.sleep(60)
finally:
    {finally_}
"""
SOON = 40.0  # seconds, of the 60 that the processes here would take: a machine may be busy


def patient(seconds: float) -> str:
    """The set-up of a process that leaves what closes its files so many seconds."""
    return f"from mealfast.cli import signals; signals.PATIENCE = {seconds}"


def interrupted(argv: list[str], *numbers: int) -> tuple[int, str, float]:
    """(status, stderr, seconds) of a process that says "ready" and is sent signals."""
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        began = time.monotonic()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        _, err = process.communicate(timeout=90)
    return process.returncode, err, time.monotonic() - began


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_signals_end_a_command_in_order(tmp_path, number):
    body = SLEEPING.format(finally_=f"open({str(tmp_path / 'closed')!r}, 'w').close()")
    status, err, seconds = interrupted(program(body, patient(60)), number)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert (status, err) == (128 + number, f"mealfast: interrupted{by}\n")
    assert seconds < SOON
    assert (tmp_path / "closed").exists()


def test_what_takes_too_long_to_close_is_left():
    assert PATIENCE < 5
    body = SLEEPING.format(finally_="time.sleep(60)")
    status, err, seconds = interrupted(program(body, patient(1)), signal.SIGTERM)
    assert (status, err) == (128 + signal.SIGTERM, "mealfast: interrupted by SIGTERM\n")
    assert 1 <= seconds < SOON
    status, _, seconds = interrupted(program(body, patient(60)), signal.SIGTERM, signal.SIGINT)
    assert status in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert seconds < SOON, "a second one ends it at once"


def test_nohup_is_respected():
    argv = program(
        'print("ready", flush=True)\ntime.sleep(1.5)\nreturn 0', "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    )
    assert interrupted(argv, signal.SIGHUP)[:2] == (0, "")


@pytest.mark.parametrize("end", ["return 0", "raise ValueError('a bug')"])
def test_a_thread_that_does_not_end_keeps_no_process(end):
    body = f'threading.Thread(target=time.sleep, args=(60,)).start()\nprint("said")\n{end}'
    began = time.monotonic()
    done = subprocess.run(program(body), capture_output=True, text=True, timeout=90)
    assert time.monotonic() - began < SOON
    assert done.returncode == (0 if end == "return 0" else 1)
    assert done.stdout == "said\n"
    assert done.stderr.endswith("" if end == "return 0" else "ValueError: a bug\n")


def test_who_waits_for_the_others_to_speak_leaves_at_torchruns_signal():
    """A process that has lost another, whose own error is no news, is told to end while it waits: no traceback."""
    body = 'print("lost", flush=True)\nraise RuntimeError("Connection closed by peer [127.0.0.1]")'
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    with subprocess.Popen(
        program(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout.readline() == "lost\n"
        time.sleep(0.5)
        process.terminate()
        _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (1, "")


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    assert run_command(lambda argv: 0, []) == 0
    with noticed() as last:
        assert last() is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_a_run_had_no_step_left_for_ends_the_demo(monkeypatch, tmp_path):
    """The first run hears SIGTERM after its last step, and ends well: the second must not begin."""
    began = []

    def train(recipe):
        began.append(recipe.run_dir)
        earlier = signal.signal(signal.SIGTERM, lambda number, frame: None)  # as a run that is being saved
        os.kill(os.getpid(), signal.SIGTERM)
        signal.signal(signal.SIGTERM, earlier)
        return {"finished": True}

    monkeypatch.setattr("mealfast.training.loop.train", train)
    with pytest.raises(Interrupted) as caught:
        demo_runs.run_all(tmp_path, seed=0, loader="pillow", device="cpu")
    assert caught.value.number == signal.SIGTERM
    assert began == [str(tmp_path / "teacher-1")]
    assert run_command(lambda argv: demo_runs.run_all(tmp_path, 0, "pillow", "cpu"), []) == 128 + signal.SIGTERM
