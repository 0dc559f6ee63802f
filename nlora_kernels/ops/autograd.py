"""The gradients of the operations.

Two operators are registered per operation, a forward and a backward, and one autograd.Function ties them together. The
Function stands outside the operators: registering autograd with the operator costs twice the overhead of a call. The
operators have it registered all the same, for those who meet them in a trace or an exported program.

Where a graph of the backward is asked for, under torch.func and in forward mode, everything is a composition of
PyTorch's own operations on the inputs, which can be differentiated as often as one likes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import REFERENCE, Call, Dropout, Needs, makes_core
from ..backends.base import Factors
from . import register
from .checks import resolved
from .register import watched

# The mode of vmap in torch.autograd.grad, for a batch of gradients.
_VMAP = torch._C._parse_dispatch_key("VmapMode")


def linear(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend) -> Tensor:
    """lora_N is a tensor, None, or u, E, U and mask, of which it is the core."""
    parts = lora_N if type(lora_N) is tuple else None
    # NOTE: spelt out, here and in the checks: at a few tokens the layer costs less than a generator over its arguments.
    trains = torch.is_grad_enabled() and (
        x.requires_grad
        or lora_A.requires_grad
        or lora_B.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (
            (parts[0].requires_grad or parts[1].requires_grad or parts[2].requires_grad)
            if parts
            else lora_N is not None and lora_N.requires_grad
        )
    )
    # Whether anything but plain eager mode is active that the operators or their parts must be shown to.
    shown = watched()
    traced = False
    if shown or forward_ad._current_level >= 0:
        if composing():
            return composed(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed)
        traced = not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None
    elif not x.is_cpu:
        # NOTE: on a CPU the extension, which reads every tensor itself, does it.
        weight, lora_A, lora_B, bias = resolved(weight, lora_A, lora_B, bias)
        lora_N, parts = (None, tuple(resolved(*parts))) if parts else (*resolved(lora_N), None)
    if torch._C._is_any_autocast_enabled():
        # Outside of the Function, so that what it keeps is what it got.
        x = x.to(_operand_dtype(x))
    if trains and not traced:
        function = _Lora2Linear if parts else _LoraLinear
        apply = function.apply if shown else function.apply_plainly
        return apply(x, weight, lora_A, lora_B, *(parts or (lora_N,)), bias, scaling, dropout, seed, backend, shown)
    if parts:
        lora_N = _core_or_factors(x, parts, backend, shown)
    weight, bias = _cast(weight, bias, x.dtype)
    forward = register.forward if shown else register.forward.plainly
    y, _ = forward(_rows(x), weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend)
    return _unflatten(y, x)


def core(lora_u, lora_E, lora_U, mask, backend="") -> Tensor:
    """U·diag(E ⊙ mask)·u"""
    tensors = (lora_u, lora_E, lora_U)
    if composing():
        return REFERENCE.lora2_core(*tensors, mask)
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        return register.core_forward(*tensors, mask, backend)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Lora2Core.apply(*tensors, mask, backend)
    return register.core_forward(*tensors, mask, backend)


def composing() -> bool:
    """Whether a transform of torch.func, forward mode or the export to ONNX wants PyTorch's own operations."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    return watched() and (
        torch._C._are_functorch_transforms_active()
        or torch._C._dispatch_tls_local_include_set().has(_VMAP)
        or (torch._C._get_tracing_state() is not None and torch.onnx.is_in_onnx_export())
    )


def composed(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed) -> Tensor:
    """The operation as differentiable operations of PyTorch; arguments as for `linear`."""
    x = x.to(_operand_dtype(x))
    weight, bias = _cast(weight, bias, x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if type(lora_N) is tuple:
            lora_N = REFERENCE.lora2_core(*lora_N)
        A, B, N = Call(x, weight, lora_A, lora_B, lora_N).adapter
        dropped = Dropout(dropout, seed)(_rows(x)).view(x.shape) if dropout else x
        T = F.linear(dropped, A)
        return F.linear(x, weight, bias) + scaling * F.linear(T if N is None else F.linear(T, N), B)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend, shown):
        needs, options = ctx.needs_input_grad[:6], (scaling, dropout, seed, backend)
        return _linear_forward(ctx, needs, shown, x, weight, lora_A, lora_B, lora_N, bias, *options)

    @staticmethod
    def backward(ctx, dy):
        return *_linear_backward(ctx, ctx.saved_tensors, dy), None, None, None, None, None


class _Lora2Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, lora_v, lora_V, lora_u, lora_E, lora_U, mask, bias, scaling, dropout, seed, backend, shown
    ):
        dx, dweight, dv, dV, du, dE, dU, _, dbias = ctx.needs_input_grad[:9]
        needs = dx, dweight, dv, dV, du or dE or dU, dbias
        parts = lora_u, lora_E, lora_U, mask
        core = _core_or_factors(x, parts, backend, shown)
        options = scaling, dropout, seed, backend
        return _linear_forward(ctx, needs, shown, x, weight, lora_v, lora_V, core, bias, *options, parts=parts)

    @staticmethod
    def backward(ctx, dy):
        # NOTE: read once, for activation checkpointing gives them out once.
        *saved, lora_u, lora_E, lora_U, mask = ctx.saved_tensors
        parts = lora_u, lora_E, lora_U, mask
        if _differentiates():
            # The core as a function of its parts.
            saved[5] = REFERENCE.lora2_core(*parts)
        elif saved[5] is None:
            saved[5] = register.core_forward(*parts, ctx.call[3]) if register.dispatched(dy) else Factors(*parts)
        dx, dweight, dv, dV, dcore, dbias = _linear_backward(ctx, saved, dy)
        du = dE = dU = None
        if type(dcore) is tuple:
            du, dE, dU = dcore
        elif dcore is not None:
            du, dE, dU = _core_backward(dcore, *parts, ctx.call[3])
        return dx, dweight, dv, dV, du, dE, dU, None, dbias, None, None, None, None, None


