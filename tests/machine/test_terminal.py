"""A standard stream that is closed, full or gone costs its messages, and nothing else."""

import io
import os
import subprocess
import sys

import pytest

from mealfast.machine import terminal


def test_what_is_no_terminal(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed, io.StringIO(), open(os.devnull)):  # noqa: SIM115
        assert not terminal.is_terminal(stream)
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as stream:
        assert terminal.is_terminal(stream)
    os.close(master)


@pytest.mark.parametrize("stream", ["none", "closed", "full"])
def test_a_line_that_cannot_be_said_is_lost(monkeypatch, capfd, stream):
    found = None if stream == "none" else open("/dev/full" if stream == "full" else os.devnull, "w")  # noqa: SIM115
    if stream == "closed":
        found.close()
    monkeypatch.setattr(sys, "stderr", found)
    terminal.say("a line")
    assert capfd.readouterr().out == "", "print's file=None is standard output"


def test_a_file_never_gets_the_number_of_a_closed_stream(tmp_path):
    """As `2>&-` in a shell: what C code says on standard error must not land in the file that is opened next."""
    program = (
        "import os, sys; from mealfast.machine import terminal; terminal.open_closed_streams()\n"
        f"f = open({str(tmp_path / 'f')!r}, 'w'); os.write(2, b'noise'); os.write(1, b'noise'); f.write('mine')\n"
        "print('lost', file=sys.stderr); print('lost'); sys.exit(7)"
    )
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" 0<&- 1>&- 2>&-', sys.executable, program], check=False)
    assert done.returncode == 7
    assert (tmp_path / "f").read_text() == "mine"
