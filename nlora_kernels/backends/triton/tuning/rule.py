"""The rule: a wave model. Among the tiles that the device can run, that whose waves of programs cost least.

Letters: M rows, N columns and K summed features of a product, R rank.
"""

import math
from typing import NamedTuple

import torch

from ..device import Device


class Tile(NamedTuple):
    """Rows and columns of a program's tile, features it sums over at a time, warps, and stages of its pipeline."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


# What Triton takes beside the stages of operands: barriers, and scratch for the layouts of what is stored.
RESERVED = 4_096

# Tiles for 16-bit operands and the share of the matrix units' peak that each is expected to reach.
WIDE_TILES = {
    Tile(128, 256, 64, 8, 4): 1.0,
    Tile(128, 256, 64, 8, 3): 0.98,
    Tile(128, 128, 64, 8, 4): 0.86,
    Tile(128, 128, 32, 8, 4): 0.80,
    Tile(64, 128, 64, 4, 4): 0.70,
    Tile(64, 64, 64, 4, 4): 0.50,
}
# Operands whose rows are not 16-byte aligned are read element by element, and their addresses fill registers.
RAGGED_TILES = {Tile(64, 64, 32, 8, 2): 1.0, Tile(32, 32, 32, 4, 2): 0.5}
# Few rows: the weight is read once whatever the tile, so many small programs with deep pipelines read it fastest.
DECODE_TILES = {Tile(m, n, 128, 4, stages): n / 64 for m in (16, 32, 64) for n, stages in ((32, 5), (64, 4))}
# fp32 without TF32 runs on the scalar units, whose operands fill registers first.
EXACT_TILES = {Tile(64, 64, 16, 8, 3): 1.0, Tile(32, 64, 16, 4, 3): 0.8, Tile(16, 32, 16, 4, 3): 0.4}
TF32_TILES = {Tile(128, 128, 32, 8, 3): 1.0, Tile(64, 64, 32, 4, 3): 0.6, Tile(16, 64, 32, 4, 3): 0.2}

# Features of a weight in few bits that are decoded at a time.
DECODED = 64
# Up to here the weight is read once or twice, and reading it bounds the time: decoding.
FEW_ROWS = 64


def wide_tile(M: int, N: int, dtype: torch.dtype, tf32: bool, aligned: bool, device: Device, count: int = 1) -> Tile:
    """The tile of `count` extended products (M, K)·(K, N), or of the single launch. `aligned`: rows start at 16 B."""
    found = candidates(M, dtype, tf32, aligned, device)
    return min(found.items(), key=lambda c: _cost(M, N, *c, device, count))[0]


def decoding_tile(
    M: int, N: int, block: int, dtype: torch.dtype, tf32: bool, aligned: bool, device: Device, transposed: bool
) -> Tile:
    """The tile of the extended product of few rows with a weight in few bits, of which `block` codes share a scale.

    All rows in one, so that W is decoded once. What is decoded passes through registers, so no tile is deeper than
    DECODED; and along the rows of W, over which `transposed` sums, none is wider than a block, so that each of its rows
    has one scale. `aligned`: rows of x start at 16 bytes.
    """
    found = candidates(M, dtype, tf32, aligned, device)
    tall = {tile: share for tile, share in found.items() if tile.m >= M} or found
    tile = min(tall.items(), key=lambda c: (c[0].m, _cost(M, N, *c, device, 1)))[0]
    widest = max(16, block & -block)
    n, k = (tile.n, min(widest, DECODED)) if transposed else (min(tile.n, widest), DECODED)
    return tile._replace(n=n, k=min(tile.k, k))


def narrow_tile(
    M: int,
    N: int,
    K: int,
    columns: int,
    dtype: torch.dtype,
    tf32: bool,
    aligned: bool,
    device: Device,
    right: torch.dtype | None = None,
    count: int = 1,
) -> tuple[Tile, int]:
    """The tile of `count` products that have a short side, and into how many parts their sums over K are split.

    `columns` is the least width of the tile: all of N where a core follows. `right` is the dtype in which the right
    operand is stored where it is not `dtype`. The tile is as large as registers allow,
    for these products read more than they compute, and the sum is split until every processor has a program.
    """
    width = max(columns, min(128, padded(N)))
    if dtype == torch.float32 and not tf32:
        tile = Tile(min(padded(M), 32, max(16, 2048 // width)), width, 16, 8, 3)
    elif not aligned:
        width = max(columns, min(64, width))
        tile = Tile(min(padded(M), 64 if width <= 64 else 32), width, 32, 8, 2)
    else:
        # Without asynchronous matrix units the accumulators of four warps leave too few registers for the operands.
        asynchronous = device.capability >= 90
        height, depth = 64 if width > 64 else 128, 32 if dtype == torch.float32 else 64
        warps = 4 if asynchronous and width <= 128 else 8
        tile = Tile(min(padded(M), height), width, depth, warps, 3 if asynchronous else 2)
    while tile.stages > 1 and shared_bytes(tile, dtype, right) > device.shared:
        tile = tile._replace(stages=tile.stages - 1)
    tiles = count * math.ceil(M / tile.m) * math.ceil(N / tile.n)
    splits = 1
    while tiles * splits < device.processors and K / (2 * splits) >= 4 * tile.k and splits < 64:
        splits *= 2
    return tile, splits


def single_launch(M: int, R: int, dtype: torch.dtype, aligned: bool, tile: Tile, device: Device) -> bool:
    """Whether the narrow product goes into the launch of the wide one: where it then fills the last wave.

    Its items are as many rows as a tile by R, so they pay from many rows on. Two kinds of tile in one program need its
    registers: up to a rank of 128 on Hopper, of 32 on Blackwell, and not on Ampere.
    """
    widest = {9: 128, 10: 32}.get(device.capability // 10, 0)
    return aligned and dtype != torch.float32 and R <= widest and M >= 2048 and tile.m >= 64


def padded(n: int) -> int:
    """The power of two, 16 at least, that holds n: what a tile of n rows or columns is padded to."""
    return max(16, 1 << (n - 1).bit_length())


def candidates(M: int, dtype: torch.dtype, tf32: bool, aligned: bool, device: Device) -> dict[Tile, float]:
    if dtype == torch.float32 and not tf32:
        tiles = EXACT_TILES
    elif not aligned:
        tiles = RAGGED_TILES
    elif dtype == torch.float32:
        tiles = TF32_TILES
    else:
        tiles = DECODE_TILES if M <= FEW_ROWS else WIDE_TILES
    fitting = {
        tile: share
        for tile, share in tiles.items()
        if shared_bytes(tile, dtype) <= device.shared and (device.capability >= 90 or tile.m * tile.n <= 128 * 128)
    }
    return fitting or {Tile(32, 32, 32, 4, 2): 1.0}


def shared_bytes(tile: Tile, dtype: torch.dtype, right: torch.dtype | None = None) -> int:
    """What a product takes of shared memory whose operands, or the left one alone, are of `dtype`."""
    return tile.stages * tile.k * (tile.m * dtype.itemsize + tile.n * (right or dtype).itemsize) + RESERVED


def _cost(M: int, N: int, tile: Tile, share: float, device: Device, count: int) -> tuple[float, int]:
    """Waves times the work of a tile; among equals the smaller tile, whose last wave wastes less."""
    waves = math.ceil(count * math.ceil(M / tile.m) * math.ceil(N / tile.n) / device.processors)
    return waves * tile.m * tile.n / share, tile.m * tile.n
