"""Instruction sets of the CPU kernels: each in its turn, whichever this CPU has."""

import contextlib
from collections.abc import Iterator

from nlora_kernels.backends import native

TIERS = ("portable", "neon", "avx2", "avx512", "amx")


@contextlib.contextmanager
def capped(tier: str) -> Iterator[bool]:
    """Lets the kernels use no instruction set above `tier`; yields whether they use that one, which a CPU may lack."""
    if native._C is None:
        yield tier == "portable"
        return
    before = native._C.cap_cpu_tier(tier)
    try:
        yield native._C.cpu_tier() == tier
    finally:
        native._C.cap_cpu_tier(before)
