"""The contract of a LoRA layer in PEFT: every operation a script may use, every trap, and when layers are fused."""

import copy
import pickle
import sys
import warnings

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import nn

from nlora_kernels.checkpoint import CONFIG, WEIGHTS
from nlora_kernels.layers import unfused
from nlora_kernels.peft import LoRA2Config, NLoraConfig, fuse, unfuse
from python_tests.peft.adapters import (
    METHODS,
    adapted,
    adapter_layers,
    close,
    config,
    logits,
    reference_delta,
    reference_logits,
)
from python_tests.tiny import counted_fusions, llama, perturb, tokens

CORE_METHODS = ("nlora", "nlora_residual", "inttune_residual", "lora2")


@pytest.fixture(params=CORE_METHODS)
def method(request):
    return request.param


@pytest.fixture
def fused_calls():
    with counted_fusions() as calls:
        yield calls


# Operations


def test_mixed_batch(base, method):
    """Every sample through its own adapter, one of them through none."""
    model = adapted(base, method)
    model.add_adapter("other", config("lora2" if method == "lora2" else "lora", r=3))
    model.set_adapter("other")
    perturb(model)
    model.eval()
    ids = tokens(batch=4)
    names = ["default", "__base__", "other", "default"]
    expected = [
        reference_logits(base, model, ids[row : row + 1], [name] if name != "__base__" else [])
        for row, name in enumerate(names)
    ]
    close(logits(model, ids, adapter_names=names), torch.cat(expected))


