"""The layer of experts: one operation for the layers that share out the rows of x among them.

Its public function, gradients, operators and their FLOPs.
"""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import backends
from ..backends import ExpertsCall, Needs
from ..backends.base import lengthened, stacked
from ..imports import when_imported
from ..internals import any_autocast, composing, plain_apply, tracing, watched
from . import autograd, register
from .checks import check_ends, check_experts, check_memory, composed_of, foreign, resolved

_NAMES = ("x", "offsets", "weight", "lora_A", "lora_B", "lora_N", "bias")


def lora_grouped_linear(
    x: Tensor,
    offsets: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_N: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """y_e = x_e·W_eᵀ + bias_e + s·((x_e·A_eᵀ)·N_eᵀ)·B_eᵀ  for the rows x_e = x[offsets[e − 1]:offsets[e]] of expert e

    The linear layers of a mixture of experts and their adapters as one operation, on tokens sorted by expert. W + Δ is
    never formed, and experts without rows cost nothing in forward.

    Args:
        x: (rows, in), fp32, bf16, fp16 or fp64; any strides.
        offsets: (experts,), int32 or int64 on x's device: where the rows of each expert end, as for
            torch.nn.functional.grouped_mm. On a CPU it is checked that they rise. Rows past the last belong to no
            expert: their y, and what comes back to them, is zero.
        weight: (experts, out, in) in x's dtype; any strides, so that of weights kept as (experts, in, out) the
            transposed view is read in place.
        lora_A: (experts, r, in), lora_B: (experts, out, r), lora_N: (experts, r, r), or None for plain LoRA. They may
            be of any floating dtype and strides; the dtype in which they are used is as for `lora_linear`.
        bias: (experts, out) in x's dtype, or None.
        scaling, backend: as for `lora_linear`.

    Returns:
        y (rows, out) in x's dtype, as exact as `lora_linear`, and autocast is honoured as there.

    Every tensor argument that requires a gradient gets one, in its own dtype; those of an expert without rows are zero.
    What is kept for backward, and what second derivatives, torch.func and forward mode do, is as for `lora_linear`.

    Raises:
        TypeError: an argument is no tensor or number, or dtypes do not fit together.
        ValueError: shapes, devices or offsets do not fit, or the named backend is unknown or cannot take the call.
    """
    tensors = x, offsets, weight, lora_A, lora_B, lora_N, bias
    if has_torch_function(tensors):
        options = {"scaling": scaling, "backend": backend}
        return handle_torch_function(lora_grouped_linear, tensors, *tensors, **options)
    check_experts(*tensors, scaling)
    call, named = ExpertsCall(*tensors, scaling), dict(zip(_NAMES, tensors, strict=True))
    if unknown := foreign(**named):
        return composed_of(unknown, _composed, call)
    try:
        return _linear(call, backend)
    except (RuntimeError, ValueError):
        check_memory(**named)
        raise


def _linear(call: ExpertsCall, backend: str | None) -> Tensor:
    shown = watched()
    if composing(shown):
        return _composed(call)
    x, offsets, *tensors, scaling = call
    if not (shown or x.is_cpu):
        # NOTE: on a CPU the extension, which reads every tensor itself, does it.
        tensors = resolved(*tensors)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors))
    x = x.to(autograd.operand_dtype(x))
    if trains and not tracing():
        apply = _Experts.apply if shown else _apply_plainly
        return apply(x, offsets, *tensors, (scaling, backend))
    return _forward(_cast(ExpertsCall(x, offsets, *tensors, scaling)), backend)[0]


def _composed(call: ExpertsCall) -> Tensor:
    """The operation as differentiable operations of PyTorch."""
    y = torch.cat([autograd.composed(each) for _, each in call.experts()])
    return lengthened(y, call.x.shape[0])


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, weight, lora_A, lora_B, lora_N, bias, options):
        ctx.options = options
        needs = Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:7])
        call = ExpertsCall(x, offsets, weight, lora_A, lora_B, lora_N, bias, options[0])
        y, T = _forward(_cast(call), options[1])
        _keep(ctx, call, T, needs)
        return y

    @staticmethod
    def backward(ctx, dy):
        dx, *others = _backward(ctx, dy)
        return dx, None, *others, None


_apply_plainly = plain_apply(_Experts)


def _cast(call: ExpertsCall) -> ExpertsCall:
    weight, bias = autograd.cast_base(call.weight, call.bias, call.x.dtype)
    return call._replace(weight=weight, bias=bias)


def _forward(call: ExpertsCall, backend: str | None) -> tuple[Tensor, Tensor]:
    if watched():
        return experts(*call, backend)
    chosen = backends.select(backend, call.x, call.expert(0), "experts")
    return register.without_autocast(chosen.forward_experts, call) if any_autocast() else chosen.forward_experts(call)


