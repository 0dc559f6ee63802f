"""The rule by which the backend "cpu" picks a plan, held against all of its plans."""

import math
import statistics

import pytest
import torch

from bench.rows import LARGE, long, seconds_of
from bench.timing import interleave, median_ratio
from nlora_kernels import backends, testing
from nlora_kernels.backends import Call, Needs
from nlora_kernels.backends.cpu import PLANS

SIZES = [(1, 4096, 4096), (16, 768, 768), (512, 768, 768), (512, 768, 3072), (2048, 768, 768), (512, 4096, 4096)]
CASES = [
    long(dtype, R, size, when=math.prod(size) > LARGE, id="{}-r{}-{}x{}x{}".format(dtype, R, *size))
    for dtype in ("float32", "bfloat16")
    for R in (8, 64, 128)
    for size in SIZES
]


@pytest.mark.skipif(backends.native._C is None, reason="the package was built without C++ kernels")
@pytest.mark.parametrize("dtype, R, size", CASES)
def test_plan(benchmark, request, dtype, R, size):
    """The rule loses at most 10 % to the best of all plans, forward and backward together."""
    cpu = backends.TABLE["cpu"]
    p = testing.problem(*size, R, dtype=getattr(torch, dtype))
    chosen = cpu.plan(p.x.dtype, *size, R)
    T, needs = p.x @ p.lora_A.T, Needs(True, False, True, True, True, False)
    call = Call(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, p.scaling)

    def run(plan):
        return cpu.forward(call, plan)[0], cpu.backward(call, p.dy, T, needs, plan).x

    # A folded weight of half precision rounds small updates away, so there it is no plan.
    plans = [plan for plan in PLANS if dtype == "float32" or plan != "folded"]
    tensors = {n: getattr(p, n) for n in testing.TENSORS}
    budgets = testing.Budget(
        *(lambda s=s, **t: testing.plain_linear(**t, scaling=s) for s in (p.scaling, 0)), tensors, p.dy
    )
    for plan in plans:
        y, dx = run(plan)
        budgets.check({"y": y, "dx": dx})
    others = {plan: lambda plan=plan: run(plan) for plan in plans if plan != chosen}
    # Without a plan, because backward may have another than forward. In turn, it would always follow folding, which
    # empties the caches.
    times = interleave(benchmark, lambda: run(None), others, seconds_of(request), shuffled=True)
    benchmark.extra_info.update(chosen=chosen, **{plan: statistics.median(t) for plan, t in times.items()})
    for plan in others:
        # The lower percentile: only a loss that shows in most rounds counts.
        assert median_ratio(times["self"], times[plan])[1] <= 1.1, f"{chosen} was chosen, {plan} is faster"
