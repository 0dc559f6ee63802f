"""Launches of the extension on PyTorch's current stream, and the tensors that they take."""

import torch
from torch import Tensor

from ..base import Call, Grads, Needs
from ..native import _C

# Bytes to which TMA and 16-byte copies want addresses and rows aligned.
ALIGNMENT = 16


def grads(call: Call, dy: Tensor, needs: Needs) -> Grads:
    """Those that are wanted of a call: room for what the kernels make, and what the library makes."""
    return Grads(
        x=dy.new_empty(dy.shape[0], call.weight.shape[1]) if needs.x else None,
        # The gradient of the weight itself is a plain product of two large matrices: the library's is best.
        weight=torch.mm(dy.T, call.x) if needs.weight else None,
        lora_A=torch.empty_like(call.lora_A) if needs.lora_A else None,
        lora_B=torch.empty_like(call.lora_B) if needs.lora_B else None,
        lora_N=torch.empty_like(call.lora_N) if needs.lora_N else None,
        bias=dy.sum(0) if needs.bias else None,
    )


def run(operation: str, *tensors: Tensor | None) -> None:
    """Launches an operation of csrc/ops.h on the device and current stream of the first tensor."""
    getattr(_C, f"cuda_{operation}")(queue(tensors[0]), *tensors)


def queue(t: Tensor):
    """The device of a tensor and the current stream there, as the extension takes them."""
    return _C.CudaQueue(t.device.index, torch.cuda.current_stream(t.device).cuda_stream)


def unaligned(name: str, t: Tensor) -> str | None:
    """Why a matrix cannot be read where it lies."""
    if _as_usual(t):
        return None
    row, beyond = t.stride(0) * t.element_size(), t.data_ptr() % ALIGNMENT
    if t.stride(1) == 1 and t.stride(0) >= t.shape[1] and row % ALIGNMENT == 0 and beyond == 0:
        return None
    where = f"strides {t.stride()}, {beyond} bytes beyond an aligned address"
    return f"rows of {name} must be contiguous and aligned to {ALIGNMENT} bytes, got {where}"


def _as_usual(t: Tensor) -> bool:
    """Whether a tensor lies as nearly all do: the cheapest question of those that are enough."""
    # NOTE: one row may count as contiguous whatever its stride.
    return t.is_contiguous() and t.shape[-1] % 8 == 0 and t.data_ptr() % ALIGNMENT == 0 and t.shape[0] > 1


def aligned(t: Tensor | None) -> Tensor | None:
    """A matrix or vector as the kernels read it: itself, or a copy where its rows are scattered or not aligned."""
    if t is None or _as_usual(t) or unaligned("", t if t.dim() == 2 else t.unsqueeze(0)) is None:
        return t
    return t.clone(memory_format=torch.contiguous_format)
