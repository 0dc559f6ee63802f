"""Order of work and choice of tile of the CUDA products: plain C++, run over thousands of sizes."""

import os
import shutil
import subprocess

import pytest

from python_tests import ROOT


def test_every_tile_once_and_no_deadlock(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "schedule_test"
    source = ROOT / "csrc" / "tests" / "schedule_test.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", "-pthread", f"-I{ROOT / 'csrc'}", source, "-o", program], check=True)
    ran = subprocess.run([program], capture_output=True, text=True)
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout
