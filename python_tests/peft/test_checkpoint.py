"""Export to plain LoRA, import from the published code, the command line, and damaged or interrupted files."""

import ast
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import nlora_kernels as nk
from nlora_kernels import checkpoint, cli
from nlora_kernels.peft import LoRA2Config, NLoraConfig
from python_tests.peft.adapters import METHODS, config
from python_tests.tiny import gpt2, llama, perturb, tokens

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


def read_by_a_server(base, folder):
    """What a reader makes of it that knows r and lora_alpha alone: W + lora_alpha / r · B·A in every layer."""
    fields = json.loads((folder / checkpoint.CONFIG).read_text())
    tensors = load_file(folder / checkpoint.WEIGHTS)
    model = copy.deepcopy(base)
    for key, A in tensors.items():
        if ".lora_A." in key:
            assert A.shape[0] == fields["r"]
            B = tensors[key.replace(".lora_A.", ".lora_B.")]
            layer = model.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            with torch.no_grad():
                layer.weight += fields["lora_alpha"] / fields["r"] * B @ A
    with torch.no_grad():
        return model(tokens()).logits


@pytest.mark.parametrize("keep_patterns", [False, True], ids=["one_rank", "keep_patterns"])
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("method", METHODS)
def test_export_gives_every_reader_the_same_logits(method, options, keep_patterns, tmp_path):
    base = llama()
    expected = saved(base, tmp_path / "ours", method, **options)
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain", keep_patterns=keep_patterns)
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)
    if not keep_patterns:
        torch.testing.assert_close(read_by_a_server(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_export_rounds_once(method, tmp_path):
    saved(llama(), tmp_path / "ours", method, **PATTERNS["rslora_patterns"])
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    fields = json.loads((tmp_path / "ours" / checkpoint.CONFIG).read_text())
    ours, plain = (load_file(tmp_path / folder / checkpoint.WEIGHTS) for folder in ("ours", "plain"))
    layer = "base_model.model.model.layers.0.mlp.down_proj.lora_"
    ours = {key.removeprefix(layer).removesuffix(".weight"): t.double() for key, t in ours.items() if layer in key}
    s = 7 / fields["r"] ** 0.5
    if method == "lora2":
        v, u, E, U, V, mask = (ours[name] for name in ("v", "u", "E", "U", "V", "mask"))
        exact = s * V @ U @ torch.diag(E * mask) @ u
    elif method == "lora":
        exact = s * ours["B"]
    elif method == "inttune_residual":
        exact = s * ours["B"] @ (ours["N"] - ours["N0"])
    else:
        exact = s * ours["B"] @ ours["N"]
    B = plain[f"{layer}B.weight"].double()[:, : exact.shape[1]]
    # Of fp64's own rounding nothing is left beside fp32's.
    assert bool(((B - exact).abs() <= 2**-24 * exact.abs() * (1 + 1e-6) + 1e-15 * s).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_export_of_other_dtypes(dtype, tmp_path):
    base = llama()
    expected = saved(base, tmp_path / "ours", "nlora")
    file = tmp_path / "ours" / checkpoint.WEIGHTS
    save_file({key: t.to(dtype) for key, t in load_file(file).items()}, file)
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    assert {t.dtype for t in load_file(tmp_path / "plain" / checkpoint.WEIGHTS).values()} == {torch.float32}
    # Only the dtype of the adapter loses something.
    limit = 1e-5 if dtype is torch.float64 else 0.1
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=limit, atol=limit)


class Alike(torch.nn.Module):
    """Layers whose names end alike, or match each other as regular expressions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.xproj = torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)
        self.teacher = torch.nn.ModuleDict({"proj": torch.nn.Linear(16, 16), "a-b": torch.nn.Linear(16, 16)})
        self.teacher["inner"] = torch.nn.ModuleDict({"teacher": torch.nn.ModuleDict({"proj": torch.nn.Linear(16, 16)})})

    def forward(self, x):
        far = self.teacher["inner"]["teacher"]["proj"](x)
        return self.proj(x) + 2 * self.xproj(x) + 3 * self.teacher["proj"](x) + 4 * self.teacher["a-b"](x) + 5 * far


ALIKE = {
    "anchored": {"rank_pattern": {"^proj": 2}, "alpha_pattern": {"^proj": 32}},
    "words": {"rank_pattern": {"proj": 2, "xproj": 3}, "alpha_pattern": {"xproj": 3}},
    "longer_first": {
        "rank_pattern": {"teacher.proj": 2, "proj": 3},
        "alpha_pattern": {"inner.teacher.proj": 40, "teacher.proj": 24, "proj": 8, "a-b": 3},
    },
    "shorter_first": {"rank_pattern": {"proj": 3, "teacher.proj": 2}, "alpha_pattern": {"proj": 8, "teacher.proj": 5}},
    "expressions": {
        "rank_pattern": {r"teacher\.(proj|a-b)": 2, ".*proj": 3},
        "alpha_pattern": {r"(?!teacher).*\.proj": 24, r"t.*": 2, "x?proj": 5},
    },
}


def alike_model(kind: str, **options):
    targets = ["proj", "xproj", "a-b"]
    if kind == "lora2":
        config = LoRA2Config(r=4, k=3, lora_alpha=8, target_modules=targets, **options)
    else:
        config = NLoraConfig(r=4, lora_alpha=8, target_modules=targets, residual=kind == "residual", **options)
    model = peft.get_peft_model(Alike(), config).eval()
    perturb(model, 0.5)
    return model


@pytest.mark.parametrize("patterns", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("kind", ["nlora", "residual", "lora2"])
def test_patterns_mean_the_same_wherever_they_go(kind, patterns, tmp_path):
    model = alike_model(kind, use_rslora=True, **patterns)
    x = torch.randn(3, 16)
    expected = model(x).detach()
    model.save_pretrained(tmp_path / "ours")
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "compact", keep_patterns=True)
    for folder in ("ours", "plain", "compact"):
        loaded = peft.PeftModel.from_pretrained(Alike(), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(x).detach(), expected, rtol=1e-5, atol=1e-4)
        # Loaded and saved again, and again.
        loaded.save_pretrained(tmp_path / "again")
        again = peft.PeftModel.from_pretrained(Alike(), tmp_path / "again").eval()
        torch.testing.assert_close(again(x).detach(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wrapped", [False, True], ids=["peft", "within_another_module"])
@pytest.mark.parametrize("rslora", [False, True], ids=["alpha_r", "rslora"])
def test_compressed_layers_whose_names_end_alike(rslora, wrapped, tmp_path):
    model = alike_model("lora2", use_rslora=rslora, **ALIKE["longer_first"])
    kept = {"proj": 1, "teacher.proj": 2, "xproj": 3, "teacher.a-b": 0, "teacher.inner.teacher.proj": 1}
    for name, count in kept.items():
        model.base_model.model.get_submodule(name).lora_mask["default"][count:] = 0
    x = torch.randn(3, 16)
    expected = model(x).detach()
    ranks = nk.lora2.compress(torch.nn.ModuleDict({"encoder": model}) if wrapped else model)
    prefix = "encoder.base_model.model." if wrapped else "base_model.model."
    assert ranks == {f"{prefix}{name}": max(1, count) for name, count in kept.items()}
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-4)
    model.save_pretrained(tmp_path / "small")
    checkpoint.to_lora(tmp_path / "small", tmp_path / "plain")
    checkpoint.to_lora(tmp_path / "small", tmp_path / "compact", keep_patterns=True)
    for folder in ("small", "plain", "compact"):
        loaded = peft.PeftModel.from_pretrained(Alike(), tmp_path / folder).eval()
        torch.testing.assert_close(loaded(x).detach(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("adapters_of_transformers")
def test_compressed_adapter_of_transformers_itself():
    model = llama()
    model.add_adapter(LoRA2Config(r=4, k=2, target_modules=["q_proj", "v_proj"]))
    next(module for module in model.modules() if hasattr(module, "lora_mask")).lora_mask["default"][1:] = 0
    nk.lora2.compress(model)
    patterns = model.peft_config["default"].rank_pattern
    assert len(patterns) == 4 and sorted(patterns.values()) == [1, 4, 4, 4]
    assert all(key.startswith("^model") for key in patterns)


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
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain", keep_patterns=True)
    plain = json.loads((tmp_path / "plain" / checkpoint.CONFIG).read_text())
    assert (plain["r"], plain["lora_alpha"]) == (8, 12)
    assert (plain["rank_pattern"], plain["alpha_pattern"]) == ({"q_proj": 6}, {"q_proj": 10})
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    plain = json.loads((tmp_path / "plain" / checkpoint.CONFIG).read_text())
    assert (plain["r"], plain["lora_alpha"], plain["rank_pattern"], plain["alpha_pattern"]) == (8, 8, {}, {})


def test_export_passes_other_modules_on(tmp_path):
    base = llama()
    expected = saved(base, tmp_path / "ours", "nlora", modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match=r"servers refuse or leave out modules_to_save=\['lm_head'\]; tensors beside"):
        checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)


class Mixed(torch.nn.Module):
    """What plain LoRA adapts beside linear layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 16)
        self.convolution = torch.nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, ids):
        return self.convolution(self.linear(self.embedding(ids)).transpose(1, 2))


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_bias": True}], ids=["plain", "dora", "bias"])
def test_export_of_plain_lora_of_every_layer_and_variant(variant, tmp_path):
    targets = ["linear", "convolution", *([] if variant.get("lora_bias") else ["embedding"])]
    options = {"rank_pattern": {"linear": 6}, "alpha_pattern": {"embedding": 3}, "use_rslora": True, **variant}
    config = NLoraConfig(r=4, lora_alpha=11, init_lora_weights=True, target_modules=targets, **options)
    model = peft.get_peft_model(Mixed(), config).eval()
    perturb(model)
    ids = torch.arange(14).reshape(2, 7)
    expected = model(ids).detach()
    model.save_pretrained(tmp_path / "ours")
    if "embedding" in targets or variant:
        with pytest.warns(UserWarning, match="tensors beside lora_A and lora_B"):
            checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    checkpoint.to_lora(tmp_path / "ours", tmp_path / "compact", keep_patterns=True)
    fields = json.loads((tmp_path / "plain" / checkpoint.CONFIG).read_text())
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"], fields["rank_pattern"]) == (6, 6, False, {})
    for folder in ("plain", "compact"):
        loaded = peft.PeftModel.from_pretrained(Mixed(), tmp_path / folder).eval()
        assert type(loaded.peft_config["default"]) is peft.LoraConfig
        torch.testing.assert_close(loaded(ids).detach(), expected, rtol=1e-5, atol=1e-5)


