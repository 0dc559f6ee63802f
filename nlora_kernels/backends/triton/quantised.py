"""A weight in few bits: as a whole, decoded in one launch, nested scales included, or as the operand of a product."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..quantised import Coded
from . import launch
from .codes import Codes, nibble, scale_of
from .tuning import FEW_ROWS, Tile

# Values of a program.
BLOCK = 2048


class Layout(NamedTuple):
    """All that a launch depends on of a weight that a product decodes; `parts` are the layouts of its tensors."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    parts: tuple[tuple | None, ...]


def layout(weight: Coded) -> Layout:
    nested_block = weight.nested.block if weight.nested else 1
    return Layout(weight.shape, weight.block, nested_block, tuple(map(launch.layout, operand(weight))))


def operand(weight: Coded) -> tuple[Tensor | None, ...]:
    """The tensors of a weight in the order in which kernels take them."""
    nested = weight.nested[:3] if weight.nested else (None, None, None)
    return weight.codes.detach(), weight.values, weight.scales, *nested


def decodes_within(weight, rows: int) -> bool:
    """Whether a product of so many rows decodes its weight: NF4 and FP4, where reading W bounds the time."""
    in_sequence = isinstance(weight, Coded) and weight.kind == "nibbles" and weight.strides is None
    return in_sequence and rows <= FEW_ROWS


def codes_of(weight: Layout, tile: Tile, transposed: bool) -> Codes:
    """What a product by such tiles is compiled for."""
    width, across = weight.shape[1], tile.k if transposed else tile.n
    return Codes(weight.block, weight.nested_block, width % weight.block == 0 and weight.block % across == 0)


def decode(weight: Coded, out: Tensor) -> Tensor:
    """`out`, contiguous and of the weight's shape, as W[i, j] = values[code]·scale rounded to its dtype."""
    row_stride, block_stride = weight.strides or (0, 0)
    count = weight.shape.numel()
    names = "codes", "values", "scales", "nested_values", "nested_scales", "offset"
    launch.run(
        dequantise,
        (triton.cdiv(count, BLOCK),),
        on=out,
        warps=8,
        **dict(zip(names, operand(weight), strict=True)),
        out=out,
        count=count,
        cols=weight.shape[1],
        block=weight.block,
        row_stride=row_stride,
        block_stride=block_stride,
        nested_block=weight.nested.block if weight.nested else 1,
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
        code = nibble(codes, at, inside)
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
    scale = scale_of(scales, nested_values, nested_scales, offset, place, nested_block, inside)
    tl.store(out + at, (value * scale).to(out.dtype.element_ty), mask=inside)
