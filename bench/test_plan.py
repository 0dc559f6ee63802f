"""The rule by which the backend "cpu" picks a plan, held against all of its plans."""

import math
import statistics

import pytest
import torch

from bench.rows import LARGE, long, seconds_of
from bench.timing import interleave, median_ratio
from nlora_kernels import backends, testing
from nlora_kernels.backends import Call, Needs
from nlora_kernels.backends.cpu import PLANS, plans

SIZES = [(1, 4096, 4096), (16, 768, 768), (512, 768, 768), (512, 768, 3072), (2048, 768, 768), (512, 4096, 4096)]
# A dtype, and the precision of fp32 that PyTorch is asked for.
KINDS = {"float32": "highest", "bfloat16": "highest", "float32_medium": "medium"}
CASES = [
    long(kind, R, size, when=math.prod(size) > LARGE, id="{}-r{}-{}x{}x{}".format(kind, R, *size))
    for kind in KINDS
    for R in (8, 64, 128)
    for size in SIZES
]


@pytest.fixture
def precision(kind):
    torch.set_float32_matmul_precision(KINDS[kind])
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(backends.native._C is None, reason="the package was built without C++ kernels")
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("kind, R, size", CASES)
def test_plan(benchmark, request, kind, R, size):
    """The rule loses at most 10 % to the best of all plans, forward and backward together."""
    cpu = backends.TABLE["cpu"]
    dtype = kind.removesuffix("_medium")
    p = testing.problem(*size, R, dtype=getattr(torch, dtype))
    chosen, pieces = cpu.plan(p.x.dtype, *size, R)
    T, needs = p.x @ p.lora_A.T, Needs(True, False, True, True, True, False)
    call = Call(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, p.scaling)

    def run(way):
        plan = way and plans.Plan(way, pieces)
        return cpu.forward(call, plan)[0], cpu.backward(call, p.dy, T, needs, plan).x

    # A folded weight of half precision rounds small updates away, so there it is no plan.
    ways = [way for way in PLANS if dtype == "float32" or way != "folded"]
    tensors = {n: getattr(p, n) for n in testing.TENSORS}
    budgets = testing.Budget(
        *(lambda s=s, **t: testing.plain_linear(**t, scaling=s) for s in (p.scaling, 0)),
        tensors,
        p.dy,
        # The library may do what was allowed, whatever our kernels choose.
        pieces=1 if KINDS[kind] == "medium" else 3,
    )
    for way in ways:
        y, dx = run(way)
        budgets.check({"y": y, "dx": dx})
    others = {way: lambda way=way: run(way) for way in ways if way != chosen}
    # Without a plan, because backward may have another than forward. In turn, it would always follow folding, which
    # empties the caches.
    times = interleave(benchmark, lambda: run(None), others, seconds_of(request), shuffled=True)
    medians = {way: statistics.median(t) for way, t in times.items()}
    benchmark.extra_info.update(chosen=chosen, pieces=pieces, **medians)
    for way in others:
        # The lower percentile: only a loss that shows in most rounds counts.
        assert median_ratio(times["self"], times[way])[1] <= 1.1, f"{chosen} was chosen, {way} is faster"
