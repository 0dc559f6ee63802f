"""The base weight under a residual adapter: what has left it, and that it comes back."""

import contextlib
import copy

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from nlora_kernels.peft import NLoraConfig
from python_tests.peft.adapters import (
    adapted,
    adapter_layers,
    close,
    config,
    logits,
    reference_delta,
    reference_logits,
    residual_layers,
)
from python_tests.tiny import llama, perturb, tokens


def test_reading_the_weight_gathers_its_shards(monkeypatch):
    """DeepSpeed's stage 3 leaves an empty weight outside of its gathering context."""
    model = nn.Sequential(nn.Linear(8, 8))
    weight = model[0].weight.detach().clone()
    model[0].weight.data = weight.new_zeros(8, 8)

    @contextlib.contextmanager
    def gathered(parameter, **options):
        parameter.data.copy_(weight)
        yield
        weight.copy_(parameter.data)
        parameter.data.zero_()

    original = weight.clone()
    monkeypatch.setattr("nlora_kernels.peft.nlora.gather_params_ctx", gathered)
    model = peft.get_peft_model(model, NLoraConfig(r=2, target_modules=["0"], residual=True, lora_alpha=2))
    layer = model.base_model.model[0]
    assert torch.equal(layer.lora_A["default"].weight, original[:2])
    close(weight, original - original[:, :2] @ original[:2, :2] @ original[:2])


@pytest.mark.parametrize("again", ["nlora_residual", "nlora", "lora"])
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_made_anew_under_its_name_leaves_nothing_of_the_old_one(again):
    base = llama()
    model = peft.get_peft_model(copy.deepcopy(base), config("nlora_residual"))
    perturb(model)
    model = peft.get_peft_model(model.base_model.model, config(again))
    fresh = peft.get_peft_model(copy.deepcopy(base), config(again))
    close(logits(model), reference_logits(base, model, tokens()) if again == "lora" else logits(fresh))
    close(logits(model.merge_and_unload()) if again == "lora" else logits(model.unload()), logits(base))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("select", ["leading", "uniform"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_16_bit_residual(dtype, select, low_cpu_mem_usage, tmp_path):
    """At step 0, loaded, disabled and unloaded: at most twice what rounding W once changes."""
    base = llama(dtype)
    model = peft.get_peft_model(copy.deepcopy(base), config("nlora_residual", select=select))
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    for name, layer in loaded.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        W = base.get_submodule(name).weight.double()
        s, A0, N0, B0 = (layer.initial_scaling["default"], *(t.double() for t in layer._initial("default")))
        residual = W - s * B0 @ N0 @ A0
        rounding = (residual.to(dtype).double() - residual).abs().max()
        assert (layer.get_base_layer().weight.double() - residual).abs().max() <= 2 * rounding
    for kept in ("lora_A0", "lora_N0", "lora_B0"):
        for ours, theirs in zip(adapter_layers(model), adapter_layers(loaded), strict=True):
            assert torch.equal(getattr(ours, kept)["default"].weight, getattr(theirs, kept)["default"].weight)
    before = {name: p.double() for name, p in base.named_parameters()}
    for name, p in loaded.unload().named_parameters():
        spacing = torch.finfo(dtype).eps * before[name].abs().max()
        assert (p.double() - before[name]).abs().max() <= 2 * spacing


def test_loading_the_same_residual_again_leaves_the_weight_bitwise(tmp_path):
    model = adapted(llama(torch.bfloat16), "nlora_residual")
    model.save_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    model.load_adapter(tmp_path, "default", is_trainable=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_loading_a_whole_state_dict_brings_the_residual_weight_along(tmp_path):
    model = adapted(llama(), "nlora_residual", select="uniform", select_seed=1)
    other = peft.get_peft_model(llama(), config("nlora_residual", select="uniform"))
    other.load_state_dict(model.state_dict())
    close(logits(other), logits(model), atol=1e-6)
    with other.disable_adapter():
        close(logits(other), logits(llama()))


def test_loading_another_residual_exchanges_the_products(base, tmp_path):
    model = adapted(base, "nlora_residual", select="uniform", select_seed=1)
    model.save_pretrained(tmp_path)
    other = adapted(base, "nlora_residual", select="uniform", select_seed=2)
    ours, theirs = (adapter_layers(m)[0].lora_A0["default"].weight for m in (model, other))
    assert not torch.equal(ours, theirs)
    other.load_adapter(tmp_path, "default")
    close(logits(other), logits(model))
    with other.disable_adapter():
        close(logits(other), logits(base))
    close(logits(other.unload()), logits(base))


def test_residual_weights_with_a_second_user_are_refused():
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="a base weight of its own"):
        peft.get_peft_model(model, NLoraConfig(r=2, residual=True, target_modules=["q_proj", "lm_head"]))
    assert not adapter_layers(model)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(ValueError, match="layers.0.mlp.up_proj and model.layers.1.mlp.up_proj share one"):
        peft.get_peft_model(model, NLoraConfig(r=2, residual=True, target_modules="all-linear"))
    assert not adapter_layers(model)


def test_the_delta_of_a_residual_adapter_is_what_it_adds_to_the_base_model(base):
    model = adapted(base, "nlora_residual")
    for layer in adapter_layers(model):
        delta = reference_delta(layer, "default")
        close(layer.get_delta_weight("default"), delta.T if layer.fan_in_fan_out else delta)


def test_core_residual_leaves_the_weight_alone():
    base = llama()
    model = adapted(base, "inttune_residual")
    assert not residual_layers(model)
    for name, p in model.unload().named_parameters():
        assert torch.equal(p, base.get_parameter(name))
