"""The timing tables of the two papers, on a model of this machine's size: each figure beside what the paper measured.

The papers' models are larger and ran on GPUs, so that what can be compared is the ratio between two methods; a row's
"paper_ratio" is the paper's for the same two. NLoRA is arXiv 2502.14482, LoRA² arXiv 2408.06854. Everything is checked
before it is timed.
"""

import copy
import itertools
import math
import statistics
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from bench import cells, rows
from bench.test_step import ALL, METHODS, Case, Training, checked
from bench.timing import peak_bytes
from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty
from nlora_kernels.lora2.penalty import WEIGHTS
from nlora_kernels.peft import LoRA2Config, NLoraConfig


class Model(NamedTuple):
    name: str
    blocks: int
    r: int
    smoke: bool = False

    def __str__(self) -> str:
        return f"{'smoke-' if self.smoke else ''}{self.name}-blocks{self.blocks}-r{self.r}"


# Rank 128 is the paper's for Llama-2-7B.
MODELS = [Model("SmolLM2-135M", 2, 8, smoke=True), Model("SmolLM2-135M", 30, 128)]
# Table 5 of NLoRA, seconds for Llama-2-7B. It tells neither with which residual nor by which decomposition.
PAPER_INITIALISATION = {"slora": 14.21, "nlora": 25.35, "nlora_residual": 25.35, "lora": 12.69, "pissa": 106903.20}
INITIALISATIONS = {
    "lora": lambda r: NLoraConfig(r=r, lora_alpha=r, init_lora_weights=True, **ALL),
    "slora": lambda r: NLoraConfig(r=r, lora_alpha=r, init_lora_weights="slora", **ALL),
    "nlora": lambda r: NLoraConfig(r=r, lora_alpha=r, init_lora_weights="nystrom", **ALL),
    "nlora_residual": lambda r: NLoraConfig(r=r, lora_alpha=r, init_lora_weights="nystrom", residual=True, **ALL),
    "olora": lambda r: peft.LoraConfig(r=r, lora_alpha=r, init_lora_weights="olora", **ALL),
    "pissa_niter_16": lambda r: peft.LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa_niter_16", **ALL),
    "pissa": lambda r: peft.LoraConfig(r=r, lora_alpha=r, init_lora_weights="pissa", **ALL),
}
# Whose adapters' product is taken out of the weights.
REWRITES = ("nlora_residual", "olora", "pissa_niter_16", "pissa")
SLOW = ("olora", "pissa_niter_16", "pissa")


class Initialisation:
    """peft.get_peft_model on the linear layers of a whole model: what a user waits for before the first step."""

    def __init__(self, model: Model, impl: str):
        self.impl, self.r = impl, model.r
        generator = torch.Generator().manual_seed(0)
        self.base = nn.ModuleList()
        for _ in range(model.blocks):
            block = nn.ModuleDict()
            for name, (K, N) in cells.MODELS[model.name].items():
                block[name] = nn.Linear(K, N, bias=False, device="meta")
                weight = torch.randn(N, K, generator=generator) / math.sqrt(K)
                block[name].weight = nn.Parameter(weight, requires_grad=False)
            self.base.append(block)
        self.prepare()

    def prepare(self) -> None:
        self.model = nn.Module()
        self.model.blocks, self.model.forward = copy.deepcopy(self.base), None

    def __call__(self) -> None:
        self.adapted = peft.get_peft_model(self.model, INITIALISATIONS[self.impl](self.r))

    @torch.no_grad()
    def check(self) -> None:
        """What takes its product out of a weight is to add it again; what does not is to leave the weight as it was."""
        self()
        generator = torch.Generator().manual_seed(1)
        adapted = self.adapted.base_model.model.blocks
        for block, old in zip(adapted, self.base, strict=True):
            for name, layer in block.items():
                weight, before = layer.base_layer.weight, old[name].weight
                if self.impl not in REWRITES:
                    assert torch.equal(weight, before), f"{self.impl} changed the weight of {name}"
                    continue
                assert not torch.equal(weight, before), f"{self.impl} took nothing out of {name}"
                x = torch.randn(8, before.shape[1], generator=generator)
                torch.testing.assert_close(layer(x), x @ before.T, rtol=1e-4, atol=1e-4)
        self.prepare()


