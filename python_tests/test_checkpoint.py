"""Export to plain LoRA, import from the published code, the command line, and damaged or interrupted files."""

import copy
import json
import os
import signal
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_peft import METHODS, config
from tiny import gpt2, llama, perturb, tokens

from nlora_kernels import checkpoint, cli

PATTERNS = {
    "": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 5}, "alpha_pattern": {"q_proj": 11}},
    "rslora_patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 7}},
}


def saved(base, folder, method, **options):
    """An adapter that training has moved, saved; and the logits it gives."""
    model = peft.get_peft_model(copy.deepcopy(base), config(method, **options))
    perturb(model)
    if method == "lora2":
        for name, mask in model.named_buffers():
            if "lora_mask" in name:
                mask[1] = 0
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(tokens()).logits


def stock_logits(base, folder):
    """What PEFT alone makes of it: its own LoRA layers on the untouched base model."""
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)
    assert type(model.peft_config["default"]) is peft.LoraConfig
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert layers and all(type(layer) is peft.tuners.lora.Linear for layer in layers)
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_export_gives_stock_peft_the_same_logits(method, options, tmp_path):
    base = llama()
    expected = saved(base, tmp_path / "ours", method, **options)
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["nlora_residual", "lora2"])
def test_export_of_conv1d(method, tmp_path):
    base = gpt2()
    expected = saved(base, tmp_path / "ours", method)
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)


def test_export_keeps_the_rank_and_folds_into_the_smaller_factor(tmp_path):
    saved(llama(), tmp_path / "ours", "nlora")
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    ours, plain = (load_file(tmp_path / folder / checkpoint.WEIGHTS) for folder in ("ours", "plain"))
    layer = "base_model.model.model.layers.0.mlp"
    # down_proj is (32, 48), up_proj (48, 32).
    for name, untouched in (("down_proj", "lora_A"), ("up_proj", "lora_B")):
        assert torch.equal(plain[f"{layer}.{name}.{untouched}.weight"], ours[f"{layer}.{name}.{untouched}.weight"])
    assert json.loads((tmp_path / "plain" / checkpoint.CONFIG).read_text())["r"] == 4


def test_export_doubles_the_rank_of_a_residual_adapter(tmp_path):
    saved(llama(), tmp_path / "ours", "nlora_residual", rank_pattern={"q_proj": 3}, alpha_pattern={"q_proj": 5})
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / checkpoint.CONFIG).read_text())
    assert (plain["r"], plain["lora_alpha"]) == (8, 12)
    assert (plain["rank_pattern"], plain["alpha_pattern"]) == ({"q_proj": 6}, {"q_proj": 10})


def test_export_passes_other_modules_on(tmp_path):
    base = llama()
    expected = saved(base, tmp_path / "ours", "nlora", modules_to_save=["lm_head"])
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)


# The published code


