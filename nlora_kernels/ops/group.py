"""Layers that share x, as one operation: q, k and v of an attention, gate and up of an MLP."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import backends, internals
from ..backends import Backend, Call, Dropout, Grads, Needs
from ..backends.base import PLAIN, linear, linear_backward
from ..backends.quantised import Quantised
from ..imports import when_imported
from ..internals import composing, watched
from . import autograd, register
from .api import dropout_of
from .checks import (
    check_group,
    check_linear,
    check_lora_linear,
    check_memory,
    composed_of,
    fits,
    fits_linear,
    foreign,
    seen_through,
)

# Tensors of a member, in the order of autograd.
_MEMBER = ("weight", "lora_A", "lora_B", "lora_N", "bias", "seed")


class Projection(NamedTuple):
    """A linear layer with its adapter, (lora_A, lora_B) or (lora_A, lora_B, lora_N), or without."""

    weight: Tensor
    adapter: Sequence[Tensor] | None = None
    bias: Tensor | None = None
    scaling: float = 1.0
    dropout: float = 0.0
    seed: int | Tensor | None = None


def lora_group_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    adapters: Sequence[Sequence[Tensor] | None],
    biases: Sequence[Tensor | None] | None = None,
    *,
    scaling: float | Sequence[float] = 1.0,
    dropout: float | Sequence[float] = 0.0,
    seed: int | Tensor | Sequence[int | Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """yᵢ = x·Wᵢᵀ + biasᵢ + sᵢ·((x·Aᵢᵀ)·Nᵢᵀ)·Bᵢᵀ  for every layer i of several that share x

    What `lora_linear` computes for each, in one forward and one backward: x is kept once, and its gradient is one sum,
    dx = Σᵢ dyᵢ·Wᵢ + Hᵢ·Aᵢ, instead of one tensor for each layer.

    Args:
        x: (..., in), as for `lora_linear`.
        weights: of every layer (outᵢ, in), in x's dtype; quantised ones raise a TypeError.
        adapters: of every layer (lora_A, lora_B), (lora_A, lora_B, lora_N), or None if it has no adapter. Their ranks
            and dtypes may differ.
        biases: of every layer (outᵢ,) or None; None if no layer has one.
        scaling: s, one of every layer or one for all.
        dropout: p, likewise; every adapter drops by a mask of its own.
        seed: of the masks, one of every layer or one for all. By default drawn, one for each.
        backend: as for `lora_linear`. "cpu", "triton" and "cuda", up to four layers, compute a group as one; the others
            make a loop of it.

    Returns:
        A tuple of yᵢ (..., outᵢ). What is kept for backward is what `lora_linear` keeps for each, x once.

    Gradients and errors are those of `lora_linear`; a y that is not used costs nothing in backward.
    """
    calls = _plainly_right(x, weights, adapters, biases, scaling, dropout)
    if calls is None:
        check_group(weights, adapters, biases)
        flat = x, *weights, *[t for adapter in adapters for t in adapter or ()], *(biases or ())
        if has_torch_function(flat):
            options = {"scaling": scaling, "dropout": dropout, "seed": seed, "backend": backend}
            return handle_torch_function(lora_group_linear, flat, x, weights, adapters, biases, **options)
        calls = _checked(x, weights, adapters, biases, scaling, dropout, seed)
        if said := foreign(**_named(calls)):
            return tuple(composed_of(said, composed, calls))
    try:
        return group(calls, backend)
    except (RuntimeError, ValueError):
        check_memory(**_named(calls))
        raise


def _plainly_right(x, weights, adapters, biases, scaling, dropout) -> list[Call] | None:
    """The calls, if all is plain tensors that fit and nothing is dropped."""
    count = len(weights) if type(weights) in (list, tuple) and type(adapters) in (list, tuple) else 0
    given = [each for each in (adapters, biases, scaling, dropout) if type(each) in (list, tuple)]
    if not count or any([len(each) != count for each in given]) or _any(dropout):
        return None
    calls = []
    for i in range(count):
        s = scaling if type(scaling) is float else scaling[i] if type(scaling) in (list, tuple) else None
        weight, adapter, bias = weights[i], adapters[i], None if biases is None else biases[i]
        if adapter is None:
            if not fits_linear(x, weight, bias):
                return None
            calls.append(Call(x, weight, None, None, None, bias))
            continue
        if type(adapter) not in (list, tuple) or not 2 <= len(adapter) <= 3:
            return None
        lora_A, lora_B, lora_N = adapter if len(adapter) == 3 else (*adapter, None)
        calls.append(Call(x, weight, lora_A, lora_B, lora_N, bias, s))
        if not fits(calls[-1]):
            return None
    return calls


def _any(dropout: float | Sequence[float]) -> bool:
    return any(p != 0 for p in dropout) if type(dropout) in (list, tuple) else dropout != 0


def _checked(x, weights, adapters, biases, scaling, dropout, seed) -> list[Call]:
    """The calls, with a message for whatever is wrong."""
    count = len(weights)
    members = list(zip(weights, adapters, biases or [None] * count, strict=True))
    scalings, drops = each(scaling, count, "scaling"), each(dropout, count, "dropout")
    seeds = each(seed, count, "seed")
    calls = [
        member_of(x, weight, adapter, bias, s, names_of(i))
        for i, ((weight, adapter, bias), s) in enumerate(zip(members, scalings, strict=True))
    ]
    return [
        call._replace(dropout=dropout_of(x, p, each_seed)) if p != 0 and call.lora_A is not None else call
        for call, p, each_seed in zip(calls, drops, seeds, strict=True)
    ]


def _named(calls: Sequence[Call]) -> dict[str, Tensor | None]:
    """All tensors by what they are called in messages."""
    return {name: t for i, call in enumerate(calls) for name, t in tensors_of(call, names_of(i)).items()}


def each(given, count: int, name: str) -> list:
    """One of every layer, from one of every layer or one for all."""
    if not isinstance(given, Sequence):
        return [given] * count
    if len(given) != count:
        raise ValueError(f"{name} must be one for each of the {count} weights or one for all, got {len(given)}")
    return list(given)


def names_of(index: int) -> dict[str, str]:
    """What the tensors of a layer are called in messages."""
    adapter = {name: f"{name} of adapters[{index}]" for name in ("lora_A", "lora_B", "lora_N")}
    return {"weight": f"weights[{index}]", "bias": f"biases[{index}]", **adapter}


def tensors_of(call: Call, names: dict[str, str]) -> dict[str, Tensor | None]:
    return {names.get(name, name): t for name, t in zip(("x", *_MEMBER[:5]), call[:6], strict=True)}


def member_of(x, weight, adapter, bias, scaling, names: dict[str, str]) -> Call:
    """A checked call."""
    if isinstance(weight, Quantised) or (type(weight) not in PLAIN and seen_through(weight, x) is not None):
        raise TypeError(f"{names['weight']} is quantised, which lora_linear and lora2_linear alone take")
    if adapter is None:
        check_linear(x, weight, bias, names)
        return Call(x, weight, None, None, None, bias)
    lora_A, lora_B, *core = adapter
    lora_N = core[0] if core else None
    call = Call(x, weight, lora_A, lora_B, lora_N, bias, scaling)
    if not fits(call):
        check_lora_linear(*call[:7], names)
    return call


def group(calls: list[Call], backend: str | None) -> tuple[Tensor, ...]:
    """y of each of several checked calls that share x, which may have any leading dimensions."""
    shown = watched()
    if (found := prepared(calls, shown)) is None:
        return tuple(composed(calls))
    x, calls, trains = found
    if trains:
        scalings, drops, flat = flattened(calls)
        return (_Group.apply if shown else _apply_plainly)(x, (scalings, drops, backend, shown), *flat)
    rows = [autograd.cast(call._replace(x=x)) for call in calls]
    return tuple([autograd.in_shape(y, x, shown) for y, _ in forward(rows, backend, shown)[0]])


def prepared(calls: list[Call], shown: bool) -> tuple[Tensor, list[Call], bool] | None:
    """x in the dtype in which it is multiplied, the calls, and whether they are to be differentiated; None where
    PyTorch's own operations have to compute."""
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (calls[0].x, *(t for call in calls for t in call[1:6]))
    )
    if shown or internals.dual():
        # NOTE: a trace knows no operator with a list of tensors of which some are None.
        if composing(shown) or internals.tracing():
            return None
    else:
        calls = [autograd.resolved_call(call) for call in calls]
    x = calls[0].x
    return x.to(autograd.operand_dtype(x)) if internals.any_autocast() else x, calls, trains


