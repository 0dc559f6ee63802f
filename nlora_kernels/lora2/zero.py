"""LoRA²'s tensors where DeepSpeed trains them: the gradients it frees, its own copy of the values, ZeRO-3's parts."""

import sys
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..layers.engines import shape


def owns(t: Tensor) -> bool:
    """Whether an engine of DeepSpeed trains this parameter, under whatever stage of ZeRO."""
    return "deepspeed" in sys.modules and (hasattr(t, "ds_id") or hasattr(t, "_hp_mapping"))


def gathered(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, with a copy that can be differentiated of those that ZeRO-3 holds in parts, gathered together."""
    parts = {id(t): t for t in tensors if shape(t) != t.shape}
    if not parts:
        return list(tensors)
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parts.values())):
        return [t.clone() if id(t) in parts else t for t in tensors]


@torch.no_grad()
def write(t: Tensor, value: Tensor) -> None:
    """Gives a parameter the value, the same on all ranks, here and in the copy that the optimizer steps.

    That has more bits where the parameter is in half precision: what is the value already, rounded, keeps them.
    """
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

    if not hasattr(t, "ds_id"):
        t.copy_(value)
        # None where another rank steps the whole of it.
        if (mapping := t._hp_mapping) is not None:
            place, master = mapping.lp_fragment_address, mapping.get_hp_fragment()
            master.copy_(_changed(master, value.reshape(-1).narrow(0, place.start, place.numel)))
        return
    if shape(t) == t.shape:
        t.copy_(value)
    size = t.ds_tensor.numel()
    # The last parts are padded to the size of the others.
    part = value.new_zeros(size)
    own = value.reshape(-1)[size * torch.distributed.get_rank(t.ds_process_group) :][:size]
    part[: own.numel()] = own
    t.ds_tensor.copy_(part)
    master = safe_get_local_fp32_param(t)
    # Of what does not train there is none.
    if master is not None:
        safe_set_local_fp32_param(t, _changed(master, part))


def _changed(master: Tensor, value: Tensor) -> Tensor:
    """The value, with the bits of `master` wherever that rounds to it."""
    value = value.to(master.device)
    return torch.where(master.to(value.dtype) == value, master, value.to(master.dtype))


class Gradients:
    """The gradients of parameters, summed over the backwards since they were last taken, as means over the ranks.

    DeepSpeed lets go of a gradient as soon as it has reduced it, and has stepped where its engine returns. They are
    caught on their way to it, scaled as the loss was.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        # By their places among the tensors.
        self._sums: dict[int, Tensor] = {}
        for place, t in enumerate(tensors):
            t.register_hook(partial(self._add, place))

    def take(self) -> list[Tensor | None]:
        """All of them, by one sum over the ranks, or as many times None where no backward was made."""
        sums, self._sums = self._sums, {}
        if not sums:
            return [None for _ in self.tensors]
        like = next(iter(sums.values()))
        parts = [sums[place] if place in sums else like.new_zeros(shape(t)) for place, t in enumerate(self.tensors)]
        flat = torch.cat([part.reshape(-1) for part in parts])
        group = getattr(self.tensors[0], "ds_process_group", None)
        torch.distributed.all_reduce(flat, group=group)
        flat /= torch.distributed.get_world_size(group)
        found = flat.split([part.numel() for part in parts])
        return [mean.view(part.shape) for mean, part in zip(found, parts, strict=True)]

    def drop(self) -> None:
        """Forgets them."""
        self._sums = {}

    def _add(self, place: int, grad: Tensor) -> None:
        # A copy: what is passed on is DeepSpeed's to reuse.
        self._sums[place] = self._sums[place] + grad if place in self._sums else grad.clone()
