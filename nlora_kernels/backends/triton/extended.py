"""The product whose sum goes on over the rank, y = [x | P]·[W | B]ᵀ, after the narrow one or in one launch with it.

Letters: M tokens, K features that are summed over, N features that come out, R rank, and P the (M, R) matrix that
follows x, which in the gradient of x is H. Forward and that gradient are the same kernels; they differ in the
orientation in which they read the weight and the adapter.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Dropout
from ..quantised import Coded
from . import device, launch, narrow, quantised, tuning
from .cast import cast
from .dropout import drop
from .tiles import Core, Matrix, Product, multiply, store_product, store_tile

# Row blocks that share columns of the weight in L2.
GROUP_M = 8


class Extended(NamedTuple):
    """What a kernel of the extended product is compiled for: its sum over K, its sum over R, and, where it makes P too,
    that product."""

    features: Product
    rank: Product
    shrink: Product | None
    core: Core | None
    GROUP_M: int


@triton.jit
def extended_tile(x, weight, P, expand, bias, y, m, n, M, N, K, R, flag, seed, threshold, scale, META: tl.constexpr):
    """One tile of y = [x | P]·[weight ; expand] + bias: the sum over K goes on over R in the same accumulator.

    Forward reads weight (N, K) and expand = lora_B (N, R) transposed; the gradient of x reads weight (K, N) and
    expand = lora_A (R, N) as stored. A flag of these rows, if any, is awaited between the two sums. With dropout, whose
    seed is then there, the sum over R comes first, for it alone is masked.
    """
    BLOCK_M: tl.constexpr = META.features.BLOCK_M
    BLOCK_N: tl.constexpr = META.features.BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if seed is not None:
        acc = multiply(acc, P, expand, m, n, M, N, 0, R, None, 0, META.rank)
        acc = drop(acc, seed, threshold, m, n, BLOCK_M, BLOCK_N) * scale
    acc = multiply(acc, x, weight, m, n, M, N, 0, K, None, 0, META.features)
    if flag is not None:
        ready = tl.atomic_add(flag, 0, sem="acquire")
        while ready == 0:
            ready = tl.atomic_add(flag, 0, sem="acquire")
    if seed is None and expand is not None:
        acc = multiply(acc, P, expand, m, n, M, N, 0, R, None, 0, META.rank)
    if bias is not None:
        j = n + tl.arange(0, BLOCK_N)
        acc += tl.load(bias.data + j * bias.stride, mask=j < N, other=0.0).to(tl.float32)[None, :]
    store_tile(y, acc, m, n, M, N, BLOCK_M, BLOCK_N)


@triton.jit
def raster(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row block, column block) of a tile; rows in groups, so that both operands stay in L2."""
    per_group = GROUP_M * tiles_n
    first = tile // per_group * GROUP_M
    group = tl.minimum(tiles_m - first, GROUP_M)
    inside = tile % per_group
    return first + inside % group, inside // group


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed"])
def extended_product(x, weight, P, expand, bias, y, seed, threshold, scale, M, N, K, R, META: tl.constexpr):
    """y = [x | P]·[weight ; expand] + bias, one tile a program."""
    BLOCK_M: tl.constexpr = META.features.BLOCK_M
    BLOCK_N: tl.constexpr = META.features.BLOCK_N
    block, column = raster(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), META.GROUP_M)
    m, n = block * BLOCK_M, column * BLOCK_N
    extended_tile(x, weight, Matrix(P, R, 1), expand, bias, y, m, n, M, N, K, R, None, seed, threshold, scale, META)