def composed(calls: Sequence[Call]) -> list[Tensor]:
    """The operation as differentiable operations of PyTorch."""
    return [composed_linear(call) if call.lora_A is None else autograd.composed(call) for call in calls]


def composed_linear(call: Call) -> Tensor:
    dtype = autograd.operand_dtype(call.x)
    weight, bias = autograd.cast_base(call.weight, call.bias, dtype)
    with internals.no_autocast(call.x.device.type):
        return linear(call._replace(x=call.x.to(dtype), weight=weight, bias=bias))


def flattened(calls: Sequence[Call]) -> tuple[list[float], list[float], list[Tensor | None]]:
    """The scalings of calls, p of their dropouts, and the tensors of each in the order of _MEMBER, for autograd."""
    drops, seeds = _dropouts(calls)
    flat = [t for call, seed in zip(calls, seeds, strict=True) for t in (*call[1:6], seed)]
    return [call.scaling for call in calls], drops, flat


def unflattened(x: Tensor | None, scalings: list[float], drops: list[float], flat: Sequence) -> list[Call]:
    """The calls that gave this, with an x."""
    members = zip(range(0, len(flat), 6), scalings, drops, strict=True)
    return [Call(x, *flat[i : i + 5], s, Dropout(p, flat[i + 5]) if p else None) for i, s, p in members]


