"""Nyström initialisation on the device: nothing comes back to the host, and nothing of the weight's size is allocated.

gather             A = W[I, :],  N = W[I][:, J],  B = W[:, J]
squared_norms      Σ W² of every row and of every column
subtract_products  W ← W − s·B·N·A, for one weight or for several of one shape
solve_triangular   X = R⁻¹·C for an upper triangular R
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, tuning
from .tiles import Matrix, load_tile, store_tile


def gather(weight: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(W[I, :], W[I][:, J], W[:, J]) of W (out, in) for int64 indices I and J of length r, in one launch."""
    out_features, in_features = weight.shape
    rows, cols, r = rows.contiguous(), cols.contiguous(), rows.numel()
    A, N, B = weight.new_empty(r, in_features), weight.new_empty(r, r), weight.new_empty(out_features, r)
    # Wide tiles along the rows of W, which are contiguous.
    height, width = 16, 128
    parts = [(triton.cdiv(t.shape[0], height), triton.cdiv(t.shape[1], width)) for t in (A, N, B)]
    tiles = [down * across for down, across in parts]
    launch.run(
        gather_submatrices,
        (sum(tiles),),
        on=weight,
        warps=4,
        weight=launch.strided(weight),
        rows=rows,
        cols=cols,
        A=A,
        N=N,
        B=B,
        out_features=out_features,
        in_features=in_features,
        r=r,
        tiles_A=tiles[0],
        tiles_N=tiles[1],
        BLOCK_ROW=height,
        BLOCK_COL=width,
    )
    return A, N, B


@triton.jit
def gather_submatrices(
    weight,
    rows,
    cols,
    A,
    N,
    B,
    out_features,
    in_features,
    r,
    tiles_A,
    tiles_N,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < tiles_A:
        copy_tile(weight, rows, cols, A, tile, r, in_features, BLOCK_ROW, BLOCK_COL, True, False)
    elif tile < tiles_A + tiles_N:
        copy_tile(weight, rows, cols, N, tile - tiles_A, r, r, BLOCK_ROW, BLOCK_COL, True, True)
    else:
        copy_tile(weight, rows, cols, B, tile - tiles_A - tiles_N, out_features, r, BLOCK_ROW, BLOCK_COL, False, True)


@triton.jit
def copy_tile(
    weight,
    rows,
    cols,
    out,
    tile,
    height,
    width,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    BY_ROW: tl.constexpr,
    BY_COL: tl.constexpr,
):
    """One tile of out (height, width): W at the given rows or all, and at the given columns or all."""
    across = tl.cdiv(width, BLOCK_COL)
    i = tile // across * BLOCK_ROW + tl.arange(0, BLOCK_ROW)
    j = tile % across * BLOCK_COL + tl.arange(0, BLOCK_COL)
    source_row = tl.load(rows + i, mask=i < height, other=0) if BY_ROW else i.to(tl.int64)
    source_col = tl.load(cols + j, mask=j < width, other=0) if BY_COL else j.to(tl.int64)
    inside = (i < height)[:, None] & (j < width)[None, :]
    values = tl.load(
        weight.data + source_row[:, None] * weight.stride_row + source_col[None, :] * weight.stride_col, mask=inside
    )
    tl.store(out + i.to(tl.int64)[:, None] * width + j[None, :], values, mask=inside)


def squared_norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ W² of each row (out,), Σ W² of each column (in,)) in fp32; W is read once and the sums have a fixed order."""
    out_features, in_features = weight.shape
    height, width = 64, 128
    down, across = triton.cdiv(out_features, height), triton.cdiv(in_features, width)
    of_rows = weight.new_empty(across, out_features, dtype=torch.float32)
    of_cols = weight.new_empty(down, in_features, dtype=torch.float32)
    launch.run(
        sum_squares,
        (down, across),
        on=weight,
        warps=4,
        weight=launch.strided(weight),
        of_rows=of_rows,
        of_cols=of_cols,
        out_features=out_features,
        in_features=in_features,
        BLOCK_ROW=height,
        BLOCK_COL=width,
    )
    return of_rows.sum(0), of_cols.sum(0)


@triton.jit
def sum_squares(
    weight,
    of_rows,
    of_cols,
    out_features,
    in_features,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
):
    """The sums of one tile, to be added up over the tiles of its rows and of its columns."""
    row = tl.program_id(0) * BLOCK_ROW
    col = tl.program_id(1) * BLOCK_COL
    tile = load_tile(weight, row, col, out_features, in_features, BLOCK_ROW, BLOCK_COL).to(tl.float32)
    i = row + tl.arange(0, BLOCK_ROW)
    j = col + tl.arange(0, BLOCK_COL)
    tl.store(of_rows + tl.program_id(1) * out_features + i, tl.sum(tile * tile, 1), mask=i < out_features)
    tl.store(of_cols + tl.program_id(0) * in_features + j, tl.sum(tile * tile, 0), mask=j < in_features)


def subtract_products(
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Ns: Sequence[Tensor | None],
    Bs: Sequence[Tensor],
    scaling: float,
) -> None:
    """W ← W − s·B·N·A in place for weights of one shape, strides and dtype, in one launch that reads and writes W once.

    B·N and its product with A are held in fp32, whatever W's dtype, and W is rounded once. r ≤ 256; N is None for all
    or for none.
    """
    weight, A, N, B = weights[0], As[0], Ns[0], Bs[0]
    out_features, in_features = weight.shape
    r = A.shape[0]
    if weight.numel() == 0:
        return
    groups = [weights, [t.contiguous() for t in As], [t.contiguous() for t in Bs]]
    groups += [[t.contiguous() for t in Ns]] if N is not None else []
    addresses = torch.tensor([[t.data_ptr() for t in group] for group in groups], dtype=torch.int64)
    exact = weight.dtype == torch.float32
    width = tuning.padded(r)
    height = 16 if exact or width > 128 else 32
    tile = tuning.Tile(height, 64 if exact or width <= 128 else 32, width, 8 if width > 64 else 4, 2)
    launch.run(
        subtract_product,
        (triton.cdiv(out_features, tile.m), len(weights)),
        on=weight,
        warps=tile.warps,
        stages=tile.stages,
        addresses=launch.to_device(addresses, weight),
        # NOTE: they give the kernel the dtypes behind the addresses.
        weight=launch.strided(weight),
        A=A,
        B=B,
        N=N,
        out_features=out_features,
        in_features=in_features,
        r=r,
        scaling=scaling,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        PADDED_R=width,
        ALIGNED=bool((addresses % 16 == 0).all()),
        PRECISION="ieee" if exact else "tf32x3",
    )


@triton.jit
def subtract_product(
    addresses,
    weight,
    A,
    B,
    N,
    out_features,
    in_features,
    r,
    scaling,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PADDED_R: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Some rows of one weight: s·B·N is computed once and kept, then W goes through from left to right."""
    layers = tl.num_programs(1)
    slot = addresses + tl.program_id(1)
    weight = Matrix(pointer_at(slot, weight.data, ALIGNED), weight.stride_row, weight.stride_col)
    A = Matrix(pointer_at(slot + layers, A, ALIGNED), in_features, 1)
    B = Matrix(pointer_at(slot + 2 * layers, B, ALIGNED), r, 1)
    row = tl.program_id(0) * BLOCK_M
    left = load_tile(B, row, 0, out_features, r, BLOCK_M, PADDED_R).to(tl.float32)
    if N is not None:
        N = Matrix(pointer_at(slot + 3 * layers, N, ALIGNED), r, 1)
        STRIP: tl.constexpr = min(PADDED_R, 32)
        product = tl.zeros((BLOCK_M, PADDED_R), tl.float32)
        for k in range(0, r, STRIP):
            part = load_tile(B, row, k, out_features, r, BLOCK_M, STRIP).to(tl.float32)
            core = load_tile(N, k, 0, r, r, STRIP, PADDED_R).to(tl.float32)
            product = tl.dot(part, core, product, input_precision=PRECISION)
        left = product
    left = left * -scaling
    for col in range(0, in_features, BLOCK_N):
        right = load_tile(A, 0, col, r, in_features, PADDED_R, BLOCK_N)
        tile = load_tile(weight, row, col, out_features, in_features, BLOCK_M, BLOCK_N)
        tile = tl.dot(left, right.to(tl.float32), tile.to(tl.float32), input_precision=PRECISION)
        i = row + tl.arange(0, BLOCK_M)
        j = col + tl.arange(0, BLOCK_N)
        rows, cols = i.to(tl.int64)[:, None] * weight.stride_row, j.to(tl.int64)[None, :] * weight.stride_col
        pointers = weight.data + rows + cols
        inside = (i < out_features)[:, None] & (j < in_features)[None, :]
        tl.store(pointers, tile.to(weight.data.dtype.element_ty), mask=inside)


