"""Narrow gradients on the emulator, for sm_90a and sm_80: every slice is right on every schedule."""

import functools
import itertools
import math

import pytest
import torch

from python_tests.cuda.emulator import (
    GRID_WAIT,
    SCHEDULES,
    check_sum,
    emulator,
    run_case,
    synchronisation_calls,
    with_gaps,
)

DTYPES = (torch.bfloat16, torch.float16)
# (entry point, kernel, rows of a step)
HOPPER, AMPERE = ("run_hopper_gradient", 0, 64), ("run_ampere", 1, 32)
both = pytest.mark.parametrize("engine", [HOPPER, AMPERE], ids=["hopper", "ampere"])


@functools.cache
def operands(m, n, w, dtype):
    generator = torch.Generator().manual_seed(m + n + w)
    wide, narrow = (torch.randn(m, size, generator=generator).to(dtype) for size in (n, w))
    return with_gaps(wide, 16), with_gaps(narrow, 8)


def run_gradients(engine, shapes, splits, dtype=torch.bfloat16, **options):
    """(result, slices of each)"""
    slices = [torch.full((splits, n, w), torch.nan) for _, n, w in shapes]
    tensors = [t for shape, s in zip(shapes, slices, strict=True) for t in (*operands(*shape, dtype), s.flatten(0, 1))]
    return run_case(*engine[:2], *tensors, number=splits, **options), slices


def run_gradient(engine, m, n, w, splits, **options):
    """(result, slices)"""
    result, slices = run_gradients(engine, [(m, n, w)], splits, **options)
    return result, slices[0]


def check_slices(engine, shape, dtype, result, slices):
    m, rows = shape[0], engine[2]
    steps, splits = math.ceil(m / rows), len(slices)
    bounds = [min(m, rows * (s * steps // splits)) for s in range(splits + 1)]
    wide, narrow = operands(*shape, dtype)
    for out, (first, last) in zip(slices, itertools.pairwise(bounds), strict=True):
        a, b = wide[first:last].double(), narrow[first:last].double()
        check_sum(result, out, a.T @ b, a.abs().T @ b.abs(), last - first)


SHAPES = [  # m, n, w, splits
    (1, 8, 8, 1),
    (64, 64, 64, 1),
    (131, 136, 24, 3),
    (300, 72, 72, 2),
    (97, 264, 136, 1),
    (590, 40, 16, 10),
    (130, 200, 256, 2),
]


@both
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_each_slice_is_the_sum_of_its_rows(shape, engine):
    for index, schedule in enumerate(SCHEDULES):
        dtype = DTYPES[index % 2]
        check_slices(engine, shape[:3], dtype, *run_gradient(engine, *shape, dtype=dtype, **schedule))


@both
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_of_one_launch(count, engine):
    shapes = [(131, 200, 72), (131, 136, 40), (131, 72, 72)][:count]
    for schedule in SCHEDULES[:4]:
        result, slices = run_gradients(engine, shapes, 2, **schedule)
        for shape, its_slices in zip(shapes, slices, strict=True):
            check_slices(engine, shape, torch.bfloat16, result, its_slices)


# Narrow matrices of one wide: all in one block; the last alone; none with another.
@both
@pytest.mark.parametrize("widths", [(24, 72, 64), (136, 8, 40), (200, 256, 72)], ids=lambda w: "+".join(map(str, w)))
def test_gradients_of_one_wide(widths, engine):
    for index, schedule in enumerate(SCHEDULES):
        dtype, splits = DTYPES[index % 2], 1 + index % 2 * 2
        wide = operands(300, 136, 8, dtype)[0]
        narrow = [operands(300, 8 * i, w, dtype)[1] for i, w in enumerate(widths, 1)]
        slices = [torch.full((splits * 136, w), torch.nan) for w in widths]
        tensors = [t for of in zip(narrow, slices, strict=True) for t in (wide, *of)]
        result = run_case(*engine[:2], *tensors, number=splits, **schedule)
        steps = math.ceil(300 / engine[2])
        bounds = [min(300, engine[2] * (s * steps // splits)) for s in range(splits + 1)]
        for b, its_slices in zip(narrow, slices, strict=True):
            for out, (first, last) in zip(its_slices.chunk(splits), itertools.pairwise(bounds), strict=True):
                left, right = wide[first:last].double(), b[first:last].double()
                check_sum(result, out, left.T @ right, left.abs().T @ right.abs(), last - first)


@both
def test_number_of_gradients_is_checked(engine):
    with pytest.raises(RuntimeError, match="a launch takes 1 to 6 problems, got 0"):
        run_gradients(engine, [], 1)


@both
def test_results_are_the_same_bits_on_every_schedule(engine):
    first, *others = [run_gradient(engine, 300, 72, 24, 3, **schedule)[1] for schedule in SCHEDULES[:4]]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("engine, limit", [(HOPPER, 5), (AMPERE, 10)], ids=["hopper", "ampere"])
def test_splits_are_checked(engine, limit):
    for splits in (0, limit + 1):
        with pytest.raises(RuntimeError, match=f"splits must be 1 to {limit}, got {splits}"):
            run_gradient(engine, 300, 8, 8, splits)


def test_width_is_checked():
    with pytest.raises(RuntimeError, match="narrow must have at most 256 columns, got 264"):
        run_gradient(HOPPER, 8, 8, 264, 1)


@pytest.mark.parametrize("processors", [16, 84, 108, 132, 142])
@pytest.mark.parametrize("name", ["hopper", "ampere"])
def test_rule_for_splits(name, processors):
    choose = getattr(emulator(), f"{name}_splits")
    for m, n, w in itertools.product((1, 33, 512, 2048, 8192, 16384), (8, 768, 4096, 11008, 28672), (8, 64, 72, 256)):
        splits = choose(m, n, w, processors)
        side = 128 if name == "hopper" or w > 64 else 64
        tiles = math.ceil(n / side) * (math.ceil(w / side) if name == "ampere" else 1)
        slots = processors if name == "hopper" else 2 * processors
        assert 1 <= splits <= math.ceil(m / (64 if name == "hopper" else 32))
        assert splits * tiles <= max(tiles, 2 * slots), "slices take more memory than the rule allows"
        if m >= 8192 and n >= 4096 and tiles <= slots:
            waves = splits * tiles / slots
            assert waves / math.ceil(waves) > 0.7, f"{splits} splits of {m} × {n} leave processors idle"


CALLS = synchronisation_calls("gradient.cuh")
# Several laps round the ring of slots.
MUTATED = (1100, 136, 256, 1)


def test_every_synchronisation_call_of_the_source_runs():
    waits = synchronisation_calls("gradient.cuh", GRID_WAIT)
    assert set(run_gradient(HOPPER, *MUTATED, source="gradient.cuh")[0].lines) == CALLS.keys() | waits.keys()


@pytest.mark.parametrize("line", CALLS, ids=lambda n: f"line{n}-{CALLS[n]}")
def test_deleting_a_synchronisation_call_is_caught(line):
    for schedule in SCHEDULES[:4]:
        result, _ = run_gradient(HOPPER, *MUTATED, source="gradient.cuh", skipped_line=line, **schedule)
        assert line in result.lines and result.rule, CALLS[line]
