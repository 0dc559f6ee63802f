"""The gated MLP of Llama and its kin, down(act(gate(x)) ⊙ up(x)), as one operation."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import internals
from ..backends import Call, Grads, Needs
from ..internals import composing, watched
from . import autograd, group
from .api import dropout_of
from .checks import check_memory, composed_of, foreign


class _Activation(NamedTuple):
    function: Callable[..., Tensor]
    # aten's operator.
    derivative: Callable[..., Tensor]
    options: dict[str, str] = {}

    def __call__(self, z: Tensor) -> Tensor:
        return self.function(z, **self.options)

    def backward(self, d: Tensor, z: Tensor, in_place: bool) -> Tensor:
        """d times the derivative at z."""
        if in_place:
            return self.derivative.grad_input(d, z, **self.options, grad_input=d)
        return self.derivative(d, z, **self.options)


ACTIVATIONS = {
    "silu": _Activation(F.silu, torch.ops.aten.silu_backward),
    "gelu": _Activation(F.gelu, torch.ops.aten.gelu_backward, {"approximate": "none"}),
    "gelu_tanh": _Activation(F.gelu, torch.ops.aten.gelu_backward, {"approximate": "tanh"}),
}


def lora_mlp(
    x: Tensor,
    gate: Sequence,
    up: Sequence,
    down: Sequence,
    activation: str = "silu",
    *,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = down(act(gate(x)) ⊙ up(x))  with  p(x) = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ  for each of the three

    A SwiGLU or GeGLU MLP and its adapters. gate and up are computed as `lora_group_linear` does. For backward the op
    keeps x and the outputs of gate and up, which is half of what autograd keeps of the parts: the activation and the
    product, two tensors (..., intermediate), are made again.

    Args:
        x: (..., in), as for `lora_linear`.
        gate, up: (weight (intermediate, in), adapter, bias, scaling, dropout, seed), of which all but the first may be
            left out: an adapter (lora_A, lora_B) or (lora_A, lora_B, lora_N) or None; a bias or None; s = 1; dropout
            and seed as for `lora_linear`.
        down: the same with a weight (out, intermediate).
        activation: "silu", "gelu" or "gelu_tanh".
        recompute: has backward make the outputs of gate and up again too, from x, which then alone is kept.
        backend: as for `lora_linear`.

    Returns:
        y (..., out) in x's dtype. Gradients are those of `lora_linear` for every tensor that requires one. Second
        derivatives, torch.func and forward mode take PyTorch's own operations and need x, as those of `lora_linear`.

    Raises:
        TypeError, ValueError: as for `lora_group_linear`, and for an unknown activation.
    """
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    projections = {name: _projection(name, given) for name, given in (("gate", gate), ("up", up), ("down", down))}
    flat = [t for p in projections.values() for t in (p.weight, *(p.adapter or ()), p.bias) if t is not None]
    if has_torch_function((x, *flat)):
        options = {"recompute": recompute, "backend": backend}
        return handle_torch_function(lora_mlp, (x, *flat), x, gate, up, down, activation, **options)
    calls, named = [], {}
    for name, p in projections.items():
        names = {part: f"{part} of {name}" for part in ("weight", "bias", "lora_A", "lora_B", "lora_N")}
        inner = x if name != "down" else _product_like(x, calls, p.weight)
        call = group.member_of(inner, p.weight, p.adapter, p.bias, p.scaling, names)
        named |= group.tensors_of(call, names)
        if p.dropout != 0 and p.adapter is not None:
            call = call._replace(dropout=dropout_of(x, p.dropout, p.seed))
        calls.append(call)
    named["x"] = x
    if said := foreign(**named):
        return composed_of(said, partial(composed, activation=activation), calls)
    try:
        return _mlp(calls, activation, recompute, backend)
    except (RuntimeError, ValueError):
        check_memory(**named)
        raise


def _projection(name: str, given) -> group.Projection:
    if not isinstance(given, Sequence) or not 1 <= len(given) <= len(group.Projection._fields):
        kinds = ", ".join(group.Projection._fields)
        raise TypeError(f"{name} must be ({kinds}) or a part of it, got {type(given).__name__}")
    return group.Projection(*given)


def _product_like(x: Tensor, calls: list[Call], down) -> Tensor:
    """What stands for act(gate(x)) ⊙ up(x) in the checks of down."""
    widths = [call.weight.shape[0] for call in calls]
    if widths[0] != widths[1]:
        raise ValueError(f"weight of up must have as many rows as that of gate, {widths[0]}, got {widths[1]}")
    if isinstance(down, Tensor) and down.dim() == 2 and down.shape[1] != widths[0]:
        raise ValueError(f"weight of down must have shape (out, {widths[0]}), got {tuple(down.shape)}")
    return x.new_empty(()).expand(*x.shape[:-1], widths[0])


def _mlp(calls: list[Call], activation: str, recompute: bool, backend: str | None) -> Tensor:
    shown = watched()
    if (found := group.prepared(calls, shown)) is None:
        return composed(calls, activation)
    x, calls, trains = found
    if trains:
        scalings, drops, flat = group.flattened(calls)
        options = _Options(scalings, drops, activation, recompute, backend, shown)
        return (_Mlp.apply if shown else _apply_plainly)(x, options, *flat)
    ((gate, _), (up, _)), _ = group.forward([autograd.cast(c._replace(x=x)) for c in calls[:2]], backend, shown)
    product = ACTIVATIONS[activation](gate).mul_(up)
    ((y, _),), _ = group.forward([autograd.cast(calls[2]._replace(x=product))], backend, shown)
    return autograd.in_shape(y, x, shown)


