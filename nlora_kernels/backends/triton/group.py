"""Layers that share x: their outputs in one launch, and the gradient of x, one sum over all of them, in another.

    T, P = x·[A₁; A₂; …]ᵀ, s·T·diag(N₁, N₂, …)ᵀ     yᵢ = [x | Pᵢ]·[Wᵢ | Bᵢ]ᵀ + biasᵢ
    Gᵢ, Hᵢ = dyᵢ·Bᵢ, s·Gᵢ·Nᵢ                         dx = Σᵢ [dyᵢ | Hᵢ]·[Wᵢ ; Aᵢ]

Gradients of parameters are those of each layer by itself. Letters: M tokens, K features of x, N those of y, R rank.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Call, Grads, Needs
from . import device, launch, linear, narrow, tuning
from .extended import GROUP_M, Extended, extended_tile, raster
from .tiles import Matrix, multiply, store_tile


def takes(calls: Sequence[Call]) -> bool:
    """Whether calls are computed together: of one scaling, without dropout, with ranks that fit into one tile, and by
    descriptors where Triton launches that."""
    adapted = [call for call in calls if call.lora_A is not None]
    ranks = sum(call.lora_A.shape[0] for call in adapted)
    return (
        len(calls) > 1
        and 0 < ranks <= narrow.WIDEST_CORE
        and len({call.scaling for call in adapted}) == 1
        and not any(call.dropout for call in calls)
        and all(call.weight.numel() for call in calls)
        and (launch.nests_descriptors() or device.target(calls[0].weight.get_device()).capability < 90)
    )


def forward(calls: Sequence[Call]) -> list[tuple[Tensor, Tensor | None]]:
    x, adapted = calls[0].x, [call for call in calls if call.lora_A is not None]
    shrink = torch.cat([call.lora_A for call in adapted]).to(x.dtype)
    core = None
    if any(call.lora_N is not None for call in adapted):
        cores = [torch.eye(len(c.lora_A), device=x.device) if c.lora_N is None else c.lora_N for c in adapted]
        core = torch.block_diag(*cores).to(x.dtype)
    how = dict(alpha=adapted[0].scaling, raw=True, b_transposed=True, core_transposed=True)
    T, P = narrow.product(x, shrink, core, **how)
    ys = products(x, P, calls)
    parts = iter(T.split([len(call.lora_A) for call in adapted], 1))
    return [(y, None if call.lora_A is None else next(parts).contiguous()) for y, call in zip(ys, calls, strict=True)]


def backward(
    calls: Sequence[Call], dys: Sequence[Tensor], Ts: Sequence[Tensor | None], needs: Sequence[Needs]
) -> tuple[Tensor | None, list[Grads]]:
    """The gradient of x, and of each call the others."""
    sides = [
        linear.sides(call, dy) if call.lora_A is not None and (need.x or need.lora_A or need.lora_N) else (None, None)
        for call, dy, need in zip(calls, dys, needs, strict=True)
    ]
    dx = sum_of_products(dys, [H for _, H in sides], calls) if needs[0].x else None
    members = zip(calls, dys, Ts, sides, needs, strict=True)
    return dx, [linear.gradients(call, dy, T, G, H, need) for call, dy, T, (G, H), need in members]


# Kernels


@triton.jit
def extended_group(x, weights, P, expands, biases, ys, sizes, ranks, M, K, R, META: tl.constexpr):
    """yᵢ = [x | Pᵢ]·[weightᵢ ; expandᵢ] + biasᵢ for every layer i, one tile of one of them a program.

    P (M, R) holds those of the layers side by side, sizes and ranks say how wide each layer and its P are.
    """
    BLOCK_N: tl.constexpr = META.features.BLOCK_N
    tiles_n = 0
    for i in tl.static_range(len(weights)):
        tiles_n += tl.cdiv(sizes[i], BLOCK_N)
    block, column = raster(tl.program_id(0), tl.cdiv(M, META.features.BLOCK_M), tiles_n, META.GROUP_M)
    m = block * META.features.BLOCK_M
    first, own = 0, P
    for i in tl.static_range(len(weights)):
        end = first + tl.cdiv(sizes[i], BLOCK_N)
        if (column >= first) & (column < end):
            n = (column - first) * BLOCK_N
            left = Matrix(own, R, 1)
            of = sizes[i]
            extended_tile(
                x, weights[i], left, expands[i], biases[i], ys[i], m, n, M, of, K, ranks[i], None, None, 0, 1.0, META
            )
        first = end
        own += ranks[i]


@triton.jit
def extended_sum(dys, weights, Hs, shrinks, dx, sizes, ranks, M, N, META: tl.constexpr):
    """dx = Σᵢ [dyᵢ | Hᵢ]·[weightᵢ ; shrinkᵢ], one tile a program. sizes, ranks: how wide dyᵢ and Hᵢ are."""
    BLOCK_M: tl.constexpr = META.features.BLOCK_M
    BLOCK_N: tl.constexpr = META.features.BLOCK_N
    block, column = raster(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), META.GROUP_M)
    m, n = block * BLOCK_M, column * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in tl.static_range(len(weights)):
        acc = multiply(acc, dys[i], weights[i], m, n, M, N, 0, sizes[i], None, 0, META.features)
        if Hs[i] is not None:
            H = Matrix(Hs[i], ranks[i], 1)
            acc = multiply(acc, H, shrinks[i], m, n, M, N, 0, ranks[i], None, 0, META.rank)
    store_tile(dx, acc, m, n, M, N, BLOCK_M, BLOCK_N)


# Launches


def products(x: Tensor, P: Tensor, calls: Sequence[Call]) -> list[Tensor]:
    """yᵢ of every call, of P (M, ΣR) with a part for each that has an adapter."""
    weights, biases = [call.weight for call in calls], [call.bias for call in calls]
    expands = [None if call.lora_B is None else call.lora_B.to(x.dtype) for call in calls]
    ys = [torch.empty((x.shape[0], len(w)), dtype=x.dtype, device=x.device) for w in weights]
    launched = planned(
        launch.layout(x),
        tuple(map(launch.layout, weights)),
        tuple(map(launch.layout, expands)),
        tuple(map(launch.layout, biases)),
        x.get_device(),
        launch.tf32(x.dtype),
        True,
    )
    if launched:
        launched(x, x=x, weights=(*weights,), P=P, expands=(*expands,), biases=(*biases,), ys=(*ys,))
    return ys


def sum_of_products(dys: Sequence[Tensor], Hs: Sequence[Tensor | None], calls: Sequence[Call]) -> Tensor:
    """Σᵢ dyᵢ·Wᵢ + Hᵢ·Aᵢ."""
    dy, weights = dys[0], [call.weight for call in calls]
    shrinks = [None if call.lora_A is None else call.lora_A.to(dy.dtype) for call in calls]
    dx = torch.empty((dy.shape[0], weights[0].shape[1]), dtype=dy.dtype, device=dy.device)
    launched = planned(
        tuple(map(launch.layout, dys)),
        tuple(map(launch.layout, weights)),
        tuple(map(launch.layout, shrinks)),
        None,
        dy.get_device(),
        launch.tf32(dy.dtype),
        False,
    )
    if launched:
        launched(dy, dys=(*dys,), weights=(*weights,), Hs=(*Hs,), shrinks=(*shrinks,), dx=dx)
    return dx


@launch.planned
def planned(x, weights, adapters, biases, index, tf32, transposed) -> launch.Launch | None:
    """Of the outputs, where weights and lora_B are read `transposed`, else of the gradient of x, whose x are the dy."""
    xs = [launch.Layout(*one) for one in ((x,) if transposed else x)]
    weights = [launch.Layout(*one) for one in weights]
    adapters = [one and launch.Layout(*one) for one in adapters]
    sizes = tuple(weight.shape[0] for weight in weights)
    ranks = tuple(one.shape[1 if transposed else 0] if one else 0 for one in adapters)
    M, dtype = xs[0].shape[0], xs[0].dtype
    K, N = (weights[0].shape[1], sum(sizes)) if transposed else (sum(sizes), weights[0].shape[1])
    if M == 0:
        return None
    on, aligned = device.target(index), launch.aligned(*xs, *weights)
    tile = tuning.wide_tile(M, N, K, sum(ranks), dtype, tf32, aligned, on, transposed)
    depth = min(tuning.padded(max(ranks)), tile.k)
    features = launch.product_of(tile, K, dtype, tf32, B_TRANSPOSED=transposed)
    if not transposed:
        features = features._replace(CHECK_K=any(size % tile.k for size in sizes))
    meta = Extended(features, features._replace(BLOCK_K=depth, CHECK_K=True), shrink=None, core=None, GROUP_M=GROUP_M)
    left, right, of_rank = (tile.m, tile.k), (tile.k, tile.n), (depth, tile.n)
    if transposed:
        right, of_rank = right[::-1], of_rank[::-1]
        columns = sum(triton.cdiv(size, tile.n) for size in sizes)
        layouts = {"x": xs[0], "weights": weights, "expands": adapters}
        layouts["biases"] = [one and launch.Layout(*one) for one in biases]
        blocks = {"x": left, "weights": right, "expands": of_rank}
        fixed = {"K": K, "R": sum(ranks)}
    else:
        columns = triton.cdiv(N, tile.n)
        layouts = {"dys": xs, "weights": weights, "shrinks": adapters}
        blocks = {"dys": left, "weights": right, "shrinks": of_rank}
        fixed = {"N": N}

    return launch.Launch(
        extended_group if transposed else extended_sum,
        (triton.cdiv(M, tile.m) * columns,),
        warps=tile.warps,
        stages=tile.stages,
        meta=meta,
        layouts=layouts,
        blocks=launch.described_blocks(layouts, blocks, dtype, on),
        sizes=sizes,
        ranks=ranks,
        M=M,
        **fixed,
    )
