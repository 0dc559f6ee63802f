"""The product whose sum goes on over the rank, y = [x | P]·[W | B]ᵀ, after the narrow one or in one launch with it.

Letters: M tokens, K features that are summed over, N features that come out, R rank. Forward and the gradient of x
are the same kernels; they differ in the orientation in which they read the weight and the adapter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tuning
from ..dropout import Dropout
from . import launch
from .dropout import drop
from .narrow import narrow
from .tiles import multiply, store_product, store_tile

# Row blocks that share columns of the weight in L2.
GROUP_M = 8
# Up to here the weight is read once or twice and bounds the time.
FEW_ROWS = 64


@triton.jit
def extended_tile(
    x,
    weight,
    narrow,
    wide,
    bias,
    y,
    m,
    n,
    M,
    N,
    K,
    R,
    x_stride_row,
    x_stride_col,
    weight_stride_row,
    weight_stride_col,
    wide_stride_row,
    wide_stride_col,
    bias_stride,
    flag,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHECK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    WIDE_DESCRIPTOR: tl.constexpr,
    BIAS: tl.constexpr,
    WAIT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    seed,
    threshold,
    scale,
    DROPOUT: tl.constexpr,
):
    """One tile of y = [x | narrow]·[weight ; wide] + bias: the sum over K goes on over R in the same accumulator.

    Forward reads weight (N, K) and wide = lora_B (N, R) transposed; the gradient of x reads weight (K, N) and
    wide = lora_A (R, N) as stored. With WAIT the flag of these rows is awaited between the two sums. With DROPOUT the
    sum over R comes first, for it alone is masked.
    """
    # fmt: off
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:
        acc = multiply(acc, narrow, wide, m, n, M, N, 0, R, R, 1, wide_stride_row, wide_stride_col,
                       BLOCK_M, BLOCK_N, BLOCK_R, True, False, TRANSPOSED, False, WIDE_DESCRIPTOR, DTYPE, PRECISION,
                       None, 0, "")
        acc = drop(acc, seed, threshold, m, n, BLOCK_M, BLOCK_N) * scale
    acc = multiply(acc, x, weight, m, n, M, N, 0, K,
                   x_stride_row, x_stride_col, weight_stride_row, weight_stride_col,
                   BLOCK_M, BLOCK_N, BLOCK_K, CHECK_K, False, TRANSPOSED, X_DESCRIPTOR, WEIGHT_DESCRIPTOR,
                   DTYPE, PRECISION, None, 0, "")
    if WAIT:
        ready = tl.atomic_add(flag, 0, sem="acquire")
        while ready == 0:
            ready = tl.atomic_add(flag, 0, sem="acquire")
    if not DROPOUT:
        acc = multiply(acc, narrow, wide, m, n, M, N, 0, R, R, 1, wide_stride_row, wide_stride_col,
                       BLOCK_M, BLOCK_N, BLOCK_R, True, False, TRANSPOSED, False, WIDE_DESCRIPTOR, DTYPE, PRECISION,
                       None, 0, "")
    # fmt: on
    if BIAS:
        j = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias + j * bias_stride, mask=j < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, acc, m, n, M, N, N, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["threshold"])
def extended_product(
    x,
    weight,
    narrow,
    wide,
    bias,
    seed,
    y,
    M,
    N,
    K,
    R,
    x_stride_row,
    x_stride_col,
    weight_stride_row,
    weight_stride_col,
    wide_stride_row,
    wide_stride_col,
    bias_stride,
    threshold,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHECK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    WIDE_DESCRIPTOR: tl.constexpr,
    BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = [x | narrow]·[weight ; wide] + bias, one tile a program; rows in groups, so that both operands stay in L2."""
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP_M
    group = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % per_group
    # fmt: off
    extended_tile(x, weight, narrow, wide, bias, y, (first + inside % group) * BLOCK_M, inside // group * BLOCK_N,
                  M, N, K, R, x_stride_row, x_stride_col, weight_stride_row, weight_stride_col,
                  wide_stride_row, wide_stride_col, bias_stride, None, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R,
                  CHECK_K, TRANSPOSED, X_DESCRIPTOR, WEIGHT_DESCRIPTOR, WIDE_DESCRIPTOR, BIAS, False, DTYPE, PRECISION,
                  seed, threshold, scale, DROPOUT)
    # fmt: on


