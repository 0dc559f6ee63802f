"""Quantised base layers of bitsandbytes and torchao: reading them, fusing adapters on them, merging as PEFT does."""

import copy
import types

import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, quantised
from nlora_kernels.backends.cpu.plans import Plan
from nlora_kernels.layers.branch import unfused
from nlora_kernels.peft import base as base_weights
from nlora_kernels.peft.layer import FusedLinear
from python_tests.peft.adapters import close, config
from python_tests.tiny import VOCABULARY, counted_fusions, perturb, tokens

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


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_a_quantised_layer_is_one_operation(kind, method, mode, has_run):
    model = getattr(adapted(kind, method, has_run=has_run), mode)()
    layer = model.base_model.model[0]
    base, x = layer.get_base_layer(), torch.randn(5, IN)
    apart = kind is int8 and mode == "eval"
    assert bool(layer.obstacle("default")) == apart
    with torch.no_grad(), counted_fusions() as calls:
        branch = x @ layer.get_delta_weight("default").T
        expected = base(x) if apart else x @ weight(layer).T + base.bias
        close(model(x), expected + branch, atol=1e-4)
        assert len(calls) == (0 if apart else 1)
        layer.set_scale("default", 0)
        # The base layer itself, which computes in bf16 on some CPUs.
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_the_layer_and_its_branch(kind, method):
    model = adapted(kind, method).train()
    assert not unfused(model)
    layer = model.base_model.model[0]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    x, dy = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    with counted_fusions() as calls:
        ours = torch.autograd.grad(model(x), (x, *trained.values()), dy)
    assert len(calls) == 1
    dense = layer.get_base_layer()
    apart = torch.nn.functional.linear(x, weight(layer), dense.bias) + sum(
        layer._part(t, x) for t in layer._terms(None)
    )
    for mine, exact in zip(ours, torch.autograd.grad(apart, (x, *trained.values()), dy), strict=True):
        close(mine, exact, atol=1e-4)


@pytest.mark.parametrize("dropped", [False, True], ids=["", "one_drops"])
def test_several_adapters_are_one_operation_with_a_quantised_layer(kind, dropped, monkeypatch):
    model = adapted(kind, "nlora_residual")
    model.add_adapter("lora", config("lora", target_modules=["0"], lora_dropout=1.0 * dropped))
    perturb(model, 0.1, "lora")
    model.base_model.set_adapter(["lora", "default"])
    model.train()
    layer = model.base_model.model[0]
    x, dy = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 5 and bool(unfused(model)) is dropped
    with counted_fusions() as calls:
        ours = torch.autograd.grad(model(x), (x, *trained), dy)
    assert len(calls) == 1
    base = x @ weight(layer).T + layer.get_base_layer().bias
    apart = torch.autograd.grad(base + sum(layer._part(t, x) for t in layer._terms(None)), (x, *trained), dy)
    for mine, exact in zip(ours, apart, strict=True):
        close(mine, exact, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_leaves_the_decoding_of_the_weight_to_the_operation(kind, method):
    model = peft.get_peft_model(network(kind), config(method, target_modules=["0"], lora_dropout=0.5)).train()
    perturb(model)
    layer = model.base_model.model[0]
    x, dy = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert "has dropout" in next(iter(unfused(model).values()))
    torch.manual_seed(1)
    with counted_fusions() as calls:
        ours = torch.autograd.grad(model(x), (x, *trained), dy)
    assert len(calls) == 1
    torch.manual_seed(1)
    base = x @ weight(layer).T + layer.get_base_layer().bias
    apart = torch.autograd.grad(base + sum(layer._part(t, x) for t in layer._terms(None)), (x, *trained), dy)
    for mine, exact in zip(ours, apart, strict=True):
        close(mine, exact, atol=1e-4)
    layer.set_scale("default", 0)
    # The base layer's own bits.
    assert torch.equal(model(x), layer.get_base_layer()(x))


# With the initial product of a residual the base layer has an operation of rank r.
@pytest.mark.parametrize("method", [method for method in METHODS if method != "nlora_residual"])
def test_an_infinity_beside_dropout_does_not_spoil_the_product_with_the_weight(kind, method, monkeypatch):
    model = peft.get_peft_model(network(kind), config(method, target_modules=["0"], lora_dropout=0.5)).train()
    perturb(model)
    layer = model.base_model.model[0]
    monkeypatch.setattr(type(layer), "_part", lambda self, term, x: x.new_zeros(len(x), OUT))
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    x[1, 2], x[3, 0] = torch.inf, -torch.inf
    with counted_fusions() as calls:
        y = model(x.requires_grad_())
    (dx,) = torch.autograd.grad(y, x, dy)
    W = weight(layer)
    assert len(calls) == 1
    torch.testing.assert_close(y, x @ W.T + layer.get_base_layer().bias, rtol=1e-5, atol=1e-4, equal_nan=True)
    close(dx, dy @ W, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_a_module_with_dropout_leaves_it_to_the_operation_too(residual, monkeypatch):
    layer = nk.NLoraLinear.from_linear(nf4_plain(nn.Linear(IN, OUT)), 4, dropout=1.0, residual=residual).train()
    x, W = torch.randn(5, IN), quantised.of_layer(layer.base, layer.base.weight).decode()
    monkeypatch.setattr(type(layer.base), "forward", lambda *args: pytest.fail("the base layer is called"))
    expected = x @ W.T + layer.base.bias
    close(layer(x), expected + x @ layer._excess().product().T if residual else expected, atol=1e-4)


@pytest.mark.parametrize("stock", ["nf4", "int8", "torchao"])
def test_plain_lora_of_peft_is_fused_and_back(stock):
    kind = {"nf4": nf4_nested, "int8": int8, "torchao": KINDS[3]}[stock]
    model = peft.get_peft_model(network(kind), peft.LoraConfig(r=4, target_modules=["0"])).train()
    perturb(model, 0.1)
    layer, x = model.base_model.model[0], torch.randn(5, IN)
    before, y = type(layer), model(x)
    nk.peft.fuse(model)
    with counted_fusions() as calls:
        close(model(x), y, atol=1e-4)
    assert len(calls) == 1 and type(layer).stock == (before.__module__, before.__name__)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["0"]))
    nk.peft.unfuse(model)
    assert type(layer) is before
    close(model(x), y, atol=1e-4)


