"""Which kernels train LoRA² adapters, by the rule that chooses backends."""

from collections.abc import Sequence

from torch import Tensor

from .. import backends
from ..backends import Lora2Training


def kernels(tensors: Sequence[Tensor], size: int = 1) -> Lora2Training | None:
    """Those of the backend for these tensors, with r and k up to `size`; None where PyTorch is to do without."""
    return backends.select(None, tensors[0], operation="lora2_training").lora2_training(tensors, size)
