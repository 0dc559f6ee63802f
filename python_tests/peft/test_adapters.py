"""The adapter types in PEFT: creation, parameter counts, training, saving, loading, merging, several adapters."""

import copy

import peft
import pytest
import torch
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, LlamaConfig, LlamaForCausalLM

from nlora_kernels.peft import LoRA2Config, NLoraConfig
from python_tests.peft.adapters import METHODS, config, reference_logits
from python_tests.tiny import perturb, tokens

STARTS_EXACT = {"lora", "slora", "slora_gaussian", "nlora_residual", "inttune_residual", "lora2"}


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


def trainable(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)


@pytest.mark.parametrize(
    ("method", "expected"),
    [("lora", 319_815_680), ("slora", 323_485_696), ("nlora", 323_485_696), ("inttune", 3_670_016)],
)
def test_trainable_parameters_of_llama_2_7b(method, expected):
    with torch.device("meta"):
        model = LlamaForCausalLM(LLAMA_2_7B)
    assert trainable(peft.get_peft_model(model, config(method, r=128))) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", 167_616),
        (["query_proj", "key_proj"], 37_440),
        (["query_proj", "key_proj", "value_proj"], 56_160),
    ],
)
def test_trainable_parameters_of_deberta_v3_base(targets, expected):
    # The model of the paper's table without its classification head.
    shape = DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
    )
    with torch.device("meta"):
        model = DebertaV2ForSequenceClassification(shape)
    options = {"exclude_modules": ["classifier", "pooler.dense"]} if targets == "all-linear" else {}
    lora2 = LoRA2Config(r=8, k=1, target_modules=targets, **options)
    assert trainable(peft.get_peft_model(model, lora2)) == expected


def test_default_is_nystrom_bitwise(base):
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = peft.get_peft_model(base, NLoraConfig(r=4, target_modules="all-linear"))
    layers = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_N")}
    assert layers
    for name, layer in layers.items():
        W = weights[f"{name}.weight"]
        W = W.T if layer.fan_in_fan_out else W
        assert torch.equal(layer.lora_A["default"].weight, W[:4, :])
        assert torch.equal(layer.lora_N["default"].weight, W[:4, :4])
        assert torch.equal(layer.lora_B["default"].weight, W[:, :4])


def test_lora2_of_orthogonal_vectors(base, tmp_path):
    ids = tokens()
    options = {"r": 6, "k": 2, "target_modules": "all-linear", "init_lora_weights": "orthogonal"}
    before = base(ids).logits
    model = peft.get_peft_model(base, LoRA2Config(**options))
    layers = [m for m in model.modules() if hasattr(m, "lora_u")]
    assert layers and torch.equal(model(ids).logits, before)
    for layer in layers:
        v, u, E, U, V = (held.weight for held in layer.factors("default"))
        assert not E.any()
        for gram in (v @ v.T, u.T @ u, U @ U.T, V.T @ V):
            torch.testing.assert_close(gram, torch.eye(2), atol=1e-6, rtol=0)
    model.save_pretrained(tmp_path)
    assert LoRA2Config.from_pretrained(tmp_path).init_lora_weights == "orthogonal"


def test_step_zero(base, method):
    ids = tokens()
    with torch.no_grad():
        before = base(ids).logits
        after = peft.get_peft_model(base, config(method))(ids).logits
    if method in STARTS_EXACT:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    else:
        assert (after - before).abs().max() > 1e-3


def test_forward_is_the_formula(base, method):
    model = peft.get_peft_model(copy.deepcopy(base), config(method))
    perturb(model)
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference_logits(base, model, ids), rtol=1e-5, atol=1e-5)


def test_training_moves_what_trains_and_nothing_else(base, method):
    model = peft.get_peft_model(base, config(method)).train()
    expected = {
        "inttune": ("lora_N.",),
        "inttune_residual": ("lora_N.",),
        "lora": ("lora_A.", "lora_B."),
        "lora2": ("lora_v.", "lora_u.", "lora_E.", "lora_U.", "lora_V."),
    }.get(method, ("lora_A.", "lora_N.", "lora_B."))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens()
    losses = []
    # A zero matrix keeps its neighbours still for the first step.
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (not any(kind in name for kind in expected)), name


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True], ids=["", "low_cpu_mem_usage"])
def test_save_and_load(base, method, low_cpu_mem_usage, tmp_path):
    untouched = copy.deepcopy(base)
    model = peft.get_peft_model(base, config(method))
    perturb(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(7)
    loaded = peft.PeftModel.from_pretrained(untouched, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert type(loaded.peft_config["default"]) is type(model.peft_config["default"])
    ids = tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    saved, read = model.state_dict(), loaded.state_dict()
    assert saved.keys() == read.keys()
    for name in saved:
        if "lora_" in name:
            assert torch.equal(saved[name], read[name]), name


def test_merge_and_unload(base, method):
    ids = tokens()
    model = peft.get_peft_model(base, config(method))
    perturb(model)
    with torch.no_grad():
        expected = model(ids).logits
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert not any("lora_" in name for name, _ in merged.named_modules())


def test_disabled_adapter_and_unload_are_the_base_model(base, method):
    ids = tokens()
    with torch.no_grad():
        expected = base(ids).logits
        model = peft.get_peft_model(base, config(method))
        perturb(model)
        with model.disable_adapter():
            torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-5)
        assert (model(ids).logits - expected).abs().max() > 1e-3
        torch.testing.assert_close(model.unload()(ids).logits, expected, rtol=0, atol=1e-5)


def test_several_adapters(base, method):
    """Each alone, both together, merged in part and in full, and what stays when one goes."""
    model = peft.get_peft_model(copy.deepcopy(base), config(method), adapter_name="first")
    model.add_adapter("second", config("lora2" if method == "lora2" else "lora", r=3))
    ids = tokens()

    def check(*adapters):
        with torch.no_grad():
            expected = reference_logits(base, model, ids, adapters)
            torch.testing.assert_close(model.base_model(ids).logits, expected, rtol=1e-5, atol=1e-5)

    for name in ("first", "second"):
        model.set_adapter(name)
        perturb(model)
        check(name)
    model.base_model.set_adapter(["first", "second"])
    check("first", "second")
    for merged in (["second"], ["first"], ["first", "second"]):
        model.merge_adapter(merged)
        check(*merged)
        model.unmerge_adapter()
        check("first", "second")
    model.delete_adapter("first")
    check("second")
    model.delete_adapter("second")
    check()
