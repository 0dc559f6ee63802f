"""Inputs for one layer, and the error budget that every backend must keep. Shared by tests and benchmarks."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .backends.quantised import Coded
from .backends.quantised.base import Nested

TENSORS = ("x", "weight", "lora_A", "lora_B", "lora_N", "bias")


@dataclass
class Problem:
    """The arguments of one `lora_linear` call and the gradient that comes back to it."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    lora_N: Tensor | None
    bias: Tensor | None
    dy: Tensor
    scaling: float = 0.7

    def to(self, dtype: torch.dtype) -> "Problem":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "scaling"}
        return Problem(**{n: t if t is None else t.to(dtype) for n, t in tensors.items()}, scaling=self.scaling)


def problem(
    M: int,
    K: int,
    N: int,
    R: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    core: bool = True,
    bias: bool = True,
    strided: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Problem:
    """Random arguments whose base and adapter products are both of the size of 1.

    `strided` makes x every second row and column of a larger tensor, dy a transposed one, and weight a slice.
    """
    device = torch.device(device)
    # NOTE: made where they are used, for a CPU takes minutes for what a GPU does in no time.
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, cols: int, std: float, to: torch.dtype, strides: str = "") -> Tensor:
        shape = {"": (rows, cols), "sliced": (2 * rows, 2 * cols), "transposed": (cols, rows)}[strides]
        t = torch.randn(shape, generator=generator, device=device).mul_(std).to(to)
        return {"": t, "sliced": t[::2, ::2], "transposed": t.T}[strides]

    adapter_dtype = adapter_dtype or dtype
    return Problem(
        x=normal(M, K, 1, dtype, "sliced" if strided else ""),
        weight=normal(N, K, 1 / math.sqrt(K), dtype, "sliced" if strided else ""),
        lora_A=normal(R, K, 1 / math.sqrt(K), adapter_dtype),
        lora_B=normal(N, R, 1 / math.sqrt(R), adapter_dtype),
        lora_N=normal(R, R, 1 / math.sqrt(R), adapter_dtype) if core else None,
        bias=normal(1, N, 1, dtype)[0] if bias else None,
        dy=normal(M, N, 1, dtype, "transposed" if strided else ""),
    )


def four_bits(N: int, K: int, dtype: torch.dtype, *, nested: bool, device: str | torch.device = "cpu") -> Coded:
    """A weight (N, K) of random codes, two a byte, 64 to a scale, whose values are of the size of K^-1/2.

    `nested`: the scales are codes themselves, 256 to a scale of theirs.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(N + K)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, device=device)

    def codes(count: int) -> Tensor:
        return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator, device=device)

    blocks, inner = -(-N * K // 64), None
    scales = normal(blocks).abs() / math.sqrt(K)
    if nested:
        offset = torch.full((), 1 / math.sqrt(K), device=device)
        inner = Nested(normal(256), normal(-(-blocks // 256)).abs() / K, offset, 256)
        scales = codes(blocks)
    return Coded("nibbles", (N, K), dtype, codes(-(-N * K // 2)), normal(16), scales, 64, None, inner)


def plain_linear(x, weight, lora_A, lora_B, lora_N=None, bias=None, *, scaling=1.0) -> Tensor:
    """The operation in plain PyTorch, the adapter cast to x's dtype: what the error budget is measured against."""
    T = F.linear(x, lora_A.to(x.dtype))
    P = T if lora_N is None else F.linear(T, lora_N.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(P, lora_B.to(x.dtype))


def results(p: Problem, linear=plain_linear, **options) -> dict[str, Tensor]:
    """The output ("y") and every gradient ("dx", "dweight", "dlora_A", …) of `linear` on a problem."""
    tensors = {n: t for n in TENSORS if (t := getattr(p, n)) is not None}
    return outputs(functools.partial(linear, scaling=p.scaling, **options), tensors, p.dy)


def outputs(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], dy: Tensor, wrt: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """The output ("y") of `function(**tensors)` and its gradients ("d" + name) for `wrt`, by default all of them."""
    wrt = list(tensors) if wrt is None else wrt
    leaves = {n: t.detach().requires_grad_(n in wrt) for n, t in tensors.items()}
    y = function(**leaves)
    grads = torch.autograd.grad(y, [leaves[n] for n in wrt], dy, materialize_grads=True)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(wrt, grads, strict=True)}}


# By the number of bf16 values that stand for one of fp32, what a product of two may be off by, relative to it: of one,
# the roundings u = 2⁻⁸ of both, 2·u + u²; of two, v₁·w₁ and what is left of both, at most u² each.
ERRORS = {1: 2**-7 + 2**-16, 2: 3.1 * 2**-16}
# Neighbours of a small problem whose errors are looked at, and how many standard deviations a result may be off: a
# normal distribution exceeds six twice in 10⁹ draws, and a single rounding ends at √3.
_NEIGHBOURS, _DEVIATIONS = 32, 6.0
# The luck of roundings evens out over _MANY elements in a product of size _LARGE; smaller ones are cheap to repeat, of
# larger ones with few elements in a result a quarter as many must do.
_MANY, _LARGE = 64, 2**22


