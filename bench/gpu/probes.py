"""Every probe of the kernel layer and every kernel alone, through the library of the emulator's tests.

What a probe must write is computed without the layer's own formulas, and small integers make every sum exact: each
result has one right value. What the probes wrote goes to golden/<device>.npz; put it into python_tests/cuda/golden
and the tests compare the emulator with it.
"""

import ctypes
import functools
import itertools
import re

import numpy as np
import torch

from python_tests.cuda import emulator as harness
from python_tests.cuda.emulator import TILES, nystrom_case, run_case, run_gemm
from python_tests.cuda.probes import catalogue

BF16, FP16 = torch.bfloat16, torch.float16
# m, n, k, rank of wide, columns of p: ragged edges, K below one stage, many tiles a block.
SHAPES = [(1, 8, 8, 8, 8), (129, 136, 72, 24, 48), (300, 72, 8, 0, 0), (200, 264, 520, 64, 128), (130, 648, 40, 16, 16)]
# Slow on the emulator.
DEVICE_SHAPES = [(4096, 4096, 4096, 64, 64), (8192, 4096, 4096, 16, 32), (4097, 4104, 4104, 128, 128)]
PROBES = catalogue()


def library(machine):
    return None if machine.rehearsal else harness.device()


def device_name(machine) -> str:
    if machine.rehearsal:
        return "emulator"
    outcome = harness.Outcome()
    status = library(machine).name_device(ctypes.byref(harness.Options()), ctypes.byref(outcome))
    assert not status, outcome.text.decode()
    return outcome.text.decode()


def probes(machine) -> dict:
    """Each probe; what it wrote is kept where it is wrong as well, for the emulator is what that mends."""

    def check(name, probe):
        written, report = probe.run(library=library(machine))
        file = machine.out / "golden" / f"{re.sub(r'[^a-z0-9]+', '-', device_name(machine).lower())}.npz"
        file.parent.mkdir(exist_ok=True)
        # After every probe: the next may end the process.
        np.savez_compressed(file, **{**(np.load(file) if file.is_file() else {}), name: written})
        expected = probe.expected_bytes()
        wrong = np.flatnonzero(written != expected)
        assert not report.rule, report.text
        assert not wrong.size, f"{wrong.size} of {expected.size} bytes differ, the first at {wrong[0]}"

    return {name: functools.partial(check, name, probe) for name, probe in PROBES.items()}


def gemm(machine) -> dict:
    """Every tile of the engine, in both orientations of the right operand."""
    found = {}
    for shape in SHAPES[:2] if machine.rehearsal else SHAPES + DEVICE_SHAPES:
        # Of large ones the host copies and compares for seconds.
        dtypes = (BF16,) if machine.rehearsal or shape in DEVICE_SHAPES else (BF16, FP16)
        for tile, (rows, columns, cluster) in enumerate(TILES):
            for mn, dtype in itertools.product((False, True), dtypes):
                name = f"{size(shape)} {short(dtype)} {'MN' if mn else 'K'} {rows}x{columns}x{cluster}"
                found[name] = functools.partial(check_gemm, machine, shape, tile, mn, dtype)
    return found


def check_gemm(machine, shape, tile, mn, dtype) -> None:
    m, _, _, r, w = shape
    inputs, c, gradient = exact_product(machine.name, shape, dtype)
    inputs = {**inputs, "mn": mn}
    if mn and w > r:
        inputs["splits"] = splits_of(m)
    else:
        del inputs["t"]
    blocks = machine.pick(0, 4)
    # Items of P one tile high, then two.
    for tall in (1, 2) if w else (1,):
        launches = [dict(inputs) for _ in range(1 if machine.rehearsal or shape in DEVICE_SHAPES else 2)]
        ticket, epoch, result = run_gemm(*launches, tile=tile, blocks=blocks, tall=tall, library=library(machine))
        assert not result.rule, result.text
        assert (ticket, epoch) == (0, len(launches)), f"ticket {ticket}, epoch {epoch} after {len(launches)} launches"
        for launch in launches:
            assert torch.equal(launch["c"], c), f"c is wrong with items of {tall} tiles"
            if "t" in inputs:
                sums = launch["slices"].unflatten(0, (inputs["splits"], w - r)).sum(0)
                assert torch.equal(sums, gradient), f"the slices are wrong with items of {tall} tiles"