NOT_SERVED = {
    "rank": ({"r": 600, "k": 600}, "rank 600, more than 512"),
    "bias": ({"bias": "all"}, "bias='all'; tensors beside"),
    "modules": ({"modules_to_save": ["linear"], "target_modules": ["other"]}, r"modules_to_save=\['linear'\]"),
}


@pytest.mark.parametrize(("options", "message"), NOT_SERVED.values(), ids=NOT_SERVED)
def test_what_servers_refuse_is_said(options, message, tmp_path, capsys):
    base = torch.nn.ModuleDict({"linear": torch.nn.Linear(8, 8), "other": torch.nn.Linear(8, 8)})
    config = LoRA2Config(**{"r": 4, "k": 4, "target_modules": ["linear", "other"]} | options)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "ours")
    with pytest.warns(UserWarning, match=f"is right for PEFT, but servers refuse or leave out .*{message}"):
        checkpoint.to_lora(tmp_path / "ours", tmp_path / "plain")
    assert cli.main(["convert", str(tmp_path / "ours"), str(tmp_path / "plain")]) == 0
    assert "note: " in (said := capsys.readouterr().err) and "servers refuse" in said and ".py" not in said


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


def rename(folder, old, new):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file({key.replace(old, new): t for key, t in tensors.items()}, folder / checkpoint.WEIGHTS)


