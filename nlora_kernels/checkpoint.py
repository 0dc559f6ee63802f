"""Saved adapters: export to plain LoRA, import from the published code, and saving that never leaves a half."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import patterns, saved
from .atomic import replacing
from .saved import CONFIG, WEIGHTS

_CARD = "README.md"

_PUBLISHED = {"n_lora": "nystrom", "s_lora": "slora"}
# What vLLM and llama.cpp serve no adapter with, and what other servers read past.
_MOST_SERVED = 512
_NOT_SERVED = (
    "alora_invocation_tokens",
    "bias",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
)
# The other initialisations of PEFT that have a name change the base weight.
_BASE_STAYS = ("eva", "gaussian", "orthogonal")


def to_lora(src_dir: str | os.PathLike, dst_dir: str | os.PathLike, *, keep_patterns: bool = False) -> None:
    """(A, N, B, s) ↦ (A, s·B·N) or (s·N·A, B): a saved adapter as plain LoRA of one rank r with lora_alpha = r.

    So it is right for every reader: stock PEFT, and servers that know r and lora_alpha alone. N and the scaling s go
    into the smaller of the two outer matrices, and layers of a lower rank are filled up with zeros. What the base
    weight gave up with residual=True becomes part of the adapter,

        A' = [A; A₀],  B' = [s·B·N, −s·B₀·N₀],  rank 2r,

    and LoRA² becomes rank k, with A' = v and B' = s·V·U·diag(E ⊙ mask)·u. Products are taken in fp64 and rounded once,
    to fp32: every element of the matrix that N and s went into is off by 2⁻²⁴ of itself at most. Tensors of other
    modules are passed on. A warning says what servers refuse or leave out.

    Args:
        src_dir: folder of an adapter saved by save_pretrained with NLoraConfig or LoRA2Config.
        dst_dir: folder to write; files of other names stay.
        keep_patterns: keep rank_pattern, alpha_pattern, use_rslora and each layer's own rank, for PEFT alone. A
            residual adapter then has twice the lora_alpha (with rslora √2 times), and LoRA² lora_alpha·k/r (rslora:
            √(k/r)).

    Raises:
        ValueError: src_dir holds no such adapter, or a file is damaged; the message names the file and the reason. Or
            dst_dir is or holds src_dir.
    """
    _check_folders(src_dir, dst_dir)
    config, tensors = saved.read(src_dir)
    saved.check_config(Path(src_dir, CONFIG), config)
    weights = Path(src_dir, WEIGHTS)
    layers, others = saved.by_layer(weights, tensors)
    saved.check_layers(weights, layers, config)
    if keep_patterns:
        exported = {name: _as_lora(layer, config, 1.0) for name, layer in layers.items()}
        config = _with_patterns(config, exported)
    else:
        exported = {name: _as_lora(layer, config, saved.scaling(config, name)) for name, layer in layers.items()}
        config, exported = _of_one_rank(src_dir, config, exported)
    for name, layer in exported.items():
        for kind, tensor in layer.tensors.items():
            key, tensor = f"{name}.lora_{kind}", tensor.float().contiguous()
            saved.check_values(weights, key, tensor, " in fp32")
            others[key] = tensor
    config = _plain(config)
    _write(dst_dir, config, others)
    if not keep_patterns:
        _warn_of_servers(dst_dir, config, others)


def from_published(src_dir: str | os.PathLike, dst_dir: str | os.PathLike) -> None:
    """Reads an adapter saved by the published NLoRA code and writes it for NLoraConfig, tensors untouched.

    Such a folder says peft_type LORA and init_lora_weights "n_lora" or "s_lora", and has a lora_N beside every lora_A
    and lora_B.

    Args:
        src_dir: as for `to_lora`.
        dst_dir: as for `to_lora`.

    Raises:
        ValueError: as for `to_lora`.
    """
    _check_folders(src_dir, dst_dir)
    config, tensors = saved.read(src_dir)
    file, weights = Path(src_dir, CONFIG), Path(src_dir, WEIGHTS)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file} must have peft_type LORA, got {config.get('peft_type')!r}")
    published = config.get("init_lora_weights")
    if published not in tuple(_PUBLISHED):
        raise ValueError(f"{file} must have init_lora_weights {' or '.join(_PUBLISHED)}, got {published!r}")
    layers, _ = saved.by_layer(weights, tensors)
    # The published code gives no N to a second adapter, which then is plain LoRA.
    method = _PUBLISHED[published] if any("N" in layer for layer in layers.values()) else True
    config |= {"peft_type": "NLORA", "init_lora_weights": method}
    saved.check_config(file, config)
    saved.check_layers(weights, layers, config)
    _write(dst_dir, config, tensors)


def save(model: Any, dst_dir: str | os.PathLike, **options: Any) -> None:
    """`model.save_pretrained(dst_dir, **options)` in one step: dst_dir holds the old adapter or the new, never a half.

    Files of other names stay and links are followed, as by save_pretrained. Not for several processes that each write
    a part.

    Raises:
        ValueError: dst_dir is "" or a file. OSError: something cannot be written.
    """
    # Where there are both, PEFT reads those of this name.
    with replacing(dst_dir, superseded={WEIGHTS: "adapter_model.bin"}) as folder, _as_os_error(dst_dir):
        # save_pretrained goes on with the model card that is there.
        card, new_card = Path(dst_dir, _CARD), folder / _CARD
        before = card.read_bytes() if card.is_file() else None
        if before is not None:
            new_card.write_bytes(before)
        model.save_pretrained(folder, **options)
        if before is not None and new_card.read_bytes() == before:
            new_card.unlink()


# Conversion to (A, B)


class _Lora(NamedTuple):
    """A and B by their names, and a bias, which has no rank."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, A: Tensor, B: Tensor) -> "_Lora":
        return cls({"A.weight": A, "B.weight": B})

    @property
    def rank(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def of_rank(self, r: int) -> "_Lora":
        (A_name, A), (B_name, B), *bias = self.tensors.items()
        A = torch.cat([A, A.new_zeros(r - A.shape[0], *A.shape[1:])])
        B = torch.cat([B, B.new_zeros(B.shape[0], r - B.shape[1], *B.shape[2:])], dim=1)
        return _Lora({A_name: A, B_name: B, **dict(bias)})


def _as_lora(layer: dict[str, Tensor], config: dict, scaling: float) -> _Lora:
    layer = {kind: tensor.double() for kind, tensor in layer.items()}
    if config["peft_type"] == "LORA2":
        u, U, values = layer["u"], layer["U"], layer["E"] * layer["mask"]
        experts = layer["v"].shape[0] // u.shape[1]
        parts = zip(U.chunk(experts, 1), values.chunk(experts), u.chunk(experts), strict=True)
        cores = [left * E @ right for left, E, right in parts]
        return _Lora.of(*_folded(layer["v"], scaling * torch.cat(cores), layer["V"]))
    if "embedding_A" in layer:
        return _Lora({"embedding_A": layer["embedding_A"], "embedding_B": scaling * layer["embedding_B"]})
    A, B = layer["A"], layer["B"]
    if "N" not in layer:
        bias = {"B.bias": scaling * layer["B.bias"]} if "B.bias" in layer else {}
        return _Lora({"A.weight": A, "B.weight": scaling * B, **bias})
    if "A0" in layer:
        (A, B), (A0, B0) = (_folded(layer[f"A{n}"], scaling * layer[f"N{n}"], layer[f"B{n}"]) for n in ("", "0"))
        E = layer["N"].shape[0] // layer["N"].shape[1]
        A, A0 = (t.unflatten(0, (E, -1)) for t in (A, A0))
        B, B0 = (t.unflatten(1, (-1, E)) for t in (B, B0))
        return _Lora.of(torch.cat([A, A0], dim=1).flatten(0, 1), torch.cat([B, -B0], dim=1).flatten(1))
    N = layer["N"] - layer["N0"] if "N0" in layer else layer["N"]
    return _Lora.of(*_folded(A, scaling * N, B))


def _folded(A: Tensor, N: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B·N) or (N·A, B), of every expert, whose number the shape of the cores below each other tells."""
    E, r = N.shape[0] // N.shape[1], N.shape[1]
    N = N.view(E, r, r)
    if B.shape[0] <= A.shape[1]:
        return A, torch.einsum("ore,ers->ose", B.unflatten(1, (r, E)), N).flatten(1)
    return torch.einsum("ers,esi->eri", N, A.unflatten(0, (E, r))).flatten(0, 1), B


def _of_one_rank(src_dir: str | os.PathLike, config: dict, exported: dict[str, _Lora]) -> tuple[dict, dict[str, _Lora]]:
    if not config.get("target_parameters"):
        r = max(layer.rank for layer in exported.values())
        exported = {name: layer.of_rank(r) for name, layer in exported.items()}
    elif (config.get("rank_pattern") or config.get("alpha_pattern")) and not _scaled_alike(config):
        raise ValueError(f"{Path(src_dir, CONFIG)} has patterns for target_parameters, which need keep_patterns")
    else:
        # The ranks of several experts lie side by side.
        doubled = config.get("residual") and config.get("train") != "core"
        r = config["k"] if config["peft_type"] == "LORA2" else config["r"] * (2 if doubled else 1)
    one = {"r": r, "lora_alpha": r, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}
    return config | one, exported


def _scaled_alike(config: dict) -> bool:
    """Whether patterns of LoRA² change ranks alone, as `lora2.compress` writes them, and all layers have one scaling.

    Then it needs no names, which tensors of parameters do not tell.
    """
    ranks, alphas = _patterns(config)
    if config["peft_type"] != "LORA2" or list(ranks) != list(alphas):
        return False
    scalings = [alphas[key] / saved.root(config, ranks[key]) for key in ranks]
    return all(math.isclose(s, config["lora_alpha"] / saved.root(config, config["r"]), rel_tol=1e-12) for s in scalings)


def _with_patterns(config: dict, layers: Iterable[str]) -> dict:
    """Ranks and lora_alpha of the exported layers such that every scaling, alpha / r, stays."""
    if config["peft_type"] == "LORA2":
        k = config["k"]
        default = config["lora_alpha"] * saved.root(config, k / config["r"])
        alphas = {name: saved.alpha(config, name) * saved.root(config, k / saved.rank(config, name)) for name in layers}
        alphas = {patterns.exact(saved.name_in_base(name)): alpha for name, alpha in alphas.items() if alpha != default}
        if config.get("target_parameters"):
            alphas = _alphas_of_parameters(config)
        return config | {"r": k, "lora_alpha": default, "rank_pattern": {}, "alpha_pattern": alphas}
    if not config.get("residual") or config.get("train") == "core":
        return config
    factor = saved.root(config, 2)
    return config | {
        "r": 2 * config["r"],
        "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {key: 2 * r for key, r in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {key: factor * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
    }


def _alphas_of_parameters(config: dict) -> dict[str, float]:
    """The alpha_pattern of LoRA² as LoRA of rank k, of the patterns alone: names of tensors name no parameters."""
    ranks, alphas = _patterns(config)
    if ranks and alphas and list(ranks) != list(alphas):
        raise ValueError("rank_pattern and alpha_pattern must have the same keys where there are target_parameters")
    k, r, alpha = config["k"], config["r"], config["lora_alpha"]
    return {key: alphas.get(key, alpha) * saved.root(config, k / ranks.get(key, r)) for key in ranks or alphas}


def _patterns(config: dict) -> tuple[dict[str, int], dict[str, float]]:
    return config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}


# Reading and writing


def _check_folders(src_dir: str | os.PathLike, dst_dir: str | os.PathLike) -> None:
    for name, folder in (("src_dir", src_dir), ("dst_dir", dst_dir)):
        if not os.fspath(folder):
            raise ValueError(f"{name} must name a folder, got ''")
    src, dst = (Path(os.path.realpath(folder)) for folder in (src_dir, dst_dir))
    holds = dst.exists() and any(path.exists() and path.samefile(dst) for path in (src, *src.parents))
    if holds or any(os.path.realpath(dst / name) == os.path.realpath(src / name) for name in (CONFIG, WEIGHTS)):
        raise ValueError(f"dst_dir must not be or hold the source {src_dir}, got {dst_dir}")


def _write(dst_dir: str | os.PathLike, config: dict, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with replacing(dst_dir) as folder, _as_os_error(dst_dir):
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@contextlib.contextmanager
def _as_os_error(dst_dir: str | os.PathLike) -> Iterator[None]:
    """A full disk is an OSError, of safetensors too."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{dst_dir} cannot be written: {error}") from error


