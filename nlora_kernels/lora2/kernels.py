"""Which kernels train LoRA² adapters, by the rule that chooses backends."""

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from .. import backends
from . import native


def kernels(tensors: Sequence[Tensor], size: int = 1) -> ModuleType | None:
    """Those of the backend for these tensors, with r and k up to `size`; None where PyTorch is to do without."""
    backend = backends.select(None, tensors[0], operation="lora2_training")
    if backend is backends.TABLE["cpu"]:
        return native if native.takes(tensors, size) else None
    training = getattr(backend, "lora2_training", None)
    return training(tensors, size) if training else None
