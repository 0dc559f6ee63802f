"""Dropping the pruned singular values for good."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..commit import attributes, commit
from ..patterns import exact
from . import shards
from .layers import Layer, layers


@torch.no_grad()
def compress(model: nn.Module) -> dict[str, int]:
    """E, u, U ← E[I], u[I, :], U[:, I] with I = {i : mask_i ≠ 0}, in every LoRA² layer; returns {module name: new r}.

    The function stays what it was, and so does the scaling, alpha / r of the initial r. A layer left with no singular
    value keeps one that is zero. Of a PEFT model the configuration follows: rank_pattern and alpha_pattern name every
    layer, so that saving and loading restore ranks and scaling. The parameters are new ones: an optimizer and a
    `RankAllocator` made before do not know them. An interrupt comes before all of it or after.

    The experts of a mixture, whose values lie in one tensor, keep one rank: that of the expert which has most left. The
    others are filled up with pruned values, whose mask stays 0.

    Raises ValueError if the model has no LoRA² layers, or an engine shards them: what it saved can be compressed.
    """
    found = layers(model)
    if sharded := [layer.name for layer in found if not all(map(shards.is_whole, layer.scored))]:
        raise ValueError(f"the LoRA² adapters must be whole on every rank, got an engine's shards on {sharded[0]}")
    shrunk = {(layer.name, layer.adapter): _shrink(layer) for layer in found}
    steps = [step for each in shrunk.values() for step in each.steps]
    for config, names in _configurations(model, found):
        of = {exact(name): shrunk[layer.name, layer.adapter] for name, layer in names.items()}
        ranks = {name: each.r for name, each in of.items()}
        alphas = {name: each.alpha for name, each in of.items()}
        steps.append(partial(vars(config).update, rank_pattern=ranks, alpha_pattern=alphas))
    commit(*steps)
    return {layer.name: shrunk[layer.name, layer.adapter].r for layer in found}


class _Shrunk(NamedTuple):
    r: int
    alpha: float
    # For `commit`: they put it in place.
    steps: list[Callable[[], object]]


def _shrink(layer: Layer) -> _Shrunk:
    module, adapter, mask = layer.module, layer.adapter, layer.lora_mask
    kept = _kept(mask.unflatten(0, (layer.count, -1)))
    E = layer.lora_E * mask
    new = {"lora_E": E[kept], "lora_u": layer.lora_u[kept], "lora_U": layer.lora_U[:, kept].contiguous()}
    new = {name: nn.Parameter(t, requires_grad=getattr(layer, name).requires_grad) for name, t in new.items()}
    mask, r = mask[kept], len(kept) // layer.count
    if adapter is None:
        alpha = module.alpha * (r / module.r)
        steps = [attributes(module, r=r, alpha=alpha), partial(module._parameters.update, new)]
        return _Shrunk(r, alpha, [*steps, partial(module._buffers.update, lora_mask=mask)])
    root = math.sqrt if module.use_rslora[adapter] else lambda value: value
    alpha = module.lora_alpha[adapter] * (root(r) / root(module.r[adapter]))
    steps = [partial(module.r.update, {adapter: r}), partial(module.lora_alpha.update, {adapter: alpha})]
    for name, tensor in new.items():
        holder = getattr(module, name)[adapter]
        steps.append(partial(holder._parameters.update, weight=tensor))
        if isinstance(holder, nn.Linear):
            out_features, in_features = tensor.shape
            steps.append(attributes(holder, out_features=out_features, in_features=in_features))
    return _Shrunk(r, alpha, [*steps, partial(module.lora_mask[adapter]._buffers.update, weight=mask)])


def _kept(mask: Tensor) -> Tensor:
    """Where the values that stay lie among those of every layer, from the mask (layers, r) of layers of one rank.

    Of each the first that are not pruned, and if others have more left, pruned ones after them.
    """
    r = max(1, int(mask.count_nonzero(1).max()))
    own = (mask == 0).int().argsort(dim=1, stable=True)[:, :r]
    first = torch.arange(0, mask.numel(), mask.shape[1], device=mask.device)
    return (own + first[:, None]).flatten()


def _configurations(model: nn.Module, found: list[Layer]):
    """(configuration, {name within the model that was adapted: layer}) of every PEFT adapter among the layers."""
    # PEFT leaves its configurations on the model it adapts, and transformers too; a tuner around it has the same.
    held = {name: vars(module).get("peft_config") for name, module in model.named_modules()}
    configs = {name: config for name, config in held.items() if isinstance(config, dict)}
    by_owner: dict[tuple[str, str], list[Layer]] = {}
    for layer in found:
        owners = [name for name, config in configs.items() if layer.adapter in config]
        owners = [name for name in owners if not name or layer.name.startswith(f"{name}.")]
        if owners:
            by_owner.setdefault((max(owners, key=len), layer.adapter), []).append(layer)
    for (owner, adapter), adapted in by_owner.items():
        prefix = f"{owner}." if owner else ""
        yield configs[owner][adapter], {layer.target.removeprefix(prefix): layer for layer in adapted}
