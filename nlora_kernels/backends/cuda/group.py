"""Layers that share x: their outputs in one launch, and the gradient of x, one sum over all of them, in another.

    yᵢ = x·Wᵢᵀ + Tᵢ·Fᵢᵀ + biasᵢ,  Tᵢ = x·Aᵢᵀ          dx = Σᵢ dyᵢ·Wᵢ + Hᵢ·Aᵢ,  [Hᵢ | Gᵢ] = dyᵢ·[Fᵢ | Bᵢ]

A layer without an adapter goes along. Gradients of parameters are those of each layer by itself, in launches that all
layers share.
"""

from collections.abc import Sequence

from torch import Tensor

from ..base import Call, Grads, Needs
from ..native import _C
from . import launch

# Layers in one launch at most: kMostProducts of csrc/cuda/common/schedule.h.
MOST = 4


def takes(calls: Sequence[Call], rows: int) -> bool:
    """Whether calls that are supported one by one are computed together."""
    return (
        rows > 0
        and 1 < len(calls) <= MOST
        and any(call.lora_A is not None for call in calls)
        and all(call.lora_A is not None or _readable(call.weight) for call in calls)
    )


def _readable(weight: Tensor) -> bool:
    """Whether the kernels can read the weight of a layer without an adapter where it lies."""
    return all(size and size % 8 == 0 for size in weight.shape) and launch.unaligned("weight", weight) is None


def forward(calls: Sequence[Call]) -> list[tuple[Tensor, Tensor | None]]:
    x = launch.aligned(calls[0].x)
    M, K = x.shape
    ys = [x.new_empty(M, len(call.weight)) for call in calls]
    Ts = [None if call.lora_A is None else x.new_empty(M, len(call.lora_A)) for call in calls]
    sizes = [_C.cuda_forward_bytes(K, *call.lora_B.shape) for call in calls if call.lora_A is not None]
    workspace = x.new_empty(sum(sizes) // x.element_size())
    biases, scalings = [launch.aligned(call.bias) for call in calls], [call.scaling for call in calls]
    _C.cuda_forward_group(launch.queue(x), x, *_operands(calls), biases, ys, Ts, workspace, scalings)
    return list(zip(ys, Ts, strict=True))


def backward(
    calls: Sequence[Call], dys: Sequence[Tensor], Ts: Sequence[Tensor | None], needs: Sequence[Needs]
) -> tuple[Tensor | None, list[Grads]]:
    """The gradient of x, and of each call the others."""
    (M, _), K, queue = dys[0].shape, calls[0].weight.shape[1], launch.queue(dys[0])
    dx = dys[0].new_empty(M, K) if needs[0].x else None
    grads = [launch.grads(call, dy, need._replace(x=False)) for call, dy, need in zip(calls, dys, needs, strict=True)]
    wanted = [(need.lora_A, need.lora_B, need.lora_N) for need in needs]
    own = [i for i, of in enumerate(wanted) if needs[0].x or any(of)]
    if own:
        members = [calls[i] for i in own]
        sizes = [
            _C.cuda_backward_bytes(queue, M, K, *calls[i].lora_B.shape, *wanted[i])
            for i in own
            if calls[i].lora_A is not None
        ]
        workspace = dys[0].new_empty(sum(sizes) // dys[0].element_size())
        x = next((launch.aligned(call.x) for call in members if call.x is not None), None)
        given = [launch.aligned(dys[i]) for i in own], x, [launch.aligned(Ts[i]) for i in own]
        made = [[getattr(grads[i], name) for i in own] for name in ("lora_A", "lora_B", "lora_N")]
        scalings = [call.scaling for call in members]
        _C.cuda_backward_group(queue, *given, *_operands(members), dx, *made, workspace, scalings)
    return dx, grads


def _operands(calls: Sequence[Call]) -> tuple[list[Tensor | None], ...]:
    """weight, lora_A, lora_B and lora_N of each."""
    return tuple([call[i] for call in calls] for i in range(1, 5))
