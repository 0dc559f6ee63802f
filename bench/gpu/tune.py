"""Tiles of the Triton kernels for the shapes that matter: <out>/tuned/<device>.json for the package's tuned/."""

import functools

import torch

from bench.gpu.stage import lines_of
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


def cells(machine) -> dict:
    # Of a process before this one: what it measured stays in the table.
    entries = [line for line in lines_of(machine.out / "cells.jsonl") if line["stage"] == "tune" and "tile" in line]

    def cell(M, K, N, R, transposed):
        if machine.rehearsal:
            # What a rule of thumb would take: there is nothing to measure.
            on = device.Device("rehearsal", 90, 132, device.SHARED[90])
            tile = tuning.wide_tile(M, N, K, R, torch.bfloat16, False, True, on, transposed)
            entry = {"dtype": "bfloat16", "tf32": False, "shape": [M, N, K, R], "transposed": transposed}
            entry |= {"tile": list(tile), "single": False, "us": 1.0, "rule_us": 1.0}
        else:
            on, entry = device.of(0), measure.measure(M, K, N, R, torch.bfloat16, transposed)
        entries.append(entry)
        tables.save(entries, machine.out / "tuned", on)
        return entry

    found = {}
    for M, K, N, R, transposed in SHAPES:
        name = f"{M}x{K}x{N} r{R} {'y' if transposed else 'dx'}"
        found[name] = functools.partial(cell, M, K, N, R, transposed)
    return found