def test_a_weight_packed_for_the_cpu_is_merged_right():
    model = peft.get_peft_model(network(nf4_nested, has_run=True), peft.LoraConfig(r=4, target_modules=["0"]))
    perturb(model, 0.1)
    layer = nk.peft.fuse(model).base_model.model[0]
    before, delta = weight(layer), layer.get_delta_weight("default").detach()
    layer.merge()
    merged = weight(layer)
    assert (merged - before - delta).norm() <= 0.12 * before.norm()


def corrupt(net):
    state = net[0].weight.quant_state
    state.absmax = state.absmax[1:]
    return net


def test_the_scales_are_those_of_a_weight_that_is_put_into_a_layer_that_has_run():
    layer, other = (int8(nn.Linear(IN, OUT)) for _ in range(2))
    layer(torch.randn(3, IN))
    other.weight.SCB *= 5
    layer.weight = other.weight
    expected = base_weights.read(other)
    assert torch.equal(base_weights.read(layer), expected)
    layer(torch.randn(3, IN))
    assert torch.equal(base_weights.read(layer), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_codes_that_fsdp_keeps_as_a_plain_tensor_are_codes(storage):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(IN, OUT, quant_type="nf4", compute_dtype=torch.float32, quant_storage=storage)
    layer.weight = bnb.nn.Params4bit(torch.randn(OUT, IN), quant_type="nf4", quant_storage=storage).to("cpu")
    net = nn.Sequential(layer)
    net.is_loaded_in_4bit = True
    model = peft.get_peft_model(net, config("slora", target_modules=["0"])).train()
    perturb(model)
    x = torch.randn(3, IN)
    expected, W = model(x), base_weights.read(layer)
    layer.quant_state = layer.weight.quant_state
    layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
    assert torch.equal(base_weights.read(layer), W)
    with counted_fusions() as calls:
        assert torch.equal(model(x), expected)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["Int8DynamicActivationInt8WeightConfig", "Int8DynamicActivationIntxWeightConfig"])
def test_a_layer_that_quantises_its_input_computes_by_itself(name):
    quantization = pytest.importorskip("torchao.quantization")
    layer, x = nn.Linear(IN, OUT), torch.randn(3, IN)
    quantization.quantize_(layer, getattr(quantization, name)())
    expected = layer(x)
    adapter = nk.NLoraLinear.from_linear(layer, 4, init="slora")
    assert adapter.obstacle() == "torchao quantises its input too"
    assert torch.equal(adapter(x), expected)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"])
def test_autocast_leaves_the_dtype_that_a_layer_of_torchao_returns(name, bias):
    net = network(by_torchao(name))
    if not bias:
        net[0].bias = None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), counted_fusions() as calls:
        x = torch.randn(3, IN)
        expected = net(x)
        model = peft.get_peft_model(net, config("slora", target_modules=["0"]))
        y = model(x)
    assert calls and y.dtype == expected.dtype
    close(y.float(), expected.float(), atol=0.05)