def test_scaling(base, method):
    """set_scale, scale_layer and unscale_layer scale the whole effect of an adapter, what left the base weight too."""
    model = adapted(base, method)
    close(logits(model), reference_logits(base, model, tokens()))

    def scaled(factor):
        expected = copy.deepcopy(base)
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                delta = factor * deltas[name]
                expected.get_submodule(name).weight.data += delta.T if layer.fan_in_fan_out else delta
        return logits(expected)

    deltas = {
        name: reference_delta(layer, "default")
        for name, layer in model.base_model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    for layer in adapter_layers(model):
        layer.set_scale("default", 2)
        layer.scale_layer(3)
    close(logits(model), scaled(6))
    with model.disable_adapter():
        close(logits(model), logits(base))
    model.merge_adapter()
    close(logits(model), scaled(6))
    model.unmerge_adapter()
    close(logits(model), scaled(6))
    for layer in adapter_layers(model):
        layer.unscale_layer()
    close(logits(model), scaled(1))
    model.eval()
    for weight in (0.7, 0.0):
        with rescale_adapter_scale(model, weight):
            close(logits(model), scaled(weight))
    for layer in adapter_layers(model):
        layer.set_scale("default", 0)
    close(logits(model), logits(base))
    close(logits(model, adapter_names=["default", "__base__", "default"]), logits(base))
    close(logits(model.merge_and_unload()), logits(base))


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
def test_rank_and_alpha_patterns(method, rslora):
    options = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.mlp.up_proj": 9}, "use_rslora": rslora}
    model = adapted(llama(), method, **options)
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            r, alpha = 2 if "q_proj" in name else 4, 9 if "0.mlp.up_proj" in name else 6
            assert layer.scaling["default"] == pytest.approx(alpha / (r**0.5 if rslora else r))
            assert layer.r["default"] == r
            if not rslora:
                delta = layer.get_delta_weight("default")
                close(delta, reference_delta(layer, "default"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["fp32_adapter", "16_bit_adapter"])
def test_adapter_dtype(dtype, autocast, method):
    """autocast_adapter_dtype both ways; a layer is as near to fp64 as the same formula in PyTorch."""
    base = llama(dtype)
    model = peft.get_peft_model(base, config(method), autocast_adapter_dtype=autocast)
    perturb(model)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    expected = torch.float32 if autocast else dtype
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == (dtype if name.startswith("base_layer") else expected), name
    x = torch.randn(5, 32).to(dtype)
    with torch.no_grad():
        y = layer(x)
        A, N, B = (t.double() for t in layer.matrices("default"))
        W = layer.base_layer.weight
        exact = x.double() @ (W.double() + layer.scaling["default"] * B @ N @ A).T
        plain = x @ W.T + layer.scaling["default"] * (((x @ A.to(dtype).T) @ N.to(dtype).T) @ B.to(dtype).T)
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max() + torch.finfo(dtype).eps


def test_autocast(base, method):
    model = adapted(base, method)
    with torch.autocast("cpu", torch.bfloat16):
        inside = logits(model)
    assert (inside - logits(model)).abs().max() < 0.3
    assert not torch.equal(inside.float(), logits(model))


def test_cast_input_dtype_switched_off(fused_calls):
    model = peft.get_peft_model(llama(torch.bfloat16), config("nlora"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 32, dtype=torch.bfloat16)
    layer(x)
    assert len(fused_calls) == 1
    # As in PEFT, nobody casts then.
    with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype|mat1 and mat2"):
        layer(x)


def test_dropout(base, method):
    """On the adapter's branch alone, with the mask that PyTorch's generator gives; off in eval."""
    model = adapted(base, method, lora_dropout=0.5).eval()
    close(logits(model), reference_logits(base, model, tokens()))
    layer = adapter_layers(model)[0].train()
    x = torch.randn(6, layer.in_features)
    with torch.no_grad():
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(3)
        dropped = nn.functional.dropout(x, 0.5)
        A, N, B = layer.matrices("default")
        close(y, layer.base_layer(x) + layer.scaling["default"] * dropped @ A.T @ N.T @ B.T)
        assert not torch.equal(dropped, x)


def test_gradient_checkpointing(base, method):
    model = adapted(base, method).train()
    ids = tokens()

    def grads():
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = grads()
    assert expected.keys() == actual.keys() and expected
    for name in expected:
        close(actual[name], expected[name])


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


def test_merge_is_repeatable_and_safe_merge_refuses_nan(base, method):
    model = adapted(base, method)
    before, expected = logits(model), copy.deepcopy(model.state_dict())
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        model.merge_adapter(safe_merge=safe)
        close(logits(model), before)
        model.unmerge_adapter()
        close(logits(model), before)
    for name, tensor in model.state_dict().items():
        close(tensor, expected[name], atol=1e-6)
    last = adapter_layers(model)[-1]
    broken = last.lora_U if method == "lora2" else last.lora_N
    broken["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        last.merge(safe_merge=True)
    close(last.get_base_layer().weight, expected[name_of(model, last) + ".base_layer.weight"])


def name_of(model, layer):
    return next(name for name, module in model.named_modules() if module is layer)


def test_a_merged_layer_is_its_base_layer_alone(base, method, fused_calls):
    model = adapted(base, method)
    model.merge_adapter()
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            delta = reference_delta(layer, "default")
            expected = base.get_submodule(name).weight + (delta.T if layer.fan_in_fan_out else delta)
            close(layer.get_base_layer().weight, expected)
    logits(model)
    assert not fused_calls


def test_copies_and_pickles(method):
    model = adapted(llama(), method)
    close(logits(copy.deepcopy(model)), logits(model), atol=0)
    close(logits(pickle.loads(pickle.dumps(model))), logits(model), atol=0)


def test_compiles_as_one_graph(method):
    model = adapted(llama(), method)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(rows, 32)
        close(compiled(x), layer(x))
    compiled(torch.randn(5, 32)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


# Trainability


def trainable(model, adapter="default"):
    names = (name for name, p in model.named_parameters() if p.requires_grad and f".{adapter}" in name)
    return {next(part for part in name.split(".") if part.startswith("lora_")) for name in names}


def test_core_alone_trains_whatever_is_called():
    model = peft.get_peft_model(llama(), config("inttune"))
    assert trainable(model) == {"lora_N"}
    model.set_adapter("default")
    assert trainable(model) == {"lora_N"}
    model.add_adapter("all", config("nlora"))
    assert trainable(model) == {"lora_N"} and trainable(model, "all") == set()
    model.set_adapter("all")
    assert trainable(model) == set() and trainable(model, "all") == {"lora_A", "lora_N", "lora_B"}
    model.base_model.set_adapter(["default", "all"])
    assert trainable(model) == {"lora_N"} and trainable(model, "all") == {"lora_A", "lora_N", "lora_B"}
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.set_requires_grad("default", False)
    model.set_requires_grad("default")
    assert trainable(model) == {"lora_N"}
    model.delete_adapter("all")
    assert trainable(model) == {"lora_N"}


def test_trainable_core_is_loaded_trainable(tmp_path):
    peft.get_peft_model(llama(), config("inttune")).save_pretrained(tmp_path)
    assert trainable(peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)) == {"lora_N"}
    assert trainable(peft.PeftModel.from_pretrained(llama(), tmp_path)) == set()


def test_kept_matrices_never_train():
    model = peft.get_peft_model(llama(), config("nlora_residual"))
    model.base_model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    assert trainable(model) == {"lora_A", "lora_N", "lora_B"}


# Faults of the published code and of a naive subclass


def test_a_second_adapter_has_its_core():
    model = peft.get_peft_model(llama(), config("nlora"))
    model.add_adapter("second", config("slora"))
    for layer in adapter_layers(model):
        assert set(layer.lora_N) == {"default", "second"}
        assert type(layer.lora_N["second"]) is nn.Linear and layer.lora_N["second"].bias is None


def test_the_core_of_a_subclassed_base_layer_is_a_plain_matrix():
    class Custom(nn.Linear):
        def __init__(self, rows, columns, extra):
            super().__init__(rows, columns)

    model = peft.get_peft_model(nn.Sequential(Custom(8, 8, "x")), NLoraConfig(r=2, target_modules=["0"]))
    assert type(model.base_model.model[0].lora_N["default"]) is nn.Linear


def test_variants_of_plain_lora_stay_available():
    """A subclass that redefines init_lora_weights without its metadata raises KeyError in PEFT."""
    options = {"r": 4, "target_modules": ["q_proj"], "use_dora": True}
    ours = peft.get_peft_model(llama(), NLoraConfig(init_lora_weights=True, **options))
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**options))
    for model in (ours, theirs):
        perturb(model)
    close(logits(ours), logits(theirs))


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


def test_weighted_adapters():
    model = peft.get_peft_model(llama(), config("nlora"))
    model.add_adapter("plain", config("lora"))
    with pytest.raises(ValueError, match="adapter 'default' has a core"):
        model.add_weighted_adapter(["default", "plain"], [0.5, 0.5], "mean", combination_type="linear")
    model.set_adapter("plain")
    perturb(model)
    model.add_weighted_adapter(["plain"], [0.5], "weighted", combination_type="linear")
    for layer in adapter_layers(model):
        close(layer.get_delta_weight("weighted"), 0.5 * layer.get_delta_weight("plain"))


def test_conversion_by_the_initial_model_is_refused(tmp_path):
    model = peft.get_peft_model(llama(), config("nlora"))
    model.save_pretrained(tmp_path / "initial")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion is not supported"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))


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


@pytest.mark.usefixtures("adapters_of_transformers")
def test_adapters_of_transformers_itself(method, tmp_path):
    """model.add_adapter and model.load_adapter inject into the model without a PeftModel around it."""
    wrapped = adapted(llama(), method)
    wrapped.save_pretrained(tmp_path)
    model = llama()
    model.load_adapter(tmp_path, "default")
    close(logits(model), logits(wrapped))
    model = llama()
    model.add_adapter(config(method), "mine")
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(wrapped), "mine")
    close(logits(model), logits(wrapped))


def test_pefts_own_conversion_by_svd(method):
    """What get_delta_weight says is relative to the base model, also where the base weight holds less."""
    base = llama()
    model = adapted(base, method)
    lora_config, state = peft.convert_to_lora(model, rank=8)
    plain = peft.get_peft_model(copy.deepcopy(base), lora_config)
    peft.set_peft_model_state_dict(plain, state)
    close(logits(plain), logits(model), atol=1e-4)


def test_reading_the_weight_gathers_its_shards(monkeypatch):
    """DeepSpeed's stage 3 leaves an empty weight outside of its gathering context."""
    import contextlib

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


# Loading


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
        ("lora2", {}),
        ("lora2", {"k": 1}),
        ("lora2", {"k": 4}),
        ("lora", {"r": 2}),
        ("lora", {"r": 8}),
        ("lora", {"r": 9}),
    ],
    ids=[
        "nlora",
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
        ("inttune_residual", "inttune_residual", {}, ValueError),
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


# Residual


def residual_layers(model):
    return [layer for layer in adapter_layers(model) if layer.subtracted]


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


def test_uniform_selection_differs_by_layer_and_seed_alone():
    def rows(seed):
        torch.manual_seed(seed)
        model = peft.get_peft_model(llama(), config("nlora", select="uniform", select_seed=seed))
        return [layer.lora_A["default"].weight for layer in adapter_layers(model)]

    first, again, other = rows(1), rows(1), rows(2)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


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


# Fusing


def test_one_active_adapter_is_one_operation(base, method, fused_calls):
    model = adapted(base, method)
    logits(model)
    assert len(fused_calls) == len(adapter_layers(model))
    with model.disable_adapter():
        fused_calls.clear()
        logits(model)
    # With the product out of the weight, even the base function is fused.
    assert len(fused_calls) == len(residual_layers(model) if method == "nlora_residual" else [])


def hooked(layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: y + 1)


def factor_hooked(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, T: 2 * T)


def parametrized(layer):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Doubled())


