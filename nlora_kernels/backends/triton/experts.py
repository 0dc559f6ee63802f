"""The layers of a mixture's experts, each product of all experts in one launch.

    T, P = x_e·A_eᵀ, s·T_e·N_eᵀ     y_e = [x_e | P_e]·[W_e | B_e]ᵀ + bias_e
    G, H = dy_e·B_e, s·G_e·N_e      dx_e = [dy_e | H_e]·[W_e ; A_e]
    dA_e = H_eᵀ·x_e     dN_e = s·G_eᵀ·T_e     dB_e = dy_eᵀ·P_e

Rows are sorted by expert, and where those of each end is known on the device alone. So the host launches as many
programs as the rows could need, and a program finds out by itself which expert's rows are its own; the surplus ends at
once. Two kinds of product are shared out so: by blocks of rows, of which none holds two experts', and sums over the
rows of each expert. Their tiles are those of `narrow` and `extended`.

Letters: M rows, K features that are summed over, N features that come out, R rank, E experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import ExpertsCall, Grads, Needs
from . import device, launch, tuning
from .extended import GROUP_M, Extended, extended_tile, raster
from .narrow import WIDEST_CORE, Narrow, summing
from .tiles import Core, Matrix, Vector, item, multiply, store_product, store_tile


def forward(call: ExpertsCall) -> tuple[Tensor, Tensor]:
    A, N, B = packed(call)
    T, P = narrow(call.x, A, N, call.offsets, call.scaling, transposed=True)
    return extended(call.x, call.weight, P, B, call.bias, call.offsets, transposed=True), T


def backward(call: ExpertsCall, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
    x, offsets, weight, scaling = call.x, call.offsets, call.weight, call.scaling
    A, N, B = packed(call)
    dx = dweight = dA = dB = dN = dbias = None
    if needs.x or needs.lora_A or needs.lora_N:
        G, H = narrow(dy, B, N, offsets, scaling, transposed=False)
    if needs.x:
        dx = extended(dy, weight, H, A, None, offsets, transposed=False)
    if needs.weight:
        dweight = sums(dy, x, offsets, dtype=weight.dtype)
    if needs.lora_A:
        dA = sums(H, x, offsets, dtype=call.lora_A.dtype)
    if needs.lora_N:
        dN = sums(G, T, offsets, scaling, dtype=call.lora_N.dtype)
    if needs.lora_B and N is None:
        dB = sums(dy, T, offsets, scaling, dtype=call.lora_B.dtype)
    elif needs.lora_B:
        # P is made again rather than kept: it costs R/K of what made T.
        dB = sums(dy, narrow(T, N, None, offsets, scaling, transposed=True)[1], offsets, dtype=call.lora_B.dtype)
    if needs.bias:
        dbias = sums(dy, dy.new_ones(1).expand(dy.shape[0], 1), offsets, dtype=dy.dtype).squeeze(2)
    return Grads(dx, dweight, dA, dB, dN, dbias)


def packed(call: ExpertsCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """A, N and B in x's dtype with contiguous rows: PEFT keeps those of all experts' B side by side."""

    def one(t: Tensor | None) -> Tensor | None:
        if t is None or (t.dtype == call.weight.dtype and t.stride(2) == 1):
            return t
        return torch.empty(t.shape, dtype=call.weight.dtype, device=t.device).copy_(t)

    return one(call.lora_A), one(call.lora_N), one(call.lora_B)


# Kernels


@triton.jit
def rows_of(offsets, expert, M, E):
    """The first row of an expert and the end of its rows; those past the last expert's are expert E's."""
    # NOTE: nobody has looked at offsets on a GPU: whatever they are, no row is outside of x.
    before = offsets.data + (expert - 1) * offsets.stride
    first = tl.load(before, mask=(expert > 0) & (expert <= E), other=0).to(tl.int32)
    end = tl.load(before + offsets.stride, mask=expert < E, other=M).to(tl.int32)
    return tl.maximum(first, 0), tl.where(expert <= E, tl.minimum(end, M), 0)


@triton.jit
def expert_of(offsets, block, M, E, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a block of rows. The blocks of an expert follow those of the one
    before; past the last is EXPERTS, a power of two above E."""
    experts = tl.arange(0, EXPERTS)
    first, end = rows_of(offsets, experts, M, E)
    blocks = tl.maximum(tl.cdiv(end - first, BLOCK_M), 0)
    before = tl.cumsum(blocks, 0) - blocks
    expert = tl.sum((before + blocks <= block).to(tl.int32), 0)
    own = experts == expert
    row = tl.sum(tl.where(own, first + (block - before) * BLOCK_M, 0), 0)
    return expert, row, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def narrow_experts(x, shrink, core, raw, out, offsets, M, R, K, E, alpha, META: tl.constexpr, EXPERTS: tl.constexpr):
    """raw = x_e·shrink_e, out = alpha·raw·core_e for the rows of each expert, and zero for rows without one."""
    BLOCK_M: tl.constexpr = META.product.BLOCK_M
    BLOCK_N: tl.constexpr = META.product.BLOCK_N
    tiles_n = tl.cdiv(R, BLOCK_N)
    n = tl.program_id(0) % tiles_n * BLOCK_N
    expert, m, end = expert_of(offsets, tl.program_id(0) // tiles_n, M, E, BLOCK_M, EXPERTS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if expert < E:
        acc = multiply(acc, x, item(shrink, expert), m, n, end, R, 0, K, None, 0, META.product)
        own = item(core, expert) if core is not None else None
        store_product(acc, raw, out, own, m, n, end, R, alpha, BLOCK_M, BLOCK_N, META.core)
    elif expert == E:
        store_product(acc, raw, out, None, m, n, end, R, alpha, BLOCK_M, BLOCK_N, META.core)


@triton.jit
def extended_experts(x, weight, P, expand, bias, y, offsets, M, N, K, R, E, META: tl.constexpr, EXPERTS: tl.constexpr):
    """y = [x_e | P_e]·[weight_e ; expand_e] + bias_e for the rows of each expert, and zero for rows without one."""
    BLOCK_M: tl.constexpr = META.features.BLOCK_M
    BLOCK_N: tl.constexpr = META.features.BLOCK_N
    tiles_n = tl.cdiv(N, BLOCK_N)
    block, column = raster(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, META.GROUP_M)
    n = column * BLOCK_N
    expert, m, end = expert_of(offsets, block, M, E, BLOCK_M, EXPERTS)
    if expert < E:
        W, B, own = item(weight, expert), item(expand, expert), None
        if bias is not None:
            own = Vector(bias.data + expert.to(tl.int64) * bias.stride_row, bias.stride_col)
        extended_tile(x, W, Matrix(P, R, 1), B, own, y, m, n, end, N, K, R, None, None, 0, 1.0, META)
    elif expert == E:
        store_tile(y, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), m, n, end, N, BLOCK_M, BLOCK_N)


