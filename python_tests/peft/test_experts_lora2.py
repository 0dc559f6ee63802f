"""LoRA² on the experts of mixtures: to allocator, penalty and compression every expert is a layer of its own."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import nlora_kernels as nk
from nlora_kernels import checkpoint
from python_tests.peft.adapters import close, logits
from python_tests.peft.mixtures import adapted
from python_tests.tiny import MIXTURES, perturb, tokens


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


def prune(model):
    """Leaves every layer and expert some of its values, and the last mixture none."""
    generator = torch.Generator().manual_seed(3)
    *others, last = nk.lora2.layers(model)
    for layer in others:
        layer.lora_mask.copy_(torch.rand(layer.lora_mask.shape, generator=generator) < 0.4)
    last.lora_mask.zero_()


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
def test_compressing_leaves_a_mixture_the_rank_of_its_largest_expert(mixture, use_rslora, tmp_path):
    model = adapted(mixture, "lora2", use_rslora=use_rslora, r=6)
    perturb(model, 0.3)
    prune(model)
    expected, layers = logits(model), nk.lora2.layers(model)
    assert (expected - logits(mixture)).abs().max() > 1e-3
    most = {la.name: max(1, int(la.lora_mask.view(la.count, -1).sum(1).max())) for la in layers}
    scalings = {la.name: la.module.scaling["default"] for la in layers}
    ranks = nk.lora2.compress(model)
    assert ranks == most and min(ranks.values()) == 1 and max(ranks.values()) < 6
    close(logits(model), expected)
    for layer in nk.lora2.layers(model):
        E, r, k = layer.count, ranks[layer.name], layer.k
        shapes = [t.shape for t in (layer.lora_E, layer.lora_u, layer.lora_U, layer.lora_mask)]
        assert shapes == [(E * r,), (E * r, k), (k, E * r), (E * r,)]
        assert layer.module.r["default"] == r and not (layer.lora_E * (layer.lora_mask == 0)).any()

    # Nothing is left to drop, and what was pruned stays so.
    assert nk.lora2.compress(model) == ranks
    model(tokens(), labels=tokens()).loss.backward()
    assert all(not (la.lora_E.grad * (la.lora_mask == 0)).any() for la in nk.lora2.layers(model))

    model.save_pretrained(tmp_path / "small")
    shapes = {name: t.shape for name, t in load_file(tmp_path / "small" / checkpoint.WEIGHTS).items()}
    assert {la.name: shapes[f"{la.name}.lora_E.weight"][0] // la.count for la in layers} == ranks
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(mixture), tmp_path / "small")
    close(logits(loaded), expected)
    for layer in nk.lora2.layers(loaded):
        assert layer.module.r["default"] == ranks[layer.name]
        assert layer.module.scaling["default"] == pytest.approx(scalings[layer.name], rel=1e-12)
    for keep_patterns in (True, False):
        with pytest.warns() if not keep_patterns else pytest.MonkeyPatch.context():
            checkpoint.to_lora(tmp_path / "small", tmp_path / "lora", keep_patterns=keep_patterns)
        exported = peft.PeftModel.from_pretrained(copy.deepcopy(mixture), tmp_path / "lora")
        assert type(exported.peft_config["default"]) is peft.LoraConfig
        close(logits(exported), expected, atol=1e-4)


def test_a_compressed_mixture_is_pruned_on():
    model = adapted(MIXTURES["qwen3_moe"](), "lora2", r=6)
    prune(model)
    nk.lora2.compress(model)
    allocator = nk.lora2.RankAllocator(model, target_rank=1, total_steps=2, t_init=0, t_final=1, delta_t=1)
    for _ in range(2):
        model(tokens(), labels=tokens()).loss.backward()
        kept = allocator.step()
    masks = [layer.lora_mask for layer in nk.lora2.layers(model)]
    assert kept == sum(layer.count for layer in nk.lora2.layers(model)) >= sum(int(mask.sum()) for mask in masks)
