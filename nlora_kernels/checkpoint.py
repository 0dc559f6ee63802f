"""Saved adapters: export to plain LoRA, import from the published code, and writing that never leaves a half."""

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_TENSOR = re.compile(r"(?P<layer>.+)\.lora_(?P<kind>A0|N0|B0|A|N|B|v|u|E|U|V|mask)(\.weight)?")
_PUBLISHED = {"n_lora": "nystrom", "s_lora": "slora"}
_CORE_METHODS = ("nystrom", "slora", "slora_gaussian")
_SAFETENSORS_ABSENT = "nlora_kernels.checkpoint needs the extra 'peft': pip install 'nlora_kernels[peft]'"


def to_lora(src_dir: str | os.PathLike, dst_dir: str | os.PathLike) -> None:
    """(A, N, B) ↦ (A, B·N) or (N·A, B): a saved adapter as plain LoRA, which stock PEFT reads.

    Exact: the same function on the same base model. N goes into the smaller of the two outer matrices. What the base
    weight gave up with residual=True becomes part of the adapter,

        A' = [A; A₀],  B' = [B·N, −B₀·N₀],  rank 2r,  lora_alpha twice (with rslora √2 times) as large,

    and LoRA² becomes rank k, with A' = v, B' = V·U·diag(E ⊙ mask)·u and lora_alpha·k/r (rslora: √(k/r)). Products are
    taken in fp64 and saved in fp32. Tensors of other modules are passed on.

    Args:
        src_dir: folder of an adapter saved by save_pretrained with NLoraConfig or LoRA2Config.
        dst_dir: folder to write; what it held is replaced at once when all is written.

    Raises:
        ValueError: src_dir holds no such adapter, or a file is damaged; the message names the file and the reason.
    """
    config, tensors = _read(src_dir)
    kind = config.get("peft_type")
    if kind not in ("NLORA", "LORA2"):
        raise ValueError(f"{Path(src_dir, CONFIG)} must have peft_type NLORA or LORA2, got {kind!r}")
    absent = [name for name in ("r", "lora_alpha", *(("k",) if kind == "LORA2" else ())) if name not in config]
    if absent:
        raise ValueError(f"{Path(src_dir, CONFIG)} lacks {', '.join(absent)}")
    layers, others = _by_layer(tensors)
    exported = {}
    for name, layer in layers.items():
        layer = {part: tensor.double() for part, tensor in layer.items()}
        try:
            A, B = _lora2_as_lora(layer) if kind == "LORA2" else _nlora_as_lora(layer, config)
            if A.shape[0] != B.shape[1]:
                raise RuntimeError(f"A is {tuple(A.shape)}, B is {tuple(B.shape)}")
            exported[name] = A, B
        except (KeyError, RuntimeError) as error:
            reason = f"lacks lora_{error.args[0]}" if isinstance(error, KeyError) else f"does not fit together: {error}"
            raise ValueError(f"{Path(src_dir, WEIGHTS)}: {name} {reason}") from error
    config = _lora2_config_as_lora(config, exported) if kind == "LORA2" else _nlora_config_as_lora(config)
    for name, (A, B) in exported.items():
        others[f"{name}.lora_A.weight"] = A.float().contiguous()
        others[f"{name}.lora_B.weight"] = B.float().contiguous()
    _write(dst_dir, _plain(config), others)


def from_published(src_dir: str | os.PathLike, dst_dir: str | os.PathLike) -> None:
    """Reads an adapter saved by the published NLoRA code and writes it for NLoraConfig, tensors untouched.

    Such a folder says peft_type LORA and init_lora_weights "n_lora" or "s_lora", and has a lora_N beside every lora_A
    and lora_B.

    Args:
        src_dir, dst_dir: as for `to_lora`.

    Raises:
        ValueError: src_dir holds no such adapter, or a file is damaged; the message names the file and the reason.
    """
    config, tensors = _read(src_dir)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{Path(src_dir, CONFIG)} must have peft_type LORA, got {config.get('peft_type')!r}")
    published = config.get("init_lora_weights")
    if published not in _PUBLISHED:
        names = " or ".join(_PUBLISHED)
        raise ValueError(f"{Path(src_dir, CONFIG)} must have init_lora_weights {names}, got {published!r}")
    method = _PUBLISHED[published]
    layers, _ = _by_layer(tensors)
    if any("N" in layer for layer in layers.values()):
        for name, layer in layers.items():
            absent = [f"lora_{part}" for part in "ANB" if part not in layer]
            if absent:
                raise ValueError(f"{Path(src_dir, WEIGHTS)}: {name} lacks {', '.join(absent)}")
    else:
        # The published code gives no N to a second adapter, which then is plain LoRA.
        method = True
    _write(dst_dir, config | {"peft_type": "NLORA", "init_lora_weights": method}, tensors)


