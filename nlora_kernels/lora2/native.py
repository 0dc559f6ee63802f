"""The C++ calls of LoRA² training and the one rule for when they are used (csrc/cpu/lora2_training.cpp)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

try:
    from .. import _C
except ImportError:
    _C = None

# Products of larger k×k matrices are better left to the library.
MAX_K = 32


def takes(tensors: Iterable[Tensor], k: int = 1) -> bool:
    """Whether the calls below can and should be used: the extension is built and the tensors are plain ones of fp32."""
    if _C is None or k > MAX_K:
        return False
    for t in tensors:
        if not (t.is_cpu and t.dtype is torch.float32 and t.is_contiguous() and type(t) in (nn.Parameter, Tensor)):
            return False
    return True


def allocate(
    sizes: list[int],
    scored: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    masks: Sequence[Tensor],
    exp_avg: Tensor,
    exp_unc: Tensor,
    kept: Tensor,
    beta1: float,
    beta2: float,
    *,
    scoring: bool,
    budget: int | None,
) -> bool:
    """The allocator's step, in place; False, with nothing changed, if scoring met a product w·∂w that is not finite.

    sizes holds r and k of each layer, scored its E, u and U, grads their gradients. Without a budget nothing is masked;
    masks are those to be written, or none.
    """
    return _C.cpu_lora2_allocate(
        sizes,
        [t.data_ptr() for t in scored],
        [0 if t is None else t.data_ptr() for t in grads],
        [t.data_ptr() for t in masks],
        *(t.data_ptr() for t in (exp_avg, exp_unc, kept)),
        beta1,
        beta2,
        scoring,
        -1 if budget is None else budget,
    )


def penalty(tensors: Sequence[Tensor], squared: bool) -> tuple[float, Tensor, Tensor]:
    """(value, D, dt): the sum over all pairs, and what `penalty_backward` needs, for v, u, V and U of each layer."""
    D = torch.empty(sum(u.shape[1] ** 2 for u in tensors[1::4]) * 2)
    dt = torch.empty(sum(t.numel() for t in tensors[1::2]))
    numbers = _pairs(tensors, [0] * (len(tensors) // 2), D, dt)
    return _C.cpu_lora2_penalty(numbers, squared, torch.get_num_threads()), D, dt


def penalty_backward(tensors: Sequence[Tensor], D: Tensor, dt: Tensor, scale: float) -> list[Tensor]:
    """The gradients of `tensors`, those of u and U views of one tensor."""
    grads = [torch.empty_like(t) for t in tensors[::2]]
    numbers = _pairs(tensors, [dw.data_ptr() for dw in grads], D, dt)
    _C.cpu_lora2_penalty_backward(numbers, scale, torch.get_num_threads())
    inner = (dt * scale).split([t.numel() for t in tensors[1::2]])
    inner = (part.view(t.shape) for part, t in zip(inner, tensors[1::2], strict=True))
    return [grad for pair in zip(grads, inner, strict=True) for grad in pair]


def _pairs(tensors: Sequence[Tensor], dws: Sequence[int], D: Tensor, dt: Tensor) -> list[int]:
    numbers: list[int] = []
    D_at, dt_at = D.data_ptr(), dt.data_ptr()
    for place, dw in enumerate(dws):
        w, t = tensors[2 * place], tensors[2 * place + 1]
        right = place % 2
        n, k = w.shape if right else w.shape[::-1]
        r = t.shape[right]
        numbers += (w.data_ptr(), t.data_ptr(), dw, dt_at, D_at, n, k, r, right)
        D_at += 4 * k * k
        dt_at += 4 * k * r
    return numbers
