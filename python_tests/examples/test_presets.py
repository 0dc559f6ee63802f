"""The presets are the papers' tables: numbers typed from their text, against the files alone."""

import itertools
import sys

import pytest

from python_tests import ROOT

sys.path.insert(0, str(ROOT / "examples"))
from recipes import presets  # noqa: E402

PRESETS = presets.load()
# Learning rate, batch size, epochs and alpha: DeBERTa-v3-base, then RoBERTa-large.
TABLE_12 = {
    "cola": ("3E-04 16 40 16", "4E-04 8 20 8"),
    "sst2": ("5E-04 16 10 8", "5E-04 16 10 8"),
    "mrpc": ("5E-04 32 100 16", "2E-04 32 50 16"),
    "mnli": ("3E-04 32 10 16", "3E-04 32 10 16"),
    "qnli": ("2E-04 32 20 16", "6E-04 16 10 8"),
    "qqp": ("6E-04 32 20 8", "6E-04 16 10 16"),
    "rte": ("3E-04 32 40 16", "5E-04 32 30 16"),
    "stsb": ("5E-04 16 10 16", "3E-04 16 30 16"),
}
TABLE_13 = {
    "cola": ("3E-04 16 40 16", "4E-04 8 20 8"),
    "sst2": ("5E-04 16 10 8", "5E-04 16 10 8"),
    "mrpc": ("5E-04 32 100 16", "2E-04 32 50 16"),
    "mnli": ("3E-04 32 10 16", "3E-04 32 20 16"),
    "qnli": ("2E-04 32 20 16", "6E-04 16 10 8"),
    "qqp": ("6E-04 32 20 8", "6E-04 16 10 16"),
    "rte": ("3E-04 32 40 16", "5E-04 32 30 16"),
    "stsb": ("5E-04 16 10 16", "3E-04 16 30 16"),
}
# IntTune: learning rate, batch size, epochs; rank and alpha are 8.
TABLE_14 = {
    "cola": "7E-03 16 40",
    "sst2": "6E-03 32 30",
    "mrpc": "4E-03 16 50",
    "mnli": "6E-03 64 20",
    "qnli": "8E-03 64 20",
    "qqp": "6E-03 32 20",
    "rte": "6E-03 16 25",
    "stsb": "6E-03 16 60",
}
# Section 4 of the NLoRA paper.
NLG = {
    "optim": "adamw",
    "batch_size": 4,
    "lr": 2e-4,
    "scheduler": "cosine",
    "warmup": 0.03,
    "weight_decay": 0,
    "dropout": 0,
    "target_modules": ["all-linear"],
    "dtype": "float32",
    "train_size": 100_000,
    "accumulation": 1,
    "epochs": 1,
    "residual": False,
}
QKV = ["query_proj", "key_proj", "value_proj"]
LAYERS = [*QKV, "attention.output.dense", "intermediate.dense", "output.dense"]


def options(name: str, **expected):
    """Those of a preset, after comparing some."""
    found = PRESETS[name].options
    assert {key: found[key] for key in expected} == expected, name
    return found


def numbers(line: str) -> dict:
    keys = ("lr", "batch_size", "epochs", "alpha")
    return {key: float(text) for key, text in zip(keys, line.split(), strict=False)}


@pytest.mark.parametrize(("method", "table"), [("nlora", TABLE_12), ("slora", TABLE_13)], ids=["table 12", "table 13"])
def test_glue_of_nlora_and_slora(method, table):
    for task, lines in table.items():
        for model, line in zip(("deberta", "roberta"), lines, strict=True):
            found = options(f"{method}-glue-{task}-{model}", task=task, method=[method], rank=8, **numbers(line))
            assert (found["optim"], found["scheduler"], found["residual"]) == ("adamw", "cosine", False)
            assert found["target_modules"] == (QKV if model == "deberta" else ["query", "value"])
            # "For MRPC, RTE, and STS-B tasks, we initialized RoBERTa-large with a pretrained MNLI checkpoint."
            start = {"deberta": "microsoft/deberta-v3-base", "roberta": "FacebookAI/roberta-large"}[model]
            mnli = "-mnli" if model == "roberta" and task in ("mrpc", "rte", "stsb") else ""
            assert found["model"] == start + mnli


def test_glue_of_inttune():
    for task, line in TABLE_14.items():
        found = options(f"inttune-glue-{task}-deberta", method=["inttune"], rank=8, alpha=8, **numbers(line))
        assert found["target_modules"] == QKV and found["task"] == task and not found["residual"]


def test_rmsprop():
    for task, (line, _) in TABLE_12.items():
        options(f"nlora-glue-{task}-deberta-rmsprop", optim="rmsprop", rank=8, task=task, **numbers(line))
    for data in ("math", "code", "chat"):
        options(f"nlora-nlg-{data}-llama2-rmsprop", **NLG | {"optim": "rmsprop", "method": ["nlora"], "rank": 128})


