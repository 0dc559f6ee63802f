"""A residual adapter's effect is s·(B·N·A − B₀·N₀·A₀), whatever is done with it: scaled, merged, loaded, offloaded."""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft import get_base_model_state_dict, set_base_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import nlora_kernels as nk
from nlora_kernels.checkpoint import WEIGHTS
from nlora_kernels.peft import NLoraConfig
from python_tests.peft.adapters import adapted, adapter_layers, close, config, logits, reference_logits
from python_tests.tiny import llama, perturb, tokens


def subtracted(model) -> set:
    return {layer.subtracted for layer in adapter_layers(model)}


# Several on one layer


@pytest.mark.parametrize("other", ["nlora_residual", "inttune_residual", "nlora"])
def test_a_second_adapter_starts_from_the_base_weight_and_each_has_its_own_effect(base, other):
    model = adapted(base, "nlora_residual")
    model.add_adapter("second", config(other, select="uniform"))
    fresh = peft.get_peft_model(copy.deepcopy(base), config(other, select="uniform"), adapter_name="second")
    for ours, theirs in zip(adapter_layers(model), adapter_layers(fresh), strict=True):
        close(ours.lora_A["second"].weight, theirs.lora_A["second"].weight, atol=1e-6)
    perturb(model, adapter="second")
    model.eval()
    assert subtracted(model) == {"default"}
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        expected = reference_logits(base, model, tokens(), active)
        close(logits(model), expected)
        model.merge_adapter()
        assert subtracted(model) == {None}
        close(logits(model), expected)
        model.unmerge_adapter()
        assert subtracted(model) == {"default"}
        close(logits(model), expected)
    with model.disable_adapter():
        close(logits(model), logits(base))
    names, ids = ["second", "__base__", "default"], tokens()
    expected = [
        reference_logits(base, model, ids[row : row + 1], [name] if name != "__base__" else [])
        for row, name in enumerate(names)
    ]
    close(logits(model, adapter_names=names), torch.cat(expected))
    model.delete_adapter("default")
    assert subtracted(model) == {"second" if other == "nlora_residual" else None}
    close(logits(model), reference_logits(base, model, tokens(), ["second"]))
    close(logits(model.unload()), logits(base))


@pytest.mark.parametrize("method", ["nlora_residual", "inttune_residual"])
@pytest.mark.parametrize("loaded", [False, True], ids=["trained", "loaded"])
def test_a_reference_copied_by_parameter_name_is_the_policy(method, loaded, tmp_path):
    """As the trainers of TRL make the reference of DPO: every parameter named for one adapter, copied to another."""
    model = adapted(llama(), method, select="uniform")
    if loaded:
        model.save_pretrained(tmp_path)
        model = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    policy = logits(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    perturb(model, adapter="default")
    model.set_adapter("ref")
    close(logits(model), policy)


# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("merged", ["default", "other"])
def test_merging_again_and_again_does_not_drift(dtype, merged):
    """No further than PEFT's PiSSA, whose first cycle rounds and whose next ones change nothing."""

    def drift(options, cycles):
        torch.manual_seed(0)
        model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 48)).to(dtype), options)
        model.add_adapter("other", NLoraConfig(r=4, target_modules=["0"]) if cycles else options)
        perturb(model, 0.02)
        weight = model.base_model.model[0].get_base_layer().weight
        before = weight.detach().clone()
        for _ in range(cycles or 1):
            model.merge_adapter([merged] if cycles else ["default"])
            model.unmerge_adapter()
        return (weight - before).abs().max()

    ours = NLoraConfig(r=4, residual=True, target_modules=["0"])
    once, often = drift(ours, 1), drift(ours, 300)
    assert often == once
    if dtype == torch.float32 and merged == "default":
        assert often <= drift(peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["0"]), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_a_module_again_and_again_does_not_drift(dtype):
    layer = nk.NLoraLinear.from_linear(nn.Linear(64, 48).to(dtype), 4, residual=True)
    perturb(layer, 0.02)
    layer.merge()
    layer.unmerge()
    once = layer.base.weight.clone()
    for _ in range(100):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.base.weight, once)


def test_scaling_a_module_scales_its_whole_effect():
    linear = nn.Linear(12, 10)
    x = torch.randn(5, 12)
    before = linear(x)
    layer = nk.NLoraLinear.from_linear(linear, 4, alpha=6, residual=True)
    perturb(layer)
    effect = layer(x) - before
    for factor in (0.0, 0.5, 2.0):
        layer.scaling = factor * layer.initial_scaling
        close(layer(x), before + factor * effect)
        layer.merge()
        close(layer(x), before + factor * effect)
        layer.unmerge()


# Loading


@pytest.mark.parametrize("with_base", [False, True], ids=["", "with_base"])
def test_loading_another_product_into_a_module(with_base):
    linear = nn.Linear(12, 10)
    made = nk.NLoraLinear.from_linear(copy.deepcopy(linear), 4, select="norm", residual=True)
    other = nk.NLoraLinear.from_linear(copy.deepcopy(linear), 4, residual=True)
    perturb(made)
    state = {name: tensor for name, tensor in made.state_dict().items() if with_base or not name.startswith("base.")}
    other.load_state_dict(state, strict=with_base)
    x = torch.randn(5, 12)
    close(other(x), made(x))
    other.scaling = 0.0
    close(other(x), linear(x))


FAILURES = "size mismatch|lacks|cannot be read|deserializing"


