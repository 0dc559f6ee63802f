"""The orthogonality penalty of all layers of a LoRA² model.

penalty            the penalty of every pair (v, u) and (V, U), in one launch and a sum
penalty_backward   the gradients of all vectors, in one launch

A launch finds its tensors by a table of addresses that travels with it. They are contiguous and of one dtype; sums are
made in fp32 and in one order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

from . import launch, tuning
from .tiles import Matrix, load_tile, store_tile

# The largest r and k: the small products are made in the registers of one program.
LARGEST = 32
# Columns of a large vector that are multiplied at a time, and that are summed before they are added to the rest.
BLOCK_N, CHUNK = 64, 512


def penalty(tensors: Sequence[Tensor], squared: bool, weight: float) -> tuple[Tensor, Tensor]:
    """(value times weight, saved) for v, u, V and U of each layer; `saved` is what `penalty_backward` needs."""
    rows, padded_k, padded_r = _pairs(tensors)
    saved = tensors[0].new_empty(sum(k * (k + r) for *_, r, k, _ in rows), dtype=torch.float32)
    values = saved.new_empty(len(rows))
    launch.run(
        penalty_of_pair,
        (len(rows),),
        on=saved,
        warps=_warps(padded_k, padded_r),
        table=launch.table(rows, saved),
        like=tensors[0],
        saved=saved,
        values=values,
        SQUARED=squared,
        PADDED_K=padded_k,
        PADDED_R=padded_r,
        BLOCK_N=BLOCK_N,
        CHUNK=CHUNK,
    )
    return weight * values.sum(), saved


def penalty_backward(tensors: Sequence[Tensor], saved: Tensor, scale: Tensor) -> Sequence[Tensor]:
    """The gradients of `tensors` times scale, views of one tensor."""
    rows, padded_k, padded_r = _pairs(tensors)
    grads = tensors[0].new_empty(sum(t.numel() for t in tensors))
    launch.run(
        gradients_of_pair,
        (triton.cdiv(max(row[4] for row in rows), BLOCK_N), len(rows)),
        on=saved,
        warps=_warps(padded_k, padded_r),
        table=launch.table(rows, saved),
        like=tensors[0],
        saved=saved,
        grads=grads,
        scale=scale,
        PADDED_K=padded_k,
        PADDED_R=padded_r,
        BLOCK_N=BLOCK_N,
    )
    return _unflatten_dense_tensors(grads, tensors)


@triton.jit
def penalty_of_pair(
    table,
    like,
    saved,
    values,
    SQUARED: tl.constexpr,
    PADDED_K: tl.constexpr,
    PADDED_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """With w = v and t = u, or w = Vᵀ and t = Uᵀ: the terms of w·wᵀ, tᵀ·t and t·w·wᵀ·tᵀ, D of dw = D·w, and dt."""
    w, t, to, _, n, r, k, right = pair_at(table, like, tl.program_id(0))
    saved += to
    a = tl.zeros((PADDED_K, PADDED_K), tl.float32)
    for chunk in range(0, n, CHUNK):
        # NOTE: one sum over all columns would lose more to rounding than the error budget has.
        part = tl.zeros((PADDED_K, PADDED_K), tl.float32)
        for start in range(chunk, min(chunk + CHUNK, n), BLOCK_N):
            if right:
                tall = load_tile(Matrix(w, k, 1), start, 0, n, k, BLOCK_N, PADDED_K).to(tl.float32)
                part = tl.dot(tall.T, tall, part, input_precision="ieee")
            else:
                wide = load_tile(Matrix(w, n, 1), 0, start, k, n, PADDED_K, BLOCK_N).to(tl.float32)
                part = tl.dot(wide, wide.T, part, input_precision="ieee")
        a += part
    t = Matrix(t, tl.where(right, 1, k), tl.where(right, r, 1))
    t = load_tile(t, 0, 0, r, k, PADDED_R, PADDED_K).to(tl.float32)
    a -= identity(k, PADDED_K)
    g = tl.dot(t.T, t, input_precision="ieee") - identity(k, PADDED_K)
    dt = tl.dot(t, g, input_precision="ieee")
    a_square, g_square = tl.sum(a * a), tl.sum(g * g)
    if SQUARED:
        ta = tl.dot(t, a, t, input_precision="ieee")  # u·v·vᵀ
        # NOTE: barriers keep ptxas from loading the operands of one product while it is at another, and spilling.
        tl.debug_barrier()
        p = tl.dot(ta, t.T, input_precision="ieee") - identity(r, PADDED_R)
        tl.debug_barrier()
        value = a_square + g_square + tl.sum(p * p)
        pt = tl.dot(p, t, input_precision="ieee")
        tl.debug_barrier()
        D = 4 * tl.dot(t.T, pt, a, input_precision="ieee")
        tl.debug_barrier()
        dt = 4 * tl.dot(p, ta, dt, input_precision="ieee")
    else:
        value = tl.sqrt(a_square) + tl.sqrt(g_square)
        # The norm has no gradient at 0: take 0.
        D = a * tl.where(a_square > 0, 2 / tl.sqrt(tl.where(a_square > 0, a_square, 1.0)), 0.0)
        dt = dt * tl.where(g_square > 0, 2 / tl.sqrt(tl.where(g_square > 0, g_square, 1.0)), 0.0)
    tl.store(values + tl.program_id(0), value)
    store_tile(saved, D, 0, 0, k, k, PADDED_K, PADDED_K)
    if right:
        store_tile(saved + k * k, dt.T, 0, 0, k, r, PADDED_K, PADDED_R)
    else:
        store_tile(saved + k * k, dt, 0, 0, r, k, PADDED_R, PADDED_K)


@triton.jit
def gradients_of_pair(
    table,
    like,
    saved,
    grads,
    scale,
    PADDED_K: tl.constexpr,
    PADDED_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Some columns of scale·D·w, and with the first of them scale·dt."""
    w, _, at, to, n, r, k, right = pair_at(table, like, tl.program_id(1))
    saved += at
    grads += to
    scale = tl.load(scale).to(tl.float32)
    start = tl.program_id(0) * BLOCK_N
    if start < n:
        D = load_tile(Matrix(saved, k, 1), 0, 0, k, k, PADDED_K, PADDED_K) * scale
        if right:
            tall = load_tile(Matrix(w, k, 1), start, 0, n, k, BLOCK_N, PADDED_K).to(tl.float32)
            tall = tl.dot(tall, D, input_precision="ieee")
            store_tile(grads, tall, start, 0, n, k, BLOCK_N, PADDED_K)
        else:
            wide = load_tile(Matrix(w, n, 1), 0, start, k, n, PADDED_K, BLOCK_N).to(tl.float32)
            wide = tl.dot(D, wide, input_precision="ieee")
            store_tile(grads, wide, 0, start, k, n, PADDED_K, BLOCK_N)
    if start == 0:
        # It lies as its tensor does.
        i = tl.arange(0, PADDED_R * PADDED_K)
        dt = tl.load(saved + k * k + i, mask=i < r * k) * scale
        tl.store(grads + n * k + i, dt.to(grads.dtype.element_ty), mask=i < r * k)