def save(model, dst_dir: str | os.PathLike, **options) -> None:
    """`model.save_pretrained(dst_dir, **options)` in one step: dst_dir holds the old adapter or the new, never a half.

    Not for several processes that each write a part.
    """
    with _replacing(dst_dir) as folder:
        model.save_pretrained(folder, **options)


# Reading


def check_readable(src_dir: str | os.PathLike) -> None:
    """ValueError that names file and reason if the weights in src_dir are damaged. Only their header is read."""
    file = Path(src_dir, WEIGHTS)
    if file.is_file():
        with _naming(file) as safetensors, safetensors.safe_open(file, "pt"):
            pass


class _Read(NamedTuple):
    config: dict
    tensors: dict[str, Tensor]


def _read(src_dir) -> _Read:
    src = Path(src_dir)
    config_file, weights_file = src / CONFIG, src / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(f"{src} is no saved adapter: it has no {file.name}")
    try:
        config = json.loads(config_file.read_text())
    except ValueError as error:
        raise ValueError(f"{config_file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{config_file} must hold a JSON object, got {type(config).__name__}")
    with _naming(weights_file) as safetensors:
        tensors = safetensors.torch.load_file(weights_file)
    return _Read(config, tensors)


@contextlib.contextmanager
def _naming(file: Path) -> Iterator:
    """safetensors, whose complaints then name the file."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(_SAFETENSORS_ABSENT) from error
    try:
        yield safetensors
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _by_layer(tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapter matrices by layer and kind, and the other tensors."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match:
            layers.setdefault(match["layer"], {})[match["kind"]] = tensor
        else:
            others[key] = tensor
    return layers, others


# Conversion to (A, B)


def _nlora_as_lora(layer: dict[str, Tensor], config: dict) -> tuple[Tensor, Tensor]:
    A, B = layer["A"], layer["B"]
    if config.get("init_lora_weights") not in _CORE_METHODS:
        return A, B
    N = layer["N"]
    if not config.get("residual"):
        return _folded(A, N, B)
    if config.get("train") == "core":
        return _folded(A, N - layer["N0"], B)
    (A, B), (A0, B0) = _folded(A, N, B), _folded(layer["A0"], layer["N0"], layer["B0"])
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)


def _lora2_as_lora(layer: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    v, u, E, U, V, mask = (layer[kind] for kind in ("v", "u", "E", "U", "V", "mask"))
    return _folded(v, (U * (E * mask)) @ u, V)


def _folded(A: Tensor, N: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return (A, B @ N) if B.shape[0] <= A.shape[1] else (N @ A, B)


def _nlora_config_as_lora(config: dict) -> dict:
    if not config.get("residual") or config.get("train") == "core":
        return config
    factor = math.sqrt(2) if config.get("use_rslora") else 2
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * r for key, r in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }


def _lora2_config_as_lora(config: dict, exported: dict[str, tuple[Tensor, Tensor]]) -> dict:
    """alpha/r of the initial rank stays the scaling, for every layer by its name where patterns make them differ."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}

    def alpha_for(r: float, alpha: float) -> float:
        return alpha * (math.sqrt(config["k"] / r) if config.get("use_rslora") else config["k"] / r)

    default = alpha_for(config["r"], config["lora_alpha"])
    patterns = {}
    for layer in exported:
        name = layer.removeprefix("base_model.model.")
        r = ranks.get(get_pattern_key(ranks.keys(), name), config["r"])
        alpha = alpha_for(r, alphas.get(get_pattern_key(alphas.keys(), name), config["lora_alpha"]))
        if alpha != default:
            patterns[name] = alpha
    return config | {"r": config["k"], "lora_alpha": default, "rank_pattern": {}, "alpha_pattern": patterns}


# Writing


def _write(dst_dir, config: dict, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with _replacing(dst_dir) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True))


def _plain(config: dict) -> dict:
    """The options that LoraConfig has too."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)}
    kept = {key: value for key, value in config.items() if key in known}
    if config["peft_type"] == "LORA2" or config.get("init_lora_weights") in _CORE_METHODS:
        kept["init_lora_weights"] = True
    return kept | {"peft_type": "LORA"}


@contextlib.contextmanager
def _replacing(dst_dir) -> Iterator[Path]:
    """A new folder beside dst_dir, which takes its place if all goes well and leaves no trace if not."""
    dst = Path(dst_dir).absolute()
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"dst_dir must be a folder, got the file {dst}")
    dst.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}."))
    try:
        # As mkdir would make it; mkdtemp's are for the owner alone.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        yield folder
        for path in [*folder.rglob("*"), folder]:
            _flush(path)
        if dst.exists():
            _exchange(folder, dst)
        else:
            folder.rename(dst)
        _flush(dst.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders, in one step where the system can."""
    renameat2: Callable | None = getattr(ctypes.CDLL(None), "renameat2", None)
    at_cwd, exchange = -100, 2
    if renameat2 and renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
        return
    aside = new.with_name(new.name + ".old")
    old.rename(aside)
    new.rename(old)
    aside.rename(new)
