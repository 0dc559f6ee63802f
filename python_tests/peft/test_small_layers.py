"""Layers that have fewer rows or columns than r: taken with "all-linear", refused by name where they are targets."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

import nlora_kernels as nk
from nlora_kernels.checkpoint import to_lora
from nlora_kernels.peft import LoRA2Config, NLoraConfig
from nlora_kernels.peft.layer import FusedLinear
from python_tests.tiny import perturb


class Routed(nn.Module):
    """A router and a head beside a layer that is large enough."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.router, self.head = nn.Linear(16, 24), nn.Linear(24, 1), nn.Linear(24, 3)

    def forward(self, x):
        h = self.body(x)
        return self.router(h) + self.head(h)


def nlora(**options):
    return NLoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": "all-linear", **options})


@pytest.mark.parametrize(
    ("options", "scaling", "router"),
    [
        ({}, 1.5, 1.5),
        ({"use_rslora": True}, 12 / 8**0.5, 12 / 8**0.5),
        ({"residual": True}, 1.5, 1.5),
        ({"train": "core", "residual": True}, 1.5, 1.5),
        ({"rank_pattern": {"body": 6}, "alpha_pattern": {"router": 20, "body": 9}}, 1.5, 2.5),
    ],
    ids=["plain", "rslora", "residual", "core", "patterns"],
)
def test_all_linear_takes_them_with_the_rank_they_can_have(options, scaling, router, tmp_path):
    base, x = Routed(), torch.randn(5, 16)
    config = nlora(**options)
    with pytest.warns(UserWarning, match=r"2 layers have .* r = 8 .*: router \(1\), head \(3\)\. ") as caught:
        model = peft.get_peft_model(copy.deepcopy(base), config)
    assert len(caught) == 1
    layers = {name: module for name, module in model.base_model.model.named_children()}
    body = config.rank_pattern.get("body", 8)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {"body": body, "router": 1, "head": 3}
    expected = {"body": scaling, "router": router, "head": scaling}
    assert {name: layer.scaling["default"] for name, layer in layers.items()} == pytest.approx(expected)
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    to_lora(tmp_path / "adapter", tmp_path / "plain")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = model.eval()(x)
        for folder in ("adapter", "plain"):
            loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
            torch.testing.assert_close(loaded(x), y, rtol=1e-4, atol=1e-5)


ASKED_FOR = {
    "list": {"target_modules": ["body", "router"]},
    "pattern": {"target_modules": "body|router"},
    "rank": {"rank_pattern": {"router": 8}},
}


@pytest.mark.parametrize("options", ASKED_FOR.values(), ids=ASKED_FOR)
def test_where_it_is_asked_for_the_layer_is_named(options):
    model = Routed()
    with pytest.raises(ValueError, match=r"'router' cannot be adapted: r must .* at most min\(out, in\) = 1, got 8"):
        peft.get_peft_model(model, nlora(**options))
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def test_an_alpha_that_is_no_number_is_said_before_it_is_fitted():
    with pytest.raises(TypeError, match="lora_alpha must be"):
        peft.get_peft_model(Routed(), nlora(lora_alpha="8"))


@pytest.mark.parametrize("config", [NLoraConfig(init_lora_weights="slora", r=8), LoRA2Config(r=8, k=8)])
def test_matrices_that_are_no_part_of_the_weight_have_any_rank(config, recwarn):
    config.target_modules = "all-linear"
    model = peft.get_peft_model(Routed(), config)
    assert model.base_model.model.router.r["default"] == 8 and not config.rank_pattern
    assert not [w for w in recwarn.list if "fewer rows" in str(w.message)]


def test_whatever_a_layer_refuses_names_it():
    model = Routed()
    model.body.weight.data[3, 2] = torch.nan
    with pytest.raises(ValueError, match="'body' cannot be adapted: weight must be finite, got NaN"):
        peft.get_peft_model(model, nlora())


@pytest.mark.parametrize(
    "config", [nlora(), nlora(init_lora_weights="slora"), LoRA2Config(target_modules="all-linear")]
)
def test_a_layer_without_a_weight_yet_is_named(config):
    model = nn.Sequential(nn.Linear(16, 16), nn.LazyLinear(16))
    with pytest.raises(ValueError, match="'1' cannot be adapted: its weight must be initialised, got a LazyLinear"):
        peft.get_peft_model(model, config)
    assert not any(isinstance(module, FusedLinear) for module in model.modules())


def pruned(zero, **options):
    base = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    zero(base[1].weight.data).zero_()
    return peft.get_peft_model(base, nlora(r=4, **options))


@pytest.mark.parametrize("zero", [lambda w: w, lambda w: w[:4], lambda w: w[:, :4]], ids=["all", "rows", "columns"])
@pytest.mark.parametrize("core", ["sample", "optimal"])
@pytest.mark.parametrize("train", ["all", "core"])
def test_an_adapter_made_of_zeros_which_can_never_train_is_said_with_its_name(train, core, zero):
    with pytest.warns(UserWarning, match="'default' of 1 gets no gradient and cannot train"):
        model = pruned(zero, train=train, core=core)
    model(torch.randn(5, 16)).square().sum().backward()
    layer = model.base_model.model[1]
    assert not any(factor.weight.grad.any() for factor in layer.factors("default") if factor.weight.requires_grad)
    with pytest.warns(UserWarning, match="gets no gradient"):
        nk.NLoraLinear.from_linear(layer.base_layer, 4, train=train, core=core)


@pytest.mark.parametrize("method", ["slora", "slora_gaussian"])
def test_a_core_alone_between_zeros_is_said_too(method):
    base = nn.Sequential(nn.Linear(16, 24))
    with pytest.warns(UserWarning, match="'default' of 0 gets no gradient .* stays so with train='core'"):
        model = peft.get_peft_model(base, nlora(r=4, init_lora_weights=method, train="core"))
    model(torch.randn(5, 16)).square().sum().backward()
    assert not model.base_model.model[0].lora_N["default"].weight.grad.any()
    with pytest.warns(UserWarning, match="stays so with train='core'"):
        nk.NLoraLinear.from_linear(nn.Linear(16, 24), 4, init=method, train="core")


@pytest.mark.parametrize("options", [{"select": "norm"}, {"init_lora_weights": "slora"}, {"init_lora_weights": True}])
def test_what_trains_beside_zeros_is_not(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = pruned(lambda w: w[:4], **options)
    model(torch.randn(5, 16)).square().sum().backward()
    assert any(factor.weight.grad.any() for factor in model.base_model.model[1].factors("default"))
