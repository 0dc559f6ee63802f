"""LoRA²'s tensors where FSDP1 has flattened them: of each a rank has a range of the values, one after another.

FSDP1 does not document where they lie: `FlatParameter` and its ranges are read here alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers import engines


class Flattened(NamedTuple):
    """The weight of a matrix that is an FSDP1 unit by itself, in the place of a tensor."""

    unit: nn.Module

    @property
    def shape(self) -> torch.Size:
        return self._flat._shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._local.dtype

    @property
    def device(self) -> torch.device:
        return self._local.device

    @property
    def values(self) -> Tensor:
        """Those that this rank has, to change in place."""
        return self._local[self._place].detach()

    @property
    def grad(self) -> Tensor | None:
        """The gradient of those."""
        flat = self._flat
        if flat._params is None:
            return None if flat.grad is None else flat.grad[self._place]
        grad = flat._params[0].grad
        return None if grad is None else grad.reshape(-1)

    @property
    def range(self) -> slice:
        """Which they are of all of its values."""
        info = self._flat._shard_param_infos[0]
        return slice(info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else slice(0)

    def gathered(self) -> Tensor:
        """A whole copy that can be differentiated, by a forward of the unit. Its gradient, the same on all ranks, FSDP1
        reduces together with that of the layers."""
        if self.unit._is_root is None:
            raise ValueError("the penalty of LoRA² must be computed after a forward of the model that FSDP1 wraps")
        return engines.gathered(self.unit, "weight")

    @property
    def _handle(self):
        return self.unit._handle

    @property
    def _flat(self) -> nn.Parameter:
        return self._handle.flat_param

    @property
    def _local(self) -> Tensor:
        # It has the other only from the first forward on.
        return getattr(self._flat, "_local_shard", self._flat)

    @property
    def _place(self) -> slice:
        info = self._flat._shard_param_infos[0]
        return slice(info.offset_in_shard, info.offset_in_shard + info.numel_in_shard) if info.in_shard else slice(0)


def gathered(tensors: Sequence[Tensor | Flattened]) -> list[Tensor]:
    """The tensors, with those that are flattened whole, the same on all ranks.

    Where gradients are recorded each by a forward of its unit; otherwise all by one sum.
    """
    whole = list(tensors)
    found = {place: t for place, t in enumerate(tensors) if isinstance(t, Flattened)}
    if torch.is_grad_enabled():
        parts = [t.gathered() for t in found.values()]
    else:
        parts = _summed(list(found.values()), [t.values for t in found.values()])
    for place, part in zip(found, parts, strict=True):
        whole[place] = part
    return whole


def gradients(tensors: Sequence[Tensor | Flattened]) -> list[Tensor | None]:
    """The gradients of the tensors, those of flattened ones whole by one sum, or None where no backward was made."""
    grads = [t.grad for t in tensors]
    found = {place: t for place, t in enumerate(tensors) if isinstance(t, Flattened)}
    # A rank that has none of the values cannot tell, and takes part.
    if not found or all(grads[place] is None and len(t.values) for place, t in found.items()):
        return grads
    for place, grad in zip(found, _summed(list(found.values()), [grads[place] for place in found]), strict=True):
        grads[place] = grad
    return grads


@torch.no_grad()
def _summed(tensors: Sequence[Flattened], parts: Sequence[Tensor | None]) -> list[Tensor]:
    """Tensors like `tensors`, of which every rank has its range as a part, by one sum for all of a dtype."""
    groups: dict[tuple, list[int]] = {}
    for place, t in enumerate(tensors):
        groups.setdefault((t._handle.process_group, t.dtype), []).append(place)
    whole: dict[int, Tensor] = {}
    for (group, dtype), places in groups.items():
        handle, sizes = tensors[places[0]]._handle, [tensors[place].shape.numel() for place in places]
        # On the device of the group, which need not be that of values that are offloaded.
        flat = torch.zeros(sum(sizes), dtype=dtype, device=handle.device)
        for place, values in zip(places, flat.split(sizes), strict=True):
            whole[place] = values
            if parts[place] is not None:
                values[tensors[place].range] = parts[place].reshape(-1).to(values)
        # Where they are not sharded every rank has all of them.
        if handle.uses_sharded_strategy:
            torch.distributed.all_reduce(flat, group=group)
    return [whole[place].to(t.device).view(t.shape) for place, t in enumerate(tensors)]