def reshape(folder, key_part):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file({key: t[:-1] if key_part in key else t for key, t in tensors.items()}, folder / checkpoint.WEIGHTS)


def revalue(folder, key_part, change):
    tensors = load_file(folder / checkpoint.WEIGHTS)
    save_file({key: change(t) if key_part in key else t for key, t in tensors.items()}, folder / checkpoint.WEIGHTS)


def with_element(tensor, value):
    tensor.view(-1)[3] = value
    return tensor


UP = "layers.0.mlp.up_proj"
FLOATS = "must be one of bfloat16, float16, float32, float64, got torch."
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
    "shapes": (
        lambda d: reshape(d, f"{UP}.lora_N"),
        rf"{UP} does not fit together: lora_N must have shape \(4, 4\), got \(3, 4\)",
    ),
    "other_rank": (lambda d: edit(d, r=5), r"lora_A must have shape \(5, in\), got \(4, 48\)"),
    "no_dimension": (
        lambda d: revalue(d, f"{UP}.lora_A", lambda t: t.sum()),
        r"lora_A must have shape \(4, in\), got \(\)",
    ),
    "one_dimension": (
        lambda d: revalue(d, f"{UP}.lora_B", lambda t: t[0].clone()),
        r"lora_B must have shape \(out, 4\)",
    ),
    "empty": (lambda d: revalue(d, f"{UP}.lora_A", lambda t: t[:0].clone()), r"lora_A must have shape \(4, in\)"),
    "foreign_matrix": (lambda d: rename(d, "lora_N", "lora_u"), "lacks lora_N"),
    "more_matrices": (
        lambda d: edit(d, init_lora_weights=True),
        "has lora_N, which adapter_config.json says nothing of",
    ),
    "residual_without_its_matrices": (lambda d: edit(d, residual=True), "lacks lora_A0, lora_N0, lora_B0"),
    "no_matrices": (lambda d: save_file({}, d / checkpoint.WEIGHTS), "has no matrices of an adapter"),
    "integers": (lambda d: revalue(d, f"{UP}.lora_A", torch.Tensor.int), f"{UP}.lora_A.weight {FLOATS}int32"),
    "bool": (lambda d: revalue(d, f"{UP}.lora_N", torch.Tensor.bool), f"{UP}.lora_N.weight {FLOATS}bool"),
    "fp8": (
        lambda d: revalue(d, f"{UP}.lora_B", lambda t: t.to(torch.float8_e4m3fn)),
        f"{UP}.lora_B.weight {FLOATS}float8_e4m3fn",
    ),
    "complex": (lambda d: revalue(d, f"{UP}.lora_B", lambda t: t.to(torch.complex64)), f"{FLOATS}complex64"),
    "nan": (
        lambda d: revalue(d, f"{UP}.lora_N", lambda t: with_element(t, float("nan"))),
        f"{UP}.lora_N.weight must be finite, got NaN or inf",
    ),
    "inf": (lambda d: revalue(d, f"{UP}.lora_A", lambda t: with_element(t, float("-inf"))), "must be finite"),
    "too_large": (
        lambda d: revalue(d, f"{UP}.lora_", lambda t: t * 1e30),
        f"{UP}.lora_A.weight must be finite in fp32, got NaN or inf",
    ),
    "rank_0": (lambda d: edit(d, r=0), "r must be a positive integer, got 0"),
    "rank_text": (lambda d: edit(d, r="4"), "r must be a positive integer, got '4'"),
    "rank_fraction": (lambda d: edit(d, r=4.5), "r must be a positive integer, got 4.5"),
    "rank_true": (lambda d: edit(d, r=True), "r must be a positive integer, got True"),
    "alpha_nan": (lambda d: edit(d, lora_alpha=float("nan")), "lora_alpha must be a finite number, got nan"),
    "alpha_inf": (lambda d: edit(d, lora_alpha=float("inf")), "lora_alpha must be a finite number, got inf"),
    "alpha_text": (lambda d: edit(d, lora_alpha="8"), "lora_alpha must be a finite number, got '8'"),
    "alpha_null": (lambda d: edit(d, lora_alpha=None), "lora_alpha must be a finite number, got None"),
    "alpha_huge": (lambda d: edit(d, lora_alpha=10**400), "lora_alpha must be a finite number"),
    "rank_pattern": (lambda d: edit(d, rank_pattern=[1]), r"rank_pattern must be an object, got \[1\]"),
    "rank_pattern_0": (
        lambda d: edit(d, rank_pattern={"x": 0}),
        "rank_pattern of 'x' must be a positive integer, got 0",
    ),
    "alpha_pattern_nan": (
        lambda d: edit(d, alpha_pattern={"x": float("nan")}),
        "alpha_pattern of 'x' must be a finite number, got nan",
    ),
    "no_expression": (
        lambda d: edit(d, alpha_pattern={"(x": 1}),
        r"alpha_pattern of '\(x' is no regular expression: missing",
    ),
    "rslora": (lambda d: edit(d, use_rslora="yes"), "use_rslora must be true or false, got 'yes'"),
    "train": (lambda d: edit(d, train=["core"]), r"train must be all or core, got \['core'\]"),
    "method": (
        lambda d: edit(d, init_lora_weights=[1]),
        "init_lora_weights must be the name of a method, true or false",
    ),
    "type_list": (lambda d: edit(d, peft_type=["NLORA"]), r"must have peft_type NLORA or LORA2, got \['NLORA'\]"),
    "nested": (lambda d: (d / checkpoint.CONFIG).write_text("[" * 100000), "adapter_config.json cannot be read"),
    "no_utf8": (lambda d: (d / checkpoint.CONFIG).write_bytes(b"\xff\xfe"), "adapter_config.json cannot be read"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    saved(llama(), folder / "nlora", "nlora")
    saved(llama(), folder / "lora2", "lora2")
    return folder


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_source_is_named_and_the_old_target_stays(fault, message, good, tmp_path, capsys):
    checkpoint.to_lora(good / "nlora", tmp_path / "plain")
    before = {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()}
    shutil.copytree(good / "nlora", tmp_path / "bad")
    fault(tmp_path / "bad")
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.to_lora(tmp_path / "bad", tmp_path / "plain")
    assert str(tmp_path / "bad") in str(caught.value)
    assert cli.main(["convert", str(tmp_path / "bad"), str(tmp_path / "plain")]) == 1
    assert str(caught.value) in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "plain"]


