"""Frozen weights in few bits: what an operation needs of them (`Quantised`), and the formats that are known.

A format is one file with a function `view(weight)` that says where codes and scales lie, as `Coded`, or a class of its
own; and a line in `view` below, and in `of_layer` where it has layers of its own.
"""

import torch
from torch import Tensor, nn

from ..base import PLAIN
from . import bitsandbytes, torchao
from .base import Coded, Opaque, Quantised, Unreadable, restored, shared_memory
from .bitsandbytes import INPUT_TOO

__all__ = [
    "INPUT_TOO",
    "Coded",
    "Opaque",
    "Quantised",
    "Unreadable",
    "is_layer",
    "obstacle",
    "of_layer",
    "operands",
    "restored",
    "result",
    "shared_memory",
    "view",
]


def view(weight: Tensor) -> Quantised | None:
    """A weight of a quantisation library as what multiplies with it sees it; None for one that is not quantised.

    Raises Unreadable, a ValueError, where what belongs to the weight is missing or does not fit it.
    """
    if type(weight) in PLAIN or isinstance(weight, Quantised):
        return None if type(weight) in PLAIN else weight
    if bitsandbytes.knows(weight):
        return bitsandbytes.view(weight)
    if torchao.knows(weight):
        return torchao.view(weight)
    # Of DTensor and other subclasses `dequantize` is that of every tensor.
    if isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize and weight.dim() == 2:
        return Opaque(weight, weight.dtype)
    return None


def is_layer(kind: type) -> bool:
    """Whether layers of exactly this type are x·Wᵀ + bias with a weight in few bits, as far as `obstacle` says so."""
    return bitsandbytes.is_layer(kind)


def obstacle(linear: nn.Module, weight: Tensor) -> str | None:
    """None if a layer, by `is_layer` or an nn.Linear, is x·Wᵀ + bias with a weight that `of_layer` reads, else why."""
    if bitsandbytes.is_layer(type(linear)):
        return bitsandbytes.obstacle(linear, weight)
    if torchao.knows(weight):
        return torchao.obstacle(weight)
    return f"its weight is a {type(weight).__qualname__} of {weight.dtype}, not a dense tensor"


def of_layer(linear: nn.Module, weight: Tensor) -> Quantised | None:
    """The weight of such a layer; None if it holds its values as they are."""
    return bitsandbytes.of_layer(linear, weight) if bitsandbytes.is_layer(type(linear)) else view(weight)


def operands(linear: nn.Module, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and bias in the dtype in which such a layer computes."""
    return bitsandbytes.operands(linear, x, bias) if bitsandbytes.is_layer(type(linear)) else (x, bias)


def result(linear: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
    """y in the dtype in which such a layer returns it for an x of `dtype`, autocast or not."""
    if bitsandbytes.is_layer(type(linear)):
        return bitsandbytes.result(linear, y, dtype)
    if type(linear.weight) in PLAIN:
        return y
    return torchao.result(linear.weight, linear.bias, y, dtype)