class Budget:
    """The error that a computation may have: max(2·e, 6·σ) + eps·terms, all of it from plain PyTorch in the same dtype.

    Errors are measured as the largest absolute one and as the Euclidean norm. e is that of plain PyTorch on this very
    problem. Of many roundings it is typical, and σ is left out; of few it is a matter of luck: one element of rank 1 is
    a sum of some roundings that now and then cancel, for one order of operations and not for another. So σ is the
    standard deviation of the error over neighbours of the problem: the same numbers moved at random by a few units of
    their last place, which draws the roundings anew and leaves everything else as it is. Their products are those of
    `AnyOrder`, because the order in which a library adds is as good as any. In the Euclidean norm the error has ν
    independent parts by Satterthwaite's approximation, ν = (tr C)² / tr(C²) for its covariance C, and the six falls to
    1 + 5/√ν, because the norm of many is close to its expectation. eps, that of the dtype of the result or of x where
    that is coarser, stands for the rounding of a sum: relative to the norms of its two terms (the base layer's and the
    adapter's), because they may cancel.

    Where fewer than three bf16 `pieces` stand for an operand of fp32, a product of two numbers may be off by ε times
    its magnitude (`ERRORS`). Everything here is a sum of such products, of the base layer's and of the adapter's chains
    of three; what the same computation makes of magnitudes bounds the sums, ε times that of the base and (1 + ε)³ - 1
    times that of the adapter is added to the budget.

    Args:
        plain: the computation in plain PyTorch, called with `tensors` by name, "x" among them.
        base: the same without the adapter's term.
        tensors, dy, wrt: as for `outputs`.
        pieces: bf16 values for one of fp32, at least.
    """

    def __init__(
        self, plain, base, tensors: dict[str, Tensor], dy: Tensor, wrt: Sequence[str] | None = None, pieces: int = 3
    ):
        wide = {name: t.double() for name, t in tensors.items()}
        self.dtype = tensors["x"].dtype
        self.exact = outputs(plain, wide, dy.double(), wrt)
        self.plain = outputs(plain, tensors, dy, wrt)
        self.bounds = {}
        without = outputs(base, wide, dy.double(), wrt)
        small = tensors["x"].numel() * dy.shape[-1] < _LARGE
        few = small or min(t.numel() for t in self.exact.values()) < _MANY
        count = _NEIGHBOURS if small else _NEIGHBOURS // 4
        errors = self._errors_of_neighbours(count, plain, tensors, dy, wrt) if few else {}
        for name, exact in self.exact.items():
            eps = max(torch.finfo(self.plain[name].dtype).eps, torch.finfo(self.dtype).eps)
            for norm in (math.inf, 2):
                terms = error_norm(exact, without[name], norm) + _norm(without[name], norm)
                error = 2 * error_norm(self.plain[name], exact, norm)
                if name in errors:
                    error = max(error, _largest_expected(errors[name], norm))
                self.bounds[name, norm] = error + eps * terms
        if pieces < 3:
            magnitudes = {name: t.abs() for name, t in wide.items()}
            of_all, of_base = (outputs(each, magnitudes, dy.double().abs(), wrt) for each in (plain, base))
            once, thrice = ERRORS[pieces], (1 + ERRORS[pieces]) ** 3 - 1
            for name, norm in self.bounds:
                error = once * of_base[name] + thrice * (of_all[name] - of_base[name]).abs()
                self.bounds[name, norm] += _norm(error, norm)

    def _errors_of_neighbours(self, count, plain, tensors, dy, wrt) -> dict[str, Tensor]:
        """The errors of every result, a row for each neighbour."""
        generator = torch.Generator(dy.device).manual_seed(0)
        width = 4 * torch.finfo(self.dtype).eps

        def moved(t: Tensor) -> Tensor:
            noise = torch.rand(t.shape, generator=generator, dtype=torch.double, device=t.device)
            return (t.double() * (1 + width * (2 * noise - 1))).to(t.dtype)

        errors: dict[str, list[Tensor]] = {name: [] for name in self.exact}
        for _ in range(count):
            near, d_near = {name: moved(t) for name, t in tensors.items()}, moved(dy)
            exact = outputs(plain, {name: t.double() for name, t in near.items()}, d_near.double(), wrt)
            with AnyOrder(generator):
                found = outputs(plain, near, d_near, wrt)
            for name, value in found.items():
                errors[name].append((value.double() - exact[name]).flatten())
        return {name: torch.stack(each) for name, each in errors.items()}

    def check(self, actual: dict[str, Tensor]) -> float:
        """Fails unless every result keeps the budget; returns the largest error relative to the exact result's norm."""
        largest = 0.0
        for (name, norm), (error, bound) in self.errors(actual).items():
            assert error <= bound, f"{name} is off by {error:.3g} in the {norm}-norm, the budget is {bound:.3g}"
            if norm == 2:
                largest = max(largest, error / (_norm(self.exact[name], 2) or 1.0))
        return largest

    def errors(self, actual: dict[str, Tensor]) -> dict[tuple[str, float], tuple[float, float]]:
        """{(result, norm): (error, bound)}. Fails where a result has not the shape and dtype that it must have."""
        found = {}
        for name, value in actual.items():
            exact, dtype = self.exact[name], self.plain[name].dtype
            assert value.shape == exact.shape, f"{name} has shape {tuple(value.shape)}"
            assert value.dtype == dtype, f"{name} has dtype {value.dtype}, expected {dtype}"
            for norm in (math.inf, 2):
                found[name, norm] = error_norm(value, exact, norm), self.bounds[name, norm]
        return found