@triton.jit
def expert_sums(a, b, out, slices, offsets, rows, M, N, E, alpha, META: tl.constexpr):
    """out_e = alpha·a_eᵀ·b_e, sums over the rows of each expert, (M, N) all of them.

    Split, each part of a sum goes to a slice of its own, as in `narrow_product`.
    """
    tiles_n = tl.cdiv(N, META.BLOCK_N)
    tiles = tl.cdiv(M, META.BLOCK_M) * tiles_n
    expert = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    m = tile // tiles_n * META.BLOCK_M
    n = tile % tiles_n * META.BLOCK_N
    first, end = rows_of(offsets, expert, rows, E)
    part = tl.cdiv(end - first, tl.num_programs(1) * META.BLOCK_K) * META.BLOCK_K
    first += tl.program_id(1) * part
    acc = tl.zeros((META.BLOCK_M, META.BLOCK_N), tl.float32)
    acc = multiply(acc, a, b, m, n, M, N, first, tl.minimum(end, first + part), None, 0, META)
    if slices is not None:
        slice_ = slices + (tl.program_id(1) * E + expert).to(tl.int64) * M * N
        store_tile(slice_, acc, m, n, M, N, META.BLOCK_M, META.BLOCK_N)
    else:
        store_tile(out + expert.to(tl.int64) * M * N, acc * alpha, m, n, M, N, META.BLOCK_M, META.BLOCK_N)


