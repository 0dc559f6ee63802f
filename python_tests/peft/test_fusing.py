"""When a layer and its adapters are one operation, and that it computes the same where they are not."""

import copy
import sys
import warnings

import peft
import pytest
import torch
from torch import nn

from nlora_kernels.layers import unfused
from nlora_kernels.peft import NLoraConfig, fuse, unfuse
from python_tests.peft.adapters import adapted, adapter_layers, close, config, logits, residual_layers
from python_tests.tiny import llama, perturb, tokens


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


def test_fuse_warns_of_what_it_cannot_fuse():
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 12))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["0", "1"]))
    model.base_model.model[1].base_layer.register_forward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match=r"1 adapter layers cannot be fused.*model\.1, because it has hooks") as caught:
        fuse(model)
    assert [w.filename for w in caught] == [__file__] and list(unfused(model)) == ["base_model.model.1"]


def test_fuse_refuses_what_has_nothing_to_fuse():
    for function in (fuse, unfuse, unfused):
        with pytest.raises(TypeError, match="model must be a module, got str"):
            function("model")
    with pytest.raises(ValueError, match="must have LoRA layers of PEFT"):
        fuse(nn.Linear(4, 4))
