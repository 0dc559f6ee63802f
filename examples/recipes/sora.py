"""SoRA (arXiv 2311.11696): LoRA with a gate that a proximal step makes sparse. The gate is a diagonal core."""

import math

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

import nlora_kernels as nk


class SoRALinear(nn.Module):
    """y = x·Wᵀ + bias + s·((x·Aᵀ) ⊙ gate)·Bᵀ        A (r, in)   gate (r)   B (out, r)   s = alpha / r

    A Kaiming uniform with a = √5, gate N(0, 1) and B 0, as in the published code. W and bias are frozen.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float):
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), alpha / r
        like = base.weight
        self.lora_A = nn.Parameter(like.new_empty(r, base.in_features))
        self.lora_gate = nn.Parameter(torch.randn(r).to(like))
        self.lora_B = nn.Parameter(like.new_zeros(base.out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        core = torch.diag(self.lora_gate)
        options = {"bias": self.base.bias, "scaling": self.scaling}
        return nk.lora_linear(x, self.base.weight, self.lora_A, self.lora_B, core, **options)


def add_sora(model: nn.Module, names: list[str], r: int, alpha: float) -> None:
    """Puts a SoRALinear in the place of each named linear layer."""
    for name in names:
        parent, _, child = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, child, SoRALinear(getattr(module, child), r, alpha))


@torch.no_grad()
def shrink_(gate: Tensor, threshold: float) -> None:
    """gate ← sign(gate)·max(|gate| − threshold, 0), the proximal map of threshold·‖gate‖₁, in place."""
    gate.copy_(gate.sign() * (gate.abs() - threshold).clamp_min(0))


class ProximalStep(TrainerCallback):
    """Shrinks every gate after each step of the optimizer, as the published code does: by the same threshold."""

    def __init__(self, threshold: float):
        self.threshold = threshold

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        for module in model.modules():
            if isinstance(module, SoRALinear):
                shrink_(module.lora_gate, self.threshold)
