"""Layers that share x, for the stages that check and time them."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import nlora_kernels as nk
from nlora_kernels import testing

SCALING = 0.5


class Group(NamedTuple):
    M: int
    K: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]  # 0: without an adapter

    def __str__(self) -> str:
        return f"{self.M}x{self.K} to {'+'.join(map(str, self.outs))} r{'+'.join(map(str, self.ranks))}"

    def tensors(self, dtype, adapter_dtype, device) -> tuple[dict[str, Tensor], list[Tensor]]:
        """x, and of every layer i weight·i, lora_A·i, …; and dy of each."""
        tensors, dys = {}, []
        for i, (out, r) in enumerate(zip(self.outs, self.ranks, strict=True)):
            options = {"dtype": dtype, "adapter_dtype": adapter_dtype, "device": device}
            p = testing.problem(self.M, self.K, out, r or 1, bias=i == 0, seed=i, **options)
            tensors.setdefault("x", p.x)
            names = testing.TENSORS[1:] if r else ("weight", "bias")
            tensors |= {f"{name}{i}": t for name in names if (t := getattr(p, name)) is not None}
            dys.append(p.dy)
        return tensors, dys


def layers(tensors: dict[str, Tensor]):
    """(weight, (A, B, N) or None, bias or None) of each."""
    for i in range(sum(name.startswith("weight") for name in tensors)):
        adapter = tuple(tensors[f"{name}{i}"] for name in ("lora_A", "lora_B", "lora_N") if f"{name}{i}" in tensors)
        yield tensors[f"weight{i}"], adapter or None, tensors.get(f"bias{i}")


def together(x, backend, **tensors) -> tuple[Tensor, ...]:
    weights, adapters, biases = zip(*layers(tensors), strict=True)
    return nk.lora_group_linear(x, weights, adapters, biases, scaling=SCALING, backend=backend)


def apart(x, layer: Callable, scaling: float = SCALING, **tensors) -> tuple[Tensor, ...]:
    return tuple(
        F.linear(x, weight, bias) if adapter is None else layer(x, weight, *adapter, bias, scaling=scaling)
        for weight, adapter, bias in layers(tensors)
    )


def frozen(x, **tensors) -> tuple[Tensor, ...]:
    return tuple(F.linear(x, weight, bias) for weight, _, bias in layers(tensors))


def beside(function: Callable, x, **tensors) -> Tensor:
    """The outputs as one matrix."""
    return torch.cat(function(x, **tensors), -1)


def budget(tensors: dict[str, Tensor], dys: Sequence[Tensor], wrt=None) -> testing.Budget:
    plain, base = (functools.partial(apart, layer=testing.plain_linear, scaling=s) for s in (SCALING, 0.0))
    of = (functools.partial(beside, function) for function in (plain, base))
    return testing.Budget(*of, tensors, torch.cat(list(dys), -1), wrt)
