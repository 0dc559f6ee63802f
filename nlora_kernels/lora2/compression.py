"""Dropping the pruned singular values for good."""

import math

import torch
from torch import nn

from ..patterns import exact
from .layers import Layer, layers


@torch.no_grad()
def compress(model: nn.Module) -> dict[str, int]:
    """E, u, U ← E[I], u[I, :], U[:, I] with I = {i : mask_i ≠ 0}, in every LoRA² layer; returns {module name: new r}.

    The function stays what it was, and so does the scaling, alpha / r of the initial r. A layer left with no singular
    value keeps one that is zero. Of a PEFT model the configuration follows: rank_pattern and alpha_pattern name every
    layer, so that saving and loading restore ranks and scaling. The parameters are new ones: an optimizer and a
    `RankAllocator` made before do not know them.

    Raises ValueError if the model has no LoRA² layers.
    """
    found = layers(model)
    ranks = {layer.name: _shrink(layer) for layer in found}
    for config, names in _configurations(model, found):
        config.rank_pattern = {exact(name): la.module.r[la.adapter] for name, la in names.items()}
        config.alpha_pattern = {exact(name): la.module.lora_alpha[la.adapter] for name, la in names.items()}
    return ranks


def _shrink(layer: Layer) -> int:
    module, adapter, mask = layer.module, layer.adapter, layer.lora_mask
    kept = mask.nonzero().flatten()
    E = layer.lora_E * mask
    if not len(kept):
        kept = kept.new_zeros(1)
    new = {"lora_E": E[kept], "lora_u": layer.lora_u[kept], "lora_U": layer.lora_U[:, kept].contiguous()}
    new = {name: nn.Parameter(t, requires_grad=getattr(layer, name).requires_grad) for name, t in new.items()}
    new["lora_mask"] = mask[kept]
    r = len(kept)
    if adapter is None:
        module.alpha *= r / module.r
        module.r = r
    else:
        root = math.sqrt if module.use_rslora[adapter] else lambda value: value
        module.lora_alpha[adapter] *= root(r) / root(module.r[adapter])
        module.r[adapter] = r
    for name, tensor in new.items():
        if adapter is None:
            setattr(module, name, tensor)
            continue
        holder = getattr(module, name)[adapter]
        holder.weight = tensor
        if isinstance(holder, nn.Linear):
            holder.out_features, holder.in_features = tensor.shape
    return r


def _configurations(model: nn.Module, found: list[Layer]):
    """(configuration, {name within the model that was adapted: layer}) of every PEFT adapter among the layers."""
    # PEFT leaves its configurations on the model it adapts, and transformers too; a tuner around it has the same.
    held = {name: vars(module).get("peft_config") for name, module in model.named_modules()}
    configs = {name: config for name, config in held.items() if isinstance(config, dict)}
    by_owner: dict[tuple[str, str], dict[str, Layer]] = {}
    for layer in found:
        owners = [name for name, config in configs.items() if layer.adapter in config]
        owners = [name for name in owners if not name or layer.name.startswith(f"{name}.")]
        if owners:
            by_owner.setdefault((max(owners, key=len), layer.adapter), {})[layer.name] = layer
    for (owner, adapter), named in by_owner.items():
        prefix = f"{owner}." if owner else ""
        yield configs[owner][adapter], {name.removeprefix(prefix): la for name, la in named.items()}
