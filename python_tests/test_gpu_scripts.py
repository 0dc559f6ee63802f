"""The scripts for a GPU, as far as they go without one: they list their cells, and say what they miss."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "bench" / "gpu"
# How many cells each has of backend "cuda", at least.
SCRIPTS = {"correctness": 50, "stress": 4, "bench": 30, "sanitize": 12, "tune": 0}


def run(script, *arguments):
    command = [sys.executable, FOLDER / f"{script}.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_cells_are_listed_without_a_gpu(script, tmp_path):
    ran = run(script, "--out", tmp_path, "--list")
    assert ran.returncode == 0, ran.stderr
    cells = ran.stdout.splitlines()
    assert cells and len(set(cells)) == len(cells)
    assert sum("cuda" in cell for cell in cells) >= SCRIPTS[script]


def test_the_sanitizer_runs_cells_that_exist(tmp_path):
    known = run("correctness", "--out", tmp_path, "--list").stdout.splitlines()
    for cell in run("sanitize", "--out", tmp_path, "--list").stdout.splitlines():
        assert cell.partition(": ")[2] in known


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_without_a_gpu_nothing_runs(script, tmp_path):
    ran = run(script, "--out", tmp_path)
    assert ran.returncode == 1 and "needs a GPU" in ran.stdout, ran.stderr
