"""Which tile a Triton kernel runs with: that of the measured entry nearest to the shape (`tables`), else the rule's.

Letters: M rows, N columns and K summed features of a product, R rank. `measure` makes the tables.
"""

import torch

from ..device import Device
from . import rule, tables
from .rule import FEW_ROWS, Tile, decoding_tile, narrow_tile, padded, shared_bytes

__all__ = ["FEW_ROWS", "Tile", "decoding_tile", "narrow_tile", "padded", "shared_bytes", "single_launch", "wide_tile"]


def wide_tile(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    tf32: bool,
    aligned: bool,
    device: Device,
    transposed: bool = True,
    count: int = 1,
) -> Tile:
    """The tile of the extended product (M, K)·(K, N) and of the single launch. `aligned`: rows start at 16 bytes.

    `transposed`: the right operand is stored as (N, K), as in forward; in the gradient of x as (K, N). `count` is how
    many such products a launch holds, of which only those of one are measured.
    """
    measured = tables.nearest(dtype, tf32, (M, N, K, R), transposed, device) if aligned and count == 1 else None
    return Tile(*measured["tile"]) if measured else rule.wide_tile(M, N, dtype, tf32, aligned, device, count)


def single_launch(
    M: int,
    N: int,
    K: int,
    R: int,
    dtype: torch.dtype,
    tf32: bool,
    aligned: bool,
    tile: Tile,
    device: Device,
    transposed: bool = True,
) -> bool:
    """Whether the narrow product goes into the launch of the wide one."""
    measured = tables.nearest(dtype, tf32, (M, N, K, R), transposed, device) if aligned else None
    if measured:
        # What was measured holds for tiles of P as wide, which are registers and shared memory.
        return measured["single"] and padded(R) <= padded(measured["shape"][3])
    return rule.single_launch(M, R, dtype, aligned, tile, device)