LORA2_FAULTS = {
    "k": (lambda d: edit(d, k=0), "k must be a positive integer, got 0"),
    "no_k": (lambda d: strip(d, "k"), "adapter_config.json lacks k"),
    "other_k": (lambda d: edit(d, k=3), r"lora_\w must have shape \((3|in|out|4|, )+\), got"),
    "mask": (lambda d: drop(d, f"{UP}.lora_mask"), f"{UP} lacks lora_mask"),
    "mask_shape": (lambda d: reshape(d, f"{UP}.lora_mask"), r"lora_mask must have shape \(4\), got \(3,\)"),
    "E_nan": (lambda d: revalue(d, f"{UP}.lora_E", lambda t: with_element(t, float("nan"))), "must be finite"),
    "bool_mask": (lambda d: revalue(d, f"{UP}.lora_mask", torch.Tensor.bool), f"{FLOATS}bool"),
}


@pytest.mark.parametrize(("fault", "message"), LORA2_FAULTS.values(), ids=LORA2_FAULTS)
def test_a_damaged_lora2_is_named(fault, message, good, tmp_path):
    shutil.copytree(good / "lora2", tmp_path / "bad")
    fault(tmp_path / "bad")
    with pytest.raises(ValueError, match=message):
        checkpoint.to_lora(tmp_path / "bad", tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


PUBLISHED_FAULTS = {
    "integers": (lambda d: revalue(d, "o_proj.lora_N", torch.Tensor.int), f"o_proj.lora_N.weight {FLOATS}int32"),
    "nan": (lambda d: revalue(d, "o_proj.lora_A", lambda t: with_element(t, float("nan"))), "must be finite"),
    "alpha": (lambda d: edit(d, lora_alpha=float("nan")), "lora_alpha must be a finite number, got nan"),
    "shape": (lambda d: reshape(d, "o_proj.lora_N"), r"lora_N must have shape \(4, 4\), got \(3, 4\)"),
    "missing": (lambda d: drop(d, "o_proj.lora_N"), "o_proj lacks lora_N"),
    "rank": (lambda d: edit(d, r=8), r"lora_A must have shape \(8, in\), got \(4, 32\)"),
    "method": (
        lambda d: edit(d, init_lora_weights=["n_lora"]),
        r"must have init_lora_weights n_lora or s_lora, got \[",
    ),
    "type": (lambda d: edit(d, peft_type="NLORA"), "must have peft_type LORA, got 'NLORA'"),
    "pattern": (lambda d: edit(d, rank_pattern=3), "rank_pattern must be an object, got 3"),
}


@pytest.mark.parametrize(("fault", "message"), PUBLISHED_FAULTS.values(), ids=PUBLISHED_FAULTS)
def test_a_damaged_published_adapter_is_named(fault, message, tmp_path):
    published(tmp_path / "published")
    fault(tmp_path / "published")
    with pytest.raises(ValueError, match=message):
        checkpoint.from_published(tmp_path / "published", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_other_files_stay(tmp_path):
    base = llama()
    saved(base, tmp_path / "first", "nlora")
    expected = saved(base, tmp_path / "second", "inttune", r=2)
    checkpoint.to_lora(tmp_path / "first", tmp_path / "plain")
    (tmp_path / "plain" / "checkpoint-100").mkdir()
    (tmp_path / "plain" / "checkpoint-100" / "optimizer.pt").write_text("state")
    (tmp_path / "plain" / "train.log").write_text("log")
    checkpoint.to_lora(tmp_path / "second", tmp_path / "plain")
    torch.testing.assert_close(stock_logits(base, tmp_path / "plain"), expected, rtol=1e-5, atol=1e-5)
    names = [path.name for path in (tmp_path / "plain").iterdir()]
    assert sorted(names) == [checkpoint.CONFIG, checkpoint.WEIGHTS, "checkpoint-100", "train.log"]
    assert (tmp_path / "plain" / "checkpoint-100" / "optimizer.pt").read_text() == "state"
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "first").stat().st_mode


def test_the_source_is_never_the_target(tmp_path, monkeypatch, capsys):
    saved(llama(), tmp_path / "runs" / "adapter", "nlora")
    published(tmp_path / "published")
    (tmp_path / "link").symlink_to("runs")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / checkpoint.WEIGHTS).symlink_to(tmp_path / "runs" / "adapter" / checkpoint.WEIGHTS)
    monkeypatch.chdir(tmp_path / "runs")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for target in ("adapter", "adapter/", ".", "..", "../link", "../link/adapter", "../runs/../runs", "../linked"):
        with pytest.raises(ValueError, match="dst_dir must not be or hold the source adapter, got"):
            checkpoint.to_lora("adapter", target)
        assert cli.main(["convert", "adapter", target]) == 1
    with pytest.raises(ValueError, match="dst_dir must not be or hold the source"):
        checkpoint.from_published(tmp_path / "published", tmp_path)
    for source, target, name in (("adapter", "", "dst_dir"), ("", "out", "src_dir")):
        with pytest.raises(ValueError, match=f"{name} must name a folder, got ''"):
            checkpoint.to_lora(source, target)
    with pytest.raises(ValueError, match="the folder to write must have a name, got ''"):
        checkpoint.save(peft.get_peft_model(llama(), config("nlora")), "")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    checkpoint.to_lora("adapter", "adapter/plain")
    assert "must not be" in capsys.readouterr().err


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


