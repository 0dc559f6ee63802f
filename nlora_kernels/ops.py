"""The operations: public functions, their registration with torch.library and their gradients.

This file alone knows of autograd and torch.compile; `checks` looks at the arguments, `backends` does the arithmetic.

Two operators are registered per function, a forward and a backward, and one autograd.Function ties them together. The
Function stands outside the operators: registering autograd with the operator costs twice the overhead of a call.
"""

import functools
import numbers

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends
from .backends import Dropout, Needs
from .checks import check_lora2_core, check_lora_linear, fits, fits_core


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_N: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ

    A linear layer and its low-rank adapter as one operation: the forward of SLoRA and NLoRA (arXiv 2502.14482); without
    lora_N, of LoRA (arXiv 2106.09685). All matrices are in the layout of nn.Linear.

    Args:
        x: (..., in), fp32, bf16, fp16 or fp64; any strides.
        weight: (out, in) in x's dtype.
        lora_A: (r, in). The three adapter matrices may be of any floating dtype and are used in x's dtype.
        lora_B: (out, r).
        lora_N: (r, r), or None for plain LoRA.
        bias: (out,) in x's dtype, or None.
        scaling: s, alpha / r in the papers.
        dropout: p, the probability with which an element of x is zeroed for the adapter alone, as PEFT does in
            training; what is kept is multiplied by 1/(1 − p).
        seed: of the dropout's mask, an int64 or a tensor that holds one on x's device; a mask follows from it alone,
            on every device. By default drawn from torch's generator of that device, without waiting for it. Rows of
            x count in the order of their leading dimensions.
        backend: a name from `backends.available()`, which is then used or raises; None for the best one.

    Returns:
        y (..., out) in x's dtype, accumulated in fp32; x·Aᵀ and its product with Nᵀ are rounded to x's dtype. Under
        autocast x, weight and bias are cast to its dtype first, as F.linear does.

    Every tensor argument that requires a gradient gets one, in its own dtype. For backward the op keeps x·Aᵀ, and x
    only if lora_A or weight trains. It is differentiable once, and not under torch.func transforms.

    Raises:
        TypeError: an argument is no tensor or number, or dtypes do not fit together.
        ValueError: shapes or devices do not fit, dropout is not within [0, 1], or the named backend is unknown or
            cannot take the call.
    """
    if not fits(x, weight, lora_A, lora_B, lora_N, bias, scaling):
        check_lora_linear(x, weight, lora_A, lora_B, lora_N, bias, scaling)
    seed = _drawn_seed(x, dropout, seed) if dropout else None
    return _linear(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend or "")


def lora2_core(lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None = None) -> Tensor:
    """core = U·diag(E ⊙ mask)·u

    The (k, k) matrix to which the inner chain of LoRA² collapses (arXiv 2408.06854, sec. 3: u·Λ·𝒰 between v and 𝒱); it
    takes the place of N in `lora_linear`.

    Args:
        lora_u: (r, k), lora_E: (r,), lora_U: (k, r), one floating dtype, which is the result's too.
        mask: (r,) of 0 and 1, floating or bool, or None for all ones. It gets no gradient.

    Gradients: dU = dC·uᵀ·diag(E ⊙ mask), du = diag(E ⊙ mask)·Uᵀ·dC, dE = mask ⊙ diag(Uᵀ·dC·uᵀ).

    Raises:
        TypeError: an argument is no tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    check_lora2_core(lora_u, lora_E, lora_U, mask)
    return _core(lora_u, lora_E, lora_U, mask, "")


