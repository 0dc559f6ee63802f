"""Quantised base layers of bitsandbytes and torchao: reading them, adapters on them, merging as PEFT does."""

import copy
import types

import peft
import pytest
import torch
from torch import nn

from nlora_kernels.peft import base as base_weights
from python_tests.peft.adapters import close, config
from python_tests.tiny import perturb

METHODS = ("slora", "nlora", "inttune", "nlora_residual", "inttune_residual", "lora2")
OUT, IN = 64, 128


def nf4(linear: nn.Linear, **options) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    quantised = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=linear.weight.dtype, **options)
    kwargs = {name: getattr(quantised.weight, name) for name in ("quant_type", "compress_statistics")}
    quantised.weight = bnb.nn.Params4bit(linear.weight.data.clone(), **kwargs).to("cpu")
    quantised.bias = linear.bias
    return quantised


def nf4_nested(linear: nn.Linear) -> nn.Module:
    return nf4(linear, compress_statistics=True)


def nf4_plain(linear: nn.Linear) -> nn.Module:
    return nf4(linear, compress_statistics=False)


def int8(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    quantised = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    quantised.weight = bnb.nn.Int8Params(linear.weight.data.clone(), requires_grad=False).to("cpu")
    quantised.bias = linear.bias
    return quantised


def by_torchao(name: str):
    def quantised(linear: nn.Linear) -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        linear = copy.deepcopy(linear)
        quantization.quantize_(linear, getattr(quantization, name)())
        return linear

    quantised.__name__ = name
    return quantised


KINDS = (nf4_nested, nf4_plain, int8, by_torchao("Int8WeightOnlyConfig"), by_torchao("Float8WeightOnlyConfig"))


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["", "has_run"])
def has_run(request):
    return request.param


def network(kind, dtype=torch.float32, has_run=False) -> nn.Module:
    """One quantised layer, as transformers loads it. Inference may pack its weight anew."""
    torch.manual_seed(0)
    net = nn.Sequential(kind(nn.Linear(IN, OUT).to(dtype))).eval()
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind in (nf4_nested, nf4_plain), kind is int8
    if kind.__name__.endswith("Config"):
        quantization = pytest.importorskip("torchao.quantization")
        options = types.SimpleNamespace(get_apply_tensor_subclass=getattr(quantization, kind.__name__))
        net.hf_quantizer = types.SimpleNamespace(quantization_config=options)
    if has_run:
        with torch.no_grad():
            net(torch.randn(3, IN, dtype=dtype))
    return net


def adapted(kind, method, scale=0.1, **options):
    model = peft.get_peft_model(network(kind, **options), config(method, target_modules=["0"]))
    perturb(model, scale)
    return model.eval()


def weight(layer) -> torch.Tensor:
    return base_weights.read(layer.get_base_layer()).clone()


def spacing(kind, W: torch.Tensor) -> torch.Tensor:
    """How far quantising moves an element at most, within what adding to a row can do to its scale."""
    if kind in (nf4_nested, nf4_plain):
        return 0.2 * W.abs().max()
    return (0.07 if "Float8" in kind.__name__ else 0.01) * W.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_is_read_the_same_before_and_after_inference(kind, dtype):
    if kind is int8 and dtype == torch.bfloat16:
        pytest.skip("bitsandbytes quantises by way of fp16")
    net = network(kind, dtype)
    fresh = base_weights.read(net[0]).float()
    with torch.no_grad():
        before = net(torch.eye(IN, dtype=dtype)).float() - net[0].bias.float()
        again = base_weights.read(net[0]).float()
        # Reading changes nothing.
        assert torch.equal(again, base_weights.read(net[0]).float())
        close(net(torch.eye(IN, dtype=dtype)).float() - net[0].bias.float(), before)
    # Absolute maxima in bf16 are what packing loses.
    limit = 2**-7 * fresh.abs().max()
    assert (again - fresh).abs().max() <= limit
    assert (before.T - fresh).abs().max() <= 2 * limit