# Forks writers and ends each at a random moment; prints how often the old and the new adapter were there.
KILLED = """
import hashlib, itertools, os, random, signal, sys, time
from pathlib import Path
import peft, torch
from nlora_kernels import checkpoint, cli
from nlora_kernels.peft import NLoraConfig

torch.set_num_threads(1)
root, count = Path(sys.argv[1]), int(sys.argv[2])
models = {}
for r in (2, 3):
    base = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    models[r] = peft.get_peft_model(base, NLoraConfig(r=r, target_modules=["0", "1"]))
    models[r].save_pretrained(root / f"source{r}")
WRITERS = {
    "save": lambda r, target: checkpoint.save(models[r], target),
    "to_lora": lambda r, target: checkpoint.to_lora(root / f"source{r}", target),
    "convert": lambda r, target: cli.main(["convert", str(root / f"source{r}"), str(target)]),
}
sys.stdout = sys.stderr
OTHERS = {"train.log": b"log", "checkpoint-1/optimizer.pt": b"state", "real.bin": b"linked"}

def read(target):
    files = [target / checkpoint.CONFIG, target / checkpoint.WEIGHTS]
    present = [file.read_bytes() for file in files if file.exists()]
    assert len(present) in (0, 2), files
    return hashlib.sha256(b"".join(present)).hexdigest() if present else None

def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

def started(write, target):
    # A process that writes, which takes longer in a child of fork() than here.
    child = os.fork()
    if child == 0:
        write(3, target)
        os._exit(0)
    return child

random.seed(0)
seen = {"old": 0, "new": 0}
kinds = itertools.cycle(itertools.product(WRITERS, ("absent", "empty", "others", "link")))
for number, (name, kind) in enumerate(kinds):
    # When a child is killed is for the machine to say: beyond `count` until both have been seen.
    if number >= count and (min(seen.values()) or number >= 10 * count):
        break
    write, known = WRITERS[name], {}
    for r in models:
        write(r, root / "known")
        known[read(root / "known")] = r
    place = root / f"{number}"
    place.mkdir()
    target = place / "target"
    if kind == "link":
        (place / "real").mkdir()
        target.symlink_to("real")
    elif kind != "absent":
        target.mkdir()
    if kind in ("others", "link"):
        for file, content in OTHERS.items():
            (target / file).parent.mkdir(exist_ok=True)
            (target / file).write_bytes(content)
        (target / "link.bin").symlink_to("real.bin")
        write(2, target)
    before = read(target)
    start = time.perf_counter()
    os.waitpid(started(write, root / "known"), 0)
    usual = time.perf_counter() - start
    child = started(write, target)
    time.sleep(random.uniform(0, 1.2 * usual))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = read(target)
    assert found == before or known[found] == 3, (name, kind)
    seen["old" if found == before else "new"] += 1
    if found:
        peft.PeftModel.from_pretrained(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)), target)
    if kind in ("others", "link"):
        assert all((target / file).read_bytes() == content for file, content in OTHERS.items())
    write(2, target)
    assert known[read(target)] == 2
    expected = root / f"expected {name}"
    write(2, expected / "target")
    others = ["checkpoint-1", "link.bin", *OTHERS] if kind in ("others", "link") else []
    assert tree(target) == sorted(tree(expected / "target") + others), tree(target)
    assert sorted(os.listdir(place)) == (["real", "target"] if kind == "link" else ["target"])
print(seen, file=sys.__stdout__)
"""


