"""Measures the tiles of the Triton kernels: <out>/tune.json, and <out>/<device>.json for nlora_kernels/tuned/."""

import sys

import record
import torch

from nlora_kernels import tuning

# K, N of LLaMA-2-7B and BERT, both ways: the gradient of x swaps them.
LAYERS = [(4096, 4096), (4096, 11008), (11008, 4096), (768, 768), (768, 3072), (3072, 768)]


def table(out, record):
    entries = [cell for cell in record["cells"].values() if cell["passed"]]
    keys = ("dtype", "tf32", "shape", "tile", "single", "us", "rule_us")
    tuning.save([{key: entry[key] for key in keys} for entry in entries], out, record["environment"]["gpu"])


def cells():
    found = {}
    for K, N in LAYERS:
        for M in (16, 2048, 8192):
            for R in (16, 64, 128, 256):
                for transposed in (True, False):
                    key = f"bf16 {M}x{K}x{N} r{R} {'y' if transposed else 'dx'}"
                    shape = (M, K, N, R)
                    found[key] = lambda s=shape, t=transposed: tuning.measure(*s, torch.bfloat16, t)
    return found


if __name__ == "__main__":
    sys.exit(record.run("tune", cells, seconds_per_cell=20, finish=table))
