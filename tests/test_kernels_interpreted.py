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

TESTS = Path(__file__).parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_interpreted(tmp_path):
    # Run from elsewhere: with the checkout on sys.path, the folder kernels/ would answer to `import kernels`.
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    options = ["-q", "-s", "-m", "not gpu", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    configuration = ["-c", TESTS.parent / "pyproject.toml", "--rootdir", TESTS.parent]
    run = subprocess.run(
        [*command, *options, *configuration, TESTS / "test_kernels.py", TESTS / "test_kernels_sparse.py"],
        cwd=tmp_path,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(run.stdout + run.stderr)  # with the error table; pytest -s or a failure shows it
    assert run.returncode == 0
    assert "Triton, interpreted" in run.stdout
