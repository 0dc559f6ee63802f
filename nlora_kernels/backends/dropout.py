"""Dropout on the adapter's branch: drop(x) = x ⊙ kept / (1 − p), from a mask that is computed wherever it is needed.

No mask is stored. Whether an element is kept follows from the seed, its row and its column alone, so forward and
backward, and every backend, see the same mask:

    mix(h):     h ^= h >> 16;  h *= 0x85ebca6b;  h ^= h >> 13;  h *= 0xc2b2ae35;  h ^= h >> 16
    a = mix(low ^ mix(high ^ 1)),  b = mix(high ^ mix(low ^ 2))       of the seed's halves low and high
    kept[row, col] = mix(mix(row ^ a) ^ mix(col ^ b)) >> 1  ≥  round(2³¹·p)

in 32-bit unsigned arithmetic; the multipliers are those of MurmurHash3. mix is a bijection, so all rows of a mask have
different keys, and all columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """The probability with which an element is zeroed, and the seed: an int64 scalar tensor on x's device."""

    p: float
    seed: Tensor

    @property
    def scale(self) -> float:
        """What is kept is multiplied by it."""
        return 1 / (1 - self.p) if self.p < 1 else 0.0

    @property
    def threshold(self) -> int:
        """An element is kept if its 31 bits are not below."""
        return min(round(self.p * 2**31), 2**31 - 1)

    def kept(self, rows: int, cols: int) -> Tensor:
        """Which elements of a (rows, cols) matrix are kept."""
        low, high = self.seed & _WORD, self.seed >> 32 & _WORD
        row, col = (torch.arange(n, device=self.seed.device) for n in (rows, cols))
        row, col = _mix(row ^ _mix(low ^ _mix(high ^ 1))), _mix(col ^ _mix(high ^ _mix(low ^ 2)))
        return _mix(row[:, None] ^ col) >> 1 >= self.threshold

    def __call__(self, x: Tensor) -> Tensor:
        """drop(x) for x (M, K)."""
        return torch.where(self.kept(*x.shape), x * self.scale, 0)


# NOTE: int64 holds the words, for PyTorch does not compute with unsigned ones; the low half of a product is the same.
_WORD = 0xFFFFFFFF


def _mix(h: Tensor) -> Tensor:
    h = (h ^ h >> 16) * 0x85EBCA6B & _WORD
    h = (h ^ h >> 13) * 0xC2B2AE35 & _WORD
    return h ^ h >> 16
