"""Runs every probe and every kernel on a CUDA device, compares with the emulator and writes the golden dumps.

    python bench/gpu/probes.py [--out FOLDER]

Exit status: 0 if the device and the emulator agree byte for byte, 1 if they differ, 2 if there is no device or no
nvcc. The dumps (python_tests/emulator_golden/<device>.npz) hold what the device wrote, also where it differs: commit
them, and from then on the tests compare the emulator with them.
"""

import argparse
import ctypes
import itertools
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_tests"))

from emulator_harness import GOLDEN, TILES, Options, Outcome, device, nvcc, run_case, run_gemm  # noqa: E402
from emulator_probes import catalogue  # noqa: E402

# m, n, k, rank of wide, columns of p. Ragged edges, K below one stage, many tiles a block; the last ones are for
# devices only (slow on the emulator).
SHAPES = [(1, 8, 8, 8, 8), (129, 136, 72, 24, 48), (300, 72, 8, 0, 0), (200, 264, 520, 64, 128), (130, 648, 40, 16, 16)]
DEVICE_SHAPES = [(4096, 4096, 4096, 64, 64), (8192, 4096, 4096, 16, 32), (4097, 4104, 4104, 128, 128)]


def device_name(library):
    outcome = Outcome()
    if library.name_device(ctypes.byref(Options()), ctypes.byref(outcome)):
        return None, outcome.text.decode()
    return outcome.text.decode(), None


def check_probes(library):
    """(what the device wrote, number of probes that differ from the emulator)"""
    dumps, differing = {}, 0
    for name, probe in catalogue().items():
        try:
            dumps[name], _ = probe.run(library=library)
        except RuntimeError as error:
            # A failed launch leaves the device unusable for this process.
            print(f"FAIL  {name}: {error}")
            return dumps, differing + 1
        emulated, report = probe.run()
        wrong = np.flatnonzero(dumps[name] != emulated)
        if report.rule or wrong.size:
            differing += 1
            where = f"{wrong.size} of {emulated.size} bytes differ, the first at {wrong[:1]}"
            print(f"DIFF  {name}: {report.text or where}")
        else:
            print(f"ok    {name}")
    return dumps, differing


def check_gemm(library):
    """Number of GEMMs that are wrong. Small integers make every sum exact: each result has one right value."""
    failures = 0
    generator = torch.Generator().manual_seed(0)
    for shape in SHAPES + DEVICE_SHAPES:
        m, n, k, r, w = shape
        sizes = {"a": (m, k), "b": (n, k), "bias": (n,), "wide": (n, r), "shrink": (w, k)}
        exact = {name: torch.randint(-2, 3, s, generator=generator).float() for name, s in sizes.items() if all(s)}
        # One nonzero element in each row of shrink: p stays small enough to be exact in 16 bits.
        if w:
            exact["shrink"] = torch.nn.functional.one_hot(torch.arange(w) * 7 % k, k).float()
        c = torch.nn.functional.linear(exact["a"], exact["b"], exact["bias"])
        if r:
            c += exact["a"] @ exact["shrink"][:r].T @ exact["wide"].T
        t = torch.randint(-2, 3, (m, 64), generator=generator).float()
        gradient = exact["shrink"][r:] @ exact["a"].T @ t if w > r else None
        for dtype, mn in itertools.product((torch.bfloat16, torch.float16), (False, True)):
            inputs = {name: x.to(dtype) for name, x in exact.items()} | {"mn": mn}
            if mn and w > r:
                inputs |= {"t": t.to(dtype), "splits": 1 + (m > 64) + (m > 4096)}
            for tile, (rows, columns, cluster) in enumerate(TILES):
                launches = [dict(inputs) for _ in range(3)]
                ticket, epoch, _ = run_gemm(*launches, tile=tile, blocks=0, library=library)
                right = all(torch.equal(launch["c"], c.to(dtype)) for launch in launches) and (ticket, epoch) == (0, 3)
                if "t" in inputs:
                    sums = (x["slices"].unflatten(0, (inputs["splits"], w - r)).sum(0) for x in launches)
                    right = right and all(torch.equal(x, gradient) for x in sums)
                label = f"gemm {'x'.join(map(str, shape))} {dtype} {'MN' if mn else 'K'} {rows}x{columns}x{cluster}"
                if right and shape in SHAPES:
                    emulated = dict(inputs)
                    run_gemm(emulated, tile=tile)
                    right = all(torch.equal(launches[0][x], emulated[x]) for x in ("c", "p")[: 1 + bool(w)])
                print(f"{'ok   ' if right else 'DIFF '} {label}")
                failures += not right
    return failures


