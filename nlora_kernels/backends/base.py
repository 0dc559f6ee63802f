"""What travels between the operations and a backend, and what a backend is."""

import functools
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The types of PyTorch's own tensors. Of any other, only PyTorch's operations know where and what its values are.
PLAIN = (Tensor, torch.nn.Parameter)


def plain(t: Tensor) -> bool:
    """Whether a kernel may read a tensor where it lies: PyTorch's own, strided, without a sign kept as a flag.

    That its storage is there is seen when its address is asked for.
    """
    return type(t) in PLAIN and t.layout is torch.strided and not t.is_neg()


def short(dtype: torch.dtype) -> str:
    """Its name without "torch."."""
    return str(dtype).removeprefix("torch.")


# The dtypes that our kernels read.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unreadable(tensors: dict[str, Any]) -> str | None:
    """Why our kernels cannot read tensors: the name and dtype of the first that has another."""
    for name, t in tensors.items():
        if t is not None and t.dtype not in DTYPES:
            return f"{name} must be float32, bfloat16 or float16, got {short(t.dtype)}"
    return None


def check_core(backend: str, lora_u: Tensor, reason: str | None) -> None:
    """ValueError where kernels of a GPU cannot take LoRA²'s factors: for a reason of their own, or for the dtype."""
    if reason := reason or unreadable({"lora_u": lora_u}):
        raise ValueError(f"backend {backend!r} cannot take this call: {reason}")


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def misplaced(name: str, t: Tensor) -> str | None:
    """Why a kernel for GPUs cannot run on the device of a tensor."""
    if t.device.type != "cuda":
        return f"{name} must be on a GPU, got {t.device}"
    if torch.version.hip is None and capability(t.device) < (8, 0):
        return f"{t.device} must have compute capability 8.0 or newer"
    return None


class Dropout(NamedTuple):
    """drop(x) = x ⊙ kept / (1 − p) on the adapter's branch, from a mask that is computed wherever it is needed.

    No mask is stored. Whether an element is kept follows from the seed, its row and its column alone, so forward and
    backward, and every backend, see the same mask:

        mix(h):     h ^= h >> 16;  h *= 0x85ebca6b;  h ^= h >> 13;  h *= 0xc2b2ae35;  h ^= h >> 16
        a = mix(low ^ mix(high ^ 1)),  b = mix(high ^ mix(low ^ 2))       of the seed's halves low and high
        kept[row, col] = mix(mix(row ^ a) ^ mix(col ^ b)) >> 1  ≥  round(2³¹·p)

    in 32-bit unsigned arithmetic; the multipliers are those of MurmurHash3. mix is a bijection, so all rows of a mask
    have different keys, and all columns.
    """

    # The probability with which an element is zeroed.
    p: float
    # An int64 scalar tensor on x's device.
    seed: Tensor

    @property
    def scale(self) -> float:
        """What is kept is multiplied by it."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    @property
    def threshold(self) -> int:
        """An element is kept if its 31 bits are not below."""
        return min(round(self.p * 2**31), 2**31 - 1)

    def kept(self, rows: int, cols: int) -> Tensor:
        """Which elements of a (rows, cols) matrix are kept."""
        low, high = self.seed & _WORD, self.seed >> 32 & _WORD
        row, col = (torch.arange(n, device=self.seed.device) for n in (rows, cols))
        row, col = _mix(row ^ _mix(low ^ _mix(high ^ 1))), _mix(col ^ _mix(high ^ _mix(low ^ 2)))
        return _mix(row[:, None] ^ col) >> 1 >= self.threshold

    def __call__(self, x: Tensor) -> Tensor:
        """drop(x) for x (M, K)."""
        return torch.where(self.kept(*x.shape), x * self.scale, 0)


# NOTE: int64 holds the words, for PyTorch does not compute with unsigned ones; the low half of a product is the same.
_WORD = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    h = (h ^ h >> 16) * 0x85EBCA6B & _WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 & _WORD
    return h ^ h >> 16


class Needs(NamedTuple):
    """Which of the six inputs want a gradient."""

    x: bool
    weight: bool
    lora_A: bool
    lora_B: bool
    lora_N: bool
    bias: bool


class Grads(NamedTuple):
    """One gradient per input, each in its tensor's shape and dtype; None where not asked for."""

    x: Tensor | None = None
    weight: Tensor | None = None
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    # Of a call with factors (du, dE, dU).
    lora_N: Tensor | tuple[Tensor, Tensor, Tensor] | None = None
    bias: Tensor | None = None


