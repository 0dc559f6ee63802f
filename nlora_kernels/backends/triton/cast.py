"""The adapter in the dtype of the product, in one launch, for kernels that have no registers left to cast in."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import load_tile, store_tile

BLOCK_ROW, BLOCK_COL = 16, 128


def cast(
    dtype: torch.dtype, shrink: Tensor, core: Tensor | None, expand: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """shrink, core and expand in `dtype`, contiguous."""
    matrices = {"shrink": shrink, "core": core, "expand": expand}
    results = {
        name: None if t is None else torch.empty(t.shape, dtype=dtype, device=t.device) for name, t in matrices.items()
    }
    launched = planned(*map(launch.layout, matrices.values()), dtype, shrink.get_device())
    launched(shrink, **matrices, **{f"{name}_cast": t for name, t in results.items()})
    return tuple(results.values())


@launch.planned
def planned(shrink, core, expand, dtype, index) -> launch.Launch:
    """`dtype`: of the results, for which the launch is compiled."""
    layouts, sizes, tiles = {}, {}, []
    for name, matrix in {"shrink": shrink, "core": core, "expand": expand}.items():
        layouts[name] = matrix and launch.Layout(*matrix)
        rows, cols = matrix[0] if matrix else (0, 0)
        sizes |= {f"{name}_rows": rows, f"{name}_cols": cols}
        tiles.append(triton.cdiv(rows, BLOCK_ROW) * triton.cdiv(cols, BLOCK_COL))
    return launch.Launch(
        cast_matrices,
        (sum(tiles),),
        warps=4,
        layouts=layouts,
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
    expand,
    shrink_cast,
    core_cast,
    expand_cast,
    shrink_rows,
    shrink_cols,
    core_rows,
    core_cols,
    expand_rows,
    expand_cols,
    tiles_shrink,
    tiles_core,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < tiles_shrink:
        cast_tile(shrink, shrink_cast, tile, shrink_rows, shrink_cols, BLOCK_ROW, BLOCK_COL)
    elif tile < tiles_shrink + tiles_core:
        if core is not None:
            cast_tile(core, core_cast, tile - tiles_shrink, core_rows, core_cols, BLOCK_ROW, BLOCK_COL)
    else:
        cast_tile(expand, expand_cast, tile - tiles_shrink - tiles_core, expand_rows, expand_cols, BLOCK_ROW, BLOCK_COL)


@triton.jit
def cast_tile(src, dst, tile, rows, cols, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    across = tl.cdiv(cols, BLOCK_COL)
    row, col = tile // across * BLOCK_ROW, tile % across * BLOCK_COL
    values = load_tile(src, row, col, rows, cols, BLOCK_ROW, BLOCK_COL)
    store_tile(dst, values, row, col, rows, cols, BLOCK_ROW, BLOCK_COL)
