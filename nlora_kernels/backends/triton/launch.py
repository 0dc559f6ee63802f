"""Launches: what they are prepared from, how they are made again, and what they need to know of the device.

A kernel is launched by `run`, or by a `Launch`, which is prepared once for operands of one layout and then costs the
host little more than Triton's own launcher. What prepares launches is a plan: a function of layouts and options alone,
marked `planned`, whose results are remembered. No plan holds a tensor or an address.
"""

import contextlib
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.backends import driver as backend_driver
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ..base import Dropout
from . import device
from .tiles import Matrix, Product, Stack, Vector

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# How many results of each plan are remembered: those of the layers of a model at the numbers of rows that it meets.
PLANS = 2048
# Streams whose counters are kept.
STREAMS = 64
# Zeros of a device for all that CUDA graphs capture, 2 MiB: some thousands of launches.
PRIVATE = 1 << 19


class Layout(NamedTuple):
    """All that a launch depends on of an operand. `aligned`: its address is a multiple of 16."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool


def layout(t: Tensor | None) -> tuple | None:
    """The fields of a `Layout`."""
    # NOTE: a plain tuple, which is made and compared at every call.
    return None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0)


_PLANNED = []


def planned(plan):
    """Remembers what a plan returned for its arguments."""
    remembered = functools.lru_cache(PLANS)(plan)
    _PLANNED.append(remembered)
    return remembered


def forget_plans() -> None:
    """To be called where the rule that chose tiles, or the device, is another from now on."""
    for plan in _PLANNED:
        plan.cache_clear()


class Launch:
    """A kernel and its grid with all arguments that follow from the layouts of its operands.

    Args:
        meta: what the kernel is compiled for, its argument META.
        layouts: of those operands that are passed with their strides, or by descriptors; of others the address is.
            A list where a kernel takes several tensors as one argument.
        blocks: the blocks of those that are read by descriptors, likewise.
        arguments: what is the same at every call.
    """

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        *,
        warps: int,
        stages: int = 1,
        meta: tuple | None = None,
        layouts: dict[str, Layout | None | list] | None = None,
        blocks: dict[str, tuple[int, ...] | None | list] | None = None,
        **arguments,
    ):
        self.kernel, self.grid, self.warps, self.stages, self.meta = kernel, grid, warps, stages, meta
        self.strides = {
            name: [one and one.strides for one in operand] if type(operand) is list else operand.strides
            for name, operand in (layouts or {}).items()
            if operand
        }
        self.blocks, self.arguments = blocks or {}, arguments
        self._again, self._operands, self._plain = None, {}, {}

    def __call__(self, on: Tensor, **operands) -> None:
        """Launches on the device of a tensor and on its current stream."""
        index = on.get_device()
        if index >= 0 and index != torch.cuda.current_device():
            with torch.cuda.device(index):
                return self._launch(on, operands)
        self._launch(on, operands)

    def _launch(self, on: Tensor, operands: dict) -> None:
        if self._again is None:
            return self._first(on, operands)
        arguments = self._plain.copy()
        for name, value in operands.items():
            if isinstance(value, Tensor):
                value = again(value, self._operands.get(name))
            elif type(value) is tuple:
                value = tuple(map(again, value, self._operands.get(name) or repeat(None)))
            arguments[name] = value
        self._again(*arguments.values())

    def _first(self, on: Tensor, operands: dict) -> None:
        """By Triton's own way, which compiles the kernel where it has not been, and looks at all arguments."""
        made = {}
        for name, value in operands.items():
            strides, block = self.strides.get(name), self.blocks.get(name)
            if type(value) is tuple:
                made[name] = tuple(map(first, value, strides or repeat(None), block or repeat(None)))
            else:
                made[name] = first(value, strides, block)
        names = [name for name in self.kernel.arg_names if name != "META"]
        arguments = dict.fromkeys(names) | self.arguments | made
        compiled = run(self.kernel, self.grid, on, warps=self.warps, stages=self.stages, meta=self.meta, **arguments)
        if compiled is not None:
            self._operands = {
                name: [*map(described_by, value, self.strides.get(name) or repeat(None))]
                if type(value) is tuple and type(operands[name]) is tuple
                else described_by(value, self.strides.get(name))
                for name, value in made.items()
            }
            # In the order in which the kernel takes them, and with all of its constants.
            self._plain = dict.fromkeys(self.kernel.arg_names) | self.arguments
            self._again = compiled[(*self.grid, 1, 1)[:3]]