@functools.lru_cache(2)
def exact_product(device, shape, dtype):
    """Operands, and the results that they must have, made on a device and for the host."""
    m, n, k, r, w = shape
    inputs = {"a": integers(device, m, k), "b": integers(device, n, k), "bias": integers(device, 1, n)[0]}
    inputs |= {"wide": integers(device, n, r)} if r else {}
    inputs |= {"shrink": selection(device, w, k)} if w else {}
    inputs["t"] = integers(device, m, 64)
    c = torch.nn.functional.linear(inputs["a"], inputs["b"], inputs["bias"])
    if r:
        c += inputs["a"] @ inputs["shrink"][:r].T @ inputs["wide"].T
    gradient = inputs["shrink"][r:] @ inputs["a"].T @ inputs["t"] if w > r else None
    inputs = {name: t.to(dtype).cpu() for name, t in inputs.items()}
    return inputs, c.to(dtype).cpu(), None if gradient is None else gradient.cpu()


def selection(device, w, k):
    """One nonzero element in each row: the product with it stays small enough to be exact in 16 bits."""
    return torch.nn.functional.one_hot(torch.arange(w, device=device) * 7 % k, k).float()


def integers(device, rows, columns, seed=0):
    """-2 to 2."""
    generator = torch.Generator(device).manual_seed(seed + rows + columns)
    return torch.randint(-2, 3, (rows, columns), generator=generator, device=device).float()


def splits_of(m: int) -> int:
    return 1 + (m > 64) + (m > 4096)


def empty(*shape, dtype=torch.float32):
    return torch.full(shape, torch.nan, dtype=dtype)


def others(machine) -> dict:
    """Fold, gradients, finish, gather, residual, the core of LoRA², and the kernels of sm_80, which sm_90 runs too."""
    found = {}
    dtypes = machine.pick((BF16, FP16), (BF16,))
    gradients = [(1, 8, 8), (131, 136, 72), *machine.pick([(8192, 4096, 64), (8191, 4104, 256)], [])]
    for (m, n, w), dtype in itertools.product(gradients, dtypes):
        for entry, kernel in (("run_hopper_gradient", 0), ("run_ampere", 1)):
            name = f"{'gradient' if kernel == 0 else 'ampere gradient'} {m}x{n}x{w} {short(dtype)}"
            found[name] = functools.partial(check_gradients, machine, m, n, w, entry, kernel, dtype)
    for n, r in [(33, 8), *machine.pick([(4096, 64), (1000, 256)], [])]:
        for part in ("fold", "core", "core backward", "finish"):
            found[f"{part} {n}x{r}"] = functools.partial(check_adapter, machine, part, n, r)
    for n, k, r in [(75, 136, 8), *machine.pick([(4096, 4096, 64), (1000, 776, 256)], [])]:
        for part in ("gather", "residual"):
            found[f"{part} {n}x{k} r{r}"] = functools.partial(check_nystrom, machine, part, n, k, r)
    for shape in SHAPES[:2] if machine.rehearsal else SHAPES + DEVICE_SHAPES[:1]:
        for mn, dtype in itertools.product((False, True), dtypes):
            name = f"ampere {size(shape)} {short(dtype)} {'MN' if mn else 'K'}"
            found[name] = functools.partial(check_ampere, machine, shape, mn, dtype)
    return found


def check(machine, pairs, entry, kernel, *operands, **options) -> None:
    result = run_case(entry, kernel, *operands, library=library(machine), **options)
    assert not result.rule, result.text
    for i, (ours, exact) in enumerate(pairs()):
        assert torch.equal(ours, exact.cpu()), f"result {i} is wrong"


