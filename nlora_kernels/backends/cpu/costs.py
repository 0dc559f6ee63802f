"""What products take on the CPU, as the choice of a plan reckons it.

A product of x (M, K) and weight (N, K) takes call + K·N·(read + M·multiply) seconds: `Costs` has such a line for the
library and for our kernels. `measure` finds them, `records` keeps them, and where neither can, those here hold.
"""

from typing import NamedTuple

import torch

from ..base import short
from ..native import _C

# Rows of x up to which our kernels read weight in place.
FEW = 16


class Line(NamedTuple):
    """Seconds of a product of M rows with a weight of `values` = K·N: call + values·(read + M·multiply)."""

    call: float
    read: float
    multiply: float

    def seconds(self, M: int, values: int) -> float:
        return self.call + values * (self.read + M * self.multiply)


class Costs(NamedTuple):
    """Those of the library and, for up to FEW rows and for more, of the plan "whole" with `pieces`, the number of bf16
    values for one of fp32 that takes least of those that are precise enough; the seconds that a value of x or y takes
    more where the adapter's product is apart, and a value of weight for dx, where the library reads it across its rows;
    when they were measured."""

    library: Line
    few: Line
    many: Line
    pieces: int = 3
    apart: float = 0.0
    across: float = 0.0
    written: str | None = None


class Setting(NamedTuple):
    """What costs depend on, beside the CPU, torch and the extension.

    precision: of fp32, what PyTorch allows its own products: "ieee", "tf32" or "bf16"; None for other dtypes.
    """

    dtype: torch.dtype
    tier: str
    threads: int
    precision: str | None = None


def allowed(setting: Setting) -> tuple[int, ...]:
    """How many bf16 values our products may take for one of fp32, which bf16 beside it rounds to itself.

    Only numbers for which the instruction set has kernels of their own, the most precise first.
    """
    dtype, tier, _, precision = setting
    in_hardware = tier in ("avx512", "amx") and _C.cpu_multiplies(_C.bfloat16)
    if in_hardware and (dtype == torch.bfloat16 or precision == "bf16"):
        return 3, 1
    return (3, 2) if tier == "amx" and precision == "tf32" else (3,)


def builtin(setting: Setting) -> Costs:
    """Costs where nothing was measured: of typical CPUs."""
    full, tier = setting.dtype == torch.float32, setting.tier
    in_hardware = tier in ("neon", "avx512", "amx") and _C.cpu_multiplies(getattr(_C, short(setting.dtype)))
    ours = {"portable": 1e-10, "neon": 4.2e-11, "avx2": 2.4e-11, "avx512": 1.1e-11, "amx": 6e-12}[tier]
    library = {"neon": 4.4e-11, "avx512": 1.2e-11, "amx": 1.2e-11}.get(tier, 2.5e-11)
    if not full:
        library = {"neon": 1.1e-11, "avx512": 5e-12, "amx": 2e-12}[tier] if in_hardware else 2e-10
        ours = 2.2e-12 if in_hardware and tier == "amx" else ours
    packing = 4.4e-10 if tier == "amx" else 2.5e-10

    def line(call: float, read: float, multiply: float) -> Line:
        return Line(call, read / setting.threads, multiply / setting.threads)

    # Of few rows our kernels multiply bf16 by pairs, where the CPU can.
    few = library if setting.dtype == torch.bfloat16 and in_hardware else max(ours, 9e-12)
    pieces = allowed(setting)[-1]
    across = 0.0
    if tier == "avx512" and pieces == 1:
        # By pairs, about as fast as the library where that is at its fastest.
        ours, packing = 5e-12, 1e-10
        across = 0.0 if full else 4e-11
    return Costs(
        line(2e-6 if full else 1.5e-5, 5e-11, library),
        line(4e-6, 3.5e-11, few),
        line(5e-6, packing, ours),
        pieces,
        across=across / setting.threads,
    )
