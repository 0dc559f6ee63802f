"""The persistent GEMM on the emulator: right on every schedule, and every synchronisation call is needed."""

import functools
import re

import pytest
import torch
from emulator_harness import CUDA, TILES, run_gemm, synchronisation_calls

SHAPES = [
    (1, 8, 8),
    (128, 128, 64),
    (129, 136, 72),
    (5, 520, 136),
    (300, 72, 8),
    (64, 256, 520),
    (257, 128, 48),
    (200, 264, 200),
    (384, 384, 192),
    (130, 648, 40),
]
SEEDS = range(20)


@functools.cache
def problem(shape, dtype):
    m, n, k = shape
    generator = torch.Generator().manual_seed(m + n + k)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n, k), (n,)))
    return x, weight, bias


@functools.cache
def reference(shape, dtype, with_bias):
    """(fp64 result, largest error that is allowed): twice that of PyTorch in the same dtype, plus fp32 rounding."""
    x, weight, bias = problem(shape, dtype)
    bias = bias if with_bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = (torch.nn.functional.linear(x, weight, bias).double() - exact).abs().max().item()
    return exact, 2 * plain + torch.finfo(torch.float32).eps * exact.abs().max().item()


def check(shape, seed, *, tile, lanes=False, resident=0, blocks=4, launches=1):
    dtype = (torch.bfloat16, torch.float16)[seed // 5 % 2]
    with_bias = seed % 2 == 0
    x, weight, bias = problem(shape, dtype)
    y, ticket, result = run_gemm(
        x,
        weight,
        bias if with_bias else None,
        tile=tile,
        seed=seed,
        lanes=lanes,
        resident=resident,
        blocks=blocks,
        launches=launches,
    )
    assert not result.rule, result.text
    assert ticket == 0, "the last launch must leave the ticket counter at 0"
    exact, budget = reference(shape, dtype, with_bias)
    error = (y.double() - exact).abs().max().item()
    assert error <= budget, f"error must be at most {budget:.3g}, got {error:.3g}"
    return y


@pytest.mark.parametrize("lanes", [False, True], ids=["warps", "lanes"])
@pytest.mark.parametrize("resident", [1, 0], ids=["one-resident", "all-resident"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_gemm(shape, resident, lanes):
    for seed in SEEDS:
        check(shape, seed, tile=seed % len(TILES), resident=resident, lanes=lanes)


@pytest.mark.parametrize("tile", range(len(TILES)), ids=lambda t: "{}x{}x{}".format(*TILES[t]))
def test_result_is_the_same_bits_on_every_schedule(tile):
    results = [check((200, 264, 200), 10 * s, tile=tile, blocks=2 + 2 * (s % 2), resident=s % 2) for s in range(4)]
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_ticket_counter_serves_launch_after_launch():
    for seed in range(4):
        check((200, 264, 72), seed, tile=2 * (seed % 2), launches=3)


def test_k_beyond_many_laps_of_the_ring():
    check((130, 136, 2056), 0, tile=4)


@pytest.mark.parametrize("tile", [0, 2])
def test_rows_beyond_one_band_of_the_schedule(tile):
    rows = 128 * TILES[tile][2]
    check((9 * rows + 8, 136, 8), 0, tile=tile)


# Calls that may go without harm to the result, and why.
REDUNDANT = {
    "setmaxnreg_increase": "gives registers to a warp, orders nothing: without it the kernel is right and may spill",
}
# Without and with a cluster; K of several laps round the ring of slots, and K so short that nothing waits for a slot.
MUTATED = [(0, (200, 264, 456)), (2, (300, 264, 456)), (0, (300, 264, 72)), (2, (600, 264, 72))]


CALLS = synchronisation_calls("gemm.cuh")


@functools.cache
def executed_lines(tile, shape):
    x, weight, bias = problem(shape, torch.bfloat16)
    return run_gemm(x, weight, bias, tile=tile)[2].lines


def test_every_synchronisation_call_of_the_source_runs():
    executed = {line for tile, shape in MUTATED for line in executed_lines(tile, shape)}
    assert executed == set(CALLS)


@pytest.mark.parametrize("line", CALLS, ids=lambda n: f"line{n}-{CALLS[n]}")
def test_deleting_a_synchronisation_call_is_caught(line):
    name = CALLS[line]
    caught = {}
    for tile, shape in MUTATED:
        if line not in executed_lines(tile, shape):
            continue
        x, weight, bias = problem(shape, torch.bfloat16)
        exact, budget = reference(shape, torch.bfloat16, True)
        seen = caught[tile, shape] = []
        for seed in range(3):
            for lanes in (False, True):
                y, ticket, result = run_gemm(x, weight, bias, tile=tile, seed=seed, lanes=lanes, skipped_line=line)
                wrong = not (y.double() - exact).abs().max().item() <= budget
                seen.append(bool(result.rule) or wrong or ticket != 0)
        if all(seen):
            break
    # One of the problems must show it on every schedule.
    assert any(map(all, caught.values())) != (name in REDUNDANT), f"{name}: caught {caught}"


def test_kernel_source_has_no_emulator_conditionals_and_no_ptx():
    for path in (CUDA / "gemm.cuh", CUDA / "tile.cuh"):
        source = path.read_text()
        assert not re.search(r"\basm\b|__shared__|__CUDA|__GNUC__|EMULATOR|#\s*if", source), path.name
        includes = re.findall(r'#include [<"](.+)[>"]', source)
        assert set(includes) <= {"hopper.cuh", "schedule.h", "tile.cuh"}, path.name


@pytest.mark.parametrize("shape", [(0, 8, 8), (8, 0, 8), (8, 8, 0), (8, 12, 8), (8, 8, 12)])
def test_sizes_are_checked(shape):
    m, n, k = shape
    with pytest.raises(RuntimeError, match=f"got {m}, {n} and {k}"):
        run_gemm(torch.zeros(m, k).bfloat16(), torch.zeros(n, k).bfloat16())
