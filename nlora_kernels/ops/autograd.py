"""The gradients of the operations.

Two operators are registered per operation, a forward and a backward, and one autograd.Function ties them together. The
Function stands outside the operators: registering autograd with the operator costs twice the overhead of a call. The
operators have it registered all the same, for those who meet them in a trace or an exported program.

Where a graph of the backward is asked for, under torch.func and in forward mode, everything is a composition of
PyTorch's own operations on the inputs, which can be differentiated as often as one likes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, internals
from ..backends import REFERENCE, Backend, Call, Dropout, Factors, Grads, Needs
from ..backends.base import PLAIN
from ..backends.quantised import Opaque, Quantised
from ..internals import composing, watched
from . import register
from .checks import resolved

X_IS_NEEDED = (
    "second derivatives need x, which is not kept where lora_A is frozen: call lora_A.requires_grad_(), or "
    "use torch.func, which keeps it"
)


def linear(call: Call, backend: str | None) -> Tensor:
    """y of a checked call; x may have any leading dimensions."""
    x, weight, lora_A, lora_B, lora_N, bias = call[:6]
    factors = lora_N if type(lora_N) is Factors else None
    # NOTE: spelt out, here and in the checks: at a few tokens the layer costs less than a generator over its arguments.
    trains = torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (
            (factors[0].requires_grad or factors[1].requires_grad or factors[2].requires_grad)
            if factors
            else lora_N is not None and lora_N.requires_grad
        )
    )
    # Whether anything but plain eager mode is active that the operators or their parts must be shown to.
    shown = watched()
    if shown or internals.dual():
        if composing(shown):
            return composed(call)
        # A program that is recorded has the weight as its values.
        if isinstance(weight, Opaque) or (isinstance(weight, Quantised) and _recording()):
            call = call._replace(weight=weight.composed())
        trains = trains and not internals.tracing()
    elif not x.is_cpu:
        # NOTE: on a CPU the extension, which reads every tensor itself, does it.
        call = resolved_call(call)
    if internals.any_autocast():
        # Outside of the Function, so that what it keeps is what it got.
        call = call._replace(x=x.to(operand_dtype(x)))
    if not trains:
        return in_shape(_forward(cast(call), backend, shown)[0], x, shown)
    x, weight, lora_A, lora_B, lora_N, bias = call[:6]
    inner = (None, *lora_N[:3]) if factors else (lora_N, None, None, None)
    apply = _Linear.apply if shown else _apply_plainly
    return apply(call, backend, shown, x, weight, lora_A, lora_B, *inner, bias)


def core(lora_u, lora_E, lora_U, mask, backend=None) -> Tensor:
    """U·diag(E ⊙ mask)·u"""
    factors = Factors(lora_u, lora_E, lora_U, mask)
    if composing():
        return register.without_autocast(REFERENCE.lora2_core, *factors)
    if torch.is_grad_enabled() and not internals.tracing() and any(t.requires_grad for t in factors[:3]):
        return _Core.apply(*factors, backend)
    return _core_forward(factors, backend, watched())


def _recording() -> bool:
    return torch.compiler.is_compiling() or internals.tracing()


def composed(call: Call) -> Tensor:
    """The operation as differentiable operations of PyTorch."""
    x = call.x.to(operand_dtype(call.x))
    weight, bias = cast_base(call.weight, call.bias, x.dtype)
    if isinstance(weight, Quantised):
        weight = weight.composed()
    with internals.no_autocast(x.device.type):
        if type(call.lora_N) is Factors:
            call = call._replace(lora_N=REFERENCE.lora2_core(*call.lora_N))
        A, B, N = call._replace(weight=weight).adapter
        T = F.linear(call.drop(as_rows(x)).view(x.shape) if call.dropout else x, A)
        return F.linear(x, weight, bias) + call.scaling * F.linear(T if N is None else F.linear(T, N), B)


class _Linear(torch.autograd.Function):
    """The tensors of `call` follow it by themselves, for autograd to see."""

    @staticmethod
    def forward(ctx, call, backend, shown, *tensors):
        _, _, _, dx, dweight, dA, dB, dN, du, dE, dU, dbias = ctx.needs_input_grad
        needs = Needs(dx, dweight, dA, dB, dN or du or dE or dU, dbias)
        y, T, core, backend = _forward(cast(call), backend, shown)
        _keep(ctx, call, T, core, needs, backend)
        return in_shape(y, call.x, shown)

    @staticmethod
    def backward(ctx, dy):
        dx, dweight, dA, dB, dN, dbias = _linear_backward(ctx, dy)
        of_core = (None, *dN) if type(dN) is tuple else (dN, None, None, None)
        return None, None, None, dx, dweight, dA, dB, *of_core, dbias


_apply_plainly = internals.plain_apply(_Linear)
internals.plain_backward(_Linear)


class _Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lora_u, lora_E, lora_U, mask, backend):
        ctx.save_for_backward(lora_u, lora_E, lora_U, mask)
        ctx.backend = backend
        return _core_forward(Factors(lora_u, lora_E, lora_U, mask), backend, watched())

    @staticmethod
    def backward(ctx, d_core):
        return *_core_backward(d_core, Factors(*ctx.saved_tensors), ctx.backend), None, None


def _keep(ctx, call: Call, T: Tensor, core: Tensor | None, needs: Needs, backend: Backend | str | None) -> None:
    # NOTE: the parameters themselves, not their copies in autocast's dtype, which are cheap to make again.
    x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout = call
    factors = lora_N if type(lora_N) is Factors else None
    quantised = weight if isinstance(weight, Quantised) else None
    p, seed = dropout or (None, None)
    ctx.save_for_backward(
        x if needs.weight or needs.lora_A else None,
        T if needs.lora_B or needs.lora_N else None,
        None if quantised else weight,
        lora_A,
        lora_B,
        core,
        seed,
        *(factors or ()),
        # So that a change of them until backward is noticed.
        *(quantised.tensors if quantised else ()),
    )
    ctx.call = scaling, p, needs, needs.bias and bias.dtype, factors is not None, quantised, backend


def _linear_backward(ctx, dy: Tensor) -> tuple:
    """The gradients of `Needs`, that of lora_N a tuple (du, dE, dU) where the core has factors."""
    # NOTE: read once, for activation checkpointing gives them out once.
    saved = ctx.saved_tensors
    x, T, weight, lora_A, lora_B, lora_N, seed = saved[:7]
    scaling, p, needs, bias_dtype, has_factors, quantised, backend = ctx.call
    factors = Factors(*saved[7:11]) if has_factors else None
    if quantised:
        weight = quantised
    shown, flat = watched(), dy.dim() == 2
    rows = dy if flat else as_rows(dy)
    # A backward that is itself differentiated, or runs for a batch of gradients or beside tangents.
    differentiates = torch.is_grad_enabled() or (composing(shown) if shown else internals.dual())
    if factors and differentiates:
        # The core as a function of its factors.
        lora_N = register.without_autocast(REFERENCE.lora2_core, *factors)
    elif factors and lora_N is None:
        lora_N = factors
    w = weight if weight.dtype is dy.dtype else weight.to(dy.dtype)
    x = x if x is None or flat else as_rows(x)
    call = Call(x, w, lora_A, lora_B, lora_N, None, scaling, p and Dropout(p, seed))
    if differentiates:
        grads = differentiable_backward(call, rows, T, needs)
    else:
        grads = _backward(call, rows, T, needs, backend, shown)
    dx, dweight, dA, dB, dN, dbias = grads
    if factors and dN is not None and type(dN) is not tuple:
        dN = _core_backward(dN, factors, backend)
    if dx is not None and not flat:
        dx = unflatten(dx, dy)
    if dweight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None:
        dbias = dbias.to(bias_dtype)
    return dx, dweight, dA, dB, dN, dbias


def differentiable_backward(call: Call, dy: Tensor, T: Tensor | None, needs: Needs) -> Grads:
    with internals.no_autocast(dy.device.type):
        if call.x is not None:
            # T as a function of its factors.
            T = call.drop(call.x) @ call.lora_A.to(call.x.dtype).T
        elif needs.x and (needs.lora_B or needs.lora_N):
            raise RuntimeError(X_IS_NEEDED)
        return REFERENCE.backward(call, dy, T, needs)


# The way past the dispatcher, which costs as much as a small layer's checks, where nothing is `watched`. A backend that
# is chosen in forward is kept for backward, but on a GPU, where the record of `verify` may have another for it.


def _forward(
    call: Call, backend: str | None, shown: bool
) -> tuple[Tensor, Tensor, Tensor | None, Backend | str | None]:
    """y, T, the core unless the backend made it itself, and what `_backward` is to be given."""
    core = call.lora_N
    if type(core) is Factors:
        core = None
        if shown or not (call.weight.is_cpu and backends.makes_core(backend)):
            core = _core_forward(call.lora_N, backend, shown)
            call = call._replace(lora_N=core)
    if shown:
        return *register.forward(call, backend), core, backend
    chosen, call = backends.choose(backend, call.x, call)
    if type(call.lora_N) is Factors and not chosen.makes_core:
        core = register.without_autocast(chosen.lora2_core, *call.lora_N)
        call = call._replace(lora_N=core)
    y, T = register.without_autocast(chosen.forward, call) if internals.any_autocast() else chosen.forward(call)
    return y, T, core, chosen if backend or call.weight.is_cpu else None


def _backward(
    call: Call, dy: Tensor, T: Tensor | None, needs: Needs, backend: Backend | str | None, shown: bool
) -> Grads:
    # The sign of a gradient may be a flag; the other tensors were looked at in forward.
    if shown or type(dy) not in PLAIN or dy.is_neg():
        if type(call.lora_N) is Factors:
            call = call._replace(lora_N=register.core(*call.lora_N, name_of(backend)))
        return register.backward(call, dy, T, needs, name_of(backend))
    chosen, call = backends.choose(backend, dy, call, "backward")
    if internals.any_autocast():
        return register.without_autocast(chosen.backward, call, dy, T, needs)
    return chosen.backward(call, dy, T, needs)


def _core_forward(factors: Factors, backend: str | None, shown: bool) -> Tensor:
    if shown:
        return register.core(*factors, backend)
    chosen = backends.select(backend, factors.lora_E, operation="lora2_core")
    return register.without_autocast(chosen.lora2_core, *factors)


def _core_backward(d_core: Tensor, factors: Factors, backend: Backend | str | None) -> tuple[Tensor, Tensor, Tensor]:
    shown = watched()
    if torch.is_grad_enabled() or composing(shown):
        return register.without_autocast(REFERENCE.lora2_core_backward, d_core, *factors)
    if shown or type(d_core) not in PLAIN or d_core.is_neg():
        return register.core_backward(d_core, *factors, name_of(backend))
    chosen = backend
    if not isinstance(backend, Backend):
        chosen = backends.select(backend, factors.lora_E, operation="lora2_core")
    return register.without_autocast(chosen.lora2_core_backward, d_core, *factors)


def name_of(backend: Backend | str | None) -> str | None:
    return backend.name if isinstance(backend, Backend) else backend


# The operators by themselves, as a trace or an exported program calls them.


def _keep_of_operator(ctx, inputs, output) -> None:
    *tensors, scaling, p, seed, backend = inputs
    ctx.set_materialize_grads(False)
    call = Call(*tensors, scaling, Dropout(p, seed) if p else None)
    _keep(ctx, call, output[1], call.lora_N, Needs(*ctx.needs_input_grad[:6]), backend)


def _operator_backward(ctx, dy, dT):
    if dT is not None:
        raise RuntimeError("nlora_kernels::lora_linear has no derivative of its second result, x·Aᵀ")
    return *_linear_backward(ctx, dy), None, None, None, None


def _keep_of_core(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


torch.library.register_autograd("nlora_kernels::lora_linear", _operator_backward, setup_context=_keep_of_operator)
torch.library.register_autograd("nlora_kernels::lora2_core", _Core.backward, setup_context=_keep_of_core)


def as_rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K)."""
    # NOTE: not by Size.numel(), which a program that is recorded would take for a constant.
    return x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unflatten(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) in the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def in_shape(y: Tensor, x: Tensor, shown: bool) -> Tensor:
    """The same of a result that is new, and no view of anything: those of a Function cannot be changed in place."""
    if x.dim() == 2:
        return y
    shape = *x.shape[:-1], y.shape[-1]
    if not shown:
        return y.resize_(shape)
    # The one way by which a trace keeps sizes; it takes no Function.
    return y.view(shape) if internals.tracing() else torch.ops.aten._unsafe_view(y, shape)


def operand_dtype(x: Tensor) -> torch.dtype:
    """What autocast casts the operands of F.linear to: all but fp64."""
    device = x.device.type
    if internals.autocasts(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def cast(call: Call) -> Call:
    """The call with x as a matrix, and weight and bias in its dtype."""
    x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout = call
    if x.dim() == 2 and weight.dtype is x.dtype and (bias is None or bias.dtype is x.dtype):
        return call
    weight, bias = cast_base(weight, bias, x.dtype)
    return Call(as_rows(x), weight, lora_A, lora_B, lora_N, bias, scaling, dropout)


def resolved_call(call: Call) -> Call:
    """The call with the signs of negative views in memory."""
    x, weight, lora_A, lora_B, bias, *core = resolved(*call[:4], call.bias, *_parts(call.lora_N))
    lora_N = Factors(*core) if type(call.lora_N) is Factors else core[0]
    return Call(x, weight, lora_A, lora_B, lora_N, bias, *call[6:])


def _parts(lora_N: Tensor | Factors | None) -> tuple[Tensor | None, ...]:
    return lora_N if type(lora_N) is Factors else (lora_N,)


def cast_base(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    # Each by itself: under autocast a weight may have the dtype already where its bias has not.
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return weight, bias