class AnyOrder(TorchDispatchMode):
    """Within it, sums over n terms t have the error of adding them in fp32 one after the other, in a random order.

    Each of the n partial sums is rounded, which has a variance of at most (u·|partial sum|)²/3 with u = eps/2. Over all
    orders the squares of the partial sums add up to n·(Σt² + 2·(Σt)²)/6 on average. An error of that variance is
    added to the sum.
    """

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        sum_of = _SUMS.get(operator)
        if sum_of is None or args[0].dtype is torch.float64:
            return result
        total, squares, count = sum_of(result, *args, **(kwargs or {}))
        variance = count * (squares + 2 * total.square()) * (torch.finfo(torch.float32).eps / 2) ** 2 / 18
        noise = torch.randn(result.shape, generator=self.generator, dtype=torch.double, device=result.device)
        return (result + variance.sqrt() * noise).to(result.dtype)


def _product(result: Tensor, a: Tensor, b: Tensor) -> tuple:
    return result.float(), a.float().square() @ b.float().square(), a.shape[-1]


def _added_product(result: Tensor, start: Tensor, a: Tensor, b: Tensor, beta: float = 1.0, alpha: float = 1.0) -> tuple:
    total, squares, count = _product(result, a, b)
    return total - beta * start if beta else total, alpha**2 * squares, count


def _reduction(result: Tensor, t: Tensor, dim: list[int] | None, keepdim: bool = False, dtype=None) -> tuple:
    dim = dim or list(range(t.dim()))
    return result.float(), t.float().square().sum(dim, keepdim), math.prod(t.shape[d] for d in dim)


# The sums of a linear layer and its gradients: (Σt, Σt², n) of a result and the arguments that made it.
_SUMS = {
    torch.ops.aten.mm.default: _product,
    torch.ops.aten.bmm.default: _product,
    torch.ops.aten.addmm.default: _added_product,
    torch.ops.aten.sum.dim_IntList: _reduction,
}


def assert_within_budget(actual: dict[str, Tensor], p: Problem, pieces: int = 3) -> None:
    """Fails unless the results of a problem, all of them, keep its `Budget`."""
    tensors = {n: t for n in TENSORS if (t := getattr(p, n)) is not None}
    plain, base = (functools.partial(plain_linear, scaling=scaling) for scaling in (p.scaling, 0.0))
    budget = Budget(plain, base, tensors, p.dy, pieces=pieces)
    assert actual.keys() == budget.exact.keys(), f"results are {list(actual)}, expected {list(budget.exact)}"
    budget.check(actual)


def _largest_expected(errors: Tensor, norm: float) -> float:
    """What the norm of an error stays below, of which `errors` holds n draws (n, size)."""
    count, size = errors.shape
    if not size:
        return 0.0
    if norm == math.inf:
        return _DEVIATIONS * _norm(errors.square().mean(0).sqrt(), norm)
    # Products of different draws, whose mean square is tr(C²).
    products = errors @ errors.T
    trace = products.diagonal().mean().item()
    crossed = (products.square().sum() - products.diagonal().square().sum()).item() / (count * (count - 1))
    independent = min(size, max(1.0, trace**2 / crossed)) if crossed else size
    return (1 + (_DEVIATIONS - 1) / math.sqrt(independent)) * math.sqrt(trace)


def error_norm(value: Tensor, exact: Tensor, norm: float = 2) -> float:
    return _norm(value.double() - exact, norm)


def _norm(t: Tensor, norm: float) -> float:
    return torch.linalg.vector_norm(t.flatten(), norm).item() if t.numel() else 0.0
