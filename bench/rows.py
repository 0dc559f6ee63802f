"""What a row of the tables holds."""

import statistics
from collections.abc import Callable

import pytest
import torch

from bench.timing import interleave, median_ratio


def seconds_of(request) -> float:
    """How long a row may take."""
    options = request.config
    short = options.getoption("--quick") or "smoke" in request.node.name
    return options.getoption("--seconds") or (0.2 if short else 0.5)


# Multiply-adds of a layer from which on it takes seconds to check one.
LARGE = 1 << 32


def long(*values, when: bool, id: str | None = None):
    """Parameters of a row, which `--quick` leaves out where it takes long to prepare."""
    return pytest.param(*values, marks=pytest.mark.long if when else (), id=id)


def record(
    benchmark,
    target: Callable,
    others: dict[str, Callable],
    info: dict,
    request,
    *,
    flops: int = 0,
    bytes_moved: int = 0,
    **options,
) -> dict[str, list[float]]:
    """Times `target` in turn with the others and writes the row: `info`, times, ratios to each of them, throughput.

    Returns the seconds of the single rounds; options are those of `interleave`. Everything was checked before.
    """
    times = interleave(benchmark, target, others, seconds_of(request), **options)
    seconds = statistics.median(times["self"])
    info = {
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "ms": 1e3 * seconds,
        "rounds": len(times["self"]),
    } | info
    for name in others:
        middle, low, high = median_ratio(times["self"], times[name])
        info |= {f"ratio_to_{name}": middle, f"ratio_to_{name}_p20_p80": [low, high]}
    if "peft" in others:
        info["speedup_vs_peft"] = 1 / info["ratio_to_peft"]
    if flops:
        info["gflops"] = flops / seconds / 1e9
    if bytes_moved:
        info["gbytes_per_second"] = bytes_moved / seconds / 1e9
    benchmark.extra_info.update(info)
    return times
