"""The operators as torch.library has them, which every tracer, mode and counter sees: the one place where a call is a
flat list, as its schema is. Tensors are matrices: x (M, in), dy (M, out).
"""

import functools
import json

import torch
from torch import Tensor

from .. import backends
from ..backends import Call, Dropout, ExpertsCall, Grads, Needs
from ..backends.quantised import Quantised, restored
from ..imports import when_imported
from ..internals import autocasts


def without_autocast(function, *args):
    """Calls a function whose operands are cast already."""
    first = args[0][0] if type(args[0]) is list else args[0]
    device = (first.weight if isinstance(first, Call | ExpertsCall) else first).device.type
    if not autocasts(device):
        return function(*args)
    with torch.autocast(device, enabled=False):
        return function(*args)


def operator(schema: str):
    """Registers an implementation under `schema` for every device; the operator takes its place."""
    name = f"nlora_kernels::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("(") :], tags=(torch.Tag.pt2_compliant_tag,))

    def decorate(implementation):
        torch.library.impl(name, "default")(functools.partial(without_autocast, implementation))
        return getattr(torch.ops.nlora_kernels, name.partition("::")[2]).default

    return decorate


@operator(
    "lora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? lora_N, Tensor? bias, "
    "float scaling, float dropout, Tensor? seed, str? backend) -> (Tensor y, Tensor T)"
)
def linear(x, weight, *args):
    return _linear(x, weight, *args)


def _linear(x, weight, lora_A, lora_B, lora_N, bias, scaling, dropout, seed, backend):
    drop = Dropout(dropout, seed) if dropout else None
    chosen, call = backends.choose(backend, x, Call(x, weight, lora_A, lora_B, lora_N, bias, scaling, drop))
    return chosen.forward(call)


@torch.library.register_fake("nlora_kernels::lora_linear")
def _fake_linear(x, weight, lora_A, *args):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_A.shape[0])


@operator(
    "lora_linear_backward(Tensor dy, Tensor? x, Tensor? T, Tensor weight, Tensor lora_A, Tensor lora_B, "
    "Tensor? lora_N, float scaling, float dropout, Tensor? seed, bool[6] needs, str? backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dA, Tensor dB, Tensor dN, Tensor dbias)"
)
def linear_backward(dy, x, T, weight, *args):
    return _linear_backward(dy, x, T, weight, *args)


def _linear_backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend):
    """As in aten's backwards, None stands where no gradient was asked for."""
    drop = Dropout(dropout, seed) if dropout else None
    call = Call(x, weight, lora_A, lora_B, lora_N, None, scaling, drop)
    chosen, call = backends.choose(backend, dy, call, "backward")
    return tuple(chosen.backward(call, dy, T, Needs(*needs)))


@torch.library.register_fake("nlora_kernels::lora_linear_backward")
def _fake_linear_backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, backend):
    return fake_gradients(dy, (weight, lora_A, lora_B, lora_N), needs)


def fake_gradients(dy, matrices, needs):
    """Those of x, of the matrices, weight (…, N, K) first, and of a bias (…, N)."""
    (*out, K), inputs = matrices[0].shape, zip(matrices, needs[1:5], strict=True)
    dx = dy.new_empty(dy.shape[0], K) if needs[0] else None
    dbias = dy.new_empty(out) if needs[5] else None
    return dx, *(t.new_empty(t.shape) if needed else None for t, needed in inputs), dbias


# The same with a weight in few bits, which is its tensors and a description of them.


@operator(
    "quantised_lora_linear(Tensor x, Tensor[] weight, str description, Tensor lora_A, Tensor lora_B, Tensor? lora_N, "
    "Tensor? bias, float scaling, float dropout, Tensor? seed, str? backend) -> (Tensor y, Tensor T)"
)
def quantised_linear(x, weight, description, *args):
    return _linear(x, restored(description, weight), *args)


@torch.library.register_fake("nlora_kernels::quantised_lora_linear")
def _(x, weight, description, *args):
    return _fake_linear(x, restored(description, weight), *args)


@operator(
    "quantised_lora_linear_backward(Tensor dy, Tensor? x, Tensor? T, Tensor[] weight, str description, Tensor lora_A, "
    "Tensor lora_B, Tensor? lora_N, float scaling, float dropout, Tensor? seed, bool[6] needs, str? backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dA, Tensor dB, Tensor dN, Tensor dbias)"
)
def quantised_linear_backward(dy, x, T, weight, description, *args):
    return _linear_backward(dy, x, T, restored(description, weight), *args)


