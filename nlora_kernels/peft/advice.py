"""What a user is told of an adapter that works, but not as they may think."""

import sys
import warnings

from peft import LoraConfig
from torch import nn

from .. import saved
from ..backends.quantised import INPUT_TOO
from ..layers import branch as branches
from ..layers import experts
from ..versions import READ_ONLY_A_AND_B
from . import tensor_parallel
from .config import is_lora
from .experts import FusedExperts
from .layer import FusedLinear
from .nlora import HasCore


def advise(model: nn.Module, adapter_name: str, config: LoraConfig) -> None:
    """One warning for each thing that works but is not what the user came for."""
    warn_of_unfused(model)
    cores = ((name, module) for name, module in model.named_modules() if isinstance(module, HasCore))
    idle = {name: reason for name, module in cores if (reason := module.idle(adapter_name))}
    if idle:
        warnings.warn(
            f"the adapter {adapter_name!r} of {saved.some(list(idle))} gets no gradient and cannot train, "
            f"because {next(iter(idle.values()))}",
            stacklevel=2,
        )
    patched = [name for name in READ_ONLY_A_AND_B if name in sys.modules]
    if patched and not is_lora(config):
        warnings.warn(
            f"{patched[0]} is loaded: its own LoRA kernels read lora_A and lora_B alone and would leave the core out. "
            "Switch them off",
            stacklevel=2,
        )


def warn_of_unfused(model: nn.Module) -> None:
    """One warning for all layers whose base keeps them from being one operation."""
    # What its user chose, such as dropout, a layer runs unfused for without a word.
    bases = ((name, module.base_layer) for name, module in model.named_modules() if isinstance(module, FusedLinear))
    unfused = {
        name: reason
        for name, base in bases
        if (reason := branches.obstacle(base)) and tensor_parallel.split_of(base) is None
    }
    unfused = {name: reason for name, reason in unfused.items() if reason != INPUT_TOO}
    wrappers = ((name, module) for name, module in model.named_modules() if isinstance(module, FusedExperts))
    # The outermost computes. Nothing is said of routers, whose parameters are no stacks.
    outermost = [
        (name, module.get_base_layer())
        for name, module in wrappers
        if module.num_experts > 1 and not name.endswith(".base_layer")
    ]
    unfused |= {name: reason for name, base in outermost if (reason := experts.obstacle(base))}
    if unfused:
        name, reason = next(iter(unfused.items()))
        warnings.warn(
            f"{len(unfused)} adapter layers cannot be fused and run as base layer plus adapter, as in PEFT: {name}, "
            f"because {reason}",
            stacklevel=3,
        )
