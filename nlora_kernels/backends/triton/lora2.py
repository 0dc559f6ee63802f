"""What trains LoRA² adapters: the rank allocator's step and the orthogonality penalty."""

from .allocator import mask, smooth
from .penalty import LARGEST, penalty, penalty_backward

__all__ = ["LARGEST", "mask", "penalty", "penalty_backward", "smooth"]
