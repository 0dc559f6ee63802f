"""Forward and backward of the adapted linear layer, as launches.

    T, P = x·Aᵀ, s·T·Nᵀ             y = [x | P]·[W | B]ᵀ + bias
    G, H = dy·B, s·G·N              dx = [dy | H]·[W ; A]
    dA = Hᵀ·x       dN = s·Gᵀ·T     dB = s·(dyᵀ·T)·Nᵀ

With dropout T and dA read drop(x), and dx = dy·W + drop(H·A).

s is folded into P and H, so neither y nor dx is scaled in a pass of its own, and dB multiplies by N after its sum over
tokens, so P is not made again.
"""

import torch
from torch import Tensor

from ..base import Call, Grads, Needs
from . import extended, narrow


def forward(call: Call) -> tuple[Tensor, Tensor]:
    x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout = call
    T, _, y = extended.product(x, weight, lora_A, lora_N, lora_B, bias, scaling, transposed=True, dropout=dropout)
    return y, T


def backward(call: Call, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
    G = H = dx = None
    if needs.x:
        operands = dy, call.weight, call.lora_B, call.lora_N, call.lora_A, None, call.scaling
        G, H, dx = extended.product(*operands, transposed=False, dropout=call.dropout)
    elif needs.lora_A or needs.lora_N:
        G, H = sides(call, dy)
    return gradients(call, dy, T, G, H, needs)._replace(x=dx)


def sides(call: Call, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(G, H)"""
    return narrow.product(dy, call.lora_B, core=call.lora_N, alpha=call.scaling, raw=True)


def gradients(call: Call, dy: Tensor, T: Tensor | None, G: Tensor | None, H: Tensor | None, needs: Needs) -> Grads:
    """Those of everything but x; a call without an adapter has no T, G and H."""
    x, lora_A, lora_B, lora_N, scaling = call.x, call.lora_A, call.lora_B, call.lora_N, call.scaling
    dA = dB = dN = None
    if needs.lora_A:
        dA = narrow.product(H, x, a_transposed=True, dtype=lora_A.dtype, dropout=call.dropout, drops="b")[1]
    if needs.lora_N:
        dN = narrow.product(G, T, a_transposed=True, alpha=scaling, dtype=lora_N.dtype)[1]
    if needs.lora_B:
        dB = narrow.product(
            dy, T, core=lora_N, core_transposed=True, a_transposed=True, alpha=scaling, dtype=lora_B.dtype
        )[1]
    return Grads(
        # The gradient of the weight itself is a plain product of two large matrices: the library's is best.
        weight=torch.mm(dy.T, x) if needs.weight else None,
        lora_A=dA,
        lora_B=dB,
        lora_N=dN,
        bias=dy.sum(0) if needs.bias else None,
    )