def first(value, strides: tuple[int, ...] | None, block: tuple[int, ...] | None):
    """An operand as a kernel takes it the first time."""
    if value is None or not (strides or block):
        return value
    return TensorDescriptor.from_tensor(value, list(block)) if block else strided(value)


def described_by(made, strides: tuple[int, ...] | None) -> dict | tuple[int, ...] | None:
    """What of an operand is the same the next time."""
    return vars(made) | {"base": None} if type(made) is TensorDescriptor else strides


def again(value, how):
    """An operand as the kernel takes it from then on, by address."""
    if value is None or how is None:
        return value if value is None else value.data_ptr()
    if type(how) is tuple:
        return (value.data_ptr(), *how)
    descriptor = object.__new__(TensorDescriptor)
    descriptor.__dict__.update(how, base=value)
    return descriptor


def strided(t: Tensor) -> Matrix | Vector | Stack:
    """A tensor as a kernel takes it that reads it in any strides."""
    return {1: Vector, 2: Matrix, 3: Stack}[t.ndim](t, *t.stride())


def run(
    kernel, grid: tuple[int, ...], on: Tensor, *, warps: int, stages: int = 1, meta: tuple | None = None, **arguments
):
    """Launches a kernel on the device of a tensor and on its current stream; what was compiled, if anything was.

    RuntimeError for the first launch of a kernel in the capture of a CUDA graph, which must not load code.
    """
    given = arguments | options(warps, stages, meta)
    with torch.cuda.device_of(on):
        # NOTE: asked for before Triton tries: of a kernel whose code it could not load it keeps what never runs.
        if capturing(on) and kernel.warmup(grid=grid, **given).module is None:
            raise RuntimeError(
                "a CUDA graph cannot capture the first launch of a kernel: make the call once, at this size, before it"
            )
        return kernel[grid](**given)


