"""Fused three-matrix LoRA kernels: y = x·Wᵀ + bias + s·((x·Aᵀ)·Nᵀ)·Bᵀ, and the LoRA² chain, behind torch autograd.

Importing the package imports torch and nothing else; `peft`, `trainer`, `lora2`, `checkpoint`, `plotting`
and `cli` are loaded when first used. Where PEFT is imported too, before or after, it knows the adapter types.
"""

import importlib
import warnings
from types import ModuleType

from . import backends, init
from .imports import when_imported
from .layers import LoRA2Linear, NLoraLinear
from .ops import lora2_core, lora2_linear, lora_group_linear, lora_grouped_linear, lora_linear, lora_mlp
from .versions import __version__

__all__ = [
    "LoRA2Linear",
    "NLoraLinear",
    "__version__",
    "backends",
    "init",
    "lora2_core",
    "lora2_linear",
    "lora_group_linear",
    "lora_grouped_linear",
    "lora_linear",
    "lora_mlp",
]

_LAZY = ("checkpoint", "cli", "lora2", "peft", "plotting", "trainer")


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


@when_imported("peft")
def _register(_peft: ModuleType) -> None:
    try:
        importlib.import_module(f"{__name__}.peft")
    except Exception as error:
        # PEFT is none the worse for it; using nlora_kernels.peft raises the error itself.
        warnings.warn(f"PEFT does not know the adapters of nlora_kernels: {error}", stacklevel=2)
