"""Every operation that a script may use on the layers of an adapter: as PEFT does it for LoRA."""

import copy
import pickle

import peft
import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from torch import nn

from nlora_kernels.peft import NLoraConfig
from python_tests.peft.adapters import adapted, adapter_layers, close, config, logits, reference_delta, reference_logits
from python_tests.tiny import llama, perturb, tokens


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


def test_the_bias_of_an_adapter_is_merged_and_taken_out_again():
    model = adapted(nn.Sequential(nn.Linear(6, 5)), "lora", target_modules=["0"], lora_bias=True)
    layer, x = model.base_model.model[0], torch.randn(3, 6)
    bias, expected = layer.base_layer.bias.clone(), model(x)
    for _ in range(2):
        model.merge_adapter()
        close(model(x), expected)
        assert not torch.equal(layer.base_layer.bias, bias)
        model.unmerge_adapter()
        close(layer.base_layer.bias, bias)
    close(model(x), expected)


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


def test_uniform_selection_differs_by_layer_and_seed_alone():
    def rows(seed):
        torch.manual_seed(seed)
        model = peft.get_peft_model(llama(), config("nlora", select="uniform", select_seed=seed))
        return [layer.lora_A["default"].weight for layer in adapter_layers(model)]

    first, again, other = rows(1), rows(1), rows(2)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
