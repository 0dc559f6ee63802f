"""Triton kernels for GPUs from compute capability 8.0 on; under TRITON_INTERPRET=1 the same kernels run on the CPU.

Triton itself is imported when the backend is first used.
"""

import functools
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import base
from ..base import (
    DTYPES,
    Backend,
    Call,
    ExpertsCall,
    Grads,
    Initialisation,
    Lora2Training,
    Needs,
    check_core,
    plain,
)
from ..quantised import Coded, Quantised
from . import device


@functools.cache
def unavailable() -> str | None:
    reasons = []
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); install nlora_kernels[triton]"
    if _version(triton) < (3, 6):
        reasons.append(f"triton 3.6 or newer is needed, got {triton.__version__}")
    if not device.interpreted():
        if not torch.cuda.is_available():
            reasons.append("torch sees no GPU; set TRITON_INTERPRET=1 before triton is imported to run on the CPU")
        elif torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
            capability = ".".join(map(str, torch.cuda.get_device_capability()))
            reasons.append(f"compute capability 8.0 or newer is needed, got {capability}")
    else:
        # Its interpreter makes numbers of arrays of one element, which numpy from 2.4 on refuses.
        import numpy

        if _version(triton) < (3, 7) and _version(numpy) >= (2, 4):
            reasons.append(
                f"the interpreter of triton {triton.__version__} needs numpy below 2.4, got {numpy.__version__}: "
                "install either numpy<2.4 or triton>=3.7"
            )
    return "; ".join(reasons) or None


def _version(package: ModuleType) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])


def misplaced(name: str, t: Tensor) -> str | None:
    """Why a kernel cannot run on the device of a tensor; the interpreter runs on any."""
    if device.interpreted():
        return None
    return base.misplaced(name, t)


class Triton(Backend):
    name = "triton"
    # NOTE: no run on a GPU has been made yet.
    verified_on = frozenset()
    proved_for = DTYPES
    drops_inside = True

    def unavailable(self) -> str | None:
        return unavailable()

    def unsupported(self, call: Call) -> str | None:
        weight = call.weight
        if weight.dtype not in DTYPES:
            return base.unreadable({"x": weight})
        if device.interpreted() and torch.bfloat16 in {t.dtype for t in call[1:5] if t is not None}:
            return "Triton's interpreter computes bfloat16 wrongly"
        return misplaced("x", weight)

    def reads_quantised(self, weight: Quantised, rows: int) -> bool:
        from . import quantised

        return quantised.decodes_within(weight, rows)

    def describe(self, call: Call) -> str:
        from . import launch, tuning

        (M, K), (N, R), dtype = call.x.shape, call.lora_B.shape, call.x.dtype
        tf32, on = launch.tf32(dtype), device.target(call.x.get_device())
        aligned = launch.aligned(*(launch.Layout(*launch.layout(t)) for t in (call.x, call.weight)))
        tile = tuning.wide_tile(M, N, K, R, dtype, tf32, aligned, on)
        single = tuning.single_launch(M, N, K, R, dtype, tf32, aligned, tile, on)
        launches = "one launch" if single else "two launches"
        return f"{launches}, tiles of {tile.m}×{tile.n}×{tile.k}, {tile.warps} warps, {tile.stages} stages"

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        from . import linear

        return linear.forward(call)

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        from . import linear

        return linear.backward(call, dy, T, needs)

    def forward_group(self, calls: Sequence[Call]) -> list[tuple[Tensor, Tensor | None]]:
        from . import group

        return group.forward(calls) if group.takes(calls) else super().forward_group(calls)

    def backward_group(self, calls, dys, Ts, needs) -> tuple[Tensor | None, list[Grads]]:
        from . import group

        return (group.backward if group.takes(calls) else super().backward_group)(calls, dys, Ts, needs)

    def forward_experts(self, call: ExpertsCall) -> tuple[Tensor, Tensor]:
        from . import experts

        return experts.forward(call)

    def backward_experts(self, call: ExpertsCall, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        from . import experts

        return experts.backward(call, dy, T, needs)

    def lora2_core(self, lora_u, lora_E, lora_U, mask) -> Tensor:
        from . import core

        check_core(self.name, lora_u, misplaced("lora_u", lora_u))
        return core.forward(lora_u, lora_E, lora_U, mask)

    def lora2_core_backward(self, d_core, lora_u, lora_E, lora_U, mask) -> tuple[Tensor, Tensor, Tensor]:
        from . import core

        check_core(self.name, lora_u, misplaced("lora_u", lora_u))
        return core.backward(d_core, lora_u, lora_E, lora_U, mask)

    def initialisation(self, weight: Tensor, r: int) -> Initialisation:
        if not plain(weight) or weight.dtype not in DTYPES or weight.is_meta or r > 256 or misplaced("weight", weight):
            return Initialisation()
        if device.interpreted() and weight.dtype == torch.bfloat16:
            return Initialisation()
        from . import nystrom as own

        return Initialisation(own.gather, own.squared_norms, own.subtract_products, own.solve_triangular)

    def decode(self, weight: Quantised, out: Tensor | None = None) -> Tensor:
        if not isinstance(weight, Coded) or weight.dtype not in DTYPES:
            return super().decode(weight, out)
        from . import quantised

        if out is None:
            out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        return quantised.decode(weight, out)

    def lora2_training(self, tensors: Sequence[Tensor], size: int = 1) -> Lora2Training | None:
        like = tensors[0]
        if like.dtype not in DTYPES or like.is_meta or misplaced("lora_E", like):
            return None
        if device.interpreted() and like.dtype == torch.bfloat16:
            return None
        from . import allocator, launch, penalty

        for t in tensors:
            if not (plain(t) and t.is_contiguous() and t.dtype is like.dtype and t.device == like.device):
                return None
        # Tables of addresses come from the host, which a CUDA graph cannot capture; PyTorch's operations need none.
        if size > penalty.LARGEST or launch.capturing(like):
            return None
        return Lora2Training(penalty.penalty, penalty.penalty_backward, allocator.smooth, allocator.prune)
