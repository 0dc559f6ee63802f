"""How time and memory are taken."""

import random
import statistics
import time
from collections.abc import Callable

import torch

# Rounds of one row: enough for a percentile, and no more than tell anything new.
LEAST, MOST = 7, 300
CLOCK = time.perf_counter


def interleave(
    benchmark,
    target: Callable,
    others: dict[str, Callable],
    seconds: float,
    *,
    rounds: int | None = None,
    prepare: Callable = lambda: None,
    shuffled: bool = False,
) -> dict[str, list[float]]:
    """Times `target` by pytest-benchmark and before each of its rounds the others, in turn, so that a
    change in the machine's speed meets all alike.

    Each meets the caches as the one before it left them, in every round alike; `shuffled`, for candidates of which one
    would leave the next much worse caches than the rest do, mixes the order of the others.

    Returns the seconds of each round of the others, and those of `target` as "self". About `seconds` in all, or as many
    rounds as are given, after two that are not counted unless they take long. `prepare` runs untimed before each. The
    caller has run every function once.
    """
    times = {name: [] for name in others}
    order, shuffle = list(others), random.Random(0).shuffle

    def before():
        prepare()
        if shuffled:
            shuffle(order)
        for name in order:
            start = CLOCK()
            others[name]()
            times[name].append(CLOCK() - start)

    warm = 0
    if rounds is None:
        start = CLOCK()
        before()
        target()
        each = CLOCK() - start
        rounds, warm = max(LEAST, min(MOST, int(seconds / each))), 2 if each < 1 else 0
    benchmark.pedantic(target, setup=before, rounds=rounds, warmup_rounds=warm)
    # Without timing, as under --benchmark-disable, there is one round and nothing to tell of it.
    own = list(benchmark.stats.stats.data) if benchmark.stats else [float("nan")]
    return {name: taken[-len(own) :] for name, taken in times.items()} | {"self": own}


def median_ratio(times: list[float], to: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the ratios of single rounds."""
    ratios = [a / b for a, b in zip(times, to, strict=True)]
    if len(ratios) < 2:
        return ratios[0], ratios[0], ratios[0]
    fifths = statistics.quantiles(ratios, n=5)
    return statistics.median(ratios), fifths[0], fifths[3]


def peak_bytes(function: Callable) -> int:
    """The most that tensors hold at a time while `function` runs on the CPU, above what they held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    del kept
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def saved_bytes(function: Callable, parameters) -> int:
    """What autograd keeps for backward of a forward, counted once a storage; parameters and buffers are not counted."""
    known = {t.untyped_storage().data_ptr() for t in parameters}
    found = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = function()
    del kept
    return sum(found.values())
