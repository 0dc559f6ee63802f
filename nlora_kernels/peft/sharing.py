"""Which forward of a module is under way whose layers share x, and what has been computed of it in advance.

The first layer of a group that is called computes all of it; the others find their output here when they are called
with the same x. What nobody asks for is forgotten when the module's forward ends.
"""

import threading
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import internals
from ..layers.branch import Branch, Lora2Branch
from ..ops import lora_group_linear
from ..ops.group import Projection


class _Place:
    """Where the innermost forward is noted."""

    forward = None


class _Places(threading.local, _Place):
    """The same for every thread."""


# NOTE: the compiler traces no thread's own.
_eager, _traced = _Places(), _Place()


def current():
    """The forward under way, or None."""
    if torch.compiler.is_compiling():
        return _traced.forward
    return _eager.forward


def enter(forward):
    """Makes it the one under way; returns the one before."""
    place = _traced if torch.compiler.is_compiling() else _eager
    before = place.forward
    place.forward = forward
    return before


class Taken(NamedTuple):
    """What a layer computes of an x: x·weightᵀ + bias, and what its adapter adds, if it has one, which is made of the
    tensors that are `held`."""

    weight: Tensor
    bias: Tensor | None
    branch: Branch | Lora2Branch | None = None
    held: tuple[Tensor, ...] = ()

    def projection(self) -> Projection:
        if self.branch is None:
            return Projection(self.weight, None, self.bias)
        A, N, B, scaling, dropout = self.branch.collapsed
        return Projection(self.weight, (A, B) if N is None else (A, B, N), self.bias, scaling, dropout)

    def facts(self) -> tuple:
        """Equal to those of a later moment, while these tensors are there, where the layer computes the same."""
        tensors = [self.weight, *self.held] if self.bias is None else [self.weight, self.bias, *self.held]
        # A change in place is counted, and what takes the place of a tensor has another address.
        found = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        return found, self.branch and self.branch[-2:]


def taken(layer: nn.Module, x: Tensor) -> Taken | None:
    """That of a layer now, and None of what is no adapter layer any more."""
    return layer.taken(x) if hasattr(type(layer), "taken") else None


class Group:
    """The layers that share x in one forward of their module."""

    def __init__(self, members: tuple[nn.Module, ...]):
        self.members = members
        self.outputs: list[Tensor | None] = [None] * len(members)
        self.started = False
        self.x = self.mode = self.values = None
        # What was computed of each member, and its facts then.
        self.parts: list[tuple[Taken, tuple]] | None = None

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """That of a member, or None if it is to compute it alone."""
        for index, member in enumerate(self.members):
            if member is layer:
                return self._start(index, x) if not self.started else self._take(index, x)
        return None

    def _take(self, index: int, x: Tensor) -> Tensor | None:
        if self.outputs[index] is None or x is not self.x or _mode(x) != self.mode:
            return None
        if self.values is not None and not torch.equal(_bits(x), self.values):
            return None
        y, self.outputs[index] = self.outputs[index], None
        if not self._is_as_it_was(index, x):
            y = None
        if not self.left:
            self.x = self.values = self.parts = None
        return y

    def _is_as_it_was(self, index: int, x: Tensor) -> bool:
        """Whether a member would compute now what was computed for it."""
        # The compiler knows of no addresses.
        if self.parts is None:
            return True
        now = taken(self.members[index], x)
        return now is not None and now.facts() == self.parts[index][1]

    def _start(self, index: int, x: Tensor) -> Tensor | None:
        # There nothing is gained by it, and wrapped tensors have no address to be known by.
        if internals.composing():
            return None
        counts = torch.compiler.is_compiling() or not x.is_inference()
        # To compare values would wait for any other device.
        if not counts and not x.is_cpu:
            return None
        found = [taken(member, x) for member in self.members]
        able = [i for i, part in enumerate(found) if part is not None and _multiplies(x, part)]
        if index not in able or len(able) < 2:
            return None
        self.started, self.x, self.mode = True, x, _mode(x)
        self.values = None if counts else _bits(x).clone()
        if not torch.compiler.is_compiling():
            self.parts = [part and (part, part.facts()) for part in found]
        parts = [found[i].projection() for i in able]
        weights, adapters, biases, scalings, drops, _ = zip(*parts, strict=True)
        ys = lora_group_linear(x, weights, adapters, biases, scaling=scalings, dropout=drops)
        for i, y in zip(able, ys, strict=True):
            self.outputs[i] = y
        y, self.outputs[index] = self.outputs[index], None
        return y

    @property
    def left(self) -> list[int]:
        """The members that have not been called with x."""
        return [i for i, y in enumerate(self.outputs) if y is not None]


class Forward:
    """One forward of a module with groups."""

    def __init__(self, groups: list[Group]):
        self.groups = groups

    def output(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        for group in self.groups:
            y = group.output(layer, x)
            if y is not None:
                return y
        return None


class Watch:
    """A forward of a model that notes the first x of every layer."""

    def __init__(self):
        self.seen: dict[nn.Module, tuple[Tensor, int]] = {}

    def output(self, layer: nn.Module, x: Tensor) -> None:
        self.seen.setdefault(layer, (x, 0 if x.is_inference() else x._version))


class Probe:
    """A forward in which layers compute without their adapters, and which notes what came and went."""

    def __init__(self):
        self.calls: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def output(self, layer: nn.Module, x: Tensor) -> Tensor:
        y = layer.base(x)
        self.calls[layer] = x, y
        return y


def _mode(x: Tensor) -> tuple:
    """What x is computed with."""
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if internals.autocasts(device) else None
    of = torch.is_grad_enabled(), x.requires_grad, cast
    # In inference mode a tensor does not count its changes, and the compiler knows of no count.
    if torch.compiler.is_compiling() or x.is_inference():
        return of
    return *of, x._version


def _bits(x: Tensor) -> Tensor:
    """x as numbers of which each is equal to itself."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _multiplies(x: Tensor, part: Taken) -> bool:
    """Whether a layer can be called with x; one that cannot is about to get another."""
    weight, bias = part.weight, part.bias
    as_they_are = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    fits = x.dim() > 0 and x.shape[-1] == weight.shape[1] and x.device == weight.device
    return fits and (as_they_are or internals.autocasts(x.device.type))
