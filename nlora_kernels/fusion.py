"""When the adapter may be fused into its base layer, and what happens where it may not."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from .backends import drops_inside
from .backends.base import PLAIN
from .ops.checks import DTYPES

# The hooks that every module of the process runs.
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)

# Packages whose patched attention and MLP compute LoRA by themselves.
READ_ONLY_A_AND_B = ("unsloth", "axolotl")


def obstacle(linear: nn.Module, other: type | None = None) -> str | None:
    """None if calling `linear` is exactly x·Wᵀ + bias with a dense weight, else why it is not.

    This one rule decides for the base layer and for every adapter matrix that is a module, where `other` is a type that
    is known as well as nn.Linear. It looks at the layer as it is now, so a layer that FSDP gathers for its forward is
    taken then.
    """
    # A subclass (quantised, FSDP2's own, parametrized) is another type.
    kind = type(linear)
    if kind is not nn.Linear and kind is not other and not is_conv1d(linear):
        return f"its type is {kind.__qualname__}, not nn.Linear or Conv1D"
    # This runs in every forward: a look into the dictionary costs a tenth of an attribute that a module lacks.
    own = linear.__dict__
    if "forward" in own:
        return "its forward is replaced on the instance, as offloading and tensor parallelism do"
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "it has hooks"
    if _GLOBAL_HOOKS[0] or _GLOBAL_HOOKS[1] or _GLOBAL_HOOKS[2] or _GLOBAL_HOOKS[3]:
        return "hooks are registered for all modules"
    if own.get("_hf_tp_plan") is not None:
        return "it has a tensor-parallel plan"
    if not is_dense(linear.weight):
        return f"its weight is a {type(linear.weight).__qualname__} of {linear.weight.dtype}, not a dense tensor"
    return None


def dropout_obstacle(linear: nn.Module) -> str | None:
    """None if dropout of the adapter's input belongs inside the operation on a layer's device, else why it does not."""
    device, dtype = linear.weight.device, linear.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if drops_inside(device, dtype):
        return None
    return f"on {device.type} PyTorch's own dropout is as fast as any backend's"


def unfused(model: nn.Module) -> dict[str, str]:
    """{layer name: why it cannot be fused} for the adapter layers of this package in a model, as they are now."""
    layers = ((name, module) for name, module in model.named_modules() if hasattr(type(module), "obstacle"))
    return {name: reason for name, layer in layers if (reason := layer.obstacle())}


def is_dense(weight: Tensor) -> bool:
    """Whether it is a plain floating tensor: not quantised, not a shard."""
    return type(weight) in PLAIN and weight.dtype in DTYPES


def is_conv1d(linear: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, which keeps W as (in, out)."""
    # By name, because transformers is not imported for the sake of a question.
    return type(linear).__name__ == "Conv1D" and type(linear).__module__ == "transformers.pytorch_utils"


def weight_of(linear: nn.Module) -> Tensor:
    """W as (out, in): the weight, or for Conv1D a transposed view of it."""
    return linear.weight.T if is_conv1d(linear) else linear.weight


def resized(x: Tensor, linear: nn.Module) -> Tensor:
    """x as wide as linear takes it, cut or padded by zeros: PEFT pads some of an adapter's matrices for hot swaps."""
    # The attribute is not renewed where the tensor is swapped, and the tensor is flat where FSDP1 has taken it apart.
    size = linear.weight.shape[1] if linear.weight.dim() == 2 else linear.in_features
    width = x.size(-1)
    return x if width == size else F.pad(x, (0, size - width))


def branch(
    x: Tensor, lora_A: Tensor, lora_B: Tensor, lora_N: Tensor | None, scaling: float, dropout: float = 0.0
) -> Tensor:
    """s·((drop(x)·Aᵀ)·Nᵀ)·Bᵀ on its own, to be added to the output of a base layer that cannot be fused."""
    T = F.linear(F.dropout(x.to(lora_A.dtype), dropout), lora_A)
    return scaling * F.linear(T if lora_N is None else F.linear(T, lora_N), lora_B)