def published(folder, method="n_lora", **layers):
    """A checkpoint as the published code writes it: LoRA type, its own init names, lora_N keys."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in ("q_proj", "o_proj"):
        for kind, shape in (("A", (4, 32)), ("N", (4, 4)), ("B", (32, 4))):
            key = f"base_model.model.model.layers.0.self_attn.{name}.lora_{kind}.weight"
            tensors[key] = 0.2 * torch.randn(shape, generator=generator)
    save_file(
        {k: v for k, v in tensors.items() if layers.get("N", True) or "lora_N" not in k}, folder / checkpoint.WEIGHTS
    )
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "init_lora_weights": method,
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0,
        "target_modules": ["q_proj", "o_proj"],
        "layers_to_transform": [0],
        "layers_pattern": "layers",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
    }
    (folder / checkpoint.CONFIG).write_text(json.dumps(fields))
    return tensors


@pytest.mark.parametrize("method", ["n_lora", "s_lora"])
def test_published_checkpoint_converts_and_loads(method, tmp_path):
    tensors = published(tmp_path / "published", method)
    checkpoint.from_published(tmp_path / "published", tmp_path / "ours")
    base = llama()
    model = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert model.peft_config["default"].has_core
    for name in ("q_proj", "o_proj"):
        prefix = f"base_model.model.model.layers.0.self_attn.{name}.lora_"
        A, N, B = (tensors[f"{prefix}{kind}.weight"] for kind in "ANB")
        getattr(base.model.layers[0].self_attn, name).weight.data += 8 / 4 * B @ N @ A
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, base(tokens()).logits, rtol=1e-5, atol=1e-5)


def test_published_second_adapter_has_no_core(tmp_path):
    published(tmp_path / "published", N=False)
    checkpoint.from_published(tmp_path / "published", tmp_path / "ours")
    model = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours")
    assert not model.peft_config["default"].has_core


# The command line


def test_convert_command(tmp_path, capsys):
    base = llama()
    expected = saved(base, tmp_path / "ours", "nlora")
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "plain")]) == 0
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)
    published(tmp_path / "published")
    assert cli.main(["convert", "--from-published", str(tmp_path / "published"), str(tmp_path / "again")]) == 0
    capsys.readouterr()
    assert cli.main(["convert", str(tmp_path / "plain"), str(tmp_path / "x")]) == 1
    assert "must have peft_type NLORA or LORA2, got 'LORA'" in capsys.readouterr().err


# Damaged, foreign and interrupted


def drop(folder, key_part):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file({key: t for key, t in tensors.items() if key_part not in key}, folder / checkpoint.WEIGHTS)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def edit(folder, **fields):
    file = folder / checkpoint.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def strip(folder, field):
    file = folder / checkpoint.CONFIG
    file.write_text(json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != field}))


def reshape(folder, key_part):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file({key: t[:-1] if key_part in key else t for key, t in tensors.items()}, folder / checkpoint.WEIGHTS)


FAULTS = {
    "no_folder": (lambda d: [f.unlink() for f in d.iterdir()], "has no adapter_config.json"),
    "no_weights": (lambda d: (d / checkpoint.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "truncated": (lambda d: truncate(d / checkpoint.WEIGHTS), "adapter_model.safetensors cannot be read"),
    "not_safetensors": (lambda d: (d / checkpoint.WEIGHTS).write_bytes(b"x" * 99), "cannot be read"),
    "truncated_config": (lambda d: truncate(d / checkpoint.CONFIG), "adapter_config.json cannot be read"),
    "foreign_config": (lambda d: (d / checkpoint.CONFIG).write_text("[1]"), "must hold a JSON object, got list"),
    "foreign_type": (lambda d: edit(d, peft_type="IA3"), "must have peft_type NLORA or LORA2, got 'IA3'"),
    "missing_N": (lambda d: drop(d, "layers.1.mlp.up_proj.lora_N"), "layers.1.mlp.up_proj lacks lora_N"),
    "missing_B": (lambda d: drop(d, "layers.0.mlp.up_proj.lora_B"), "layers.0.mlp.up_proj lacks lora_B"),
    "no_rank": (lambda d: strip(d, "r"), "adapter_config.json lacks r"),
    "shapes": (lambda d: reshape(d, "layers.0.mlp.up_proj.lora_N"), "layers.0.mlp.up_proj does not fit together"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_source_is_named_and_the_old_target_stays(fault, message, tmp_path):
    base = llama()
    expected = saved(base, tmp_path / "good", "nlora")
    checkpoint.to_lora(tmp_path / "good", tmp_path / "plain")
    saved(base, tmp_path / "bad", "nlora")
    fault(tmp_path / "bad")
    with pytest.raises(ValueError, match=message):
        checkpoint.to_lora(tmp_path / "bad", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "plain"]


def test_rewriting_replaces_the_folder_as_a_whole(tmp_path):
    base = llama()
    saved(base, tmp_path / "first", "nlora")
    expected = saved(base, tmp_path / "second", "inttune", r=2)
    checkpoint.to_lora(tmp_path / "first", tmp_path / "plain")
    (tmp_path / "plain" / "stale").write_text("")
    checkpoint.to_lora(tmp_path / "second", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "plain" / "stale").exists()
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "first").stat().st_mode


def test_an_error_while_saving_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    base = llama()
    expected = saved(base, tmp_path / "good", "nlora")
    checkpoint.to_lora(tmp_path / "good", tmp_path / "plain")

    def full_disk(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.to_lora(tmp_path / "good", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "plain"]


KILLED = """
import sys, time
from pathlib import Path
from safetensors.torch import load_file
import safetensors.torch
from nlora_kernels import checkpoint

whole = safetensors.torch.save_file

def half(tensors, file, **options):
    whole(tensors, file, **options)
    content = Path(file).read_bytes()
    Path(file).write_bytes(content[: len(content) // 2])
    print("half written", flush=True)
    time.sleep(60)

safetensors.torch.save_file = half
checkpoint.to_lora(sys.argv[1], sys.argv[2])
"""


def test_killed_while_saving(tmp_path):
    base = llama()
    expected = saved(base, tmp_path / "good", "nlora")
    checkpoint.to_lora(tmp_path / "good", tmp_path / "plain")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", KILLED, tmp_path / "good", tmp_path / "plain"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "half written\n"
        process.send_signal(signal.SIGKILL)
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)


def test_save_in_one_step(tmp_path):
    base = llama()
    model = peft.get_peft_model(copy.deepcopy(base), config("nlora"))
    checkpoint.save(model, tmp_path / "adapter")
    perturb(model)
    checkpoint.save(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fault", ["truncated", "not_safetensors"])
@pytest.mark.parametrize("method", ["nlora_residual", "lora2"])
def test_peft_names_a_damaged_adapter_before_it_touches_the_model(method, fault, tmp_path):
    base = llama()
    saved(base, tmp_path / "good", method)
    saved(base, tmp_path / "bad", method)
    FAULTS[fault][0](tmp_path / "bad")
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"bad/adapter_model\.safetensors cannot be read: \w+"):
        peft.PeftModel.from_pretrained(base, tmp_path / "bad")
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    model = peft.PeftModel.from_pretrained(base, tmp_path / "good")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="cannot be read"):
        model.load_adapter(tmp_path / "bad", "second")
    assert model.state_dict().keys() == before.keys() and list(model.peft_config) == ["default"]
