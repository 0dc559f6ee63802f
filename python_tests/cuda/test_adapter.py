"""Fold, core of LoRA² and finish of a gradient on the emulator: within the rounding of fp32 sums, on every schedule."""

import functools
import itertools
import re

import pytest
import torch

from python_tests.cuda.emulator import CUDA, SCHEDULES, check_sum, run_case, synchronisation_calls

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("rows", "columns", "gaps")
FOLD, CORE, CORE_BACKWARD, FINISH = range(4)


def view(rows, columns, dtype, layout, generator=None):
    """A matrix in one of several layouts: N(0, 1), or NaN without a generator."""
    size = {"rows": (rows, columns), "columns": (columns, rows), "gaps": (rows, 2 * columns + 3)}[layout]
    storage = torch.full(size, torch.nan) if generator is None else torch.randn(size, generator=generator)
    storage = storage.to(dtype)
    return {"rows": storage, "columns": storage.T, "gaps": storage[:, 1::2][:, :columns]}[layout]


def check(result, out, exact, magnitude, terms):
    check_sum(result, out, exact, magnitude, terms)
    if out._base is not None and out.stride(-1) == 2:
        assert out._base[:, ::2].isnan().all(), "an element between the columns was written"


def mixes(count):
    """Dtypes and layouts of `count` matrices: every dtype and layout of each comes up."""
    pairs = list(itertools.product(DTYPES, LAYOUTS))
    return [[pairs[(mix * (i + 1) + 2 * i) % len(pairs)] for i in range(count)] for mix in range(len(pairs))]


@functools.cache
def fold_case(n, r, with_core, doubled, mix):
    generator = torch.Generator().manual_seed(n + r + mix)
    (b, c, o) = mixes(3)[mix]
    B, N = view(n, r, *b, generator), view(r, r, *c, generator) if with_core else None
    exact = 0.7 * (B.double() @ N.double() if with_core else B.double())
    magnitude = 0.7 * (B.double().abs() @ N.double().abs() if with_core else B.double().abs())
    if doubled:
        exact, magnitude = torch.cat([exact, B.double()], 1), torch.cat([magnitude, B.double().abs()], 1)
    return B, N, exact, magnitude, o


def run_fold(n, r, with_core=True, doubled=False, mix=0, **options):
    B, N, exact, magnitude, o = fold_case(n, r, with_core, doubled, mix)
    out = view(n, (1 + doubled) * r, *o)
    result = run_case("run_adapter", FOLD, B, N, out, scaling=0.7, **options)
    return result, out, exact, magnitude, r


@pytest.mark.parametrize("n, r", [(1, 8), (33, 64), (70, 24), (40, 72), (5, 130)])
def test_fold(n, r):
    for mix, schedule in zip(range(9), itertools.cycle(SCHEDULES)):
        check(*run_fold(n, r, with_core=mix % 3 != 2, doubled=mix % 2 == 1, mix=mix, **schedule))


def test_folds_of_one_launch():
    for mix, schedule in zip(range(9), itertools.cycle(SCHEDULES)):
        # F beside a cast of A.
        B, N, exact, magnitude, o = fold_case(70, 24, True, True, mix)
        A = view(24, 200, *mixes(1)[-1 - mix][0], torch.Generator().manual_seed(mix))
        out, rounded = view(70, 48, *o), torch.full((24, 200), torch.nan, dtype=torch.bfloat16)
        result = run_case("run_adapter", FOLD, B, N, out, A, None, rounded, **schedule)
        check(result, out, torch.cat([exact[:, :24] / 0.7, exact[:, 24:]], 1), magnitude / 0.7, 24)
        assert torch.equal(rounded, A.bfloat16())


def test_fold_without_core_only_rounds():
    result, out, *_ = run_fold(33, 24, with_core=False, doubled=True)
    B = fold_case(33, 24, False, True, 0)[0]
    assert not result.rule and torch.equal(out[:, 24:], B.to(out.dtype))
    assert torch.equal(out[:, :24], (torch.tensor(0.7) * B.float()).to(out.dtype))


@functools.cache
def lora2_case(r, k, with_mask, mix):
    generator = torch.Generator().manual_seed(r + k + mix)
    layouts = mixes(5)[mix]
    sizes = ((r, k), (1, r), (k, r), (1, r), (k, k))
    u, E, U, mask, dC = (view(*size, *layout, generator) for size, layout in zip(sizes, layouts, strict=True))
    mask = (mask > 0).to(mask.dtype) if with_mask else None
    return u, E, U, mask, dC


def exact_core(u, E, U, mask, dC):
    """C, du, dE and dU in fp64."""
    kept = torch.ones_like(E) if mask is None else mask
    L = (E * kept).T
    return (U * L.T) @ u, L * (U.T @ dC), kept * (U.T @ dC @ u.T).diagonal()[None], dC @ u.T * L.T


def run_core(r, k, with_mask=True, mix=0, **options):
    tensors = lora2_case(r, k, with_mask, mix)
    out = view(k, k, *mixes(6)[mix][5])
    result = run_case("run_adapter", CORE, *tensors[:4], out, **options)
    doubles = [None if t is None else t.double() for t in tensors]
    magnitudes = [None if t is None else t.abs() for t in doubles]
    return result, out, exact_core(*doubles)[0], exact_core(*magnitudes)[0], r + 2


