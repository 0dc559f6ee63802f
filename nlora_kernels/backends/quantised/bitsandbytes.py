"""bitsandbytes: NF4 and FP4, plain and nested, as stored and as packed anew for CPUs, and int8 with a scale a row."""

import torch
from torch import Tensor, nn

from .base import Coded, Nested, Quantised, Unreadable

_FOUR_BIT = ("Linear4bit", "LinearNF4", "LinearFP4")
_TYPES = ("nf4", "fp4")
INPUT_TOO = "bitsandbytes quantises the input of int8 layers too, on the CPU in eval mode alone"


def _named(kind: type, *names: str) -> bool:
    # By name, because bitsandbytes is not imported for the sake of a question.
    return kind.__name__ in names and kind.__module__.startswith("bitsandbytes.")


def is_layer(kind: type) -> bool:
    return _named(kind, *_FOUR_BIT, "Linear8bitLt")


def knows(weight: Tensor) -> bool:
    return _named(type(weight), "Params4bit", "Int8Params")


def view(weight: Tensor) -> Quantised | None:
    """A Params4bit or Int8Params by itself; None if it holds its values as they are."""
    if not _named(type(weight), "Int8Params"):
        return _four_bit(weight, weight.quant_state)
    if weight.dtype == torch.int8 and weight.SCB is None:
        raise Unreadable("the weight has lost its scales, SCB, to its layer: bitsandbytes moves them there")
    return _eight_bit(weight, weight.SCB)


def of_layer(linear: nn.Module, weight: Tensor) -> Quantised | None:
    if _named(type(linear), *_FOUR_BIT):
        return _four_bit(weight, _state_of(linear, weight))
    # The first forward moves the scales from the weight to the layer, where those of a weight before it may still be.
    scales = getattr(weight, "SCB", None)
    return _eight_bit(weight, linear.state.SCB if scales is None else scales)


def obstacle(linear: nn.Module, weight: Tensor) -> str | None:
    if weight.is_meta:
        return "its weight is on the meta device"
    if torch.compiler.is_compiling():
        return "its weight is quantised, and compiled code takes the layer of bitsandbytes"
    if _named(type(linear), *_FOUR_BIT):
        state = _state_of(linear, weight)
        if state is None and not knows(weight):
            return f"its weight is a {type(weight).__qualname__} of {weight.dtype}, not quantised by bitsandbytes"
        if state is None:
            return "its weight is not quantised yet: bitsandbytes does it when the layer is moved to a device"
        in_first, out_first = ((linear.in_features, linear.out_features)[::step] for step in (1, -1))
        if tuple(getattr(state, "shape", None) or ()) == in_first != out_first:
            return "its weight was quantised as (in, out)"
        return None
    if not _named(type(weight), "Int8Params") or weight.dtype != torch.int8:
        return f"its weight is a {type(weight).__qualname__} of {weight.dtype}, not quantised by bitsandbytes"
    if not weight.is_cpu or not linear.training:
        return INPUT_TOO
    return None


def operands(linear: nn.Module, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if _named(type(linear), *_FOUR_BIT):
        if not linear.compute_type_is_set:
            # As its forward does the first time.
            linear.set_compute_type(x)
            linear.compute_type_is_set = True
        if linear.compute_dtype is not None:
            x = x.to(linear.compute_dtype)
    return x, bias if bias is None else bias.to(x.dtype)


def result(linear: nn.Module, y: Tensor, dtype: torch.dtype) -> Tensor:
    return y.to(dtype) if _named(type(linear), *_FOUR_BIT) else y


def _state_of(linear: nn.Module, weight: Tensor):
    """FSDP leaves it to the layer alone; torch.load to a weight that is no Params4bit any more."""
    state = getattr(weight, "quant_state", None)
    return getattr(linear, "quant_state", None) if state is None else state


def _four_bit(weight: Tensor, state) -> Coded | None:
    if state is None and weight.is_floating_point():
        return None
    kind, shape, block = (getattr(state, name, None) for name in ("quant_type", "shape", "blocksize"))
    if kind not in _TYPES:
        raise Unreadable(f"the quantisation state must be of {' or '.join(_TYPES)}, got {kind!r}")
    if shape is None or len(shape) != 2 or not all(isinstance(size, int) and size >= 0 for size in shape):
        raise Unreadable(f"the quantisation state must say a shape (out, in), got {shape}")
    _check_block("of the quantisation state", block)
    # The dtype of the values that were quantised.
    dtype = getattr(state, "original_dtype", None) or getattr(state, "dtype", None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise Unreadable(f"the quantisation state must say the dtype of the values, got {dtype}")
    # NOTE: an alias, for packing puts other memory into the weight, which is freed then while a backward needs it.
    codes = weight.detach().as_subclass(Tensor)
    if codes.dtype != torch.uint8:
        # Stored as another dtype, as FSDP wants it. What has gaps is said below.
        codes = codes.view(torch.uint8) if codes.is_contiguous() else codes
    N, K = shape
    values, scales = getattr(state, "code", None), getattr(state, "absmax", None)
    if getattr(state, "packing_format_for_cpu", False):
        if N % 32 or K % 2 or K % block:
            raise Unreadable(f"a weight packed for the CPU cannot have shape {tuple(shape)} and block size {block}")
        return Coded("interleaved", shape, dtype, codes, values, scales, block, (1, N))
    nested = None
    if getattr(state, "nested", False):
        inner = getattr(state, "state2", None)
        inner_block = getattr(inner, "blocksize", None)
        _check_block("of the scales", inner_block)
        inner_values, inner_scales = getattr(inner, "code", None), getattr(inner, "absmax", None)
        nested = Nested(inner_values, inner_scales, getattr(state, "offset", None), inner_block)
    return Coded("nibbles", shape, dtype, codes, values, scales, block, None, nested)


def _check_block(which: str, block) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise Unreadable(f"the block size {which} must be a positive integer, got {block!r}")


def _eight_bit(weight: Tensor, scales: Tensor | None) -> Coded | None:
    if weight.dtype != torch.int8:
        return None
    if not isinstance(scales, Tensor):
        raise Unreadable(f"the weight must have its scales, SCB, got {type(scales).__name__}")
    # As bitsandbytes multiplies: once a row.
    scales = scales.to(weight.device).float() * (1 / 127)
    return Coded(
        "int8", weight.shape, torch.float32, weight.detach().as_subclass(Tensor), None, scales, weight.shape[1], (1, 1)
    )
