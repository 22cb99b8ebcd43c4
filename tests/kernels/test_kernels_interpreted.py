"""The kernels' tests again with TRITON_INTERPRET=1, where CPU tensors go through the Triton kernels.

In a process of its own: Triton reads the variable when a kernel is decorated.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CHECKOUT = HERE.parents[1]
FILES = ("test_kernels.py", "test_kernels_sparse.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The files, each in a process, side by side: file name -> output and exit status."""
    # Run from elsewhere: with the checkout on sys.path, the folder kernels/ would answer to `import kernels`.
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    options = ["-q", "-s", "-m", "not gpu", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    configuration = ["-c", CHECKOUT / "pyproject.toml", "--rootdir", CHECKOUT]
    started = {
        name: subprocess.Popen(
            [*command, *options, *configuration, HERE / name],
            cwd=tmp_path_factory.mktemp("elsewhere"),
            env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in FILES
    }
    # A pipe holds 64 KiB, more than one prints while the other is read, unless it fails: then it waits its turn.
    return {name: (run.communicate()[0], run.returncode) for name, run in started.items()}


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", FILES)
def test_the_kernels_interpreted(runs, name):
    output, status = runs[name]
    print(output)  # with the error table; pytest -s or a failure shows it
    assert status == 0
    assert "Triton, interpreted" in output
