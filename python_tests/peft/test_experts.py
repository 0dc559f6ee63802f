"""Adapters on the experts of transformers' mixtures, whose weights are parameters of three dimensions."""

import copy

import peft
import pytest
import torch
from peft.tuners.lora import ParamWrapper

import nlora_kernels as nk
from nlora_kernels import checkpoint
from nlora_kernels.layers import experts
from nlora_kernels.peft import NLoraConfig, fuse, unfuse
from nlora_kernels.peft.experts import FusedExperts, NLoraExperts
from python_tests.peft.adapters import METHODS, close, config, logits
from python_tests.tiny import MIXTURES, perturb, tokens

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
TARGETS = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
# Names of the layers that transformers 4 had.
LAYERS_BEFORE = {"mixtral": ["w1", "w2", "w3"], "qwen3_moe": ["gate_proj", "up_proj", "down_proj"]}


@pytest.fixture(params=MIXTURES, scope="module")
def mixture(request):
    return MIXTURES[request.param]()


@pytest.fixture
def calls(monkeypatch):
    """Of the grouped product."""
    made = []

    def counted(*args, **options):
        made.append(args)
        return nk.lora_grouped_linear(*args, **options)

    monkeypatch.setattr(experts, "lora_grouped_linear", counted)
    return made


def adapted(base, method, **options):
    model = peft.get_peft_model(copy.deepcopy(base), config(method, **TARGETS | options))
    perturb(model)
    return model


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