def subclassed(layer):
    class Louder(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    layer.base_layer.__class__ = Louder


def replaced_forward(layer):
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) - 1


def weight_normed(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer.base_layer)
    layer.base_layer.weight_g.data.mul_(2)


def tensor_parallel(layer):
    layer.base_layer._hf_tp_plan = "colwise"


def other_weight(layer):
    class Shard(nn.Parameter):
        pass

    layer.base_layer.weight = Shard(layer.base_layer.weight.data, requires_grad=False)


UNSAFE = (
    hooked,
    factor_hooked,
    parametrized,
    subclassed,
    replaced_forward,
    weight_normed,
    tensor_parallel,
    other_weight,
)


@pytest.mark.parametrize("change", UNSAFE, ids=lambda f: f.__name__)
def test_an_unsafe_layer_runs_unfused_and_right(change, fused_calls):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), NLoraConfig(r=4, target_modules=["0"]))
    layer = model.base_model.model[0]
    assert layer.obstacle("default") is None and unfused(model) == {}
    x = torch.randn(5, 12)
    layer(x)
    assert len(fused_calls) == 1
    change(layer)
    assert layer.obstacle("default")
    assert list(unfused(model)) == ["base_model.model.0"]
    with torch.no_grad():
        A, N, B = layer.matrices("default")
        T = x @ A.T * (2 if change is factor_hooked else 1)
        close(layer(x), layer.base_layer(x) + layer.scaling["default"] * T @ N.T @ B.T)
    assert len(fused_calls) == 1