@pytest.mark.parametrize("method", ["nlora_residual", "inttune_residual"])
def test_a_whole_state_dict_that_a_model_on_the_meta_device_is_assigned_has_the_product_out_already(method):
    base, x = nn.Sequential(nn.Linear(12, 10)), torch.randn(5, 12)
    model, before = adapted(base, method, target_modules=["0"]), base(x)
    state, expected = copy.deepcopy(model.state_dict()), model(x)
    with torch.device("meta"):
        loaded = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), config(method, target_modules=["0"]))
    loaded.load_state_dict(state, assign=True)
    for mode in (True, False):
        close(loaded.train(mode)(x), expected)
    with loaded.disable_adapter():
        close(loaded(x), before)
    close(loaded.unload()(x), before)


@pytest.mark.parametrize("damage", ["missing", "shape", "truncated"])
def test_a_load_that_fails_changes_nothing(damage, tmp_path):
    adapted(llama(), "nlora_residual", select="uniform", select_seed=1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    last = sorted(tensors)[-1]
    if damage == "truncated":
        (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-50])
    else:
        tensors[last] = torch.zeros(7, 5)
        save_file({key: t for key, t in tensors.items() if damage == "shape" or key != last}, tmp_path / WEIGHTS)
    model = adapted(llama(), "nlora_residual", select="uniform", select_seed=2)
    before = copy.deepcopy(model.state_dict())
    for name in ("default", "new"):
        with pytest.raises((RuntimeError, ValueError, SafetensorError), match=FAILURES):
            model.load_adapter(tmp_path, name)
        after = model.state_dict()
        assert list(model.peft_config) == ["default"]
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    base = llama()
    with pytest.raises((RuntimeError, ValueError), match=FAILURES):
        peft.PeftModel.from_pretrained(base, tmp_path)
    assert not adapter_layers(base) and not hasattr(base, "peft_config")
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in llama().state_dict().items())


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.base_layer.weight", "lm_head.weight"])
def test_a_state_dict_that_does_not_fit_changes_nothing(key):
    model = adapted(llama(), "nlora_residual", select="uniform", select_seed=1)
    before = copy.deepcopy(model.state_dict())
    other = adapted(llama(), "nlora_residual", select="uniform", select_seed=2).state_dict()
    other[f"base_model.model.{key}"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("is_trainable", [False, True], ids=["", "trainable"])
@pytest.mark.parametrize("method", ["nlora_residual", "inttune_residual"])
@pytest.mark.usefixtures("adapters_of_transformers")
def test_transformers_loads_what_is_kept(method, is_trainable, tmp_path):
    model = adapted(llama(), method, select="uniform", select_seed=1)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    # Another matrix than the one that an initialisation from this base model would make.
    changed = {name: 1.1 * tensor if "0.weight" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, tmp_path / WEIGHTS)
    expected = logits(peft.PeftModel.from_pretrained(llama(), tmp_path))
    base = llama()
    info = base.load_adapter(str(tmp_path), is_trainable=is_trainable)
    assert not info.missing_keys and not info.unexpected_keys
    close(logits(base), expected)
    base.train()
    base.eval()
    assert subtracted(base) == {"default" if method == "nlora_residual" else None}
    close(logits(base), expected)
    assert not any(p.requires_grad for name, p in base.named_parameters() if "0.default" in name)
    base.disable_adapters()
    close(logits(base), logits(llama()))


def test_the_state_dict_of_the_base_model_is_refused_while_a_product_is_out_of_it():
    base = llama()
    model = adapted(base, "nlora_residual")
    with pytest.raises(ValueError, match="is W − s·B₀·N₀·A₀ while the residual adapter 'default' is there"):
        get_base_model_state_dict(model)
    with pytest.raises(ValueError, match="or after unload"):
        set_base_model_state_dict(model, base.state_dict())
    for name, tensor in model.unload().state_dict().items():
        close(tensor, base.state_dict()[name])
    plain = adapted(base, "nlora")
    assert get_base_model_state_dict(plain).keys() == base.state_dict().keys()


@pytest.mark.parametrize("method", ["nlora", "nlora_residual", "inttune_residual"])
def test_a_base_model_partly_on_disk(method, tmp_path, monkeypatch):
    # Where PEFT writes what it merged is relative.
    monkeypatch.chdir(tmp_path)
    devices = {"model.layers.1": "disk"} | dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    llama().save_pretrained(tmp_path / "base")
    model = adapted(llama(), method)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map=devices, offload_folder=tmp_path / "a")
    devices = {f"base_model.model.{name}": device for name, device in devices.items()}
    loaded = peft.PeftModel.from_pretrained(
        base, tmp_path / "adapter", device_map=devices, offload_dir=str(tmp_path / "b")
    )
    assert any(layer.get_base_layer().weight.is_meta for layer in adapter_layers(loaded))
    close(logits(loaded), logits(model))
    with loaded.disable_adapter():
        close(logits(loaded), logits(llama()))
    close(logits(loaded.merge_and_unload()), logits(model))


def test_an_offloaded_weight_is_brought_back_or_refused():
    linear = nn.Linear(12, 10)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(linear)), config("nlora_residual", target_modules=["0"]))
    perturb(model)
    layer, x = model.base_model.model[0], torch.randn(5, 12)
    expected = model(x)
    cpu_offload(model, execution_device="cpu")
    assert layer.subtracted == "default" and layer.get_base_layer().weight.is_meta
    with pytest.raises(ValueError, match="the base weight must be loaded, got one on the meta device"):
        layer.merge()
    model.merge_adapter()
    close(model(x), expected)
    model.unmerge_adapter()
    close(model(x), expected)
    layer.delete_adapter("default")
    close(layer.get_base_layer()(x), linear(x))
