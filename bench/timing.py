"""How time and memory are taken."""

import random
import statistics
import time
from collections.abc import Callable

import torch

# Rounds of one row: enough for a percentile, and no more than tell anything new; of rounds of LONG seconds fewer,
# which average over more of what else the machine does.
LEAST, MOST = 7, 300
LONG, LEAST_LONG = 1.0, 4


def seconds(function: Callable, clock: Callable[[], float] = time.perf_counter) -> float:
    """The timer of the CPU. That of a GPU is its events (bench/gpu/device.py)."""
    start = clock()
    function()
    return clock() - start


def by_turns(
    functions: dict[str, Callable], timer: Callable[[Callable], float], rounds: int, warm: float = 0.0
) -> dict[str, list[float]]:
    """{name: what the timer says of it in each round}, one function after the other, so that a change in the machine's
    speed meets all alike; after as many rounds as the timer takes for `warm`."""
    warmed = 0.0
    while warmed < warm:
        warmed += sum(map(timer, functions.values()))
    times = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name].append(timer(function))
    return times


def interleave(
    benchmark,
    target: Callable,
    others: dict[str, Callable],
    time_limit: float,
    *,
    timer: Callable[[Callable], float] = seconds,
    rounds: int | None = None,
    prepare: Callable = lambda: None,
    shuffled: bool = False,
) -> dict[str, list[float]]:
    """Times `target` by pytest-benchmark and before each of its rounds the others, by turns.

    Each meets the caches as the one before it left them, in every round alike; `shuffled`, for candidates of which one
    would leave the next much worse caches than the rest do, mixes the order of the others.

    Returns the seconds of each round of the others, by `timer`, and those of `target` as "self". About `time_limit`
    seconds in all, or as many rounds as are given, after two that are not counted unless they take long. `prepare` runs
    untimed before each. The caller has run every function once.
    """
    times = {name: [] for name in others}
    order, shuffle = list(others), random.Random(0).shuffle

    def before():
        prepare()
        if shuffled:
            shuffle(order)
        for name, taken in by_turns({name: others[name] for name in order}, timer, 1).items():
            times[name] += taken

    warm = 0
    if rounds is None:
        each = seconds(before) + seconds(target)
        least = LEAST if each < LONG else LEAST_LONG
        rounds, warm = max(least, min(MOST, int(time_limit / each))), 2 if each < 0.3 else 0
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
            # Kept, so that none that comes later has its address.
            found[storage.data_ptr()] = storage

    # NOTE: not t itself: what a graph keeps of its own results it keeps for ever. No backward comes to ask for it.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        kept = function()
    del kept
    return sum(storage.nbytes() for storage in found.values())
