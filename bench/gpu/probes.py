"""Runs every probe and the GEMM on a CUDA device, compares with the emulator and writes the golden dumps.

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

from emulator_harness import GOLDEN, TILES, Options, Outcome, device, nvcc, run_gemm  # noqa: E402
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
        for dtype, mn in itertools.product((torch.bfloat16, torch.float16), (False, True)):
            inputs = {name: t.to(dtype) for name, t in exact.items()} | {"mn": mn}
            for tile, (rows, columns, cluster) in enumerate(TILES):
                launches = [dict(inputs) for _ in range(3)]
                ticket, epoch, _ = run_gemm(*launches, tile=tile, blocks=0, library=library)
                right = all(torch.equal(launch["c"], c.to(dtype)) for launch in launches) and (ticket, epoch) == (0, 3)
                label = f"gemm {'x'.join(map(str, shape))} {dtype} {'MN' if mn else 'K'} {rows}x{columns}x{cluster}"
                if right and shape in SHAPES:
                    emulated = dict(inputs)
                    run_gemm(emulated, tile=tile)
                    right = all(torch.equal(launches[0][x], emulated[x]) for x in ("c", "p")[: 1 + bool(w)])
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
    failures += check_gemm(library)
    print(f"{name}: {failures} differences; dumps in {path}")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
