"""An adapter on a weight in few bits, forward and backward, in turn with PEFT's on the same base, with the frozen dense
layer alone and with the dense fused layer.
"""

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

from bench import rows
from nlora_kernels.peft import NLoraConfig
from nlora_kernels.peft import base as base_weights

SIZE, RANK = 4096, 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def nf4(weight: Tensor) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, quant_type="nf4", compute_dtype=weight.dtype)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    return layer


def int8(weight: Tensor) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    return layer


def dense(weight: Tensor) -> nn.Module:
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def adapted(base: nn.Module, config: peft.LoraConfig, kind) -> nn.Module:
    net = nn.Sequential(base)
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind is nf4, kind is int8
    model = peft.get_peft_model(net, config).train()
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_(std=0.02)
    return model


def step(layer: nn.Module, x: Tensor, dy: Tensor):
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), leaves, dy)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [16, 128, 512, rows.long(2048, when=True)])
@pytest.mark.parametrize("kind", [nf4, int8], ids=lambda kind: kind.__name__)
def test_step(benchmark, request, kind, M, dtype):
    torch.manual_seed(0)
    weight = (torch.randn(SIZE, SIZE) / SIZE**0.5).to(DTYPES[dtype])
    x, dy = (torch.randn(M, SIZE, dtype=DTYPES[dtype]) for _ in range(2))
    x.requires_grad_()
    options = {"r": RANK, "target_modules": ["0"]}
    ours = adapted(kind(weight), NLoraConfig(init_lora_weights="slora", **options), kind)
    layer = ours.base_model.model[0]
    assert layer.obstacle("default") is None
    W = base_weights.read(layer.base_layer)
    exact = x.detach().double() @ (W.double() + layer.get_delta_weight("default").double()).T
    error = ((ours(x).double() - exact).norm() / exact.norm()).item()
    assert error <= SIZE**0.5 * torch.finfo(x.dtype).eps
    stock = adapted(copy.deepcopy(layer.base_layer), peft.LoraConfig(**options), kind)
    fused = adapted(dense(weight), NLoraConfig(init_lora_weights="slora", **options), dense)
    floor = dense(weight)
    others = {"peft": step(stock, x, dy), "dense_fused": step(fused, x, dy), "floor": step(floor, x, dy)}
    run = step(ours, x, dy)
    for function in (run, *others.values()):
        function()
    info = {"impl": "cpu", "method": "slora", "op": "both", "base": kind.__name__, "dtype": dtype, "error": error}
    rows.record(benchmark, run, others, info | {"M": M, "shape": f"{SIZE}x{SIZE}", "r": RANK}, request)
    ratios = {name: benchmark.extra_info[f"ratio_to_{name}"] for name in others}
    print(f"\n{kind.__name__} {dtype} M={M}: " + ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items()))