def run_core_backward(r, k, with_mask=True, mix=0, **options):
    """[(result, gradient, ...)] as check() takes them."""
    u, E, U, mask, dC = tensors = lora2_case(r, k, with_mask, mix)
    outs = [view(*t.shape, t.dtype, LAYOUTS[(mix + i) % 3]) for i, t in enumerate((u, E, U))]
    result = run_case("run_adapter", CORE_BACKWARD, dC, u, E, U, mask, *outs, **options)
    doubles = [None if t is None else t.double() for t in tensors]
    exact = exact_core(*doubles)[1:]
    magnitudes = exact_core(*[None if t is None else t.abs() for t in doubles])[1:]
    return [(result, *case) for case in zip(outs, exact, magnitudes, (k + 2, 2 * k + 2, k + 2), strict=True)]


LORA2 = [(1, 1), (8, 1), (8, 8), (3, 40), (70, 36), (24, 100)]


@pytest.mark.parametrize("r, k", LORA2)
def test_core(r, k):
    for mix, schedule in zip(range(6), SCHEDULES, strict=True):
        check(*run_core(r, k, with_mask=mix % 3 != 0, mix=mix, **schedule))


@pytest.mark.parametrize("r, k", LORA2)
def test_core_backward(r, k):
    for mix, schedule in zip(range(6), SCHEDULES, strict=True):
        for gradient in run_core_backward(r, k, with_mask=mix % 3 != 0, mix=mix, **schedule):
            check(*gradient)


@pytest.mark.parametrize("r, k", [(256, 72), (72, 256)])
def test_core_of_the_largest_rank(r, k):
    check(*run_core(r, k))
    for gradient in run_core_backward(r, k):
        check(*gradient)


def finish_case(n, w, splits, with_core, transposed, mix):
    """(slices, core, out), exact and magnitude"""
    generator = torch.Generator().manual_seed(n + w + splits)
    slices = torch.randn(splits * n, w, generator=generator)
    c, o = mixes(2)[mix]
    core = view(w, w, *c, generator) if with_core else None
    exact, magnitude = (0.3 * t.view(splits, n, w).sum(0) for t in (slices.double(), slices.double().abs()))
    if with_core:
        exact, magnitude = exact @ core.double().T, magnitude @ core.double().abs().T
    if transposed:
        exact, magnitude = exact.T, magnitude.T
    return (slices, core, view(*exact.shape, *o)), exact, magnitude


def run_finish(n, w, splits=3, with_core=True, transposed=False, mix=0, **options):
    tensors, exact, magnitude = finish_case(n, w, splits, with_core, transposed, mix)
    options |= {"number": splits, "flag": transposed, "scaling": 0.3}
    return run_case("run_adapter", FINISH, *tensors, **options), tensors[2], exact, magnitude, splits + w


def test_finish_of_many_rows():
    for n, w in ((4100, 8), (4096, 24)):
        check(*run_finish(n, w, splits=2, with_core=False, transposed=True))


def test_finishes_of_one_launch():
    cases = [
        finish_case(n, w, 2, core, True, mix) for n, w, core, mix in ((40, 72, True, 1), (8, 16, 0, 2), (70, 8, 1, 3))
    ]
    tensors = [t for case in cases for t in case[0]]
    for schedule in SCHEDULES[:4]:
        result = run_case("run_adapter", FINISH, *tensors, number=2, flag=True, scaling=0.3, **schedule)
        for (_, _, out), exact, magnitude in cases:
            check(result, out, exact, magnitude, 2 + max(out.shape))


@pytest.mark.parametrize("splits", [1, 2, 19])
@pytest.mark.parametrize("n, w", [(8, 8), (40, 72), (136, 16), (33, 256)])
def test_finish(n, w, splits):
    for mix, schedule in zip(range(8), itertools.cycle(SCHEDULES)):
        check(*run_finish(n, w, splits, with_core=mix % 2 == 1, transposed=mix // 2 % 2 == 1, mix=mix, **schedule))


def test_results_are_the_same_bits_on_every_schedule():
    for run in (lambda **o: [run_fold(70, 40, **o)[1]], lambda **o: [g[1] for g in run_core_backward(70, 72, **o)]):
        first, *others = ([t.contiguous() for t in run(**schedule)] for schedule in SCHEDULES[:4])
        for other in others:
            for a, b in zip(first, other, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


KERNELS = sorted(path for path in CUDA.glob("*/*.cuh") if path.stem not in ("context", "layer", "layout"))

# A launch of each that runs every synchronisation call of the source.
MUTATED = {
    "strided.cuh": lambda **options: run_core_backward(70, 72, **options)[0][0],
    "core.cuh": lambda **options: run_core_backward(70, 72, **options)[0][0],
    "finish.cuh": lambda **options: run_finish(40, 72, with_core=False, **options)[0],
}
CALLS = [(source, line, name) for source in MUTATED for line, name in synchronisation_calls(source).items()]


@pytest.mark.parametrize("source, line, name", CALLS, ids=lambda v: str(v))
def test_deleting_a_synchronisation_call_is_caught(source, line, name):
    for schedule in SCHEDULES:
        result = MUTATED[source](source=source, skipped_line=line, **schedule)
        assert line in result.lines and result.rule in ("race", "uninitialised read"), result.text


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.name)
def test_kernels_go_through_the_layer_alone(path):
    source = path.read_text()
    assert not re.search(r"\basm\b|__shared__|__syncthreads|__CUDA|__GNUC__|EMULATOR|#\s*if", source)
    included = re.findall(r'#include "(.+)"', source)
    assert all((path.parent / name).exists() for name in included), "kernels include the layer and one another"
