"""What an adapter adds to a linear layer, and when the two are computed as one operation."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.parameter import is_lazy

from ..backends import Call, Factors, drops_inside, preferred, quantised
from ..backends.base import PLAIN
from ..backends.native import _C
from ..backends.quantised import Quantised
from ..internals import autocasts
from ..ops import lora2_core
from ..ops.api import frozen_linear, fused_linear
from ..ops.checks import DTYPES, check_module
from . import engines


class Branch(NamedTuple):
    """s·((drop(x)·Aᵀ)·Nᵀ)·Bᵀ with A (r, in), N (r, r) or None, and B (out, r)

    Of the experts of a mixture these are stacked, A (experts, r, in) and so on, and it has no dropout.
    """

    A: Tensor
    N: Tensor | None
    B: Tensor
    scaling: float
    # The probability with which an element of x is dropped.
    dropout: float = 0.0

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of its matrices, from that by which x is multiplied to that which gives the output."""
        return "A", "N", "B"

    @property
    def collapsed(self) -> "Branch":
        """With its core as one matrix, which it is."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        """The branch on its own, in the adapter's dtype."""
        T = F.linear(F.dropout(x.to(self.A.dtype), self.dropout), self.A)
        return self.scaling * F.linear(T if self.N is None else F.linear(T, self.N), self.B)

    def multiplied(self, x: Tensor, weight: Tensor | Quantised, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias and the branch, as one operation."""
        A, N, B, scaling, dropout = self
        return fused_linear(Call(x, weight, A, B, N, bias, scaling), dropout)

    def product(self, dtype: torch.dtype | None = None) -> Tensor:
        """s·B·N·A, (out, in), in `dtype`, by default the adapter's; half precision is rounded once, at the end."""
        dtype = dtype or self.B.dtype
        computed = torch.promote_types(dtype, torch.float32)
        A, N, B = (None if t is None else t.to(computed) for t in self[:3])
        return ((B if N is None else B @ N) @ A * self.scaling).to(dtype)


class Lora2Branch(NamedTuple):
    """s·((drop(x)·vᵀ)·Cᵀ)·Vᵀ  with  C = U·diag(E ⊙ mask)·u"""

    v: Tensor
    u: Tensor
    E: Tensor
    U: Tensor
    V: Tensor
    mask: Tensor
    scaling: float
    dropout: float = 0.0

    @property
    def matrices(self) -> tuple[str, ...]:
        """The names of what trains, from that by which x is multiplied to that which gives the output."""
        return "v", "u", "E", "U", "V"

    @property
    def collapsed(self) -> Branch:
        """The same with the core as one matrix."""
        return Branch(self.v, lora2_core(self.u, self.E, self.U, self.mask), self.V, self.scaling, self.dropout)

    def multiplied(self, x: Tensor, weight: Tensor | Quantised, bias: Tensor | None) -> Tensor:
        """x·Wᵀ + bias and the branch, as one operation."""
        v, u, E, U, V, mask, scaling, dropout = self
        return fused_linear(Call(x, weight, v, V, Factors(u, E, U, mask), bias, scaling), dropout)


def together(branches: Sequence[Branch | Lora2Branch]) -> Branch | Lora2Branch:
    """Several, without dropout, as one of summed rank, which adds what all of them add.

    A = [A₁; A₂; …]  N = diag(s₁·N₁, s₂·N₂, …)  B = [B₁, B₂, …]  s = 1

    A gradient reaches those matrices that require one. What is summed is put together anew for every call.
    """
    if len(branches) == 1:
        return branches[0]
    A, N, B, scalings, _ = zip(*[branch.collapsed for branch in branches], strict=True)
    core, scaling = None, scalings[0]
    if any(n is not None for n in N) or any(s != scaling for s in scalings):
        core, scaling = _diagonal(list(map(_scaled_core, A, N, scalings))), 1.0
    return Branch(torch.cat(A, -2), core, torch.cat(B, -1), scaling)


def check_initialised(linear: nn.Module, name: str = "weight") -> None:
    """ValueError for a lazy layer that was not called yet."""
    if any(map(is_lazy, linear.parameters(recurse=False))):
        raise ValueError(f"{name} must be initialised, got a {type(linear).__qualname__} that was not called yet")


def decodes(linear: nn.Module, x: Tensor) -> bool:
    """Whether a layer's own product of x, without an adapter, is an operation that decodes a weight in few bits."""
    return is_plain(x) and not has_dense(linear, tensor_of(linear, "weight")) and obstacle(linear) is None


def fused(branch: Branch | Lora2Branch | None, x: Tensor, linear: nn.Module) -> Tensor:
    """The output of a linear layer and a branch as one operation; without a branch, of a layer that `decodes`."""
    dtype, (x, weight, bias) = x.dtype, operands(linear, x)
    y = frozen_linear(x, weight, bias) if branch is None else branch.multiplied(x, weight, bias)
    return y if y.dtype is dtype else quantised.result(linear, y, dtype)


def _scaled_core(A: Tensor, N: Tensor | None, scaling: float) -> Tensor:
    """s·N, or without N that of the identity, in fp32 at least: rounded to half precision it would be rounded twice."""
    if N is None:
        dtype = torch.promote_types(A.dtype, torch.float32)
        return scaling * torch.eye(A.shape[-2], dtype=dtype, device=A.device).expand(*A.shape[:-1], -1)
    return scaling * N.to(torch.promote_types(N.dtype, torch.float32))


def _diagonal(cores: list[Tensor]) -> Tensor:
    """The matrix that has these along its diagonal, or stacks of such matrices."""
    ends = list(itertools.accumulate(core.shape[-1] for core in cores))
    rows = [F.pad(core, (end - core.shape[-1], ends[-1] - end)) for core, end in zip(cores, ends, strict=True)]
    return torch.cat(rows, -2)


def obstacle(linear: nn.Module) -> str | None:
    """None if calling `linear` is exactly x·Wᵀ + bias with a weight that is dense or can be decoded, else why not.

    It looks at the layer as it is now, so a layer that FSDP or ZeRO-3 gathers for its forward is taken then.
    """
    # NOTE: this is asked in every forward: what is not kept cannot be out of date.
    if nn_module._has_any_global_hook():
        return "hooks are registered for all modules"
    # The compiler looks into no extension.
    if _C is not None and not torch.compiler.is_compiling() and _C.is_plain(linear, (nn.Linear,)):
        return None
    return obstacle_of(linear)


def plain_weights(
    layer: nn.Module, adapter: str, mappings: tuple[str, ...], types: tuple[type, ...], base: bool
) -> list[Tensor] | None:
    """The weights of an adapter, from those of these mappings of a PEFT layer that have it.

    None unless at a look `obstacle_of` is None for the modules that hold them, and for the base layer if it is asked.
    """
    if _C is None or torch.compiler.is_compiling() or nn_module._has_any_global_hook():
        return None
    return _C.plain_weights(layer, adapter, mappings, types, base)


def obstacle_of(linear: nn.Module, types: tuple[type, ...] = (nn.Linear,)) -> str | None:
    """The same of a module among several, the base layer or a matrix of an adapter, of one of the types or Conv1D."""
    # A subclass (FSDP2's own, parametrized) is another type.
    kind = type(linear)
    known = kind in types or getattr(kind, "computes_linear", False) or is_conv1d(linear)
    if not (known or quantised.is_layer(kind)):
        return f"its type is {kind.__qualname__}, not nn.Linear or Conv1D"
    if reason := altered(linear):
        return reason
    weight = tensor_of(linear, "weight")
    if engines.is_at_rest(weight):
        return engines.AT_REST
    if has_dense(linear, weight):
        return None
    if weight.device.type not in ("cpu", "meta") and not preferred():
        return "its weight is quantised, which on GPUs the kernels take where NLORA_BACKEND names one of theirs"
    return quantised.obstacle(linear, weight)


def altered(module: nn.Module) -> str | None:
    """None if calling a module is its forward and no more, else what was done to it."""
    # A look into the dictionary costs a tenth of an attribute that a module lacks.
    own = module.__dict__
    if "forward" in own:
        return "its forward is replaced on the instance, as offloading and tensor parallelism do"
    if engines.foreign_hooks(module):
        return "it has hooks"
    if own.get("_hf_tp_plan") is not None:
        return "it has a tensor-parallel plan"
    return None


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling a module is calling the forward of its class."""
    own = module.__dict__
    return (
        "forward" not in own and not any([own[name] for name in engines.HOOKS]) and not nn_module._has_any_global_hook()
    )


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor of PyTorch's own with rows."""
    return type(x) in PLAIN and not x.is_nested


def dropout_obstacle(linear: nn.Module) -> str | None:
    """None if dropout of the adapter's input belongs inside the operation on a layer's device, else why it does not."""
    weight = linear.weight
    device, dtype = weight.device, weight.dtype if is_dense(weight) else torch.float32
    if autocasts(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if drops_inside(device, dtype):
        return None
    return f"on {device.type} PyTorch's own dropout is as fast as any backend's"


def unfused(model: nn.Module) -> dict[str, str]:
    """{layer name: why its forward is not one operation} for the adapter layers of this package in a model.

    As they are now: with the adapters that are active, hooks and wrappers on any of their matrices, and in train mode
    their dropout. Shards that FSDP or ZeRO-3 gathers when the model is called are taken to be gathered.
    """
    check_module(model)
    found = {}
    gathering = engines.within_gathering(model)
    for name, layer in model.named_modules():
        reason = layer.obstacle() if hasattr(type(layer), "obstacle") else None
        if reason and not (layer in gathering and reason.endswith(engines.AT_REST)):
            found[name] = reason
    return found


def is_dense(weight: Tensor) -> bool:
    """Whether it is a plain floating tensor: not quantised, not a shard."""
    return type(weight) in PLAIN and weight.dtype in DTYPES


def has_dense(linear: nn.Module, weight: Tensor) -> bool:
    """Whether a layer's weight is a plain floating tensor of its values."""
    # FSDP has the codes of bitsandbytes' layers as such a tensor.
    kind = type(linear)
    return is_dense(weight) and (kind is nn.Linear or not quantised.is_layer(kind))


def made_of(module: nn.Module, name: str = "weight") -> str | None:
    """None if a module keeps a parameter, else of what it makes it in every forward, where a change in place is lost.

    As torch.nn.utils does, by parametrizations, weight_norm, spectral_norm and pruning, and PEFT's wrapper of
    trainable tokens.
    """
    if name in module._parameters:
        return None
    if name in module._modules.get("parametrizations", ()):
        return f"parametrizations.{name}"
    if parts := [part for part in module._parameters if part.startswith(f"{name}_")]:
        return " and ".join(parts)
    kept = name in vars(module) or name in module._buffers or not hasattr(module, name)
    return None if kept else f"what {type(module).__qualname__} holds"


def can_be_added_to(linear: nn.Module, weight: Tensor) -> bool:
    """Whether a layer's weight is a plain floating tensor that it keeps."""
    return is_dense(weight) and made_of(linear) is None


def check_kept(module: nn.Module, name: str = "weight") -> None:
    """ValueError if a module makes a parameter anew in every forward."""
    if parts := made_of(module, name):
        raise ValueError(
            f"merge needs a base {name} that its layer keeps, got one made of {parts} in every forward: undo that, "
            "as remove_weight_norm of torch.nn.utils and the like do"
        )


def is_conv1d(linear: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, which keeps W as (in, out)."""
    # By name, because transformers is not imported for the sake of a question.
    return type(linear).__name__ == "Conv1D" and type(linear).__module__ == "transformers.pytorch_utils"


def operands(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | Quantised, Tensor | None]:
    """(x, W (out, in), bias) as a layer multiplies them.

    Raises ValueError where what belongs to a quantised weight does not fit it.
    """
    weight, bias = tensor_of(linear, "weight"), tensor_of(linear, "bias")
    if has_dense(linear, weight):
        return x, weight if type(linear) is nn.Linear else weight_of(linear), bias
    x, bias = quantised.operands(linear, x, bias)
    return x, quantised.of_layer(linear, weight).to(x.dtype), bias


def readable_weight(linear: nn.Module) -> Tensor | Quantised:
    """W (out, in) for reading: quantised, it can be decoded in parts. None of it is a copy.

    Raises ValueError as `operands` does.
    """
    weight = tensor_of(linear, "weight")
    if has_dense(linear, weight):
        return weight_of(linear)
    found = quantised.of_layer(linear, weight)
    return weight if found is None else found


def weight_of(linear: nn.Module) -> Tensor:
    """W as (out, in): the weight, or for Conv1D a transposed view of it."""
    weight = tensor_of(linear, "weight")
    return weight.T if type(linear) is not nn.Linear and is_conv1d(linear) else weight


def tensor_of(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, from the dictionary of parameters unless FSDP1 has put something else in its place.

    That of a module which is an FSDP1 unit by itself is gathered.
    """
    parameters = module._parameters
    if name in parameters:
        return parameters[name]
    return engines.gathered(module, name) if engines.is_unit(module) else getattr(module, name)


def local(t: Tensor) -> Tensor:
    """The part of a DTensor that this rank has; other tensors as they are."""
    return t if type(t) in PLAIN or not hasattr(t, "to_local") else t.to_local()


def resized(x: Tensor, linear: nn.Module) -> Tensor:
    """x as wide as linear takes it, cut or padded by zeros: PEFT pads some of an adapter's matrices for hot swaps."""
    # The attribute is not renewed where the tensor is swapped, and the tensor is flat where FSDP1 has taken it apart.
    size = linear.weight.shape[1] if linear.weight.dim() == 2 else linear.in_features
    width = x.size(-1)
    return x if width == size else F.pad(x, (0, size - width))