class Factors(NamedTuple):
    """The core of LoRA², U·diag(E ⊙ mask)·u, as what it is made of."""

    lora_u: Tensor
    lora_E: Tensor
    lora_U: Tensor
    mask: Tensor | None


class Call(NamedTuple):
    """One call of `lora_linear`, every argument checked: x (M, K) in any strides, weight (N, K) and bias (N,) in x's
    dtype, lora_A (R, K), lora_N (R, R) or None and lora_B (N, R) in any floating dtype. weight is a tensor, or a
    `quantised.Quantised` for a backend that `reads_quantised`.

    x is None in a backward that has been promised not to need it, and so is the bias in every backward. On its way to a
    backend x is (..., K) until `ops.autograd` makes it flat.
    """

    x: Tensor | None
    weight: Tensor
    # Both None in a group, of a member without an adapter.
    lora_A: Tensor
    lora_B: Tensor
    # Factors where the backend `makes_core`.
    lora_N: Tensor | Factors | None = None
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout: Dropout | None = None

    @property
    def adapter(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and N in the dtype of the product; fp32 adapters on a bf16 base are the normal case."""
        dtype, N = self.weight.dtype, self.lora_N
        return self.lora_A.to(dtype), self.lora_B.to(dtype), None if N is None else N.to(dtype)

    def drop(self, t: Tensor) -> Tensor:
        """What the adapter reads of x, and of dx what comes from it."""
        return self.dropout(t) if self.dropout else t


def linear(call: Call) -> Tensor:
    """x·Wᵀ + bias of a call without an adapter."""
    return F.linear(call.x, call.weight, call.bias)


def linear_backward(call: Call, dy: Tensor, needs: Needs) -> Grads:
    """Its gradients."""
    return Grads(
        x=dy @ call.weight if needs.x else None,
        weight=dy.T @ call.x if needs.weight else None,
        bias=dy.sum(0) if needs.bias else None,
    )


class ExpertsCall(NamedTuple):
    """One call of `lora_grouped_linear`, every argument checked: a `Call` for each of E experts, whose matrices are
    stacked, weight (E, N, K) and bias (E, N), lora_A (E, R, K), lora_N (E, R, R) or None and lora_B (E, N, R).

    Expert e has the rows of x (M, K) from offsets[e - 1] to offsets[e]; rows past the last of offsets (E,) have none.
    """

    x: Tensor | None
    offsets: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    lora_N: Tensor | None = None
    bias: Tensor | None = None
    scaling: float = 1.0

    def expert(self, index: int, rows: slice = slice(0)) -> Call:
        """The call of one expert with some rows of x."""
        x, _, *stacks, scaling = self
        return Call(None if x is None else x[rows], *(t if t is None else t[index] for t in stacks), scaling)

    def experts(self) -> list[tuple[slice, Call]]:
        """The rows and the call of every expert."""
        # On the meta device there is nothing to read, and no shape depends on it.
        ends = [0] * len(self.offsets) if self.offsets.is_meta else self.offsets.tolist()
        rows = [slice(first, last) for first, last in pairwise([0, *ends])]
        return [(each, self.expert(index, each)) for index, each in enumerate(rows)]


def stacked(grads: Sequence[Grads], rows: int) -> Grads:
    """The gradients of a call of so many rows from those of its experts; rows without an expert have none."""
    dx, *others = zip(*grads, strict=True)
    return Grads(
        None if dx[0] is None else lengthened(torch.cat(dx), rows),
        *(None if each[0] is None else torch.stack(each) for each in others),
    )


def lengthened(t: Tensor, rows: int) -> Tensor:
    """t with zeros for the rows that it lacks."""
    return t if t.shape[0] == rows else torch.cat([t, t.new_zeros(rows - t.shape[0], t.shape[1])])


class Initialisation(NamedTuple):
    """Kernels of a backend for `init`; None for what PyTorch is to do."""

    # (A, N, B) of rows and columns of a weight.
    gather: Callable | None = None
    # The squared norms of a weight's rows and columns.
    squared_norms: Callable | None = None
    # W ← W − s·B·N·A in place, for weights of one shape.
    subtract_products: Callable | None = None
    # X with R·X = C for an upper triangle.
    solve_triangular: Callable | None = None


class Lora2Training(NamedTuple):
    """Kernels of a backend for `lora2`."""

    penalty: Callable
    penalty_backward: Callable
    # The averages of the rank allocator's step, and its masking; or both in one call.
    smooth: Callable | None = None
    prune: Callable | None = None
    allocate: Callable | None = None


class Backend:
    """A way to compute the operations: one instance per backend in `backends.TABLE`.

    It knows nothing of autograd, and is given what was checked. y (M, N) and T (M, R) are new contiguous tensors in x's
    dtype; T = drop(x)·Aᵀ means the same in every backend, so the backward of one may follow the forward of another.
    """

    name: str
    # Device types on which it is chosen without being named. Kernels of ours must have passed their tests on hardware
    # of that type; library calls are taken to be right wherever PyTorch is.
    verified_on: frozenset[str] = frozenset()
    # The dtypes of x for which `verify` proves its kernels on the user's own GPU; none for what needs no proof there.
    proved_for: tuple[torch.dtype, ...] = ()
    # Whether dropout costs it less than a dropped copy of x does.
    drops_inside = False
    # Whether it makes LoRA²'s core, and its gradients, inside forward and backward.
    makes_core = False

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine at all."""
        return None

    def unsupported(self, call: Call) -> str | None:
        """Why it cannot take a call, forward or backward: x may be None, of whose dtype and device weight is."""
        return None

    def reads_quantised(self, weight, rows: int) -> bool:
        """Whether it decodes a `quantised.Quantised` weight itself for so many rows; else that is done before, as a
        whole."""
        return False

    def describe(self, call: Call) -> str | None:
        """What it does with a call of such sizes, for people."""
        return None

    def forward(self, call: Call) -> tuple[Tensor, Tensor]:
        """(y, T)"""
        raise NotImplementedError

    def backward(self, call: Call, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        """x and T are there where `needs` makes them necessary."""
        raise NotImplementedError

    # Of calls that share x, of which one with neither lora_A nor lora_B has no adapter, and no T.

    def unsupported_group(self, calls: Sequence[Call]) -> str | None:
        """Why it cannot take them together."""
        reasons = (self.unsupported(call) for call in calls if call.lora_A is not None)
        return next(filter(None, reasons), None)

    def forward_group(self, calls: Sequence[Call]) -> list[tuple[Tensor, Tensor | None]]:
        """(y, T) of each."""
        return [(linear(call), None) if call.lora_A is None else self.forward(call) for call in calls]

    def backward_group(
        self, calls: Sequence[Call], dys: Sequence[Tensor], Ts: Sequence[Tensor | None], needs: Sequence[Needs]
    ) -> tuple[Tensor | None, list[Grads]]:
        """The gradient of x, and of each call the others. Whether x wants one is the same in all of `needs`."""
        dx, grads = None, []
        for call, dy, T, need in zip(calls, dys, Ts, needs, strict=True):
            of = linear_backward(call, dy, need) if call.lora_A is None else self.backward(call, dy, T, need)
            if of.x is not None:
                dx = of.x if dx is None else dx.add_(of.x)
            grads.append(of._replace(x=None))
        return dx, grads

    def forward_experts(self, call: ExpertsCall) -> tuple[Tensor, Tensor]:
        """(y, T) of all experts; by default one after another."""
        y, T = zip(*(self.forward(each) for _, each in call.experts()), strict=True)
        M = call.x.shape[0]
        return lengthened(torch.cat(y), M), lengthened(torch.cat(T), M)

    def backward_experts(self, call: ExpertsCall, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
        """x and T are there where `needs` makes them necessary."""
        experts = call.experts()
        grads = [self.backward(each, dy[rows], None if T is None else T[rows], needs) for rows, each in experts]
        return stacked(grads, dy.shape[0])

    def lora2_core(self, lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError

    def lora2_core_backward(
        self, d_core: Tensor, lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(du, dE, dU)"""
        raise NotImplementedError

    # What a backend may do beside, or leave to PyTorch.

    def decode(self, weight, out: Tensor | None = None) -> Tensor:
        """A `quantised.Quantised` weight as a whole, in `out` if it is given."""
        return weight.decode(out=out)

    def initialisation(self, weight: Tensor, r: int) -> Initialisation:
        """Those of its kernels that can take this weight."""
        return Initialisation()

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor) -> Callable[[], bool] | None:
        """C that adds left·right to weight in place and returns True, or does nothing and returns False where PyTorch
        is faster; None where it cannot."""
        return None

    def lora2_training(self, tensors: Sequence[Tensor], size: int = 1) -> Lora2Training | None:
        """Its kernels, if they can take adapters of these tensors with r and k up to `size`."""
        return None
