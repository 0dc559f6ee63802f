"""The benchmarks tell the truth: what they time is checked, and a wrong kernel gets no time."""

import gc
import json
import subprocess
import sys
import weakref

import pytest
import torch

from bench import rows
from bench.timing import saved_bytes
from nlora_kernels.backends import TABLE
from python_tests import ROOT

pytest.importorskip("pytest_benchmark")
pytest.importorskip("peft")
from nlora_kernels.peft import NLoraConfig  # noqa: E402

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
    chosen = f"smoke and M{M}-r8-float32-nlora-{op} and (lean or eager3)"
    arguments = [
        str(ROOT / "bench"),
        "-q",
        "-k",
        chosen,
        "--seconds=0.01",
        f"--benchmark-json={tmp_path / 'rows.json'}",
    ]
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


@pytest.mark.parametrize("method", ["lora", "nlora", "inttune"])
@pytest.mark.parametrize("wrong", [None, "forward", "backward"])
def test_every_method_on_experts_is_checked(monkeypatch, method, wrong):
    test_experts = pytest.importorskip("bench.test_experts")
    mixture = test_experts.Mixture("qwen3_moe", 4, 32, 32, 16, 2)
    torch.manual_seed(0)
    layer, inputs = test_experts.compared(mixture, method).ours, test_experts.given(mixture)

    class Wrong(type(TABLE["cpu"])):
        def forward_experts(self, call):
            y, T = super().forward_experts(call)
            return (y * (1 + 1e-5) if wrong == "forward" else y), T

        def backward_experts(self, call, dy, T, needs):
            grads = super().backward_experts(call, dy, T, needs)
            name = "lora_A" if method == "lora" else "lora_N"
            grad = getattr(grads, name)
            return grads._replace(**{name: grad * (1 + 1e-5)}) if wrong == "backward" and grad is not None else grads

    monkeypatch.setattr(TABLE["cpu"], "__class__", Wrong)
    if wrong is None:
        assert 0 < rows.check(test_experts.results, layer, *inputs) < 1e-6
    else:
        with pytest.raises(AssertionError, match="y is off by" if wrong == "forward" else "lora_[AN].* is off by"):
            rows.check(test_experts.results, layer, *inputs)


@pytest.mark.parametrize("wrong", [None, "y", "dx", "lora_A", "lora_N", "lora_B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_gradients_on_four_bits_are_checked(monkeypatch, wrong, dtype):
    test_quantised = pytest.importorskip("bench.test_quantised")
    torch.manual_seed(0)
    weight = (torch.randn(128, 128) / 128**0.5).to(dtype)
    x, dy = (torch.randn(48, 128, dtype=dtype) for _ in range(2))
    options = {"init_lora_weights": "slora", "r": 8, "target_modules": ["0"]}
    model = test_quantised.adapted(test_quantised.nf4(weight), NLoraConfig(**options), test_quantised.nf4)
    layer = model.base_model.model[0]
    W = test_quantised.base_weights.read(layer.base_layer)
    found = test_quantised.results(layer, x.requires_grad_(), dy)
    plain, exact = (test_quantised.by_definition(layer, W, x, dy, each) for each in (dtype, torch.float64))
    if wrong is None:
        assert rows.error(found, plain, exact) > 0
    else:
        found[wrong] = found[wrong] * (1 + 10 * torch.finfo(dtype).eps)
        with pytest.raises(AssertionError, match=f"^{wrong} is off by"):
            rows.error(found, plain, exact)


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
