"""The experts of one mixture, forward and backward, in turn with PEFT's target_parameters and the frozen experts.

Shapes are those of real mixtures, at sizes that a CPU takes; the frozen experts are computed as transformers does by
default.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn

from bench import rows, timing
from nlora_kernels.peft import NLoraConfig, fuse

RANK = 8


class Mixture(NamedTuple):
    """Experts of a model family, and how many tokens choose k of them each."""

    family: str  # of transformers
    experts: int
    hidden: int
    intermediate: int
    tokens: int
    k: int

    def __str__(self) -> str:
        return f"{self.family}-{self.experts}x{self.hidden}x{self.intermediate}-M{self.tokens}-top{self.k}"


MIXTURES = [
    Mixture("mixtral", 16, 512, 1024, 1024, 2),
    Mixture("qwen3_moe", 128, 256, 128, 512, 8),
    Mixture("gpt_oss", 32, 384, 384, 512, 4),
]
METHODS = {
    "lora": lambda **options: peft.LoraConfig(init_lora_weights=False, **options),
    "nlora": lambda **options: NLoraConfig(**options),
    "inttune": lambda **options: NLoraConfig(train="core", **options),
}


class Layer(nn.Module):
    def __init__(self, mixture: Mixture):
        super().__init__()
        self.experts = _experts(mixture)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=mixture.hidden**-0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return self.experts(x, index, weights)


def _experts(mixture: Mixture) -> nn.Module:
    sizes = {"hidden_size": mixture.hidden, "num_experts_per_tok": mixture.k}
    if mixture.family == "mixtral":
        from transformers.models.mixtral import modeling_mixtral as model

        config = model.MixtralConfig(intermediate_size=mixture.intermediate, num_local_experts=mixture.experts, **sizes)
        kind = model.MixtralExperts
    elif mixture.family == "qwen3_moe":
        from transformers.models.qwen3_moe import modeling_qwen3_moe as model

        sizes |= {"moe_intermediate_size": mixture.intermediate}
        config = model.Qwen3MoeConfig(num_experts=mixture.experts, **sizes)
        kind = model.Qwen3MoeExperts
    else:
        from transformers.models.gpt_oss import modeling_gpt_oss as model

        config = model.GptOssConfig(intermediate_size=mixture.intermediate, num_local_experts=mixture.experts, **sizes)
        kind = model.GptOssExperts
    config._experts_implementation = "grouped_mm"
    return kind(config)


class Compared(NamedTuple):
    ours: nn.Module
    # PEFT's plain LoRA, which has no core, on the same experts.
    peft: nn.Module
    # The experts without adapters.
    floor: nn.Module


def compared(mixture: Mixture, method: str) -> Compared:
    floor = Layer(mixture)
    options = {"r": RANK, "target_modules": []}
    options |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    stock = peft.get_peft_model(copy.deepcopy(floor), METHODS["lora"](**options))
    if method == "lora":
        return Compared(fuse(copy.deepcopy(stock)), stock, floor)
    return Compared(peft.get_peft_model(copy.deepcopy(floor), METHODS[method](**options)), stock, floor)


def steps(mixture: Mixture, method: str) -> dict[str, Callable]:
    """{whose: output and gradients of x and of all that trains, of forward and backward}"""
    x = torch.randn(mixture.tokens, mixture.hidden, requires_grad=True)
    weights, index = torch.rand(mixture.tokens, mixture.experts).softmax(1).topk(mixture.k)

    def step(layer: nn.Module) -> Callable:
        wrt = [x, *(p for p in layer.parameters() if p.requires_grad)]

        def both():
            y = layer(x, index, weights)
            return y.detach(), *torch.autograd.grad(y, wrt, torch.ones_like(y))

        return both

    return {name: step(layer) for name, layer in compared(mixture, method)._asdict().items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_experts(benchmark, request, mixture, method):
    torch.manual_seed(0)
    runs = steps(mixture, method)
    found, expected, _ = (run() for run in runs.values())
    error = 0.0
    if method == "lora":
        for value, by_peft in zip(found, expected, strict=True):
            error = max(error, ((value - by_peft).norm() / by_peft.norm()).item())
        assert error <= 1e-5
    peaks = {name: timing.peak_bytes(run) for name, run in runs.items()}
    ours = runs.pop("ours")
    info = {"impl": "cpu", "method": method, "op": "both", "M": mixture.tokens, "r": RANK, "error": error}
    info |= {"shape": str(mixture), "peak_bytes": peaks["ours"]}
    info |= {f"peak_bytes_of_{name}": peaks[name] for name in runs}
    info["peak_above_floor_to_peft"] = (peaks["ours"] - peaks["floor"]) / (peaks["peft"] - peaks["floor"])
    rows.record(benchmark, ours, runs, info, request)
    row = benchmark.extra_info
    print(
        f"\n{mixture} {method}: {row['ms']:.1f} ms, {row['ratio_to_peft']:.2f} of PEFT, "
        f"{row['ratio_to_floor']:.2f} of the frozen experts; peak {peaks['ours'] / 1e6:.1f} MB, of PEFT "
        f"{peaks['peft'] / 1e6:.1f}, of the frozen experts {peaks['floor'] / 1e6:.1f}: "
        f"{row['peak_above_floor_to_peft']:.2f} of PEFT above them"
    )
