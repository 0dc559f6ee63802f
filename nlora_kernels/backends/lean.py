"""Library GEMMs in place: the adapter's product is written first and the large product accumulates into it.

So y and dx are each written once and read once, and no second tensor of their size ever exists. Equations and
letters are those of `reference`. A weight in few bits is decoded a tile at a time.
"""

import torch
from torch import Tensor

from .base import Call, ExpertsCall, Grads, Needs, linear_backward
from .quantised import Quantised
from .reference import Reference


class Lean(Reference):
    name = "lean"
    verified_on = frozenset({"cpu", "cuda"})

    def forward(self, call: Call, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Into y, where it is given."""
        x, (A, B, N) = call.x, call.adapter
        T = call.drop(x) @ A.T  # [M, R]
        P = T if N is None else T @ N.T  # [M, R]
        if call.bias is None:
            y = scaled_mm(P, B.T, call.scaling, y)
        else:
            y = torch.addmm(call.bias, P, B.T, alpha=call.scaling, out=y)
        return add_output(y, x, call.weight), T

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs, dx: Tensor | None = None) -> Grads:
        """A dx that is given is added to."""
        x, s, (A, B, N) = call.x, call.scaling, call.adapter
        dA = dB = dN = None
        if needs.x or needs.lora_A or needs.lora_N:
            G = dy @ B  # [M, R]
        if needs.x or needs.lora_A:
            H = s * G if N is None else scaled_mm(G, N, s)  # [M, R]
        if needs.x and dx is None:
            dx = add_input_gradient(call.drop(H @ A), dy, call.weight)
        elif needs.x:
            dx = add_input_gradient(dx, dy, call.weight)
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

    def forward_experts(self, call: ExpertsCall) -> tuple[Tensor, Tensor]:
        x, M, N = call.x, call.x.shape[0], call.weight.shape[1]
        y, T = x.new_empty(M, N), x.new_empty(M, call.lora_A.shape[1])
        last = 0
        for rows, each in call.experts():
            if rows.start < rows.stop:
                T[rows] = Lean.forward(self, each, y[rows])[1]
            last = rows.stop
        y[last:], T[last:] = 0, 0
        return y, T

    def backward_experts(self, call: ExpertsCall, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        dx = dy.new_zeros(dy.shape[0], call.weight.shape[2]) if needs.x else None
        bias = dy.new_zeros(call.weight.shape[:2]) if needs.bias else None
        others = [torch.zeros_like(t) if needed else None for t, needed in zip(call[2:6], needs[1:5], strict=True)]
        for index, (rows, each) in enumerate(call.experts()):
            if rows.start < rows.stop:
                to, own = None if dx is None else dx[rows], None if T is None else T[rows]
                grads = Lean.backward(self, each, dy[rows], own, needs, to)
                for stack, grad in zip((*others, bias), grads[1:], strict=True):
                    if grad is not None:
                        stack[index] = grad
        return Grads(dx, *others, bias)


def add_output(y: Tensor, x: Tensor, weight: Tensor | Quantised) -> Tensor:
    """y += x·Wᵀ, returned"""
    if isinstance(weight, Tensor):
        return y.addmm_(x, weight.T)
    for rows, tile in weight.tiles(0):
        y[:, rows].addmm_(x, tile.T)
    return y


def add_input_gradient(dx: Tensor, dy: Tensor, weight: Tensor | Quantised) -> Tensor:
    """dx += dy·W, returned"""
    if isinstance(weight, Tensor):
        return dx.addmm_(dy, weight)
    # By columns, so that every sum is rounded once.
    for cols, tile in weight.tiles(1):
        dx[:, cols].addmm_(dy, tile)
    return dx


def scaled_mm(a: Tensor, b: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """alpha·a·b with the factor inside the product, not in a pass of its own."""
    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    # NOTE: beta=0 never reads the uninitialised tensor, so NaN in it does not spread.
    return torch.addmm(out, a, b, beta=0, alpha=alpha, out=out)
