"""Runs every probe and the GEMM on a CUDA device, compares with the emulator and writes the golden dumps.

    python bench/gpu/probes.py [--out FOLDER]

Exit status: 0 if the device and the emulator agree byte for byte, 1 if they differ, 2 if there is no device or no
nvcc. The dumps (python_tests/emulator_golden/<device>.npz) hold what the device wrote, also where it differs: commit
them, and from then on the tests compare the emulator with them.
"""

import argparse
import ctypes
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_tests"))

from emulator_harness import GOLDEN, TILES, Options, Outcome, device, nvcc, run_gemm  # noqa: E402
from emulator_probes import catalogue  # noqa: E402

# Ragged edges, K below one stage, many tiles a block; the last ones are for devices only (slow on the emulator).
SHAPES = [(1, 8, 8), (129, 136, 72), (300, 72, 8), (200, 264, 520), (130, 648, 40)]
DEVICE_SHAPES = [(4096, 4096, 4096), (8192, 4096, 4096), (4097, 4104, 4104)]


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
        m, n, k = shape
        integers = [torch.randint(-2, 3, size, generator=generator) for size in ((m, k), (n, k), (n,))]
        exact = torch.nn.functional.linear(*(t.float() for t in integers))
        for dtype in (torch.bfloat16, torch.float16):
            x, weight, bias = (t.to(dtype) for t in integers)
            for tile, (rows, columns, cluster) in enumerate(TILES):
                y, ticket, _ = run_gemm(x, weight, bias, tile=tile, blocks=0, launches=3, library=library)
                right = torch.equal(y, exact.to(dtype)) and ticket == 0
                label = f"gemm {m}x{n}x{k} {dtype} tile {rows}x{columns} cluster {cluster}"
                if right and shape in SHAPES:
                    right = torch.equal(y, run_gemm(x, weight, bias, tile=tile)[0])
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
