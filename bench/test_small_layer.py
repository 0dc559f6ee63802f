"""One 64×64 layer and one token, where all of the time is what calls cost, in turn with PEFT's LoRA.

The time is that which the thread computes, for a call is shorter than what other programs take a processor away.
"""

import statistics
import time
from functools import partial

import peft
import pytest
import torch
from torch import nn

import nlora_kernels as nk
from bench import rows, timing
from nlora_kernels.peft import LoRA2Config, NLoraConfig, fuse

SIZE, RANK, CALLS = 64, 8, 40
OPTIONS = {"r": RANK, "target_modules": ["0"]}
CONFIGS = {
    "peft": lambda: peft.LoraConfig(**OPTIONS),
    "fuse": lambda: peft.LoraConfig(**OPTIONS),
    "lora": lambda: NLoraConfig(init_lora_weights=True, **OPTIONS),
    "nlora": lambda: NLoraConfig(**OPTIONS),
    "lora2": lambda: LoRA2Config(k=RANK, **OPTIONS),
}
MODULES = {
    "NLoraLinear": lambda linear: nk.NLoraLinear.from_linear(linear, RANK),
    "LoRA2Linear": lambda linear: nk.LoRA2Linear.from_linear(linear, RANK, RANK),
}


def layer(method: str) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(SIZE, SIZE)
    if method in MODULES:
        return MODULES[method](linear)
    model = peft.get_peft_model(nn.Sequential(linear), CONFIGS[method]())
    return (fuse(model) if method == "fuse" else model).base_model.model[0]


def repeated(layer: nn.Module, op: str):
    x, dy = torch.randn(1, SIZE), torch.randn(1, SIZE)

    def forward():
        with torch.no_grad():
            for _ in range(CALLS):
                layer(x)

    def both():
        for _ in range(CALLS):
            layer(x).backward(dy)

    x.requires_grad_(op == "both")
    return {"forward": forward, "both": both}[op]


def results(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    wrt = {"x": x.detach().requires_grad_()} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = layer(wrt["x"])
    return {"y": y.detach(), **dict(zip(wrt, torch.autograd.grad(y, list(wrt.values()), dy), strict=True))}


@pytest.mark.parametrize("op", ["forward", "both"])
@pytest.mark.parametrize("method", [name for name in (*CONFIGS, *MODULES) if name != "peft"])
def test_smoke_layer(benchmark, request, method, op):
    ours, other = layer(method), layer("peft")
    error = rows.check(results, ours, torch.randn(1, SIZE), torch.randn(1, SIZE))
    run, others = repeated(ours, op), {"peft": repeated(other, op)}
    run()
    others["peft"]()
    info = {"impl": "cpu", "method": method, "op": op, "M": 1, "shape": f"{SIZE}x{SIZE}", "r": RANK, "error": error}
    # The clock of pytest-benchmark counts what others compute too, so ours is taken beside PEFT's.
    timer = partial(timing.seconds, clock=time.thread_time)
    times = rows.record(benchmark, run, others | {"self_again": run}, info, request, timer=timer)
    seconds = statistics.median(times["self_again"])
    ratio, low, high = timing.median_ratio(times["self_again"], times["peft"])
    own = {"us": 1e6 * seconds / CALLS, "ms": 1e3 * seconds, "ratio_to_peft": ratio}
    benchmark.extra_info |= own | {"ratio_to_peft_p20_p80": [low, high], "speedup_vs_peft": 1 / ratio}
    print(f"\n{method} {op}: {own['us']:.1f} µs, {ratio:.2f} of PEFT's LoRA")
