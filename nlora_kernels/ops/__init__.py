"""The operations: public functions (`api`), checks of their arguments, their gradients (`autograd`) and their
registration with torch.library (`register`).

Of what a layer computes, this folder alone knows of autograd, torch.compile and torch.func; `backends` does the
arithmetic.
"""

from .api import lora2_core, lora2_linear, lora_linear
from .experts import lora_grouped_linear
from .group import lora_group_linear
from .mlp import lora_mlp

__all__ = ["lora2_core", "lora2_linear", "lora_group_linear", "lora_grouped_linear", "lora_linear", "lora_mlp"]