def in_a_process_of_its_own(script, *arguments, **options):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_killed_at_random_moments(request, tmp_path):
    kills = request.config.getoption("--kills")
    result = in_a_process_of_its_own(KILLED, tmp_path, kills)
    assert result.returncode == 0, result.stderr
    seen = ast.literal_eval(result.stdout)
    assert kills <= sum(seen.values()) <= 10 * kills and min(seen.values()) > 0


# With argv: source, target, "limit" or "disk".
FULL = """
import resource, sys
from pathlib import Path
import peft, torch
from nlora_kernels import checkpoint, cli
from nlora_kernels.peft import NLoraConfig

source, target, what = sys.argv[1:]
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(512, 512)), NLoraConfig(r=64, target_modules=["0"]))
model.save_pretrained(source)
if what == "limit":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (lambda: checkpoint.to_lora(source, target), lambda: checkpoint.save(model, target)):
    try:
        write()
    except OSError as error:
        print(error)
assert cli.main(["convert", source, target]) == 1
"""


@pytest.mark.parametrize("what", ["limit", "disk"])
def test_a_full_disk_leaves_what_was(what, tmp_path):
    target = tmp_path / "disk" / "target"
    target.mkdir(parents=True)
    mounted = what == "disk"
    command = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(target.parent)]
    if mounted and (shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode):
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        target.mkdir(exist_ok=True)
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), NLoraConfig(r=2, target_modules=["0"]))
        checkpoint.save(model, target)
        (target / "train.log").write_text("log")
        before = {path.name: path.read_bytes() for path in target.iterdir()}
        result = in_a_process_of_its_own(FULL, tmp_path / "source", target, what)
        assert result.returncode == 0, result.stderr
        reason = "File too large" if what == "limit" else "No space left on device"
        assert result.stdout.count(f"{target} cannot be written: ") == 2 and result.stdout.count(reason) == 2
        assert reason in result.stderr and "Traceback" not in result.stderr
        assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    finally:
        if mounted:
            subprocess.run(["umount", str(target.parent)], check=True)


