"""PEFT's optimizers for LoRA, which know a parameter by its name, on adapters whose matrices have other names."""

import inspect
import types

import peft.optimizers
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer

from .lora2 import HasFactors


def create_loraplus_optimizer(model: nn.Module, *args, **kwargs) -> Optimizer:
    """LoRA+ gives a higher rate to lora_B and to vectors: of LoRA² that is lora_V, the outer matrix as lora_B is, and
    not lora_E."""
    optimizer = _ORIGINALS["create_loraplus_optimizer"](model, *args, **kwargs)
    layers = [module for module in model.modules() if isinstance(module, HasFactors)]
    if not layers:
        return optimizer
    low = {id(held.weight) for layer in layers for held in layer.lora_E.values()}
    high = {id(held.weight) for layer in layers for held in layer.lora_V.values()}
    # PEFT's order of groups: the lower rate, embeddings, the higher rate, the higher rate without decay.
    slow, _, fast, fast_vectors = optimizer.param_groups
    for source, target, moved in ((fast, slow, low), (fast_vectors, slow, low), (slow, fast, high)):
        target["params"] += [p for p in source["params"] if id(p) in moved]
        source["params"] = [p for p in source["params"] if id(p) not in moved]
    return optimizer


def create_lorafa_optimizer(model: nn.Module, *args, **kwargs) -> Optimizer:
    _refuse_cores(model, "create_lorafa_optimizer")
    return _ORIGINALS["create_lorafa_optimizer"](model, *args, **kwargs)


def create_riemannian_optimizer(model: nn.Module, *args, **kwargs) -> Optimizer:
    _refuse_cores(model, "create_riemannian_optimizer")
    return _ORIGINALS["create_riemannian_optimizer"](model, *args, **kwargs)


def _refuse_cores(model: nn.Module, function: str) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.lora_E if isinstance(module, HasFactors) else getattr(module, "lora_N", ()):
                raise ValueError(
                    f"{function} is for the product of lora_A and lora_B alone, and adapter {name!r} has a core "
                    "between them"
                )


def _loraplus(*args, **kwargs):
    from nlora_kernels.peft import optimizers

    return optimizers.create_loraplus_optimizer(*args, **kwargs)


def _lorafa(*args, **kwargs):
    from nlora_kernels.peft import optimizers

    return optimizers.create_lorafa_optimizer(*args, **kwargs)


def _riemannian(*args, **kwargs):
    from nlora_kernels.peft import optimizers

    return optimizers.create_riemannian_optimizer(*args, **kwargs)


def _overlay(function: types.FunctionType, other: types.FunctionType) -> types.FunctionType:
    """Lets a function run the code of another, and returns what it was.

    Scripts import PEFT before this package, and hold the function itself: a new one in its module would not reach them.
    """
    original = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    original.__kwdefaults__ = function.__kwdefaults__
    function.__signature__ = inspect.signature(function)
    function.__code__, function.__defaults__, function.__kwdefaults__ = other.__code__, None, None
    return original


_ORIGINALS = {
    name: _overlay(getattr(peft.optimizers, name), other)
    for name, other in (
        ("create_loraplus_optimizer", _loraplus),
        ("create_lorafa_optimizer", _lorafa),
        ("create_riemannian_optimizer", _riemannian),
    )
}
