"""The GLUE example runs from its files to the exported adapter, on a tiny model."""

import importlib.util
import random

import pytest
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from python_tests import ROOT

EXAMPLE = ROOT / "examples" / "lora2_glue.py"
WORDS = ["good", "bad", "fine", "awful", "film", "plot", "the", "a"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("lora2_glue", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    BertForSequenceClassification(BertConfig(vocab_size=13, **sizes)).save_pretrained(folder)
    return folder


def write(folder, header, row):
    folder.mkdir()
    draw = random.Random(0)
    for name, count in (("train.tsv", 60), ("dev.tsv", 20)):
        rows = [row(" ".join(draw.choices(WORDS, k=5)), n) for n in range(count)]
        (folder / name).write_text("\n".join("\t".join(cells) for cells in (header, *rows)), encoding="utf-8")
    return folder


def test_single_sentences_end_to_end(example, model, tmp_path, capsys):
    data = write(tmp_path / "SST-2", ["sentence", "label"], lambda text, n: [text, str(n % 2)])
    options = ["--steps", "24", "--batch-size", "4", "--rank", "4", "--target-rank", "2", "--k", "2"]
    assert example.main([str(data), "--model", str(model), "--output", str(tmp_path / "out"), *options]) == 0
    out = capsys.readouterr().out
    assert "logits agree" in out and (tmp_path / "out" / "lora2" / "ranks.png").is_file()
    # Two blocks of six linear layers and the pooler keep two of their four values each.
    assert "26 singular values in 13 matrices" in out
    table = out[out.index("method  ") :].splitlines()
    assert [line.split()[0] for line in table if line] == ["method", "lora2", "adalora"]


def test_pairs_of_sentences_and_files_that_are_none(example, tmp_path):
    header = ["\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    data = write(tmp_path / "MRPC", header, lambda text, n: [str(n % 2), "1", "2", text, '" ' + text])
    texts, labels = example.read(data / "dev.tsv")
    assert len(texts) == len(labels) == 20 and set(labels) == {"0", "1"}
    assert all(second == '" ' + first for first, second in texts)
    other = write(tmp_path / "other", ["text", "label"], lambda text, n: [text, "1"])
    with pytest.raises(SystemExit, match="must have a column of"):
        example.read(other / "dev.tsv")


WRONG = {
    "rank": (["--rank", "0"], "argument --rank: must be an integer above 0, got 0"),
    "steps": (["--steps", "x"], "argument --steps: must be an integer above 0, got x"),
    "lr": (["--lr", "nan"], "argument --lr: must be a number above 0, got nan"),
    "target_rank": (["--target-rank", "9"], "argument --target-rank: must be at most --rank, 8, got 9"),
}


@pytest.mark.parametrize(("argv", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(example, argv, message, tmp_path, capsys):
    data = write(tmp_path / "SST-2", ["sentence", "label"], lambda text, n: [text, str(n % 2)])
    with pytest.raises(SystemExit):
        example.main([str(data), *argv])
    assert message in capsys.readouterr().err


def test_wrong_files(example, model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        example.main([str(tmp_path / "nowhere")])
    assert "argument data: must be a folder with train.tsv and dev.tsv, got" in capsys.readouterr().err
    data = write(tmp_path / "SST-2", ["sentence", "label"], lambda text, n: [text, str(n % 2)])
    with pytest.raises(SystemExit, match=r"--model .*nowhere cannot be loaded: "):
        example.main([str(data), "--model", str(tmp_path / "nowhere")])
    (data / "dev.tsv").write_text("sentence\tlabel\ngood\t2")
    with pytest.raises(SystemExit, match=r"dev.tsv must have the labels of train.tsv, \['0', '1'\], got \['2'\]"):
        example.main([str(data), "--model", str(model)])
