"""Adapter layers: what an adapter adds to a linear layer and when both are one operation (`branch`), and plain
nn.Modules of it (`modules`). The layers of `nlora_kernels.peft` rest on the same branches."""

from .branch import unfused
from .modules import LoRA2Linear, NLoraLinear

__all__ = ["LoRA2Linear", "NLoraLinear", "unfused"]
