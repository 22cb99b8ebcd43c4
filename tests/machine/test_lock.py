"""One run a folder: who may enter, who is named, and that any death lets go."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from mealfast.errors import UsageError
from mealfast.machine import lock

HOLD = """
import os, subprocess, sys, time
from mealfast.machine import lock
with lock.hold(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.write(1, b"%d\\n" % os.getpid())
        time.sleep(60)
    if sys.argv[2] == "start":
        os.write(1, b"%d\\n" % subprocess.Popen(["sleep", "60"], close_fds=False).pid)
    os.write(1, b"held\\n")
    time.sleep(60)
"""


def refusal(folder: Path) -> str:
    with pytest.raises(UsageError) as caught, lock.hold(folder):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("child", ["none", "fork", "start"])
def test_the_second_is_refused_and_any_death_lets_go_even_where_a_child_lives_on(tmp_path, child, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    folder = tmp_path / "runs" / "a"
    command = [sys.executable, "-c", HOLD, str(folder), child]
    before = time.time()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        said = [holder.stdout.readline()]
        if child != "none":
            said.append(holder.stdout.readline())
        children = [int(line) for line in said if line.strip().isdigit()]
        try:
            message = refusal(folder)
            assert message.startswith(
                f"--run-dir {folder}: is in use by process {holder.pid} on {socket.gethostname()}"
            )
            assert f"started {time.strftime('%Y-%m-%d', time.localtime(before))}" in message
            with lock.hold(tmp_path / "runs" / "b"):
                pass
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert len(children) == (child != "none"), said
            for pid in children:
                os.kill(pid, 0)  # lives
            with lock.hold(folder):
                assert (folder / ".lock").exists()
        finally:
            holder.kill()
            for pid in children:
                os.kill(pid, signal.SIGKILL)
    assert folder.is_dir(), "it was another's"
    assert not (folder / ".lock").exists()


def test_the_same_process_is_refused_too_and_a_copy_of_the_folder_gives_nothing_away(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    with lock.hold(tmp_path):
        assert f"process {os.getpid()} on" in refusal(tmp_path)
        (tmp_path / ".lock").read_bytes()  # a record lock would be lost here
        assert f"process {os.getpid()} on" in refusal(tmp_path)
    with lock.hold(tmp_path):
        pass


def test_a_folder_that_stays_empty_goes_and_one_with_content_stays(tmp_path):
    with lock.hold(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with suppress(KeyError), lock.hold(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").touch()
        raise KeyError
    assert list((tmp_path / "a" / "b").iterdir()) == [tmp_path / "a" / "b" / "file"]


def test_who_waits_for_the_end_gets_the_new_file_not_the_one_that_went(tmp_path, monkeypatch):
    """Between opening and locking the holder ends and removes the file: a lock on that one keeps nobody out."""
    whole = fcntl.flock

    def late(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", whole)
        (tmp_path / ".lock").unlink()
        whole(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    with lock.hold(tmp_path):
        assert "in use" in refusal(tmp_path)


def test_a_file_system_without_locks_gets_a_note_and_a_file_a_line(tmp_path, monkeypatch, capfd):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with lock.hold(tmp_path / "run"):
        pass
    assert capfd.readouterr().err == (
        f"note: {tmp_path / 'run'}: this file system has no locks: start no other run there meanwhile\n"
    )
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"--run-dir {tmp_path / 'file'}: is a file; name a folder"
    assert "cannot be written" in refusal(Path("/proc/nothing"))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": "\\u001b[31m", "host": "h", "start": "s"}', b"\xff"])
def test_what_the_lock_file_says_is_not_believed(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    with lock.hold(tmp_path):
        (tmp_path / ".lock").write_bytes(content)
        message = refusal(tmp_path)
    assert message.isprintable()
    assert "is in use by another process" in message or r"process \x1b[31m on h" in message


def test_the_other_processes_of_a_job_take_no_lock(tmp_path, monkeypatch):
    with lock.hold(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with lock.hold(tmp_path):
            pass
        assert (tmp_path / ".lock").exists()