def _plain(config: dict) -> dict:
    """The options that LoraConfig has too."""
    from peft import LoraConfig

    known = {field.name for field in fields(LoraConfig)}
    kept = {key: value for key, value in config.items() if key in known}
    if config["peft_type"] == "LORA2" or config["init_lora_weights"] in saved.CORE_METHODS:
        kept["init_lora_weights"] = True
    return kept | {"peft_type": "LORA"}


def _warn_of_servers(dst_dir: str | os.PathLike, config: dict, tensors: dict[str, Tensor]) -> None:
    refused = [f"rank {config['r']}, more than {_MOST_SERVED}"] if config["r"] > _MOST_SERVED else []
    for name in _NOT_SERVED:
        if config.get(name) not in (None, False, [], {}, "none"):
            refused.append(f"{name}={config[name]!r}")
    if config.get("init_lora_weights") not in (None, True, False, *_BASE_STAYS):
        refused.append(f"the base weight that init_lora_weights={config['init_lora_weights']!r} changes")
    foreign = [key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if foreign:
        refused.append(f"tensors beside lora_A and lora_B (embeddings or whole modules): {saved.some(foreign, 1)}")
    if refused:
        warnings.warn(
            f"{dst_dir} is right for PEFT, but servers refuse or leave out {'; '.join(refused)}", stacklevel=3
        )
