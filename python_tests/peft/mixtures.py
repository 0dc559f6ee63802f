"""Adapters on the experts of tiny mixtures, and what they must add, by indices into the packed weights."""

import copy

import peft
import torch
from peft.tuners.lora import ParamWrapper

import nlora_kernels as nk
from nlora_kernels.layers import experts
from python_tests.peft.adapters import config
from python_tests.tiny import perturb, tokens

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
# Names of the layers that transformers 4 had.
LAYERS_BEFORE = {"mixtral": ["w1", "w2", "w3"], "qwen3_moe": ["gate_proj", "up_proj", "down_proj"]}


def adapted(base, method, **options):
    model = peft.get_peft_model(copy.deepcopy(base), config(method, **TARGETS | options))
    perturb(model)
    return model


def to_all_experts(model):
    """Has routers choose every expert: which of two that are nearly equal a token goes to is decided by rounding."""
    for router in (module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "num_experts")):
        router.top_k = router.num_experts
    return model


def counted(patch):
    """The arguments of every grouped product from now on."""
    made = []

    def counting(*args, **options):
        made.append(args)
        return nk.lora_grouped_linear(*args, **options)

    patch.setattr(experts, "lora_grouped_linear", counting)
    return made


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def gradients(model):
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(layer, name="default"):
    """s·B·N·A of every expert, as the parameter is stored, from the packed weights by indices."""
    s, E, r = layer.scaling[name], layer.num_experts, layer.r[name]
    deltas = []
    for e in range(E):
        if hasattr(layer, "lora_E"):
            v, u, values, U, V, mask = (getattr(layer, f"lora_{kind}")[name].weight for kind in [*"vuEUV", "mask"])
            own, k = slice(e * r, (e + 1) * r), layer.k[name]
            core = U[:, own] @ torch.diag(values[own] * mask[own]) @ u[own]
            deltas.append(s * V[:, e::E] @ core @ v[e * k : (e + 1) * k])
            continue

        def products(suffix, e=e):
            A, N, B = (
                getattr(layer, f"lora_{kind}")[name].weight if name in getattr(layer, f"lora_{kind}", {}) else None
                for kind in (f"A{suffix}", f"N{suffix}", f"B{suffix}")
            )
            A = (layer.lora_A[name].weight if A is None else A)[e * r : (e + 1) * r]
            B = (layer.lora_B[name].weight if B is None else B)[:, e::E]
            return B @ (torch.eye(r) if N is None else N[e * r : (e + 1) * r]) @ A

        delta = products("")
        if name in getattr(layer, "lora_N0", {}):
            delta = delta - products("0")
        deltas.append(s * delta)
    stacked = torch.stack(deltas)
    return stacked.transpose(1, 2) if layer.get_base_layer().is_transposed else stacked