def options(warps: int, stages: int, meta: tuple | None) -> dict:
    """How a kernel is compiled, and what for."""
    chosen = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if torch.version.hip is None:
        # NOTE: unbounded, ptxas spills a few registers wherever that makes room for one more program.
        chosen["maxnreg"] = min(255, 65_536 // (32 * warps))
    if meta is not None:
        chosen["META"] = meta if device.interpreted() else constant(meta).value
    return chosen


def constant(value) -> tl.constexpr:
    """A constant whose members are constants."""
    # NOTE: Triton 3.6 takes the members of a constant tuple for values of Python, which not all of its language takes.
    return tl.constexpr(type(value)(*map(constant, value)) if isinstance(value, tuple) else value)


def capturing(on: Tensor) -> bool:
    """Whether a CUDA graph is being captured on the current stream of a tensor's device."""
    if not on.is_cuda:
        return False
    with torch.cuda.device_of(on):
        return torch.cuda.is_current_stream_capturing()


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


def table(rows: list[list[int]], on: Tensor) -> Tensor:
    """What a kernel reads of each of its tensors, int64, on the device of a tensor."""
    return to_device(torch.tensor(rows, dtype=torch.int64), on)


_COUNTERS: dict[tuple[int, int], Tensor] = {}


def counters(on: Tensor, count: int) -> Tensor:
    """`count` int32 zeros at least, for a launch on the current stream that leaves them zero.

    Launches on one stream follow one another, so they share them. A CUDA graph is replayed on any stream: what it
    captures has zeros of its own, for good, of those that were made before; were they made in the graph, every replay
    would fill them.
    """
    index = on.get_device()
    if capturing(on):
        taken = _PRIVATE[index].take(count) if index in _PRIVATE else None
        return torch.zeros(count, dtype=torch.int32, device=on.device) if taken is None else taken
    if on.is_cuda and index not in _PRIVATE:
        _PRIVATE[index] = _Private(_outlasting(PRIVATE, on, ready=True))
    key = (index, driver.active.get_current_stream(index) if on.is_cuda else 0)
    kept = _COUNTERS.get(key)
    if kept is None or kept.numel() < count:
        kept = _COUNTERS[key] = _outlasting(max(1024, 2 * count), on)
        # NOTE: what other threads do meanwhile does not disturb list(). Memory of a stream is used again in its order.
        for oldest in list(_COUNTERS)[:-STREAMS]:
            _COUNTERS.pop(oldest, None)
    return kept


class _Private:
    """Zeros that are given away in parts."""

    def __init__(self, zeros: Tensor):
        self.zeros, self.left, self.lock = zeros, len(zeros), threading.Lock()

    def take(self, count: int) -> Tensor | None:
        # Kernels are compiled for addresses that are multiples of 16.
        count += -count % 4
        with self.lock:
            if count > self.left:
                return None
            self.left -= count
            return self.zeros[self.left : self.left + count]


_PRIVATE: dict[int, _Private] = {}


def _outlasting(count: int, on: Tensor, ready: bool = False) -> Tensor:
    """Zeros that belong to no memory pool: that of a CUDA graph that is being warmed up must not outlast its step.
    `ready`: on every stream."""
    stream = torch.cuda.current_stream(on.device) if on.is_cuda else None

    def zeros():
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            made = torch.zeros(count, dtype=torch.int32, device=on.device)
        if stream and ready:
            stream.synchronize()
        return made

    # NOTE: a pool takes what its own thread allocates.
    with ThreadPoolExecutor(1) as another:
        return another.submit(zeros).result()


def described(operand: Layout, dtype: torch.dtype, on: device.Device) -> bool:
    """Whether an operand is read by descriptors of its tiles: the device copies them by itself.

    It must be of the dtype of the product: what is cast passes through registers.
    """
    return on.capability >= 90 and operand.dtype == dtype and aligned(operand)


@functools.cache
def nests_descriptors() -> bool:
    """Whether Triton launches a kernel that takes several tensors as one argument with descriptors of them.

    The launcher of 3.6 looks for descriptors among the arguments alone; those that look inside of them have this
    function for it.
    """
    return device.interpreted() or hasattr(backend_driver, "expand_signature")


def described_blocks(layouts: dict, blocks: dict, dtype: torch.dtype, on: device.Device) -> dict:
    """The blocks, by the operands' names, of those that a descriptor describes; of a list of operands a list."""

    def block_of(operand: Layout | None | list, block: tuple[int, ...]):
        if type(operand) is list:
            return [block_of(one, block) for one in operand]
        return block if operand and described(operand, dtype, on) else None

    return {name: block_of(layouts[name], block) for name, block in blocks.items()}


def aligned(*operands: Layout) -> bool:
    """Whether a descriptor (cuTensorMapEncodeTiled) can describe matrices or stacks of them: rows are contiguous, start
    at multiples of 16 bytes and do not overlap, as those of an expanded or unfolded tensor do."""
    return all(
        o.aligned
        and 0 not in o.shape
        and o.strides[-1] == 1
        and all(o.strides[i - 1] >= o.strides[i] * o.shape[i] for i in range(1, len(o.shape)))
        and all(stride * o.dtype.itemsize % 16 == 0 for stride in o.strides[:-1])
        and max(o.shape) <= 2**32
        and o.strides[0] * o.dtype.itemsize < 2**40
        for o in operands
    )


def tf32(dtype: torch.dtype) -> bool:
    """Whether products of a dtype may be computed in TF32."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def precision(dtype: torch.dtype, tf32: bool) -> str:
    # NOTE: Triton's own default for fp32 is TF32.
    return "tf32" if dtype == torch.float32 and tf32 else "ieee"


def product_of(tile, K: int, dtype: torch.dtype, tf32: bool, **how) -> Product:
    """A product over K by the tiles of a plan. `how`: its operands, where they are not as they are multiplied."""
    of_operands = {"A_TRANSPOSED": False, "B_TRANSPOSED": False, "DROPS": "", "CODES": None} | how
    blocks = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "CHECK_K": K % tile.k != 0}
    return Product(**blocks, **of_operands, DTYPE=DTYPES[dtype], PRECISION=precision(dtype, tf32))


def mask(dropout: Dropout | None) -> dict:
    """The arguments of a kernel that say what is dropped."""
    if dropout is None:
        return {"seed": None, "threshold": 0, "scale": 1.0}
    return {"seed": dropout.seed, "threshold": dropout.threshold, "scale": dropout.scale}
