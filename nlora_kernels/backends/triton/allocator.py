"""The rank allocator's step over all layers of a LoRA² model.

smooth    moves the averages of every scored tensor, in one launch; the host does not wait
prune     scores, the least score that is kept, and the masks, in one launch

A launch finds its tensors by a table of addresses that travels with it. They are contiguous and of one dtype; sums are
made in fp32 and in one order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

# Values of a tensor that a program takes at a time.
BLOCK = 512


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
        table=launch.table(rows, exp_avg),
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
        averages = exp_avg + start, exp_unc + start, before + start
        count_grad = tl.where(grad != 0, count, 0)
        w, grad = w.to(like.dtype), grad.to(like.dtype)
        faults = smooth_tensor(w, grad, averages, size, count, count_grad, beta1, beta2, faults, BLOCK)
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
def smooth_tensor(w, grad, averages, size, count, count_grad, beta1, beta2, faults, BLOCK: tl.constexpr):
    exp_avg, exp_unc, before = averages
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


def prune(
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


def _elements(tensors: Sequence[Tensor], sizes: list[int]) -> Tensor:
    """The address of every element of the tensors."""
    first = torch.tensor([t.data_ptr() for t in tensors]).repeat_interleave(torch.tensor(sizes))
    return first + tensors[0].element_size() * torch.cat([torch.arange(size) for size in sizes])
