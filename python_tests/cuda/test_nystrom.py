"""Nyström gather and residual in CUDA, on the emulator: exact copies, fp32 accuracy, no race on any schedule."""

import ctypes

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from python_tests.cuda.emulator import call, emulator, nystrom_case, synchronisation_calls

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def subtract_(weight, A, core, B, scaling, **options):
    return call(emulator().run_residual, ctypes.byref(nystrom_case(weight, A, core, B, scaling)), **options)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("strides", ["contiguous", "sliced", "transposed"])
@pytest.mark.parametrize("r", [1, 13, 40])
def test_gather_is_slicing_bitwise(dtype, strides, r):
    layers, out, inner = 3, 75, 1100 if r == 13 else 50
    shape = {"contiguous": (out, inner), "sliced": (2 * out, 2 * inner), "transposed": (inner, out)}[strides]
    weight = torch.randn(layers, *shape).to(dtype)
    weight = {"contiguous": weight, "sliced": weight[:, ::2, ::2], "transposed": weight.mT}[strides]
    rows, cols = (torch.stack([torch.randperm(n)[:r] for _ in range(layers)]) for n in (out, inner))
    A, core, B = (torch.zeros(layers, *s, dtype=dtype) for s in ((r, inner), (r, r), (out, r)))
    for lanes in (False, True):
        for t in (A, core, B):
            t.zero_()
        case = nystrom_case(weight, A, core, B, rows=rows, cols=cols)
        result = call(emulator().run_gather, ctypes.byref(case), seed=r, lanes=lanes)
        assert not result.rule, result.text
        for w, i, j, *ours in zip(weight, rows, cols, A, core, B, strict=True):
            assert all(map(torch.equal, ours, (w[i], w[i][:, j], w[:, j])))


SHAPES = [(1, 8, 1), (75, 136, 3), (128, 128, 16), (200, 264, 24), (129, 72, 256)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("adapter", [None, *DTYPES.values()], ids=["same", *DTYPES])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_residual_is_within_the_budget(dtype, adapter, shape):
    out, inner, r = shape
    layers = 2 if out < 128 else 1
    adapter = adapter or dtype
    before = torch.randn(layers, out, inner).to(dtype)
    # A product as large as W: the rounding of either shows.
    A, N, B = (torch.randn(layers, *s).to(adapter) for s in ((r, inner), (r, r), (out, r)))
    N /= r
    for seed, core in enumerate((N, None)):
        weight = before.clone()
        result = subtract_(weight, A, core, B, 0.7 / (1 if core is not None else r**0.5), seed=seed, lanes=seed == 0)
        assert not result.rule, result.text
        for i in range(layers):
            parts = A[i], None if core is None else core[i], B[i]
            scaling = 0.7 / (1 if core is not None else r**0.5)
            left = parts[2].double() if core is None else parts[2].double() @ parts[1].double()
            exact = before[i].double() - scaling * left @ parts[0].double()
            plain = nk.init.subtract_(before[i].clone(), *parts, scaling)
            for norm in (2, torch.inf):
                bound = 2 * testing.error_norm(plain, exact, norm)
                bound += torch.finfo(torch.float32).eps * torch.linalg.vector_norm(exact, norm).item()
                assert testing.error_norm(weight[i], exact, norm) <= bound


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_residual_of_a_slice_leaves_the_rest(dtype):
    # Columns that end within 16 bytes, rows apart.
    storage = torch.randn(1, 2 * 130, 152).to(dtype)
    before = storage.clone()
    weight = storage[:, ::2, :133]
    A, N, B = (torch.randn(1, *s) for s in ((5, 133), (5, 5), (130, 5)))
    result = subtract_(weight, A, N, B, 0.5, lanes=True)
    assert not result.rule, result.text
    expected = nk.init.subtract_(before[0, ::2, :133].clone(), A[0], N[0], B[0], 0.5)
    eps = torch.finfo(dtype).eps
    assert (weight[0] - expected).double().norm() <= eps * expected.double().norm()
    assert not torch.equal(weight, before[:, ::2, :133])
    assert torch.equal(storage[:, 1::2], before[:, 1::2]) and torch.equal(storage[..., 133:], before[..., 133:])


def test_more_layers_than_one_launch_takes():
    layers, r = 67, 2
    weight, before = (torch.randn(layers, 8, 8).bfloat16() for _ in range(2))
    before.copy_(weight)
    A, B = torch.randn(layers, r, 8), torch.randn(layers, 8, r)
    result = subtract_(weight, A, None, B, 1.0, resident=16)
    assert not result.rule, result.text
    expected = (before.double() - B.double() @ A.double()).bfloat16()
    assert (weight - expected).abs().max() <= 2**-8 * expected.abs().max()
    rows, cols = (torch.randint(8, (layers, r)) for _ in range(2))
    gathered = [torch.zeros(layers, *s, dtype=weight.dtype) for s in ((r, 8), (r, r), (8, r))]
    case = nystrom_case(weight, *gathered, rows=rows, cols=cols)
    assert not call(emulator().run_gather, ctypes.byref(case), resident=16).rule
    for i in range(layers):
        w = weight[i]
        expected = w[rows[i]], w[rows[i]][:, cols[i]], w[:, cols[i]]
        assert all(torch.equal(t[i], e) for t, e in zip(gathered, expected, strict=True))


def test_residual_is_the_same_bits_on_every_schedule():
    weight = torch.randn(1, 200, 264).half()
    A, N, B = (torch.randn(1, *s) for s in ((24, 264), (24, 24), (200, 24)))
    results = []
    for seed in range(3):
        results.append(weight.clone())
        assert not subtract_(results[-1], A, N, B, 0.1, seed=seed, resident=seed % 2).rule
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_unaligned_rows_are_refused():
    weight = torch.randn(1, 8, 12).bfloat16()
    with pytest.raises(RuntimeError, match=r"aligned to 16 bytes, got strides \(12, 1\)"):
        subtract_(weight, torch.randn(1, 2, 12), None, torch.randn(1, 8, 2), 1.0)


CALLS = synchronisation_calls("residual.cuh")


@pytest.mark.parametrize("line", CALLS, ids=lambda n: f"line{n}-{CALLS[n]}")
def test_deleting_a_synchronisation_call_is_caught(line):
    before = torch.randn(1, 136, 136).bfloat16()
    A, B = torch.randn(1, 72, 136), torch.randn(1, 136, 72)
    right = before.clone()
    result = subtract_(right, A, None, B, 0.1, source="residual.cuh")
    assert line in result.lines
    for seed in range(3):
        weight = before.clone()
        result = subtract_(weight, A, None, B, 0.1, seed=seed, skipped_line=line, source="residual.cuh")
        assert result.rule or not torch.equal(weight, right)