@pytest.mark.parametrize("impl", INITIALISATIONS)
@pytest.mark.parametrize("model", [rows.long(model, when=not model.smoke, id=str(model)) for model in MODELS])
def test_initialisation_of_a_model(benchmark, request, model, impl):
    target, others = Initialisation(model, impl), {}
    if impl != "lora":
        others["lora"] = Initialisation(model, "lora")
        others["lora"].check()
    target.check()

    def prepare():
        for each in (target, *others.values()):
            each.prepare()

    info = {"op": "paper, initialisation", "table": "NLoRA, table 5", "shape": _where(model.name, model.blocks)}
    info |= {"r": model.r, "impl": impl, "dtype": "float32"}
    if impl != "lora" and impl in PAPER_INITIALISATION:
        info |= {"paper_ratio": PAPER_INITIALISATION[impl] / PAPER_INITIALISATION["lora"], "paper_against": "lora"}
    # A decomposition of every weight takes minutes, and a ratio in the hundreds needs no third digit.
    rounds = 1 if impl in SLOW else None
    rows.record(benchmark, target, others, info, request, rounds=rounds, prepare=prepare)


# Table 2 of LoRA², seconds an iteration at batch 32 by task: AdaLoRA, LoRA². The sequence lengths are not told.
PAPER_ITERATION = {
    "CoLA": (1.01, 1.14),
    "SST-2": (1.04, 1.19),
    "MRPC": (1.45, 1.68),
    "QQP": (1.44, 1.64),
    "STS-B": (1.05, 1.23),
    "MNLI": (1.31, 1.50),
    "RTE": (1.44, 1.65),
}
STEPS = 100_000


class Classifier(NamedTuple):
    blocks: int
    batch: int
    tokens: int
    k: int
    smoke: bool = False

    def build(self) -> nn.Module:
        shapes = cells.MODELS["DeBERTa-v3-base"]
        hidden, intermediate = shapes["intermediate.dense"]
        config = DebertaV2Config(
            vocab_size=1024,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=12,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=256,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
        )
        torch.manual_seed(0)
        return DebertaV2ForSequenceClassification(config)

    def __str__(self) -> str:
        name = f"DeBERTa-v3-base-blocks{self.blocks}-{self.batch}x{self.tokens}-k{self.k}"
        return f"{'smoke-' if self.smoke else ''}{name}"


CLASSIFIERS = [Classifier(1, 4, 8, 8, smoke=True), Classifier(12, 32, 32, 1), Classifier(12, 32, 32, 8)]


