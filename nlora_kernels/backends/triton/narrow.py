"""A product with a narrow side and what follows it: T and P, G and H, dA, dB, dN.

Letters: M rows, N columns, K features or tokens that are summed over.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..base import Dropout
from . import device, launch, tuning
from .tiles import Core, Product, multiply, store_product, store_tile

# A core wider than this has a product of its own: a program holds a tile as wide as the core.
WIDEST_CORE = 256


class Narrow(NamedTuple):
    """What `narrow_product` is compiled for."""

    product: Product
    core: Core


class Sum(NamedTuple):
    """What `sum_slices` is compiled for."""

    BLOCK_M: int
    BLOCK_N: int
    core: Core


@triton.jit(do_not_specialize=["threshold"], do_not_specialize_on_alignment=["seed"])
def narrow_product(a, b, core, raw, out, slices, seed, threshold, scale, M, N, K, alpha, META: tl.constexpr):
    """raw = a·b, out = alpha·raw·core: T and P, G and H, dA, dB, dN.

    Split along K, each part of the sum goes to a slice of its own.
    """
    BLOCK_M: tl.constexpr = META.product.BLOCK_M
    BLOCK_N: tl.constexpr = META.product.BLOCK_N
    tile = tl.program_id(0)
    split = tl.program_id(1)
    tiles_n = tl.cdiv(N, BLOCK_N)
    m = tile // tiles_n * BLOCK_M
    n = tile % tiles_n * BLOCK_N
    part = tl.cdiv(K, tl.num_programs(1) * META.product.BLOCK_K) * META.product.BLOCK_K
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    end = tl.minimum(K, (split + 1) * part)
    acc = multiply(acc, a, b, m, n, M, N, split * part, end, seed, threshold, META.product)
    if META.product.DROPS != "":
        acc *= scale
    if slices is not None:
        store_tile(slices + split.to(tl.int64) * M * N, acc, m, n, M, N, BLOCK_M, BLOCK_N)
    else:
        store_product(acc, raw, out, core, m, n, M, N, alpha, BLOCK_M, BLOCK_N, META.core)


@triton.jit
def sum_slices(slices, core, raw, out, M, N, splits, slice_stride, alpha, META: tl.constexpr):
    """The slices of `narrow_product` summed in their order, so that the result is bitwise repeatable."""
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, META.BLOCK_N)
    m = tile // tiles_n * META.BLOCK_M
    n = tile % tiles_n * META.BLOCK_N
    i = m + tl.arange(0, META.BLOCK_M)
    j = n + tl.arange(0, META.BLOCK_N)
    inside = (i < M)[:, None] & (j < N)[None, :]
    pointers = slices + i.to(tl.int64)[:, None] * N + j[None, :]
    acc = tl.zeros((META.BLOCK_M, META.BLOCK_N), tl.float32)
    for _ in range(splits):
        acc += tl.load(pointers, mask=inside, other=0.0)
        pointers += slice_stride
    store_product(acc, raw, out, core, m, n, M, N, alpha, META.BLOCK_M, META.BLOCK_N, META.core)


def product(
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
    dtype = dtype or a.dtype
    if core is not None and core.shape[0] > WIDEST_CORE:
        same = dict(a_transposed=a_transposed, b_transposed=b_transposed, dropout=dropout, drops=drops)
        before = product(a, b, **same)[1]
        return before, product(before, core, alpha=alpha, b_transposed=core_transposed, dtype=dtype)[1]
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
    results = plan.results(a, raw, dtype)
    # NOTE: Triton takes the integer 1 for a constant.
    plan.launch(a, b, core, float(alpha), dropout, *results)
    return results[:2]


class Plan(NamedTuple):
    """How a product is computed: the parts of its sum, and the launches, of which there are none without results."""

    shape: tuple[int, int]
    splits: int
    product: launch.Launch | None
    finish: launch.Launch | None

    def results(self, a: Tensor, raw: bool, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """raw, out and the slices of the sum, not yet computed."""
        # NOTE: torch.empty costs the host less than new_empty.
        return (
            torch.empty(self.shape, dtype=a.dtype, device=a.device) if raw else None,
            torch.empty(self.shape, dtype=dtype, device=a.device),
            torch.empty((self.splits, *self.shape), dtype=torch.float32, device=a.device) if self.finish else None,
        )

    def launch(self, a, b, core, alpha, dropout, raw, out, slices) -> None:
        if self.finish:
            self.product(a, a=a, b=b, slices=slices, alpha=alpha, **launch.mask(dropout))
            self.finish(a, slices=slices, core=core, raw=raw, out=out, alpha=alpha)
        elif self.product:
            self.product(a, a=a, b=b, core=core, raw=raw, out=out, alpha=alpha, **launch.mask(dropout))


@launch.planned
def planned(a, b, core, index, tf32, a_transposed, b_transposed, core_transposed, raw, dtype, drops) -> Plan:
    """`dtype`: out's, for which the launches are compiled."""
    a, b, core = launch.Layout(*a), launch.Layout(*b), core and launch.Layout(*core)
    M, K = reversed(a.shape) if a_transposed else a.shape
    N = b.shape[0] if b_transposed else b.shape[1]
    if M == 0 or N == 0:
        return Plan((M, N), 1, None, None)
    on, precision = device.target(index), launch.precision(a.dtype, tf32)
    columns = tuning.padded(N) if core else 16
    tile, splits = tuning.narrow_tile(M, N, K, columns, a.dtype, tf32, launch.aligned(a, b), on, b.dtype)
    # NOTE: the fp32 product with a core follows the sum in a kernel of its own; behind a sum it would spill registers.
    split = splits > 1 or (core is not None and not raw)
    blocks = {
        "a": (tile.k, tile.m) if a_transposed else (tile.m, tile.k),
        "b": (tile.n, tile.k) if b_transposed else (tile.k, tile.n),
    }
    layouts = {"a": a, "b": b, "core": core}
    finish = Core(
        TRANSPOSED=core_transposed,
        DTYPE=launch.DTYPES[a.dtype if raw else torch.float32],
        PRECISION=precision if raw or a.dtype == torch.float32 else "tf32x3",
    )
    meta = launch.product_of(tile, K, a.dtype, tf32, A_TRANSPOSED=a_transposed, B_TRANSPOSED=b_transposed, DROPS=drops)
    product = launch.Launch(
        narrow_product,
        (triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n), splits),
        warps=tile.warps,
        stages=tile.stages,
        meta=Narrow(meta, finish),
        layouts=layouts,
        blocks=launch.described_blocks(layouts, blocks, a.dtype, on),
        M=M,
        N=N,
        K=K,
    )
    if not split:
        return Plan((M, N), splits, product, None)
    return Plan((M, N), splits, product, summing(M, N, splits, finish, columns if core else 0, core))


def summing(
    M: int, N: int, splits: int, finish: Core, columns: int = 0, core: launch.Layout | None = None
) -> launch.Launch:
    """The launch that adds up slices of (M, N), in tiles of so many columns where a core follows."""
    width = columns or min(tuning.padded(N), 128)
    height = max(16, 2048 // width)
    return launch.Launch(
        sum_slices,
        (triton.cdiv(M, height) * triton.cdiv(N, width),),
        warps=8 if width > 128 else 4,
        meta=Sum(height, width, finish),
        layouts={"core": core},
        M=M,
        N=N,
        splits=splits,
        slice_stride=M * N,
    )
