"""Library GEMMs in place: the adapter's product is written first and the large product accumulates into it.

So y and dx are each written once and read once, and no second tensor of their size ever exists. Equations and
letters are those of `reference`.
"""

import torch
from torch import Tensor

from .gradients import Grads, Needs
from .reference import adapters_in, lora2_core, lora2_core_backward, unavailable, unsupported

__all__ = [
    "DROPS_INSIDE",
    "VERIFIED_ON",
    "backward",
    "forward",
    "lora2_core",
    "lora2_core_backward",
    "unavailable",
    "unsupported",
]

VERIFIED_ON = frozenset({"cpu", "cuda"})
DROPS_INSIDE = False


def forward(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout=None) -> tuple[Tensor, Tensor]:
    A, B, N = adapters_in(x.dtype, lora_A, lora_B, lora_N)
    T = (dropout(x) if dropout else x) @ A.T  # [M, R]
    P = T if N is None else T @ N.T  # [M, R]
    y = scaled_mm(P, B.T, scaling) if bias is None else torch.addmm(bias, P, B.T, alpha=scaling)
    return y.addmm_(x, weight.T), T


def backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, needs: Needs, dropout=None) -> Grads:
    A, B, N = adapters_in(dy.dtype, lora_A, lora_B, lora_N)
    dx = dA = dB = dN = None
    if needs.x or needs.lora_A or needs.lora_N:
        G = dy @ B  # [M, R]
    if needs.x or needs.lora_A:
        H = scaling * G if N is None else scaled_mm(G, N, scaling)  # [M, R]
    if needs.x:
        dx = H @ A
        dx = (dropout(dx) if dropout else dx).addmm_(dy, weight)
    if needs.lora_A:
        dA = (H.T @ (dropout(x) if dropout else x)).to(lora_A.dtype)
    if needs.lora_N:
        dN = scaled_mm(G.T, T, scaling).to(lora_N.dtype)
    if needs.lora_B:
        dB = scaled_mm(dy.T, T if N is None else T @ N.T, scaling).to(lora_B.dtype)
    return Grads(
        x=dx,
        weight=dy.T @ x if needs.weight else None,
        lora_A=dA,
        lora_B=dB,
        lora_N=dN,
        bias=dy.sum(0) if needs.bias else None,
    )


def scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha·a·b with the factor inside the product, not in a pass of its own."""
    out = a.new_empty(a.shape[0], b.shape[1])
    # NOTE: beta=0 never reads the uninitialised tensor, so NaN in it does not spread.
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
