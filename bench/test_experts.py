"""The experts of one mixture, forward and backward, in turn with PEFT's target_parameters and the frozen experts.

Shapes are those of real mixtures, at sizes that a CPU takes; the frozen experts are computed as transformers does by
default. Output and every gradient are checked against fp64 before anything is timed.
"""

import copy
from functools import partial
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


class Given(NamedTuple):
    """What comes into the experts: tokens, which experts they chose, and with what weights; and what comes back."""

    x: Tensor
    index: Tensor
    weights: Tensor
    dy: Tensor


def given(mixture: Mixture) -> Given:
    x, dy = (torch.randn(mixture.tokens, mixture.hidden) for _ in range(2))
    weights, index = torch.rand(mixture.tokens, mixture.experts).softmax(1).topk(mixture.k)
    return Given(x.requires_grad_(), index, weights, dy)


def results(layer: nn.Module, x: Tensor, index: Tensor, weights: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all that trains."""
    wrt = {"x": x} | {name: p for name, p in layer.named_parameters() if p.requires_grad}
    y = layer(x, index, weights)
    grads = torch.autograd.grad(y, list(wrt.values()), dy)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(wrt, grads, strict=True)}}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_experts(benchmark, request, mixture, method):
    layers, inputs = compared(mixture, method), given(mixture)
    like = [layers.peft] if method == "lora" else []
    error = rows.check(results, layers.ours, *inputs, like=like)
    runs = {name: partial(results, layer, *inputs) for name, layer in layers._asdict().items()}
    for run in runs.values():
        run()
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
