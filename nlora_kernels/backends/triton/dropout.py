"""The mask of `backends.base.Dropout` on the device: the same bits, computed for a tile where it lies in registers."""

import triton
import triton.language as tl


@triton.jit
def drop(tile, seed, threshold, row, col, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """A tile that begins at (row, col) of its matrix, zero where an element is dropped; not scaled."""
    word = tl.load(seed)
    low, high = word.to(tl.uint32), (word >> 32).to(tl.uint32)
    i = (row + tl.arange(0, BLOCK_ROW)).to(tl.uint32)
    j = (col + tl.arange(0, BLOCK_COL)).to(tl.uint32)
    i = mix(i ^ mix(low ^ mix(high ^ 1)))
    j = mix(j ^ mix(high ^ mix(low ^ 2)))
    kept = (mix(i[:, None] ^ j[None, :]) >> 1).to(tl.int32) >= threshold
    return tl.where(kept, tile, 0.0)


@triton.jit
def mix(h):
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)
