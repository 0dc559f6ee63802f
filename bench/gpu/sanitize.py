"""The CUDA kernels under compute-sanitizer, on small layers: <out>/sanitize.json."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import record

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# Cells of correctness.py. A layer runs three times in one, which the sanitizer slows down a hundredfold.
CELLS = ("cuda bf16 100x768x768x104 fp32 adapter", "cuda fp16 1x4096x4096x16 noN", "cuda bf16 nystrom 1000x776 r13")
EXIT = 9


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def check(tool, cell) -> dict:
    program = sanitizer()
    if program is None:
        return {"skipped": "compute-sanitizer not found"}
    script = Path(__file__).with_name("correctness.py")
    with tempfile.TemporaryDirectory() as out:
        command = [program, "--tool", tool, "--kernel-name", "regex:hopper", "--error-exitcode", str(EXIT)]
        command += [sys.executable, str(script), "--out", out, "--only", cell]
        ran = subprocess.run(command, capture_output=True, text=True)
    said = (ran.stdout + ran.stderr)[-4000:]
    if "not supported" in said and ran.returncode != EXIT:
        return {"skipped": said.splitlines()[-1]}
    assert ran.returncode == 0, said
    return {}


def cells():
    return {f"{tool}: {cell}": lambda t=tool, c=cell: check(t, c) for tool in TOOLS for cell in CELLS}


if __name__ == "__main__":
    sys.exit(record.run("sanitize", cells, seconds_per_cell=60))