# Launches


def narrow(
    x: Tensor,
    shrink: Tensor,
    core: Tensor | None,
    offsets: Tensor,
    alpha: float,
    *,
    transposed: bool,
) -> tuple[Tensor, Tensor]:
    """(raw, out) = (x_e·shrink_e, alpha·raw·core_e), both in x's dtype. `transposed`: as for `extended.product`."""
    if core is not None and core.shape[1] > WIDEST_CORE:
        raw = narrow(x, shrink, None, offsets, 1.0, transposed=transposed)[0]
        return raw, narrow(raw, core, None, offsets, alpha, transposed=transposed)[1]
    shape = x.shape[0], shrink.shape[1 if transposed else 2]
    raw, out = (torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(2))
    launched = planned_narrow(
        *map(launch.layout, (x, shrink, core, offsets)), x.get_device(), launch.tf32(x.dtype), transposed
    )
    if launched:
        launched(x, x=x, shrink=shrink, core=core, raw=raw, out=out, offsets=offsets, alpha=float(alpha))
    return raw, out


def extended(
    x: Tensor, weight: Tensor, P: Tensor, expand: Tensor, bias: Tensor | None, offsets: Tensor, *, transposed: bool
) -> Tensor:
    """[x_e | P_e]·[weight_e ; expand_e] + bias_e in x's dtype. `transposed`: as for `extended.product`."""
    rows_are_columns = weight.stride(1) == 1 != weight.stride(2)
    # What is stored the other way round is read the other way round.
    stored = weight.mT if rows_are_columns else weight
    y = torch.empty((x.shape[0], weight.shape[1 if transposed else 2]), dtype=x.dtype, device=x.device)
    launched = planned_extended(
        *map(launch.layout, (x, stored, expand, bias, offsets)),
        x.get_device(),
        launch.tf32(x.dtype),
        transposed,
        transposed != rows_are_columns,
    )
    if launched:
        launched(x, x=x, weight=stored, P=P, expand=expand, bias=bias, y=y, offsets=offsets)
    return y


def sums(a: Tensor, b: Tensor, offsets: Tensor, alpha: float = 1.0, *, dtype: torch.dtype) -> Tensor:
    """alpha·a_eᵀ·b_e for every expert, (E, M, N) of a (rows, M) and b (rows, N), in `dtype`."""
    shape = offsets.shape[0], a.shape[1], b.shape[1]
    if a.shape[0] == 0 or 0 in shape:
        return torch.zeros(shape, dtype=dtype, device=a.device)
    product, splits, total = planned_sums(
        *map(launch.layout, (a, b, offsets)), a.get_device(), launch.tf32(a.dtype), dtype
    )
    out = torch.empty(shape, dtype=dtype, device=a.device)
    if total is None:
        product(a, a=a, b=b, offsets=offsets, out=out, alpha=float(alpha))
        return out
    slices = torch.empty((splits, *shape), dtype=torch.float32, device=a.device)
    product(a, a=a, b=b, offsets=offsets, slices=slices, alpha=float(alpha))
    total(a, slices=slices, out=out, alpha=float(alpha))
    return out


@launch.planned
def planned_narrow(x, shrink, core, offsets, index, tf32, transposed) -> launch.Launch | None:
    x, shrink, core, offsets = (o and launch.Layout(*o) for o in (x, shrink, core, offsets))
    (M, K), (E,), R = x.shape, offsets.shape, shrink.shape[1 if transposed else 2]
    if M == 0 or R == 0:
        return None
    on = device.target(index)
    columns = tuning.padded(R) if core else 16
    each = triton.cdiv(M, max(E, 1))
    tile, _ = tuning.narrow_tile(each, R, K, columns, x.dtype, tf32, launch.aligned(x, shrink), on, x.dtype, E)
    product = launch.product_of(tile, K, x.dtype, tf32, B_TRANSPOSED=transposed)
    layouts = {"x": x, "shrink": shrink, "core": core, "offsets": offsets}
    blocks = {"x": (tile.m, tile.k), "shrink": (1, tile.n, tile.k) if transposed else (1, tile.k, tile.n)}
    return launch.Launch(
        narrow_experts,
        (blocks_of_rows(M, E, tile.m) * triton.cdiv(R, tile.n),),
        warps=tile.warps,
        stages=tile.stages,
        meta=Narrow(product, Core(transposed, product.DTYPE, product.PRECISION)),
        layouts=layouts,
        blocks=launch.described_blocks(layouts, blocks, x.dtype, on),
        M=M,
        R=R,
        K=K,
        E=E,
        EXPERTS=tuning.padded(E + 1),
    )


