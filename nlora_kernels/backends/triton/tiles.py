"""Device functions that every kernel of this backend is built from.

A matrix is passed as it is stored, with the strides of its rows and columns, or as a descriptor (TMA) of its tiles.
"""

import triton
import triton.language as tl

from .dropout import drop


@triton.jit
def load_tile(
    src,
    row,
    col,
    rows,
    cols,
    stride_row,
    stride_col,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    CHECK_ROW: tl.constexpr,
    CHECK_COL: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """src[row : row + BLOCK_ROW, col : col + BLOCK_COL], zero outside the matrix."""
    if DESCRIPTOR:
        tile = src.load([row, col])
    else:
        i = row + tl.arange(0, BLOCK_ROW)
        j = col + tl.arange(0, BLOCK_COL)
        pointers = src + i.to(tl.int64)[:, None] * stride_row + j.to(tl.int64)[None, :] * stride_col
        if CHECK_ROW and CHECK_COL:
            tile = tl.load(pointers, mask=(i < rows)[:, None] & (j < cols)[None, :], other=0.0)
        elif CHECK_ROW:
            tile = tl.load(pointers, mask=(i < rows)[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=(j < cols)[None, :], other=0.0)
    return tile


@triton.jit
def multiply(
    acc,
    a,
    b,
    m,
    n,
    M,
    N,
    k_begin,
    k_end,
    a_stride_row,
    a_stride_col,
    b_stride_row,
    b_stride_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHECK_K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    B_DESCRIPTOR: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    seed,
    threshold,
    DROPS: tl.constexpr,
):
    """acc + a[m : m + BLOCK_M, k_begin : k_end] · b[k_begin : k_end, n : n + BLOCK_N], operands in DTYPE, sums in fp32.

    A transposed operand is stored as [K, M] or [N, K]. DROPS names the operand, stored as it is, that has dropout.
    """
    for k in range(k_begin, k_end, BLOCK_K):
        # fmt: off
        if A_TRANSPOSED:
            a_tile = load_tile(a, k, m, k_end, M, a_stride_row, a_stride_col,
                               BLOCK_K, BLOCK_M, CHECK_K, True, A_DESCRIPTOR).T
        else:
            a_tile = load_tile(a, m, k, M, k_end, a_stride_row, a_stride_col,
                               BLOCK_M, BLOCK_K, True, CHECK_K, A_DESCRIPTOR)
            if DROPS == "a":
                a_tile = drop(a_tile, seed, threshold, m, k, BLOCK_M, BLOCK_K)
        if B_TRANSPOSED:
            b_tile = load_tile(b, n, k, N, k_end, b_stride_row, b_stride_col,
                               BLOCK_N, BLOCK_K, True, CHECK_K, B_DESCRIPTOR).T
        else:
            b_tile = load_tile(b, k, n, k_end, N, b_stride_row, b_stride_col,
                               BLOCK_K, BLOCK_N, CHECK_K, True, B_DESCRIPTOR)
            if DROPS == "b":
                b_tile = drop(b_tile, seed, threshold, k, n, BLOCK_K, BLOCK_N)
        # fmt: on
        acc = tl.dot(a_tile.to(DTYPE), b_tile.to(DTYPE), acc, input_precision=PRECISION)
    return acc


@triton.jit
def store_tile(dst, tile, row, col, rows, cols, stride_row, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """dst[row : row + BLOCK_ROW, col : col + BLOCK_COL] = tile in dst's dtype; dst is contiguous along its columns."""
    i = row + tl.arange(0, BLOCK_ROW)
    j = col + tl.arange(0, BLOCK_COL)
    pointers = dst + i.to(tl.int64)[:, None] * stride_row + j[None, :]
    tl.store(pointers, tile.to(dst.dtype.element_ty), mask=(i < rows)[:, None] & (j < cols)[None, :])


@triton.jit
def store_product(
    acc,
    raw,
    out,
    core,
    row,
    col,
    rows,
    cols,
    core_stride_row,
    core_stride_col,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORE_RAW: tl.constexpr,
    CORE: tl.constexpr,
    CORE_TRANSPOSED: tl.constexpr,
    CORE_DTYPE: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
):
    """raw = acc and out = alpha·acc·core, or alpha·acc where there is no core: both or the latter alone.

    With a core the tile spans all columns, and acc is rounded to CORE_DTYPE before the product: T before P, G before H.
    """
    if STORE_RAW:
        store_tile(raw, acc, row, col, rows, cols, cols, BLOCK_M, BLOCK_N)
    if CORE:
        # NOTE: the core is taken in strips of columns: a whole 256 × 256 one would fill half of shared memory.
        STRIP: tl.constexpr = min(BLOCK_N, 32)
        left = acc.to(CORE_DTYPE)
        for n in range(0, cols, STRIP):
            # fmt: off
            if CORE_TRANSPOSED:
                right = load_tile(core, n, 0, cols, cols, core_stride_row, core_stride_col,
                                  STRIP, BLOCK_N, True, True, False).T
            else:
                right = load_tile(core, 0, n, cols, cols, core_stride_row, core_stride_col,
                                  BLOCK_N, STRIP, True, True, False)
            # fmt: on
            strip = tl.dot(left, right.to(CORE_DTYPE), input_precision=CORE_PRECISION)
            store_tile(out, strip * alpha, row, n, rows, cols, cols, BLOCK_M, STRIP)
    else:
        store_tile(out, acc * alpha, row, col, rows, cols, cols, BLOCK_M, BLOCK_N)
