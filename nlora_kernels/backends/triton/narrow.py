"""A product with a narrow side and what follows it: T and P, G and H, dA, dB, dN.

Letters: M rows, N columns, K features or tokens that are summed over.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import tuning
from ..base import Dropout
from . import launch
from .tiles import multiply, store_product, store_tile

# A core wider than this has a product of its own: a program holds a tile as wide as the core.
WIDEST_CORE = 256


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed"])
def narrow_product(
    a,
    b,
    core,
    raw,
    out,
    slices,
    seed,
    M,
    N,
    K,
    a_stride_row,
    a_stride_col,
    b_stride_row,
    b_stride_col,
    core_stride_row,
    core_stride_col,
    alpha,
    threshold,
    scale,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHECK_K: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    B_DESCRIPTOR: tl.constexpr,
    DROPS: tl.constexpr,
    STORE_RAW: tl.constexpr,
    CORE: tl.constexpr,
    CORE_TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CORE_DTYPE: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
):
    """raw = a·b, out = alpha·raw·core: T and P, G and H, dA, dB, dN.

    Split along K, each part of the sum goes to a slice of its own. DROPS names the operand that has dropout.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = tile // tiles_n * BLOCK_M
    n = tile % tiles_n * BLOCK_N
    part = tl.cdiv(K, tl.num_programs(1) * BLOCK_K) * BLOCK_K
    # fmt: off
    acc = multiply(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), a, b, m, n, M, N,
                   split * part, tl.minimum(K, (split + 1) * part),
                   a_stride_row, a_stride_col, b_stride_row, b_stride_col, BLOCK_M, BLOCK_N, BLOCK_K, CHECK_K,
                   A_TRANSPOSED, B_TRANSPOSED, A_DESCRIPTOR, B_DESCRIPTOR, DTYPE, PRECISION,
                   seed, threshold, DROPS)
    if DROPS != "":
        acc *= scale
    if SPLIT:
        store_tile(slices + split.to(tl.int64) * M * N, acc, m, n, M, N, N, BLOCK_M, BLOCK_N)
    else:
        store_product(acc, raw, out, core, m, n, M, N, core_stride_row, core_stride_col, alpha,
                      BLOCK_M, BLOCK_N, STORE_RAW, CORE, CORE_TRANSPOSED, CORE_DTYPE, CORE_PRECISION)
    # fmt: on