def integers(*sizes, dtype=torch.float32):
    """Matrices of -2 to 2 of these sizes."""
    generator = torch.Generator().manual_seed(sum(map(sum, sizes)))
    return [torch.randint(-2, 3, size, generator=generator).to(dtype) for size in sizes]


def empty(*size, dtype=torch.float32):
    return torch.full(size, torch.nan, dtype=dtype)


def ampere_product(m, n, k, r, w, library, mn, dtype):
    """The kernels of sm_80, which run on sm_90 too; (label, results, what they should be)"""
    a, b, bias, wide = integers((m, k), (n, k), (1, n), (n, r), dtype=dtype)
    shrink = torch.nn.functional.one_hot(torch.arange(w) * 7 % k, k).to(dtype)
    p = a.float() @ shrink.float().T
    c = a.float() @ b.float().T + bias.float() + p[:, :r] @ wide.float().T
    right = [(t.T.contiguous() if mn else t) for t in (b, wide, shrink)]
    results = empty(m, n, dtype=dtype), empty(m, w, dtype=dtype)
    operands = a, right[0], results[0], bias, results[1], *right[1:]
    run_case("run_ampere", 0, *operands, flag=mn, library=library)
    label = f"ampere {m}x{n}x{k}x{r}x{w} {dtype} {'MN' if mn else 'K'}"
    return label, results, (c.to(dtype), p.to(dtype))


def gradients(m, n, w, library, entry, kernel, dtype):
    """Two gradients of one launch."""
    operands = [integers((m, size), (m, w), dtype=dtype) for size in (n, w)]
    splits = 1 + (m > 64) + (m > 4096)
    slices = [empty(splits, wide.shape[1], w) for wide, _ in operands]
    tensors = [t for pair, s in zip(operands, slices, strict=True) for t in (*pair, s.flatten(0, 1))]
    run_case(entry, kernel, *tensors, number=splits, library=library)
    exact = [wide.float().T @ narrow.float() for wide, narrow in operands]
    return f"{entry} {m}x{n}x{w} {dtype}", [s.sum(0) for s in slices], exact


def adapter(n, r, library):
    """Fold, finish and the core of LoRA² with its gradients, all in fp32."""
    B, N, u, E, U, mask, dC = integers((n, r), (r, r), (r, 24), (1, r), (24, r), (1, r), (24, 24))
    folded, finished, core, du, dE, dU = (empty(*s) for s in ((n, 2 * r), (r, n), (24, 24), u.shape, E.shape, U.shape))
    run_case("run_adapter", 0, B, N, folded, scaling=0.5, library=library)
    run_case("run_adapter", 1, u, E, U, mask, core, library=library)
    run_case("run_adapter", 2, dC, u, E, U, mask, du, dE, dU, library=library)
    run_case("run_adapter", 3, torch.cat([B, B]), N, finished, number=2, flag=True, scaling=0.5, library=library)
    L = (E * mask).T
    exact = torch.cat([0.5 * B @ N, B], 1), (B @ N.T).T, (U * L.T) @ u, L * (U.T @ dC)
    exact += mask * (U.T @ dC @ u.T).diagonal()[None], dC @ u.T * L.T
    return f"adapter {n}x{r}", (folded, finished, core, du, dE, dU), exact


def check_kernels(library):
    """Number of launches of the other kernels that are wrong, by exact sums of small integers again."""
    runs = []
    for dtype in (torch.bfloat16, torch.float16):
        for m, n, k, r, w in [*SHAPES, *DEVICE_SHAPES]:
            runs += [ampere_product(m, n, k, r or 8, w or 8, library, mn, dtype) for mn in (False, True)]
        for m, n, w in ((1, 8, 8), (131, 136, 72), (8192, 4096, 64), (8191, 4104, 256)):
            runs += [gradients(m, n, w, library, *e, dtype) for e in (("run_hopper_gradient", 0), ("run_ampere", 1))]
    runs += [adapter(n, r, library) for n, r in ((33, 8), (4096, 64), (1000, 256))]
    failures = 0
    for label, results, exact in runs:
        right = all(map(torch.equal, results, exact))
        print(f"{'ok   ' if right else 'DIFF '} {label}")
        failures += not right
    return failures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN, help="folder of the golden dumps (default: %(default)s)")
    out = parser.parse_args().out
    if nvcc() is None:
        print("gpu-check needs nvcc (13 or later) on the PATH or in NVCC")
        return 2
    library = device()
    name, problem = device_name(library)
    if name is None:
        print(f"gpu-check needs a CUDA device of compute capability 9.0: {problem}")
        return 2
    dumps, failures = check_probes(library)
    out.mkdir(parents=True, exist_ok=True)
    path = out / (re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower() + ".npz")
    np.savez_compressed(path, **dumps)
    failures += check_gemm(library) + check_kernels(library)
    print(f"{name}: {failures} differences; dumps in {path}")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
