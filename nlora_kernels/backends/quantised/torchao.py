"""torchao: int8 and float8 of which the weight alone is quantised; every other of its tensors by its `dequantize()`."""

import functools

import torch
from torch import Tensor

from .base import Coded, Opaque, Quantised


def knows(weight: Tensor) -> bool:
    # By name, because torchao is not imported for the sake of a question.
    return type(weight).__module__.startswith("torchao.") and hasattr(weight, "dequantize") and weight.dim() == 2


def obstacle(weight: Tensor) -> str | None:
    if torch.compiler.is_compiling():
        return "its weight is quantised, and compiled code takes the layer of torchao"
    if _changes_input(weight):
        return "torchao quantises its input too"
    if weight.requires_grad:
        return f"its weight is a {type(weight).__qualname__} that trains"
    return None


# Where the tensors of torchao say which attributes they have.
_LISTED = ("tensor_attribute_names", "optional_tensor_data_names", "optional_tensor_attribute_names")


def _changes_input(weight: Tensor) -> bool:
    """Whether one of its attributes for activations, as `act_quant_kwargs` or `activation_quantization`, says so."""
    names = [name for listed in _LISTED for name in getattr(weight, listed, ()) if name.startswith("act")]
    values = [getattr(weight, name, None) for name in names]
    # A dtype may be that of x as it comes.
    return any(v is not None and not (isinstance(v, torch.dtype) and v.itemsize > 1) for v in values)


def view(weight: Tensor) -> Quantised:
    codes, scales, block = (getattr(weight, name, None) for name in ("qdata", "scale", "block_size"))
    readable = isinstance(codes, Tensor) and isinstance(scales, Tensor) and block is not None and codes.is_contiguous()
    if (
        not readable
        or codes.shape != weight.shape
        or scales.dtype not in (torch.float32, torch.bfloat16, torch.float16)
    ):
        return Opaque(weight, weight.dtype)
    (N, K), (height, width) = weight.shape, block
    zero = getattr(weight, "zero_point", None)
    if K % width or height not in (1, N) or (height == N != 1 and width != K) or (zero is not None and zero.any()):
        return Opaque(weight, weight.dtype)
    if codes.dtype == torch.int8:
        kind, values = "int8", None
    elif codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        kind, values, codes = "bytes", _values(codes.dtype, codes.device), codes.view(torch.uint8)
    else:
        return Opaque(weight, weight.dtype)
    if height != 1:
        # One scale for all.
        return Coded(kind, weight.shape, weight.dtype, codes, values, scales, weight.shape.numel())
    strides = (K // width, 1)
    return Coded(kind, weight.shape, weight.dtype, codes, values, scales, width, strides)


@functools.cache
def _values(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(dtype).float()
