"""Base weights that PEFT saves beside an adapter, and layers whose weight is not what a call would use."""

import importlib
import inspect

import peft
import pytest
import torch
import transformers
from torch import nn

import nlora_kernels as nk
from nlora_kernels.peft import LoRA2Config, NLoraConfig, targets

SIZES = {"vocab_size": 48, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
IDS = torch.arange(3, 9)[None]
METHODS = {
    "lora": {"init_lora_weights": False},
    "slora": {"init_lora_weights": "slora"},
    "residual": {"residual": True},
    "pivoted": {"residual": True, "select": "pivoted"},
}


def base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=1, num_key_value_heads=2, initializer_range=0.3)
    return transformers.LlamaForCausalLM(config).eval()


def config(method, **options):
    return NLoraConfig(r=4, target_modules=["lm_head"], **METHODS[method], **options)


@torch.no_grad()
def moved(model):
    """The model with other values in what trains, and its logits."""
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()(IDS).logits


def assert_same(model, logits):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, logits, rtol=1e-4, atol=1e-4)


pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`", "ignore:.*servers refuse or leave out"
)


@pytest.mark.parametrize("second", METHODS)
@pytest.mark.parametrize("names", ["ab", "ba"])
def test_an_adapter_saved_beside_a_residual_one_brings_the_models_own_output_layer(tmp_path, second, names):
    first, other = names
    model = peft.get_peft_model(base(), config("residual"), adapter_name=first)
    model.add_adapter(other, config(second))
    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = moved(model)
    model.save_pretrained(tmp_path)
    for name in names:
        assert_same(peft.PeftModel.from_pretrained(base(), tmp_path / name), expected[name])
    for order in (names, names[::-1]):
        loaded = peft.PeftModel.from_pretrained(base(), tmp_path / order[0], adapter_name=order[0])
        loaded.load_adapter(tmp_path / order[1], order[1])
        for name in names:
            loaded.set_adapter(name)
            assert_same(loaded, expected[name])
        with loaded.disable_adapter():
            assert_same(loaded, base()(IDS).logits.detach())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_the_output_layer_goes_through_every_reader(tmp_path, method, low_cpu_mem_usage):
    model = peft.get_peft_model(base(), config(method))
    expected, plain = moved(model), base()(IDS).logits.detach()
    model.save_pretrained(tmp_path / "own")
    loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "own", low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same(loaded, expected)
    assert_same(loaded.unload(), plain)
    with_transformers = base()
    with_transformers.load_adapter(str(tmp_path / "own"))
    assert_same(with_transformers, expected)
    with_transformers.disable_adapters()
    assert_same(with_transformers, plain)
    if method != "lora":
        for keep_patterns in (False, True):
            nk.checkpoint.to_lora(tmp_path / "own", tmp_path / f"plain{keep_patterns}", keep_patterns=keep_patterns)
            assert_same(peft.PeftModel.from_pretrained(base(), tmp_path / f"plain{keep_patterns}"), expected)
    # Of the file the weight is the model's, whoever reads it.
    weight = peft.utils.load_peft_weights(str(tmp_path / "own"))["base_model.model.lm_head.base_layer.weight"]
    torch.testing.assert_close(weight, base().lm_head.weight.detach(), rtol=1e-5, atol=1e-5)


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=48, n_embd=24, n_layer=1, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: NLoraConfig(init_lora_weights=False, **o),
        lambda **o: NLoraConfig(**o),
        lambda **o: NLoraConfig(init_lora_weights="slora", **o),
        lambda **o: LoRA2Config(init_lora_weights=False, **o),
    ],
    ids=["lora", "nlora", "slora", "lora2"],
)
def test_a_weight_that_trainable_tokens_make_anew_is_not_merged_into(tmp_path, make):
    model = peft.get_peft_model(gpt2(), make(r=2, target_modules=["lm_head"], trainable_token_indices=[3, 5]))
    expected = moved(model)
    with pytest.raises(
        ValueError, match="a base weight that its layer keeps, got one made of what TrainableTokensWrapper"
    ):
        model.merge_adapter()
    assert_same(model, expected)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        assert_same(peft.PeftModel.from_pretrained(gpt2(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage), expected)


MODULES = {
    "ConditionalDetr": "conditional_detr",
    "DabDetr": "dab_detr",
    "Detr": "detr",
    "FalconMamba": "falcon_mamba",
    "Jamba": "jamba",
    "Longcat": "longcat_flash",
    "Mamba": "mamba",
    "MaskFormer": "maskformer",
    "MobileBert": "mobilebert",
    "TDNN": "wav2vec2",
}


@pytest.mark.parametrize("name", targets._READ)
def test_the_layers_that_are_said_to_be_read_are(name):
    found = next(module for start, module in MODULES.items() if name.startswith(start))
    module = importlib.import_module(f"transformers.models.{found}.modeling_{found}")
    source = inspect.getsource(getattr(module, name))
    for layer in targets._READ[name]:
        assert f"self.{layer}.weight" in source


@pytest.mark.parametrize("method", ["slora", "residual"])
def test_what_is_read_and_not_called_is_refused_with_a_core_and_said_of_plain_lora(method):
    config = transformers.MobileBertConfig(
        **SIZES, num_hidden_layers=1, embedding_size=16, intra_bottleneck_size=24, true_hidden_size=24
    )
    model = transformers.MobileBertForMaskedLM(config)
    message = "MobileBertLMPredictionHead reads the weight of 'cls.predictions.dense' instead of calling it"
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, NLoraConfig(r=4, target_modules="all-linear", **METHODS[method]))
    assert not any("lora" in name for name, _ in model.named_modules())
    with pytest.warns(UserWarning, match=message):
        peft.get_peft_model(model, NLoraConfig(r=4, target_modules=["cls.predictions.dense"], init_lora_weights=True))


@pytest.mark.parametrize("config", [NLoraConfig, LoRA2Config])
def test_pefts_own_tuner_makes_no_other_adapter_by_itself(config):
    with pytest.raises(ValueError, match=f"LoraModel makes no adapters of a {config.__name__}"):
        peft.LoraModel(nn.Sequential(nn.Linear(8, 8)), config(r=2, target_modules=["0"]), "default")


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("how", ["module", "hook"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("train", [False, True])
def test_what_stands_in_the_place_of_dropout_is_called(method, how, train):
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), NLoraConfig(r=2, target_modules=["0"], **METHODS[method])
    )
    layer, x = model.base_model.model[0].train(train), torch.randn(5, 8)
    nn.init.normal_(layer.lora_B["default"].weight)
    before, alone = model(x), layer.get_base_layer()(x)
    if how == "module":
        layer.lora_dropout["default"] = Twice()
    else:
        layer.lora_dropout["default"].register_forward_hook(lambda module, args, y: 2 * y)
    # Twice the adapter's own product; a residual one's initial product has no dropout.
    torch.testing.assert_close(model(x), before + (before - alone), rtol=1e-4, atol=1e-4)
    assert "has dropout" in nk.layers.unfused(model)["base_model.model.0"]
