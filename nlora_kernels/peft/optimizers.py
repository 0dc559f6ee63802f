"""PEFT's optimizers for LoRA, which know a parameter by its name, on adapters whose matrices have other names."""

import functools
import inspect
from collections.abc import Callable

from peft import optimizers
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.optim import Optimizer

from .lora2 import LoRA2Linear


def _adapters_with_core(model: nn.Module) -> list[str]:
    found = []
    for module in model.modules():
        if isinstance(module, LoRA2Linear):
            found += module.lora_E
        elif isinstance(module, LoraLayer):
            found += getattr(module, "lora_N", ())
    return sorted(set(found))


def _refusing(create: Callable[..., Optimizer], reason: str) -> Callable[..., Optimizer]:
    @functools.wraps(create)
    def checked(*args, **kwargs) -> Optimizer:
        names = _adapters_with_core(inspect.signature(create).bind(*args, **kwargs).arguments["model"])
        if names:
            raise ValueError(f"{create.__name__} {reason}, and adapter {names[0]!r} has a core between them")
        return create(*args, **kwargs)

    return checked


def _with_lora2(create: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """LoRA+ gives a higher rate to lora_B and to vectors: of LoRA² that is lora_V, the outer matrix as lora_B is, and
    not lora_E."""

    @functools.wraps(create)
    def grouped(*args, **kwargs) -> Optimizer:
        model = inspect.signature(create).bind(*args, **kwargs).arguments["model"]
        optimizer = create(*args, **kwargs)
        layers = [module for module in model.modules() if isinstance(module, LoRA2Linear)]
        low = {id(held.weight) for layer in layers for held in layer.lora_E.values()}
        high = {id(held.weight) for layer in layers for held in layer.lora_V.values()}
        if not layers:
            return optimizer
        # PEFT's order of groups: the lower rate, embeddings, the higher rate, the higher rate without decay.
        slow, _, fast, fast_vectors = optimizer.param_groups
        for source, target, moved in ((fast, slow, low), (fast_vectors, slow, low), (slow, fast, high)):
            target["params"] += [p for p in source["params"] if id(p) in moved]
            source["params"] = [p for p in source["params"] if id(p) not in moved]
        return optimizer

    return grouped


_OUTER = "is for the product of lora_A and lora_B alone"
_ADAPTED = {
    "create_loraplus_optimizer": _with_lora2,
    "create_lorafa_optimizer": functools.partial(_refusing, reason=_OUTER),
    "create_riemannian_optimizer": functools.partial(_refusing, reason=_OUTER),
}

for _name, _adapt in _ADAPTED.items():
    _create = getattr(optimizers, _name)
    for _module in (optimizers, inspect.getmodule(_create)):
        setattr(_module, _name, _adapt(_create))
