"""Reading a saved adapter: its matrices by layer, its configuration, and what is wrong with either."""

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from . import patterns
from .backends.base import PLAIN
from .ops.checks import DTYPE_NAMES, DTYPES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FLAGS = ("use_rslora", "residual")
CORE_METHODS = ("nystrom", "slora", "slora_gaussian")

_TENSOR = re.compile(
    r"(?P<layer>.+)\.lora_(?P<kind>A0|N0|B0|A|N|B|v|u|E|U|V|mask|embedding_A|embedding_B|B\.bias)(\.weight)?"
)
_SHAPES = {
    **dict.fromkeys(("A", "A0", "embedding_A"), ("r", "in")),
    **dict.fromkeys(("N", "N0"), ("r", "r")),
    **dict.fromkeys(("B", "B0", "embedding_B"), ("out", "r")),
    "B.bias": ("out",),
    "v": ("k", "in"),
    "u": ("r", "k"),
    "E": ("r",),
    "U": ("k", "r"),
    "V": ("out", "k"),
    "mask": ("r",),
}
# Where an adapter may be on parameters, whose experts it has side by side and below each other.
_PACKED = _SHAPES | {"v": ("experts' k", "in"), "V": ("out", "experts' k")}
_SAFETENSORS_ABSENT = "nlora_kernels.checkpoint needs the extra 'peft': pip install 'nlora_kernels[peft]'"


def check_readable(src_dir: str | os.PathLike) -> None:
    """ValueError that names file and reason if the weights in src_dir are damaged or no finite real numbers."""
    file = Path(src_dir, WEIGHTS)
    if file.is_file():
        with naming(file) as safetensors, safetensors.safe_open(file, "pt") as saved:
            for key in filter(_TENSOR.fullmatch, saved.keys()):
                check_values(file, key, saved.get_tensor(key))


