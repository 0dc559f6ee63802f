"""The table of backends and the rule that picks one.

On a GPU a backend goes before those where the machine's own record says that it passed there and is faster
(`verified`).
"""

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from ..internals import constant_in_compiled_code
from . import native, verified
from .base import Backend, Call, Dropout, ExpertsCall, Factors, Grads, Lora2Training, Needs
from .cpu import Cpu
from .cuda import Cuda
from .lean import Lean
from .quantised import Quantised, shared_memory
from .reference import Reference
from .triton import Triton

__all__ = [
    "ON_GPU",
    "REFERENCE",
    "TABLE",
    "Backend",
    "Call",
    "Dropout",
    "Factors",
    "Grads",
    "ExpertsCall",
    "Lora2Training",
    "Needs",
    "available",
    "choose",
    "drops_inside",
    "forget",
    "makes_core",
    "native",
    "prefer",
    "preferred",
    "select",
    "select_group",
    "verified",
]

REFERENCE = Reference()

# In order of preference.
TABLE: dict[str, Backend] = {backend.name: backend for backend in (Cpu(), Cuda(), Triton(), Lean(), REFERENCE)}

# Kernels of ours for GPUs, which `verify` proves on the user's own.
ON_GPU = tuple(name for name, backend in TABLE.items() if backend.proved_for)


def available() -> dict[str, str | None]:
    """{backend name: None if it can run on this machine, else every reason why it cannot}."""
    return {name: backend.unavailable() for name, backend in TABLE.items()}


# NOTE: os.environ.get raises and catches a KeyError at every call, which costs as much as everything else in `select`.
_preferred = os.environ.get("NLORA_BACKEND") or None


def preferred() -> str | None:
    """The backend of calls that name none: what `prefer` was given last, at first NLORA_BACKEND as it was at import."""
    return _preferred


def prefer(name: str | None) -> str | None:
    """Gives calls that name no backend this one; None leaves them the best one. Returns what was preferred before.

    ValueError for a name that `available` does not know.
    """
    global _preferred
    if name:
        _check(name)
    before, _preferred = _preferred, name or None
    return before


def _check(name: str) -> None:
    # What has no hash is in no table either.
    if not isinstance(name, str) or name not in TABLE:
        raise ValueError(f"backend must be one of {', '.join(sorted(TABLE))}, got {name!r}")


def select(name: str | None, first: Tensor, call: Call | None = None, operation: str = "forward") -> Backend:
    """The backend for a call whose first tensor, x or dy, is `first`.

    `name`, or what is `preferred` where there is none, is taken as it is: ValueError if it is unknown, cannot run here
    or cannot take this call. Without a name: on a GPU the fastest that passed `verify` there, can take the call and is
    faster than "lean" at this `operation` ("forward", "backward", "experts", "lora2_core", "initialisation",
    "lora2_training"; of weights in few bits "coded_forward", "coded_backward", "decode");
    else the first of the table that can take the call and is verified on hardware of the tensors' kind.
    """
    name = name or _preferred
    if name:
        _check(name)
        backend = TABLE[name]
        reason = backend.unavailable() or (backend.unsupported(call) if call else None)
        if reason:
            raise ValueError(f"backend {name!r} cannot take this call: {reason}")
        return backend
    if first.is_cpu:
        device = "cpu"
        if native._C is None:
            native.warn_once()
    else:
        device = first.device.type
        if device == "cuda":
            for backend in _on_gpu(operation, first, call):
                if call is None or not backend.unsupported(call):
                    return backend
    for backend in TABLE.values():
        if device in backend.verified_on and not backend.unavailable():
            if call is None or not backend.unsupported(call):
                return backend
    return REFERENCE


def select_group(name: str | None, first: Tensor, calls: Sequence[Call], operation: str = "forward") -> Backend:
    """The same for calls that share x: the first that takes all of them, of those that are chosen for one."""
    adapted = [call for call in calls if call.lora_A is not None]
    if name or _preferred:
        backend = select(name, first)
        if reason := backend.unsupported_group(calls):
            raise ValueError(f"backend {backend.name!r} cannot take this call: {reason}")
        return backend
    for call in adapted or (None,):
        backend = select(None, first, call, operation)
        if not backend.unsupported_group(calls):
            return backend
    return REFERENCE


