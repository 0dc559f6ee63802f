"""The weight of a base layer: reading it in full, and adding to it, dense or quantised."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from accelerate.hooks import AlignDevicesHook
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from ..backends.quantised import Quantised
from ..backends.quantised.torchao import name_of_type
from ..commit import attributes
from ..layers import branch as branches
from . import tensor_parallel


def check_readable(base: nn.Module) -> None:
    """Unreadable, a ValueError, if what belongs to a quantised weight does not fit it."""
    weight = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and not weight.is_meta and not branches.has_dense(base, weight):
        branches.readable_weight(base)


def readable(base: nn.Module) -> Tensor | Quantised:
    """W as (out, in) for reading: gathered from its shards if need be, and in few bits where it is quantised."""
    weight = branches.readable_weight(base)
    if isinstance(weight, Quantised):
        return weight
    weight = weight.detach()
    if not branches.is_dense(weight) and not hasattr(weight, "full_tensor"):
        # By libraries of which PEFT knows how.
        weight = dequantize_module_weight(base).detach()
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
        return weight.T if branches.is_conv1d(base) else weight
    return weight


def read(base: nn.Module) -> Tensor:
    """The same in full and decoded."""
    weight = readable(base)
    return weight.decode() if isinstance(weight, Quantised) else weight


@contextlib.contextmanager
def brought(base: nn.Module) -> Iterator[None]:
    """Has the parameters of an offloaded layer there, as in its forward: at rest they are on the meta device."""
    if not is_offloaded(base):
        yield
        return
    hook = base._hf_hook
    hook.pre_forward(base)
    try:
        yield
    finally:
        hook.post_forward(base, torch.empty(0))


def is_offloaded(base: nn.Module) -> bool:
    """Whether a layer's parameters are elsewhere at rest, and brought for its forward."""
    hook = getattr(base, "_hf_hook", None)
    return isinstance(hook, AlignDevicesHook) and hook.offload


def adding(
    base: nn.Module,
    delta: Tensor,
    sign: int,
    *,
    check: Callable[[Tensor], None] | None = None,
    torchao: Callable | None = None,
) -> tuple[Callable[[], object], ...]:
    """Steps for `commit` that make W ← W + sign·delta in place; a quantised W is quantised again as it was.

    Where tensor parallelism splits W, delta is of the part that this rank has.

    Everything is made and checked here, so that the steps only put it in place.

    Args:
        delta: as W is stored, in any floating dtype. The sum is rounded once, so subtracting what was added brings back
            W up to one rounding, which doing both again does not repeat.
        check: is shown the sum and raises if it must not be.
        torchao: what makes the configuration by which torchao quantised W.

    Raises:
        ValueError: W is not there, or made anew in every forward, or neither dense nor of a kind that can be quantised
            again.
    """
    branches.check_kept(base)
    weight = tensor_parallel.resident(base)
    if weight.is_meta:
        raise ValueError("the base weight must be loaded, got one on the meta device, where offloading leaves it")
    if branches.has_dense(base, weight):
        if check is None:
            return (partial(Tensor.add_, weight.data, delta, alpha=sign),)
        merged = weight.data.clone().add_(delta, alpha=sign)
        check(merged)
        return (partial(Tensor.copy_, weight.data, merged),)
    quantise = _QUANTISERS.get(type(weight).__name__) or (_torchao if name_of_type(weight) else None)
    if quantise is None:
        raise ValueError(
            "merge needs a base weight that is dense or quantised by bitsandbytes or torchao, "
            f"got {type(weight).__qualname__} of {weight.dtype}"
        )
    if quantise is _torchao and torchao is None:
        raise ValueError(
            "merging into a weight of torchao needs the configuration that quantised it: load the base model with "
            "transformers and a TorchAoConfig, which keeps it"
        )
    W = read(base)
    merged = (W.to(torch.promote_types(W.dtype, delta.dtype)) + sign * delta.to(W.device)).to(W.dtype)
    if check is not None:
        check(merged)
    return quantise(base, merged, *((torchao,) if quantise is _torchao else ()))


def _quantise_4bit(base: nn.Module, merged: Tensor) -> tuple[Callable[[], object], ...]:
    old = base.weight
    options = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    # NOTE: quantising writes to the module it is told of, so it is told of none.
    new = type(old)(merged.cpu(), requires_grad=False, **options).to(old.device)
    new.module = old.module
    return _replacing(base, new), attributes(base, quant_state=new.quant_state)


def _quantise_8bit(base: nn.Module, merged: Tensor) -> tuple[Callable[[], object], ...]:
    old = base.weight
    new = type(old)(merged.cpu(), requires_grad=False, has_fp16_weights=old.has_fp16_weights).to(old.device)
    # The next forward takes the scales from the weight.
    return _replacing(base, new), partial(vars(base.state).update, CB=None, SCB=None)


def _torchao(base: nn.Module, merged: Tensor, configuration: Callable) -> tuple[Callable[[], object], ...]:
    from torchao import quantize_

    # Quantising takes a module and replaces its weight.
    stand_in = nn.Linear(merged.shape[1], merged.shape[0], bias=False, device="meta")
    stand_in.weight = nn.Parameter(merged, requires_grad=False)
    quantize_(stand_in, configuration())
    return (_replacing(base, stand_in.weight),)


def _replacing(base: nn.Module, weight: nn.Parameter) -> Callable[[], object]:
    return partial(base._parameters.update, weight=weight)


_QUANTISERS = {"Params4bit": _quantise_4bit, "Int8Params": _quantise_8bit}