def needs_of_arguments(needs_input_grad: Sequence[bool]) -> list[Needs]:
    """Of each member, from what autograd says of the arguments (x, options, *flat) of a Function."""
    return [Needs(needs_input_grad[0], *needs_input_grad[i : i + 5]) for i in range(2, len(needs_input_grad), 6)]


class _Group(torch.autograd.Function):
    """`options`: scalings, p of the dropouts, backend, and whether operators are to be shown. Then the tensors of every
    member in the order of _MEMBER."""

    @staticmethod
    def forward(ctx, x, options, *flat):
        scalings, drops, backend, shown = options
        calls, needs = unflattened(x, scalings, drops, flat), needs_of_arguments(ctx.needs_input_grad)
        results, backend = forward([autograd.cast(call) for call in calls], backend, shown)
        keep(ctx, x, calls, [T for _, T in results], needs, backend)
        return tuple([autograd.in_shape(y, x, shown) for y, _ in results])

    @staticmethod
    def backward(ctx, *dys):
        dx, grads = gradients(ctx, ctx.saved_tensors, dys)
        return dx, None, *[grad for of in grads for grad in (*of[1:], None)]


_apply_plainly = internals.plain_apply(_Group)


def keep(ctx, x, calls: list[Call], Ts: list[Tensor | None], needs: list[Needs], backend) -> None:
    """What the backward of a group needs of its forward; weights are those that were given, not their copies."""
    ctx.set_materialize_grads(False)
    kept = [x if any(need.weight or need.lora_A for need in needs) else None]
    for call, T, need in zip(calls, Ts, needs, strict=True):
        seed = call.dropout and call.dropout.seed
        kept += [T if need.lora_B or need.lora_N else None, call.weight, call.lora_A, call.lora_B, call.lora_N, seed]
    ctx.save_for_backward(*kept)
    biases = [need.bias and call.bias.dtype for call, need in zip(calls, needs, strict=True)]
    ctx.group = [call.scaling for call in calls], [c.dropout and c.dropout.p for c in calls], needs, biases, backend


def gradients(ctx, saved, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, list[Grads]]:
    """Those of x and of every member, of what `keep` kept; a member without a dy has none."""
    scalings, drops, needs, biases, backend = ctx.group
    x, *saved = saved
    grads = [Grads() for _ in dys]
    used = [i for i, dy in enumerate(dys) if dy is not None]
    if not used:
        return None, grads
    first = dys[used[0]]
    shown = watched()
    calls, Ts = [], []
    for i in used:
        T, weight, lora_A, lora_B, lora_N, seed = saved[6 * i : 6 * i + 6]
        w = weight if weight.dtype is first.dtype else weight.to(first.dtype)
        drop = Dropout(drops[i], seed) if drops[i] else None
        calls.append(
            Call(None if x is None else autograd.as_rows(x), w, lora_A, lora_B, lora_N, None, scalings[i], drop)
        )
        Ts.append(T)
    flat, wanted = [autograd.as_rows(dys[i]) for i in used], [needs[i] for i in used]
    if torch.is_grad_enabled() or composing(shown):
        dx, found = _differentiable(calls, flat, Ts, wanted)
    else:
        dx, found = backward(calls, flat, Ts, wanted, backend, shown)
    for i, of in zip(used, found, strict=True):
        grads[i] = in_dtypes(of, saved[6 * i + 1].dtype, biases[i])
    return None if dx is None else autograd.unflatten(dx, first), grads


