"""Which gradients a backward computes, and what it returns."""

from typing import NamedTuple

from torch import Tensor


class Needs(NamedTuple):
    """Which of the six inputs want a gradient."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    lora_N: bool
    bias: bool


class Grads(NamedTuple):
    """One gradient per input, each in its tensor's shape and dtype; None where not asked for."""

    x: Tensor | None = None
    weight: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    lora_N: Tensor | None = None
    bias: Tensor | None = None