def choose(
    backend: Backend | str | None, first: Tensor, call: Call, operation: str = "forward"
) -> tuple[Backend, Call]:
    """The backend of `select`, or the one that is given, and the call as it reads it.

    A weight in few bits stays so where the backend `reads_quantised`; else it is decoded as a whole, on other devices
    than the CPU into memory that all layers share. On a GPU kernels of ours do either where a backend is named, or
    where they passed `verify` and were faster.
    """
    weight = call.weight
    chosen = backend if isinstance(backend, Backend) else select(backend, first, call, operation)
    if not isinstance(weight, Quantised):
        return chosen, call
    own, rows = weight.is_cpu or backend or _preferred, first.shape[0]
    if own and chosen.reads_quantised(weight, rows):
        return chosen, call
    if weight.is_cpu:
        return chosen, call._replace(weight=chosen.decode(weight))
    decoder = TABLE["triton"] if own and not TABLE["triton"].unavailable() else REFERENCE
    if not own and first.device.type == "cuda":
        # With a mask in the product is no case of `verify`.
        for reader in () if call.dropout else _on_gpu(f"coded_{operation}", first, call):
            if reader.reads_quantised(weight, rows) and not reader.unsupported(call):
                return reader, call
        decoder = next(iter(_on_gpu("decode", first, None)), REFERENCE)
    return chosen, call._replace(weight=decoder.decode(weight, shared_memory(weight)))


def makes_core(name: str | None) -> bool:
    """Whether a call on the CPU may hold LoRA²'s factors in place of its core, which `ops` makes where need be."""
    name = name or _preferred
    return TABLE[name].makes_core if isinstance(name, str) and name in TABLE else not name


# Neither table, environment nor files can be traced.
@constant_in_compiled_code
def drops_inside(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether dropout belongs inside the operation for a dtype on a device, because the backend there gains by it."""
    name = preferred()
    if name:
        return name not in TABLE or TABLE[name].drops_inside
    if device.type == "cuda" and not _by_tf32(dtype):
        if _proven("dropout", device.index, dtype, torch.float32, None, False):
            return True
    return any(
        backend.drops_inside and device.type in backend.verified_on and not backend.unavailable()
        for backend in TABLE.values()
    )


def _on_gpu(operation: str, first: Tensor, call: Call | None) -> tuple[Backend, ...]:
    """The backends that go before those of the table for a call on a GPU, the best first."""
    dtype = first.dtype
    if _by_tf32(dtype):
        return ()
    if call is None:
        return _proven(operation, first.device.index, dtype, dtype, None, False)
    (N, K), lora_A = call.weight.shape, call.lora_A
    shape = first.shape[0], K, N, lora_A.shape[0]
    return _proven(operation, first.device.index, dtype, lora_A.dtype, shape, call.dropout is not None)


def _by_tf32(dtype: torch.dtype) -> bool:
    """Whether products of a dtype are made by TF32, whose kernels are others than were verified."""
    return dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


# NOTE: as many shapes as batches of every length bring.
@functools.lru_cache(maxsize=4096)
def _proven(
    operation: str, index: int, dtype: torch.dtype, adapter: torch.dtype, shape: tuple | None, dropout: bool
) -> tuple[Backend, ...]:
    able = {name: TABLE[name] for name in ON_GPU if not TABLE[name].unavailable()}
    record = verified.record(index)
    if record is None:
        if able:
            verified.warn_once(index)
        return ()
    if dropout:
        # Where the mask is a tensor it costs more than the layer.
        able = {name: backend for name, backend in able.items() if backend.drops_inside and record.passed(name, dtype)}
        return tuple(able.values()) if adapter in (torch.float32, dtype) else ()
    return tuple(able[name] for name in record.faster(operation, dtype, adapter, shape) if name in able)


def forget() -> None:
    """Has what was verified on this machine read anew."""
    verified.record.cache_clear()
    _proven.cache_clear()