def test_save_goes_on_with_the_model_card_and_drops_older_weights(tmp_path):
    model = peft.get_peft_model(llama(), config("nlora"))
    checkpoint.save(model, tmp_path)
    card = tmp_path / "README.md"
    card.write_text(card.read_text() + "\nTrained on sheep.\n")
    checkpoint.save(model, tmp_path)
    assert "Trained on sheep." in card.read_text()
    perturb(model)
    # PEFT would read the older file that is called adapter_model.safetensors.
    checkpoint.save(model, tmp_path, safe_serialization=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", checkpoint.CONFIG, "adapter_model.bin"]
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-6)


def test_save_of_several_adapters(tmp_path):
    model = peft.get_peft_model(llama(), config("nlora"))
    model.add_adapter("second", config("slora"))
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "notes").write_text("n")
    checkpoint.save(model, tmp_path)
    plainly = tmp_path / "plainly"
    model.save_pretrained(plainly)
    names = {path.relative_to(plainly) for path in plainly.rglob("*")} | {Path("second/notes")}
    assert names == {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if plainly not in (path, *path.parents)}
    peft.PeftModel.from_pretrained(llama(), tmp_path / "second")


def test_save_in_one_step(tmp_path):
    base = llama()
    model = peft.get_peft_model(copy.deepcopy(base), config("nlora"))
    checkpoint.save(model, tmp_path / "adapter")
    perturb(model)
    checkpoint.save(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits, rtol=0, atol=1e-6)