class Iteration:
    """One training step of a classifier whose adapter prunes itself, all that its paper adds to the loss included."""

    def __init__(self, case: Classifier, method: str):
        self.method = method
        base = case.build()
        schedule = {"target_rank": 4, "total_steps": STEPS, "t_init": 0, "t_final": STEPS // 2, "delta_t": 10}
        common = {"task_type": "SEQ_CLS", "target_modules": list(cells.MODELS["DeBERTa-v3-base"])}
        if method == "adalora":
            names = {"target_r": "target_rank", "tinit": "t_init", "tfinal": "t_final", "deltaT": "delta_t"}
            own = {name: schedule[ours] for name, ours in names.items()}
            config = peft.AdaLoraConfig(init_r=8, lora_alpha=8, total_step=STEPS, **own, **common)
        else:
            config = LoRA2Config(r=8, k=case.k, lora_alpha=8, **common)
        self.model = peft.get_peft_model(base, config)
        self.allocator = RankAllocator(self.model, **schedule) if method == "lora2" else None
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        generator = torch.Generator().manual_seed(1)
        self.inputs = {
            "input_ids": torch.randint(1024, (case.batch, case.tokens), generator=generator),
            "labels": torch.randint(2, (case.batch,), generator=generator),
        }
        self.steps = itertools.count(1)

    def __call__(self) -> Tensor:
        # AdaLoRA adds its penalty in the model's forward.
        loss = self.model(**self.inputs).loss
        if self.allocator:
            loss = loss + WEIGHTS["paper"] * orthogonal_penalty(self.model, "paper")
        loss.backward()
        self.optimizer.step()
        if self.allocator:
            self.allocator.step()
        else:
            self.model.base_model.update_and_allocate(next(self.steps))
        self.optimizer.zero_grad()
        return loss.detach()


@pytest.mark.parametrize("case", [rows.long(case, when=not case.smoke, id=str(case)) for case in CLASSIFIERS])
def test_iteration_of_lora2_against_adalora(benchmark, request, case):
    target, other = Iteration(case, "lora2"), Iteration(case, "adalora")
    for each in (target, other):
        before = [p.detach().clone() for p in each.trained]
        assert torch.stack([each() for _ in range(3)]).isfinite().all()
        still = [n for n, (p, old) in enumerate(zip(each.trained, before, strict=True)) if torch.equal(p, old)]
        assert not still, f"{each.method} trains {len(still)} of {len(before)} parameters not"
    shape = f"{_where('DeBERTa-v3-base', case.blocks)}, batch {case.batch} of {case.tokens} tokens, k = {case.k}"
    info = {"op": "paper, iteration", "table": "LoRA², table 2", "shape": shape, "r": 8, "k": case.k}
    info |= {"impl": "lora2", "dtype": "float32"}
    ratios = [ours / theirs for theirs, ours in PAPER_ITERATION.values()]
    info |= {"paper_ratio": statistics.geometric_mean(ratios), "paper_against": "adalora"}
    info |= {"paper_ratios": dict(zip(PAPER_ITERATION, ratios, strict=True))}
    rows.record(benchmark, target, {"adalora": other}, info, request)


# Sections 4.1 and 4.3 of NLoRA: seconds of a training on MetaMathQA, and GB on average, of Llama-2-7B.
PAPER_TRAINING = {"lora": 25142.26, "slora": 27690.03, "nlora": 25323.34, "inttune": 21439.26}
PAPER_MEMORY = {"lora": 36.42, "inttune": 32.78}
TRAININGS = [
    Case("SmolLM2-135M", 1, (9, 3), 1024, 64, 8, smoke=True),
    Case("SmolLM2-135M", 30, (9, 3), 49152, 256, 128),
]


def held_bytes(training: Training) -> int:
    """What the model and the optimizer hold, and the most that one step holds beside them."""
    tensors = {t.data_ptr(): t.nbytes for t in (*training.model.parameters(), *training.model.buffers())}
    states = training.optimizer.state.values()
    tensors |= {t.data_ptr(): t.nbytes for state in states for t in state.values() if isinstance(t, Tensor)}
    return sum(tensors.values()) + peak_bytes(training)


@pytest.mark.parametrize("method", ["slora", "nlora", "inttune"])
@pytest.mark.parametrize("case", [rows.long(case, when=not case.smoke, id=str(case)) for case in TRAININGS])
def test_training_against_lora(benchmark, request, monkeypatch, case, method):
    slora = {"slora": lambda r: NLoraConfig(r=r, lora_alpha=r, init_lora_weights="slora", **ALL)}
    monkeypatch.setattr("bench.test_step.METHODS", METHODS | slora)
    trainings = {name: checked(case, name)[0] for name in ("peft", "lora")}
    trainings[method] = checked.__wrapped__(case, method)[0]
    info: dict[str, Any] = {"op": "paper, training", "table": "NLoRA, sections 4.1 and 4.3", "r": case.r}
    info |= {"shape": f"{_where(case.model, case.blocks)}, {case.tokens} tokens", "impl": method, "dtype": "float32"}
    info |= {"paper_ratio": PAPER_TRAINING[method] / PAPER_TRAINING["lora"], "paper_against": "peft"}
    held = {name: held_bytes(training) for name, training in trainings.items()}
    info |= {"held_bytes": held[method], "held_ratio_to_peft": held[method] / held["peft"]}
    if method in PAPER_MEMORY:
        info["paper_held_ratio"] = PAPER_MEMORY[method] / PAPER_MEMORY["lora"]
    target = trainings.pop(method)
    rows.record(benchmark, target, trainings, info, request)


def _where(model: str, blocks: int) -> str:
    return model if blocks > 2 else f"{model}, {blocks} block{'s' * (blocks > 1)}"
