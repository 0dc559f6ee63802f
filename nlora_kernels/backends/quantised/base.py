"""What a weight in few bits is to an operation, and the class of those that are codes and scales."""

import contextlib
import copy
import json
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..base import DTYPES, short

# Values of a tile that stays in a second- or third-level cache while it is multiplied with.
_TILE = 1 << 21
# Tiles that a weight has at least, unless they would be too narrow to multiply well: none is a copy of all of it.
_TILES = 4

ALL = slice(None)


class Unreadable(ValueError):
    """What belongs to a quantised weight is missing or does not fit it."""


class Quantised:
    """W (out, in), frozen and in few bits; any part of it can be had in `dtype`.

    It stands for a tensor where an operation takes a weight. `to` changes the dtype in which it is decoded and copies
    nothing. A format implements `decode`, `tensors` and `layout`.
    """

    shape: torch.Size
    dtype: torch.dtype
    # Nothing here can be trained.
    requires_grad = False

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept of it, for backward too."""
        raise NotImplementedError

    def layout(self) -> tuple:
        """Everything else that `from_layout` needs, as values that JSON keeps."""
        raise NotImplementedError

    @classmethod
    def from_layout(cls, layout: list, tensors: list[Tensor], dtype: torch.dtype) -> "Quantised":
        """The weight that said `layout` and `tensors`."""
        raise NotImplementedError

    def decode(self, rows: slice = ALL, cols: slice = ALL, out: Tensor | None = None) -> Tensor:
        """W[rows, cols] in `dtype`, each value rounded once; in `out` where it is given, contiguous and as large."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def is_cpu(self) -> bool:
        return self.tensors[0].is_cpu

    def dim(self) -> int:
        return 2

    def to(self, dtype: torch.dtype) -> "Quantised":
        other = copy.copy(self)
        other.dtype = dtype
        return other

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Some rows (dim 0) or columns (dim 1), of which each is decoded by itself."""
        return torch.cat([self._lines(dim, slice(i, i + 1)) for i in index.tolist()], dim)

    def split(self, size: int, dim: int = 0) -> Iterator[Tensor]:
        """All rows (dim 0 or -2) or columns (dim 1 or -1), `size` at a time."""
        for first in range(0, self.shape[dim], size):
            yield self._lines(dim % 2, slice(first, first + size))

    def _lines(self, dim: int, at: slice, out: Tensor | None = None) -> Tensor:
        """Some rows (dim 0) or columns (dim 1), decoded."""
        return self.decode(at, out=out) if dim == 0 else self.decode(cols=at, out=out)

    def composed(self) -> Tensor:
        """W as PyTorch's own operations make it, for what records them."""
        return self.decode()

    def tiles(self, dim: int) -> Iterator[tuple[slice, Tensor]]:
        """W as (place, tile) of some rows (dim 0) or columns (dim 1) each, a tile being valid until the next."""
        size, other = self.shape[dim], self.shape[1 - dim]
        fitting = min(_TILE // max(1, other), size // _TILES)
        step = min(size, max(64, fitting // 64 * 64))
        memory = torch.empty(step * other, dtype=self.dtype, device=self.device)
        for first in range(0, size, step):
            at = slice(first, min(first + step, size))
            count = at.stop - first
            tile = memory[: count * other].view((count, other) if dim == 0 else (other, count))
            yield at, self._lines(dim, at, tile)

    def description(self) -> str:
        """Of which, with `tensors`, `restored` makes it again: what an operator's schema takes."""
        return json.dumps([type(self).__name__, short(self.dtype), *self.layout()])


def restored(description: str, tensors: list[Tensor]) -> Quantised:
    """The weight that gave this description and these tensors."""
    name, dtype, *layout = json.loads(description)
    kind = next(kind for kind in (Coded, Opaque) if kind.__name__ == name)
    return kind.from_layout(layout, tensors, getattr(torch, dtype))


_shared: dict[tuple, Tensor] = {}


def shared_memory(weight: Quantised) -> Tensor:
    """Room for a weight on a GPU that every layer decodes to, one after the other on a stream."""
    size = weight.shape.numel()
    if torch.cuda.is_current_stream_capturing():
        # A graph keeps what it reads.
        return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    key = weight.device, weight.dtype, torch.cuda.current_stream(weight.device).cuda_stream
    if key not in _shared or _shared[key].numel() < size:
        # What was made in inference mode cannot be written to outside of it.
        with torch.inference_mode(False):
            _shared[key] = torch.empty(size, dtype=weight.dtype, device=weight.device)
    return _shared[key][:size].view(weight.shape)


class Nested(NamedTuple):
    """Scales that are codes themselves: values[code]·scales[place / block] + offset."""

    # 256 values.
    values: Tensor
    scales: Tensor
    # One value.
    offset: Tensor
    block: int


class Coded(Quantised):
    """W[i, j] = values[code]·scale, in fp32, rounded to the dtype it is decoded to.

    Args:
        codes: uint8, contiguous, by `kind`
            "nibbles"      two codes a byte, the first in the high half, rows in sequence without a gap
            "interleaved"  (out / 32, in / 2) times 32 rows of two codes each: in byte i those of row i // 2, and in its
                           high half those of row 16 + i // 2 (bitsandbytes on CPUs with avx512_bf16)
            "bytes"        one code a byte
            "int8"         one value a byte, as int8, without `values`
        values: fp32, of all 16 or 256 codes.
        scales: fp32, bf16 or fp16, one for `block` codes; or, with `nested`, uint8.
        strides: (distance of the scales of two rows, of two blocks of a row), for which `block` divides a row; None
            where the codes of all rows are cut into blocks in sequence.

    Raises Unreadable, a ValueError in which each is named, where they do not fit together.
    """

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        codes: Tensor,
        values: Tensor | None,
        scales: Tensor,
        block: int,
        strides: tuple[int, int] | None = None,
        nested: Nested | None = None,
    ):
        self.kind, self.shape, self.dtype, self.block, self.strides = kind, torch.Size(shape), dtype, block, strides
        self.codes, self.values, self.scales, self.nested = codes, values, scales, nested
        self._check()

    @property
    def tensors(self) -> list[Tensor]:
        found = [self.codes, self.scales]
        if self.values is not None:
            found.append(self.values)
        return found if self.nested is None else [*found, *self.nested[:3]]

    def layout(self) -> tuple:
        return self.kind, tuple(self.shape), self.block, self.strides, self.nested and self.nested.block

    @classmethod
    def from_layout(cls, layout, tensors, dtype) -> "Coded":
        kind, shape, block, strides, nested_block = layout
        codes, scales, *others = tensors
        values = None if kind == "int8" else others.pop(0)
        nested = Nested(*others, nested_block) if nested_block else None
        return cls(kind, shape, dtype, codes, values, scales, block, strides, nested)

    def _check(self) -> None:
        (N, K), count = self.shape, self.shape.numel()
        two = self.kind in ("nibbles", "interleaved")
        _check(
            "codes", self.codes, -(-count // 2) if two else count, (torch.int8 if self.kind == "int8" else torch.uint8,)
        )
        if self.kind != "int8":
            _check("values of the codes", self.values, 16 if two else 256, (torch.float32,))
        if self.block < 1:
            raise Unreadable(f"the block size must be at least 1, got {self.block}")
        blocks = -(-count // self.block) if self.strides is None else N * -(-K // self.block)
        _check("scales", self.scales, blocks, (torch.uint8,) if self.nested else DTYPES)
        if self.nested:
            if self.nested.block < 1:
                raise Unreadable(f"the block size of the scales must be at least 1, got {self.nested.block}")
            _check("values of the scales", self.nested.values, 256, (torch.float32,))
            _check("scales of the scales", self.nested.scales, -(-blocks // self.nested.block), (torch.float32,))
            _check("offset of the scales", self.nested.offset, 1, (torch.float32,))
        for t in self.tensors:
            if t.device != self.codes.device:
                raise Unreadable(f"what belongs to the weight must be on {self.codes.device}, got {t.device}")

    def native(self):
        """What the C++ kernels read, for one call: the addresses are those of now.

        Raises ValueError where a tensor has no memory.
        """
        nested, scales = self.nested, self.scales
        addresses = [t.data_ptr() for t in self.tensors]
        # NOTE: what is sharded frees its storage between two uses, and fills another with the same values.
        if not all(addresses) and self.shape.numel():
            raise ValueError("weight has no memory: its storage was freed, or is held elsewhere")
        codes, scale_address, *others = addresses
        return native._C.CpuQuantised(
            self.kind,
            codes,
            *self.shape,
            0 if self.values is None else others.pop(0),
            scale_address,
            getattr(native._C, "float32" if nested else short(scales.dtype)),
            self.block,
            *(self.strides or (0, 0)),
            *(others if nested else (0, 0, 0)),
            nested.block if nested else 0,
        )

    def decode(self, rows=ALL, cols=ALL, out=None) -> Tensor:
        first_row, stop_row, _ = rows.indices(self.shape[0])
        first_col, stop_col, _ = cols.indices(self.shape[1])
        codes = None
        if self.is_cpu and native._C is not None and self.dtype in DTYPES:
            # Tensors of torch.func have no address.
            with contextlib.suppress(RuntimeError):
                codes = self.native()
        if codes is not None:
            if out is None:
                out = torch.empty(stop_row - first_row, stop_col - first_col, dtype=self.dtype)
            if out.numel():
                native._C.cpu_dequantise(codes, first_row, first_col, out, torch.get_num_threads())
            return out
        if out is None:
            out = torch.empty(stop_row - first_row, stop_col - first_col, dtype=self.dtype, device=self.device)
        # Some rows at a time, for the places of codes take eight bytes each.
        for first in range(first_row, stop_row, 64):
            last = min(first + 64, stop_row)
            out[first - first_row : last - first_row] = self._plain(first, last, first_col, stop_col)
        return out

    def composed(self) -> Tensor:
        return self._plain(0, self.shape[0], 0, self.shape[1]).to(self.dtype)

    def _plain(self, first_row: int, stop_row: int, first_col: int, stop_col: int) -> Tensor:
        """The same in fp32 by PyTorch's own operations, on any device."""
        K = self.shape[1]
        rows, cols = (
            torch.arange(first, stop, device=self.device)
            for first, stop in ((first_row, stop_row), (first_col, stop_col))
        )
        at = rows[:, None] * K + cols  # [rows, cols]
        codes = self.codes.flatten()
        if self.kind == "int8":
            values = codes[at].float()
        elif self.kind == "bytes":
            values = self.values[codes[at].long()]
        elif self.kind == "nibbles":
            pair = codes[at // 2]
            values = self.values[torch.where(at % 2 == 0, pair >> 4, pair & 15).long()]
        else:
            row, col = rows[:, None], cols
            pair = codes[((row // 32 * (K // 2) + col // 2) * 16 + row % 16) * 2 + col % 2]
            values = self.values[torch.where(row % 32 >= 16, pair >> 4, pair & 15).long()]
        if self.strides is None:
            place = at // self.block
        else:
            place = rows[:, None] * self.strides[0] + cols // self.block * self.strides[1]
        return values * self._scales()[place]

    def _scales(self) -> Tensor:
        scales = self.scales.reshape(-1)
        if self.nested is None:
            return scales.float()
        place = torch.arange(len(scales), device=self.device) // self.nested.block
        return self.nested.values[scales.long()] * self.nested.scales[place] + self.nested.offset


class Opaque(Quantised):
    """A tensor of which only its own `dequantize()` knows what its values are. Every tile costs all of them."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.weight, self.shape, self.dtype = weight, weight.shape, dtype

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight]

    def layout(self) -> tuple:
        return ()

    @classmethod
    def from_layout(cls, layout, tensors, dtype) -> "Opaque":
        return cls(*tensors, dtype)

    def decode(self, rows=ALL, cols=ALL, out=None) -> Tensor:
        with torch.no_grad():
            tile = self.weight.dequantize()[rows, cols].to(self.dtype)
        return tile if out is None else out.copy_(tile)

    def tiles(self, dim: int) -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, self.shape[dim]), self.decode()


def _check(name: str, t: Tensor | None, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(t, Tensor):
        raise Unreadable(f"the {name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in dtypes:
        raise Unreadable(f"the {name} must be of {' or '.join(map(short, dtypes))}, got {short(t.dtype)}")
    if t.numel() != size:
        raise Unreadable(f"there must be {size} {name}, got {t.numel()}")
    if not t.is_contiguous() and math.prod(t.shape) > 1:
        raise Unreadable(f"the {name} must be contiguous, got strides {t.stride()}")
