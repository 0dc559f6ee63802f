"""The adapter in the dtype of the product, in one launch, for kernels that have no registers left to cast in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import load_tile, store_tile

BLOCK_ROW, BLOCK_COL = 16, 128


def cast(dtype: torch.dtype, shrink: Tensor, core: Tensor | None, wide: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """shrink, core and wide in `dtype`, contiguous."""
    matrices = {"shrink": shrink, "core": core, "wide": wide}
    results = {
        name: None if t is None else torch.empty(t.shape, dtype=dtype, device=t.device) for name, t in matrices.items()
    }
    launched = planned(*map(launch.layout, matrices.values()), dtype, shrink.get_device())
    launched(shrink, **matrices, **{f"{name}_cast": t for name, t in results.items()})
    return tuple(results.values())


@launch.planned
def planned(shrink, core, wide, dtype, index) -> launch.Launch:
    sizes, tiles = {}, []
    for name, matrix in {"shrink": shrink, "core": core, "wide": wide}.items():
        (rows, cols), strides = (matrix[0], matrix[1]) if matrix else ((0, 0), (0, 0))
        sizes |= {f"{name}_rows": rows, f"{name}_cols": cols}
        sizes |= {f"{name}_stride_row": strides[0], f"{name}_stride_col": strides[1]}
        tiles.append(triton.cdiv(rows, BLOCK_ROW) * triton.cdiv(cols, BLOCK_COL))
    return launch.Launch(
        cast_matrices,
        (sum(tiles),),
        warps=4,
        tiles_shrink=tiles[0],
        tiles_core=tiles[1],
        BLOCK_ROW=BLOCK_ROW,
        BLOCK_COL=BLOCK_COL,
        **sizes,
    )


@triton.jit
def cast_matrices(
    shrink,
    core,
    wide,
    shrink_cast,
    core_cast,
    wide_cast,
    shrink_rows,
    shrink_cols,
    core_rows,
    core_cols,
    wide_rows,
    wide_cols,
    shrink_stride_row,
    shrink_stride_col,
    core_stride_row,
    core_stride_col,
    wide_stride_row,
    wide_stride_col,
    tiles_shrink,
    tiles_core,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    tile = tl.program_id(0)
    # fmt: off
    if tile < tiles_shrink:
        cast_tile(shrink, shrink_cast, tile, shrink_rows, shrink_cols, shrink_stride_row, shrink_stride_col,
                  BLOCK_ROW, BLOCK_COL)
    elif tile < tiles_shrink + tiles_core:
        if core is not None:
            cast_tile(core, core_cast, tile - tiles_shrink, core_rows, core_cols, core_stride_row, core_stride_col,
                      BLOCK_ROW, BLOCK_COL)
    else:
        cast_tile(wide, wide_cast, tile - tiles_shrink - tiles_core, wide_rows, wide_cols,
                  wide_stride_row, wide_stride_col, BLOCK_ROW, BLOCK_COL)
    # fmt: on


@triton.jit
def cast_tile(
    src,
    dst,
    tile,
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    across = tl.cdiv(cols, BLOCK_COL)
    row, col = tile // across * BLOCK_ROW, tile % across * BLOCK_COL
    values = load_tile(src, row, col, rows, cols, stride_row, stride_col, BLOCK_ROW, BLOCK_COL, True, True, False)
    store_tile(dst, values, row, col, rows, cols, cols, BLOCK_ROW, BLOCK_COL)
