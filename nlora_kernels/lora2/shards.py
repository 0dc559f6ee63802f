"""LoRA²'s tensors where an engine keeps a shard of each on every rank: whole for a moment, by one collective."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..internals import plain_apply
from ..layers import engines
from ..layers.engines import slices
from . import flat, zero


def is_apart(t: Tensor) -> bool:
    """Whether an engine holds more than one copy or less than one of it on a rank, so that it is written by `write`."""
    return engines.is_dtensor(t) or zero.owns(t) or isinstance(t, flat.Flattened)


def is_whole(t: Tensor) -> bool:
    """Whether a rank has all of it at rest."""
    return not (isinstance(t, flat.Flattened) or engines.is_at_rest(t))


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with every DTensor and what ZeRO-3 and FSDP1 have in parts whole, the same on all ranks; plain ones
    as they are.

    One all-reduce for all of a mesh and dtype, to be called on every rank alike. What is gathered can be
    differentiated: gradients, which must be the same on all ranks, are cut into shards again without a word between
    them.
    """
    tensors = flat.gathered(zero.gathered(tensors))
    places = [place for place, t in enumerate(tensors) if engines.is_dtensor(t)]
    if not places:
        return list(tensors)
    whole = list(tensors)
    for place, t in zip(places, _gathered(*[tensors[place] for place in places]), strict=True):
        whole[place] = t
    return whole


@torch.no_grad()
def write(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Puts what `gathered` gave, changed in place since and the same on all ranks, into the shards it came from."""
    for t, value in zip(tensors, values, strict=True):
        if engines.is_dtensor(t):
            t.to_local().copy_(value[slices(t)])
        elif isinstance(t, flat.Flattened):
            t.values.copy_(value.reshape(-1)[t.range])
        elif zero.owns(t):
            zero.write(t, value)


class _Gathered(torch.autograd.Function):
    """Arguments: DTensors."""

    @staticmethod
    def forward(ctx, *tensors):
        # Kept for where their parts lie, not for what is in them.
        ctx.tensors = tensors
        groups: dict[tuple, list[int]] = {}
        for place, t in enumerate(tensors):
            groups.setdefault((t.device_mesh, t.dtype), []).append(place)
        whole: list[Tensor] = [t for t in tensors]
        for (mesh, _), places in groups.items():
            sizes = [tensors[place].numel() for place in places]
            local = tensors[places[0]].to_local()
            flat = local.new_zeros(sum(sizes))
            for place, part in zip(places, flat.split(sizes), strict=True):
                t = tensors[place]
                whole[place] = part.view(t.shape)
                if _is_first_replica(t):
                    whole[place][slices(t)] = t.to_local()
            # A sum of one value and zeros is that value, in whatever order.
            for dim in range(mesh.ndim):
                torch.distributed.all_reduce(flat, group=mesh.get_group(dim))
        return tuple(whole)

    @staticmethod
    def backward(ctx, *grads):
        from torch.distributed.tensor import DTensor

        found = []
        for t, grad in zip(ctx.tensors, grads, strict=True):
            options = {"run_check": False, "shape": t.shape, "stride": t.stride()}
            found.append(DTensor.from_local(grad[slices(t)].contiguous(), t.device_mesh, t.placements, **options))
        return tuple(found)


_gathered = plain_apply(_Gathered)


def _is_first_replica(t: Tensor) -> bool:
    """Whether of all ranks that hold the same part this is the first."""
    coordinate = t.device_mesh.get_coordinate()
    return not any(place for place, kind in zip(coordinate, t.placements, strict=True) if kind.is_replicate())