def in_dtypes(grads: Grads, weight: torch.dtype, bias: torch.dtype | None) -> Grads:
    """With those of weight and bias in the dtypes that these had before autocast cast them."""
    return grads._replace(
        weight=None if grads.weight is None else grads.weight.to(weight),
        bias=None if grads.bias is None else grads.bias.to(bias),
    )


def _differentiable(calls, dys, Ts, needs) -> tuple[Tensor | None, list[Grads]]:
    found = [
        linear_backward(call, dy, need) if call.lora_A is None else autograd.differentiable_backward(call, dy, T, need)
        for call, dy, T, need in zip(calls, dys, Ts, needs, strict=True)
    ]
    dx = sum(of.x for of in found) if needs[0].x else None
    return dx, found


def forward(calls: list[Call], backend, shown: bool) -> tuple[list[tuple[Tensor, Tensor | None]], Backend | str | None]:
    """(y, T) of each, and what `backward` is to be given."""
    x = calls[0].x
    if shown:
        columns = [list(column) for column in zip(*[call[1:7] for call in calls], strict=True)]
        (*made,) = _forward_operator(x, *columns, *_dropouts(calls), backend)
        Ts = iter(made[len(calls) :])
        return [(y, None if c.lora_A is None else next(Ts)) for y, c in zip(made, calls, strict=False)], backend
    chosen = backends.select_group(backend, x, calls)
    results = register.without_autocast(chosen.forward_group, calls)
    return results, chosen if backend or x.is_cpu else None


def backward(calls, dys, Ts, needs, backend, shown: bool) -> tuple[Tensor | None, list[Grads]]:
    if shown or any(type(dy) not in PLAIN or dy.is_neg() for dy in dys):
        columns = [list(column) for column in zip(*[call[1:5] for call in calls], strict=True)]
        asked = [needs[0].x, *[need for of in needs for need in of[1:]]]
        scalings = [call.scaling for call in calls]
        operands = dys, calls[0].x, Ts, *columns, scalings, *_dropouts(calls)
        made = iter(_backward_operator(*operands, asked, autograd.name_of(backend)))
        dx, *found = [next(made) if needed else None for needed in asked]
        return dx, [Grads(None, *found[i : i + 5]) for i in range(0, len(found), 5)]
    chosen = backend if isinstance(backend, Backend) else backends.select_group(backend, dys[0], calls, "backward")
    return register.without_autocast(chosen.backward_group, calls, dys, Ts, needs)


def _dropouts(calls: Sequence[Call]) -> tuple[list[float], list[Tensor | None]]:
    drops = [call.dropout or (0.0, None) for call in calls]
    return [p for p, _ in drops], [seed for _, seed in drops]


# Operators, see `register`


def calls_of(x, weights, lora_A, lora_B, lora_N, biases, scalings, dropouts, seeds) -> list[Call]:
    drops = [Dropout(p, seed) if p else None for p, seed in zip(dropouts, seeds, strict=True)]
    members = zip(weights, lora_A, lora_B, lora_N, biases, scalings, drops, strict=True)
    return [Call(x, *member) for member in members]


def needs_of(needs) -> list[Needs]:
    """Of each member, from the flat list."""
    return [Needs(needs[0], *needs[i : i + 5]) for i in range(1, len(needs), 5)]


@register.operator(
    "lora_group_linear(Tensor x, Tensor[] weights, Tensor?[] lora_A, Tensor?[] lora_B, Tensor?[] lora_N, "
    "Tensor?[] biases, float[] scalings, float[] dropouts, Tensor?[] seeds, str? backend) -> Tensor[]"
)
def _forward_operator(x, weights, lora_A, lora_B, lora_N, biases, scalings, dropouts, seeds, backend):
    """All y, and then the T of all members with an adapter."""
    calls = calls_of(x, weights, lora_A, lora_B, lora_N, biases, scalings, dropouts, seeds)
    results = backends.select_group(backend, x, calls).forward_group(calls)
    return [y for y, _ in results] + [T for _, T in results if T is not None]


