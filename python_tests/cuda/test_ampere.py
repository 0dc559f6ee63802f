"""The kernels for sm_80 on the emulator: within the rounding of fp32 sums, on every schedule and any ragged shape."""

import functools

import pytest
import torch

from python_tests.cuda.emulator import SCHEDULES, check_sum, emulator, run_case, synchronisation_calls, with_gaps

DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def operands(m, n, k, r, w, major, dtype):
    """(a, b, wide, shrink, bias) as Product takes them."""
    generator = torch.Generator().manual_seed(m + n + k + r)
    a, b, wide, shrink, bias = (
        torch.randn(size, generator=generator).to(dtype) for size in ((m, k), (n, k), (n, r), (w, k), (1, n))
    )
    if major == "MN":
        b, wide, shrink = (t.T.contiguous() for t in (b, wide, shrink))
    return *(with_gaps(t, gap) for t, gap in zip((a, b, wide, shrink), (0, 8, 24, 16), strict=True)), bias


def run_product(m, n, k, r=0, w=0, major="K", dtype=torch.bfloat16, with_bias=True, makes_p=True, **options):
    """[(result, matrix, exact, magnitude, terms)] for c, and for p if the launch makes it."""
    a, b, wide, shrink, bias = operands(m, n, k, r, w, major, dtype)
    c = torch.full((m, n + 8), torch.nan, dtype=dtype)[:, :n]
    p = torch.full((m, w), torch.nan) if makes_p else torch.randn(m, w, generator=torch.Generator().manual_seed(m))
    p = p.to(dtype)
    bias = bias if with_bias else None
    adapter = (p, wide, shrink if makes_p else None) if r else (None, None, None)
    result = run_case("run_ampere", 0, a, b, c, bias, *adapter, flag=major == "MN", **options)
    assert not result.rule, result.text

    def sums(a, b, p, wide, bias):
        b, wide = (b, wide) if major == "K" else (b.T, wide.T)
        return a @ b.T + (p[:, :r] @ wide.T if r else 0) + (0 if bias is None else bias)

    # c is judged by the p that it was made from.
    doubles = [None if t is None else t.double() for t in (a, b, p, wide, bias)]
    cases = [(result, c, sums(*doubles), sums(*(None if t is None else t.abs() for t in doubles)), k + r + 1)]
    if r and makes_p:
        shrink = shrink.double() if major == "K" else shrink.double().T
        cases.append((result, p, a.double() @ shrink.T, a.double().abs() @ shrink.T.abs(), k))
    assert c._base[:, n:].isnan().all(), "an element between the rows was written"
    return cases


SHAPES = [  # m, n, k, r, w
    (1, 8, 8, 0, 0),
    (128, 128, 64, 16, 16),
    (129, 136, 72, 24, 48),
    (5, 520, 136, 8, 8),
    (300, 72, 8, 40, 40),
    (257, 264, 48, 72, 72),
    (200, 264, 200, 8, 16),
    (70, 72, 520, 136, 136),
    (384, 256, 96, 0, 0),
]


@pytest.mark.parametrize("major", ["K", "MN"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_product(shape, major):
    # Half of the schedules each.
    for index in (0, 3, 4) if major == "K" else (1, 2, 5):
        options = {"dtype": DTYPES[index % 2], "with_bias": index % 3 > 0, "makes_p": index % 4 < 3}
        for case in run_product(*shape, major=major, **options, **SCHEDULES[index]):
            check_sum(*case)


def test_results_are_the_same_bits_on_every_schedule():
    first, *others = [run_product(200, 264, 136, 24, 24, **schedule)[0][1] for schedule in SCHEDULES[:4]]
    assert all(torch.equal(first, other) for other in others)


def test_sums_beyond_many_laps_of_the_ring():
    for case in run_product(40, 72, 2056, 264, 264):
        check_sum(*case)


def test_rule_for_tiles():
    large = {(m, n): bool(emulator().ampere_takes_large(m, n, 4)) for m, n, *_ in SHAPES}
    # The tests above see both, on the emulator's 4 processors.
    assert sorted(shape for shape in large if large[shape]) == [(129, 136), (200, 264), (300, 72), (384, 256)]
    for m, n, expected in (
        (8192, 4096, True),
        (2048, 768, True),
        (1024, 768, False),
        (8192, 64, False),
        (128, 4096, False),
    ):
        assert emulator().ampere_takes_large(m, n, 108) == expected, (m, n)


@pytest.mark.parametrize("across", [False, True], ids=["K", "MN"])
@pytest.mark.parametrize("side", [128, 64])
def test_no_bank_is_touched_twice(side, across):
    places = torch.zeros(4, 128)
    result = run_case("run_ampere", 2, places, number=side, flag=across)
    assert not result.rule, result.text
    # Copies and fragments go by 8 lanes of 16 bytes, pairs of the result by 32 lanes of 4 bytes.
    for kind, size in enumerate((16, 16, 16, 4)):
        lanes = 128 // size
        for group in places.view(torch.int32)[kind].view(-1, lanes):
            assert len(set((group // size % lanes).tolist())) == lanes, (kind, group.tolist())


CALLS = synchronisation_calls("ampere.cuh")
# Large tiles and small ones; the last step lies in a slot through which the result leaves.
MUTATED = [(200, 264, 200, 8, 8), (70, 72, 392, 0, 0)]


def test_every_synchronisation_call_of_the_source_runs():
    a, b, *_ = operands(*MUTATED[0], "K", torch.bfloat16)
    c = torch.empty(200, 264, dtype=torch.bfloat16)
    assert set(run_case("run_ampere", 0, a, b, c, source="ampere.cuh").lines) == set(CALLS)


@pytest.mark.parametrize("line", CALLS, ids=lambda n: f"line{n}-{CALLS[n]}")
@pytest.mark.parametrize("shape", MUTATED, ids=["large", "small"])
def test_deleting_a_synchronisation_call_is_caught(shape, line):
    a, b, *_ = operands(*shape, "K", torch.bfloat16)
    for schedule in SCHEDULES:
        c = torch.empty(shape[0], shape[1], dtype=torch.bfloat16)
        result = run_case("run_ampere", 0, a, b, c, source="ampere.cuh", skipped_line=line, **schedule)
        assert line in result.lines and result.rule, CALLS[line]
