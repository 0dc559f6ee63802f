"""The maps of kept ranks and the curves of a run."""

import json
import struct
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import save_file

from nlora_kernels import cli, lora2, plotting
from nlora_kernels.peft import LoRA2Config
from python_tests.tiny import llama


@pytest.fixture
def checkpoint(tmp_path):
    """A Trainer's checkpoint of a model whose layer n keeps n % 4 of its singular values."""
    model = peft.get_peft_model(llama(layers=11), LoRA2Config(r=3, k=2, target_modules=["q_proj", "down_proj"]))
    for n, layer in enumerate(lora2.layers(model)):
        layer.lora_mask[n % 4 :] = 0
    model.save_pretrained(tmp_path)
    log = [{"step": n, "loss": 3.0 - n / 50, "rank_budget": 66 - n // 2} for n in range(1, 101)]
    log.insert(50, {"step": 50, "eval_loss": 9.0})
    (tmp_path / plotting.LOG).write_text(json.dumps({"log_history": log}))
    return tmp_path


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


def test_the_map_has_the_ranks_of_the_checkpoint(checkpoint):
    ranks = plotting.rank_map(checkpoint)
    assert ranks.columns == ["down_proj", "q_proj"]
    # Numbered, not alphabetical: 10 follows 9.
    assert ranks.rows == [str(n) for n in range(11)]
    assert ranks.kept == [[(2 * n + 1) % 4, (2 * n) % 4] for n in range(11)]
    assert plotting.rank_map(checkpoint / "adapter_model.safetensors") == ranks
    text = str(ranks).splitlines()
    assert text[0].split() == ["layer", "down_proj", "q_proj"] and text[11].split() == ["10", "1", "0"]
    assert len({len(line) for line in text[:-1]}) == 1
    assert text[-1] == "31 singular values in 22 matrices, 1.41 each"


def test_the_command_prints_and_draws(checkpoint, tmp_path, capsys):
    assert cli.main(["plot", "ranks", str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "31 singular values" in out and "9.0" not in out
    rows = [line.split() for line in out.split("step")[1].splitlines()[1:] if line.strip()]
    assert rows[-2] == ["100", "1.0000", "16"] and 15 < len(rows) < 30
    for name in ("ranks.png", "training.png"):
        assert min(png_size(checkpoint / name)) > 300
    (checkpoint / plotting.LOG).unlink()
    assert cli.main(["plot", "ranks", str(checkpoint), "--out", str(tmp_path / "elsewhere")]) == 0
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["ranks.png"]
    assert "loss" not in capsys.readouterr().out


def test_the_drawing_shows_the_ranks(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    ranks = plotting.arrange({"a.0.x": 3, "a.0.y": 0, "a.1.x": 1})
    plotting.draw_ranks(ranks, tmp_path / "x.png")
    plotting.draw_training([{"step": 1, "loss": 2.0}, {"step": 4, "loss": 1.0, "rank_budget": 7}], tmp_path / "y.png")
    heat, curves = drawn
    values = heat.axes[0].images[0].get_array()
    assert values[:, 0].tolist() == [3, 1] and values[0, 1] == 0
    assert sorted(text.get_text() for text in heat.axes[0].texts) == ["0", "1", "3"]
    assert curves.axes[0].lines[0].get_xydata().tolist() == [[1, 2], [4, 1]]
    assert curves.axes[1].lines[0].get_xydata().tolist() == [[4, 7]]


def test_names_of_blocks_and_projections():
    names = ["m.encoder.layer.2.attention.output.dense", "m.encoder.layer.2.output.dense", "m.encoder.layer.2.query"]
    ranks = plotting.arrange({**dict.fromkeys(names, 1), "m.pooler": 2})
    assert ranks.rows == ["-", "2"]
    assert ranks.columns == ["attention.output.dense", "pooler", "output.dense", "query"]
    assert ranks.kept == [[None, 2, None, None], [1, None, 1, 1]]
    two = plotting.arrange({"encoder.0.q": 1, "decoder.0.q": 2})
    assert two.rows == ["decoder.0", "encoder.0"] and two.columns == ["q"] and two.kept == [[2], [1]]
    assert plotting.arrange({"layers.0": 1}).kept == [[1]]


def test_bad_checkpoints(checkpoint, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="a folder with one, got .*nowhere"):
        plotting.rank_map(tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "other" / "model.safetensors")
    assert cli.main(["plot", "ranks", str(tmp_path / "other")]) == 1
    assert "must hold a LoRA² adapter" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert cli.main(["plot", "ranks", str(checkpoint), "--out", str(tmp_path / "file")]) == 1
    assert f"out must be a folder, got the file {tmp_path / 'file'}" in capsys.readouterr().err


def damaged(folder, kind):
    """The arguments of a command for an input that is at fault."""
    folder.mkdir()
    file = folder / "adapter_model.safetensors"
    if kind in ("cut", "log"):
        save_file({"q.lora_mask": torch.ones(3)}, file)
        if kind == "cut":
            file.write_bytes(file.read_bytes()[:-9])
        else:
            (folder / plotting.LOG).write_text("[]")
        return ["plot", "ranks", folder]
    if kind.startswith("study"):
        cells = {"list": [1], "number": {"a": 1}, "short": {"a": {"metrics": {"loss": 1.0}}}}[kind.partition(" ")[2]]
        file = folder / "study.json"
        file.write_text(json.dumps({"metric": "loss", "higher_is_better": False, "cells": cells}))
        return ["plot", "study", file]
    if kind == "room":
        return ["doctor", "--shape", 10**8, 10**7, 10**7, 8]
    (folder / "config.json").write_text(
        {"list": "[]", "text": '{"quantization_config": "x"}', "cut": "{"}[kind.split()[1]]
    )
    return ["doctor", "--model", folder]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "adapter_model.safetensors cannot be read"),
        ("log", "trainer_state.json must hold a JSON object, got list"),
        ("study list", "file must hold a study of examples/compare.py"),
        ("study number", "must hold runs of examples/compare.py, got a no object"),
        ("study short", "got a without curve, lr, method, peak_bytes, rank, seconds, seed, tokens_per_second, trained"),
        ("config list", "config.json must hold a JSON object, got list"),
        ("config text", "config.json must hold an object as quantization_config, got str"),
        ("config cut", "config.json cannot be read"),
        ("room", "a layer of the shape 100000000 10000000 10000000 8 has no room on cpu"),
    ],
)
def test_an_input_at_fault_is_one_line(tmp_path, capsys, kind, message):
    assert cli.main(list(map(str, damaged(tmp_path / "input", kind)))) == 1
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said


def test_ranks_of_a_layer_by_itself(tmp_path):
    save_file({"lora_mask": torch.tensor([1.0, 0.0, 1.0])}, tmp_path / "layer.safetensors")
    assert plotting.rank_map(tmp_path / "layer.safetensors").kept == [[2]]


def test_without_matplotlib_there_is_text(checkpoint):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from nlora_kernels import cli\n"
        f"sys.exit(cli.main(['plot', 'ranks', {str(checkpoint)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "31 singular values" in done.stdout and "nlora_kernels[plot]" in done.stderr
    assert not list(checkpoint.glob("*.png"))
