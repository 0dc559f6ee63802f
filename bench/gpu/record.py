"""What the GPU scripts share: cells that are run once each, their results as JSON, and a limit on time.

A script stops before it exceeds its limit and exits with 3; run again, it goes on where it stopped.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

INCOMPLETE = 3


def run(
    name: str,
    cells: Callable[[], dict[str, Callable[[], dict]]],
    seconds_per_cell: float = 30,
    finish: Callable[[Path, dict], None] | None = None,
) -> int:
    """Runs the cells that <out>/<name>.json does not hold yet.

    A cell returns its figures, or raises; either is written down at once. A failed cell is run again next time.
    `finish` is called last with <out> and the whole record. Returns the exit status: 0, 1 after a failure, 3 for more.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--limit", type=float, default=480, help="seconds after which no further cell is begun")
    parser.add_argument("--only", default="", help="run only cells whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names of the cells")
    options = parser.parse_args()
    todo = {key: cell for key, cell in cells().items() if options.only in key}
    if options.list:
        print("\n".join(todo))
        return 0
    if not torch.cuda.is_available():
        print(f"{name} needs a GPU, and torch sees none")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{name}.json"
    record = json.loads(file.read_text()) if file.is_file() else {"cells": {}}
    record["environment"] = environment()
    begun, failed, left = time.monotonic(), 0, 0
    for key, cell in todo.items():
        if record["cells"].get(key, {}).get("passed"):
            continue
        if time.monotonic() - begun + seconds_per_cell > options.limit:
            left += 1
            continue
        started = time.monotonic()
        try:
            result = {"passed": True, **cell()}
        except Exception as error:
            traceback.print_exc()
            result, failed = {"passed": False, "error": f"{type(error).__name__}: {error}"}, failed + 1
        result["seconds"] = round(time.monotonic() - started, 2)
        record["cells"][key] = result
        write(file, record)
        print(key, json.dumps(result), flush=True)
        torch.cuda.empty_cache()
    if finish:
        finish(options.out, record)
    print(f"{name}: {len(todo)} cells, {failed} failed, {left} left to run")
    return 1 if failed else INCOMPLETE if left else 0


def write(file: Path, record: dict) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(file)


def environment() -> dict:
    from nlora_kernels.doctor import report

    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.max.sm", "--format=csv,noheader", "-i", "0"]
    return {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,
        "driver, clock, greatest clock": output(query),
        "torch": torch.__version__,
        "triton": report()["versions"]["triton"],
        "commit": output(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]),
    }


def output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
