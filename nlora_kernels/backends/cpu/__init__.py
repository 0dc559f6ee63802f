"""C++ kernels for CPUs behind the extension `_C` (csrc/cpu).

A call is computed in one of four ways (`plans`), which differ in who does the products:
    whole     one C++ call each way: rows of weight are read in place for few rows of x, else packed (docs/cpu.md)
    adapter   C++ writes the adapter's product, which reads and writes much and multiplies little; the library adds the
              product with weight to it
    library   `lean`
    folded    the library's products with a scratch copy of weight + s·B·N·A, which many rows of x share; in fp32 alone,
              for a half-precision weight would round small updates away

A weight in few bits has the first two (`decoding_plan`): it is decoded while it is packed in "whole", and a tile at a
time for the library in "adapter".
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from ..base import (
    DTYPES,
    Backend,
    Call,
    ExpertsCall,
    Factors,
    Grads,
    Lora2Training,
    Needs,
    linear,
    plain,
    short,
    unreadable,
)
from ..lean import Lean, add_input_gradient, add_output
from ..native import _C
from ..quantised import Coded, Quantised
from . import lora2, plans
from .plans import Plan

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
    decoding_plan = staticmethod(plans.decoding_plan)
    experts_plan = staticmethod(plans.experts_plan)
    makes_core = True

    def unavailable(self) -> str | None:
        return None if native._C else native.missing()

    def unsupported(self, call: Call) -> str | None:
        _, weight, lora_A, lora_B, lora_N, _, _, dropout = call
        if type(lora_N) is Factors:
            lora_N = lora_N.lora_u
        # NOTE: the usual call first, and no loop over its tensors: at a few tokens a layer costs as little as this.
        if (
            weight.is_cpu
            and weight.dtype in DTYPES
            and lora_A.dtype in DTYPES
            and lora_B.dtype in DTYPES
            and (lora_N is None or lora_N.dtype in DTYPES)
            and not dropout
        ):
            return None
        if dropout:
            return "it has no dropout"
        if weight.device.type != "cpu":
            return f"tensors must be on the CPU, got {weight.device}"
        return unreadable({"x": weight, "lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N})

    def describe(self, call: Call) -> str:
        return PLANS[self.plan(call.x.dtype, *call.x.shape, *call.lora_B.shape).way]

    def forward(self, call: Call, plan: Plan | None = None) -> tuple[Tensor, Tensor]:
        x, weight, lora_A, lora_B, lora_N, bias, scaling, _ = call
        (M, K), N, R = x.shape, weight.shape[0], lora_A.shape[0]
        if isinstance(weight, Quantised):
            plan = self._plan_of(weight, x.dtype, M)
        way, pieces = plan or self.plan(x.dtype, M, K, N, R)
        if type(lora_N) is Factors and way not in _OWN:
            call = call._replace(lora_N=self.lora2_core(*lora_N))
        if way == "library":
            return super().forward(call)
        if way == "folded":
            return F.linear(x, _folded(call), bias), x @ lora_A.to(x.dtype).T
        threads = torch.get_num_threads()
        if way == "whole":
            return _C.cpu_forward(x, _inside(weight), lora_A, lora_B, lora_N, bias, scaling, threads, pieces)
        y, T = _C.cpu_forward(x, None, lora_A, lora_B, lora_N, bias, scaling, threads, pieces)
        return add_output(y, x, weight), T

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs, plan: Plan | None = None) -> Grads:
        x, weight, lora_A, lora_B, lora_N, _, scaling, _ = call
        M, (N, K), R = dy.shape[0], weight.shape, lora_A.shape[0]
        if isinstance(weight, Quantised):
            plan = self._plan_of(weight, dy.dtype, M)
        way, pieces = plan = plan or self.plan(dy.dtype, M, K, N, R, backward=True)
        factors = lora_N if type(lora_N) is Factors else None
        if factors and way not in _OWN:
            grads = self.backward(call._replace(lora_N=self.lora2_core(*factors)), dy, T, needs, plan)
            if needs.lora_N:
                grads = grads._replace(lora_N=self.lora2_core_backward(grads.lora_N, *factors))
            return grads
        if way == "library":
            return super().backward(call, dy, T, needs)
        if way == "folded":
            grads = super().backward(call, dy, T, needs._replace(x=False))
            # NOTE: folding again costs less than keeping a copy of every weight from forward to backward.
            return grads._replace(x=dy @ _folded(call) if needs.x else None)
        whole = way == "whole"
        inside, threads = _inside(weight) if whole else None, torch.get_num_threads()
        made = _C.cpu_backward(dy, x, T, inside, lora_A, lora_B, lora_N, needs, scaling, threads, pieces)
        # NOTE: as Grads(*made), for a third of the time.
        grads = tuple.__new__(Grads, made)
        if needs.bias:
            grads = grads._replace(bias=dy.sum(0))
        if whole:
            return grads
        if needs.x:
            add_input_gradient(grads.x, dy, weight)
        if needs.weight:
            grads = grads._replace(weight=dy.T @ x)
        return grads

    def _plan_of(self, weight: Quantised, dtype: torch.dtype, M: int) -> Plan:
        return self.decoding_plan(dtype, M, *weight.shape[::-1]) if isinstance(weight, Coded) else Plan("adapter")

    def unsupported_group(self, calls: Sequence[Call]) -> str | None:
        weight = calls[0].weight
        if not weight.is_cpu or weight.dtype not in DTYPES:
            return f"x must be float32, bfloat16 or float16 on the CPU, got {short(weight.dtype)} on {weight.device}"
        return super().unsupported_group(calls)

    def forward_group(self, calls: Sequence[Call], plan: Plan | None = None) -> list[tuple[Tensor, Tensor | None]]:
        x = calls[0].x
        way, pieces = plan = plan or self.group_plan(calls, x)
        if way not in _OWN:
            return [(linear(call), None) if call.lora_A is None else self.forward(call, plan) for call in calls]
        whole = way == "whole"
        own = calls if whole else [call for call in calls if call.lora_A is not None]
        biases, scalings = [call.bias for call in own], [call.scaling for call in own]
        options = biases, scalings, torch.get_num_threads(), pieces
        made = _C.cpu_forward_group(x, *_operands(own, whole), *options) if own else []
        if whole:
            return made
        with_adapter = iter(made)
        return [(linear(c), None) if c.lora_A is None else _with_base(c, *next(with_adapter)) for c in calls]

    def backward_group(
        self,
        calls: Sequence[Call],
        dys: Sequence[Tensor],
        Ts: Sequence[Tensor | None],
        needs: Sequence[Needs],
        plan: Plan | None = None,
    ) -> tuple[Tensor | None, list[Grads]]:
        way, pieces = plan = plan or self.group_plan(calls, dys[0], backward=True)
        if way == "library":
            return super().backward_group(calls, dys, Ts, needs)
        if way == "folded":
            # NOTE: not Lean's, which sums by products with the weight as it is, not folded.
            return Backend.backward_group(self, calls, dys, Ts, needs)
        whole = way == "whole"
        own = [i for i, call in enumerate(calls) if whole or call.lora_A is not None]
        x = next((call.x for call in calls if call.x is not None), None)
        dx, grads = None, [Grads()] * len(calls)
        if own:
            members, scalings = [calls[i] for i in own], [calls[i].scaling for i in own]
            operands, wanted = _operands(members, whole), [needs[i] for i in own]
            arguments = [dys[i] for i in own], x, [Ts[i] for i in own], *operands, wanted, scalings
            dx, made = _C.cpu_backward_group(*arguments, torch.get_num_threads(), pieces)
            for i, of in zip(own, made, strict=True):
                grads[i] = Grads(*of)
        for i, (call, dy, need) in enumerate(zip(calls, dys, needs, strict=True)):
            if need.bias:
                grads[i] = grads[i]._replace(bias=dy.sum(0))
            if whole:
                continue
            if need.x:
                dx = dy @ call.weight if dx is None else dx.addmm_(dy, call.weight)
            if need.weight:
                grads[i] = grads[i]._replace(weight=dy.T @ call.x)
        return dx, grads

    def group_plan(self, calls: Sequence[Call], first: Tensor, backward: bool = False) -> Plan:
        """The plan of one layer of all members' columns, whose adapter multiplies as much as theirs."""
        K, N = calls[0].weight.shape[1], sum(call.weight.shape[0] for call in calls)
        inner = sum(call.lora_A.shape[0] * (K + call.weight.shape[0]) for call in calls if call.lora_A is not None)
        return self.plan(first.dtype, first.shape[0], K, N, max(1, round(inner / (K + N))), backward=backward)

    def forward_experts(self, call: ExpertsCall) -> tuple[Tensor, Tensor]:
        x, offsets, weight, lora_A, lora_B, lora_N, bias, scaling = call
        (M, K), (E, N, _), R = x.shape, weight.shape, lora_A.shape[1]
        way, pieces = self.experts_plan(x.dtype, M, E, K, N, R)
        if way == "library":
            return super().forward_experts(call)
        ends, y, T = offsets.tolist(), x.new_empty(M, N), x.new_empty(M, R)
        y[ends[-1] :], T[ends[-1] :] = 0, 0
        adapter = _columns(lora_A), lora_B.contiguous(), lora_N
        _C.cpu_forward_experts(ends, x, weight, *adapter, bias, y, T, scaling, torch.get_num_threads(), pieces)
        return y, T

    def backward_experts(self, call: ExpertsCall, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        x, offsets, weight, lora_A, lora_B, lora_N, _, scaling = call
        M, (E, N, K), R = dy.shape[0], weight.shape, lora_A.shape[1]
        way, pieces = self.experts_plan(dy.dtype, M, E, K, N, R, backward=True)
        if way == "library":
            return super().backward_experts(call, dy, T, needs)
        ends, lora_A, lora_B = offsets.tolist(), _columns(lora_A), lora_B.contiguous()
        grads = Grads(
            x=dy.new_empty(M, K) if needs.x else None,
            weight=_new(weight) if needs.weight else None,
            lora_A=_new(lora_A) if needs.lora_A else None,
            lora_B=_new(lora_B) if needs.lora_B else None,
            lora_N=_new(lora_N) if needs.lora_N else None,
        )
        if needs.x:
            grads.x[ends[-1] :] = 0
        tensors = dy, x, T, weight, lora_A, lora_B, lora_N
        _C.cpu_backward_experts(ends, *tensors, *grads[:5], scaling, torch.get_num_threads(), pieces)
        if needs.bias:
            sums = [dy[first:last].sum(0) for first, last in pairwise([0, *ends])]
            grads = grads._replace(bias=torch.stack(sums))
        return grads

    def lora2_core(self, lora_u, lora_E, lora_U, mask) -> Tensor:
        if lora_u.dtype not in DTYPES:
            return super().lora2_core(lora_u, lora_E, lora_U, mask)
        return _C.cpu_lora2_core((lora_u, lora_E, lora_U, mask))

    def lora2_core_backward(self, d_core, lora_u, lora_E, lora_U, mask) -> tuple[Tensor, Tensor, Tensor]:
        if lora_u.dtype not in DTYPES:
            return super().lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask)
        return _C.cpu_lora2_core_backward(d_core, (lora_u, lora_E, lora_U, mask))

    def add_product(self, weight, left, right) -> Callable[[], bool] | None:
        """weight += left·right when called; False, with nothing done, where the library is faster or must do it."""
        for t in (weight, left, right):
            if not t.is_cpu or t.dtype != torch.float32 or not plain(t):
                return None
        if weight.stride(1) != 1:
            return None
        return partial(_C.cpu_add_product, weight, left, right, torch.get_num_threads())

    def lora2_training(self, tensors: Sequence[Tensor], size: int = 1) -> Lora2Training | None:
        if not lora2.takes(tensors, size):
            return None
        return Lora2Training(lora2.penalty, lora2.penalty_backward, allocate=lora2.allocate)


def _operands(calls: Sequence[Call], whole: bool) -> tuple[list[Tensor | None], ...]:
    """weight, where a plan reads it, lora_A, lora_B and lora_N of each."""
    return (
        [call.weight if whole else None for call in calls],
        [call.lora_A for call in calls],
        [call.lora_B for call in calls],
        [call.lora_N for call in calls],
    )


def _with_base(call: Call, y: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """A y that lacks x·Wᵀ, with it."""
    return y.addmm_(call.x, call.weight.T), T


def _inside(weight: Tensor | Coded):
    """The weight as the kernels read it."""
    return weight.native() if isinstance(weight, Coded) else weight


def _folded(call: Call) -> Tensor:
    A, B, N = call.adapter
    return torch.addmm(call.weight, B if N is None else B @ N, A, alpha=call.scaling)


def _columns(t: Tensor) -> Tensor:
    """Stacked matrices with their columns side by side, as the kernels read them."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _new(like: Tensor) -> Tensor:
    """A contiguous tensor of this shape and dtype."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)