@pytest.mark.parametrize("method", ["slora", "lora2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_that_a_layer_of_four_bits_returns(method, dtype):
    model, x = adapted(nf4_plain, method), torch.randn(3, IN, dtype=dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), counted_fusions() as calls:
        y, base = model(x), model.base_model.model[0].get_base_layer()(x)
    assert calls and y.dtype == base.dtype == dtype


def test_a_model_that_was_pickled_is_fused_as_before(tmp_path):
    model, x = adapted(nf4_nested, "slora"), torch.randn(3, IN)
    expected = model(x)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not unfused(loaded)
    assert torch.equal(loaded(x), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_corrupt_quantisation_state_is_said_with_the_name_of_the_layer(method):
    with pytest.raises(ValueError, match="'0' cannot be adapted: there must be 128 scales, got 127"):
        peft.get_peft_model(corrupt(network(nf4_plain)), config(method, target_modules=["0"]))
    model = adapted(nf4_plain, method).train()
    corrupt([model.base_model.model[0].get_base_layer()])
    with pytest.raises(ValueError, match="layer '0': there must be 128 scales, got 127"):
        model(torch.randn(5, IN))


@pytest.mark.parametrize("select", ["leading", "uniform", "norm", "pivoted"])
@pytest.mark.parametrize("core", ["sample", "optimal"])
def test_nystrom_reads_a_quantised_weight_as_it_reads_the_decoded_one(kind, select, core):
    base = network(kind)[0]
    W = base_weights.read(base)
    ours, exact = (
        nk.init.nystrom(w, 6, core=core, select=select, generator=torch.Generator().manual_seed(3))
        for w in (base_weights.readable(base), W)
    )
    for mine, expected in zip(ours, exact, strict=True):
        close(mine, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_trains_saves_loads_merges_and_is_exported(method, tmp_path):
    """Prepared as for QLoRA, with checkpointing: the losses are those of PEFT's way of computing the same layers."""
    losses = {}
    for way in ("fused", "apart"):
        model = peft.prepare_model_for_kbit_training(tiny_nf4())
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config(method))
        perturb(model, 0.01)
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses[way] = []
        with pytest.MonkeyPatch.context() as patch, counted_fusions() as calls:
            if way == "apart":
                patch.setattr("nlora_kernels.layers.branch.obstacle", lambda linear: "compared with")
            for _ in range(3):
                loss = model(tokens(), labels=tokens()).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[way].append(loss.item())
        assert bool(calls) == (way == "fused")
        if way == "fused":
            model.eval()
            with torch.no_grad():
                y = model(tokens()).logits
            model.save_pretrained(tmp_path)
            again = peft.PeftModel.from_pretrained(tiny_nf4(), tmp_path).eval()
            with torch.no_grad():
                close(again(tokens()).logits, y, atol=1e-4)
            check_export(tmp_path, y)
    close(torch.tensor(losses["fused"]), torch.tensor(losses["apart"]), atol=0)


def check_export(folder, expected):
    """What is saved gives the same as plain LoRA in PEFT's own layers on such a base, and is merged by them."""
    for keep_patterns in (False, True):
        nk.checkpoint.to_lora(folder, folder / "plain", keep_patterns=keep_patterns)
        ours, plain = (peft.PeftModel.from_pretrained(tiny_nf4(), each) for each in (folder, folder / "plain"))
        layers = [module for module in plain.modules() if isinstance(module, LoraLayer)]
        assert len(layers) == 14 and not any(isinstance(layer, FusedLinear) for layer in layers)
        # In eval mode, without a graph, bitsandbytes packs weights anew, which rounds their scales.
        with counted_fusions() as calls:
            close(plain.train()(tokens()).logits.detach(), expected, atol=1e-4)
        assert not calls
        for model in (ours, plain):
            model.merge_adapter()
        for name, layer in plain.named_modules():
            if isinstance(layer, LoraLayer):
                merged, theirs = weight(ours.get_submodule(name)), weight(layer)
                # An element at the border of two values may fall to either.
                assert ((merged - theirs).abs() > 1e-3 * theirs.abs().max()).float().mean() < 0.01, name


def tiny_nf4(
    hidden_size: int = 64,
    intermediate_size: int = 128,
    layers: int = 2,
    heads: tuple[int, int] = (4, 2),
    quant_storage: torch.dtype = torch.uint8,
) -> nn.Module:
    """A language model, by default a small one, as transformers loads it in four bits."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    # NOTE: of rows shorter than a block bitsandbytes itself takes the wrong scales on some CPUs.
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": layers}
    sizes |= dict(zip(("num_attention_heads", "num_key_value_heads"), heads, strict=True))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            quantised = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            options = {"quant_storage": quant_storage, "module": quantised}
            quantised.weight = bnb.nn.Params4bit(module.weight.data, quant_type="nf4", **options).to("cpu")
            quantised.quant_storage = quant_storage
            model.set_submodule(name, quantised)
    model.is_loaded_in_4bit = model.is_quantized = True
    return model


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


def as_plain_lora(kind, layer):
    """The adapter of a layer on the same base in PEFT's own layer."""
    A, N, B = (t.detach() for t in layer.matrices("default"))
    options = peft.LoraConfig(r=len(A), lora_alpha=layer.scaling["default"] * len(A), target_modules=["0"])
    model = peft.get_peft_model(network(kind), options)
    stock = model.base_model.model[0]
    stock.lora_A["default"].weight.data.copy_(A)
    stock.lora_B["default"].weight.data.copy_(B @ N)
    return model


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune", "lora2"])
def test_what_is_merged_is_what_peft_merges(kind, method):
    """The same adapter as plain LoRA in PEFT's own layer: both add in high precision and quantise once."""
    model = adapted(kind, method)
    layer = model.base_model.model[0]
    stock = as_plain_lora(kind, layer)
    theirs = stock.base_model.model[0]
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


def allocations(function) -> list[int]:
    """The bytes of everything that PyTorch allocates on the CPU meanwhile."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in events if event.nbytes() > 0]


@pytest.mark.parametrize("plan", ["whole", "adapter", "apart"])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_of_a_model_makes_no_dense_copy_of_any_weight(method, plan, monkeypatch):
    """Whichever way the layers are computed, but PEFT's."""
    monkeypatch.setattr(type(TABLE["cpu"]), "decoding_plan", lambda *sizes: Plan(plan))
    model = peft.get_peft_model(tiny_nf4(hidden_size=256, intermediate_size=256), config(method)).train()
    if plan == "apart":
        monkeypatch.setattr("nlora_kernels.layers.branch.obstacle", lambda linear: "compared with")
    else:
        assert not unfused(model)
    ids = tokens(1, 8)
    largest = max(allocations(lambda: model(ids, labels=ids).loss.backward()))
    # Of the smallest weight, half as large as the others for the keys and values.
    dense = 128 * 256 * torch.finfo(torch.float32).bits // 8
    assert largest >= dense if plan == "apart" else largest <= dense // 2


def test_a_training_step_at_the_size_of_smollm2_makes_no_dense_copy_of_any_weight():
    """Of its 210 linear layers; the embeddings, which are not quantised, are few here."""
    model = tiny_nf4(hidden_size=576, intermediate_size=1536, layers=30, heads=(9, 3))
    model, ids = peft.get_peft_model(model, config("slora")).train(), tokens(1, 8)
    assert not unfused(model)
    largest = max(allocations(lambda: model(ids, labels=ids).loss.backward()))
    # Of the smallest weight, those for the keys and values.
    assert largest <= 192 * 576 * torch.finfo(torch.float32).bits // 8 // 2


def test_torchao_without_its_configuration_is_refused():
    quantise = by_torchao("Int8WeightOnlyConfig")
    net = nn.Sequential(quantise(nn.Linear(IN, OUT)))
    model = peft.get_peft_model(net, config("nlora", target_modules=["0"]))
    with pytest.raises(ValueError, match="load the base model with transformers and a TorchAoConfig"):
        model.merge_adapter()
    assert not model.base_model.model[0].merged


# What is done to a model


def test_a_copy_has_a_weight_of_its_own(kind):
    model, x = adapted(kind, "nlora_residual").train(), torch.randn(3, IN)
    expected, twin = model(x), copy.deepcopy(model)
    base = model.base_model.model[0].get_base_layer()
    (base.weight.qdata if hasattr(base.weight, "qdata") else base.weight.data).zero_()
    assert not torch.equal(model(x), expected)
    with counted_fusions() as calls:
        close(twin(x), expected)
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_dtype_keeps_its_codes(dtype):
    for kind in (nf4_nested, nf4_plain, int8):
        model, x = adapted(kind, "slora").train(), torch.randn(3, IN)
        base = model.base_model.model[0].get_base_layer()
        layer = model.base_model.model[0]
        base.compute_dtype, W = None, weight(layer)
        model.to(dtype)
        x = x.to(dtype)
        with counted_fusions() as calls:
            y = model(x)
        assert calls and y.dtype == dtype and torch.equal(weight(layer), W)
        A, N, B = layer.factors("default")
        tensors = [x, W, A.weight, B.weight, N.weight, base.bias]
        plain, exact = (
            testing.plain_linear(*[t.to(each) for t in tensors], scaling=layer.scaling["default"])
            for each in (dtype, torch.float64)
        )
        bound = 2 * testing.error_norm(plain, exact, 2) + torch.finfo(dtype).eps * exact.norm()
        assert testing.error_norm(y, exact, 2) <= bound


def test_codes_that_are_loaded_in_place_are_those_of_the_next_forward_and_noticed_by_a_backward():
    model, other = adapted(nf4_plain, "slora").train(), adapted(nf4_plain, "slora").train()
    layer, source = (each.base_model.model[0].get_base_layer() for each in (model, other))
    source.weight.data.bitwise_not_()
    x = torch.randn(3, IN, requires_grad=True)
    y = model(x)
    # bitsandbytes itself leaves the scales, which are the same here.
    layer.load_state_dict(source.state_dict(), strict=False)
    assert torch.equal(base_weights.read(layer), base_weights.read(source))
    assert torch.equal(model(x), other(x))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN)], ids=str)