@launch.planned
def planned_extended(x, weight, expand, bias, offsets, index, tf32, transposed, weight_transposed):
    """`weight_transposed`: of the weight alone, as it is stored."""
    x, weight, expand, bias, offsets = (o and launch.Layout(*o) for o in (x, weight, expand, bias, offsets))
    (M, K), (E,) = x.shape, offsets.shape
    N, R = weight.shape[1 if weight_transposed else 2], expand.shape[2 if transposed else 1]
    if M == 0 or N == 0:
        return None
    on, aligned = device.target(index), launch.aligned(x, weight)
    tile = tuning.wide_tile(triton.cdiv(M, max(E, 1)), N, K, R, x.dtype, tf32, aligned, on, weight_transposed, E)
    features = launch.product_of(tile, K, x.dtype, tf32, B_TRANSPOSED=weight_transposed)
    depth = min(tuning.padded(R), tile.k)
    rank = features._replace(BLOCK_K=depth, CHECK_K=True, B_TRANSPOSED=transposed)
    layouts = {"x": x, "weight": weight, "expand": expand, "bias": bias, "offsets": offsets}
    blocks = {
        "x": (tile.m, tile.k),
        "weight": (1, tile.n, tile.k) if weight_transposed else (1, tile.k, tile.n),
        "expand": (1, tile.n, depth) if transposed else (1, depth, tile.n),
    }
    return launch.Launch(
        extended_experts,
        (blocks_of_rows(M, E, tile.m) * triton.cdiv(N, tile.n),),
        warps=tile.warps,
        stages=tile.stages,
        meta=Extended(features, rank, shrink=None, core=None, GROUP_M=GROUP_M),
        layouts=layouts,
        blocks=launch.described_blocks(layouts, blocks, x.dtype, on),
        M=M,
        N=N,
        K=K,
        R=R,
        E=E,
        EXPERTS=tuning.padded(E + 1),
    )


@launch.planned
def planned_sums(a, b, offsets, index, tf32, dtype) -> tuple[launch.Launch, int, launch.Launch | None]:
    """The sums, into how many slices each is split, and what adds those up. `dtype`: out's."""
    a, b, offsets = (launch.Layout(*o) for o in (a, b, offsets))
    (rows, M), N, (E,) = a.shape, b.shape[1], offsets.shape
    on = device.target(index)
    each, aligned = triton.cdiv(rows, E), launch.aligned(a, b)
    tile, splits = tuning.narrow_tile(M, N, each, 16, a.dtype, tf32, aligned, on, b.dtype, E)
    product = launch.product_of(tile, each, a.dtype, tf32, A_TRANSPOSED=True)._replace(CHECK_K=True)
    # NOTE: by pointers alone, for a descriptor does not know where the rows of an expert end.
    made = launch.Launch(
        expert_sums,
        (E * triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n), splits),
        warps=tile.warps,
        stages=tile.stages,
        meta=product,
        layouts={"a": a, "b": b, "offsets": offsets},
        rows=rows,
        M=M,
        N=N,
        E=E,
    )
    finish = Core(False, product.DTYPE, product.PRECISION)
    return made, splits, summing(E * M, N, splits, finish) if splits > 1 else None


def blocks_of_rows(M: int, E: int, height: int) -> int:
    """As many as blocks of that height there can be, of which none holds rows of two experts."""
    return M // height + min(E + 1, M)