def lora2_linear(
    x: Tensor,
    weight: Tensor,
    lora_v: Tensor,
    lora_u: Tensor,
    lora_E: Tensor,
    lora_U: Tensor,
    lora_V: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y = x·Wᵀ + bias + s·((x·vᵀ)·Cᵀ)·Vᵀ  with  C = U·diag(E ⊙ mask)·u

    LoRA² (arXiv 2408.06854, sec. 3) without ever forming its update: `lora_linear` with lora_A = v, lora_B = V and
    lora_N = `lora2_core(u, E, U, mask)`, so its rank is k whatever r is.

    Args:
        lora_v: (k, in), lora_u: (r, k), lora_E: (r,), lora_U: (k, r), lora_V: (out, k), one floating dtype.
        mask: (r,) of 0 and 1, or None.
        x, weight, bias, scaling, dropout, seed, backend: as for `lora_linear`.

    Returns, gradients and errors are those of `lora_linear` and `lora2_core`.
    """
    parts = lora_u, lora_E, lora_U, mask
    if not (fits(x, weight, lora_v, lora_V, None, bias, scaling) and fits_core(lora_v, *parts)):
        check_lora2_core(*parts)
        # Stands for the core, which has yet to be made.
        core = lora_u.new_empty(lora_u.shape[1], lora_u.shape[1])
        names = {"lora_A": "lora_v", "lora_B": "lora_V", "lora_N": "the core of lora_u, lora_E and lora_U"}
        check_lora_linear(x, weight, lora_v, lora_V, core, bias, scaling, names)
    seed = _drawn_seed(x, dropout, seed) if dropout else None
    return _linear(x, weight, lora_v, lora_V, parts, bias, scaling, dropout, seed, backend or "")


def _linear(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend) -> Tensor:
    """lora_N is a tensor, None, or u, E, U and mask, of which it is the core."""
    compiling = torch.compiler.is_compiling()
    if not compiling and torch._C._are_functorch_transforms_active():
        raise RuntimeError("nlora_kernels operations do not support torch.func transforms (vmap, grad, jvp, ...)")
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
    if trains:
        function = _Lora2Linear if parts else _LoraLinear
        apply = function.apply if compiling else function.apply_plainly
        arguments = (x, weight, lora_A, lora_B, *(parts or (lora_N,)), bias, scaling, dropout, seed, backend)
        return apply(*arguments)
    if parts:
        lora_N = _core_forward(*parts, backend)
    rows, weight, bias = _operands(x, weight, bias)
    return _unflatten(_forward(rows, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend)[0], x)


def _core(lora_u, lora_E, lora_U, mask, backend) -> Tensor:
    tensors = (lora_u, lora_E, lora_U)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _Lora2Core.apply(*tensors, mask, backend)
    return _core_forward(*tensors, mask, backend)


def _once(gradients):
    """The backward of a Function that is differentiable once."""
    checked = once_differentiable(gradients)

    def backward(ctx, grad):
        # The wrapper costs as much as a small layer's checks and does nothing where no graph of this graph is made.
        return (checked if torch.is_grad_enabled() else gradients)(ctx, grad)

    return staticmethod(backward)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend):
        needs = ctx.needs_input_grad[:6]
        return _linear_forward(ctx, needs, x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend)

    @_once
    def backward(ctx, dy):
        return *_linear_backward(ctx, ctx.saved_tensors, dy), None, None, None, None


class _Lora2Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_v, lora_V, lora_u, lora_E, lora_U, mask, bias, scaling, dropout, seed, backend):
        dx, dweight, dv, dV, du, dE, dU, _, dbias = ctx.needs_input_grad[:9]
        needs = dx, dweight, dv, dV, du or dE or dU, dbias
        parts = lora_u, lora_E, lora_U, mask
        core = _core_forward(*parts, backend)
        options = scaling, dropout, seed, backend
        return _linear_forward(ctx, needs, x, weight, lora_v, lora_V, core, bias, *options, parts=parts)

    @_once
    def backward(ctx, dy):
        # NOTE: read once, for activation checkpointing gives them out once.
        *saved, lora_u, lora_E, lora_U, mask = ctx.saved_tensors
        dx, dweight, dv, dV, dcore, dbias = _linear_backward(ctx, saved, dy)
        du = dE = dU = None
        if dcore is not None:
            du, dE, dU = _core_backward(dcore, lora_u, lora_E, lora_U, mask, ctx.call[3])
        return dx, dweight, dv, dV, du, dE, dU, None, dbias, None, None, None, None


class _Lora2Core(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lora_u, lora_E, lora_U, mask, backend):
        ctx.save_for_backward(lora_u, lora_E, lora_U, mask)
        ctx.backend = backend
        return _core_forward(lora_u, lora_E, lora_U, mask, backend)

    @_once
    def backward(ctx, d_core):
        du, dE, dU = _core_backward(d_core, *ctx.saved_tensors, ctx.backend)
        return du, dE, dU, None, None


for _function in (_LoraLinear, _Lora2Linear):
    # NOTE: Function.apply itself first looks through all arguments for what torch.func may have left behind, which
    # `_linear` has ruled out.
    _function.apply_plainly = super(torch.autograd.Function, _function).apply


def _linear_forward(
    ctx, needs, x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend, parts=()
) -> Tensor:
    rows, w, b = _operands(x, weight, bias)
    y, T = _forward(rows, w, lora_A, lora_B, lora_N, b, scaling, dropout, seed, backend)
    ctx.save_for_backward(
        rows if needs[1] or needs[2] else None,
        T if needs[3] or needs[4] else None,
        # NOTE: the parameter itself, not its copy in autocast's dtype: the copy is cheap to make again.
        weight,
        lora_A,
        lora_B,
        lora_N,
        seed,
        *parts,
    )
    ctx.call = scaling, dropout, needs, backend, x.shape, x.dtype, None if bias is None else bias.dtype
    return _unflatten(y, x)


def _linear_backward(ctx, saved, dy) -> tuple[Tensor | None, ...]:
    rows, T, weight, lora_A, lora_B, lora_N, seed = saved
    scaling, dropout, needs, backend, x_shape, x_dtype, bias_dtype = ctx.call
    dy = _rows(dy)
    w = weight if weight.dtype is dy.dtype else weight.to(dy.dtype)
    computed = iter(_backward(dy, rows, T, w, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend))
    dx, dweight, dA, dB, dN, dbias = [next(computed) if needed else None for needed in needs]
    if dx is not None and (dx.dtype is not x_dtype or len(x_shape) != 2):
        dx = dx.to(x_dtype).view(x_shape)
    if dweight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None:
        dbias = dbias.to(bias_dtype)
    return dx, dweight, dA, dB, dN, dbias


# The registered operators. Their tensors are flat: x (M, in), dy (M, out).


def _register(schema: str):
    """Registers an implementation under `schema` for every device; gives the function to call in its place.

    It runs with autocast off, its operands being cast already.
    """
    name = f"nlora_kernels::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,))
    operator = getattr(torch.ops.nlora_kernels, name.partition("::")[2]).default

    def decorate(implementation):
        def without_autocast(first: Tensor, *args):
            if not torch.is_autocast_enabled(first.device.type):
                return implementation(first, *args)
            with torch.autocast(first.device.type, enabled=False):
                return implementation(first, *args)

        @functools.wraps(implementation)
        def call(first: Tensor, *args):
            # Plain tensors in plain eager mode need no dispatcher, which costs as much as a small layer's checks.
            if (
                torch.compiler.is_compiling()
                or torch._C._len_torch_dispatch_stack()
                or type(first) not in (Tensor, torch.nn.Parameter)
            ):
                return operator(first, *args)
            return (without_autocast if torch._C._is_any_autocast_enabled() else implementation)(first, *args)

        torch.library.impl(name, "default")(without_autocast)
        return call

    return decorate


@_register(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? lora_N, Tensor? bias, "
    "float scaling, float dropout, Tensor? seed, str backend) -> (Tensor y, Tensor T)"
)
def _forward(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend):
    drop = Dropout(dropout, seed) if dropout else None
    module = backends.select(backend, x, (x, weight, lora_A, lora_B, lora_N, drop))
    return module.forward(x, weight, lora_A, lora_B, lora_N, bias, scaling, drop)


@torch.library.register_fake("nlora_kernels::lora_linear")
def _(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@_register(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? T, Tensor weight, Tensor lora_A, Tensor lora_B, "
    "Tensor? lora_N, float scaling, float dropout, Tensor? seed, bool[6] needs, str backend) -> Tensor[]"
)
def _backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend):
    drop = Dropout(dropout, seed) if dropout else None
    module = backends.select(backend, dy, (dy, weight, lora_A, lora_B, lora_N, drop), "backward")
    grads = module.backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, Needs(*needs), drop)
    return [grad for grad in grads if grad is not None]


@torch.library.register_fake("nlora_kernels::lora_linear_backward")
def _(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend):
    needs = Needs(*needs)
    grads = [dy.new_empty(dy.shape[0], weight.shape[1])] if needs.x else []
    like = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N}
    grads += [t.new_empty(t.shape) for name, t in like.items() if getattr(needs, name)]
    return grads + ([dy.new_empty(dy.shape[1])] if needs.bias else [])


@_register("lora2_core(Tensor lora_u, Tensor lora_E, Tensor lora_U, Tensor? mask, str backend) -> Tensor")
def _core_forward(lora_u, lora_E, lora_U, mask, backend):
    return backends.select(backend, lora_E, operation="lora2_core").lora2_core(lora_u, lora_E, lora_U, mask)


@torch.library.register_fake("nlora_kernels::lora2_core")
def _(lora_u, lora_E, lora_U, mask, backend):
    return lora_u.new_empty(lora_u.shape[1], lora_u.shape[1])


@_register(
    "lora2_core_backward(Tensor d_core, Tensor lora_u, Tensor lora_E, Tensor lora_U, Tensor? mask, str backend) "
    "-> (Tensor du, Tensor dE, Tensor dU)"
)
def _core_backward(d_core, lora_u, lora_E, lora_U, mask, backend):
    module = backends.select(backend, lora_E, operation="lora2_core")
    return module.lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask)


@torch.library.register_fake("nlora_kernels::lora2_core_backward")
def _(d_core, lora_u, lora_E, lora_U, mask, backend):
    return tuple(t.new_empty(t.shape) for t in (lora_u, lora_E, lora_U))


def _rows(x: Tensor) -> Tensor:
    """x (..., K) as (M, K)."""
    return x if x.dim() == 2 else x.unsqueeze(0) if x.dim() == 1 else x.flatten(0, -2)


def _unflatten(y: Tensor, x: Tensor) -> Tensor:
    """y (M, N) in the leading dimensions of x."""
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def _operands(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """x as (M, K), weight and bias, cast as autocast casts the operands of F.linear: all but fp64."""
    rows = x if x.dim() == 2 else _rows(x)
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return rows, weight, bias


def _drawn_seed(x: Tensor, dropout: float, seed: int | Tensor | None) -> Tensor:
    """The seed as an int64 scalar on x's device, drawn there if none is given, so that nothing waits for a device."""
    if isinstance(dropout, bool) or not isinstance(dropout, numbers.Real):
        raise TypeError(f"dropout must be a real number, got {type(dropout).__name__}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be within [0, 1], got {dropout}")
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            raise ValueError(f"seed must hold one int64 on {x.device}, got {got}")
        return seed.view(())
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, a Tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return torch.full((), seed, dtype=torch.int64, device=x.device)