@triton.jit
def pointer_at(slot, like, ALIGNED: tl.constexpr):
    """The address in a slot of the table as a pointer of the same type as another."""
    pointer = tl.load(slot).to(like.dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


def solve_triangular(R: Tensor, C: Tensor) -> Tensor:
    """X = R⁻¹·C for an upper triangular R (r, r), r ≤ 256, and C (r, n), in fp32.

    Where a diagonal element is at most r·eps times the greatest, its row of X is zero: its direction carries nothing.
    """
    r, n = C.shape
    X = torch.empty(r, n, dtype=torch.float32, device=C.device)
    if n:
        launch.run(
            back_substitute,
            (triton.cdiv(n, 16),),
            on=C,
            warps=4,
            R=launch.strided(R),
            C=launch.strided(C),
            X=X,
            r=r,
            n=n,
            negligible=r * torch.finfo(torch.float32).eps,
            PADDED_R=tuning.padded(r),
            BLOCK_N=16,
        )
    return X


@triton.jit
def back_substitute(R, C, X, r, n, negligible, PADDED_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns of X by back substitution: row after row from the last, each taken off all rows above it."""
    col = tl.program_id(0) * BLOCK_N
    i = tl.arange(0, PADDED_R)
    rest = load_tile(C, 0, col, r, n, PADDED_R, BLOCK_N).to(tl.float32)
    diagonal = tl.load(R.data + i * (R.stride_row + R.stride_col), mask=i < r, other=0.0).to(tl.float32)
    least = negligible * tl.max(tl.abs(diagonal), 0)
    for step in range(r):
        k = r - 1 - step
        column = tl.load(R.data + i * R.stride_row + k * R.stride_col, mask=i <= k, other=0.0).to(tl.float32)
        pivot = tl.sum(tl.where(i == k, column, 0.0), 0)
        x = tl.sum(tl.where((i == k)[:, None], rest, 0.0), 0)
        x = tl.where(tl.abs(pivot) > least, x / tl.where(pivot == 0.0, 1.0, pivot), 0.0)
        # What is solved stays in its row; the rows above lose their share of it.
        rest = tl.where((i == k)[:, None], x[None, :], rest - tl.where(i < k, column, 0.0)[:, None] * x[None, :])
    store_tile(X, rest, 0, col, r, n, PADDED_R, BLOCK_N)
