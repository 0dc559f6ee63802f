"""torchao: NF4, and int8 and float8 of which the weight alone is quantised; every other tensor of it by its own
`dequantize()`, if it has one.
"""

import torch
from torch import Tensor

from ..base import DTYPES
from .base import Coded, Opaque, Quantised


def name_of_type(t: Tensor) -> str | None:
    """Its type, if that is torchao's."""
    # By name, because torchao is not imported for the sake of a question.
    kind = type(t)
    return kind.__name__ if kind.__module__.startswith("torchao.") else None


def knows(weight: Tensor) -> bool:
    """Whether it is a matrix of torchao's whose values can be had."""
    kind = name_of_type(weight)
    return kind is not None and weight.dim() == 2 and type(weight).dequantize is not Tensor.dequantize


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


def result(weight: Tensor, bias: Tensor | None, y: Tensor, dtype: torch.dtype) -> Tensor:
    """y as a layer of nn.Linear with such a weight returns it for an x of `dtype` under autocast."""
    kind = name_of_type(weight)
    if kind == "Int8Tensor":
        return y.to(dtype)
    # They add the bias to what autocast has made of x·Wᵀ.
    added = bias is not None and kind in ("Float8Tensor", "NF4Tensor")
    return y.to(torch.promote_types(y.dtype, bias.dtype)) if added else y


def view(weight: Tensor) -> Quantised:
    if name_of_type(weight) == "NF4Tensor":
        return _nf4(weight)
    codes, scales, block = (getattr(weight, name, None) for name in ("qdata", "scale", "block_size"))
    readable = isinstance(codes, Tensor) and isinstance(scales, Tensor) and block is not None and codes.is_contiguous()
    if not readable or codes.shape != weight.shape or scales.dtype not in DTYPES:
        return Opaque(weight, weight.dtype)
    (N, K), (height, width) = weight.shape, block
    zero = getattr(weight, "zero_point", None)
    if K % width or height not in (1, N) or (height == N != 1 and width != K) or not _is_zero(zero):
        return Opaque(weight, weight.dtype)
    if codes.dtype == torch.int8:
        kind, values = "int8", None
    elif codes.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        # NOTE: made for every call, because one that was made in inference mode or by a mode of fakes serves no other.
        values = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype).float()
        kind, codes = "bytes", codes.view(torch.uint8)
    else:
        return Opaque(weight, weight.dtype)
    if height != 1:
        # One scale for all.
        return Coded(kind, weight.shape, weight.dtype, codes, values, scales, weight.shape.numel())
    strides = (K // width, 1)
    return Coded(kind, weight.shape, weight.dtype, codes, values, scales, width, strides)


def _is_zero(zero: Tensor | None) -> bool:
    if zero is None:
        return True
    try:
        return not zero.any()
    except RuntimeError:
        # A fake has no values.
        return False


def _nf4(weight: Tensor) -> Coded:
    # The scales as torchao rounds them.
    scales = weight.dequantize_scalers(weight.quantized_scalers, weight.quantization_factor, weight.scaler_block_size)
    codes, values = weight.quantized_data, weight.nf4.float()
    return Coded("nibbles", weight.shape, weight.dtype, codes, values, scales, weight.block_size)
