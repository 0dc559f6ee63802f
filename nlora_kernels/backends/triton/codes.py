"""The values of codes on the device: of a weight in few bits as a whole (`quantised`), and of a tile in a product."""

from typing import NamedTuple

import triton
import triton.language as tl


class Codes(NamedTuple):
    """What a product is compiled for that decodes its weight, two codes a byte.

    BLOCK codes share a scale, NESTED_BLOCK scales that are codes a scale of their own. REGULAR: every row of a tile
    begins with a byte, ends within the weight, and has one scale.
    """

    BLOCK: int
    NESTED_BLOCK: int
    REGULAR: bool


@triton.jit
def nibble(codes, at, inside):
    """The codes at places of a weight with two a byte, the first in the high half."""
    pair = tl.load(codes + at // 2, mask=inside, other=0)
    return tl.where(at % 2 == 0, pair >> 4, pair & 15)


@triton.jit
def scale_of(scales, nested_values, nested_scales, offset, place, nested_block, inside):
    """The scales of places in fp32: where they are codes themselves, values[code]·scale + offset."""
    scale = tl.load(scales + place, mask=inside, other=0)
    if nested_values is not None:
        inner = tl.load(nested_values + scale.to(tl.int32), mask=inside, other=0)
        outer = tl.load(nested_scales + place // nested_block, mask=inside, other=0)
        # NOTE: rounded before the sum, as the library does: the compiler would make one multiply-add of both.
        scale = tl.fma(inner, outer, 0.0) + tl.load(offset)
    return scale.to(tl.float32)


@triton.jit
def tile_of(weight, row, col, rows, cols, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr, META: tl.constexpr):
    """W[row : row + BLOCK_ROW, col : col + BLOCK_COL] in fp32, zero outside of W (rows, cols). META: `Codes`."""
    codes, values, scales, nested_values, nested_scales, offset = weight
    i = row + tl.arange(0, BLOCK_ROW)
    # NOTE: a weight may have more values than 32 bits count.
    start = i.to(tl.int64) * cols
    if META.REGULAR:
        pairs = (start + col) // 2
        inside = i < rows
        pair = tl.load(codes + pairs[:, None] + tl.arange(0, BLOCK_COL // 2), mask=inside[:, None], other=0)
        code = tl.reshape(tl.join(pair >> 4, pair & 15), (BLOCK_ROW, BLOCK_COL))
        place = (start + col) // META.BLOCK
        scale = scale_of(scales, nested_values, nested_scales, offset, place, META.NESTED_BLOCK, inside)
        tile = tl.load(values + code.to(tl.int32)) * tl.where(inside, scale, 0.0)[:, None]
    else:
        j = col + tl.arange(0, BLOCK_COL)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        at = start[:, None] + j[None, :]
        code = nibble(codes, at, inside)
        scale = scale_of(scales, nested_values, nested_scales, offset, at // META.BLOCK, META.NESTED_BLOCK, inside)
        tile = tl.load(values + code.to(tl.int32)) * tl.where(inside, scale, 0.0)
    return tile
