"""Options, layers and variants that an adapter cannot have: refused by name, and nothing has changed."""

import copy

import peft
import pytest
import torch
from torch import nn

from nlora_kernels.peft import LoRA2Config, NLoraConfig
from python_tests.peft.adapters import adapter_layers, close, config, logits
from python_tests.tiny import llama


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_other_layers_are_plain_lora_or_refused(kind):
    layer = {"embedding": nn.Embedding(16, 8), "conv2d": nn.Conv2d(3, 8, 1)}[kind]
    plain = peft.get_peft_model(nn.Sequential(layer), NLoraConfig(r=2, target_modules=["0"], init_lora_weights=True))
    assert type(plain.base_model.model[0]).__module__ == "peft.tuners.lora.layer"
    for refused in (NLoraConfig(r=2, target_modules=["0"]), LoRA2Config(r=2, target_modules=["0"])):
        model = nn.Sequential(copy.deepcopy(layer))
        with pytest.raises(ValueError, match="target_modules must be linear layers"):
            peft.get_peft_model(model, refused)
    with pytest.raises(ValueError, match="target_modules must be linear layers"):
        plain.add_adapter("second", NLoraConfig(r=2, target_modules=["0"]))
    assert "second" not in plain.peft_config


def test_a_stock_lora_adapter_beside_ours_is_refused():
    model = peft.get_peft_model(llama(), config("nlora"))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("plain", peft.LoraConfig(target_modules=["q_proj"]))


REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "init_lora_weights": True, "_lora2": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "use_qalora": {"use_qalora": True},
}


@pytest.mark.filterwarnings("ignore:aLoRA")
@pytest.mark.parametrize("name", REFUSED)
def test_variants_with_a_core_are_refused_by_name(name):
    options = dict(REFUSED[name])
    with pytest.raises(ValueError, match=name):
        LoRA2Config(**{key: value for key, value in options.items() if key != "_lora2"})
    if not options.pop("_lora2", False):
        with pytest.raises(ValueError, match=name):
            NLoraConfig(**options)