def composed(calls: list[Call], activation: str) -> Tensor:
    """The operation as differentiable operations of PyTorch."""
    gate, up = group.composed(calls[:2])
    product = ACTIVATIONS[activation](gate) * up
    return group.composed([calls[2]._replace(x=product)])[0]


class _Options(NamedTuple):
    scalings: list[float]
    dropouts: list[float]
    activation: str
    recompute: bool
    backend: str | None
    # Whether operators are to be shown.
    shown: bool


class _Mlp(torch.autograd.Function):
    """After the options come weight, lora_A, lora_B, lora_N, bias and seed of gate, up and down."""

    @staticmethod
    def forward(ctx, x, options, *flat):
        act = ACTIVATIONS[options.activation]
        calls, needs = _calls(x, options, flat), group.needs_of_arguments(ctx.needs_input_grad)
        of_x, (*_, down) = [autograd.cast(call) for call in calls[:2]], calls
        ((gate, gate_T), (up, up_T)), chosen = group.forward(of_x, options.backend, options.shown)
        product = act(gate).mul_(up)
        ((y, down_T),), last = group.forward([autograd.cast(down._replace(x=product))], options.backend, options.shown)
        reads_x = options.recompute or any(need.weight or need.lora_A for need in needs[:2])
        Ts = [T if need.lora_B or need.lora_N else None for T, need in zip((gate_T, up_T, down_T), needs, strict=True)]
        made = [None] * 5 if options.recompute else [gate, up, *Ts]
        ctx.save_for_backward(x if reads_x else None, *made, *flat)
        ctx.mlp = options, needs, chosen, last
        return autograd.in_shape(y, x, options.shown)

    @staticmethod
    def backward(ctx, dy):
        options, needs, chosen, last = ctx.mlp
        x, gate, up, gate_T, up_T, down_T, *flat = ctx.saved_tensors
        shown = watched()
        if torch.is_grad_enabled() or composing(shown):
            return _differentiated(x, options, flat, needs, dy)
        act = ACTIVATIONS[options.activation]
        rows = autograd.as_rows(dy)
        *of_x, down = [
            call._replace(weight=call.weight.to(dy.dtype), x=None if x is None else autograd.as_rows(x), bias=None)
            for call in _calls(x, options, flat)
        ]
        if options.recompute:
            again = [autograd.cast(call) for call in _calls(x, options, flat)[:2]]
            ((gate, gate_T), (up, up_T)), _ = group.forward(again, autograd.name_of(chosen), shown)
        activated = act(gate)
        need = needs[2]
        if need.weight or need.lora_A or (options.recompute and (need.lora_B or need.lora_N)):
            down = down._replace(x=activated * up)
            if options.recompute and down.lora_A is not None:
                down_T = down.drop(down.x) @ down.adapter[0].T
        before = needs[0].x or any(any(of[1:]) for of in needs[:2])
        d_product, (of_down,) = group.backward([down], [rows], [down_T], [need._replace(x=before)], last, shown)
        down, dx, grads = None, None, [Grads(), Grads(), of_down]
        if before:
            d_up = activated.mul_(d_product)
            d_gate = act.backward(d_product.mul_(up), gate, in_place=not shown)
            dx, of_x = group.backward(of_x, [d_gate, d_up], [gate_T, up_T], needs[:2], chosen, shown)
            grads = [*of_x, of_down]
        grads = [_in_dtypes(of, *flat[6 * i : 6 * i + 5 : 4]) for i, of in enumerate(grads)]
        dx = None if dx is None else autograd.unflatten(dx, dy)
        return dx, None, *[grad for of in grads for grad in (*of[1:], None)]


_apply_plainly = internals.plain_apply(_Mlp)


def _calls(x: Tensor | None, options: _Options, flat: Sequence[Tensor | None]) -> list[Call]:
    return group.unflattened(x, options.scalings, options.dropouts, flat)


def _in_dtypes(grads: Grads, weight: Tensor, bias: Tensor | None) -> Grads:
    return group.in_dtypes(grads, weight.dtype, None if bias is None else bias.dtype)


def _differentiated(x: Tensor | None, options: _Options, flat, needs: list[Needs], dy: Tensor) -> tuple:
    """The gradients as functions of the inputs that can be differentiated."""
    if x is None:
        raise RuntimeError(autograd.X_IS_NEEDED)
    with torch.enable_grad():
        # Views, so that a gradient stops at them, whatever the inputs are made of.
        inputs = [x, *flat]
        views = [t.view_as(t) if t is not None and t.is_floating_point() else t for t in inputs]
        y = composed(_calls(views[0], options, views[1:]), options.activation)
    asked = [needs[0].x, *[need for of in needs for need in (*of[1:], False)]]
    grads = iter(torch.autograd.grad(y, [v for v, a in zip(views, asked, strict=True) if a], dy, create_graph=True))
    dx, *others = [next(grads) if each else None for each in asked]
    return dx, None, *others
