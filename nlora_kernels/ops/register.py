"""The registered operators, which every tracer, mode and counter sees. Tensors are flat: x (M, in), dy (M, out)."""

import functools

import torch
from torch import Tensor

from .. import backends
from ..backends import Call, Dropout, Needs
from ..backends.base import PLAIN, Factors
from ..imports import when_imported

# What PyTorch itself keeps active while nothing but plain eager mode is.
_ORDINARY = torch._C._dispatch_tls_local_include_set().raw_repr()


def watched() -> bool:
    """Whether anything beyond plain eager mode is active that wants to see operators.

    Dispatch modes, tracing, functionalization and torch.func are dispatch keys of the thread and are asked for as one,
    not by name; modes for functions and the profiler have their own place.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._dispatch_tls_local_include_set().raw_repr() | _ORDINARY != _ORDINARY
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
    )


def dispatched(first: Tensor) -> bool:
    """Whether an operator with this first tensor must be called by the dispatcher: others than plain eager mode want to
    see it; or it is a gradient that no kernel can read, for the other tensors were looked at in forward."""
    return watched() or type(first) not in PLAIN or first.is_neg()


def _register(schema: str):
    """Registers an implementation under `schema` for every device; gives the function to call in its place.

    It runs with autocast off, its operands being cast already. `plainly` of that function goes past the dispatcher,
    which costs as much as a small layer's checks; the function itself does where nothing is `watched`.
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

        def plainly(first: Tensor, *args):
            return (without_autocast if torch._C._is_any_autocast_enabled() else implementation)(first, *args)

        @functools.wraps(implementation)
        def call(first: Tensor, *args):
            return operator(first, *args) if dispatched(first) else plainly(first, *args)

        torch.library.impl(name, "default")(without_autocast)
        call.plainly = plainly
        return call

    return decorate


@_register(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? lora_N, Tensor? bias, "
    "float scaling, float dropout, Tensor? seed, str backend) -> (Tensor y, Tensor T)"
)
def forward(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend):
    drop = Dropout(dropout, seed) if dropout else None
    call = Call(x, weight, lora_A, lora_B, lora_N, bias, scaling, drop)
    chosen = backends.select(backend, x, call)
    if type(lora_N) is Factors and not chosen.makes_core:
        call = call._replace(lora_N=chosen.lora2_core(*lora_N))
    return chosen.forward(call)


@torch.library.register_fake("nlora_kernels::lora_linear")
def _(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@_register(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? T, Tensor weight, Tensor lora_A, Tensor lora_B, "
    "Tensor? lora_N, float scaling, float dropout, Tensor? seed, bool[6] needs, str backend) -> Tensor[]"
)
def backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend):
    drop = Dropout(dropout, seed) if dropout else None
    call = Call(x, weight, lora_A, lora_B, lora_N, None, scaling, drop)
    chosen = backends.select(backend, dy, call, "backward")
    if type(lora_N) is Factors and not chosen.makes_core:
        call = call._replace(lora_N=chosen.lora2_core(*lora_N))
    grads = chosen.backward(call, dy, T, Needs(*needs))
    if type(lora_N) is Factors and type(grads.lora_N) is Tensor:
        grads = grads._replace(lora_N=chosen.lora2_core_backward(grads.lora_N, *lora_N))
    return [grad for grad in grads if grad is not None]


@torch.library.register_fake("nlora_kernels::lora_linear_backward")
def _(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend):
    needs = Needs(*needs)
    grads = [dy.new_empty(dy.shape[0], weight.shape[1])] if needs.x else []
    like = {"weight": weight, "lora_A": lora_A, "lora_B": lora_B, "lora_N": lora_N}
    grads += [t.new_empty(t.shape) for name, t in like.items() if getattr(needs, name)]
    return grads + ([dy.new_empty(dy.shape[1])] if needs.bias else [])


@_register("lora2_core(Tensor lora_u, Tensor lora_E, Tensor lora_U, Tensor? mask, str backend) -> Tensor")
def core_forward(lora_u, lora_E, lora_U, mask, backend):
    return backends.select(backend, lora_E, operation="lora2_core").lora2_core(lora_u, lora_E, lora_U, mask)


@torch.library.register_fake("nlora_kernels::lora2_core")
def _(lora_u, lora_E, lora_U, mask, backend):
    return lora_u.new_empty(lora_u.shape[1], lora_u.shape[1])


@_register(
    "lora2_core_backward(Tensor d_core, Tensor lora_u, Tensor lora_E, Tensor lora_U, Tensor? mask, str backend) "
    "-> (Tensor du, Tensor dE, Tensor dU)"
)
def core_backward(d_core, lora_u, lora_E, lora_U, mask, backend):
    chosen = backends.select(backend, lora_E, operation="lora2_core")
    return chosen.lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask)


@torch.library.register_fake("nlora_kernels::lora2_core_backward")
def _(d_core, lora_u, lora_E, lora_U, mask, backend):
    return tuple(t.new_empty(t.shape) for t in (lora_u, lora_E, lora_U))


@when_imported("torch.utils.flop_counter")
def _count_flops(flop_counter) -> None:
    """Tells FlopCounterMode the multiplications of each operator, two operations apiece, as it counts those of mm."""
    operators = torch.ops.nlora_kernels

    # Shapes stand for tensors.
    @flop_counter.register_flop_formula(operators.lora_linear)
    def _(x, weight, lora_A, lora_B, lora_N, *args, **kwargs):
        (M, K), N, R = x, weight[0], lora_A[0]
        return 2 * M * (K * N + R * (K + N + (R if lora_N is not None else 0)))

    @flop_counter.register_flop_formula(operators.lora_linear_backward)
    def _(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, *args, **kwargs):
        needs = Needs(*needs)
        (M, N), K, R = dy, weight[1], lora_A[0]
        core = R * R if lora_N is not None else 0
        adapter = needs.x or needs.lora_A
        products = (
            (needs.x, N * K + R * K),  # dy·W, H·A
            (adapter or needs.lora_N, N * R),  # G
            (adapter, core),  # H
            (needs.lora_A, R * K),
            (needs.lora_N, R * R),
            (needs.lora_B, N * R + core),  # dB, P
            (needs.weight, N * K),
        )
        return 2 * M * sum(size for needed, size in products if needed)

    @flop_counter.register_flop_formula(operators.lora2_core)
    def _(lora_u, *args, **kwargs):
        r, k = lora_u
        return 2 * k * k * r

    @flop_counter.register_flop_formula(operators.lora2_core_backward)
    def _(d_core, lora_u, *args, **kwargs):
        r, k = lora_u
        return 4 * k * k * r