@triton.jit
def sum_slices(
    slices,
    core,
    raw,
    out,
    M,
    N,
    core_stride_row,
    core_stride_col,
    alpha,
    splits,
    slice_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STORE_RAW: tl.constexpr,
    CORE: tl.constexpr,
    CORE_TRANSPOSED: tl.constexpr,
    CORE_DTYPE: tl.constexpr,
    CORE_PRECISION: tl.constexpr,
):
    """The slices of `narrow_product` summed in their order, so that the result is bitwise repeatable."""
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = tile // tiles_n * BLOCK_M
    n = tile % tiles_n * BLOCK_N
    i = m + tl.arange(0, BLOCK_M)
    j = n + tl.arange(0, BLOCK_N)
    inside = (i < M)[:, None] & (j < N)[None, :]
    pointers = slices + i.to(tl.int64)[:, None] * N + j[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        acc += tl.load(pointers, mask=inside, other=0.0)
        pointers += slice_stride
    # fmt: off
    store_product(acc, raw, out, core, m, n, M, N, core_stride_row, core_stride_col, alpha,
                  BLOCK_M, BLOCK_N, STORE_RAW, CORE, CORE_TRANSPOSED, CORE_DTYPE, CORE_PRECISION)
    # fmt: on


class Plan(NamedTuple):
    """How a product is computed: the parts of its sum, and the launches."""

    splits: int
    product: launch.Launch
    finish: launch.Launch | None


def narrow(
    a: Tensor,
    b: Tensor,
    core: Tensor | None = None,
    *,
    alpha: float = 1.0,
    a_transposed: bool = False,
    b_transposed: bool = False,
    core_transposed: bool = False,
    raw: bool = False,
    dtype: torch.dtype | None = None,
    dropout: Dropout | None = None,
    drops: str = "",
) -> tuple[Tensor | None, Tensor]:
    """(raw, out) = (a·b, alpha·raw·core) for a product with a narrow side, with fp32 sums in a fixed order.

    Transposed operands are stored as the transpose of what is multiplied, and all are used in a's dtype. raw, computed
    on request, is in that dtype; out in `dtype`, a's by default. Where out alone is wanted, a·b meets the core in fp32.
    `drops` names the operand, not transposed, to which dropout applies.
    """
    M, N, device = a.shape[1 if a_transposed else 0], b.shape[0 if b_transposed else 1], a.device
    # NOTE: Triton takes the integer 1 for a constant.
    dtype, alpha = dtype or a.dtype, float(alpha)
    if core is not None and N > WIDEST_CORE:
        same = dict(a_transposed=a_transposed, b_transposed=b_transposed, dropout=dropout, drops=drops)
        product = narrow(a, b, **same)[1]
        return product, narrow(product, core, alpha=alpha, b_transposed=core_transposed, dtype=dtype)[1]
    # NOTE: torch.empty costs the host less than new_empty.
    out = torch.empty((M, N), dtype=dtype, device=device)
    raw_out = torch.empty((M, N), dtype=a.dtype, device=device) if raw else None
    if M == 0 or N == 0:
        return raw_out, out
    plan = planned(
        launch.layout(a),
        launch.layout(b),
        launch.layout(core),
        a.get_device(),
        launch.tf32(a.dtype),
        a_transposed,
        b_transposed,
        core_transposed,
        raw,
        dtype,
        drops if dropout else "",
    )
    finish = dict(core=core, raw=raw_out, out=out, alpha=alpha)
    if not plan.finish:
        plan.product(a, a=a, b=b, **finish, **launch.mask(dropout))
        return raw_out, out
    slices = torch.empty((plan.splits, M, N), dtype=torch.float32, device=device)
    plan.product(a, a=a, b=b, slices=slices, alpha=alpha, **launch.mask(dropout))
    plan.finish(a, slices=slices, **finish)
    return raw_out, out


@launch.planned
def planned(a, b, core, index, tf32, a_transposed, b_transposed, core_transposed, raw, dtype, drops) -> Plan:
    """`dtype`: out's, for which the launches are compiled."""
    a, b, core = launch.Layout(*a), launch.Layout(*b), core and launch.Layout(*core)
    M, K = reversed(a.shape) if a_transposed else a.shape
    N = b.shape[0] if b_transposed else b.shape[1]
    device, precision = launch.target(index), launch.precision(a.dtype, tf32)
    columns = tuning.padded(N) if core else 16
    tile, splits = tuning.narrow_tile(M, N, K, columns, a.dtype, tf32, launch.aligned(a, b), device, b.dtype)
    # NOTE: the fp32 product with a core follows the sum in a kernel of its own; behind a sum it would spill registers.
    split = splits > 1 or (core is not None and not raw)
    blocks = {
        "a": (tile.k, tile.m) if a_transposed else (tile.m, tile.k),
        "b": (tile.n, tile.k) if b_transposed else (tile.k, tile.n),
    }
    blocks = {name: blocks[name] for name, o in (("a", a), ("b", b)) if launch.described(o, a.dtype, device)}
    finish = dict(
        M=M,
        N=N,
        core_stride_row=core.strides[0] if core else 0,
        core_stride_col=core.strides[1] if core else 0,
        STORE_RAW=raw,
        CORE=core is not None,
        CORE_TRANSPOSED=core_transposed,
        CORE_DTYPE=launch.DTYPES[a.dtype if raw else torch.float32],
        CORE_PRECISION=precision if raw or a.dtype == torch.float32 else "tf32x3",
    )
    product = launch.Launch(
        narrow_product,
        (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n), splits),
        warps=tile.warps,
        stages=tile.stages,
        blocks=blocks,
        K=K,
        a_stride_row=a.strides[0],
        a_stride_col=a.strides[1],
        b_stride_row=b.strides[0],
        b_stride_col=b.strides[1],
        SPLIT=split,
        BLOCK_M=tile.m,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        CHECK_K=K % tile.k != 0,
        A_TRANSPOSED=a_transposed,
        B_TRANSPOSED=b_transposed,
        A_DESCRIPTOR="a" in blocks,
        B_DESCRIPTOR="b" in blocks,
        DROPS=drops,
        DTYPE=launch.DTYPES[a.dtype],
        PRECISION=precision,
        **finish,
    )
    if not split:
        return Plan(splits, product, None)
    width = columns if core else min(tuning.padded(N), 128)
    height = max(16, 2048 // width)
    total = launch.Launch(
        sum_slices,
        (triton.cdiv(M, height) * triton.cdiv(N, width),),
        warps=8 if width > 128 else 4,
        splits=splits,
        slice_stride=M * N,
        BLOCK_M=height,
        BLOCK_N=width,
        **finish,
    )
    return Plan(splits, product, total)