class _Lora2Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lora_u, lora_E, lora_U, mask, backend):
        ctx.save_for_backward(lora_u, lora_E, lora_U, mask)
        ctx.backend = backend
        return register.core_forward(lora_u, lora_E, lora_U, mask, backend)

    @staticmethod
    def backward(ctx, d_core):
        du, dE, dU = _core_backward(d_core, *ctx.saved_tensors, ctx.backend)
        return du, dE, dU, None, None


for _function in (_LoraLinear, _Lora2Linear):
    # NOTE: Function.apply itself first looks through all arguments for what torch.func may have left behind, which
    # `linear` has ruled out.
    _function.apply_plainly = super(torch.autograd.Function, _function).apply


def _linear_forward(
    ctx, needs, shown, x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend, parts=()
) -> Tensor:
    w, b = _cast(weight, bias, x.dtype)
    forward = register.forward if shown else register.forward.plainly
    y, T = forward(_rows(x), w, lora_A, lora_B, lora_N, b, scaling, dropout, seed, backend)
    _keep(ctx, needs, x, T, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend, parts)
    return _unflatten(y, x)


def _keep(ctx, needs, x, T, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend, parts=()) -> None:
    ctx.save_for_backward(
        x if needs[1] or needs[2] else None,
        T if needs[3] or needs[4] else None,
        # NOTE: the parameter itself, not its copy in autocast's dtype: the copy is cheap to make again.
        weight,
        lora_A,
        lora_B,
        # NOTE: the factors are kept as parts.
        None if type(lora_N) is Factors else lora_N,
        seed,
        *parts,
    )
    ctx.call = scaling, dropout, needs, backend, x.shape, None if bias is None else bias.dtype


def _linear_backward(ctx, saved, dy) -> tuple[Tensor | None, ...]:
    x, T, weight, lora_A, lora_B, lora_N, seed = saved
    scaling, dropout, needs, backend, x_shape, bias_dtype = ctx.call
    dy = _rows(dy)
    rows = None if x is None else _rows(x)
    w = weight if weight.dtype is dy.dtype else weight.to(dy.dtype)
    if _differentiates():
        call = dy, rows, T, w, lora_A, lora_B, lora_N, scaling
        dx, dweight, dA, dB, dN, dbias = _differentiable_backward(*call, dropout, seed, Needs(*needs))
    else:
        call = dy, rows, T, w, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend
        computed = iter(register.backward(*call))
        dx, dweight, dA, dB, dN, dbias = [next(computed) if needed else None for needed in needs]
    if dx is not None and len(x_shape) != 2:
        dx = dx.view(x_shape)
    if dweight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None:
        dbias = dbias.to(bias_dtype)
    return dx, dweight, dA, dB, dN, dbias


def _core_or_factors(x, parts, backend, shown) -> Tensor | Factors:
    """LoRA²'s core, or what the backend itself makes it of."""
    if not shown and x.is_cpu and makes_core(backend):
        return Factors(*parts)
    return register.core_forward(*parts, backend)


def _differentiates() -> bool:
    """Whether a backward is itself differentiated, or runs for a batch of gradients or beside tangents."""
    return torch.is_grad_enabled() or composing()


def _differentiable_backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs: Needs):
    drop = Dropout(dropout, seed) if dropout else None
    with torch.autocast(dy.device.type, enabled=False):
        if x is not None:
            # T as a function of its factors.
            T = (drop(x) if drop else x) @ lora_A.to(x.dtype).T
        elif needs.x and (needs.lora_B or needs.lora_N):
            raise RuntimeError(
                "second derivatives need x, which is not kept where lora_A is frozen: call lora_A.requires_grad_(), or "
                "use torch.func, which keeps it"
            )
        return REFERENCE.backward(Call(x, weight, lora_A, lora_B, lora_N, None, scaling, drop), dy, T, needs)


def _core_backward(d_core, lora_u, lora_E, lora_U, mask, backend) -> tuple[Tensor, Tensor, Tensor]:
    if _differentiates():
        return REFERENCE.lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask)
    return register.core_backward(d_core, lora_u, lora_E, lora_U, mask, backend)


# The operators by themselves, as a trace or an exported program calls them.


def _keep_of_operator(ctx, inputs, output) -> None:
    x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend = inputs
    ctx.set_materialize_grads(False)
    _keep(
        ctx,
        ctx.needs_input_grad[:6],
        x,
        output[1],
        weight,
        lora_A,
        lora_B,
        lora_N,
        bias,
        scaling,
        dropout,
        seed,
        backend,
    )


def _operator_backward(ctx, dy, dT):
    if dT is not None:
        raise RuntimeError("nlora_kernels::lora_linear has no derivative of its second result, x·Aᵀ")
    return *_linear_backward(ctx, ctx.saved_tensors, dy), None, None, None, None


def _keep_of_core(ctx, inputs, output) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


torch.library.register_autograd("nlora_kernels::lora_linear", _operator_backward, setup_context=_keep_of_operator)
torch.library.register_autograd("nlora_kernels::lora2_core", _Lora2Core.backward, setup_context=_keep_of_core)


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K)."""
    return x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _unflatten(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) in the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _operand_dtype(x: Tensor) -> torch.dtype:
    """What autocast casts the operands of F.linear to: all but fp64."""
    device = x.device.type
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    # Each by itself: under autocast a weight may have the dtype already where its bias has not.
    if weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None and bias.dtype is not dtype:
        bias = bias.to(dtype)
    return weight, bias
