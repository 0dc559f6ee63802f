"""The core of LoRA² and its gradients, each in one launch, with fp32 products.

C = U·diag(Λ)·u         Λ = E ⊙ mask          u (r, k), E (r), U (k, r), C (k, k)
dU = dC·uᵀ·diag(Λ),  du = diag(Λ)·Uᵀ·dC,  dE = mask ⊙ diag(Uᵀ·dC·uᵀ)
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import load_tile, store_tile

BLOCK = 16


def forward(lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None) -> Tensor:
    r, k = lora_u.shape
    core = lora_u.new_empty(k, k)
    blocks = triton.cdiv(k, BLOCK)
    launch.run(core_forward, (blocks, blocks), core=core, **_arguments(lora_u, lora_E, lora_U, mask))
    return core


def backward(
    d_core: Tensor, lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    r, k = lora_u.shape
    du, dE, dU = (t.new_empty(t.shape) for t in (lora_u, lora_E, lora_U))
    launch.run(
        core_backward,
        (triton.cdiv(r, BLOCK),),
        d_core=d_core,
        du=du,
        dE=dE,
        dU=dU,
        d_core_stride_row=d_core.stride(0),
        d_core_stride_col=d_core.stride(1),
        **_arguments(lora_u, lora_E, lora_U, mask),
    )
    return du, dE, dU


def _arguments(lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None) -> dict:
    r, k = lora_u.shape
    return dict(
        on=lora_u,
        warps=4,
        u=lora_u,
        E=lora_E,
        U=lora_U,
        mask=mask,
        r=r,
        k=k,
        u_stride_row=lora_u.stride(0),
        u_stride_col=lora_u.stride(1),
        E_stride=lora_E.stride(0),
        U_stride_row=lora_U.stride(0),
        U_stride_col=lora_U.stride(1),
        mask_stride=0 if mask is None else mask.stride(0),
        MASK=mask is not None,
        BLOCK=BLOCK,
    )


@triton.jit
def singular_values(E, mask, E_stride, mask_stride, i, r, MASK: tl.constexpr):
    """Λ and the mask at the indices i, in fp32, zero from r on."""
    values = tl.load(E + i * E_stride, mask=i < r, other=0.0).to(tl.float32)
    kept = (i < r).to(tl.float32)
    if MASK:
        kept = tl.load(mask + i * mask_stride, mask=i < r, other=0).to(tl.float32)
    return values * kept, kept


@triton.jit
def core_forward(
    u,
    E,
    U,
    mask,
    core,
    r,
    k,
    u_stride_row,
    u_stride_col,
    E_stride,
    U_stride_row,
    U_stride_col,
    mask_stride,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK
    col = tl.program_id(1) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    # fmt: off
    for s in range(0, r, BLOCK):
        values, _ = singular_values(E, mask, E_stride, mask_stride, s + tl.arange(0, BLOCK), r, MASK)
        left = load_tile(U, row, s, k, r, U_stride_row, U_stride_col, BLOCK, BLOCK, True, True, False)
        right = load_tile(u, s, col, r, k, u_stride_row, u_stride_col, BLOCK, BLOCK, True, True, False)
        acc = tl.dot(left.to(tl.float32) * values[None, :], right.to(tl.float32), acc, input_precision="ieee")
    # fmt: on
    store_tile(core, acc, row, col, k, k, k, BLOCK, BLOCK)


@triton.jit
def core_backward(
    d_core,
    u,
    E,
    U,
    mask,
    du,
    dE,
    dU,
    r,
    k,
    d_core_stride_row,
    d_core_stride_col,
    u_stride_row,
    u_stride_col,
    E_stride,
    U_stride_row,
    U_stride_col,
    mask_stride,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients that belong to a block of singular values: rows of u, columns of U."""
    s = tl.program_id(0) * BLOCK
    i = s + tl.arange(0, BLOCK)
    values, kept = singular_values(E, mask, E_stride, mask_stride, i, r, MASK)
    diagonal = tl.zeros((BLOCK,), tl.float32)
    # fmt: off
    for a in range(0, k, BLOCK):
        rows = tl.zeros((BLOCK, BLOCK), tl.float32)  # (Uᵀ·dC)[s, a]
        cols = tl.zeros((BLOCK, BLOCK), tl.float32)  # (dC·uᵀ)[a, s]
        for b in range(0, k, BLOCK):
            U_block = load_tile(U, b, s, k, r, U_stride_row, U_stride_col, BLOCK, BLOCK, True, True, False)
            down = load_tile(d_core, b, a, k, k, d_core_stride_row, d_core_stride_col,
                             BLOCK, BLOCK, True, True, False)
            rows = tl.dot(U_block.to(tl.float32).T, down.to(tl.float32), rows, input_precision="ieee")
            u_block = load_tile(u, s, b, r, k, u_stride_row, u_stride_col, BLOCK, BLOCK, True, True, False)
            across = load_tile(d_core, a, b, k, k, d_core_stride_row, d_core_stride_col,
                               BLOCK, BLOCK, True, True, False)
            cols = tl.dot(across.to(tl.float32), u_block.to(tl.float32).T, cols, input_precision="ieee")
        u_block = load_tile(u, s, a, r, k, u_stride_row, u_stride_col, BLOCK, BLOCK, True, True, False)
        diagonal += tl.sum(rows * u_block.to(tl.float32), 1)
        store_tile(du, rows * values[:, None], s, a, r, k, k, BLOCK, BLOCK)
        store_tile(dU, cols * values[None, :], a, s, k, r, r, BLOCK, BLOCK)
    # fmt: on
    tl.store(dE + i, (diagonal * kept).to(dE.dtype.element_ty), mask=i < r)
