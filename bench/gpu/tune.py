"""Measures the tiles of the Triton kernels: <out>/tune.json, and <out>/<device>.json for nlora_kernels/tuned/."""

import sys

import record
import torch

from nlora_kernels import tuning


def table(out, record):
    entries = [cell for cell in record["cells"].values() if cell["passed"]]
    keys = ("dtype", "tf32", "shape", "tile", "single", "us", "rule_us")
    tuning.save([{key: entry[key] for key in keys} for entry in entries], out, tuning.device_of(0))


def cells():
    found = {}
    for shape in tuning.SHAPES:
        for transposed in (True, False):
            key = f"bf16 {'x'.join(map(str, shape[:3]))} r{shape[3]} {'y' if transposed else 'dx'}"
            found[key] = lambda s=shape, t=transposed: tuning.measure(*s, torch.bfloat16, t)
    return found


if __name__ == "__main__":
    sys.exit(record.run("tune", cells, seconds_per_cell=20, finish=table))