def _keep(ctx, call: ExpertsCall, T: Tensor, needs: Needs) -> None:
    x, offsets, weight, lora_A, lora_B, lora_N, bias, _ = call
    x = x if needs.weight or needs.lora_A else None
    T = T if needs.lora_B or needs.lora_N else None
    # NOTE: the parameter itself, not its copy in autocast's dtype: the copy is cheap to make again.
    ctx.save_for_backward(x, T, offsets, weight, lora_A, lora_B, lora_N)
    ctx.needs, ctx.bias_dtype = needs, None if bias is None else bias.dtype


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, T, offsets, weight, lora_A, lora_B, lora_N = ctx.saved_tensors
    (scaling, backend), needs, shown = ctx.options, ctx.needs, watched()
    w, _ = autograd.cast_base(weight, None, dy.dtype)
    call = ExpertsCall(x, offsets, w, lora_A, lora_B, lora_N, None, scaling)
    # A backward that is itself differentiated, or runs for a batch of gradients or beside tangents.
    if torch.is_grad_enabled() or composing(shown):
        experts = call.experts()
        own = (
            autograd.differentiable_backward(each, dy[rows], T if T is None else T[rows], needs)
            for rows, each in experts
        )
        grads = stacked(list(own), dy.shape[0])
    elif shown or foreign(dy=dy) or dy.is_neg():
        grads = experts_backward(dy, x, T, offsets, w, lora_A, lora_B, lora_N, scaling, needs, backend)
    else:
        chosen = backends.select(backend, dy, call.expert(0), "experts")
        grads = register.without_autocast(chosen.backward_experts, call, dy, T, needs)
    dx, dweight, dA, dB, dN, dbias = grads
    if dweight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None:
        dbias = dbias.to(ctx.bias_dtype)
    return dx, dweight, dA, dB, dN, dbias


# The operators


@register.operator(
    "lora_grouped_linear(Tensor x, Tensor offsets, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? lora_N, "
    "Tensor? bias, float scaling, str? backend) -> (Tensor y, Tensor T)"
)
def experts(x, offsets, weight, lora_A, lora_B, lora_N, bias, scaling, backend):
    check_ends(offsets, x.shape[0])
    call = ExpertsCall(x, offsets, weight, lora_A, lora_B, lora_N, bias, scaling)
    return backends.select(backend, x, call.expert(0), "experts").forward_experts(call)


@torch.library.register_fake("nlora_kernels::lora_grouped_linear")
def _(x, offsets, weight, lora_A, lora_B, lora_N, bias, scaling, backend):
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_A.shape[1])


@register.operator(
    "lora_grouped_linear_backward(Tensor dy, Tensor? x, Tensor? T, Tensor offsets, Tensor weight, Tensor lora_A, "
    "Tensor lora_B, Tensor? lora_N, float scaling, bool[6] needs, str? backend) "
    "-> (Tensor dx, Tensor dweight, Tensor dA, Tensor dB, Tensor dN, Tensor dbias)"
)
def experts_backward(dy, x, T, offsets, weight, lora_A, lora_B, lora_N, scaling, needs, backend):
    """As in aten's backwards, None stands where no gradient was asked for."""
    check_ends(offsets, dy.shape[0])
    call = ExpertsCall(x, offsets, weight, lora_A, lora_B, lora_N, None, scaling)
    return tuple(backends.select(backend, dy, call.expert(0), "experts").backward_experts(call, dy, T, Needs(*needs)))


@torch.library.register_fake("nlora_kernels::lora_grouped_linear_backward")
def _(dy, x, T, offsets, weight, lora_A, lora_B, lora_N, scaling, needs, backend):
    return register.fake_gradients(dy, (weight, lora_A, lora_B, lora_N), needs)


def _keep_of_operator(ctx, inputs, output) -> None:
    *tensors, scaling, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.options = scaling, backend
    _keep(ctx, ExpertsCall(*tensors, scaling), output[1], Needs(ctx.needs_input_grad[0], *ctx.needs_input_grad[2:7]))


def _operator_backward(ctx, dy, dT):
    if dT is not None:
        raise RuntimeError("nlora_kernels::lora_grouped_linear has no derivative of its second result, x·Aᵀ")
    dx, *others = _backward(ctx, dy)
    return dx, None, *others, None, None


torch.library.register_autograd(
    "nlora_kernels::lora_grouped_linear", _operator_backward, setup_context=_keep_of_operator
)


@when_imported("torch.utils.flop_counter")
def _count_flops(flop_counter) -> None:
    """Every row meets one expert, so the multiplications are those of one layer with all rows."""
    operators, counted = torch.ops.nlora_kernels, flop_counter.flop_registry

    # Shapes stand for tensors.
    @flop_counter.register_flop_formula(operators.lora_grouped_linear)
    def _(x, offsets, weight, lora_A, lora_B, lora_N, *args, **kwargs):
        one = counted[operators.lora_linear]
        return one(x, weight[1:], lora_A[1:], lora_B[1:], lora_N and lora_N[1:])

    @flop_counter.register_flop_formula(operators.lora_grouped_linear_backward)
    def _(dy, x, T, offsets, weight, lora_A, lora_B, lora_N, scaling, needs, *args, **kwargs):
        one = counted[operators.lora_linear_backward]
        return one(dy, x, T, weight[1:], lora_A[1:], lora_B[1:], lora_N and lora_N[1:], scaling, 0.0, None, needs)
