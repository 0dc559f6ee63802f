"""What FSDP1, FSDP2 and DeepSpeed's ZeRO-3 do to modules and parameters, as far as a fused layer must know of it.

They keep a shard of a parameter on every rank and have it whole, gathered, while the module that they watch is called:

- FSDP2 changes the class of a module, a block as a rule, whose parameters are DTensors at rest and plain when it runs;
- FSDP1 wraps modules, with PEFT's policy every matrix that trains, and has the parameters whole within the wrapper;
- ZeRO-3 hooks every module. A layer that reads the parameter of another module in its forward has it gathered, then and
  in backward: DeepSpeed's dictionaries of parameters see to that.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends.base import PLAIN

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Where DeepSpeed defines the hooks that gather what a module's forward and backward read, and let it go again.
_GATHERING = "deepspeed.runtime.zero.parameter_offload"
# Where it wraps functions for a profiler.
_MARKING = "deepspeed.utils.nvtx"

AT_REST = "its weight is a shard, and nothing gathers it for the layer"


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks that do more than gather its parameters."""
    own = module.__dict__
    return any(not _gathers(hook) for kind in HOOKS if own[kind] for hook in own[kind].values())


def _gathers(hook: Callable) -> bool:
    where = getattr(hook, "__module__", None)
    if where == _MARKING:
        # It wraps without the name of what it wraps.
        where = hook.__closure__[0].cell_contents.__module__
    return where == _GATHERING


def is_unit(module: nn.Module) -> bool:
    """Whether it is FSDP1's wrapper of a module."""
    # By name, for the module is slow to import.
    return type(module).__name__ == "FullyShardedDataParallel"


def own_name(name: str) -> str:
    """The name that a module of a model has without FSDP1's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "")


def is_flattened(t: Tensor) -> bool:
    """Whether it is what FSDP1 leaves of a parameter that is part of a flat one."""
    return "torch.distributed.fsdp" in sys.modules and hasattr(t, "_fsdp_flattened")


def inside(module: nn.Module) -> nn.Module:
    """The module that an FSDP1 unit wraps, or the module itself."""
    return module.module if is_unit(module) else module


def gathered(unit: nn.Module, name: str) -> Tensor:
    """A copy of a parameter of the module in an FSDP1 unit, whole, which can be differentiated: all ranks must ask.

    It is what the unit returns of a forward that does nothing else, so that gathering, freeing and the reduction of the
    gradient are FSDP's.
    """
    module = unit.module
    module.forward = lambda: getattr(module, name).clone()
    try:
        return unit()
    finally:
        del module.forward


def is_dtensor(t: Tensor) -> bool:
    """Whether it lies on the ranks of a mesh, as FSDP2's and tensor parallelism's do."""
    # NOTE: asking a plain tensor for an attribute that it lacks is slow, and most are asked where no engine is loaded.
    return type(t) not in PLAIN and hasattr(t, "device_mesh")


def slices(t: Tensor) -> tuple[slice, ...]:
    """Where this rank's part of a DTensor lies in the whole."""
    [chunk] = t.__create_chunk_list__()
    return tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))


def shape(t: Tensor) -> torch.Size:
    """The shape of a parameter, whether ZeRO-3 has it whole now or not."""
    return getattr(t, "ds_shape", t.shape) if "deepspeed" in sys.modules else t.shape


def is_at_rest(weight: Tensor) -> bool:
    """Whether it is a shard now, of FSDP2 or ZeRO-3."""
    return is_dtensor(weight) or shape(weight) != weight.shape


def within_gathering(model: nn.Module) -> set[nn.Module]:
    """The modules of a model whose shards an engine gathers when the model is called."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    found: set[nn.Module] = set()
    for module in model.modules():
        if fsdp is not None and isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            found.update(module.modules())
        elif "deepspeed" in sys.modules and any(map(_gathers, module._forward_pre_hooks.values())):
            found.add(module)
    return found
