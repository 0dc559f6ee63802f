"""LoRA² training over all layers of a model: the rank allocator's step and the orthogonality penalty.

smooth             moves the averages of every scored tensor, in one launch; the host does not wait
mask               scores, the least score that is kept, and the masks, in one launch
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

from . import launch
from .tiles import load_tile, store_tile

# The largest r and k: the small products are made in the registers of one program.
LARGEST = 32
# Values of a tensor that a program takes at a time.
BLOCK = 512
# Columns of a large vector that are multiplied at a time, and that are summed before they are added to the rest.
BLOCK_N, CHUNK = 64, 512


def smooth(
    sizes: Sequence[int],
    scored: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg: Tensor,
    exp_unc: Tensor,
    beta1: float,
    beta2: float,
    *,
    nonfinite: Tensor,
    progress: Tensor,
    hold: bool,
) -> None:
    """Ī and Ū of `RankAllocator`, in place, for E, u and U of each layer; sizes holds its r and k.

    If a product w·∂w is not finite the averages stay and `nonfinite` grows by one. With `hold` they also stay where
    `nonfinite` is not zero. `progress` is an int64 zero between launches.
    """
    rows, start = [], 0
    for layer, (r, k) in enumerate(zip(sizes[::2], sizes[1::2], strict=True)):
        here = slice(3 * layer, 3 * layer + 3)
        addresses = [t.data_ptr() for t in scored[here]]
        rows.append([*addresses, *(0 if g is None else g.data_ptr() for g in grads[here]), r, k, start])
        start += r + 2 * r * k
    launch.run(
        smooth_averages,
        (len(rows),),
        on=exp_avg,
        warps=4,
        table=_table(rows, exp_avg),
        # NOTE: it gives the kernel the dtype behind the addresses.
        like=scored[0],
        exp_avg=exp_avg,
        exp_unc=exp_unc,
        before=exp_avg.new_empty(2, start),
        nonfinite=nonfinite,
        progress=progress,
        size=start,
        beta1=beta1,
        beta2=beta2,
        hold=int(hold),
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["size", "hold"])
def smooth_averages(
    table,
    like,
    exp_avg,
    exp_unc,
    before,
    nonfinite,
    progress,
    size,
    beta1,
    beta2,
    hold,
    BLOCK: tl.constexpr,
):
    """The averages of one layer. The last program to end takes all layers back if one of them must not count."""
    row = table + tl.program_id(0) * 9
    r, k, start = tl.load(row + 6), tl.load(row + 7), tl.load(row + 8)
    faults = tl.zeros((BLOCK,), tl.int32)
    for tensor in range(3):
        w, grad = tl.load(row + tensor), tl.load(row + 3 + tensor)
        count = tl.where(tensor == 0, r, r * k)
        # fmt: off
        faults = smooth_tensor(w.to(like.dtype), grad.to(like.dtype), exp_avg + start, exp_unc + start, before + start,
                               size, count, tl.where(grad != 0, count, 0), beta1, beta2, faults, BLOCK)
        # fmt: on
        start += count
    fault = (tl.max(faults, 0) > 0).to(tl.int64)
    # NOTE: one thread counts the program in; the barrier puts the stores of all the others before it.
    tl.debug_barrier()
    # The number of programs that ended, and of those that met a fault from bit 32 on.
    ended = tl.atomic_add(progress, (fault << 32) + 1, sem="acq_rel")
    if (ended & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        tl.store(progress, 0)
        failed = ((ended >> 32) + fault > 0).to(tl.int64)
        total = tl.load(nonfinite) + failed
        tl.store(nonfinite, total)
        if failed + hold * total > 0:
            for offset in range(0, size, BLOCK):
                i = offset + tl.arange(0, BLOCK)
                tl.store(exp_avg + i, tl.load(before + i, mask=i < size), mask=i < size)
                tl.store(exp_unc + i, tl.load(before + size + i, mask=i < size), mask=i < size)


@triton.jit
def smooth_tensor(
    w,
    grad,
    exp_avg,
    exp_unc,
    before,
    size,
    count,
    count_grad,
    beta1,
    beta2,
    faults,
    BLOCK: tl.constexpr,
):
    for offset in range(0, count, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        inside = i < count
        values = tl.load(w + i, mask=inside, other=0.0).to(tl.float32)
        sensitivity = tl.abs(values * tl.load(grad + i, mask=i < count_grad, other=0.0).to(tl.float32))
        # False for NaN too.
        faults = tl.where(sensitivity < float("inf"), faults, 1)
        mean, spread = tl.load(exp_avg + i, mask=inside), tl.load(exp_unc + i, mask=inside)
        tl.store(before + i, mean, mask=inside)
        tl.store(before + size + i, spread, mask=inside)
        mean = beta1 * mean + (1 - beta1) * sensitivity
        spread = beta2 * spread + (1 - beta2) * tl.abs(sensitivity - mean)
        tl.store(exp_avg + i, mean, mask=inside)
        tl.store(exp_unc + i, spread, mask=inside)
    return faults


def mask(
    E: Sequence[Tensor],
    masks: Sequence[Tensor],
    exp_avg: Tensor,
    exp_unc: Tensor,
    where: Tensor,
    share: Tensor,
    scores: Tensor | None,
    kept: Tensor,
    budget: int,
) -> None:
    """E ← E ⊙ kept, mask ← kept, where `kept` marks the `budget` highest scores, of equal ones the first.

    Scores are given, or the sum over a row of share · (Ī·Ū)[where]; they are not negative. masks may be empty.
    """
    sizes = [t.numel() for t in E]
    addresses = [_elements(E, sizes)] + ([_elements(masks, sizes)] if masks else [])
    launch.run(
        keep_highest,
        (1,),
        on=exp_avg,
        warps=8,
        addresses=launch.to_device(torch.stack(addresses), exp_avg),
        like=E[0],
        exp_avg=exp_avg,
        exp_unc=exp_unc,
        where=where,
        share=share,
        scores=exp_avg.new_empty(kept.shape) if scores is None else scores,
        kept=kept,
        values=kept.numel(),
        width=where.shape[1],
        budget=budget,
        GIVEN=scores is not None,
        MASKS=bool(masks),
        BLOCK=BLOCK,
    )


@triton.jit(do_not_specialize=["values", "width", "budget"])
def keep_highest(
    addresses,
    like,
    exp_avg,
    exp_unc,
    where,
    share,
    scores,
    kept,
    values,
    width,
    budget,
    GIVEN: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if not GIVEN:
        for start in range(0, values, BLOCK):
            i = start + tl.arange(0, BLOCK)
            score = tl.zeros((BLOCK,), tl.float32)
            for c in range(0, width):
                at = tl.load(where + i * width + c, mask=i < values, other=0)
                product = tl.load(exp_avg + at) * tl.load(exp_unc + at)
                score += product * tl.load(share + i * width + c, mask=i < values, other=0.0)
            tl.store(scores + i, score, mask=i < values)
        tl.debug_barrier()
    # The bits of a number that is not negative order as the number does: the threshold is found bit by bit, as the
    # largest that `budget` scores reach.
    threshold = 0
    for step in range(31):
        candidate = threshold | (1 << (30 - step))
        threshold = tl.where(reaching(scores, candidate, values, BLOCK) >= budget, candidate, threshold)
    # Scores at the threshold are kept, from the first on, as far as the budget goes.
    left = budget - reaching(scores, threshold + 1, values, BLOCK)
    for start in range(0, values, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < values
        bits = tl.load(scores + i, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        equal = ((bits == threshold) & inside).to(tl.int32)
        keep = (bits > threshold) | ((equal > 0) & (tl.cumsum(equal, 0) <= left))
        left -= tl.sum(equal, 0)
        tl.store(kept + i, keep, mask=inside)
        E = tl.load(addresses + i, mask=inside, other=0).to(like.dtype)
        value = tl.load(E, mask=inside, other=0.0)
        tl.store(E, tl.where(keep, value, 0.0).to(like.dtype.element_ty), mask=inside)
        if MASKS:
            to = tl.load(addresses + values + i, mask=inside, other=0).to(like.dtype)
            tl.store(to, keep.to(like.dtype.element_ty), mask=inside)


@triton.jit
def reaching(scores, threshold, values, BLOCK: tl.constexpr):
    """How many scores have bits of at least `threshold`."""
    count = 0
    for start in range(0, values, BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = tl.load(scores + i, mask=i < values, other=0.0).to(tl.int32, bitcast=True)
        count += tl.sum(((bits >= threshold) & (i < values)).to(tl.int32), 0)
    return count


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
        table=_table(rows, saved),
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
        table=_table(rows, saved),
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
            # fmt: off
            if right:
                tall = load_tile(w, start, 0, n, k, k, 1, BLOCK_N, PADDED_K, True, True, False).to(tl.float32)
                part = tl.dot(tall.T, tall, part, input_precision="ieee")
            else:
                wide = load_tile(w, 0, start, k, n, n, 1, PADDED_K, BLOCK_N, True, True, False).to(tl.float32)
                part = tl.dot(wide, wide.T, part, input_precision="ieee")
            # fmt: on
        a += part
    row_stride, col_stride = tl.where(right, 1, k), tl.where(right, r, 1)
    t = load_tile(t, 0, 0, r, k, row_stride, col_stride, PADDED_R, PADDED_K, True, True, False).to(tl.float32)
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
    store_tile(saved, D, 0, 0, k, k, k, PADDED_K, PADDED_K)
    if right:
        store_tile(saved + k * k, dt.T, 0, 0, k, r, r, PADDED_K, PADDED_R)
    else:
        store_tile(saved + k * k, dt, 0, 0, r, k, k, PADDED_R, PADDED_K)


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
        # fmt: off
        D = load_tile(saved, 0, 0, k, k, k, 1, PADDED_K, PADDED_K, True, True, False) * scale
        if right:
            tall = load_tile(w, start, 0, n, k, k, 1, BLOCK_N, PADDED_K, True, True, False).to(tl.float32)
            tall = tl.dot(tall, D, input_precision="ieee")
            store_tile(grads, tall, start, 0, n, k, k, BLOCK_N, PADDED_K)
        else:
            wide = load_tile(w, 0, start, k, n, n, 1, PADDED_K, BLOCK_N, True, True, False).to(tl.float32)
            wide = tl.dot(D, wide, input_precision="ieee")
            store_tile(grads, wide, 0, start, k, n, n, PADDED_K, BLOCK_N)
        # fmt: on
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
    return rows, *(max(16, triton.next_power_of_2(max(row[column] for row in rows))) for column in (6, 5))


def _warps(padded_k: int, padded_r: int) -> int:
    return 4 if max(padded_k, padded_r) == 16 else 8


def _table(rows: list[list[int]], on: Tensor) -> Tensor:
    return launch.to_device(torch.tensor(rows, dtype=torch.int64), on)


def _elements(tensors: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """The address of every element of the tensors."""
    first = torch.tensor([t.data_ptr() for t in tensors]).repeat_interleave(torch.tensor(sizes))
    return first + tensors[0].element_size() * torch.cat([torch.arange(size) for size in sizes])
