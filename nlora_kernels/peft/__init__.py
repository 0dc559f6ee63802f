"""SLoRA, NLoRA, IntTune and LoRA² as adapter types of PEFT: a drop-in for its LoRA on linear layers.

    from nlora_kernels.peft import NLoraConfig
    model = peft.get_peft_model(model, NLoraConfig(r=16, target_modules="all-linear"))

It registers the types with PEFT, which has to be before a saved adapter is loaded: `import nlora_kernels` does so where
PEFT is imported too, in either order.
"""

# isort: off
from . import required  # noqa: F401
# isort: on

from . import card, guards, optimizers  # noqa: F401
from .config import LoRA2Config, NLoraConfig
from .fuse import fuse, unfuse
from .group import group, ungroup
from .lora2 import LoRA2Linear
from .nlora import NLoraLinear
from .tuner import LoRA2Model, NLoraModel

__all__ = [
    "LoRA2Config",
    "LoRA2Linear",
    "LoRA2Model",
    "NLoraConfig",
    "NLoraLinear",
    "NLoraModel",
    "fuse",
    "group",
    "unfuse",
    "ungroup",
]