def linear_parameters(rank: int, hidden: int, keys: int, inner: int, layers: int) -> int:
    """Of LoRA on every linear layer of a Llama."""
    sizes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    return layers * rank * sum(i + o for i, o in sizes)


def test_nlg():
    data = {"math": ("meta-math/MetaMathQA", ["gsm8k", "math"]), "code": (None, ["humaneval", "mbpp"])}
    # MT-Bench is judged by a hosted model: training is all that a preset of it can set.
    data["chat"] = (None, None)
    models = {"llama2": ("meta-llama/Llama-2-7b-hf", 128), "mistral": ("mistralai/Mistral-7B-v0.1", 64)}
    for method, (model, (path, rank)), (kind, (source, asked)) in itertools.product(
        ("lora", "pissa", "slora", "nlora"), models.items(), data.items()
    ):
        found = options(f"{method}-nlg-{kind}-{model}", method=[method], model=path, rank=rank, alpha=rank, **NLG)
        assert found.get("eval") == asked and (source is None or found["data"] == source)
    # Table 1 has the parameters alone: 320M and 168M.
    assert round(linear_parameters(128, 4096, 4096, 11008, 32) / 1e6) == 320
    assert round(linear_parameters(64, 4096, 1024, 14336, 32) / 1e6) == 168


def test_inttune_on_nlg():
    for kind in ("math", "code", "chat"):
        # "we set the learning rate to 2E-3 while keeping other settings unchanged"
        options(f"inttune-nlg-{kind}-llama2", **NLG | {"lr": 2e-3, "method": ["inttune"], "rank": 128})
        for rank in (64, 128, 256):
            options(f"inttune-nlg-{kind}-llama2-r{rank}", lr=2e-3, rank=rank, alpha=rank, method=["inttune"])
    for rate in ("2e-4", "5e-4", "2e-3", "5e-3"):
        options(f"inttune-nlg-math-llama2-lr-{rate}", **NLG | {"lr": float(rate), "method": ["inttune"]})


def test_learning_rates_and_initialisations():
    for method, rate in itertools.product(("slora", "nlora"), ("2e-4", "5e-4", "2e-5", "5e-5")):
        options(f"{method}-nlg-math-llama2-lr-{rate}", **NLG | {"lr": float(rate), "method": [method]})
    for kind, (name, method) in itertools.product(
        ("math", "code", "chat"), (("kaiming", "slora"), ("gaussian", "slora_gaussian"))
    ):
        options(f"{name}-nlg-{kind}-llama2-init", **NLG | {"method": [method]})


def test_lora2():
    common = {"method": ["lora2"], "rank": 8, "batch_size": 32, "form": "paper", "model": "microsoft/deberta-v3-base"}
    for task, k in itertools.product(TABLE_12, (1, 8)):
        options(f"lora2-glue-{task}-deberta-k{k}", k=k, task=task, terms="all", target_modules=LAYERS, **common)
    for task, term in itertools.product(("mrpc", "stsb", "mnli", "rte"), ("uv", "UV", "uv&UV", "PQ", "all")):
        options(f"lora2-glue-{task}-deberta-{term.replace('&', '-and-')}", k=1, task=task, terms=term, **common)
    targets = {"q-k": QKV[:2], "q-v": [QKV[0], QKV[2]], "q-k-v": QKV, "all-layers": LAYERS}
    counts = {"q-k": 37.4e3, "q-v": 37.4e3, "q-k-v": 56.2e3, "all-layers": 167.6e3}
    for task, (name, layers) in itertools.product(("cola", "mrpc", "stsb", "rte"), targets.items()):
        options(f"lora2-glue-{task}-deberta-{name}", k=1, task=task, target_modules=layers, **common)
        # Table 4 counts k(in + out) + 2rk + r of each matrix, 12 times: r is 8.
        sizes = [{"intermediate.dense": 768 + 3072, "output.dense": 3072 + 768}.get(layer, 2 * 768) for layer in layers]
        assert abs(12 * sum(size + 2 * 8 + 8 for size in sizes) - counts[name]) < 100


def test_nothing_else_is_there_and_every_source_is_named():
    tables = {preset.source.partition(",")[0] for preset in PRESETS.values()}
    assert tables == {"NLoRA (arXiv 2502.14482)", "LoRA² (arXiv 2408.06854)"}
    assert len(PRESETS) == 16 * 2 + 8 + 8 + 24 + 3 + 9 + 8 + 4 + 6 + 3 + 16 + 20 + 16
    for preset in PRESETS.values():
        # What a paper does not say is said to be ours, and not set as if it were the paper's.
        assert preset.unstated and not set(preset.unstated) & preset.options.keys(), preset.name