@triton.jit
def single_launch(
    x,
    weight,
    shrink,
    core,
    wide,
    bias,
    raw,
    narrow,
    y,
    state,
    M,
    N,
    K,
    R,
    x_stride_row,
    x_stride_col,
    weight_stride_row,
    weight_stride_col,
    shrink_stride_row,
    shrink_stride_col,
    core_stride_row,
    core_stride_col,
    wide_stride_row,
    wide_stride_col,
    bias_stride,
    alpha,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PADDED_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    CHECK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    X_DESCRIPTOR: tl.constexpr,
    WEIGHT_DESCRIPTOR: tl.constexpr,
    SHRINK_DESCRIPTOR: tl.constexpr,
    WIDE_DESCRIPTOR: tl.constexpr,
    CORE: tl.constexpr,
    BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """narrow_product and extended_product in one launch.

    Programs draw items from a ticket. In each group of row blocks the items that compute raw and narrow come first and
    raise the flag of their block; the tiles that need it wait for it only after their sum over K. An item waits for
    smaller tickets alone, so the launch advances whichever programs are resident.

    state: int32, all zero: the ticket, then one flag for each row block.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    items = tiles_m * (1 + tiles_n)
    per_group = GROUP_M * (1 + tiles_n)
    item = tl.atomic_add(state, 1, sem="relaxed")
    while item < items:
        first = item // per_group * GROUP_M
        group = tl.minimum(tiles_m - first, GROUP_M)
        inside = item % per_group
        # fmt: off
        if inside < group:
            block = first + inside
            m = block * BLOCK_M
            acc = multiply(tl.zeros((BLOCK_M, PADDED_R), tl.float32), x, shrink, m, 0, M, R, 0, K,
                           x_stride_row, x_stride_col, shrink_stride_row, shrink_stride_col,
                           BLOCK_M, PADDED_R, BLOCK_K, CHECK_K, False, TRANSPOSED, X_DESCRIPTOR, SHRINK_DESCRIPTOR,
                           DTYPE, PRECISION, None, 0, "")
            store_product(acc, raw, narrow, core, m, 0, M, R, core_stride_row, core_stride_col, alpha,
                          BLOCK_M, PADDED_R, True, CORE, TRANSPOSED, DTYPE, PRECISION)
            # NOTE: one thread raises the flag; the barrier puts the stores of all the others before it.
            tl.debug_barrier()
            tl.atomic_xchg(state + 1 + block, 1, sem="release")
        else:
            block = first + (inside - group) % group
            extended_tile(x, weight, narrow, wide, bias, y, block * BLOCK_M, (inside - group) // group * BLOCK_N,
                          M, N, K, R, x_stride_row, x_stride_col, weight_stride_row, weight_stride_col,
                          wide_stride_row, wide_stride_col, bias_stride, state + 1 + block,
                          BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, CHECK_K, TRANSPOSED,
                          X_DESCRIPTOR, WEIGHT_DESCRIPTOR, WIDE_DESCRIPTOR, BIAS, True, DTYPE, PRECISION,
                          None, 0, 1.0, False)
        # fmt: on
        item = tl.atomic_add(state, 1, sem="relaxed")


def widen(
    x: Tensor,
    weight: Tensor,
    shrink: Tensor,
    core: Tensor | None,
    wide: Tensor,
    bias: Tensor | None,
    alpha: float,
    *,
    transposed: bool,
    tile: tuning.Tile | None = None,
    single: bool | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(raw, narrow, y) = (x·shrink, alpha·raw·core, [x | narrow]·[weight ; wide] + bias), all in x's dtype.

    `transposed`: weight, shrink, core and wide are stored as the transpose of what is multiplied, as in forward.
    dropout: of the adapter's input, which is x if transposed, else of what the adapter adds to y.
    tile, single: tile and number of launches in place of those that `tuning` chooses.
    """
    (M, K), R = x.shape, shrink.shape[0 if transposed else 1]
    N = weight.shape[0 if transposed else 1]
    y = x.new_empty(M, N)
    if M > FEW_ROWS:
        # Many tiles read the adapter, so it is cast once; for a few rows it is cast in registers, without a launch.
        shrink, wide = shrink.to(x.dtype), wide.to(x.dtype)
        core = None if core is None else core.to(x.dtype)
    device, tf32, aligned = launch.target(x), launch.tf32(), launch.aligned(x, weight)
    tile = tile or tuning.wide_tile(M, N, K, R, x.dtype, tf32, aligned, device)
    if single is None:
        # What a mask costs in registers leaves none for two kinds of tile in one program.
        single = dropout is None and tuning.single_launch(M, N, K, R, x.dtype, tf32, aligned, tile, device)
    if single:
        raw, out = x.new_empty(M, R), x.new_empty(M, R)
    else:
        orientation = dict(b_transposed=transposed, core_transposed=transposed)
        mask = dict(dropout=dropout, drops="a") if transposed else {}
        raw, out = narrow(x, shrink, core, alpha=alpha, raw=True, **orientation, **mask)
    if M == 0 or N == 0:
        return raw, out, y
    rank_block = min(tuning.padded(R), tile.k)
    x_source = launch.source(x, (tile.m, tile.k), x.dtype, device)
    weight_source = launch.source(weight, (tile.n, tile.k) if transposed else (tile.k, tile.n), x.dtype, device)
    wide_source = launch.source(wide, (tile.n, rank_block) if transposed else (rank_block, tile.n), x.dtype, device)
    arguments = dict(
        x=x_source,
        weight=weight_source,
        narrow=out,
        wide=wide_source,
        bias=bias,
        y=y,
        M=M,
        N=N,
        K=K,
        R=R,
        x_stride_row=x.stride(0),
        x_stride_col=x.stride(1),
        weight_stride_row=weight.stride(0),
        weight_stride_col=weight.stride(1),
        wide_stride_row=wide.stride(0),
        wide_stride_col=wide.stride(1),
        bias_stride=0 if bias is None else bias.stride(0),
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=rank_block,
        GROUP_M=GROUP_M,
        CHECK_K=K % tile.k != 0,
        TRANSPOSED=transposed,
        X_DESCRIPTOR=x_source is not x,
        WEIGHT_DESCRIPTOR=weight_source is not weight,
        WIDE_DESCRIPTOR=wide_source is not wide,
        BIAS=bias is not None,
        DTYPE=launch.DTYPES[x.dtype],
        PRECISION=launch.precision(x.dtype),
    )
    blocks, tiles = triton.cdiv(M, tile.m), triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n)
    if not single:
        mask = None if transposed else dropout
        arguments |= dict(DROPOUT=mask is not None, **launch.mask(mask))
        launch.run(extended_product, (tiles,), on=x, warps=tile.warps, stages=tile.stages, **arguments)
        return raw, out, y
    width = tuning.padded(R)
    shrink_source = launch.source(shrink, (width, tile.k) if transposed else (tile.k, width), x.dtype, device)
    launch.run(
        single_launch,
        (min(device.processors, blocks + tiles),),
        on=x,
        warps=tile.warps,
        stages=tile.stages,
        shrink=shrink_source,
        core=core,
        raw=raw,
        # NOTE: new and cleared at every call, so launches may overlap, and be captured and replayed on any stream.
        state=torch.zeros(1 + blocks, dtype=torch.int32, device=x.device),
        shrink_stride_row=shrink.stride(0),
        shrink_stride_col=shrink.stride(1),
        core_stride_row=core.stride(0) if core is not None else 0,
        core_stride_col=core.stride(1) if core is not None else 0,
        alpha=alpha,
        PADDED_R=width,
        SHRINK_DESCRIPTOR=shrink_source is not shrink,
        CORE=core is not None,
        **arguments,
    )
    return raw, out, y
