"""Launches of the extension on PyTorch's current stream, and the tensors that they take."""

import functools

import torch
from torch import Tensor

from ..native import _C

# Bytes to which TMA and 16-byte copies want addresses and rows aligned.
ALIGNMENT = 16

# Control words of the products by device and stream. A launch leaves them ready for the next one on that stream.
_states: dict[tuple[int, int], Tensor] = {}


def run(operation: str, *tensors: Tensor | None, **scalars: float) -> None:
    """Launches an operation of csrc/ops.h on the device and current stream of the first tensor."""
    getattr(_C, f"cuda_{operation}")(queue(tensors[0]), *tensors, *scalars.values())


def queue(t: Tensor):
    """Where launches for a tensor go, as the extension takes it."""
    return _C.CudaQueue(*place(t))


def place(t: Tensor) -> tuple[int, int]:
    """The device of a tensor, and the address of the current stream there."""
    return t.device.index, torch.cuda.current_stream(t.device).cuda_stream


def capturing(t: Tensor) -> bool:
    """Whether the current stream there is being captured into a CUDA graph."""
    with torch.cuda.device(t.device):
        return torch.cuda.is_current_stream_capturing()


def state(x: Tensor) -> Tensor:
    """Control words for products of as many rows as x has.

    Launches on one stream share theirs. A CUDA graph may be replayed on any stream and beside others, so each launch
    that is captured gets words of its own, which the graph clears.
    """
    words = _C.cuda_state_words(x.shape[0])
    # NOTE: floats, for the extension knows no integers; zero has the same bits.
    if capturing(x):
        return x.new_zeros(1, words, dtype=torch.float32)
    found = _states.get(place(x))
    if found is None or found.shape[1] < words:
        found = _states[place(x)] = x.new_zeros(1, words, dtype=torch.float32)
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
