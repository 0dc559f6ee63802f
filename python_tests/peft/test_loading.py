"""What is saved and loaded, and checked before anything is filled; hot swap."""

import copy

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file

from nlora_kernels.checkpoint import CONFIG, WEIGHTS
from python_tests.peft.adapters import METHODS, adapted, close, config, logits
from python_tests.tiny import llama, perturb


def test_modules_to_save(method, tmp_path):
    model = adapted(llama(), method, modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    close(logits(loaded), logits(model))
    assert any("lm_head" in name for name in load_file(tmp_path / WEIGHTS))


def test_checkpoint_keys(method, tmp_path):
    adapted(llama(), method).save_pretrained(tmp_path)
    names = {key.rpartition("q_proj.")[2] for key in load_file(tmp_path / WEIGHTS) if "0.self_attn.q_proj." in key}
    assert (
        names
        == {
            "nlora": {"lora_A.weight", "lora_N.weight", "lora_B.weight"},
            "nlora_residual": {f"lora_{kind}.weight" for kind in ("A", "N", "B", "A0", "N0", "B0")},
            "inttune_residual": {"lora_A.weight", "lora_N.weight", "lora_B.weight", "lora_N0.weight"},
            "lora2": {f"lora_{kind}.weight" for kind in ("v", "u", "E", "U", "V", "mask")},
        }[method]
    )


def test_conversion_by_the_initial_model_is_refused(tmp_path):
    model = peft.get_peft_model(llama(), config("nlora"))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion is not supported"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


def test_missing_keys_are_named(method, tmp_path):
    adapted(llama(), method).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    lost = next(key for key in tensors if "1.mlp.up_proj.lora_" + ("E" if method == "lora2" else "N") in key)
    save_file({key: tensor for key, tensor in tensors.items() if key != lost}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"adapter 'default' lacks .*1\.mlp\.up_proj\.lora_"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_missing_keys_of_plain_lora_are_warned_of_as_in_peft(tmp_path):
    adapted(llama(), "lora").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors[next(key for key in tensors if "1.mlp.up_proj.lora_A" in key)]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.warns(UserWarning, match=r"missing adapter keys .*1\.mlp\.up_proj\.lora_A"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize("saved", ["nlora_residual", "inttune_residual"])
def test_matrices_that_the_adapter_has_no_place_for_are_named(saved, tmp_path):
    trained = adapted(llama(), saved)
    trained.save_pretrained(tmp_path)
    words = r"adapter 'default' has .*lora_[AN]0.*, for which .*'nystrom' has no place: .*configuration"
    with pytest.raises(ValueError, match=words):
        peft.PeftModel.from_pretrained(llama(), tmp_path, config=config("nlora"))
    injected = peft.inject_adapter_in_model(config("nlora"), llama())
    before = copy.deepcopy(injected.state_dict())
    with pytest.raises(ValueError, match=words):
        peft.set_peft_model_state_dict(injected, peft.get_peft_model_state_dict(trained))
    after = injected.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_an_adapter_of_another_base_is_refused_before_anything_is_loaded(method, low_cpu_mem_usage, tmp_path):
    adapted(llama(), method).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    name = next(key for key in tensors if "1.mlp.up_proj.lora_" + ("V" if method == "lora2" else "B") in key)
    tensors[name] = torch.zeros(7, tensors[name].shape[1])
    save_file(tensors, tmp_path / WEIGHTS)
    model = peft.get_peft_model(llama(), config("lora2" if method == "lora2" else "lora"), adapter_name="other")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch for .*1\.mlp\.up_proj\.lora_.*\[7, .*\[48, "):
        model.load_adapter(tmp_path, "default", low_cpu_mem_usage=low_cpu_mem_usage)
    assert list(model.peft_config) == ["other"]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("padded", [None, 8], ids=["", "padded"])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("nlora", {}),
        ("inttune_residual", {"core": "optimal", "select": "pivoted"}),
        ("lora2", {}),
        ("lora2", {"k": 1}),
        ("lora2", {"k": 4}),
        ("lora", {"r": 2}),
        ("lora", {"r": 8}),
        ("lora", {"r": 9}),
    ],
    ids=[
        "nlora",
        "inttune-residual",
        "lora2",
        "lora2-smaller-k",
        "lora2-larger-k",
        "lora-smaller-r",
        "lora-larger-r",
        "lora-much-larger-r",
    ],
)
def test_hot_swap(method, options, padded, tmp_path):
    first, second = adapted(llama(), method), peft.get_peft_model(llama(), config(method, lora_alpha=9, **options))
    perturb(second, 0.3)
    if method == "lora2":
        for name, mask in second.named_buffers():
            if "lora_mask" in name:
                mask[1] = 0
    second.save_pretrained(tmp_path)
    if padded:
        before = logits(first)
        prepare_model_for_compiled_hotswap(first, target_rank=padded)
        close(logits(first), before)
    hotswap_adapter(first, str(tmp_path), adapter_name="default")
    close(logits(first), logits(second), atol=5e-5)


@pytest.mark.parametrize(
    ("ours", "other", "options", "error"),
    [
        ("nlora_residual", "nlora_residual", {}, ValueError),
        ("inttune_residual", "nlora_residual", {}, ValueError),
        ("nlora", "lora", {}, ValueError),
        ("nlora", "nlora", {"r": 2}, ValueError),
        ("lora2", "lora2", {"r": 2}, ValueError),
    ],
)
def test_hot_swap_that_cannot_be_right_is_refused(ours, other, options, error, tmp_path):
    adapted(llama(), other, **options).save_pretrained(tmp_path)
    model = adapted(llama(), ours)
    before = logits(model)
    with pytest.raises(error):
        hotswap_adapter(model, str(tmp_path), adapter_name="default")
    close(logits(model), before, atol=0)


def test_configuration_round_trip(method, tmp_path):
    saved = config(method)
    saved.save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).is_file()
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert loaded == saved and type(loaded) is type(saved)
    assert set(METHODS) >= {method}
