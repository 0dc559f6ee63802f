"""Which of the four ways computes a layer on the CPU fastest, reckoned from what products take there.

A product of x (M, K) and weight (N, K) takes call + K·N·(read + M·multiply) seconds: `Costs` has such a line for the
library and for our kernels. They are measured once for a dtype, a number of threads, an instruction set and a precision
of fp32, some milliseconds at the first layer, and kept in the user's cache folder. A process reads a record once and
holds to it until it ends, so that all processes compute the same bits. Where none can be kept, or the machine is too
busy to measure, the built-in costs of the instruction set hold until the process ends (docs/cpu.md).
"""

import functools
import hashlib
import json
import math
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import atomic, cache, internals
from ..base import short
from ..native import _C

try:
    import resource
except ImportError:  # Not a Unix: what preempts a thread is not told.
    resource = None

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rows of x up to which our kernels read weight in place; for dx they multiply as many as a register tile has.
FEW, TILE = 16, 8
# Rounds of all products for SPAN seconds, which outlast much of what else begins and ends here, and until AGREE times
# of each came within WITHIN of its least; after LIMIT seconds, or PATIENCE where it was asked for, the machine is too
# busy.
SPAN, AGREE, WITHIN, LIMIT, PATIENCE = 0.2, 4, 1.1, 1.0, 10.0
# The library takes so much more for an expert, whose few rows all its threads share, than for a layer of as many rows;
# of ours each thread has an expert of its own.
SHARED = 1.25
# A library that is faster by less at the measured size is not on large weights, which slow it more than our kernels.
NEAR = 0.95
# A product that takes so many seconds is far too slow: to know it better would change nothing.
SLOW = 0.01
# What tells one CPU from another of the same name: on x86, and on Arm, whose CPUs have none.
MODEL = ("model name", "cpu family", "model", "stepping", "CPU implementer", "CPU part", "CPU variant", "CPU revision")


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
    more where the adapter's product is apart; when they were measured."""

    library: Line
    few: Line
    many: Line
    pieces: int = 3
    apart: float = 0.0
    written: str | None = None