def two_active(model):
    model.add_adapter("other", NLoraConfig(r=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])


def two_active_of_which_one_drops(model):
    model.add_adapter("other", NLoraConfig(r=2, target_modules=["0"], lora_dropout=0.5))
    model.base_model.set_adapter(["default", "other"])
    model.train()


def weightless(model):
    model.base_model.model[0].set_scale("default", 0.0)


def wrapped_factor(model):
    """As FSDP1 with PEFT's policy wraps each matrix that trains."""
    factors = model.base_model.model[0].lora_A
    factors["default"] = nn.Sequential(factors["default"])
    factors["default"].weight = factors["default"][0].weight


def with_dora(model):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), peft.LoraConfig(r=2, target_modules=["0"]))
    fuse(model)
    model.add_adapter("dora", peft.LoraConfig(r=2, use_dora=True, target_modules=["0"]))
    model.set_adapter("dora")
    return model


def with_a_tensor_of_scaling(model):
    model.base_model.model[0].scaling["default"] = torch.tensor(2.0)


def rescaled_residual(model):
    model.add_adapter("residual", NLoraConfig(r=2, init_lora_weights="nystrom", residual=True, target_modules=["0"]))
    model.set_adapter("residual")
    model.base_model.model[0].scale_layer(2)


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.merge_adapter()