def test_no_rows_are_no_rows(kind, shape):
    model, x = adapted(kind, "nlora_residual").train(), torch.randn(shape, requires_grad=True)
    with counted_fusions() as calls:
        y = model(x)
        y.sum().backward()
    assert calls and y.shape == (*shape[:-1], OUT) and x.grad.shape == shape
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_codes_with_gaps_are_said_with_the_name_of_the_layer():
    model = adapted(nf4_plain, "slora").train()
    base = model.base_model.model[0].get_base_layer()
    base.weight.data = torch.stack([base.weight.data] * 2, 1)[:, 0]
    with pytest.raises(ValueError, match=r"layer '0': the codes must be contiguous, got strides \(2, 1\)"):
        model(torch.randn(3, IN))


def test_merging_again_and_again_wanders_no_further_than_peft(kind):
    """Each time is a rounding to few values, in PEFT's own layer too, with the same adapter as plain LoRA."""
    model = adapted(kind, "slora", scale=0.3)
    layer = model.base_model.model[0]
    stock = as_plain_lora(kind, layer)
    theirs = stock.base_model.model[0]
    off = []
    for each, adapter in ((layer, model), (theirs, stock)):
        before = weight(each)
        for _ in range(6):
            adapter.merge_adapter()
            adapter.unmerge_adapter()
        off.append((weight(each) - before).norm().item())
    ours, expected = off
    assert 0 < ours <= 1.2 * expected