BAD_CONFIGS = {
    "train": ({"train": "none"}, ValueError, "train must be one of all, core, got 'none'"),
    "core": ({"core": "best"}, ValueError, "core must be one of"),
    "select": ({"select": "best"}, ValueError, "select must be one of"),
    "pinv": ({"core": "pinv"}, ValueError, "needs residual=True"),
    "core_of_lora": ({"train": "core", "init_lora_weights": True}, ValueError, "train='core' needs a lora_N"),
    "residual_of_slora": ({"residual": True, "init_lora_weights": "slora"}, ValueError, "residual=True needs"),
    "residual_of_pissa": ({"residual": True, "init_lora_weights": "pissa"}, ValueError, "'nystrom', got 'pissa'"),
    "residual_text": ({"residual": "no"}, ValueError, "residual must be true or false, got 'no'"),
    "rslora_text": ({"use_rslora": "no"}, ValueError, "use_rslora must be true or false, got 'no'"),
    "replication": ({"residual": True, "layer_replication": [(0, 2), (1, 2)]}, ValueError, "layer_replication"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_configuration(options, error, message):
    with pytest.raises(error, match=message):
        NLoraConfig(**options)


@pytest.mark.parametrize("value", ["gaussian", "nystrom"])
def test_initialisations_that_lora2_has_not(value):
    with pytest.raises(ValueError, match=f"must be True, False or 'orthogonal' for LoRA², got '{value}'"):
        LoRA2Config(init_lora_weights=value)


BAD_SCHEDULES = {
    "target_rank": ({"target_rank": -1}, ValueError, "target_rank must be at least 1, got -1"),
    "total_steps": ({"total_steps": -1}, ValueError, "total_steps must be at least 1, got -1"),
    "total_steps_float": ({"total_steps": 9.0}, TypeError, "total_steps must be an integer, got float"),
    "delta_t": ({"delta_t": 0}, ValueError, "delta_t must be at least 1, got 0"),
    "t_final": ({"t_final": -1}, ValueError, "t_final must be at least 0, got -1"),
    "beta1": ({"beta1": 2.0}, ValueError, "beta1 must be at least 0 and below 1, got 2.0"),
    "beta2": ({"beta2": "0.9"}, TypeError, "beta2 must be a real number, got str"),
    "sum": ({"t_init": 4, "t_final": 6, "total_steps": 10}, ValueError, r"below total_steps = 10, got 4 \+ 6"),
    "rslora": ({"use_rslora": "no"}, ValueError, "use_rslora must be true or false, got 'no'"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD_SCHEDULES.values(), ids=BAD_SCHEDULES)
def test_bad_schedule(options, error, message):
    with pytest.raises(error, match=message):
        LoRA2Config(**options)


def test_steps_that_the_callback_is_to_give():
    assert LoRA2Config(t_init=4, t_final=6, target_rank=2).total_steps is None


BAD_INJECTIONS = {
    "rank_too_large": (
        lambda m: config("nlora", r=40, target_modules=["q_proj"]),
        ValueError,
        r"at most min\(out, in\) = 32, got 40",
    ),
    "rank_in_pattern": (lambda m: config("nlora", rank_pattern={"1.mlp.down_proj": 99}), ValueError, "got 99"),
    "rank_zero": (lambda m: config("nlora", r=0), ValueError, "r must be at least 1"),
    "rank_type": (lambda m: config("lora2", r=2.5), TypeError, "r must be an integer"),
    "alpha_type": (lambda m: config("nlora", lora_alpha="8"), TypeError, "lora_alpha must be a real number, got str"),
    "alpha_inf": (lambda m: config("lora2", lora_alpha=float("inf")), ValueError, "lora_alpha must be finite, got inf"),
    "nan": (lambda m: poison(m) or config("nlora"), ValueError, "weight must be finite"),
    "pinv": (
        lambda m: m.bfloat16() and config("nlora", core="pinv", residual=True),
        ValueError,
        "in float32, got torch.bfloat16",
    ),
}


def poison(model):
    model.model.layers[-1].mlp.down_proj.weight.data[3, 3] = torch.nan


@pytest.mark.parametrize(("make", "error", "message"), BAD_INJECTIONS.values(), ids=BAD_INJECTIONS)
def test_a_failed_injection_changes_nothing(make, error, message):
    model = llama()
    bad = make(model)
    bad.residual = bad.peft_type == "NLORA"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        peft.get_peft_model(model, bad)
    assert not adapter_layers(model)
    # And beside an adapter that is there already.
    first = peft.get_peft_model(model, config("lora2" if bad.peft_type == "LORA2" else "slora"))
    with pytest.raises(error, match=message):
        first.add_adapter("second", bad)
    assert all("second" not in layer.lora_A for layer in adapter_layers(first))
    for name, tensor in first.unload().state_dict().items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name


@pytest.mark.parametrize("method", ["nlora", "slora", "lora2"])
def test_tensor_parallel_plans_are_refused_for_a_core(method):
    model = nn.Sequential(nn.Linear(8, 8))
    model[0]._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match="tensor-parallel layer where .* got the plan .colwise."):
        peft.get_peft_model(model, config(method, target_modules=["0"]))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=["dora", "pissa"])
@pytest.mark.parametrize("first", ["core", "variant"])
def test_a_variant_beside_a_core_is_refused(options, first):
    """PEFT's own forward of the variant would leave lora_N and the residual's initial product out."""
    variant = NLoraConfig(r=4, target_modules=["q_proj"], **({"init_lora_weights": True} | options))
    core = NLoraConfig(r=4, target_modules=["q_proj"], residual=True)
    one, other = (core, variant) if first == "core" else (variant, core)
    model = peft.get_peft_model(llama(), one)
    before = logits(model)
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* beside an adapter that has a lora_N"):
        model.add_adapter("second", other)
    close(logits(model), before, atol=0)
