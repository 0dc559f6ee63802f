"""Fusing the layers of an existing PEFT LoRA model, in place and back."""

from peft.tuners.lora import Linear, ParamWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .experts import FusedExperts
from .layer import FusedLinear

# PEFT's layers of plain LoRA and those that take their place.
_FUSED = {Linear: FusedLinear, ParamWrapper: FusedExperts}


def fuse(model: nn.Module) -> nn.Module:
    """Makes every plain LoRA layer of PEFT on a linear layer compute y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ as one operation.

    Those on the parameters of a mixture's experts are computed as `nlora_kernels.lora_grouped_linear` does. Outputs,
    parameters and state dict stay as they are, and so does everything PEFT can do with the model; `unfuse` takes it
    back. Layers on quantised bases have types of their own in PEFT and are left alone, as is every layer that computes
    fused already.

    Args:
        model: a PEFT model, or any module that has PEFT LoRA layers in it.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no module. ValueError: it has no layer to fuse.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    fuse_layers(model)
    if not any(isinstance(module, tuple(_FUSED.values())) for module in model.modules()):
        raise ValueError("model must have LoRA layers of PEFT on linear layers or experts, got none")
    return model


def fuse_layers(model: nn.Module) -> None:
    """The same of however many layers there are, or none."""
    for module in model.modules():
        fused = _FUSED.get(type(module))
        # The output of nn.MultiheadAttention is never called.
        if fused and not isinstance(module.get_base_layer(), NonDynamicallyQuantizableLinear):
            # A layer's type is its behaviour: no attribute changes, so copies and pickles stay what they are.
            module.__class__ = fused


def unfuse(model: nn.Module) -> nn.Module:
    """Takes `fuse` back and returns the model: its layers are PEFT's own again."""
    own = {fused: plain for plain, fused in _FUSED.items()}
    for module in model.modules():
        if type(module) in own:
            module.__class__ = own[type(module)]
    return model
