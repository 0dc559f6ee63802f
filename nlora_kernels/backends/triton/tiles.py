"""Device functions that every kernel of this backend is built from, and the arguments that kernels take.

A matrix of any strides is a `Matrix`, or a descriptor (TMA) of its tiles; one that is contiguous, as all results are,
is its pointer alone. Sizes, which several matrices share, are arguments of their own. What a kernel is compiled for
comes as one constant value, META.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .codes import Codes, tile_of
from .dropout import drop


class Matrix(NamedTuple):
    """A matrix as it is stored."""

    data: object
    stride_row: int
    stride_col: int


class Vector(NamedTuple):
    data: object
    stride: int


class Stack(NamedTuple):
    """Matrices of one shape as they are stored, or a descriptor of their tiles: of each `item` takes one."""

    data: object
    stride_item: int
    stride_row: int
    stride_col: int


class Item(NamedTuple):
    """One matrix of a stack that is read by a descriptor."""

    stack: object
    index: int


class Product(NamedTuple):
    """How tiles of a product a·b are computed.

    CHECK_K: the sum ends within a block. A transposed operand is stored as [K, M] or [N, K]. DROPS names the operand,
    stored as it is, that has dropout: "a", "b" or "". Operands are multiplied in DTYPE and, in fp32, with PRECISION.
    CODES says how b is coded, if it is a weight in few bits.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    CHECK_K: bool
    A_TRANSPOSED: bool
    B_TRANSPOSED: bool
    DROPS: str
    DTYPE: tl.dtype
    PRECISION: str
    CODES: Codes | None


class Core(NamedTuple):
    """How a product is multiplied by a square core that follows it."""

    TRANSPOSED: bool
    DTYPE: tl.dtype
    PRECISION: str


@triton.jit
def load_tile(
    src,
    row,
    col,
    rows,
    cols,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    CHECK_ROW: tl.constexpr = True,
    CHECK_COL: tl.constexpr = True,
    CODES: tl.constexpr = None,
):
    """src[row : row + BLOCK_ROW, col : col + BLOCK_COL], zero outside the matrix; of CODES their values in fp32."""
    if CODES is not None:
        tile = tile_of(src, row, col, rows, cols, BLOCK_ROW, BLOCK_COL, CODES)
    elif isinstance(src, tl.tensor_descriptor):
        tile = src.load([row, col])
    elif isinstance(src[0], tl.tensor_descriptor):
        tile = tl.reshape(src.stack.load([src.index, row, col]), (BLOCK_ROW, BLOCK_COL))
    else:
        i = row + tl.arange(0, BLOCK_ROW)
        j = col + tl.arange(0, BLOCK_COL)
        pointers = src.data + i.to(tl.int64)[:, None] * src.stride_row + j.to(tl.int64)[None, :] * src.stride_col
        if CHECK_ROW and CHECK_COL:
            tile = tl.load(pointers, mask=(i < rows)[:, None] & (j < cols)[None, :], other=0.0)
        elif CHECK_ROW:
            tile = tl.load(pointers, mask=(i < rows)[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=(j < cols)[None, :], other=0.0)
    return tile


@triton.jit
def item(stack, index):
    """The matrix of an index, an int32."""
    if isinstance(stack, tl.tensor_descriptor):
        found = Item(stack, index)
    else:
        found = Matrix(stack.data + index.to(tl.int64) * stack.stride_item, stack.stride_row, stack.stride_col)
    return found


@triton.jit
def multiply(acc, a, b, m, n, M, N, k_begin, k_end, seed, threshold, META: tl.constexpr):
    """acc + a[m : m + BLOCK_M, k_begin : k_end] · b[k_begin : k_end, n : n + BLOCK_N], with sums in fp32.

    META: a `Product`. seed, threshold: of the operand that has dropout.
    """
    for k in range(k_begin, k_end, META.BLOCK_K):
        if META.A_TRANSPOSED:
            a_tile = load_tile(a, k, m, k_end, M, META.BLOCK_K, META.BLOCK_M, META.CHECK_K, True).T
        else:
            a_tile = load_tile(a, m, k, M, k_end, META.BLOCK_M, META.BLOCK_K, True, META.CHECK_K)
            if META.DROPS == "a":
                a_tile = drop(a_tile, seed, threshold, m, k, META.BLOCK_M, META.BLOCK_K)
        if META.B_TRANSPOSED:
            b_tile = load_tile(b, n, k, N, k_end, META.BLOCK_N, META.BLOCK_K, True, META.CHECK_K, META.CODES).T
        else:
            b_tile = load_tile(b, k, n, k_end, N, META.BLOCK_K, META.BLOCK_N, META.CHECK_K, True, META.CODES)
            if META.DROPS == "b":
                b_tile = drop(b_tile, seed, threshold, k, n, META.BLOCK_K, META.BLOCK_N)
        acc = tl.dot(a_tile.to(META.DTYPE), b_tile.to(META.DTYPE), acc, input_precision=META.PRECISION)
    return acc


@triton.jit
def store_tile(dst, tile, row, col, rows, cols, BLOCK_ROW: tl.constexpr, BLOCK_COL: tl.constexpr):
    """dst[row : row + BLOCK_ROW, col : col + BLOCK_COL] = tile in dst's dtype; dst (rows, cols) is contiguous."""
    i = row + tl.arange(0, BLOCK_ROW)
    j = col + tl.arange(0, BLOCK_COL)
    pointers = dst + i.to(tl.int64)[:, None] * cols + j[None, :]
    tl.store(pointers, tile.to(dst.dtype.element_ty), mask=(i < rows)[:, None] & (j < cols)[None, :])


@triton.jit
def store_product(
    acc, raw, out, core, row, col, rows, cols, alpha, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, META: tl.constexpr
):
    """raw = acc and out = alpha·acc·core, or alpha·acc where there is no core; raw may be None.

    META: a `Core`. With one the tile spans all columns, and acc is rounded to its dtype before the product: T before P,
    G before H.
    """
    if raw is not None:
        store_tile(raw, acc, row, col, rows, cols, BLOCK_M, BLOCK_N)
    if core is not None:
        # NOTE: the core is taken in strips of columns: a whole 256 × 256 one would fill half of shared memory.
        STRIP: tl.constexpr = min(BLOCK_N, 32)
        left = acc.to(META.DTYPE)
        for n in range(0, cols, STRIP):
            if META.TRANSPOSED:
                right = load_tile(core, n, 0, cols, cols, STRIP, BLOCK_N).T
            else:
                right = load_tile(core, 0, n, cols, cols, BLOCK_N, STRIP)
            strip = tl.dot(left, right.to(META.DTYPE), input_precision=META.PRECISION)
            store_tile(out, strip * alpha, row, n, rows, cols, BLOCK_M, STRIP)
    else:
        store_tile(out, acc * alpha, row, col, rows, cols, BLOCK_M, BLOCK_N)
