"""The C++ calls of LoRA² training and the one rule for when they are used (csrc/cpu/lora2_training.cpp)."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..base import plain
from ..native import _C

# The largest r or k of a layer: the penalty's products of larger matrices are better left to the library.
MAX_SIZE = 32


def takes(tensors: Iterable[Tensor], size: int = 1) -> bool:
    """Whether the calls below can and should be used: the extension is built and the tensors are plain ones of fp32.

    `size` is the largest r or k, where it counts.
    """
    if _C is None or size > MAX_SIZE:
        return False
    for t in tensors:
        if not (t.is_cpu and t.dtype is torch.float32 and t.is_contiguous() and plain(t)):
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
        _addresses(scored),
        [0 if t is None else _address(t) for t in grads],
        _addresses(masks),
        *_addresses((exp_avg, exp_unc, kept)),
        beta1,
        beta2,
        scoring,
        -1 if budget is None else budget,
    )


def penalty(tensors: Sequence[Tensor], squared: bool, weight: float) -> tuple[Tensor, tuple[list[int], Tensor]]:
    """(value times weight, saved) for v, u, V and U of each layer; `saved` is what `penalty_backward` needs."""
    sizes = _sizes(tensors)
    saved = tensors[0].new_empty(sum([2 * k * (k + r) for r, k in zip(sizes[2::4], sizes[3::4], strict=True)]))
    value = _C.cpu_lora2_penalty(sizes, _addresses(tensors), saved.data_ptr(), squared, torch.get_num_threads())
    return saved.new_tensor(weight * value), (sizes, saved)


def penalty_backward(tensors: Sequence[Tensor], saved: tuple[list[int], Tensor], scale: Tensor) -> Sequence[Tensor]:
    """The gradients of `tensors` times scale."""
    sizes, saved = saved
    places: dict[torch.Size, list[int]] = {}
    for place, t in enumerate(tensors):
        places.setdefault(t.shape, []).append(place)
    grads: list[Tensor | None] = [None] * len(tensors)
    # NOTE: one allocation, for several are given back to the system and paged in anew at every step; and by shape, so
    # that a gradient is made by a single view.
    counts = [len(group) * shape.numel() for shape, group in places.items()]
    buffers = saved.new_empty(sum(counts)).split(counts)
    for (shape, group), buffer in zip(places.items(), buffers, strict=True):
        for place, grad in zip(group, buffer.view(len(group), *shape).unbind(), strict=True):
            grads[place] = grad
    addresses = _addresses(tensors), saved.data_ptr(), scale.item(), _addresses(grads)
    _C.cpu_lora2_penalty_backward(sizes, *addresses, torch.get_num_threads())
    return grads


def _sizes(tensors: Sequence[Tensor]) -> list[int]:
    sizes = []
    for v, u, V in zip(tensors[::4], tensors[1::4], tensors[2::4], strict=True):
        sizes += (v.shape[1], V.shape[0], *u.shape)
    return sizes


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [_address(t) for t in tensors]


def _address(t: Tensor) -> int:
    address = t.data_ptr()
    if not address:
        raise ValueError(f"a tensor of shape {tuple(t.shape)} of the LoRA² layers has no memory: its storage was freed")
    return address
