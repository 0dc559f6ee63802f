"""Library GEMMs in place: the adapter's product is written first and the large product accumulates into it.

So y and dx are each written once and read once, and no second tensor of their size ever exists. Equations and
letters are those of `reference`.
"""

import torch
from torch import Tensor

from .base import Call, Grads, Needs, linear_backward
from .reference import Reference


class Lean(Reference):
    name = "lean"
    verified_on = frozenset({"cpu", "cuda"})

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        x, (A, B, N) = call.x, call.adapter
        T = call.drop(x) @ A.T  # [M, R]
        P = T if N is None else T @ N.T  # [M, R]
        if call.bias is None:
            y = scaled_mm(P, B.T, call.scaling)
        else:
            y = torch.addmm(call.bias, P, B.T, alpha=call.scaling)
        return y.addmm_(x, call.weight.T), T

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs, dx: Tensor | None = None) -> Grads:
        """A dx that is given is added to."""
        x, s, (A, B, N) = call.x, call.scaling, call.adapter
        dA = dB = dN = None
        if needs.x or needs.lora_A or needs.lora_N:
            G = dy @ B  # [M, R]
        if needs.x or needs.lora_A:
            H = s * G if N is None else scaled_mm(G, N, s)  # [M, R]
        if needs.x and dx is None:
            dx = call.drop(H @ A).addmm_(dy, call.weight)
        elif needs.x:
            dx.addmm_(dy, call.weight)
            dx = dx.add_(call.drop(H @ A)) if call.dropout else dx.addmm_(H, A)
        if needs.lora_A:
            dA = (H.T @ call.drop(x)).to(call.lora_A.dtype)
        if needs.lora_N:
            dN = scaled_mm(G.T, T, s).to(call.lora_N.dtype)
        if needs.lora_B:
            dB = scaled_mm(dy.T, T if N is None else T @ N.T, s).to(call.lora_B.dtype)
        return Grads(
            x=dx,
            weight=dy.T @ x if needs.weight else None,
            lora_A=dA,
            lora_B=dB,
            lora_N=dN,
            bias=dy.sum(0) if needs.bias else None,
        )

    def backward_group(self, calls, dys, Ts, needs) -> tuple[Tensor | None, list[Grads]]:
        dx, grads = None, []
        for call, dy, T, need in zip(calls, dys, Ts, needs, strict=True):
            if call.lora_A is not None:
                of = Lean.backward(self, call, dy, T, need, dx)
            else:
                of = linear_backward(call, dy, need._replace(x=need.x and dx is None))
                if need.x and dx is not None:
                    of = of._replace(x=dx.addmm_(dy, call.weight))
            dx = of.x
            grads.append(of._replace(x=None))
        return dx, grads


def scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """alpha·a·b with the factor inside the product, not in a pass of its own."""
    out = a.new_empty(a.shape[0], b.shape[1])
    # NOTE: beta=0 never reads the uninitialised tensor, so NaN in it does not spread.
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