def check_gradients(machine, m, n, w, entry, kernel, dtype) -> None:
    """Two gradients of one launch."""
    operands = [(integers(machine.name, m, width), integers(machine.name, m, w, seed=1)) for width in (n, w)]
    splits = splits_of(m)
    slices = [empty(splits, wide.shape[1], w) for wide, _ in operands]
    tensors = [t for (a, b), s in zip(operands, slices, strict=True) for t in (*host(a, b, dtype), s.flatten(0, 1))]
    exact = [wide.T @ narrow for wide, narrow in operands]
    check(machine, lambda: zip([s.sum(0) for s in slices], exact, strict=True), entry, kernel, *tensors, number=splits)


def host(*tensors_and_dtype):
    *tensors, dtype = tensors_and_dtype
    return [t.to(dtype).cpu() for t in tensors]


def check_adapter(machine, part, n, r) -> None:
    sizes = ((n, r), (r, r), (r, 24), (1, r), (24, r), (1, r), (24, 24))
    B, N, u, E, U, mask, dC = (integers("cpu", *s) for s in sizes)
    L = (E * mask).T
    if part == "fold":
        out = empty(n, 2 * r)
        check(machine, lambda: [(out, torch.cat([0.5 * B @ N, B], 1))], "run_adapter", 0, B, N, out, scaling=0.5)
    elif part == "finish":
        out, slices = empty(r, n), torch.cat([B, B])
        options = dict(number=2, flag=True, scaling=0.5)
        check(machine, lambda: [(out, (B @ N.T).T)], "run_adapter", 3, slices, N, out, **options)
    elif part == "core":
        out = empty(24, 24)
        check(machine, lambda: [(out, (U * L.T) @ u)], "run_adapter", 1, u, E, U, mask, out)
    else:
        outs = [empty(*t.shape) for t in (u, E, U)]
        exact = L * (U.T @ dC), mask * (U.T @ dC @ u.T).diagonal()[None], dC @ u.T * L.T
        check(machine, lambda: zip(outs, exact, strict=True), "run_adapter", 2, dC, u, E, U, mask, *outs)


def check_nystrom(machine, part, n, k, r) -> None:
    """Two weights of one shape at once."""
    weight, A = (torch.stack([integers("cpu", rows, k, seed) for seed in range(2)]) for rows in (n, r))
    B, core = torch.stack([integers("cpu", n, r, seed) for seed in range(2)]), torch.stack([selection("cpu", r, r)] * 2)
    if part == "residual":
        exact = weight - 0.5 * B @ core @ A
        case = nystrom_case(weight, A, core, B, 0.5)
    else:
        rows, cols = (torch.arange(2 * r).reshape(2, r) * 7 % size for size in (n, k))
        case = nystrom_case(weight, A, core, B, rows=rows, cols=cols)
    result = harness.call(getattr(library(machine) or harness.emulator(), f"run_{part}"), ctypes.byref(case))
    assert not result.rule, result.text
    if part == "residual":
        assert torch.equal(weight, exact), "the residual is wrong"
        return
    for w, i, j, *parts in zip(weight, rows, cols, A, core, B, strict=True):
        assert all(map(torch.equal, parts, (w[i], w[i][:, j], w[:, j]))), "the parts are wrong"


def check_ampere(machine, shape, mn, dtype) -> None:
    m, n, k, r, w = shape
    a, b, bias = (integers(machine.name, *s) for s in ((m, k), (n, k), (1, n)))
    wide, shrink = integers(machine.name, n, r or 8), selection(machine.name, w or 8, k)
    p = a @ shrink.T
    c = a @ b.T + bias + p[:, : r or 8] @ wide.T
    right = [(t.T.contiguous() if mn else t) for t in (b, wide, shrink)]
    results = empty(m, n, dtype=dtype), empty(m, w or 8, dtype=dtype)
    first, second, third, fourth, fifth = host(a, right[0], bias, *right[1:], dtype)
    pairs = [(results[0], c.to(dtype)), (results[1], p.to(dtype))]
    operands = first, second, results[0], third, results[1], fourth, fifth
    check(machine, lambda: pairs, "run_ampere", 0, *operands, flag=mn)


def size(shape) -> str:
    return "x".join(map(str, shape))


def short(dtype) -> str:
    return {BF16: "bf16", FP16: "fp16"}[dtype]
