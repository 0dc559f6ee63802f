"""Adapters of every method on tiny models, and what they must compute: their products added to the weights by hand."""

import copy

import peft
import torch
from peft.tuners.lora import LoraLayer

from nlora_kernels.peft import LoRA2Config, NLoraConfig
from python_tests.tiny import perturb, tokens

METHODS = {
    "lora": lambda **kw: NLoraConfig(init_lora_weights=True, **kw),
    "slora": lambda **kw: NLoraConfig(init_lora_weights="slora", **kw),
    "slora_gaussian": lambda **kw: NLoraConfig(init_lora_weights="slora_gaussian", **kw),
    "nlora": lambda **kw: NLoraConfig(**kw),
    "nlora_optimal": lambda **kw: NLoraConfig(core="optimal", select="pivoted", **kw),
    "nlora_residual": lambda **kw: NLoraConfig(residual=True, **kw),
    "inttune": lambda **kw: NLoraConfig(train="core", **kw),
    "inttune_residual": lambda **kw: NLoraConfig(train="core", residual=True, **kw),
    "lora2": lambda **kw: LoRA2Config(**{"k": 2} | kw),
}
# One for every set of matrices with a core between lora_A and lora_B.
CORE_METHODS = ("nlora", "nlora_residual", "inttune_residual", "lora2")


def config(method: str, **options):
    return METHODS[method](**{"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **options})


def adapted(base, method, **options):
    model = peft.get_peft_model(copy.deepcopy(base), config(method, **options))
    perturb(model)
    return model


def logits(model, ids=None, **options):
    with torch.no_grad():
        return model(tokens() if ids is None else ids, **options).logits


def close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)


def adapter_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def residual_layers(model):
    return [layer for layer in adapter_layers(model) if layer.subtracted]


def reference_logits(base, model, ids, adapters=("default",)):
    """Logits of the untouched base model with every adapter's product added to its weights by hand."""
    plain = copy.deepcopy(base)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            for adapter in adapters:
                delta = reference_delta(layer, adapter)
                plain.get_submodule(name).weight.data += delta.T if layer.fan_in_fan_out else delta
    with torch.no_grad():
        return plain(ids).logits


def reference_delta(layer, adapter):
    s = layer.lora_alpha[adapter] / layer.r[adapter]
    if hasattr(layer, "lora_E"):
        v, u, E, U, V, mask = (getattr(layer, f"lora_{kind}")[adapter].weight for kind in [*"vuEUV", "mask"])
        return s * V @ U @ torch.diag(E * mask) @ u @ v
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    cores = getattr(layer, "lora_N", {})
    N = cores[adapter].weight if adapter in cores else torch.eye(len(A))
    if adapter not in getattr(layer, "lora_N0", {}):
        return s * B @ N @ A
    A0, B0 = (layer.lora_A0[adapter].weight, layer.lora_B0[adapter].weight) if adapter in layer.lora_A0 else (A, B)
    return s * (B @ N @ A - B0 @ layer.lora_N0[adapter].weight @ A0)
