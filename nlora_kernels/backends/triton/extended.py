"""The product whose sum goes on over the rank, y = [x | P]·[W | B]ᵀ, after the narrow one or in one launch with it.

Letters: M tokens, K features that are summed over, N features that come out, R rank. Forward and the gradient of x
are the same kernels; they differ in the orientation in which they read the weight and the adapter.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tuning
from ..base import Dropout
from . import launch
from .cast import cast
from .dropout import drop
from .narrow import narrow
from .tiles import multiply, store_product, store_tile

# Row blocks that share columns of the weight in L2.
GROUP_M = 8


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


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed"])
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

    state: int32, all zero before and after: the ticket, how many programs have ended, then one flag for each row block.
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
            tl.atomic_xchg(state + 2 + block, 1, sem="release")
        else:
            block = first + (inside - group) % group
            extended_tile(x, weight, narrow, wide, bias, y, block * BLOCK_M, (inside - group) // group * BLOCK_N,
                          M, N, K, R, x_stride_row, x_stride_col, weight_stride_row, weight_stride_col,
                          wide_stride_row, wide_stride_col, bias_stride, state + 2 + block,
                          BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, CHECK_K, TRANSPOSED,
                          X_DESCRIPTOR, WEIGHT_DESCRIPTOR, WIDE_DESCRIPTOR, BIAS, True, DTYPE, PRECISION,
                          None, 0, 1.0, False)
        # fmt: on
        item = tl.atomic_add(state, 1, sem="relaxed")
    if tl.atomic_add(state + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        # No other program will draw a ticket or look at a flag.
        for start in range(0, 2 + tiles_m, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            tl.store(state + i, 0, mask=i < 2 + tiles_m)


class Plan(NamedTuple):
    """How the extended product is computed: the tile, whether the adapter is cast before, whether `launch` holds the
    narrow product too, and if so how many counters it has."""

    tile: tuning.Tile
    cast: bool
    single: bool
    launch: launch.Launch
    counters: int


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
    M, dtype, device = x.shape[0], x.dtype, x.device
    R, N = shrink.shape[0 if transposed else 1], weight.shape[0 if transposed else 1]
    y = torch.empty((M, N), dtype=dtype, device=device)
    how = dict(alpha=alpha, raw=True, b_transposed=transposed, core_transposed=transposed)
    before, after = (dict(dropout=dropout, drops="a"), None) if transposed else ({}, dropout)
    if M == 0 or N == 0:
        return *narrow(x, shrink, core, **how, **before), y
    plan = planned(
        launch.layout(x),
        launch.layout(weight),
        launch.layout(shrink),
        launch.layout(core),
        launch.layout(wide),
        launch.layout(bias),
        x.get_device(),
        launch.tf32(dtype),
        transposed,
        tile,
        single,
        dropout is not None,
    )
    if plan.cast:
        shrink, core, wide = cast(dtype, shrink, core, wide)
    operands = dict(x=x, weight=weight, wide=wide, bias=bias, y=y)
    if not plan.single:
        raw, out = narrow(x, shrink, core, **how, **before)
        plan.launch(x, narrow=out, **operands, **launch.mask(after))
        return raw, out, y
    raw, out = (torch.empty((M, R), dtype=dtype, device=device) for _ in range(2))
    state = launch.counters(x, plan.counters)
    plan.launch(x, shrink=shrink, core=core, raw=raw, narrow=out, state=state, alpha=float(alpha), **operands)
    return raw, out, y


@launch.planned
def planned(x, weight, shrink, core, wide, bias, index, tf32, transposed, tile, single, dropout) -> Plan:
    x, weight, shrink, wide = (launch.Layout(*operand) for operand in (x, weight, shrink, wide))
    core, bias = core and launch.Layout(*core), bias and launch.Layout(*bias)
    (M, K), R = x.shape, shrink.shape[0 if transposed else 1]
    N = weight.shape[0 if transposed else 1]
    device, aligned = launch.target(index), launch.aligned(x, weight)
    tile = tile or tuning.wide_tile(M, N, K, R, x.dtype, tf32, aligned, device)
    if single is None:
        # What a mask costs in registers leaves none for two kinds of tile in one program.
        single = not dropout and tuning.single_launch(M, N, K, R, x.dtype, tf32, aligned, tile, device)
    width = tuning.padded(R)
    rank_block = min(width, tile.k)
    # Where the adapter is of another dtype it is cast in registers, without a launch of its own. A program that holds
    # both kinds of tile, or a tile that fills its registers, has none left for that; and it must fit as it is stored.
    # NOTE: before Hopper a pipeline holds one stage less than it has.
    held = tile._replace(k=rank_block, stages=tile.stages - (device.capability < 90))
    fits = tuning.shared_bytes(held, x.dtype, wide.dtype) <= device.shared
    room = fits and not (single or tile.m * tile.n > 128 * 128 or x.dtype == torch.float32)
    first = not room and any(o is not None and o.dtype != x.dtype for o in (shrink, core, wide))
    if first:
        shrink, wide = (launch.Layout(o.shape, (o.shape[1], 1), x.dtype, True) for o in (shrink, wide))
        core = core and launch.Layout(core.shape, (core.shape[1], 1), x.dtype, True)
    blocks = {"x": (tile.m, tile.k), "weight": (tile.k, tile.n), "wide": (rank_block, tile.n)}
    blocks |= {"shrink": (tile.k, width)} if single else {}
    layouts = {"x": x, "weight": weight, "wide": wide, "shrink": shrink}
    blocks = {
        name: block[::-1] if transposed and name != "x" else block
        for name, block in blocks.items()
        if launch.described(layouts[name], x.dtype, device)
    }
    arguments = dict(
        blocks=blocks,
        warps=tile.warps,
        stages=tile.stages,
        M=M,
        N=N,
        K=K,
        R=R,
        x_stride_row=x.strides[0],
        x_stride_col=x.strides[1],
        weight_stride_row=weight.strides[0],
        weight_stride_col=weight.strides[1],
        wide_stride_row=wide.strides[0],
        wide_stride_col=wide.strides[1],
        bias_stride=bias.strides[0] if bias else 0,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        BLOCK_R=rank_block,
        GROUP_M=GROUP_M,
        CHECK_K=K % tile.k != 0,
        TRANSPOSED=transposed,
        X_DESCRIPTOR="x" in blocks,
        WEIGHT_DESCRIPTOR="weight" in blocks,
        WIDE_DESCRIPTOR="wide" in blocks,
        BIAS=bias is not None,
        DTYPE=launch.DTYPES[x.dtype],
        PRECISION=launch.precision(x.dtype, tf32),
    )
    rows = triton.cdiv(M, tile.m)
    tiles = rows * triton.cdiv(N, tile.n)
    if not single:
        masked = dropout and not transposed
        return Plan(tile, first, False, launch.Launch(extended_product, (tiles,), DROPOUT=masked, **arguments), 0)
    both = launch.Launch(
        single_launch,
        (min(device.processors, rows + tiles),),
        shrink_stride_row=shrink.strides[0],
        shrink_stride_col=shrink.strides[1],
        core_stride_row=core.strides[0] if core else 0,
        core_stride_col=core.strides[1] if core else 0,
        PADDED_R=width,
        SHRINK_DESCRIPTOR="shrink" in blocks,
        CORE=core is not None,
        **arguments,
    )
    return Plan(tile, first, True, both, 2 + rows)