# Of loaders that are not known


class Loaded(torch.Tensor):
    """A weight whose values are half of what is stored, as its library multiplies it."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor) / 2

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            return function(*[t.dequantize() if isinstance(t, Loaded) else t for t in args], **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


class Packed(nn.Module):
    """As layers of GPTQ and AWQ: no weight, but what it is made of."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", linear.weight.detach() * 2)

    def dequantize(self):
        return self.qweight / 2

    def forward(self, x):
        return F.linear(x, self.dequantize())


@pytest.mark.parametrize("method", ("lora", *METHODS))
def test_on_a_weight_that_can_be_dequantised_adapters_are_added_to_the_output_of_its_layer(method):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    W = linear.weight.detach() / 2
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Loaded), requires_grad=False)
    with pytest.warns(UserWarning, match="its weight is a Loaded of torch.float32, not a dense tensor"):
        model = peft.get_peft_model(nn.Sequential(linear), config(method, target_modules=["0"])).train()
    layer, x = model.base_model.model[0], torch.randn(5, IN, requires_grad=True)
    if method == "nlora":
        close(layer.lora_A["default"].weight, W[:4], atol=0)
    perturb(model)
    y, expected = model(x), F.linear(x, W, linear.bias) + x @ layer.get_delta_weight("default").T
    close(y, expected, atol=1e-4)
    for ours, exact in zip(*(torch.autograd.grad(out.sum(), x) for out in (y, expected)), strict=True):
        close(ours, exact, atol=1e-4)
    delta = layer.get_delta_weight("default").detach()
    close(nk.lora_linear(x, linear.weight, torch.eye(IN), delta, bias=linear.bias), expected, atol=1e-4)
    with pytest.raises(ValueError, match="merge needs a base weight that is dense or quantised .* got Loaded"):
        model.merge_adapter()


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_without_a_weight_is_refused_by_name(method):
    net = nn.Sequential(Packed(nn.Linear(IN, OUT)), nn.LayerNorm(OUT))
    with pytest.raises(ValueError, match="Packed"):
        peft.get_peft_model(net, config(method, target_modules=["0"]))
    assert type(net[0]) is Packed