def read(src_dir: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """(configuration, tensors); ValueError that names file and reason if one is missing or cannot be read."""
    src = Path(src_dir)
    config_file, weights_file = src / CONFIG, src / WEIGHTS
    for file in (config_file, weights_file):
        if not file.is_file():
            raise ValueError(f"{src} is no saved adapter: it has no {file.name}")
    config = json_object(config_file)
    with naming(weights_file) as safetensors:
        tensors = safetensors.torch.load_file(weights_file)
    return config, tensors


def json_object(file: Path) -> dict:
    """What a file of JSON holds; ValueError, with its name, if that cannot be read or is no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(content).__name__}")
    return content


@contextlib.contextmanager
def naming(file: Path) -> Iterator:
    """safetensors, whose complaints then name the file."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(_SAFETENSORS_ABSENT) from error
    try:
        yield safetensors
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def by_layer(file: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Adapter matrices by layer and kind, and the other tensors."""
    layers: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match:
            check_values(file, key, tensor)
            layers.setdefault(match["layer"], {})[match["kind"]] = tensor
        else:
            others[key] = tensor
    return layers, others


# Checks


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first of many names, for a message."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def check_values(source: str | Path, key: str, tensor: Tensor, where: str = "") -> None:
    """ValueError unless the tensor, of a file or a state dict, is of finite numbers that the operations take."""
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{source}: {key} must be one of {DTYPE_NAMES}, got {tensor.dtype}")
    if not tensor.isfinite().all():
        raise ValueError(f"{source}: {key} must be finite{where}, got NaN or inf")


def check_state(state_dict: Mapping[str, Any], keys: Iterable[str]) -> None:
    """The same of those keys of a state dict, as far as the tensors are there and PyTorch's own."""
    for key in keys:
        tensor = state_dict.get(key)
        if type(tensor) in PLAIN and not tensor.is_meta:
            check_values("state_dict", key, tensor)


def describe(destination: Mapping[str, Any], prefix: str, name: str, entry: dict[str, Any]) -> None:
    """Puts what a module says of itself into the metadata of a state dict that is being made, if that has some."""
    metadata = getattr(destination, "_metadata", None)
    if entry and metadata is not None:
        metadata.setdefault(prefix[:-1], {})[name] = entry


def check_config(file: str | Path, config: dict) -> None:
    """ValueError unless it is the configuration of an adapter of ours and its numbers are of the right kind."""
    kind = config.get("peft_type")
    if kind not in ("NLORA", "LORA2"):
        raise ValueError(f"{file} must have peft_type NLORA or LORA2, got {kind!r}")
    ranks = ("r", "k") if kind == "LORA2" else ("r",)
    if missing := [name for name in (*ranks, "lora_alpha") if name not in config]:
        raise ValueError(f"{file} lacks {', '.join(missing)}")

    def check(name: str, value, right: bool, wanted: str) -> None:
        if not right:
            raise ValueError(f"{file}: {name} must be {wanted}, got {value!r}")

    for name in ranks:
        check(name, config[name], _is_rank(config[name]), "a positive integer")
    check("lora_alpha", config["lora_alpha"], _is_real(config["lora_alpha"]), "a finite number")
    for name, is_right, wanted in (
        ("rank_pattern", _is_rank, "a positive integer"),
        ("alpha_pattern", _is_real, "a finite number"),
    ):
        found = config.get(name) or {}
        check(name, found, isinstance(found, dict), "an object")
        for pattern, value in found.items():
            check(f"{name} of {pattern!r}", value, is_right(value), wanted)
            try:
                patterns.lookup({pattern: value}, "", None)
            except re.error as error:
                raise ValueError(f"{file}: {name} of {pattern!r} is no regular expression: {error}") from error
    for name in FLAGS:
        check_flag(name, config.get(name), f"{file}: ")
    if kind == "NLORA":
        check("train", config.get("train"), config.get("train") in (None, "all", "core"), "all or core")
        method = config.setdefault("init_lora_weights", "nystrom")
        check("init_lora_weights", method, isinstance(method, bool | str), "the name of a method, true or false")


def check_flag(name: str, value, source: str = "") -> None:
    """ValueError unless an option is on, off or left out; `source` is put before its name."""
    if value not in (None, True, False):
        raise ValueError(f"{source}{name} must be true or false, got {value!r}")


def _is_rank(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_real(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def check_layers(file: Path, layers: dict[str, dict[str, Tensor]], config: dict) -> None:
    """Every layer has the matrices of its method and no others, and they fit together and the configuration."""
    if not layers:
        raise ValueError(f"{file} has no matrices of an adapter")
    for name, layer in layers.items():
        kinds = _kinds(config, layer)
        if missing := [f"lora_{kind}" for kind in kinds if kind not in layer]:
            raise ValueError(f"{file}: {name} lacks {', '.join(missing)}")
        known = (*kinds, "B.bias") if kinds == ("A", "B") else kinds
        if foreign := [f"lora_{kind}" for kind in layer if kind not in known]:
            raise ValueError(f"{file}: {name} has {', '.join(foreign)}, which {CONFIG} says nothing of")
        sizes = {"r": rank(config, name), "k": config.get("k")}
        if config.get("target_parameters"):
            # The ranks of several experts lie side by side, and below each other the cores.
            del sizes["r"]
            core = layer.get("N")
            if core is not None and core.dim() == 2 and core.shape[0] % max(1, core.shape[1]) == 0:
                sizes["core"] = core.shape[1]
        for kind, tensor in layer.items():
            # Convolutions have more dimensions, plain LoRA's alone.
            shape = tensor.shape[:2] if kinds == ("A", "B") else tensor.shape
            known = dict(sizes)
            shapes = _PACKED if config.get("target_parameters") else _SHAPES
            names = ("r", "core") if kind in ("N", "N0") and "core" in sizes else shapes[kind]
            wanted = [sizes.setdefault(size, there) for size, there in zip(names, shape, strict=False)]
            if len(names) != len(shape) or wanted != list(shape):
                expected = ", ".join(str(known.get(size, size)) for size in names)
                raise ValueError(
                    f"{file}: {name} does not fit together: lora_{kind} must have shape ({expected}), "
                    f"got {tuple(tensor.shape)}"
                )


def _kinds(config: dict, layer: dict[str, Tensor]) -> tuple[str, ...]:
    if config["peft_type"] == "LORA2":
        return ("v", "u", "E", "U", "V", "mask")
    if config["init_lora_weights"] not in CORE_METHODS:
        return ("embedding_A", "embedding_B") if "embedding_A" in layer else ("A", "B")
    if not config.get("residual"):
        return ("A", "N", "B")
    return ("A", "N", "B", "N0") if config.get("train") == "core" else ("A", "N", "B", "A0", "N0", "B0")


# What a layer is scaled by


def name_in_base(layer: str) -> str:
    """The name of a layer in the base model, which patterns are for."""
    return layer.removeprefix("base_model.model.")


def rank(config: dict, layer: str) -> int:
    """What rank_pattern gives a layer, or r."""
    return patterns.lookup(config.get("rank_pattern") or {}, name_in_base(layer), config["r"])


def alpha(config: dict, layer: str) -> float:
    """What alpha_pattern gives a layer, or lora_alpha."""
    return patterns.lookup(config.get("alpha_pattern") or {}, name_in_base(layer), config["lora_alpha"])


def root(config: dict, r: float) -> float:
    """What lora_alpha is divided by: r, or √r with rslora."""
    return math.sqrt(r) if config.get("use_rslora") else r


def scaling(config: dict, layer: str) -> float:
    """alpha / r, or alpha / √r with rslora."""
    return alpha(config, layer) / root(config, rank(config, layer))
