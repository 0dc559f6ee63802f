"""Base weights that their layer makes anew in every forward, by torch.nn.utils: what is added to one would be lost."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import nlora_kernels as nk
from nlora_kernels.peft import NLoraConfig, fuse
from python_tests.peft.adapters import METHODS, close, config, logits
from python_tests.tiny import mixtral, perturb


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


# Of torch.nn.utils: makes the weight anew, and undoes that.
MADE = {
    "weight_norm": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruned": (lambda base: prune.l1_unstructured(base, "weight", 0.3), lambda base: prune.remove(base, "weight")),
}
PARAMETRIZED = (
    lambda base: parametrize.register_parametrization(base, "weight", Doubled()),
    lambda base: parametrize.remove_parametrizations(base, "weight"),
)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*cannot be fused.*")


def linear(make=lambda base: None) -> nn.Linear:
    torch.manual_seed(0)
    base = nn.Linear(12, 10)
    make(base)
    return base.eval().requires_grad_(False)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_has_its_effect_and_is_not_merged_into_it(method, made):
    make, undo = MADE[made]
    x, plain = torch.randn(5, 12), linear(make)
    model = peft.get_peft_model(nn.Sequential(linear(make)), config(method, target_modules=["0"])).eval()
    layer = model.base_model.model[0]
    if method in ("nlora_residual", "inttune_residual"):
        close(model(x), plain(x), atol=1e-4)
    perturb(model)
    expected = plain(x) + x @ layer.get_delta_weight("default").T
    close(model(x), expected, atol=1e-4)
    with model.disable_adapter():
        close(model(x), plain(x))
    with pytest.raises(ValueError, match="made of weight_.* in every forward"):
        model.merge_adapter()
    assert not layer.merged
    close(model(x), expected, atol=1e-4)
    undo(layer.base_layer)
    close(model.merge_and_unload()(x), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "nlora", "nlora_residual", "lora2"])
def test_so_it_is_where_the_weight_is_parametrized_beneath_an_adapter(method):
    make, undo = PARAMETRIZED
    model = peft.get_peft_model(nn.Sequential(linear()), config(method, target_modules=["0"]))
    perturb(model)
    layer = model.base_model.model[0]
    make(layer.base_layer)
    with pytest.raises(ValueError, match="made of parametrizations.weight in every forward"):
        model.merge_adapter()
    assert not layer.merged
    x = torch.randn(5, 12)
    undo(layer.base_layer)
    expected = model(x)
    close(model.merge_and_unload()(x), expected)


def test_plain_lora_of_peft_is_not_merged_into_it_after_fuse():
    model = peft.get_peft_model(
        nn.Sequential(linear(nn.utils.weight_norm)), peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    with pytest.raises(ValueError, match="made of weight_g and weight_v in every forward"):
        fuse(model).merge_adapter(safe_merge=True)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("options", [{"init": "lora"}, {}, {"residual": True}], ids=["lora", "nlora", "residual"])
def test_of_a_module(options, made):
    make, undo = MADE[made]
    x, plain = torch.randn(5, 12), linear(make)
    layer = nk.NLoraLinear.from_linear(linear(make), 4, **options).eval()
    if "residual" in options:
        close(layer(x), plain(x), atol=1e-4)
    perturb(layer)
    expected = plain(x) + x @ layer.delta_weight().T
    close(layer(x), expected, atol=1e-4)
    with pytest.raises(ValueError, match="made of weight_.* in every forward"):
        layer.merge()
    assert not layer.merged
    undo(layer.base)
    layer.merge()
    close(layer(x), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "nlora", "lora2"])
def test_of_experts(method):
    model = peft.get_peft_model(mixtral(), config(method, target_modules=None, target_parameters=["experts.down_proj"]))
    perturb(model)
    experts = model.base_model.model.model.layers[0].mlp.experts
    parametrize.register_parametrization(experts.get_base_layer(), "down_proj", Doubled())
    expected = logits(model)
    with pytest.raises(ValueError, match="base down_proj that its layer keeps, got one made of parametrizations.down"):
        model.merge_adapter()
    assert not experts.merged
    parametrize.remove_parametrizations(experts.get_base_layer(), "down_proj")
    close(logits(model), expected)
    close(logits(model.merge_and_unload()), expected)


def test_of_a_bias():
    base = nn.Sequential(linear())
    model = peft.get_peft_model(
        base, NLoraConfig(r=2, target_modules=["0"], init_lora_weights=False, lora_bias=True)
    ).eval()
    layer = model.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].bias)
    prune.l1_unstructured(layer.base_layer, "bias", 0.3)
    with pytest.raises(ValueError, match="base bias that its layer keeps, got one made of bias_orig"):
        model.merge_adapter()
    assert not layer.merged
    x = torch.randn(5, 12)
    prune.remove(layer.base_layer, "bias")
    expected = model(x)
    close(model.merge_and_unload()(x), expected)
