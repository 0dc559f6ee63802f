"""The specification: every equation as written, on any device and any floating dtype.

T = x·Aᵀ,  P = T·Nᵀ,  y = x·Wᵀ + bias + s·P·Bᵀ
G = dy·B,  H = s·G·N,  dx = dy·W + H·A,  dA = Hᵀ·x,  dN = s·Gᵀ·T,  dB = s·dyᵀ·P,  dW = dyᵀ·x,  dbias = Σ dy

With dropout the adapter reads drop(x): T = drop(x)·Aᵀ,  dA = Hᵀ·drop(x),  dx = dy·W + drop(H·A).
"""

import torch.nn.functional as F
from torch import Tensor

from .base import Backend, Call, Grads, Needs
from .quantised import Quantised


class Reference(Backend):
    name = "reference"
    verified_on = frozenset({"cpu", "cuda", "meta"})

    def reads_quantised(self, weight: Quantised, rows: int) -> bool:
        # On other devices memory that all layers share takes the decoded weight.
        return weight.is_cpu

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        x, (A, B, N) = call.x, call.adapter
        T = call.drop(x) @ A.T  # [M, R]
        P = T if N is None else T @ N.T  # [M, R]
        return F.linear(x, _dense(call.weight), call.bias) + call.scaling * (P @ B.T), T

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        x, s, (A, B, N) = call.x, call.scaling, call.adapter
        G = dy @ B  # [M, R]
        H = s * (G if N is None else G @ N)  # [M, R]
        P = None if T is None else T if N is None else T @ N.T  # [M, R]
        return Grads(
            x=dy @ _dense(call.weight) + call.drop(H @ A) if needs.x else None,
            weight=dy.T @ x if needs.weight else None,
            lora_A=(H.T @ call.drop(x)).to(call.lora_A.dtype) if needs.lora_A else None,
            lora_B=(s * (dy.T @ P)).to(call.lora_B.dtype) if needs.lora_B else None,
            lora_N=(s * (G.T @ T)).to(call.lora_N.dtype) if needs.lora_N else None,
            bias=dy.sum(0) if needs.bias else None,
        )

    def lora2_core(self, lora_u, lora_E, lora_U, mask) -> Tensor:
        return (lora_U * _masked(lora_E, mask)) @ lora_u

    def lora2_core_backward(self, d_core, lora_u, lora_E, lora_U, mask) -> tuple[Tensor, Tensor, Tensor]:
        E = _masked(lora_E, mask)
        C = lora_U.T @ d_core  # [r, k]
        dE = (C * lora_u).sum(1)  # the diagonal of Uᵀ·dN·uᵀ
        return E[:, None] * C, _masked(dE, mask), (d_core @ lora_u.T) * E


def _dense(weight: Tensor | Quantised) -> Tensor:
    return weight.decode() if isinstance(weight, Quantised) else weight


def _masked(t: Tensor, mask: Tensor | None) -> Tensor:
    # The mask may be of another dtype; the result has t's.
    return t if mask is None else t * mask.to(t.dtype)