@torch.library.register_fake("nlora_kernels::quantised_lora_linear_backward")
def _(dy, x, T, weight, description, *args):
    return _fake_linear_backward(dy, x, T, restored(description, weight), *args)


def forward(call: Call, backend: str | None) -> tuple[Tensor, Tensor]:
    """(y, T) of a call by its operator."""
    x, weight, *tensors, scaling, dropout = call
    options = scaling, *(dropout or (0.0, None)), backend
    if isinstance(weight, Quantised):
        return quantised_linear(x, weight.tensors, weight.description(), *tensors, *options)
    return linear(x, weight, *tensors, *options)


def backward(call: Call, dy: Tensor, T: Tensor | None, needs: Needs, backend: str | None) -> Grads:
    x, weight, *tensors, _, scaling, dropout = call
    options = scaling, *(dropout or (0.0, None)), needs, backend
    if isinstance(weight, Quantised):
        grads = quantised_linear_backward(dy, x, T, weight.tensors, weight.description(), *tensors, *options)
    else:
        grads = linear_backward(dy, x, T, weight, *tensors, *options)
    return Grads(*grads)


@operator("lora2_core(Tensor lora_u, Tensor lora_E, Tensor lora_U, Tensor? mask, str? backend) -> Tensor")
def core(lora_u, lora_E, lora_U, mask, backend):
    return backends.select(backend, lora_E, operation="lora2_core").lora2_core(lora_u, lora_E, lora_U, mask)


@torch.library.register_fake("nlora_kernels::lora2_core")
def _(lora_u, lora_E, lora_U, mask, backend):
    return lora_u.new_empty(lora_u.shape[1], lora_u.shape[1])


@operator(
    "lora2_core_backward(Tensor d_core, Tensor lora_u, Tensor lora_E, Tensor lora_U, Tensor? mask, str? backend) "
    "-> (Tensor du, Tensor dE, Tensor dU)"
)
def core_backward(d_core, lora_u, lora_E, lora_U, mask, backend):
    chosen = backends.select(backend, lora_E, operation="lora2_core")
    return chosen.lora2_core_backward(d_core, lora_u, lora_E, lora_U, mask)


@torch.library.register_fake("nlora_kernels::lora2_core_backward")
def _(d_core, lora_u, lora_E, lora_U, mask, backend):
    return tuple(t.new_empty(t.shape) for t in (lora_u, lora_E, lora_U))


def forward_flops(M, K, weight, lora_A, lora_N) -> int:
    """Of a layer whose tensors have these shapes; lora_A is None where it has no adapter."""
    N, R = weight[0], lora_A[0] if lora_A is not None else 0
    return 2 * M * (K * N + R * (K + N + (R if lora_N is not None else 0)))


def backward_flops(M, weight, lora_A, lora_N, needs) -> int:
    """Of the gradients that are asked for."""
    (N, K), R = weight, lora_A[0] if lora_A is not None else 0
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


@when_imported("torch.utils.flop_counter")
def _count_flops(flop_counter) -> None:
    """Tells FlopCounterMode the multiplications of each operator, two operations apiece, as it counts those of mm."""
    operators = torch.ops.nlora_kernels

    # Shapes stand for tensors.
    def size(description):
        return json.loads(description)[3]

    @flop_counter.register_flop_formula(operators.quantised_lora_linear)
    def _(x, weight, description, *args, **kwargs):
        return count_linear(x, size(description), *args)

    @flop_counter.register_flop_formula(operators.quantised_lora_linear_backward)
    def _(dy, x, T, weight, description, *args, **kwargs):
        return count_linear_backward(dy, x, T, size(description), *args)

    @flop_counter.register_flop_formula(operators.lora_linear)
    def count_linear(x, weight, lora_A, lora_B, lora_N, *args, **kwargs):
        return forward_flops(*x, weight, lora_A, lora_N)

    @flop_counter.register_flop_formula(operators.lora_linear_backward)
    def count_linear_backward(dy, x, T, weight, lora_A, lora_B, lora_N, scaling, dropout, seed, needs, *args, **kwargs):
        return backward_flops(dy[0], weight, lora_A, lora_N, Needs(*needs))

    @flop_counter.register_flop_formula(operators.lora2_core)
    def _(lora_u, *args, **kwargs):
        r, k = lora_u
        return 2 * k * k * r

    @flop_counter.register_flop_formula(operators.lora2_core_backward)
    def _(d_core, lora_u, *args, **kwargs):
        r, k = lora_u
        return 4 * k * k * r
