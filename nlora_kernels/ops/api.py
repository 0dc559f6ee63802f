"""The public functions."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..backends import REFERENCE, Call, Dropout, Factors
from ..backends.base import PLAIN
from ..backends.quantised import Quantised
from . import autograd
from .checks import (
    check_call,
    check_dropout,
    check_linear,
    check_lora2_core,
    check_memory,
    composed_of,
    fits,
    foreign,
    seen_through,
)

_NAMES = ("x", "weight", "lora_A", "lora_B", "lora_N", "bias")
_LORA2_NAMES = ("x", "weight", "lora_v", "lora_u", "lora_E", "lora_U", "lora_V", "mask", "bias")


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
        weight: (out, in) in x's dtype, or a quantised tensor of bitsandbytes or torchao, or any that has a
            `dequantize()`, which is used in x's dtype, kept as it is for backward, and gets no gradient.
        lora_A: (r, in). The three adapter matrices may be of any floating dtype, and are rounded to x's
            dtype or kept in fp32.
        lora_B: (out, r).
        lora_N: (r, r), or None for plain LoRA.
        bias: (out,) in x's dtype, or None.
        scaling: s, which is alpha / r in PEFT.
        dropout: p, the probability with which an element of x is zeroed for the adapter alone, as PEFT does in
            training; what is kept is multiplied by 1/(1 − p).
        seed: of the dropout's mask, an int64 or a tensor that holds one on x's device; a mask follows from it alone,
            on every device. By default drawn from torch's generator of that device, without waiting for it. Rows of
            x count in the order of their leading dimensions.
        backend: a name from `backends.available()`, which is then used or raises; None for the best one.

    Returns:
        y (..., out) in x's dtype, accumulated in fp32; x·Aᵀ and its product with Nᵀ are rounded to x's dtype, or kept
        in fp32. Under autocast x, weight and bias are cast to its dtype first, as F.linear does.

    Every tensor argument that requires a gradient gets one, in its own dtype. For backward the op keeps x·Aᵀ only if
    lora_B or lora_N trains, and x only if lora_A or weight does. Second derivatives, torch.func and forward mode take
    PyTorch's own operations; with lora_A frozen, the second derivative through x raises, because x is not kept.

    Raises:
        TypeError: an argument is no tensor or number, or dtypes do not fit together.
        ValueError: shapes or devices do not fit, dropout is not within [0, 1], seed does not hold one int64, the named
            backend is unknown or cannot take the call, or a quantised weight requires a gradient or lacks what belongs
            to it.
    """
    return fused_linear(Call(x, weight, lora_A, lora_B, lora_N, bias, scaling), dropout, seed, backend)


def lora2_core(lora_u: Tensor, lora_E: Tensor, lora_U: Tensor, mask: Tensor | None = None) -> Tensor:
    """core = U·diag(E ⊙ mask)·u

    The (k, k) matrix to which the inner chain of LoRA² collapses (arXiv 2408.06854, sec. 3: u·Λ·𝒰 between v and 𝒱); it
    takes the place of N in `lora_linear`.

    Args:
        lora_u: (r, k), of one floating dtype with the others, which is the result's too.
        lora_E: (r,).
        lora_U: (k, r).
        mask: (r,) of 0 and 1, floating or bool, or None for all ones. It gets no gradient.

    Gradients: dU = dC·uᵀ·diag(E ⊙ mask), du = diag(E ⊙ mask)·Uᵀ·dC, dE = mask ⊙ diag(Uᵀ·dC·uᵀ).

    Raises:
        TypeError: an argument is no tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    factors = Factors(lora_u, lora_E, lora_U, mask)
    if has_torch_function(factors):
        return handle_torch_function(lora2_core, factors, *factors)
    check_lora2_core(*factors)
    if foreign(**factors._asdict()):
        return REFERENCE.lora2_core(*factors)
    try:
        return autograd.core(*factors)
    except (RuntimeError, ValueError):
        check_memory(**factors._asdict())
        raise


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
        x: (..., in), as for `lora_linear`, and so are weight, bias, scaling, dropout, seed and backend.
        lora_v: (k, in); the five matrices have one floating dtype.
        lora_u: (r, k).
        lora_E: (r,).
        lora_U: (k, r).
        lora_V: (out, k).
        mask: (r,) of 0 and 1, or None.

    Returns, gradients and errors are those of `lora_linear` and `lora2_core`.
    """
    factors = Factors(lora_u, lora_E, lora_U, mask)
    return fused_linear(Call(x, weight, lora_v, lora_V, factors, bias, scaling), dropout, seed, backend)


def fused_linear(
    call: Call, dropout: float = 0.0, seed: int | Tensor | None = None, backend: str | None = None
) -> Tensor:
    """What `lora_linear` returns; of LoRA², whose lora_N is `Factors`, what `lora2_linear` does."""
    foreign_ones = ""
    if not fits(call):
        x, weight = call[:2]
        if type(weight) not in PLAIN and (quantised := seen_through(weight, x)) is not None:
            call = call._replace(weight=quantised)
        named = _named(call)
        tensors = tuple(named.values())
        if has_torch_function(tensors):
            function = lora2_linear if type(call.lora_N) is Factors else lora_linear
            options = {"scaling": call.scaling, "dropout": dropout, "seed": seed, "backend": backend}
            return handle_torch_function(function, tensors, *tensors, **options)
        check_call(call)
        foreign_ones = foreign(**named)
    if dropout != 0:
        call = call._replace(dropout=dropout_of(call.x, dropout, seed))
    try:
        return composed_of(foreign_ones, autograd.composed, call) if foreign_ones else autograd.linear(call, backend)
    except (RuntimeError, ValueError):
        check_memory(**_named(call))
        raise


def frozen_linear(x: Tensor, weight: Quantised, bias: Tensor | None = None) -> Tensor:
    """y = x·Wᵀ + bias of a weight in few bits, as `lora_linear` computes it

    With an adapter of rank 0: one of zeros would add NaN to a whole row of y where x holds an infinity.

    Args:
        x: (..., in), as for `lora_linear`.
        weight: (out, in), decoded to x's dtype.
        bias: (out,) in x's dtype, or None.

    Raises TypeError and ValueError as `lora_linear` does.
    """
    check_linear(x, weight, bias, {"weight": "weight", "bias": "bias"})
    N, K = weight.shape
    call = Call(x, weight, x.new_empty(0, K), x.new_empty(N, 0), None, bias)
    # On GPUs kernels of ours take ranks from 1 on; without an adapter the library's product is as good.
    return autograd.linear(call, None if x.is_cpu else "lean")


def _named(call: Call) -> dict[str, Tensor | None]:
    """The tensors of a call by the names and in the order of its function's arguments."""
    x, weight, A, B, N, bias = call[:6]
    if type(N) is Factors:
        tensors = x, weight, A, *N[:3], B, N.mask, bias
        return dict(zip(_LORA2_NAMES, tensors, strict=True))
    return dict(zip(_NAMES, call, strict=False))


def dropout_of(x: Tensor, p: float, seed: int | Tensor | None) -> Dropout:
    """Its seed is an int64 scalar on x's device, drawn there if none is given, so that nothing waits for a device."""
    check_dropout(p)
    if seed is None:
        return Dropout(p, torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device))
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
            got = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            raise ValueError(f"seed must hold one int64 on {x.device}, got {got}")
        if not torch.compiler.is_compiling():
            check_memory(seed=seed)
        return Dropout(p, seed.view(()))
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, a Tensor or None, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    return Dropout(p, torch.full((), seed, dtype=torch.int64, device=x.device))