@triton.jit
def pair_at(table, like, pair):
    """w, t, where its values are saved and its gradients written, n, r, k, and whether it is V and U."""
    row = table + pair * 8
    w, t = tl.load(row).to(like.dtype), tl.load(row + 1).to(like.dtype)
    n, r, k = tl.load(row + 4).to(tl.int32), tl.load(row + 5).to(tl.int32), tl.load(row + 6).to(tl.int32)
    return w, t, tl.load(row + 2), tl.load(row + 3), n, r, k, tl.load(row + 7) != 0


@triton.jit
def identity(size, PADDED: tl.constexpr):
    i = tl.arange(0, PADDED)
    return ((i[:, None] == i[None, :]) & (i < size)[:, None]).to(tl.float32)


def _pairs(tensors: Sequence[Tensor]) -> tuple[list[list[int]], int, int]:
    """What `pair_at` reads of each pair, and the padded k and r."""
    rows, saved, written = [], 0, 0
    for place in range(0, len(tensors), 2):
        w, t = tensors[place], tensors[place + 1]
        right = place % 4 // 2
        n, k = w.shape if right else w.shape[::-1]
        r = t.shape[right]
        rows.append([w.data_ptr(), t.data_ptr(), saved, written, n, r, k, right])
        saved, written = saved + k * (k + r), written + k * (n + r)
    return rows, *(tuning.padded(max(row[column] for row in rows)) for column in (6, 5))


def _warps(padded_k: int, padded_r: int) -> int:
    return 4 if max(padded_k, padded_r) == 16 else 8
