"""What every launch needs to know: the device, the precision of fp32, and how an operand is read."""

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import tuning
from ..dropout import Dropout
from . import interpreted

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# What the interpreter takes the CPU for.
INTERPRETED = tuning.Device("interpreter", 80, 4, 232_448)


def run(kernel, grid: tuple[int, ...], on: Tensor, *, warps: int, stages: int = 1, **arguments) -> None:
    """Launches a kernel on the device of a tensor and on its current stream."""
    with torch.cuda.device_of(on):
        kernel[grid](**arguments, **options(warps, stages))


def options(warps: int, stages: int) -> dict:
    """How a kernel is compiled."""
    chosen = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if torch.version.hip is None:
        # NOTE: unbounded, ptxas spills a few registers wherever that makes room for one more program.
        chosen["maxnreg"] = min(255, 65_536 // (32 * warps))
    return chosen


def capturing(on: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream of a tensor's device."""
    return on.is_cuda and torch.cuda.is_current_stream_capturing()


def to_device(table: Tensor, on: Tensor) -> Tensor:
    """A table that was made on the host, on the device of a tensor, without waiting for the device.

    RuntimeError in the capture of a CUDA graph: each replay would read the host's memory again, which is gone by then.
    """
    if capturing(on):
        raise RuntimeError(
            "a CUDA graph cannot capture this call, which copies addresses of tensors from the host: "
            "make it outside of the capture"
        )
    return table.to(on.device, non_blocking=True)


def source(matrix: Tensor, block: tuple[int, int], dtype: torch.dtype, device: tuning.Device):
    """The matrix, or the descriptor of its tiles where the device copies them by itself and the matrix allows it.

    It must be of the dtype of the product: what is cast passes through registers.
    """
    if device.capability < 90 or matrix.dtype != dtype or not aligned(matrix):
        return matrix
    return TensorDescriptor.from_tensor(matrix, list(block))


def aligned(*matrices: Tensor) -> bool:
    """Whether a descriptor (cuTensorMapEncodeTiled) can describe the matrices: their rows are contiguous, start at
    multiples of 16 bytes and do not overlap, as the rows of an expanded or unfolded tensor do."""
    return all(
        m.numel() > 0
        and m.stride(1) == 1
        and m.stride(0) >= m.shape[1]
        and m.stride(0) * m.element_size() % 16 == 0
        and m.data_ptr() % 16 == 0
        and max(m.shape) <= 2**32
        and m.stride(0) * m.element_size() < 2**40
        for m in matrices
    )


def target(x: Tensor) -> tuning.Device:
    return INTERPRETED if interpreted() else tuning.device_of(x.device.index)


def tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype) -> str:
    # NOTE: Triton's own default for fp32 is TF32.
    return "tf32" if dtype == torch.float32 and tf32() else "ieee"


def mask(dropout: Dropout | None) -> dict:
    """The arguments of a kernel that say what is dropped."""
    if dropout is None:
        return {"seed": None, "threshold": 0, "scale": 1.0}
    return {"seed": dropout.seed, "threshold": dropout.threshold, "scale": dropout.scale}
