"""LoRA² training (arXiv 2408.06854): which singular values to keep, and how to keep the singular vectors orthogonal.

Works on every layer that holds an active LoRA² adapter, the plain `LoRA2Linear` as well as the PEFT layer.
"""

from .allocator import NonFiniteGradientError, RankAllocator
from .compression import compress
from .layers import Layer, layers
from .penalty import WEIGHTS, orthogonal_penalty

__all__ = ["WEIGHTS", "Layer", "NonFiniteGradientError", "RankAllocator", "compress", "layers", "orthogonal_penalty"]
