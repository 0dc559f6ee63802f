"""The benchmarks tell the truth: what they time is checked, and a wrong kernel gets no time."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch

from bench.timing import saved_bytes
from python_tests import ROOT

pytest.importorskip("pytest_benchmark")

# What a row is to hold, whatever it measures.
FIELDS = {"impl", "op", "shape", "r", "dtype", "device", "threads", "ratio_to_floor", "speedup_vs_peft", "flop_bound"}
FIELDS |= {"gflops", "peak_bytes", "saved_bytes", "error", "method", "ms", "ratio_to_floor_p20_p80"}

BREAK = {
    "nothing": "",
    # The last element alone, by one part in a hundred.
    "forward": """
right = lean.forward
def wrong(call):
    y, T = right(call)
    y[-1, -1] *= 1.01
    return y, T
lean.forward = wrong
""",
    "backward": """
right = lean.backward
def wrong(*call):
    grads = right(*call)
    return grads._replace(lora_N=grads.lora_N.T)
lean.backward = wrong
""",
}


@pytest.mark.parametrize("broken, op", [("nothing", "both"), ("forward", "forward"), ("backward", "both")])
def test_a_wrong_kernel_fails_its_row_and_no_other(broken, op, tmp_path):
    M = 16 if op == "forward" else 512
    rows = f"smoke and M{M}-r8-float32-nlora-{op} and (lean or eager3)"
    arguments = [str(ROOT / "bench"), "-q", "-k", rows, "--seconds=0.01", f"--benchmark-json={tmp_path / 'rows.json'}"]
    code = f"import sys, pytest\nfrom nlora_kernels.backends import TABLE\nlean = TABLE['lean']\n{BREAK[broken]}\n"
    code += f"sys.exit(pytest.main({arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    timed = [row["extra_info"] for row in json.loads((tmp_path / "rows.json").read_text())["benchmarks"]]
    if broken == "nothing":
        assert done.returncode == 0, done.stdout
        assert {row["impl"] for row in timed} == {"lean", "eager3"}
        assert all(FIELDS <= row.keys() for row in timed)
        return
    assert done.returncode == 1, done.stdout
    assert [row["impl"] for row in timed] == ["eager3"]
    name = "y" if broken == "forward" else "dlora_N"
    assert f"AssertionError: {name} is off by" in done.stdout


def test_bytes_saved_for_backward_are_counted_and_not_kept():
    x = torch.randn(64, 64, requires_grad=True)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)), torch.nn.Sigmoid()).requires_grad_(False)
    results = []

    def forward():
        y = model(x).exp()
        results.append(weakref.ref(y))
        return y

    # Of the sigmoid and of exp, which keep their results; each of its own, though nothing of them is kept here.
    assert saved_bytes(forward, model.parameters()) == 2 * 64 * 64 * 4
    gc.collect()
    assert results[0]() is None