@pytest.mark.parametrize(
    "change, fused",
    [
        (two_active, True),
        (rescaled_residual, True),
        (two_active_of_which_one_drops, False),
        (weightless, False),
        (wrapped_factor, False),
        (with_dora, False),
        (with_a_tensor_of_scaling, False),
        (disabled, None),
        (merged, None),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unfused_names_what_a_forward_does_not_fuse(change, fused, fused_calls):
    base = nn.Sequential(nn.Linear(12, 10))
    model = peft.get_peft_model(base, NLoraConfig(r=4, target_modules=["0"]))
    model = change(model) or model
    model(torch.randn(5, 12))
    # With no adapter there is nothing to fuse.
    assert bool(unfused(model)) is (fused is False), unfused(model)
    assert len(fused_calls) == (change is two_active_of_which_one_drops or fused is True)


@pytest.mark.parametrize("dropped", [False, True], ids=["", "one_drops"])
def test_what_several_adapters_add_is_one_operation_with_the_base_layer(dropped, fused_calls, monkeypatch):
    """Also where the second is kept apart, because it drops."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), NLoraConfig(r=4, residual=True, target_modules=["0"]))
    model.add_adapter(
        "lora", NLoraConfig(r=3, init_lora_weights=True, target_modules=["0"], lora_dropout=1.0 * dropped)
    )
    model.add_adapter("inttune", NLoraConfig(r=2, train="core", target_modules=["0"]))
    perturb(model)
    model.base_model.set_adapter(["inttune", "lora", "default"])
    model.train()
    layer = model.base_model.model[0]
    layer.set_scale("default", 0.5)
    trained = [p for p in model.parameters() if p.requires_grad]
    x, dy = torch.randn(5, 12, requires_grad=True), torch.randn(5, 10)
    ours = [model(x), *torch.autograd.grad(model(x), (x, *trained), dy, materialize_grads=True)]
    assert len(fused_calls) == 2 and bool(unfused(model)) is dropped
    monkeypatch.setattr(type(layer), "_fusible", lambda *args: None)
    expected = [model(x), *torch.autograd.grad(model(x), (x, *trained), dy, materialize_grads=True)]
    assert len(fused_calls) == 2
    for mine, exact in zip(ours, expected, strict=True):
        close(mine, exact)
    if dropped:
        assert not any(
            grad.any() for p, grad in zip(trained, ours[2:], strict=True) if p is layer.lora_B["lora"].weight
        )


class Quantised(nn.Linear):
    """A weight of whole numbers and one scale, as quantised layers have; its forward dequantises."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        self.step = linear.weight.abs().max().item() / 127
        self.weight = nn.Parameter((linear.weight / self.step).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step, self.bias)


def test_a_quantised_base_layer_runs_unfused_warns_once_and_does_not_merge():
    model = nn.Sequential(*(Quantised(nn.Linear(12, 12)) for _ in range(3)))
    with pytest.warns(UserWarning, match="3 adapter layers cannot be fused.*Quantised, not nn.Linear") as caught:
        model = peft.get_peft_model(model, config("slora", target_modules=["0", "1", "2"]))
    assert len([w for w in caught if "cannot be fused" in str(w.message)]) == 1
    perturb(model)
    x = torch.randn(5, 12)
    layer = model.base_model.model[0]
    with torch.no_grad():
        A, N, B = layer.matrices("default")
        close(layer(x), layer.base_layer(x) + layer.scaling["default"] * x @ A.T @ N.T @ B.T)
    with pytest.raises(ValueError, match="merge needs a base weight that is dense or.*got Parameter of torch.int8"):
        model.merge_adapter()


def test_kernels_that_read_a_and_b_alone_are_warned_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "unsloth", sys)
    with pytest.warns(UserWarning, match="unsloth is loaded"):
        peft.get_peft_model(llama(), config("nlora"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft.get_peft_model(llama(), config("lora"))


@pytest.mark.parametrize("source", ["created", "loaded"])
def test_fuse_and_unfuse(source, base, tmp_path, fused_calls):
    stock = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules="all-linear"))
    perturb(stock)
    if source == "loaded":
        stock.save_pretrained(tmp_path)
        stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    before, state = logits(stock), copy.deepcopy(stock.state_dict())
    assert fuse(stock) is stock
    assert fuse(stock) is stock
    close(logits(stock), before)
    assert len(fused_calls) == len(adapter_layers(stock))
    assert {name: t.data_ptr() for name, t in stock.state_dict().items()}.keys() == state.keys()
    stock.add_adapter("second", peft.LoraConfig(r=2, target_modules="all-linear"))
    stock.delete_adapter("second")
    stock.merge_adapter()
    close(logits(stock), before)
    stock.unmerge_adapter()
    calls = len(fused_calls)
    assert unfuse(stock) is stock
    close(logits(stock), before)
    assert len(fused_calls) == calls
    assert all(type(layer) is peft.tuners.lora.Linear for layer in adapter_layers(stock))


def test_fuse_gradients_and_variants():
    def grads(model):
        model.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    perturb(stock)
    expected, actual = grads(stock), grads(fuse(stock))
    assert expected.keys() == actual.keys()
    for name in expected:
        close(actual[name], expected[name])
    dora = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    perturb(dora)
    before = logits(dora)
    close(logits(fuse(dora)), before)


def test_fuse_refuses_what_has_nothing_to_fuse():
    with pytest.raises(TypeError, match="model must be a module, got str"):
        fuse("model")
    with pytest.raises(ValueError, match="must have LoRA layers of PEFT"):
        fuse(nn.Linear(4, 4))


def test_configuration_round_trip(method, tmp_path):
    saved = config(method)
    saved.save_pretrained(tmp_path)
    assert (tmp_path / CONFIG).is_file()
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert loaded == saved and type(loaded) is type(saved)
    assert set(METHODS) >= {method}
