"""What a row of the tables holds, and the error that it may have."""

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.timing import interleave, median_ratio
from nlora_kernels import backends


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


def error(actual: dict[Any, Tensor], plain: dict[Any, Tensor], exact: dict[Any, Tensor], what: str = "") -> float:
    """The largest error of these results relative to the exact ones, in fp64.

    Fails where one, in the Euclidean norm, is above twice that of plain PyTorch in the same dtype plus eps.
    """
    assert actual.keys() == exact.keys(), f"{what}results are {list(actual)}, expected {list(exact)}"
    largest = 0.0
    for name, fp64 in exact.items():
        off, allowed, size = (t.norm().item() for t in (actual[name] - fp64, plain[name] - fp64, fp64))
        eps = max(torch.finfo(each[name].dtype).eps for each in (actual, plain))
        bound = 2 * allowed + eps * size
        assert off <= bound, f"{what}{name} is off by {off:.3g}, the budget is {bound:.3g}"
        largest = max(largest, off / (size or 1.0))
    return largest


def check(results: Callable[..., dict[str, Tensor]], layer: nn.Module, *inputs: Tensor, like: Sequence = ()) -> float:
    """The error of `results(layer, *inputs)` against its twin in fp64, by `error`; plain PyTorch is the reference.

    Layers that are `like` it compute the same by the same parameters, and must be as near.
    """
    found, twin = [results(each, *inputs) for each in (layer, *like)], copy.deepcopy(layer)
    before = backends.prefer("reference")
    try:
        plain = results(twin, *inputs)
        exact = results(twin.double(), *(t.double() if t.is_floating_point() else t for t in inputs))
    finally:
        backends.prefer(before)
    return [error(actual, plain, exact) for actual in found][0]


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
