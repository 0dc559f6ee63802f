"""The layout of the kernels hub: it loads without the package, twice in one process."""

import subprocess
import sys

import pytest

from python_tests import ROOT


def test_the_layout_is_loaded_and_runs():
    pytest.importorskip("kernels")
    done = subprocess.run([sys.executable, ".ci/hub.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("two versions loaded and run: _nlora_kernels_cpu_")
