"""Which of the four ways computes a layer on the CPU fastest, reckoned from what products take there (`costs`).

That is measured once for a dtype, a number of threads, an instruction set and a precision of fp32, in a quarter of a
second at the first layer (`measure`), and kept in the user's cache folder (`records`). A process reads a record once
and holds to it until it ends, so that all processes compute the same bits. Where none can be kept, or the machine is
too busy to measure, the built-in costs of the instruction set hold until the process ends (docs/cpu.md).
"""

import functools
import threading
from pathlib import Path
from typing import NamedTuple

import torch

from ... import internals
from ..base import DTYPES
from ..native import _C
from . import records
from .costs import FEW, Costs, Line, Setting, builtin
from .measure import PATIENCE, measured

# Rows that our kernels multiply at least for dx: as many as a register tile has.
TILE = 8
# The library takes so much more for an expert, whose few rows all its threads share, than for a layer of as many rows;
# of ours each thread has an expert of its own.
SHARED = 1.25
# A library that is faster by less at the measured size is not on large weights, which slow it more than our kernels.
NEAR = 0.95


class Plan(NamedTuple):
    """One of the four ways, and how many bf16 values stand for one of fp32 in large products of ours: 3, 2 or 1."""

    way: str
    pieces: int = 3


_SMALL = Plan("adapter")


def plan(dtype: torch.dtype, M: int, K: int, N: int, R: int, backward: bool = False) -> Plan:
    """Which of the four ways computes a layer of these sizes fastest (bench/test_plan.py runs them all)."""
    if M * K * N <= 1 << 16 and M > 1 and dtype is torch.float32 and not backward and R <= 32:
        # The calls take all of the time, one more a microsecond. For it x·Wᵀ has the bits of the base layer alone,
        # and a small adapter's effect, the difference to that layer, is as exact as in PEFT.
        threads()
        return _SMALL
    return _plan(*_facts(dtype), M, K, N, R, backward)


# NOTE: as many shapes as batches of every length bring. A key of one level takes half the time of one with a setting.
@functools.lru_cache(maxsize=4096)
def _plan(dtype, tier, threads, precision, M: int, K: int, N: int, R: int, backward: bool) -> Plan:
    known = costs(Setting(dtype, tier, threads, precision))
    return Plan(rule(known, M, K, N, R, backward, foldable=dtype == torch.float32), known.pieces)


def experts_plan(dtype: torch.dtype, M: int, E: int, K: int, N: int, R: int, backward: bool = False) -> Plan:
    """How E experts that share M rows are computed: "whole" where that is how one of M / E rows is, else "library"."""
    known = costs(setting(dtype))
    # One call of ours is for all of them.
    few, many = (line._replace(call=line.call / E) for line in (known.few, known.many))
    library = Line(*(SHARED * each for each in known.library))
    known = known._replace(library=library, few=few, many=many, apart=0.0)
    way = rule(known, max(1, M // E), K, N, R, backward, foldable=False)
    return Plan(way if way == "whole" else "library", known.pieces)


def decoding_plan(dtype: torch.dtype, M: int, K: int, N: int) -> Plan:
    """The same of a weight in few bits: "whole", where it is decoded on the way, or "adapter", where the library waits
    for it, as long as our kernels take to pack it."""
    library, _, many, pieces = costs(setting(dtype))[:4]
    values = K * N
    whole = many.seconds(M, values) <= library.seconds(M, values) + many.read * values
    return Plan("whole" if whole else "adapter", pieces)


def rule(costs: Costs, M: int, K: int, N: int, R: int, backward: bool, foldable: bool) -> str:
    """The plan that takes least: its product with weight, the adapter's multiply-adds at its rate, and its calls."""
    library, few, many = costs[:3]
    values, adapter = K * N, (1 + backward) * M * R * (K + N)
    base = library.seconds(M, values) + (values * costs.across if backward else 0)
    apart = base + M * (K + N) * costs.apart
    ours = few.seconds(max(M, TILE) if backward else M, values) if M <= FEW else many.seconds(M, values)
    seconds = {
        "whole": NEAR * (ours + many.multiply * adapter),
        "adapter": apart + few.call + many.multiply * adapter,
        # Two products more in forward, six in backward; a short side leaves part of a library's tiles empty.
        "library": apart + (6 if backward else 2) * library.call + library.multiply * adapter * (1 + 8 / R),
    }
    if foldable and R > 64:
        # Folding multiplies K·N·R each way and passes over weight twice; of the adapter, the products of T or of the
        # gradients stay.
        left = adapter - M * R * (K if backward else N)
        seconds["folded"] = base + 2 * library.call + library.multiply * (left + values * (R + 20))
    return min(seconds, key=seconds.get)


_threads_before_fork = 0


def threads() -> int:
    """How many there are; in a child of fork(), which has one, how many there were before."""
    global _threads_before_fork
    count = torch.get_num_threads()
    if (count > 1 or _threads_before_fork) and _C.forked():
        if count > 1:
            # NOTE: OpenMP has lost its threads there, and the library would wait for them for ever.
            _threads_before_fork = count
            torch.set_num_threads(1)
        count = _threads_before_fork
    return count


def setting(dtype: torch.dtype) -> Setting:
    """What the costs of products of a dtype depend on, as it is now."""
    return Setting(*_facts(dtype))


def _facts(dtype: torch.dtype) -> tuple[torch.dtype, str, int, str | None]:
    return dtype, _C.cpu_tier(), threads(), internals.fp32_precision() if dtype is torch.float32 else None


_known: dict[Setting, Costs] = {}
_measuring = threading.Lock()


def costs(setting: Setting) -> Costs:
    """Those on record, else measured now, else built in."""
    if setting not in _known:
        # A child of fork() has its parent's costs: it must not measure, nor wait for a lock that was held then.
        if _C.forked():
            _known[setting] = records.recorded(setting, None) or builtin(setting)
        else:
            with _measuring:
                if setting not in _known:
                    _known[setting] = records.recorded(setting, measured) or builtin(setting)
    return _known[setting]


def forget() -> None:
    """Has the records read anew."""
    _known.clear()
    _plan.cache_clear()


def tune() -> list[Path]:
    """Measures anew what products of every dtype take, at this number of threads; returns the files written.

    Raises TimeoutError where the machine is too busy to tell.
    """
    files = []
    for now in map(setting, DTYPES):
        found = measured(now, PATIENCE)
        if found is None:
            raise TimeoutError(f"no two times of {now.dtype} products agree: the machine is too busy to measure")
        files.append(records.write(now, found))
    forget()
    return files
