"""Adapters on the experts of transformers' mixtures, whose weights are parameters of three dimensions."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora import ParamWrapper

import nlora_kernels as nk
from bench import test_experts as measured
from bench.timing import peak_bytes
from nlora_kernels import checkpoint
from nlora_kernels.layers import experts
from nlora_kernels.peft import NLoraConfig, fuse, unfuse
from nlora_kernels.peft.experts import FusedExperts, NLoraExperts
from python_tests import tiny
from python_tests.peft.adapters import METHODS, close, config, logits
from python_tests.peft.mixtures import (
    LAYERS_BEFORE,
    PARAMETERS,
    TARGETS,
    adapted,
    by_hand,
    counted,
    gradients,
    to_all_experts,
    wrappers,
)
from python_tests.tiny import MIXTURES, perturb, tokens


@pytest.fixture
def calls(monkeypatch):
    return counted(monkeypatch)


@pytest.mark.parametrize("kind", [*MIXTURES, "deepseek_v3"])
def test_plain_lora_computes_what_peft_does(kind, calls):
    mixture = getattr(tiny, kind)()
    model = peft.get_peft_model(copy.deepcopy(mixture), peft.LoraConfig(r=4, lora_alpha=6, **TARGETS))
    perturb(model)
    expected, grads = logits(model), gradients(model)
    assert not calls
    fuse(model)
    assert {type(layer) for layer in wrappers(model)} == {FusedExperts} and not nk.layers.unfused(model)
    close(logits(model), expected)
    # Two layers in each of two mixtures.
    assert len(calls) == 4
    for name, grad in gradients(model).items():
        close(grad, grads[name])
    unfuse(model)
    assert {type(layer) for layer in wrappers(model)} == {ParamWrapper}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_base_model_with_its_products_added(mixture, method, calls):
    model = adapted(mixture, method)
    found = logits(model)
    assert len(calls) == 4 and not nk.layers.unfused(model)
    # No weight of its size is made: what the product reads is the parameter.
    weights = {layer.get_param().data_ptr() for layer in wrappers(model)}
    assert {args[2].data_ptr() for args in calls} == weights
    assert (found - logits(mixture)).abs().max() > 1e-3
    with model.disable_adapter():
        close(logits(model), logits(mixture), atol=1e-6)
    for layer in wrappers(model):
        close(layer.get_delta_weight("default"), by_hand(layer))
        layer.get_param().data += by_hand(layer)
        layer.set_adapter([])
    close(logits(model), found, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "nlora", "nlora_residual"])
def test_what_cannot_be_fused_runs_as_in_peft(mixture, method, monkeypatch, calls):
    model = adapted(mixture, method)
    expected, grads = logits(model), gradients(model)
    calls.clear()
    monkeypatch.setattr(experts, "obstacle", lambda base: "not today")
    close(logits(model), expected)
    for name, grad in gradients(model).items():
        close(grad, grads[name])
    assert not calls and set(nk.layers.unfused(model).values()) == {"not today"}


@pytest.mark.parametrize("method", METHODS)
def test_training_saving_loading_and_merging(mixture, method, tmp_path):
    model = peft.get_peft_model(copy.deepcopy(mixture), config(method, **TARGETS))
    trained = {name.rsplit(".lora_")[1][0] for name, p in model.named_parameters() if p.requires_grad}
    others = {"lora": {*"AB"}, "lora2": {*"vuEUV"}}
    assert trained == others.get(method, {"N"} if method.startswith("inttune") else {*"ANB"})
    if "residual" in method or method in ("lora", "slora", "slora_gaussian", "lora2"):
        close(logits(model), logits(mixture), atol=1e-4)
    if method == "lora2":
        # Where it begins, four steps move nothing yet.
        perturb(model, 0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(mixture), tmp_path)
    assert torch.equal(logits(loaded), expected)
    loaded.merge_adapter()
    close(logits(loaded), expected, atol=1e-4)
    loaded.unmerge_adapter()
    close(logits(loaded), expected, atol=1e-4)
    close(logits(loaded.unload()), logits(mixture), atol=1e-4)
    close(logits(model.merge_and_unload(safe_merge=True)), expected, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "nlora", "lora2"])
def test_a_safe_merge_refuses_what_is_not_finite(mixture, method):
    layer = wrappers(adapted(mixture, method))[-1]
    layer.lora_B["default"].weight.data[0, 0] = torch.inf
    before = layer.get_param().clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.get_param(), before) and not layer.merged


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep_patterns", [True, False])
def test_export_is_right_for_stock_peft(mixture, method, keep_patterns, tmp_path):
    check_export(mixture, adapted(mixture, method), keep_patterns, tmp_path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", LAYERS_BEFORE)
def test_export_of_the_layers_of_transformers_4(kind, method, tmp_path):
    base = MIXTURES[kind]()
    model = peft.get_peft_model(copy.deepcopy(base), config(method, target_modules=["q_proj", *LAYERS_BEFORE[kind]]))
    perturb(model)
    # The two fused layers have twice the rank.
    assert {layer.r["default"] for layer in wrappers(model)} == {4, 8}
    check_export(base, model, True, tmp_path)


def check_export(base, model, keep_patterns, folder):
    expected = logits(model)
    model.save_pretrained(folder / "own")
    with pytest.warns() if not keep_patterns else pytest.MonkeyPatch.context():
        checkpoint.to_lora(folder / "own", folder / "lora", keep_patterns=keep_patterns)
    exported = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "lora")
    assert type(exported.peft_config["default"]) is peft.LoraConfig
    assert {type(layer) for layer in wrappers(exported)} == {ParamWrapper}
    close(logits(exported), expected, atol=1e-4)


@pytest.mark.parametrize("kind", LAYERS_BEFORE)
def test_the_layers_of_transformers_4_are_the_parameters_of_5(kind):
    base, targets = MIXTURES[kind](), ["q_proj", *LAYERS_BEFORE[kind]]

    def trained(config):
        model = peft.get_peft_model(copy.deepcopy(base), config)
        return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}, model

    expected, _ = trained(peft.LoraConfig(r=2, target_modules=targets))
    assert trained(NLoraConfig(r=2, init_lora_weights=True, target_modules=targets))[0] == expected
    found, model = trained(NLoraConfig(r=2, target_modules=targets))
    cores = {name for name in found if ".lora_N." in name}
    assert {name: shape for name, shape in found.items() if name not in cores} == expected
    # The two fused layers have twice the rank.
    E = wrappers(model)[0].num_experts
    assert {tuple(found[name]) for name in cores} == {(2, 2), (E * 2, 2), (E * 4, 4)}
    assert not any("gate.weight" in name or "router" in name for name in found)


def test_a_half_of_a_fused_layer_is_refused():
    with pytest.raises(ValueError, match="w3"):
        peft.get_peft_model(MIXTURES["mixtral"](), NLoraConfig(r=2, target_modules=["w1", "w2"]))


def test_one_of_the_two_layers(mixture, calls):
    for parameter in PARAMETERS:
        model = adapted(mixture, "nlora", target_modules=[], target_parameters=[parameter])
        expected = copy.deepcopy(mixture)
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, ParamWrapper):
                expected.get_submodule(name).get_parameter(layer.parameter_name).data += by_hand(layer)
        close(logits(model), logits(expected), atol=1e-4)
    assert len(calls) == 8


def test_several_adapters(mixture, calls):
    options = TARGETS | {"target_modules": []}
    model = adapted(mixture, "lora", **options)
    model.add_adapter("core", config("nlora", **options))
    perturb(model, adapter="core")
    assert {type(layer) for layer in wrappers(model)} == {NLoraExperts}
    found = {}
    for name in ("default", "core"):
        model.set_adapter(name)
        calls.clear()
        found[name] = logits(model)
        assert len(calls) == 4
    assert (found["core"] - found["default"]).abs().max() > 1e-3
    model.base_model.set_adapter(["default", "core"])
    calls.clear()
    both, grads = logits(model), gradients(model)
    assert calls and not nk.layers.unfused(model)
    assert all(grads[name].any() for name in grads) and {name.split(".")[-2] for name in grads} == {"default", "core"}
    added = {id(layer): by_hand(layer) + by_hand(layer, "core") for layer in wrappers(model)}
    model.delete_adapter("core")
    assert not any(".core." in name for name in model.state_dict())
    for layer in wrappers(model):
        layer.get_param().data += added[id(layer)]
    close(logits(model.unload()), both, atol=1e-4)


def test_the_nystrom_matrices_are_rows_and_columns_of_each_expert(mixture):
    model = peft.get_peft_model(copy.deepcopy(mixture), NLoraConfig(r=4, **TARGETS))
    for layer in wrappers(model):
        W, (A, N, B) = layer.weight(), layer.matrices("default")
        assert torch.equal(A, W[:, :4]) and torch.equal(B, W[:, :, :4]) and torch.equal(N, W[:, :4, :4])


@pytest.mark.parametrize("select", nk.init.SELECTIONS)
@pytest.mark.parametrize("core", nk.init.CORES)
def test_one_call_initialises_every_expert_as_it_would_be_alone(select, core):
    W = torch.randn(5, 14, 11)
    together = nk.init.nystrom(W, 3, core=core, select=select, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    alone = [nk.init.nystrom(each, 3, core=core, select=select, generator=generator) for each in W]
    for stacked, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(stacked, torch.stack(each), rtol=1e-4, atol=1e-4)


def test_random_matrices_of_experts_have_the_spread_of_one():
    W = torch.empty(50, 20, 30)
    A, N, B = nk.init.adapter(W, 4, "slora")
    assert A.shape == (50, 4, 30) and N.shape == (50, 4, 4) and not B.any()
    assert 0.95 * 30**-0.5 < A.abs().max() <= 30**-0.5 and 0.95 * 0.5 < N.abs().max() <= 0.5
    assert nk.init.adapter(W, 4, "lora")[1] is None


def test_hooks_and_other_implementations_are_left_to_transformers(mixture, calls):
    model = adapted(mixture, "nlora")
    expected, base = logits(model), wrappers(model)[0].get_base_layer()
    calls.clear()
    handle = base.register_forward_hook(lambda *args: None)
    close(logits(model), expected)
    assert len(calls) == 2 and list(nk.layers.unfused(model).values()) == ["it has hooks"] * 2
    handle.remove()
    assert not nk.layers.unfused(model)
    base.config._experts_implementation = "sonicmoe"
    assert "'sonicmoe'" in nk.layers.experts.obstacle(base)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", experts.IMPLEMENTATION])
def test_ours_stands_in_for_the_ways_of_transformers_and_is_one_of_them(mixture, implementation, calls):
    model = adapted(mixture, "nlora")
    expected = logits(model)
    model.base_model.model.set_experts_implementation(implementation)
    calls.clear()
    close(logits(model), expected)
    assert len(calls) == 4 and not nk.layers.unfused(model)
    # Without adapters transformers computes, by our way where it was chosen.
    calls.clear()
    with model.disable_adapter():
        close(logits(model), logits(mixture))
    close(logits(model.merge_and_unload()), expected, atol=1e-4)
    assert len(calls) == (8 if implementation == experts.IMPLEMENTATION else 0)


def test_a_router_is_named_as_no_layer_of_experts():
    options = {"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}
    found = nk.layers.unfused(peft.get_peft_model(tiny.mixtral(), config("lora", **options)))
    said = "its type is MixtralTopKRouter, which is no layer of experts of transformers"
    assert len(found) == 2 and set(found.values()) == {said}


def test_gradients_of_the_router_and_second_derivatives(mixture):
    model = adapted(mixture, "nlora").double()
    layer = next(layer for name, layer in model.named_modules() if name.endswith("mlp.experts"))
    x = torch.randn(3, 32, dtype=torch.double, requires_grad=True)
    weights = torch.rand(3, 2, dtype=torch.double, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 2], [2, 0]])
    assert torch.autograd.gradcheck(lambda *t: layer(t[0], index, t[1]), (x, weights))
    assert torch.autograd.gradgradcheck(lambda *t: layer(t[0], index, t[1]), (x, weights), atol=1e-4)


def test_an_index_past_the_last_is_no_expert(mixture):
    model = adapted(mixture, "nlora")
    layer = next(layer for name, layer in model.named_modules() if name.endswith("mlp.experts"))
    x, weights, E = torch.randn(3, 32), torch.rand(3, 2), layer.num_experts
    alone = layer(x, torch.tensor([[0, 1], [1, 2], [2, 0]]), weights * torch.tensor([1.0, 0]))
    close(layer(x, torch.tensor([[0, E], [1, E], [2, E]]), weights), alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_adapters_in_fp32(mixture, dtype, prefer):
    model = to_all_experts(adapted(copy.deepcopy(mixture).to(dtype), "nlora"))
    assert {layer.lora_N["default"].weight.dtype for layer in wrappers(model)} == {torch.float32}
    exact = logits(to_all_experts(adapted(mixture, "nlora")))
    found = logits(model)
    assert found.dtype == dtype and all(grad.isfinite().all() for grad in gradients(model).values())
    prefer("reference")
    bound = 2 * (logits(model) - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert (found - exact).norm() <= bound


def test_a_norm_after_each_expert_is_computed():
    muse = pytest.importorskip("transformers.models.muse_spark.modeling_muse_spark")
    sizes = {"moe_hidden_size": 32, "moe_intermediate_size": 24, "num_local_experts": 4}
    module = muse.MuseSparkExperts(muse.MuseSparkTextConfig(**sizes, experts_implementation="eager"))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    arguments = torch.randn(3, 32), torch.tensor([[0, 1], [3, 2], [2, 0]]), torch.rand(3, 2)
    assert experts.obstacle(module) is None
    close(experts.forward(module, *arguments, {}), module(*arguments))


def test_what_is_not_supported_is_named(mixture):
    for options, message in (
        ({"r": 100}, "r must be at least 1 and at most min"),
        ({"lora_dropout": 0.1}, "does not work with lora_dropout"),
    ):
        base = copy.deepcopy(mixture)
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(base, NLoraConfig(**TARGETS | {"target_modules": []} | options))
        close(logits(base), logits(mixture), atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_as_many_numbers_are_trained_as_the_method_has(mixture, method):
    r, k, expected = 4, 2, 0
    model = peft.get_peft_model(copy.deepcopy(mixture), config(method, **TARGETS))
    for name, W in mixture.named_parameters():
        if name.endswith((*PARAMETERS, "q_proj.weight")):
            E, sides = W.shape[:-2].numel(), sum(W.shape[-2:])
            numbers = {
                "lora": r * sides,
                "lora2": k * sides + 2 * r * k + r,
                "inttune": r * r,
                "inttune_residual": r * r,
            }
            expected += E * numbers.get(method, r * sides + r * r)
    assert model.get_nb_trainable_parameters()[0] == expected
    if method == "lora":
        stock = peft.get_peft_model(copy.deepcopy(mixture), peft.LoraConfig(r=r, **TARGETS))
        assert stock.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("method", ["lora", "nlora"])
@pytest.mark.parametrize("of", measured.MIXTURES, ids=str)
def test_the_memory_above_the_frozen_experts_is_a_fraction_of_pefts(of, method):
    layers, inputs = measured.compared(of, method), measured.given(of)
    peaks = {
        name: peak_bytes(lambda layer=layer: measured.results(layer, *inputs))
        for name, layer in layers._asdict().items()
    }
    assert peaks["ours"] - peaks["floor"] <= 0.3 * (peaks["peft"] - peaks["floor"])
