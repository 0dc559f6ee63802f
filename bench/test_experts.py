"""The experts of one mixture, forward and backward, in turn with PEFT's target_parameters and the frozen experts.

Shapes are those of real mixtures, at sizes that a CPU takes; the frozen experts are computed as transformers does by
default.
"""

import copy
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


def step(layer: nn.Module, arguments: tuple[Tensor, ...]):
    """Output and gradients of x and of all that trains, of forward and backward."""
    wrt = [arguments[0], *(p for p in layer.parameters() if p.requires_grad)]

    def both():
        y = layer(*arguments)
        return y.detach(), *torch.autograd.grad(y, wrt, torch.ones_like(y))

    return both


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_experts(benchmark, request, mixture, method):
    torch.manual_seed(0)
    floor = Layer(mixture)
    options = {"r": RANK, "target_modules": []}
    options |= {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    stock = peft.get_peft_model(copy.deepcopy(floor), METHODS["lora"](**options))
    model = fuse(copy.deepcopy(stock)) if method == "lora" else None
    model = model or peft.get_peft_model(copy.deepcopy(floor), METHODS[method](**options))
    x = torch.randn(mixture.tokens, mixture.hidden, requires_grad=True)
    weights, index = torch.rand(mixture.tokens, mixture.experts).softmax(1).topk(mixture.k)
    ours, *others = (step(layer, (x, index, weights)) for layer in (model, stock, floor))
    others = dict(zip(("peft", "floor"), others, strict=True))
    found, expected = ours(), {name: run() for name, run in others.items()}
    error = 0.0
    if method == "lora":
        for value, by_peft in zip(found, expected["peft"], strict=True):
            error = max(error, ((value - by_peft).norm() / by_peft.norm()).item())
        assert error <= 1e-5
    info = {"impl": "cpu", "method": method, "op": "both", "M": mixture.tokens, "r": RANK, "error": error}
    info |= {"shape": str(mixture), "peak_bytes": timing.peak_bytes(ours)}
    info |= {f"peak_bytes_of_{name}": timing.peak_bytes(run) for name, run in others.items()}
    rows.record(benchmark, ours, others, info, request)
    row = benchmark.extra_info
    print(
        f"\n{mixture} {method}: {row['ms']:.1f} ms, {row['ratio_to_peft']:.2f} of PEFT, "
        f"{row['ratio_to_floor']:.2f} of the frozen experts; peak {row['peak_bytes'] / 1e6:.1f} MB, "
        f"of PEFT {row['peak_bytes_of_peft'] / 1e6:.1f}, of the frozen experts {row['peak_bytes_of_floor'] / 1e6:.1f}"
    )
