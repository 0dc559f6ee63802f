"""A weight in few bits, decoded as a whole in one launch, nested scales included."""

import triton
import triton.language as tl
from torch import Tensor

from ..quantised import Coded
from . import launch

# Values of a program.
BLOCK = 2048


def decode(weight: Coded, out: Tensor) -> Tensor:
    """`out`, contiguous and of the weight's shape, as W[i, j] = values[code]·scale rounded to its dtype."""
    nested, (row_stride, block_stride) = weight.nested, weight.strides or (0, 0)
    count = weight.shape.numel()
    launch.run(
        dequantise,
        (triton.cdiv(count, BLOCK),),
        on=out,
        warps=8,
        codes=weight.codes.detach(),
        values=weight.values,
        scales=weight.scales,
        nested_values=nested and nested.values,
        nested_scales=nested and nested.scales,
        offset=nested and nested.offset.view(1),
        out=out,
        count=count,
        cols=weight.shape[1],
        block=weight.block,
        row_stride=row_stride,
        block_stride=block_stride,
        nested_block=nested.block if nested else 1,
        KIND=weight.kind,
        BY_ROWS=weight.strides is not None,
        BLOCK=BLOCK,
    )
    return out


@triton.jit
def dequantise(
    codes,
    values,
    scales,
    nested_values,
    nested_scales,
    offset,
    out,
    count,
    cols,
    block,
    row_stride,
    block_stride,
    nested_block,
    KIND: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # NOTE: a weight may have more values than 32 bits count.
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    row, col = at // cols, at % cols
    if KIND == "nibbles":
        pair = tl.load(codes + at // 2, mask=inside, other=0)
        code = tl.where(at % 2 == 0, pair >> 4, pair & 15)
    elif KIND == "interleaved":
        pair = tl.load(
            codes + ((row // 32 * (cols // 2) + col // 2) * 16 + row % 16) * 2 + col % 2, mask=inside, other=0
        )
        code = tl.where(row % 32 >= 16, pair >> 4, pair & 15)
    else:
        code = tl.load(codes + at, mask=inside, other=0)
    if KIND == "int8":
        value = code.to(tl.float32)
    else:
        value = tl.load(values + code.to(tl.int32), mask=inside, other=0)
    place = row * row_stride + col // block * block_stride if BY_ROWS else at // block
    scale = tl.load(scales + place, mask=inside, other=0)
    if nested_values is not None:
        inner = tl.load(nested_values + scale.to(tl.int32), mask=inside, other=0)
        scale = inner * tl.load(nested_scales + place // nested_block, mask=inside, other=0) + tl.load(offset)
    tl.store(out + at, (value * scale.to(tl.float32)).to(out.dtype.element_ty), mask=inside)
