"""LoRA² training of PEFT models, from pruning to the vanilla export."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file

import nlora_kernels as nk
from nlora_kernels.lora2 import RankAllocator
from nlora_kernels.peft import LoRA2Config
from python_tests.tiny import llama, tokens


def pruned(**options):
    base = llama()
    config = LoRA2Config(r=6, k=3, lora_alpha=9, target_modules="all-linear", **options)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.mul_(10).add_(0.05 if "lora_E" in name else 0)
    allocator = RankAllocator(model, target_rank=2, total_steps=8, t_init=2, t_final=2, delta_t=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for seed in range(8):
        ids = tokens(4, 9, seed=seed)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    # One layer that is left with nothing.
    nk.lora2.layers(model)[3].lora_mask.zero_()
    return base, model.eval(), allocator


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def test_scores_and_penalty_are_those_of_the_plain_layers():
    _, model, allocator = pruned()
    twins = torch.nn.ModuleList()
    for layer in nk.lora2.layers(model):
        tensors = (layer.lora_v, layer.lora_u, layer.lora_E, layer.lora_U, layer.lora_V)
        base = layer.module.get_base_layer()
        twin = nk.LoRA2Linear(
            torch.nn.Linear(base.in_features, base.out_features), *(t.detach().clone() for t in tensors)
        )
        twin.lora_mask.copy_(layer.lora_mask)
        twins.append(twin)
    assert len(twins) == len(allocator.importance()) == 14
    assert all(name.startswith("base_model.model.model.layers") for name in allocator.importance())
    for form in ("paper", "reference"):
        assert nk.lora2.orthogonal_penalty(model, form) == nk.lora2.orthogonal_penalty(twins, form)
    adapters = RankAllocator(model, target_rank=1, total_steps=8, t_init=2, t_final=2, delta_t=2)
    plain = RankAllocator(twins, target_rank=1, total_steps=8, t_init=2, t_final=2, delta_t=2)
    for layer, twin in zip(nk.lora2.layers(model), nk.lora2.layers(twins), strict=True):
        for t, other in zip(layer.scored, twin.scored, strict=True):
            t.grad = torch.randn_like(t)
            other.grad = t.grad.clone()
    for _ in range(4):
        assert adapters.step() == plain.step()
    for scores, expected in zip(adapters.importance().values(), plain.importance().values(), strict=True):
        assert torch.equal(scores, expected)
    assert list(adapters.ranks().values()) == list(plain.ranks().values())


@pytest.mark.parametrize("use_rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 5}}], ids=["", "patterns"]
)
def test_a_compressed_model_saves_loads_and_exports(use_rslora, patterns, tmp_path):
    base, model, _ = pruned(use_rslora=use_rslora, **copy.deepcopy(patterns))
    expected = logits(model)
    assert (expected - logits(base)).abs().max() > 1e-2
    scalings = {layer.name: layer.module.scaling["default"] for layer in nk.lora2.layers(model)}
    ranks = nk.lora2.compress(model)
    assert sum(ranks.values()) < 6 * 14 and len(set(ranks.values())) > 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path / "small")
    shapes = {name: t.shape for name, t in load_file(tmp_path / "small" / "adapter_model.safetensors").items()}
    assert {name: shapes[f"{name}.lora_E.weight"][0] for name in ranks} == ranks
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "small")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    for layer in nk.lora2.layers(loaded):
        assert layer.module.r["default"] == ranks[layer.name]
        assert layer.module.scaling["default"] == pytest.approx(scalings[layer.name], rel=1e-12)

    nk.checkpoint.to_lora(tmp_path / "small", tmp_path / "vanilla")
    vanilla = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "vanilla")
    assert type(vanilla.peft_config["default"]) is peft.LoraConfig
    torch.testing.assert_close(logits(vanilla), expected, rtol=1e-5, atol=1e-5)


def test_the_active_adapter_is_the_one_that_is_pruned():
    _, model, _ = pruned()
    kept = [layer.lora_mask.clone() for layer in nk.lora2.layers(model)]
    model.add_adapter("other", LoRA2Config(r=3, k=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    assert {(layer.adapter, layer.r, layer.k) for layer in nk.lora2.layers(model)} == {("other", 3, 2)}
    assert set(nk.lora2.compress(model).values()) == {3}
    model.set_adapter("default")
    assert all(torch.equal(la.lora_mask, mask) for la, mask in zip(nk.lora2.layers(model), kept, strict=True))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="one active LoRA² adapter, layer .*q_proj has default, other"):
        nk.lora2.layers(model)


def test_without_init_an_adapter_is_at_work_from_the_start():
    base = llama()
    config = LoRA2Config(r=4, k=2, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    assert (logits(model) - logits(base)).abs().max() > 1e-2


def test_other_adapters_are_no_layers():
    model = peft.get_peft_model(llama(), peft.AdaLoraConfig(total_step=10, target_modules="all-linear"))
    with pytest.raises(ValueError, match="got none"):
        nk.lora2.layers(model)
