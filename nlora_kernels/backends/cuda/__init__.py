"""CUDA C++ kernels behind the extension `_C`, for NVIDIA GPUs from compute capability 8.0 on (docs/cuda.md).

    F = s·B·N
    forward     y = x·Wᵀ + T·Fᵀ + bias  and  T = x·Aᵀ
    backward    dx = dy·W + H·A  and  H = dy·F, G = dy·B        dA = Hᵀ·x    dN = s·Gᵀ·T    dB = s·(dyᵀ·T)·Nᵀ

Each line's first half is one launch on Hopper, two elsewhere. Nothing here waits for the device.
"""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import base, native
from ..base import Backend, Call, Grads, Initialisation, Needs, capability, check_core, misplaced, plain, short
from ..lean import Lean
from ..native import _C
from . import launch

DTYPES = (torch.bfloat16, torch.float16)
MAX_RANK = 256


@functools.cache
def unavailable() -> str | None:
    reasons = []
    if _C is None:
        reasons.append(native.missing())
    elif not hasattr(_C, "cuda_forward"):
        reasons.append("the package was built without nvcc (install it where the CUDA toolkit is)")
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} was built without CUDA")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        reasons.append(f"there is no NVIDIA driver ({error})")
    else:
        reasons += _missing_device()
    return "; ".join(reasons) or None


def _missing_device() -> list[str]:
    if torch.version.cuda is None:
        return []
    try:
        found = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
    except RuntimeError as error:
        # In a child of fork(), for one.
        return [f"CUDA cannot start ({error})"]
    if any(capability >= (8, 0) for capability in found):
        return []
    got = ", ".join(f"{major}.{minor}" for major, minor in found) or "no device"
    return [f"a device of compute capability 8.0 or newer is needed, got {got}"]


class Cuda(Lean):
    name = "cuda"
    # NOTE: no run on a GPU has been made yet.
    verified_on = frozenset()
    proved_for = DTYPES

    def unavailable(self) -> str | None:
        return unavailable()

    def unsupported(self, call: Call) -> str | None:
        weight, lora_A, lora_B, lora_N = call.weight, call.lora_A, call.lora_B, call.lora_N
        if call.dropout:
            return "it has no dropout"
        if weight.dtype not in DTYPES:
            return f"x must be bfloat16 or float16, got {short(weight.dtype)}"
        # NOTE: no loop where nothing is wrong: this runs at every call.
        core_dtype = lora_A.dtype if lora_N is None else lora_N.dtype
        if not (lora_A.dtype in base.DTYPES and lora_B.dtype in base.DTYPES and core_dtype in base.DTYPES):
            return base.unreadable({"lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N})
        (N, K), R = weight.shape, lora_A.shape[0]
        if K % 8 or N % 8 or R % 8 or not K * N * R:
            for name, size in {"in": K, "out": N, "r": R}.items():
                if size % 8 or size == 0:
                    return f"{name} must be a multiple of 8, got {size}"
        if R > MAX_RANK:
            return f"r must be at most {MAX_RANK}, got {R}"
        # One in few bits is decoded to where it is aligned.
        unaligned = launch.unaligned("weight", weight) if isinstance(weight, Tensor) else None
        return unaligned or misplaced("x", weight)

    def describe(self, call: Call) -> str:
        hopper = capability(call.weight.device) == (9, 0)
        return "one launch each for y and for dx" if hopper else "two launches each for y and for dx"

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        x, weight, lora_A, lora_B, lora_N, bias, scaling, _ = call
        (M, K), N, R = x.shape, weight.shape[0], lora_A.shape[0]
        y, T = x.new_empty(M, N), x.new_empty(M, R)
        if M:
            x, bias = launch.aligned(x), launch.aligned(bias)
            workspace = x.new_empty(_C.cuda_forward_bytes(K, N, R) // x.element_size())
            _C.cuda_forward(launch.queue(x), x, weight, lora_A, lora_B, lora_N, bias, y, T, workspace, scaling)
        return y, T

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        x, weight, lora_A, lora_B, lora_N, _, scaling, _ = call
        M, (N, K), R = dy.shape[0], weight.shape, lora_A.shape[0]
        if M == 0:
            return super().backward(call, dy, T, needs)
        grads = launch.grads(call, dy, needs)
        made = grads.x, grads.lora_A, grads.lora_B, grads.lora_N
        if needs.x or needs.lora_A or needs.lora_B or needs.lora_N:
            dy, x, T = launch.aligned(dy), launch.aligned(x), launch.aligned(T)
            queue, wanted = launch.queue(dy), (needs.lora_A, needs.lora_B, needs.lora_N)
            workspace = dy.new_empty(_C.cuda_backward_bytes(queue, M, K, N, R, *wanted) // dy.element_size())
            _C.cuda_backward(queue, dy, x, T, weight, lora_A, lora_B, lora_N, *made, workspace, scaling)
        return grads

    def forward_group(self, calls: Sequence[Call]) -> list[tuple[Tensor, Tensor | None]]:
        from . import group

        return group.forward(calls) if group.takes(calls, calls[0].x.shape[0]) else super().forward_group(calls)

    def backward_group(self, calls, dys, Ts, needs) -> tuple[Tensor | None, list[Grads]]:
        from . import group

        if group.takes(calls, dys[0].shape[0]):
            return group.backward(calls, dys, Ts, needs)
        # NOTE: not Lean's, which sums by the library's products.
        return Backend.backward_group(self, calls, dys, Ts, needs)

    def lora2_core(self, lora_u, lora_E, lora_U, mask) -> Tensor:
        check_core(self.name, lora_u, misplaced("lora_u", lora_u))
        core = lora_u.new_empty(lora_u.shape[1], lora_u.shape[1])
        launch.run("lora2_core", lora_u, lora_E, lora_U, _weights(mask), core)
        return core

    def lora2_core_backward(self, d_core, lora_u, lora_E, lora_U, mask) -> tuple[Tensor, Tensor, Tensor]:
        check_core(self.name, lora_u, misplaced("lora_u", lora_u))
        grads = torch.empty_like(lora_u), torch.empty_like(lora_E), torch.empty_like(lora_U)
        launch.run("lora2_core_backward", d_core, lora_u, lora_E, lora_U, _weights(mask), *grads)
        return grads

    def initialisation(self, weight: Tensor, r: int) -> Initialisation:
        if not plain(weight) or weight.dtype not in base.DTYPES or weight.numel() == 0 or r > MAX_RANK:
            return Initialisation()
        if misplaced("weight", weight) or launch.unaligned("weight", weight):
            return Initialisation()
        from . import nystrom

        return Initialisation(gather=nystrom.gather, subtract_products=nystrom.subtract_products)


def _weights(mask: Tensor | None) -> Tensor | None:
    return mask if mask is None or mask.dtype in base.DTYPES else mask.float()
