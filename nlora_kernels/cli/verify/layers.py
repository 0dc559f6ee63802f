"""A layer of every method, on random data: what is checked of a backend, and what it is checked against."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops, testing
from ...backends import Dropout
from .cases import EXPERTS, METHODS, Case, dtype_of

SCALING, P_DROPPED, SEED = 0.7, 0.3, 2**40 + 7


class Layer(NamedTuple):
    """One call of a method: tensors by name, which of them train, the gradient that comes back; and by whom."""

    tensors: dict[str, Tensor]
    trains: tuple[str, ...]
    dy: Tensor
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    # The base layer alone.
    base: Callable[..., Tensor]

    def results(self) -> dict[str, Tensor]:
        return testing.outputs(self.ours, self.tensors, self.dy, self.trains)

    def budget(self) -> testing.Budget:
        return testing.Budget(self.plain, self.base, self.tensors, self.dy, self.trains)


def layer_of(case: Case, backend: str, dtype: str, device: torch.device, seed: int = 0) -> Layer:
    """The call of a case, with data of a seed; the same in the parent where the device is the CPU."""
    method, (M, K, N, R) = case.detail, case.shape
    of_adapter = dtype_of(case.adapter)
    p = testing.problem(
        M,
        K,
        N,
        R,
        dtype=dtype_of(dtype),
        adapter_dtype=of_adapter,
        core=method != "lora",
        bias=method in ("slora", "dropout"),
        device=device,
        seed=seed,
    )
    tensors = {name: t for name in testing.TENSORS if (t := getattr(p, name)) is not None}
    if method in ("nlora", "inttune"):
        # As `init.nystrom` takes them from W.
        parts = {"lora_A": p.weight[:R], "lora_N": p.weight[:R, :R], "lora_B": p.weight[:, :R]}
        tensors |= {name: part.to(of_adapter).contiguous() for name, part in parts.items()}
    tensors, dy, ours, plain = FORMS.get(method, _linear)(tensors, p.dy)
    return Layer(
        tensors,
        METHODS[method],
        dy,
        functools.partial(ours, scaling=SCALING, backend=backend),
        functools.partial(plain, scaling=SCALING),
        functools.partial(plain, scaling=0.0),
    )


def mask(t: Tensor, r: int) -> Tensor:
    """Which of r values LoRA² keeps: all but every third."""
    return torch.arange(r, device=t.device) % 3 != 1


def dropout(device: torch.device) -> Dropout:
    return Dropout(P_DROPPED, torch.tensor(SEED, device=device))


# The tensors of a layer, the gradient that comes back, and the operation by ours and in plain PyTorch.
Form = tuple[dict[str, Tensor], Tensor, Callable[..., Tensor], Callable[..., Tensor]]


def _linear(tensors: dict[str, Tensor], dy: Tensor) -> Form:
    return tensors, dy, ops.lora_linear, testing.plain_linear


def _dropped(tensors: dict[str, Tensor], dy: Tensor) -> Form:
    """A layer with the mask inside the operation."""
    drop = dropout(dy.device)

    def plain(x, weight, lora_A, lora_B, lora_N, bias, scaling):
        none = torch.zeros_like(weight)
        return F.linear(x, weight, bias) + testing.plain_linear(drop(x), none, lora_A, lora_B, lora_N, scaling=scaling)

    return tensors, dy, functools.partial(ops.lora_linear, dropout=P_DROPPED, seed=SEED), plain


def _lora2(tensors: dict[str, Tensor], dy: Tensor) -> Form:
    v, V = tensors["lora_A"], tensors["lora_B"]
    k = len(v)
    r = k // 2 + 1
    generator = torch.Generator(v.device).manual_seed(k)
    u, E, U = (
        torch.randn(shape, generator=generator, device=v.device).mul_(std).to(v.dtype)
        for shape, std in (((r, k), k**-0.5), ((r,), 1.0), ((k, r), r**-0.5))
    )
    kept = mask(v, r)

    def plain(x, weight, lora_v, lora_u, lora_E, lora_U, lora_V, scaling):
        core = (lora_U * (lora_E * kept)) @ lora_u
        return testing.plain_linear(x, weight, lora_v, lora_V, core, scaling=scaling)

    parts = {"lora_v": v, "lora_u": u, "lora_E": E, "lora_U": U, "lora_V": V}
    layer = {"x": tensors["x"], "weight": tensors["weight"], **parts}
    return layer, dy, functools.partial(ops.lora2_linear, mask=kept), plain


def _mixture(tensors: dict[str, Tensor], dy: Tensor) -> Form:
    """A layer of experts."""
    M = dy.shape[0]
    # One without rows, and rows without one.
    ends = [M // 2, M // 2, M - M // 4, M - M // 8]

    def plain(x, weight, lora_A, lora_B, lora_N, scaling):
        parts, first = [], 0
        for e, last in enumerate(ends):
            matrices = weight[e], lora_A[e], lora_B[e], lora_N[e]
            parts.append(testing.plain_linear(x[first:last], *matrices, scaling=scaling))
            first = last
        return torch.cat([*parts, x.new_zeros(M - first, weight.shape[1])])

    offsets = torch.tensor(ends, dtype=torch.int32, device=dy.device)
    return _rolled(tensors, EXPERTS), dy, functools.partial(ops.lora_grouped_linear, offsets=offsets), plain


def _group(tensors: dict[str, Tensor], dy: Tensor) -> Form:
    """Two layers that share x, their outputs side by side."""

    def ours(x, weight, lora_A, lora_B, lora_N, **options):
        adapters = list(zip(lora_A.unbind(), lora_B.unbind(), lora_N.unbind(), strict=True))
        return torch.cat(ops.lora_group_linear(x, list(weight.unbind()), adapters, **options), 1)

    def plain(x, weight, lora_A, lora_B, lora_N, scaling):
        layers = zip(weight, lora_A, lora_B, lora_N, strict=True)
        return torch.cat([testing.plain_linear(x, *layer, scaling=scaling) for layer in layers], 1)

    return _rolled(tensors, 2), torch.cat([dy, dy.roll(1, 0)], 1), ours, plain


def _rolled(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """x, and the matrices of so many layers, which have those of one in another order of rows each."""
    return {n: t if n == "x" else torch.stack([t.roll(i, 0) for i in range(count)]) for n, t in tensors.items()}


def _four_bits(tensors: dict[str, Tensor], dy: Tensor) -> Form:
    """A layer whose weight is codes, with nested scales where the rows are odd in number."""
    (M, K), N = tensors["x"].shape, dy.shape[1]
    codes = testing.four_bits(N, K, dy.dtype, nested=M % 2 == 1, device=dy.device)

    def ours(x, weight, lora_A, lora_B, lora_N, **options):
        # What the codes stand for is the others' weight.
        return ops.lora_linear(x, codes, lora_A, lora_B, lora_N, **options)

    return tensors | {"weight": codes.composed()}, dy, ours, testing.plain_linear


# Of the methods that are more than one product of three matrices.
FORMS = {"dropout": _dropped, "lora2": _lora2, "experts": _mixture, "group": _group, "four_bits": _four_bits}