def test_a_configuration_that_cannot_be_read_is_named(tmp_path):
    saved(llama(), tmp_path / "bad", "nlora")
    truncate(tmp_path / "bad" / checkpoint.CONFIG)
    with pytest.raises(ValueError, match="bad/adapter_config.json: "):
        NLoraConfig.from_pretrained(tmp_path / "bad")


@pytest.mark.parametrize(
    "fault", ["truncated", "not_safetensors", "integers", "nan", "fp8", "alpha_nan", "rank_0", "rslora"]
)
@pytest.mark.parametrize("method", ["nlora_residual", "nlora"])
def test_peft_names_a_damaged_adapter_before_it_touches_the_model(method, fault, tmp_path):
    base = llama()
    saved(base, tmp_path / "good", method)
    saved(base, tmp_path / "bad", method)
    FAULTS[fault][0](tmp_path / "bad")
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"bad/adapter_\w+\.\w+(: | cannot be read: )\w+"):
        peft.PeftModel.from_pretrained(base, tmp_path / "bad")
    assert base.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())
    model = peft.PeftModel.from_pretrained(base, tmp_path / "good")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="bad/adapter_"):
        model.load_adapter(tmp_path / "bad", "second")
    assert model.state_dict().keys() == before.keys() and list(model.peft_config) == ["default"]
