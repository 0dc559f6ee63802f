"""The core of LoRA² and its gradients, each in one launch, with fp32 products.

C = U·diag(Λ)·u         Λ = E ⊙ mask          u (r, k), E (r), U (k, r), C (k, k)
dU = dC·uᵀ·diag(Λ),  du = diag(Λ)·Uᵀ·dC,  dE = mask ⊙ diag(Uᵀ·dC·uᵀ)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .tiles import load_tile, store_tile

BLOCK = 16


def forward(lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None) -> Tensor:
    k = lora_u.shape[1]
    core = torch.empty((k, k), dtype=lora_u.dtype, device=lora_u.device)
    operands = dict(u=lora_u, E=lora_E, U=lora_U, mask=mask)
    planned(core_forward, *map(launch.layout, (lora_u, lora_E, lora_U, mask, None)), lora_u.get_device())(
        lora_u, core=core, **operands
    )
    return core


def backward(
    d_core: Tensor, lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    du, dE, dU = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (lora_u, lora_E, lora_U))
    operands = dict(u=lora_u, E=lora_E, U=lora_U, mask=mask)
    planned(core_backward, *map(launch.layout, (lora_u, lora_E, lora_U, mask, d_core)), lora_u.get_device())(
        lora_u, d_core=d_core, du=du, dE=dE, dU=dU, **operands
    )
    return du, dE, dU


@launch.planned
def planned(kernel, u, E, U, mask, d_core, index) -> launch.Launch:
    """The launch of a kernel; d_core is None where it is the forward's."""
    operands = {"u": u, "E": E, "U": U, "mask": mask} | ({"d_core": d_core} if d_core else {})
    layouts = {name: operand and launch.Layout(*operand) for name, operand in operands.items()}
    r, k = layouts["u"].shape
    blocks = triton.cdiv(k, BLOCK)
    grid = (triton.cdiv(r, BLOCK),) if d_core else (blocks, blocks)
    return launch.Launch(kernel, grid, warps=4, layouts=layouts, r=r, k=k, BLOCK=BLOCK)


@triton.jit
def singular_values(E, mask, i, r):
    """Λ and the mask at the indices i, in fp32, zero from r on."""
    values = tl.load(E.data + i * E.stride, mask=i < r, other=0.0).to(tl.float32)
    kept = (i < r).to(tl.float32)
    if mask is not None:
        kept = tl.load(mask.data + i * mask.stride, mask=i < r, other=0).to(tl.float32)
    return values * kept, kept


@triton.jit
def core_forward(u, E, U, mask, core, r, k, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK
    col = tl.program_id(1) * BLOCK
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for s in range(0, r, BLOCK):
        values, _ = singular_values(E, mask, s + tl.arange(0, BLOCK), r)
        left = load_tile(U, row, s, k, r, BLOCK, BLOCK)
        right = load_tile(u, s, col, r, k, BLOCK, BLOCK)
        acc = tl.dot(left.to(tl.float32) * values[None, :], right.to(tl.float32), acc, input_precision="ieee")
    store_tile(core, acc, row, col, k, k, BLOCK, BLOCK)


@triton.jit
def core_backward(d_core, u, E, U, mask, du, dE, dU, r, k, BLOCK: tl.constexpr):
    """The gradients that belong to a block of singular values: rows of u, columns of U."""
    s = tl.program_id(0) * BLOCK
    i = s + tl.arange(0, BLOCK)
    values, kept = singular_values(E, mask, i, r)
    diagonal = tl.zeros((BLOCK,), tl.float32)
    for a in range(0, k, BLOCK):
        rows = tl.zeros((BLOCK, BLOCK), tl.float32)  # (Uᵀ·dC)[s, a]
        cols = tl.zeros((BLOCK, BLOCK), tl.float32)  # (dC·uᵀ)[a, s]
        for b in range(0, k, BLOCK):
            U_block = load_tile(U, b, s, k, r, BLOCK, BLOCK)
            down = load_tile(d_core, b, a, k, k, BLOCK, BLOCK)
            rows = tl.dot(U_block.to(tl.float32).T, down.to(tl.float32), rows, input_precision="ieee")
            u_block = load_tile(u, s, b, r, k, BLOCK, BLOCK)
            across = load_tile(d_core, a, b, k, k, BLOCK, BLOCK)
            cols = tl.dot(across.to(tl.float32), u_block.to(tl.float32).T, cols, input_precision="ieee")
        u_block = load_tile(u, s, a, r, k, BLOCK, BLOCK)
        diagonal += tl.sum(rows * u_block.to(tl.float32), 1)
        store_tile(du, rows * values[:, None], s, a, r, k, BLOCK, BLOCK)
        store_tile(dU, cols * values[None, :], a, s, k, r, BLOCK, BLOCK)
    tl.store(dE + i, (diagonal * kept).to(dE.dtype.element_ty), mask=i < r)