@torch.library.register_fake("nlora_kernels::lora_group_linear")
def _(x, weights, lora_A, lora_B, lora_N, biases, scalings, dropouts, seeds, backend):
    widths = [weight.shape[0] for weight in weights] + [A.shape[0] for A in lora_A if A is not None]
    return [x.new_empty(x.shape[0], width) for width in widths]


@register.operator(
    "lora_group_linear_backward(Tensor[] dys, Tensor? x, Tensor?[] Ts, Tensor[] weights, Tensor?[] lora_A, "
    "Tensor?[] lora_B, Tensor?[] lora_N, float[] scalings, float[] dropouts, Tensor?[] seeds, bool[] needs, "
    "str? backend) -> Tensor[]"
)
def _backward_operator(dys, x, Ts, weights, lora_A, lora_B, lora_N, scalings, dropouts, seeds, needs, backend):
    """The gradients that `needs` asks for: that of x, and of each member those of weight, A, B, N and bias."""
    nothing = [None] * len(weights)
    calls = calls_of(x, weights, lora_A, lora_B, lora_N, nothing, scalings, dropouts, seeds)
    chosen = backends.select_group(backend, dys[0], calls, "backward")
    dx, grads = chosen.backward_group(calls, dys, Ts, needs_of(needs))
    found = [dx, *(grad for of in grads for grad in of[1:])]
    return [grad for grad, needed in zip(found, needs, strict=True) if needed]


@torch.library.register_fake("nlora_kernels::lora_group_linear_backward")
def _(dys, x, Ts, weights, lora_A, lora_B, lora_N, scalings, dropouts, seeds, needs, backend):
    likes = [dys[0].new_empty(dys[0].shape[0], weights[0].shape[1]) if needs[0] else None]
    for dy, *inputs in zip(dys, weights, lora_A, lora_B, lora_N, strict=True):
        likes += [*inputs, dy.new_empty(dy.shape[1])]
    return [like.new_empty(like.shape) for like, needed in zip(likes, needs, strict=True) if needed]


@when_imported("torch.utils.flop_counter")
def _count_flops(flop_counter) -> None:
    """Shapes stand for tensors."""
    operators = torch.ops.nlora_kernels

    @flop_counter.register_flop_formula(operators.lora_group_linear)
    def _(x, weights, lora_A, lora_B, lora_N, *args, **kwargs):
        M, K = x
        return sum(register.forward_flops(M, K, *of) for of in zip(weights, lora_A, lora_N, strict=True))

    @flop_counter.register_flop_formula(operators.lora_group_linear_backward)
    def _(dys, x, Ts, weights, lora_A, lora_B, lora_N, scalings, dropouts, seeds, needs, *args, **kwargs):
        members = zip(dys, weights, lora_A, lora_N, needs_of(needs), strict=True)
        return sum(register.backward_flops(dy[0], *of) for dy, *of in members)


# The operator by itself, as a trace or an exported program calls it.


def _keep_of_operator(ctx, inputs, output) -> None:
    x, weights, lora_A, lora_B, lora_N, biases, scalings, dropouts, seeds, backend = inputs
    calls = calls_of(x, weights, lora_A, lora_B, lora_N, biases, scalings, dropouts, seeds)
    wanted = ctx.needs_input_grad
    columns = [flags if isinstance(flags, Sequence) else [flags] * len(calls) for flags in wanted[1:6]]
    needs = [Needs(wanted[0], *flags) for flags in zip(*columns, strict=True)]
    Ts = iter(output[len(calls) :])
    keep(ctx, x, calls, [None if A is None else next(Ts) for A in lora_A], needs, backend)


def _operator_backward(ctx, grads):
    count = len(ctx.group[0])
    if any(grad is not None for grad in grads[count:]):
        raise RuntimeError("nlora_kernels::lora_group_linear has no derivative of its results x·Aᵀ")
    dx, found = gradients(ctx, ctx.saved_tensors, grads[:count])
    return dx, *[list(column) for column in zip(*[of[1:] for of in found], strict=True)], None, None, None, None


torch.library.register_autograd("nlora_kernels::lora_group_linear", _operator_backward, setup_context=_keep_of_operator)
