"""What products of a dtype take here, by timing some: 0.2 to 0.5 s where the machine is quiet enough to tell."""

import functools
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..native import _C
from .costs import FEW, Costs, Line, Setting, allowed

try:
    import resource
except ImportError:  # Not a Unix: what preempts a thread is not told.
    resource = None

# Rounds of all products for SPAN seconds, which outlast much of what else begins and ends here, and until AGREE times
# of each came within WITHIN of its least, of which one in LUCK does not count. After LIMIT seconds, or after PATIENCE
# where it was asked for, the machine is too busy.
SPAN, AGREE, WITHIN, LUCK, LIMIT, PATIENCE = 0.2, 4, 1.1, 50, 1.0, 10.0
# A product that takes so many seconds is far too slow: to know it better would change nothing.
SLOW = 0.01


def measured(setting: Setting, limit: float = LIMIT) -> Costs | None:
    """Times products of the library and of our kernels now. None where in `limit` seconds the machine is too busy."""
    # In a thread of its own no mode of the caller's (tracing, counting, autocast, inference) sees the products.
    outcome = []
    # NOTE: OpenMP keeps threads for either. With more of them than cores they sleep whenever one waits for another, and
    # a short product takes five times as long.
    _C.release_team()
    thread = threading.Thread(target=lambda: outcome.append(_measured(setting, limit)))
    thread.start()
    thread.join()
    return outcome[0] if outcome else None


def _product(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, pieces: int = 3) -> Tensor:
    """x·Wᵀ by our kernels, as a layer whose adapter is zero."""
    return _C.cpu_forward(x, weight, lora_A, lora_B, None, None, 1.0, torch.get_num_threads(), pieces)[0]


def _apart(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """The same by the library, added to what our kernels make of that adapter."""
    y, _ = _C.cpu_forward(x, None, lora_A, lora_B, None, None, 1.0, torch.get_num_threads(), 3)
    return y.addmm_(x, weight.T)


def _measured(setting: Setting, limit: float) -> Costs | None:
    generator = torch.Generator("cpu").manual_seed(0)

    def matrix(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator, device="cpu").to(setting.dtype)

    # A weight and an adapter of zeros, made before the clock runs: beside a short product that takes as long.
    zeros = functools.partial(torch.zeros, dtype=setting.dtype, device="cpu")
    layers = {n: (matrix(n, n), zeros(1, n), zeros(n, 1)) for n in (64, 512)}
    # Of each line: hardly more than the call, reading a weight, and multiplying with it.
    x = matrix(512, 512)
    sizes = {"library": (F.linear, 16, 512), "few": (_product, 4, FEW)}
    for pieces in allowed(setting):
        sizes[pieces] = functools.partial(_product, pieces=pieces), 2 * FEW, 512
    calls = {
        (name, M, n): functools.partial(product, x[:M, :n].contiguous(), *layers[n][: 1 if name == "library" else 3])
        for name, (product, few, many) in sizes.items()
        for M, n in ((few, 64), (few, 512), (many, 512))
    }
    calls["apart", 512, 512] = functools.partial(_apart, x, *layers[512])
    # Of one row, with a weight that leaves the nearer caches: y and dx.
    row, far = (torch.ones(rows, 2048, dtype=setting.dtype, device="cpu") for rows in (1, 2048))
    calls["library", 1, 2048] = functools.partial(F.linear, row, far)
    calls["across", 1, 2048] = functools.partial(torch.mm, row, far)
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
        small, middle, large = (_least(times[name, M, n]) for M, n in ((few, 64), (few, 512), (many, 512)))
        multiply = (large - middle) / (512 * 512 * (many - few))
        if multiply <= 0:
            return None
        read = max(0.0, (middle - small) / (512 * 512 - 64 * 64) - few * multiply)
        lines[name] = Line(max(1e-7, small - 64 * 64 * (read + few * multiply)), read, multiply)
    pieces = min(allowed(setting), key=lambda pieces: lines[pieces].seconds(128, 512 * 512))
    more = _least(times["apart", 512, 512]) - _least(times["library", 512, 512]) - lines["few"].call
    apart = max(0.0, more / (512 * (512 + 512)))
    across = max(0.0, _least(times["across", 1, 2048]) - _least(times["library", 1, 2048])) / far.numel()
    return Costs(lines["library"], lines["few"], lines[pieces], pieces, apart, across, time.strftime("%Y-%m-%d"))


def _undisturbed(call: Callable[[], object]) -> float | None:
    """The seconds of a call; None where something else was given the processor of one of its threads meanwhile.

    Of the second of two in a row: the products in turn empty the caches, after which a short one takes half as long or
    twice, and no two times agree.
    """
    call()
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
    least = _ordered(times)[:AGREE]
    return _slow(times) or (len(least) == AGREE and least[-1] <= WITHIN * least[0])


def _least(times: list[float]) -> float:
    return _ordered(times)[0]


def _ordered(times: list[float]) -> list[float]:
    """From the least on, without the few that came by luck: others may never agree with one of them."""
    return sorted(times)[len(times) // LUCK :]