def gradients(model):
    model.zero_grad()
    model(tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(layer, name="default"):
    """s·B·N·A of every expert, as the parameter is stored, from the packed weights by indices."""
    s, E, r = layer.scaling[name], layer.num_experts, layer.r[name]
    deltas = []
    for e in range(E):
        if hasattr(layer, "lora_E"):
            v, u, values, U, V, mask = (getattr(layer, f"lora_{kind}")[name].weight for kind in [*"vuEUV", "mask"])
            own, k = slice(e * r, (e + 1) * r), layer.k[name]
            core = U[:, own] @ torch.diag(values[own] * mask[own]) @ u[own]
            deltas.append(s * V[:, e::E] @ core @ v[e * k : (e + 1) * k])
            continue

        def products(suffix, e=e):
            A, N, B = (
                getattr(layer, f"lora_{kind}")[name].weight if name in getattr(layer, f"lora_{kind}", {}) else None
                for kind in (f"A{suffix}", f"N{suffix}", f"B{suffix}")
            )
            A = (layer.lora_A[name].weight if A is None else A)[e * r : (e + 1) * r]
            B = (layer.lora_B[name].weight if B is None else B)[:, e::E]
            return B @ (torch.eye(r) if N is None else N[e * r : (e + 1) * r]) @ A

        delta = products("")
        if name in getattr(layer, "lora_N0", {}):
            delta = delta - products("0")
        deltas.append(s * delta)
    stacked = torch.stack(deltas)
    return stacked.transpose(1, 2) if layer.get_base_layer().is_transposed else stacked


def test_plain_lora_computes_what_peft_does(mixture, calls):
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep_patterns", [True, False])
def test_export_is_right_for_stock_peft(method, keep_patterns, tmp_path):
    base = MIXTURES["gpt_oss"]()
    model = adapted(base, method)
    expected = logits(model)
    model.save_pretrained(tmp_path / "own")
    with pytest.warns() if not keep_patterns else pytest.MonkeyPatch.context():
        checkpoint.to_lora(tmp_path / "own", tmp_path / "lora", keep_patterns=keep_patterns)
    exported = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
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
    # Both at once are added to the parameter, as in PEFT.
    model.base_model.set_adapter(["default", "core"])
    calls.clear()
    both = logits(model)
    assert not calls and "several adapters are active" in next(iter(nk.layers.unfused(model).values()))
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
def test_half_precision_with_adapters_in_fp32(mixture, dtype):
    model = adapted(copy.deepcopy(mixture).to(dtype), "nlora")
    assert {layer.lora_N["default"].weight.dtype for layer in wrappers(model)} == {torch.float32}
    exact = logits(adapted(mixture, "nlora"))
    found = logits(model)
    assert found.dtype == dtype and all(grad.isfinite().all() for grad in gradients(model).values())
    assert (found - exact).norm() <= 0.05 * exact.norm()


def test_what_is_not_supported_is_named(mixture):
    for options, message in (
        ({"r": 100}, "r must be at least 1 and at most min"),
        ({"lora_dropout": 0.1}, "does not work with lora_dropout"),
    ):
        base = copy.deepcopy(mixture)
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(base, NLoraConfig(**TARGETS | {"target_modules": []} | options))
        close(logits(base), logits(mixture), atol=0)


# LoRA² on experts


def apart(model):
    """The LoRA² adapters of a model with one module for each expert, and gradients if there are."""
    alone = torch.nn.Module()
    for i, layer in enumerate(nk.lora2.layers(model)):
        E = layer.count
        k, r = layer.k, layer.r // E
        for e in range(E):
            own = torch.nn.Module()
            parts = {
                "E": lambda t, at=slice(e * r, (e + 1) * r): t[at],
                "u": lambda t, at=slice(e * r, (e + 1) * r): t[at],
            }
            parts["U"] = lambda t, at=slice(e * r, (e + 1) * r): t[:, at]
            parts["v"], parts["V"] = lambda t, at=slice(e * k, (e + 1) * k): t[at], lambda t, e=e, E=E: t[:, e::E]
            for kind, part in parts.items():
                tensor = getattr(layer, f"lora_{kind}")
                own.register_parameter(f"lora_{kind}", torch.nn.Parameter(part(tensor.detach()).clone()))
                if tensor.grad is not None:
                    getattr(own, f"lora_{kind}").grad = part(tensor.grad).clone()
            own.register_buffer("lora_mask", layer.lora_mask[e * r : (e + 1) * r].clone())
            alone.add_module(f"{i}_{e}", own)
    return alone


@pytest.mark.parametrize("scores", ["rows", "full"])
def test_singular_values_are_kept_as_if_every_expert_were_a_layer(mixture, scores):
    model = adapted(mixture, "lora2")
    model(tokens(), labels=tokens()).loss.backward()
    options = dict(target_rank=2, total_steps=3, t_init=0, t_final=1, delta_t=1, scores=scores)
    together, alone = nk.lora2.RankAllocator(model, **options), nk.lora2.RankAllocator(apart(model), **options)
    layers = nk.lora2.layers(model)
    for _ in range(3):
        assert together.step() == alone.step()
        assert [int(n) for n in together.ranks().values()] == summed(alone.ranks().values(), layers)
    scores = zip(together.importance().values(), layers, strict=True)
    expected = iter(alone.importance().values())
    for found, layer in scores:
        torch.testing.assert_close(found, torch.cat([next(expected) for _ in range(layer.count)]))
    kept = sum(int(layer.lora_mask.sum()) for layer in layers)
    assert kept == 2 * sum(layer.count for layer in layers) < sum(layer.r for layer in layers)
    # What was pruned is out of the model.
    found = logits(model)
    for layer in layers:
        layer.lora_E.data[layer.lora_mask == 0] = 7.0
    close(logits(model), found)
    with pytest.raises(ValueError, match="no LoRA² adapters on experts"):
        nk.lora2.compress(model)


def summed(ranks, layers):
    ranks = iter(ranks)
    return [sum(next(ranks) for _ in range(layer.count)) for layer in layers]


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_the_penalty_of_experts_is_that_of_layers(mixture, form):
    model = adapted(mixture, "lora2")
    layers, alone = nk.lora2.layers(model), apart(model)
    value, expected = nk.lora2.orthogonal_penalty(model, form), nk.lora2.orthogonal_penalty(alone, form)
    close(value, expected)
    value.backward()
    expected.backward()
    found = apart(model)
    for own, other in zip(found.children(), alone.children(), strict=True):
        for kind in ("v", "u", "V", "U"):
            close(getattr(own, f"lora_{kind}").grad, getattr(other, f"lora_{kind}").grad)
    assert any(layer.count > 1 for layer in layers)


def test_ranks_of_a_fused_layer_are_exported_with_their_scaling(tmp_path):
    base = MIXTURES["mixtral"]()
    model = peft.get_peft_model(
        copy.deepcopy(base), config("lora2", target_modules=["q_proj", *LAYERS_BEFORE["mixtral"]])
    )
    perturb(model)
    # The two fused layers have twice the rank.
    assert {layer.r["default"] for layer in wrappers(model)} == {4, 8}
    model.save_pretrained(tmp_path / "own")
    checkpoint.to_lora(tmp_path / "own", tmp_path / "lora", keep_patterns=True)
    close(logits(peft.PeftModel.from_pretrained(base, tmp_path / "lora")), logits(model), atol=1e-4)