@triton.jit
def single_launch(x, weight, shrink, core, expand, bias, raw, P, y, state, M, N, K, R, alpha, META: tl.constexpr):
    """narrow_product and extended_product in one launch.

    Programs draw items from a ticket. In each group of row blocks the items that compute raw and P come first and
    raise the flag of their block; the tiles that need it wait for it only after their sum over K. An item waits for
    smaller tickets alone, so the launch advances whichever programs are resident.

    state: int32, all zero before and after: the ticket, how many programs have ended, then one flag for each row block.
    """
    BLOCK_M: tl.constexpr = META.features.BLOCK_M
    BLOCK_N: tl.constexpr = META.features.BLOCK_N
    PADDED_R: tl.constexpr = META.shrink.BLOCK_N
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    items = tiles_m * (1 + tiles_n)
    per_group = META.GROUP_M * (1 + tiles_n)
    item = tl.atomic_add(state, 1, sem="relaxed")
    while item < items:
        first = item // per_group * META.GROUP_M
        group = tl.minimum(tiles_m - first, META.GROUP_M)
        inside = item % per_group
        if inside < group:
            block = first + inside
            m = block * BLOCK_M
            acc = tl.zeros((BLOCK_M, PADDED_R), tl.float32)
            acc = multiply(acc, x, shrink, m, 0, M, R, 0, K, None, 0, META.shrink)
            store_product(acc, raw, P, core, m, 0, M, R, alpha, BLOCK_M, PADDED_R, META.core)
            # NOTE: one thread raises the flag; the barrier puts the stores of all the others before it.
            tl.debug_barrier()
            tl.atomic_xchg(state + 2 + block, 1, sem="release")
        else:
            block = first + (inside - group) % group
            m, n = block * BLOCK_M, (inside - group) // group * BLOCK_N
            flag = state + 2 + block
            left = Matrix(P, R, 1)
            extended_tile(x, weight, left, expand, bias, y, m, n, M, N, K, R, flag, None, 0, 1.0, META)
        item = tl.atomic_add(state, 1, sem="relaxed")
    if tl.atomic_add(state + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        # No other program will draw a ticket or look at a flag.
        for start in range(0, 2 + tiles_m, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            tl.store(state + i, 0, mask=i < 2 + tiles_m)


def product(
    x: Tensor,
    weight: Tensor | Coded,
    shrink: Tensor,
    core: Tensor | None,
    expand: Tensor,
    bias: Tensor | None,
    alpha: float,
    *,
    transposed: bool,
    tile: tuning.Tile | None = None,
    single: bool | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(raw, P, y) = (x·shrink, alpha·raw·core, [x | P]·[weight ; expand] + bias), all in x's dtype.

    A weight in few bits is decoded tile by tile.

    `transposed`: weight, shrink, core and expand are stored as the transpose of what is multiplied, as in forward.
    dropout: of the adapter's input, which is x if transposed, else of what the adapter adds to y.
    tile, single: tile and number of launches in place of those that `tuning` chooses.
    """
    plan = planned(
        launch.layout(x),
        (quantised if isinstance(weight, Coded) else launch).layout(weight),
        launch.layout(shrink),
        launch.layout(core),
        launch.layout(expand),
        launch.layout(bias),
        x.get_device(),
        launch.tf32(x.dtype),
        transposed,
        tile,
        single,
        dropout is not None,
    )
    if plan.cast:
        shrink, core, expand = cast(x.dtype, shrink, core, expand)
    y = torch.empty(plan.shape, dtype=x.dtype, device=x.device)
    if plan.single:
        raw, P = (torch.empty((x.shape[0], plan.rank), dtype=x.dtype, device=x.device) for _ in range(2))
        made = dict(shrink=shrink, core=core, raw=raw, state=launch.counters(x, plan.counters), alpha=float(alpha))
    else:
        of_x, of_y = (dropout, None) if transposed else (None, dropout)
        how = dict(alpha=alpha, raw=True, b_transposed=transposed, core_transposed=transposed)
        raw, P = narrow.product(x, shrink, core, **how, dropout=of_x, drops="a" if of_x else "")
        made = launch.mask(of_y)
    if plan.launch:
        weight = quantised.operand(weight) if isinstance(weight, Coded) else weight
        plan.launch(x, x=x, weight=weight, P=P, expand=expand, bias=bias, y=y, **made)
    return raw, P, y


class Plan(NamedTuple):
    """How the extended product is computed: the shape of y and the rank, whether the adapter is cast before, whether
    `launch`, which an empty y has not, holds the narrow product too, and if so how many counters it has."""

    shape: tuple[int, int]
    rank: int
    cast: bool
    single: bool
    launch: launch.Launch | None
    counters: int


@launch.planned
def planned(x, weight, shrink, core, expand, bias, index, tf32, transposed, tile, single, dropout) -> Plan:
    coded = type(weight) is quantised.Layout
    x, shrink, expand = (launch.Layout(*operand) for operand in (x, shrink, expand))
    weight = weight if coded else launch.Layout(*weight)
    core, bias = core and launch.Layout(*core), bias and launch.Layout(*bias)
    (M, K), R = x.shape, shrink.shape[0 if transposed else 1]
    N = weight.shape[0 if transposed else 1]
    if M == 0 or N == 0:
        return Plan((M, N), R, False, False, None, 0)
    on = device.target(index)
    if coded:
        aligned, single = launch.aligned(x), False
        tile = tile or tuning.decoding_tile(M, N, weight.block, x.dtype, tf32, aligned, on, transposed)
    else:
        aligned = launch.aligned(x, weight)
        tile = tile or tuning.wide_tile(M, N, K, R, x.dtype, tf32, aligned, on, transposed)
    if single is None:
        # What a mask costs in registers leaves none for two kinds of tile in one program.
        single = not dropout and tuning.single_launch(M, N, K, R, x.dtype, tf32, aligned, tile, on, transposed)
    width = tuning.padded(R)
    rank_block = min(width, tile.k)
    # Where the adapter is of another dtype it is cast in registers, without a launch of its own. A program that holds
    # both kinds of tile, or a tile that fills its registers, has none left for that; and it must fit as it is stored.
    # NOTE: before Hopper a pipeline holds one stage less than it has.
    held = tile._replace(k=rank_block, stages=tile.stages - (on.capability < 90))
    fits = tuning.shared_bytes(held, x.dtype, expand.dtype) <= on.shared
    room = fits and not (single or tile.m * tile.n > 128 * 128 or x.dtype == torch.float32)
    first = not room and any(o is not None and o.dtype != x.dtype for o in (shrink, core, expand))
    if first:
        shrink, expand = (launch.Layout(o.shape, (o.shape[1], 1), x.dtype, True) for o in (shrink, expand))
        core = core and launch.Layout(core.shape, (core.shape[1], 1), x.dtype, True)
    layouts = {"x": x, "weight": None if coded else weight, "expand": expand, "bias": bias}
    blocks = {"weight": (tile.k, tile.n), "expand": (rank_block, tile.n)}
    if single:
        layouts |= {"shrink": shrink, "core": core}
        blocks |= {"shrink": (tile.k, width)}
    if transposed:
        blocks = {name: block[::-1] for name, block in blocks.items()}
    codes = quantised.codes_of(weight, tile, transposed) if coded else None
    features = launch.product_of(tile, K, x.dtype, tf32, B_TRANSPOSED=transposed, CODES=codes)
    rows = triton.cdiv(M, tile.m)
    tiles = rows * triton.cdiv(N, tile.n)
    made = launch.Launch(
        single_launch if single else extended_product,
        (min(on.processors, rows + tiles) if single else tiles,),
        warps=tile.warps,
        stages=tile.stages,
        meta=Extended(
            features,
            rank=features._replace(BLOCK_K=rank_block, CHECK_K=True, CODES=None),
            shrink=features._replace(BLOCK_N=width) if single else None,
            core=Core(transposed, features.DTYPE, features.PRECISION) if single else None,
            GROUP_M=GROUP_M,
        ),
        layouts=layouts,
        blocks=launch.described_blocks(layouts, {"x": (tile.m, tile.k)} | blocks, x.dtype, on),
        M=M,
        N=N,
        K=K,
        R=R,
    )
    return Plan((M, N), R, first, single, made, 2 + rows if single else 0)
