"""C++ kernels for CPUs behind the extension `_C` (csrc/cpu).

A call is computed in one of four ways (`plans`), which differ in who does the products:
    whole     one C++ call each way: rows of weight are read in place for few rows of x, else packed (docs/cpu.md)
    adapter   C++ writes the adapter's product, which reads and writes much and multiplies little; the library adds the
              product with weight to it
    library   `lean`
    folded    the library's products with a scratch copy of weight + s·B·N·A, which many rows of x share; in fp32 alone,
              for a half-precision weight would round small updates away
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..base import Call, Factors, Grads, Needs, plain, short
from ..lean import Lean
from ..native import _C
from . import lora2, plans

PLANS = {
    "whole": "one C++ call each way",
    "adapter": "C++ for the adapter's product, the library adds the product with weight to it",
    "library": "the library's products in place, as in lean: fastest at this size",
    "folded": "the library's products with a scratch copy of weight + s·B·N·A, which the many rows share",
}
# The plans of which our kernels see the adapter.
_OWN = ("whole", "adapter")


class Cpu(Lean):
    name = "cpu"
    verified_on = frozenset({"cpu"})
    plan = staticmethod(plans.plan)
    makes_core = True

    def unavailable(self) -> str | None:
        return None if native._C else native.missing()

    def unsupported(self, call: Call) -> str | None:
        weight, lora_A, lora_B, lora_N = call.weight, call.lora_A, call.lora_B, call.lora_N
        if type(lora_N) is Factors:
            lora_N = lora_N.lora_u
        # NOTE: the usual call first, and no loop over its tensors: at a few tokens a layer costs as little as this.
        if (
            weight.is_cpu
            and weight.dtype in plans.DTYPES
            and lora_A.dtype in plans.DTYPES
            and lora_B.dtype in plans.DTYPES
            and (lora_N is None or lora_N.dtype in plans.DTYPES)
            and not call.dropout
        ):
            return None
        if call.dropout:
            return "it has no dropout"
        if weight.device.type != "cpu":
            return f"tensors must be on the CPU, got {weight.device}"
        for name, t in {"x": weight, "lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N}.items():
            if t is not None and t.dtype not in plans.DTYPES:
                return f"{name} must be float32, bfloat16 or float16, got {short(t.dtype)}"
        return None

    def describe(self, call: Call) -> str:
        return PLANS[self.plan(call.x.dtype, *call.x.shape, *call.lora_B.shape)]

    def forward(self, call: Call, plan: str | None = None) -> tuple[Tensor, Tensor]:
        x, weight, lora_A, lora_N = call.x, call.weight, call.lora_A, call.lora_N
        (M, K), N, R = x.shape, weight.shape[0], lora_A.shape[0]
        plan = plan or self.plan(x.dtype, M, K, N, R)
        if type(lora_N) is Factors:
            if plan in _OWN:
                lora_N = _readable(lora_N)
            else:
                call = call._replace(lora_N=self.lora2_core(*lora_N))
        if plan == "library":
            return super().forward(call)
        if plan == "folded":
            return F.linear(x, _folded(call), call.bias), x @ lora_A.to(x.dtype).T
        y, T = x.new_empty(M, N), x.new_empty(M, R)
        inside = _rows(weight) if plan == "whole" else None
        lora_B, bias, threads = call.lora_B, call.bias, torch.get_num_threads()
        _C.cpu_forward(_rows(x), inside, _rows(lora_A), lora_B, lora_N, bias, y, T, call.scaling, threads)
        return (y if plan == "whole" else y.addmm_(x, weight.T)), T

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs, plan: str | None = None) -> Grads:
        x, weight, lora_A, lora_B, lora_N, _, scaling, _ = call
        M, (N, K), R = dy.shape[0], weight.shape, lora_A.shape[0]
        plan = plan or self.plan(dy.dtype, M, K, N, R, backward=True)
        factors = lora_N if type(lora_N) is Factors else None
        if factors and plan not in _OWN:
            grads = self.backward(call._replace(lora_N=self.lora2_core(*factors)), dy, T, needs, plan)
            if needs.lora_N:
                grads = grads._replace(lora_N=self.lora2_core_backward(grads.lora_N, *factors))
            return grads
        if plan == "library":
            return super().backward(call, dy, T, needs)
        if plan == "folded":
            grads = super().backward(call, dy, T, needs._replace(x=False))
            # NOTE: folding again costs less than keeping a copy of every weight from forward to backward.
            return grads._replace(x=dy @ _folded(call) if needs.x else None)
        whole = plan == "whole"
        if factors:
            lora_N = _readable(factors)
        dy, x, lora_A, inside = _rows(dy), _rows(x), _rows(lora_A), _rows(weight) if whole else None
        grads = Grads(
            x=dy.new_empty(M, K) if needs.x else None,
            weight=_new(weight) if needs.weight and whole else None,
            lora_A=_new(lora_A) if needs.lora_A else None,
            lora_B=_new(lora_B) if needs.lora_B else None,
            lora_N=(tuple([_new(t) for t in factors[:3]]) if factors else _new(lora_N)) if needs.lora_N else None,
            bias=dy.new_empty(N) if needs.bias else None,
        )
        threads = torch.get_num_threads()
        _C.cpu_backward(dy, x, T, inside, lora_A, lora_B, lora_N, *grads, scaling, threads)
        if not whole and needs.x:
            grads.x.addmm_(dy, weight)
        if not whole and needs.weight:
            grads = grads._replace(weight=dy.T @ x)
        return grads

    def lora2_core(self, lora_u, lora_E, lora_U, mask) -> Tensor:
        if lora_u.dtype not in plans.DTYPES:
            return super().lora2_core(lora_u, lora_E, lora_U, mask)
        core = lora_u.new_empty(lora_u.shape[1], lora_u.shape[1])
        _C.cpu_lora2_core(_readable(Factors(lora_u, lora_E, lora_U, mask)), core)
        return core

    def lora2_core_backward(self, d_core, lora_u, lora_E, lora_U, mask) -> tuple[Tensor, Tensor, Tensor]:
        if lora_u.dtype not in plans.DTYPES:
            return super().lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask)
        grads = _new(lora_u), _new(lora_E), _new(lora_U)
        _C.cpu_lora2_core_backward(d_core, _readable(Factors(lora_u, lora_E, lora_U, mask)), grads)
        return grads

    def add_product(self, weight, left, right) -> Callable[[], bool] | None:
        """weight += left·right when called; False, with nothing done, where the library is faster or must do it."""
        for t in (weight, left, right):
            if not t.is_cpu or t.dtype != torch.float32 or not plain(t):
                return None
        if weight.stride(1) != 1:
            return None
        return partial(_C.cpu_add_product, weight, left, right, torch.get_num_threads())

    def lora2_training(self, tensors: Sequence[Tensor], size: int = 1) -> ModuleType | None:
        return lora2 if lora2.takes(tensors, size) else None


def _folded(call: Call) -> Tensor:
    A, B, N = call.adapter
    return torch.addmm(call.weight, B if N is None else B @ N, A, alpha=call.scaling)


def _readable(factors: Factors) -> Factors:
    """The factors with a mask that the kernels read."""
    mask = factors.mask
    return factors if mask is None or mask.dtype in plans.DTYPES else factors._replace(mask=mask.float())


def _rows(t: Tensor | None) -> Tensor | None:
    """A matrix with its columns side by side, as the kernels read it."""
    return t if t is None or t.is_contiguous() or t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _new(like: Tensor) -> Tensor:
    """A contiguous tensor of this shape and dtype."""
    # NOTE: to name the format, or shape and dtype, costs twice the call.
    if like.is_contiguous():
        return torch.empty_like(like)
    return torch.empty_like(like, memory_format=torch.contiguous_format)
