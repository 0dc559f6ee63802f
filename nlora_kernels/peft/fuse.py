"""Fusing the layers of an existing PEFT LoRA model, in place and back."""

import sys

from peft.tuners.lora import ParamWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..ops.checks import check_module
from . import tensor_parallel
from .advice import warn_of_unfused
from .experts import FusedExperts
from .layer import FUSED, FusedLinear

# PEFT's layers of plain LoRA, by module and name, and those that take their place.
_FUSED = {**FUSED, (ParamWrapper.__module__, ParamWrapper.__name__): FusedExperts}


def fuse(model: nn.Module) -> nn.Module:
    """Makes every plain LoRA layer of PEFT on a linear layer compute y = x·Wᵀ + bias + s·(x·Aᵀ)·Bᵀ as one operation.

    Those on the parameters of a mixture's experts are computed as `nlora_kernels.lora_grouped_linear` does; on a CPU,
    bases that bitsandbytes or torchao quantised are decoded inside the operation. Outputs, parameters and state
    dict stay as they are, and so does everything PEFT can do with the model; `unfuse` takes it back. A layer that
    computes fused already is left alone, as are PEFT's layers of other types. One warning names what cannot be fused.

    Args:
        model: a PEFT model, or any module that has PEFT LoRA layers in it.

    Returns:
        The model itself.

    Raises:
        TypeError: model is no module. ValueError: it has no layer to fuse.
    """
    check_module(model)
    fuse_layers(model)
    if not any(isinstance(module, tuple(_FUSED.values())) for module in model.modules()):
        raise ValueError("model must have LoRA layers of PEFT on linear layers or experts, got none")
    warn_of_unfused(model)
    return model


def fuse_layers(model: nn.Module) -> None:
    """The same of however many layers there are, or none."""
    for name, module in model.named_modules():
        fused = _FUSED.get((type(module).__module__, type(module).__name__))
        # The output of nn.MultiheadAttention is never called.
        if fused is None or isinstance(module.get_base_layer(), NonDynamicallyQuantizableLinear):
            continue
        # Variants on quantised weights are merged by PEFT's own layer.
        if fused in (FusedLinear, FusedExperts) or not module.lora_variant:
            # A layer's type is its behaviour: copies and pickles stay what they are.
            module.__class__ = fused
            if fused not in (FusedLinear, FusedExperts):
                module.layer_name = name


def unfuse(model: nn.Module) -> nn.Module:
    """Takes `fuse` back and returns the model: its layers are PEFT's own again.

    Raises TypeError if model is no module, and ValueError for layers of NLoraConfig that tensor parallelism splits:
    PEFT's own have other matrices there.
    """
    check_module(model)
    for name, module in model.named_modules():
        if type(module) in _FUSED.values() and tensor_parallel.is_distributed(module):
            raise ValueError(f"layer {name!r} cannot be unfused: its matrices are those of a tensor-parallel layer")
    return unfuse_layers(model)


def unfuse_layers(model: nn.Module) -> nn.Module:
    """The same of a model that is fused again before it is called."""
    own = {fused: plain for plain, fused in _FUSED.items()}
    for module in model.modules():
        if type(module) in own:
            where, name = own[type(module)]
            module.__class__ = getattr(sys.modules[where], name)
            vars(module).pop("layer_name", None)
    return model
