"""How far the singular vectors are from orthogonal, with the gradient in closed form."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.autograd import composing
from .kernels import kernels
from .layers import layers

FORMS = ("paper", "reference")


def orthogonal_penalty(model: nn.Module, form: str = "paper") -> Tensor:
    """Σ ‖u·v·vᵀ·uᵀ − I_r‖² + ‖v·vᵀ − I_k‖² + ‖uᵀ·u − I_k‖² + ‖Uᵀ·VᵀV·U − I_r‖² + ‖VᵀV − I_k‖² + ‖U·Uᵀ − I_k‖²

    over the layers, in Frobenius norms (LoRA², arXiv 2408.06854, sec. 3). Not every term can reach 0: for k < r those
    of size r cannot, for k > r those of uᵀ·u and U·Uᵀ cannot.

    form="reference" is what the published code means to add instead: the mean over the four tensors of all layers of
    ‖v·vᵀ − I_k‖, ‖uᵀ·u − I_k‖, ‖U·Uᵀ − I_k‖ and ‖VᵀV − I_k‖, not squared.

    Returns a scalar in fp32 (fp64 for fp64 adapters), unweighted; published weights are 0.1, and 0.3 on RTE and STS-B.
    Its gradients are in closed form: the large tensors enter by their k×k Grams alone, all layers of one shape go
    through one batched product, and autocast does not apply. Where a graph of the backward is asked for, under
    torch.func and in forward mode it is a composition of PyTorch's own operations.

    Raises ValueError for an unknown form, or a model without LoRA² layers.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    found = layers(model)
    # NOTE: the right pair is the left one transposed: with w = Vᵀ and t = Uᵀ its three terms read as those of v and u.
    tensors = [t for layer in found for t in (layer.lora_v, layer.lora_u, layer.lora_V, layer.lora_U)]
    if composing():
        return _value(form, tensors)
    return _penalty(form, *tensors)


class _OrthogonalPenalty(torch.autograd.Function):
    """Arguments: form, then v (k, in), u (r, k), V (out, k), U (k, r) of each layer."""

    @staticmethod
    def forward(ctx, form, *tensors):
        ctx.form = form
        ctx.save_for_backward(*tensors)
        ctx.kernels = kernels(tensors, max(max(u.shape) for u in tensors[1::4]))
        if not ctx.kernels:
            return _value(form, tensors)
        value, ctx.saved = ctx.kernels.penalty(tensors, form == "paper", _weight(form, tensors))
        return value

    @staticmethod
    def backward(ctx, d_value):
        tensors = ctx.saved_tensors
        weight = _weight(ctx.form, tensors) * d_value
        # NOTE: the equations below can be differentiated again; they are in closed form, not a graph of the value.
        if ctx.kernels and not (torch.is_grad_enabled() or composing()):
            return None, *ctx.kernels.penalty_backward(tensors, ctx.saved, weight)
        grads: list[Tensor | None] = [None] * len(tensors)
        with torch.autocast(d_value.device.type, enabled=False):
            for places, w, t in _pairs(tensors):
                _, D, dt = _pair_penalty(w, t, ctx.form)
                # NOTE: D is symmetric, so either product is written in the layout of its own side.
                right = places[0] % 4 == 2
                dw = w.mT @ (weight * D) if right else (weight * D) @ w
                dt = weight * (dt.mT if right else dt)
                for place, *pair in zip(places, dw, dt, strict=True):
                    for offset, grad in enumerate(pair):
                        grads[place + offset] = grad.to(tensors[place + offset].dtype)
        return None, *grads


# NOTE: Function.apply itself first looks through all arguments for what torch.func may have left behind.
_penalty = super(torch.autograd.Function, _OrthogonalPenalty).apply


def _weight(form: str, tensors: Sequence[Tensor]) -> float:
    # "reference" is a mean over the tensors.
    return 1.0 if form == "paper" else 1 / len(tensors)


def _value(form: str, tensors: Sequence[Tensor]) -> Tensor:
    with torch.autocast(tensors[0].device.type, enabled=False):
        values = [_pair_penalty(w, t, form)[0].sum() for _, w, t in _pairs(tensors)]
    return _weight(form, tensors) * sum(values)


def _pairs(tensors: Sequence[Tensor]):
    """Groups of pairs (w (L, k, n), t (L, r, k)) of one shape and side, with the place of each pair's first tensor."""

    def kind(place):
        w, t = tensors[place], tensors[place + 1]
        return place % 4, w.shape, t.shape, str(w.dtype), str(t.dtype)

    places = sorted(range(0, len(tensors), 2), key=kind)
    for (side, *_), group in itertools.groupby(places, key=kind):
        group = list(group)
        w, t = (torch.stack([tensors[place + offset] for place in group]) for offset in (0, 1))
        dtype = torch.promote_types(torch.float32, w.dtype)
        w, t = w.to(dtype), t.to(dtype)
        yield group, *((w.mT, t.mT) if side == 2 else (w, t))


def _pair_penalty(w: Tensor, t: Tensor, form: str) -> tuple[Tensor, Tensor, Tensor]:
    """(value (L,), D (L, k, k), dt (L, r, k)) of a batch of pairs; the gradient of w is D·w."""
    a = w @ w.mT - _eye(w, w.shape[-2])  # v·vᵀ − I
    g = t.mT @ t - _eye(t, t.shape[-1])  # uᵀ·u − I
    if form == "reference":
        a_norm, g_norm = (torch.linalg.matrix_norm(m, keepdim=True) for m in (a, g))
        tiny = torch.finfo(a.dtype).tiny
        # The norm has no gradient at 0: take 0, as autograd does.
        return (a_norm + g_norm).flatten(), 2 * a / a_norm.clamp_min(tiny), 2 * (t @ g) / g_norm.clamp_min(tiny)
    ta = t @ a + t  # u·v·vᵀ
    p = ta @ t.mT - _eye(t, t.shape[-2])  # u·v·vᵀ·uᵀ − I
    value = sum(m.square().sum((1, 2)) for m in (p, a, g))
    return value, 4 * (t.mT @ p @ t + a), 4 * (p @ ta + t @ g)


def _eye(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
