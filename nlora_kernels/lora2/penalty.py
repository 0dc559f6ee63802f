"""How far the singular vectors are from orthogonal, with the gradient in closed form."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..init import check_choice
from ..internals import composing, no_autocast, plain_apply
from .kernels import kernels
from .layers import layers, unpacked
from .shards import gathered

FORMS = ("paper", "reference")
TERMS = ("uv", "UV", "PQ")
# The terms of each form where none are named: those that the kernels know.
_OWN_TERMS = {"paper": TERMS, "reference": ("uv", "UV")}
# With what weight each form trains. That of "reference" is the published code's, which takes 0.3 on RTE and STS-B. The
# paper states none: that of its form, a sum that grows with the layers, was measured on the 37 layers of
# all-MiniLM-L6-v2 on SST-2, where it trains as the other does; with 0.1 the loss there does not fall.
WEIGHTS = {"paper": 1e-4, "reference": 0.1}


def orthogonal_penalty(model: nn.Module, form: str = "reference", terms: Sequence[str] | None = None) -> Tensor:
    """mean of ‖v·vᵀ − I_k‖, ‖uᵀ·u − I_k‖, ‖VᵀV − I_k‖ and ‖U·Uᵀ − I_k‖ over the layers, in Frobenius norms

    which is what the published code of LoRA² (arXiv 2408.06854) means to add to the loss. form="paper" is the sum over
    the layers that the paper writes in eq. 5, of squares, with those of the products P = u·v and Q = V·U among them:

        ‖u·v·vᵀ·uᵀ − I_r‖² + ‖v·vᵀ − I_k‖² + ‖uᵀ·u − I_k‖² + ‖Uᵀ·VᵀV·U − I_r‖² + ‖VᵀV − I_k‖² + ‖U·Uᵀ − I_k‖²

    Each expert of a mixture is a layer. Not every term can reach 0: for k < r those of size r cannot, for k > r those
    of uᵀ·u and U·Uᵀ cannot.

    terms names the pairs that are held orthogonal, as table 3 of the paper varies them: "uv", "UV" (its script letters)
    and "PQ". Without it they are all three in the paper's form and "uv", "UV" in the other, whose mean is over those
    that are named.

    Returns a scalar in fp32 (fp64 for fp64 adapters), unweighted. A weight belongs to a form: see `WEIGHTS`.
    The gradients are in closed form: the large tensors enter by their k×k Grams alone, all layers of one shape go
    through one batched product, and autocast does not apply. Where a graph of the backward is asked for, under
    torch.func and in forward mode it is a composition of PyTorch's own operations.

    Raises ValueError for an unknown form or term, for no terms, or a model without LoRA² layers.
    """
    check_choice("form", form, FORMS)
    given = _OWN_TERMS[form] if terms is None else (terms,) if isinstance(terms, str) else tuple(terms)
    if not given or set(given) - set(TERMS):
        raise ValueError(f"terms must be some of {', '.join(TERMS)}, got {terms!r}")
    terms = tuple(term for term in TERMS if term in given)
    found = layers(model)
    # NOTE: the right pair is the left one transposed: with w = Vᵀ and t = Uᵀ its three terms read as those of v and u.
    tensors = gathered([t for layer in found for t in (layer.lora_v, layer.lora_u, layer.lora_V, layer.lora_U)])
    if any(layer.count > 1 for layer in found):
        parts = [unpacked(layer.count, *tensors[4 * i : 4 * i + 4]) for i, layer in enumerate(found)]
        tensors = [t for layer in parts for expert in layer for t in expert]
    if composing():
        return _value(form, terms, tensors)
    return _penalty(form, terms, *tensors)


class _OrthogonalPenalty(torch.autograd.Function):
    """Arguments: form, terms, then v (k, in), u (r, k), V (out, k), U (k, r) of each layer."""

    @staticmethod
    def forward(ctx, form, terms, *tensors):
        ctx.form, ctx.terms = form, terms
        ctx.save_for_backward(*tensors)
        own = terms == _OWN_TERMS[form]
        ctx.kernels = kernels(tensors, max(max(u.shape) for u in tensors[1::4])) if own else None
        if not ctx.kernels:
            return _value(form, terms, tensors)
        value, ctx.saved = ctx.kernels.penalty(tensors, form == "paper", _weight(form, terms, tensors))
        return value

    @staticmethod
    def backward(ctx, d_value):
        tensors = ctx.saved_tensors
        weight = _weight(ctx.form, ctx.terms, tensors) * d_value
        # NOTE: the equations below can be differentiated again; they are in closed form, not a graph of the value. What
        # a hook gives back for a saved tensor may be laid out otherwise.
        if ctx.kernels and not (torch.is_grad_enabled() or composing()) and kernels(tensors):
            return None, None, *ctx.kernels.penalty_backward(tensors, ctx.saved, weight)
        grads: list[Tensor | None] = [None] * len(tensors)
        with no_autocast(d_value.device.type):
            for places, w, t in _pairs(tensors):
                right = places[0] % 4 == 2
                _, D, dt = _pair_penalty(w, t, ctx.form, ctx.terms, right)
                # NOTE: D is symmetric, so either product is written in the layout of its own side.
                dw = w.mT @ (weight * D) if right else (weight * D) @ w
                dt = weight * (dt.mT if right else dt)
                for place, *pair in zip(places, dw, dt, strict=True):
                    for offset, grad in enumerate(pair):
                        grads[place + offset] = grad.to(tensors[place + offset].dtype)
        return None, None, *grads


_penalty = plain_apply(_OrthogonalPenalty)


def _weight(form: str, terms: Sequence[str], tensors: Sequence[Tensor]) -> float:
    # "reference" is a mean: of each layer's four tensors a term has two matrices.
    return 1.0 if form == "paper" else 2 / (len(tensors) * len(terms))


def _value(form: str, terms: Sequence[str], tensors: Sequence[Tensor]) -> Tensor:
    with no_autocast(tensors[0].device.type):
        values = [_pair_penalty(w, t, form, terms, at[0] % 4 == 2)[0].sum() for at, w, t in _pairs(tensors)]
    return _weight(form, terms, tensors) * sum(values)


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


def _pair_penalty(w: Tensor, t: Tensor, form: str, terms: Sequence[str], right: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(value (L,), D (L, k, k), dt (L, r, k)) of a batch of pairs; the gradient of w is D·w."""
    a = w @ w.mT - _eye(w, w.shape[-2])  # v·vᵀ − I
    value, D, dt = w.new_zeros(len(w)), torch.zeros_like(a), torch.zeros_like(t)
    if "PQ" in terms:
        ta = t @ a + t  # u·v·vᵀ
        value, dp = _distance(value, ta @ t.mT - _eye(t, t.shape[-2]), form)  # u·v·vᵀ·uᵀ − I
        D, dt = D + t.mT @ dp @ t, dt + dp @ ta
    if ("UV" if right else "uv") in terms:
        value, da = _distance(value, a, form)
        value, dg = _distance(value, t.mT @ t - _eye(t, t.shape[-1]), form)  # uᵀ·u − I
        D, dt = D + da, dt + t @ dg
    return value, D, dt


def _distance(value: Tensor, m: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """(value plus the distance of a product of a matrix with itself from I, twice its derivative by that product)"""
    if form == "paper":
        return value + m.square().sum((1, 2)), 4 * m
    norm = torch.linalg.matrix_norm(m, keepdim=True)
    # The norm has no gradient at 0: take 0, as autograd does.
    return value + norm.flatten(), 2 * m / norm.clamp_min(torch.finfo(m.dtype).tiny)


def _eye(like: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=like.dtype, device=like.device)
