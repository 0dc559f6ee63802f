"""Tiles of the Triton kernels for the shapes that matter: <out>/tuned/<device>.json for the package's tuned/."""

import functools

import torch

from nlora_kernels.backends.triton import device, tuning
from nlora_kernels.backends.triton.tuning import measure, tables

# M, K, N, R and the orientation: that of y, or of dx.
SHAPES = [
    *((M, 4096, 4096, r, t) for M in (2048, 8192) for r in (16, 64) for t in (True, False)),
    (8192, 4096, 11008, 64, True),
    (8192, 11008, 4096, 64, True),
    (4096, 768, 768, 64, True),
    (16, 4096, 4096, 64, True),
]
KEYS = ("dtype", "tf32", "shape", "tile", "single", "us", "rule_us")


def cells(machine) -> dict:
    entries = []

    def cell(M, K, N, R, transposed):
        if machine.rehearsal:
            # What a rule of thumb would take: there is nothing to measure.
            on = device.Device("rehearsal", 90, 132, device.SHARED[90])
            tile = tuning.wide_tile(M, N, K, R, torch.bfloat16, False, True, on)
            entry = {"dtype": "bfloat16", "tf32": False, "shape": [M, N, K, R], "tile": list(tile), "single": False}
            entry |= {"us": 1.0, "rule_us": 1.0}
        else:
            entry = measure.measure(M, K, N, R, torch.bfloat16, transposed)
        entries.append({key: entry[key] for key in KEYS})
        return {key: entry[key] for key in KEYS[3:]}

    def table():
        on = device.Device("rehearsal", 90, 132, 0) if machine.rehearsal else device.of(0)
        assert entries, "nothing was measured"
        file = tables.save(entries, machine.out / "tuned", on)
        return {"entries": len(entries), "file": file.name}

    found = {}
    for M, K, N, R, transposed in SHAPES:
        name = f"{M}x{K}x{N} r{R} {'y' if transposed else 'dx'}"
        found[name] = functools.partial(cell, M, K, N, R, transposed)
    return found | {"table": table}
