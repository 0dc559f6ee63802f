"""Dropping the pruned singular values for good."""

import math

import torch
from torch import nn

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
        # NOTE: PEFT takes the first pattern that matches the end of a name, so a name that ends another comes after it.
        names = dict(sorted(names.items(), key=lambda item: -len(item[0])))
        config.rank_pattern = {name: layer.module.r[layer.adapter] for name, layer in names.items()}
        config.alpha_pattern = {name: layer.module.lora_alpha[layer.adapter] for name, layer in names.items()}
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
        else:
            getattr(module, name)[adapter] = tensor
    return r


def _configurations(model: nn.Module, found: list[Layer]):
    """(configuration, {name within the base model: layer}) of every PEFT adapter among the layers."""
    for adapter in {layer.adapter for layer in found} - {None}:
        tuner = getattr(model, "base_model", model)
        prefix = "" if tuner is model else "base_model."
        prefix += "model."
        names = {la.name.removeprefix(prefix): la for la in found if la.adapter == adapter}
        if hasattr(tuner, "peft_config"):
            yield tuner.peft_config[adapter], names