@pytest.mark.parametrize("method", ["nlora", "nlora_residual"])
def test_nystrom_of_a_base_that_has_run(kind, method, has_run):
    layer = adapted(kind, method, has_run=has_run).base_model.model[0]
    fresh = peft.get_peft_model(network(kind, has_run=has_run), config(method, target_modules=["0"])).base_model.model[
        0
    ]
    W = weight(layer)
    close(fresh.lora_A["default"].weight, W[:4], atol=0)
    close(fresh.lora_B["default"].weight, W[:, :4], atol=0)
    close(fresh.lora_N["default"].weight, W[:4, :4], atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_a_quantised_layer_is_a_branch(kind, method):
    model = adapted(kind, method)
    layer = model.base_model.model[0]
    x = torch.randn(5, IN)
    with torch.no_grad():
        branch = x @ layer.get_delta_weight("default").T
        expected = layer.get_base_layer()(x)
        close(model(x), expected + branch)
        layer.set_scale("default", 0)
        close(model(x), expected)


@pytest.mark.parametrize("safe", [False, True], ids=["", "safe"])
@pytest.mark.parametrize("method", METHODS)
def test_merging_and_unmerging(kind, method, safe, has_run):
    # So that what is added is more than what quantising loses.
    model = adapted(kind, method, scale=0.6, has_run=has_run)
    layer = model.base_model.model[0]
    before, delta = weight(layer), layer.get_delta_weight("default").detach()
    model.merge_adapter(safe_merge=safe)
    assert layer.merged and type(layer.get_base_layer().weight) is type(network(kind)[0].weight)
    merged = weight(layer)
    assert (merged - before - delta).abs().max() <= spacing(kind, merged)
    x = torch.randn(5, IN)
    with torch.no_grad():
        y = model(x)
    assert (y - x @ merged.T - layer.get_base_layer().bias).norm() <= 0.02 * y.norm()
    model.unmerge_adapter()
    assert not layer.merged
    assert (weight(layer) - before).abs().max() <= 2 * spacing(kind, merged)
    assert (weight(layer) - before).norm() < (merged - before).norm()


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune", "lora2"])
def test_what_is_merged_is_what_peft_merges(kind, method):
    """The same adapter as plain LoRA in PEFT's own layer: both add in high precision and quantise once."""
    model = adapted(kind, method)
    layer = model.base_model.model[0]
    A, N, B = (t.detach() for t in layer.matrices("default"))
    options = peft.LoraConfig(r=len(A), lora_alpha=layer.scaling["default"] * len(A), target_modules=["0"])
    stock = peft.get_peft_model(network(kind), options)
    theirs = stock.base_model.model[0]
    theirs.lora_A["default"].weight.data.copy_(A)
    theirs.lora_B["default"].weight.data.copy_(B @ N)
    model.merge_adapter()
    stock.merge_adapter()
    ours, expected = weight(layer), weight(theirs)
    # An element at the border of two values may fall to either.
    differ = (ours - expected).abs() > 1e-3 * expected.abs().max()
    assert differ.float().mean() < 0.005
    unloaded = model.merge_and_unload()
    assert type(unloaded[0]) is type(network(kind)[0])
    assert torch.equal(base_weights.read(unloaded[0]), ours)


@pytest.mark.parametrize("method", METHODS)
def test_a_merge_that_is_not_finite_is_refused_and_changes_nothing(kind, method):
    model = adapted(kind, method)
    layer = model.base_model.model[0]
    before = weight(layer)
    broken = (layer.lora_U if method == "lora2" else layer.lora_N)["default"]
    broken.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(weight(layer), before) and not layer.merged


def test_torchao_without_its_configuration_is_refused():
    quantise = by_torchao("Int8WeightOnlyConfig")
    net = nn.Sequential(quantise(nn.Linear(IN, OUT)))
    model = peft.get_peft_model(net, config("nlora", target_modules=["0"]))
    with pytest.raises(ValueError, match="load the base model with transformers and a TorchAoConfig"):
        model.merge_adapter()
    assert not model.base_model.model[0].merged
