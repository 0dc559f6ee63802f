"""When the adapter may be fused into its base layer, and what happens where it may not."""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize


def obstacle(base: nn.Module) -> str | None:
    """None if calling `base` is exactly x·Wᵀ + bias with a dense weight, else why it is not."""
    if type(base) is not nn.Linear:
        return f"its type is {type(base).__qualname__}, not nn.Linear"
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return "it has hooks"
    if parametrize.is_parametrized(base):
        return "its weight is parametrized"
    return None


def branch(x: Tensor, lora_A: Tensor, lora_B: Tensor, lora_N: Tensor | None, scaling: float) -> Tensor:
    """s·((x·Aᵀ)·Nᵀ)·Bᵀ on its own, to be added to the output of a base layer that cannot be fused."""
    T = F.linear(x.to(lora_A.dtype), lora_A)
    return scaling * F.linear(T if lora_N is None else F.linear(T, lora_N), lora_B)
