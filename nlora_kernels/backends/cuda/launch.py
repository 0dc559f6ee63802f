"""Launches of the extension on PyTorch's current stream, and the tensors that they take."""

import functools

import torch
from torch import Tensor

from ..native import _C

# Bytes to which TMA and 16-byte copies want addresses and rows aligned.
ALIGNMENT = 16

# Control words of the products by device, stream and capture. A launch leaves them ready for the next one.
_states: dict[tuple[int, int, int], Tensor] = {}


def run(operation: str, *tensors: Tensor | None, **scalars: float) -> None:
    """Launches an operation of csrc/ops.h on the device and current stream of the first tensor."""
    getattr(_C, f"cuda_{operation}")(queue(tensors[0]), *tensors, *scalars.values())


def queue(t: Tensor):
    """Where launches for a tensor go, as the extension takes it."""
    return _C.CudaQueue(*place(t))


def place(t: Tensor) -> tuple[int, int]:
    """The device of a tensor, and the address of the current stream there."""
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def state(x: Tensor) -> Tensor:
    """Control words for products of as many rows as x has.

    Launches on one stream share theirs. Those captured into a CUDA graph have words of that graph alone, for it may be
    replayed on any stream and beside others; it clears them once in each replay.
    """
    words, capture = _C.cuda_state_words(x.shape[0]), _C.cuda_capture(queue(x))
    key = *place(x), capture
    found = _states.get(key)
    if found is None or found.shape[1] < words:
        if capture:
            # A stream captures one graph at a time, and a graph keeps the memory that it was given.
            for old in [old for old in _states if old[:2] == key[:2] and old[2] not in (0, capture)]:
                del _states[old]
        # NOTE: floats, for the extension knows no integers; zero has the same bits.
        found = _states[key] = x.new_zeros(1, words, dtype=torch.float32)
    return found


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def unaligned(name: str, t: Tensor) -> str | None:
    """Why a matrix cannot be read where it lies."""
    if t.stride(1) == 1 and t.stride(0) * t.element_size() % ALIGNMENT == 0 and t.data_ptr() % ALIGNMENT == 0:
        return None
    beyond = t.data_ptr() % ALIGNMENT
    where = f"strides {t.stride()}, {beyond} bytes beyond an aligned address"
    return f"rows of {name} must be contiguous and aligned to {ALIGNMENT} bytes, got {where}"


def aligned(t: Tensor | None) -> Tensor | None:
    """A matrix or vector as the kernels read it: itself, or a copy where its rows are scattered or not aligned."""
    if t is None or unaligned("", t if t.dim() == 2 else t.unsqueeze(0)) is None:
        return t
    return t.clone(memory_format=torch.contiguous_format)