class Setting(NamedTuple):
    """What costs depend on, beside the CPU, torch and the extension.

    precision: of fp32, what PyTorch allows its own products: "ieee", "tf32" or "bf16"; None for other dtypes.
    """

    dtype: torch.dtype
    tier: str
    threads: int
    precision: str | None = None


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
    library, few, many, pieces = costs(setting(dtype))[:4]
    # One call of ours is for all of them.
    few, many = (line._replace(call=line.call / E) for line in (few, many))
    library = Line(*(SHARED * each for each in library))
    way = rule(Costs(library, few, many), max(1, M // E), K, N, R, backward, foldable=False)
    return Plan(way if way == "whole" else "library", pieces)


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
    base = library.seconds(M, values)
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


def allowed(setting: Setting) -> tuple[int, ...]:
    """How many bf16 values our products may take for one of fp32, which bf16 beside it rounds to itself.

    Only numbers for which the instruction set has kernels of their own, the most precise first.
    """
    dtype, tier, _, precision = setting
    in_hardware = tier in ("avx512", "amx") and _C.cpu_multiplies(_C.bfloat16)
    if in_hardware and (dtype == torch.bfloat16 or precision == "bf16"):
        return 3, 1
    return (3, 2) if tier == "amx" and precision == "tf32" else (3,)


_known: dict[Setting, Costs] = {}
_measuring = threading.Lock()


def costs(setting: Setting) -> Costs:
    """Those on record, else measured now, else built in."""
    if setting not in _known:
        # A child of fork() has its parent's costs: it must not measure, nor wait for a lock that was held then.
        if _C.forked():
            _known[setting] = recorded(setting, None) or builtin(setting)
        else:
            with _measuring:
                if setting not in _known:
                    _known[setting] = recorded(setting, measured) or builtin(setting)
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
        files.append(file_of(identity(now)))
        write(files[-1], identity(now), found)
    forget()
    return files


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
    pieces = allowed(setting)[-1] if tier == "amx" else 3
    return Costs(
        line(2e-6 if full else 1.5e-5, 5e-11, library), line(6e-6, 3.5e-11, few), line(8e-6, packing, ours), pieces
    )


def measured(setting: Setting, limit: float = LIMIT) -> Costs | None:
    """Times products of the library and of our kernels now. None where in `limit` seconds the machine is too busy."""
    # In a thread of its own no mode of the caller's (tracing, counting, autocast, inference) sees the products.
    outcome = []
    thread = threading.Thread(target=lambda: outcome.append(_measured(setting, limit)))
    thread.start()
    thread.join()
    return outcome[0] if outcome else None


def _product(x: Tensor, weight: Tensor, pieces: int = 3) -> Tensor:
    """x·Wᵀ by our kernels, as a layer whose adapter is zero."""
    N, K = weight.shape
    A, B = weight.new_zeros(1, K), weight.new_zeros(N, 1)
    return _C.cpu_forward(x, weight, A, B, None, None, 1.0, torch.get_num_threads(), pieces)[0]


def _apart(x: Tensor, weight: Tensor) -> Tensor:
    """The same by the library, added to what our kernels make of that adapter."""
    N, K = weight.shape
    A, B = weight.new_zeros(1, K), weight.new_zeros(N, 1)
    y, _ = _C.cpu_forward(x, None, A, B, None, None, 1.0, torch.get_num_threads(), 3)
    return y.addmm_(x, weight.T)


def _measured(setting: Setting, limit: float) -> Costs | None:
    generator = torch.Generator("cpu").manual_seed(0)

    def matrix(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator, device="cpu").to(setting.dtype)

    # Of each line: hardly more than the call, reading a weight, and multiplying with it.
    x, weights = matrix(512, 512), {n: matrix(n, n) for n in (64, 512)}
    sizes = {"library": (F.linear, 16, 512), "few": (_product, 4, FEW)}
    for pieces in allowed(setting):
        sizes[pieces] = functools.partial(_product, pieces=pieces), 2 * FEW, 512
    calls = {
        (name, M, n): functools.partial(product, x[:M, :n].contiguous(), weights[n])
        for name, (product, few, many) in sizes.items()
        for M, n in ((few, 64), (few, 512), (many, 512))
    }
    calls["apart", 512, 512] = functools.partial(_apart, x, weights[512])
    times = {key: [] for key in calls}
    torch.set_num_threads(setting.threads)
    begun = time.monotonic()
    while (taken := time.monotonic() - begun) < SPAN or not all(map(_settled, times.values())):
        if taken > limit:
            return None
        # In turn, so that what else runs here meets all alike.
        for key, found in times.items():
            if not _slow(found):
                seconds = _undisturbed(calls[key])
                found += [] if seconds is None else [seconds]
    lines = {}
    for name, (_, few, many) in sizes.items():
        small, middle, large = (min(times[name, M, n]) for M, n in ((few, 64), (few, 512), (many, 512)))
        multiply = (large - middle) / (512 * 512 * (many - few))
        if multiply <= 0:
            return None
        read = max(0.0, (middle - small) / (512 * 512 - 64 * 64) - few * multiply)
        lines[name] = Line(max(1e-7, small - 64 * 64 * (read + few * multiply)), read, multiply)
    pieces = min(allowed(setting), key=lambda pieces: lines[pieces].seconds(128, 512 * 512))
    more = min(times["apart", 512, 512]) - min(times["library", 512, 512]) - lines["few"].call
    apart = max(0.0, more / (512 * (512 + 512)))
    return Costs(lines["library"], lines["few"], lines[pieces], pieces, apart, time.strftime("%Y-%m-%d"))


def _undisturbed(call: Callable[[], object]) -> float | None:
    """The seconds of a call; None where something else was given the processor of one of its threads meanwhile."""
    switches = _preemptions()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return seconds if _preemptions() == switches else None


def _preemptions() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw if resource else 0


def _slow(times: list[float]) -> bool:
    return len(times) > 1 and min(times) > SLOW


def _settled(times: list[float]) -> bool:
    return _slow(times) or sum(taken <= WITHIN * min(times) for taken in times) >= AGREE


# Records


def processor() -> dict[str, str]:
    """What Linux says of the first CPU, by its names; elsewhere, and where it does not say it, the "model name"."""
    try:
        said = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        said = ""
    fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", said, re.MULTILINE))
    return {"model name": platform.processor() or platform.machine(), **fields}


@functools.cache
def _machine() -> dict[str, Any]:
    fields = processor()
    cpu = ", ".join(fields[name] for name in MODEL if name in fields)
    digest = hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest()
    return {"cpu": cpu, "torch": torch.__version__, "extension": digest[:16]}


def identity(setting: Setting) -> dict[str, Any]:
    """Everything that a record depends on."""
    dtype, tier, threads, precision = setting
    return {**_machine(), "dtype": short(dtype), "tier": tier, "threads": threads, "precision": precision}


def file_of(identity: dict[str, Any]) -> Path:
    """Where the record of an identity lies."""
    return cache.folder() / "cpu" / f"{identity['dtype']}-{identity['tier']}-{cache.digest(identity)}.json"


def read(file: Path, identity: dict[str, Any]) -> Costs | None:
    """The costs of a record; None where there is none of this identity, or none that can be understood."""
    try:
        stored = json.loads(file.read_text())
        lines = {name: Line(*(float(stored[name][part]) for part in Line._fields)) for name in Costs._fields[:3]}
        apart = float(stored["apart"])
        finite = all(math.isfinite(value) and value >= 0 for line in (*lines.values(), (apart,)) for value in line)
        pieces = stored["pieces"]
        if stored["identity"] == identity and finite and type(pieces) is int and pieces in (1, 2, 3):
            return Costs(**lines, pieces=pieces, apart=apart, written=str(stored["written"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        pass
    return None


def write(file: Path, identity: dict[str, Any], costs: Costs) -> None:
    stored = {name: getattr(costs, name)._asdict() for name in Costs._fields[:3]}
    stored |= {"identity": identity, "written": costs.written, "pieces": costs.pieces, "apart": costs.apart}
    cache.write(file, json.dumps(stored, indent=1) + "\n")


def recorded(setting: Setting, measure: Callable[[Setting], Costs | None] | None) -> Costs | None:
    """The costs on record; without a record those that `measure` finds, which become it. None where there are none.

    Of processes that start at once one measures and the others wait for it.
    """
    try:
        of = identity(setting)
        file = file_of(of)
        costs = read(file, of)
        if costs or measure is None:
            return costs
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic.locked(file.with_suffix(".lock")):
            costs = read(file, of)
            if costs is None and (found := measure(setting)):
                write(file, of, found)
                costs = read(file, of)
        return costs
    except OSError:
        # What cannot be kept would be another in every process.
        return None
