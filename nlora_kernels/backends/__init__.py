"""The table of backends and the rule that picks one.

A backend is a module with these plain functions; it knows nothing of autograd, and every argument is already checked:

    unavailable() -> str | None
        why it cannot run on this machine at all
    unsupported(x, weight, lora_A, lora_B, lora_N, dropout) -> str | None
        why it cannot take this call
    forward(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout) -> (y, T)
    backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, needs, dropout) -> Grads
    lora2_core(lora_u, lora_E, lora_U, mask) -> core
    lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask) -> (du, dE, dU)
    initialisation(weight, r) -> module | None                       (optional)
        for `init`, if it can take this weight: its own gather, squared_norms, subtract_ and solve_triangular, or
        those of them that it has
    product_adder(weight, left, right) -> callable | None            (optional)
        C that adds left·right to weight in place and returns True, or does nothing and returns False where PyTorch is
        faster; None where it cannot
    lora2_training(tensors, size) -> module | None                   (optional)
        smooth, mask, penalty and penalty_backward of its own for `lora2`, if it can take adapters of these tensors

with x (M, K) in any strides, weight (N, K) and bias (N,) in x's dtype, lora_A (R, K), lora_N (R, R) or None and
lora_B (N, R) in any floating dtype. y (M, N) and T (M, R) are new contiguous tensors in x's dtype; T = drop(x)·Aᵀ means
the same in every backend, so the backward of one may follow the forward of another. `dropout` is a `Dropout`, or None
where nothing is dropped. `needs` says which gradients to compute; a gradient has the dtype of its tensor, and None
stands where none was asked for.

VERIFIED_ON names the device types on which the backend is chosen without being named. Kernels of ours must have passed
their tests on hardware of that type; library calls are taken to be right wherever PyTorch is. On a GPU a backend goes
before those where the machine's own record says that it passed there and is faster (`verified`). DROPS_INSIDE says
whether dropout costs it less than a dropped copy of x does.
"""

import functools
import os
from types import ModuleType

import torch
from torch import Tensor

from . import cuda, lean, native, reference, triton, verified
from .dropout import Dropout
from .gradients import Grads, Needs

__all__ = [
    "ON_GPU",
    "TABLE",
    "Dropout",
    "Grads",
    "Needs",
    "available",
    "drops_inside",
    "forget",
    "preferred",
    "select",
    "verified",
]

# In order of preference.
TABLE: dict[str, ModuleType] = {
    "cpu": native.cpu,
    "cuda": cuda,
    "triton": triton,
    "lean": lean,
    "reference": reference,
}

# Kernels of ours for GPUs, which `verify` proves on the user's own.
ON_GPU = ("cuda", "triton")

_ENVIRONMENT, _VARIABLE = os.environ._data, os.environ.encodekey("NLORA_BACKEND")


def available() -> dict[str, str | None]:
    """{backend name: None if it can run on this machine, else every reason why it cannot}."""
    return {name: module.unavailable() for name, module in TABLE.items()}


def preferred() -> str | None:
    """The backend that NLORA_BACKEND gives to calls that name none."""
    # NOTE: os.environ.get encodes and decodes at every call, which costs as much as everything else in `select`.
    value = _ENVIRONMENT.get(_VARIABLE)
    return value and os.environ.decodevalue(value)


def select(name: str | None, first: Tensor, call: tuple | None = None, operation: str = "forward") -> ModuleType:
    """The backend module for a call whose first tensor is `first`; `call` holds the arguments of `unsupported`.

    `name`, or NLORA_BACKEND where no name is given, is taken as it stands: ValueError if it is unknown, cannot run here
    or cannot take this call. Without a name: on a GPU the fastest that passed `verify` there, can take the call and is
    faster than "lean" at this `operation` ("forward", "backward", "lora2_core", "initialisation", "lora2_training");
    else the first of the table that can take the call and is verified on hardware of the tensors' kind.
    """
    name = name or preferred()
    if name:
        module = TABLE.get(name)
        if module is None:
            raise ValueError(f"backend must be one of {', '.join(sorted(TABLE))}, got {name!r}")
        reason = module.unavailable() or (module.unsupported(*call) if call else None)
        if reason:
            raise ValueError(f"backend {name!r} cannot take this call: {reason}")
        return module
    if first.is_cpu:
        device = "cpu"
    else:
        device = first.device.type
        if device == "cuda":
            for module in _on_gpu(operation, first, call):
                if call is None or not module.unsupported(*call):
                    return module
    for module in TABLE.values():
        if device in module.VERIFIED_ON and not module.unavailable():
            if call is None or not module.unsupported(*call):
                return module
    return reference


def drops_inside(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether dropout belongs inside the operation for a dtype on a device, because the backend there gains by it."""
    name = preferred()
    if name:
        return name not in TABLE or TABLE[name].DROPS_INSIDE
    if device.type == "cuda" and not _by_tf32(dtype):
        if _proven("dropout", device.index, dtype, torch.float32, None, False):
            return True
    return any(
        module.DROPS_INSIDE and device.type in module.VERIFIED_ON and not module.unavailable()
        for module in TABLE.values()
    )


# NOTE: compiled code takes the answer for a constant, for neither table, environment nor files can be traced. This is
# what torch.compiler.assume_constant_result does after it has imported the compiler.
drops_inside._dynamo_marked_constant = True


def _on_gpu(operation: str, first: Tensor, call: tuple | None) -> tuple[ModuleType, ...]:
    """The backends that go before those of the table for a call on a GPU, the best first."""
    dtype = first.dtype
    if _by_tf32(dtype):
        return ()
    if call is None:
        return _proven(operation, first.device.index, dtype, dtype, None, False)
    _, weight, lora_A, _, _, dropout = call
    shape = first.shape[0], weight.shape[1], weight.shape[0], lora_A.shape[0]
    return _proven(operation, first.device.index, dtype, lora_A.dtype, shape, dropout is not None)


def _by_tf32(dtype: torch.dtype) -> bool:
    """Whether products of a dtype are made by TF32, whose kernels are others than were verified."""
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


# NOTE: as many shapes as batches of every length bring.
@functools.lru_cache(maxsize=4096)
def _proven(
    operation: str, index: int, dtype: torch.dtype, adapter: torch.dtype, shape: tuple | None, dropout: bool
) -> tuple[ModuleType, ...]:
    able = {name: TABLE[name] for name in ON_GPU if not TABLE[name].unavailable()}
    record = verified.record(index)
    if record is None:
        if able:
            verified.warn_once(index)
        return ()
    if dropout:
        # Where the mask is a tensor it costs more than the layer.
        able = {name: module for name, module in able.items() if module.DROPS_INSIDE and record.passed(name, dtype)}
        return tuple(able.values()) if adapter in (torch.float32, dtype) else ()
    return tuple(able[name] for name in record.faster(operation, dtype, adapter, shape) if name in able)


def forget() -> None:
    """Has what was verified on this machine read anew."""
    verified.record.cache_clear()
    _proven.cache_clear()
