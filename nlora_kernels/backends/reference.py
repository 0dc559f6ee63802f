"""The specification: every equation as written, on any device and any floating dtype.

T = x·Aᵀ,  P = T·Nᵀ,  y = x·Wᵀ + bias + s·P·Bᵀ
G = dy·B,  H = s·G·N,  dx = dy·W + H·A,  dA = Hᵀ·x,  dN = s·Gᵀ·T,  dB = s·dyᵀ·P,  dW = dyᵀ·x,  dbias = Σ dy

With dropout the adapter reads drop(x): T = drop(x)·Aᵀ,  dA = Hᵀ·drop(x),  dx = dy·W + drop(H·A).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .gradients import Grads, Needs

VERIFIED_ON = frozenset({"cpu", "cuda", "meta"})
DROPS_INSIDE = False


def unavailable() -> str | None:
    return None


def unsupported(x, weight, lora_A, lora_B, lora_N, dropout=None) -> str | None:
    return None


def forward(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout=None) -> tuple[Tensor, Tensor]:
    A, B, N = adapters_in(x.dtype, lora_A, lora_B, lora_N)
    drop = dropout or (lambda t: t)
    T = drop(x) @ A.T  # [M, R]
    P = T if N is None else T @ N.T  # [M, R]
    return F.linear(x, weight, bias) + scaling * (P @ B.T), T


def backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, needs: Needs, dropout=None) -> Grads:
    A, B, N = adapters_in(dy.dtype, lora_A, lora_B, lora_N)
    G = dy @ B  # [M, R]
    H = scaling * (G if N is None else G @ N)  # [M, R]
    P = None if T is None else T if N is None else T @ N.T  # [M, R]
    drop = dropout or (lambda t: t)
    return Grads(
        x=dy @ weight + drop(H @ A) if needs.x else None,
        weight=dy.T @ x if needs.weight else None,
        lora_A=(H.T @ drop(x)).to(lora_A.dtype) if needs.lora_A else None,
        lora_B=(scaling * (dy.T @ P)).to(lora_B.dtype) if needs.lora_B else None,
        lora_N=(scaling * (G.T @ T)).to(lora_N.dtype) if needs.lora_N else None,
        bias=dy.sum(0) if needs.bias else None,
    )


def lora2_core(lora_u, lora_E, lora_U, mask) -> Tensor:
    return (lora_U * _masked(lora_E, mask)) @ lora_u


def lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask) -> tuple[Tensor, Tensor, Tensor]:
    E = _masked(lora_E, mask)
    C = lora_U.T @ d_core  # [r, k]
    dE = (C * lora_u).sum(1)  # the diagonal of Uᵀ·dN·uᵀ
    return E[:, None] * C, _masked(dE, mask), (d_core @ lora_u.T) * E


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    # The mask may be of another dtype; the result has t's.
    return t if mask is None else t * mask.to(t.dtype)


def adapters_in(dtype: torch.dtype, lora_A, lora_B, lora_N) -> tuple[Tensor, Tensor, Tensor | None]:
    """The adapter matrices in the dtype of the product; fp32 adapters on a bf16 base are the normal case."""
    return lora_A.to(dtype), lora_B.to(dtype), None if lora_N is None else lora_N.to(dtype)
