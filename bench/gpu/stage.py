"""One stage of the proof: its cells one after the other, each a line when it begins and a line when it ends.

    python -m bench.gpu.stage MODULE:FUNCTION --name STAGE --out DIR [--rehearse]      as proof.py starts it

It imports what it needs and waits for a line that says for how many seconds it may go on; then it runs the cells that
cells.jsonl does not hold yet. A cell returns its figures or raises. Exit status 1 after a failed cell, 3 where time ran
out; a device that no longer answers after a failure ends the process by SIGABRT, as does a crash of its own.
"""

import argparse
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path

# Exit status where time ran out before some cells.
LEFT = 3


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("cells", help="module:function, or alive")
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bounded", action="store_true", help="with the extension in which every wait ends")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    if options.bounded and not options.rehearse:
        load_bounded()
    import torch

    from bench.gpu import device
    from nlora_kernels import process

    # What crashes with the context of a GPU would write files of many GiB.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # What started it may be a sanitizer.
    process.end_with_parent()
    module, _, function = options.cells.partition(":")
    cells = alive if module == "alive" else getattr(importlib.import_module(f"bench.gpu.{module}"), function)
    words = sys.stdin.readline()
    if not words:
        # Whoever started this is gone, or needs it no more.
        return 0
    end = time.monotonic() + float(words)
    if cells is alive:
        return alive(torch.device("cpu" if options.rehearse else "cuda"))
    machine = (device.Rehearsal if options.rehearse else device.Gpu)(options.out)
    return run(options.name, cells(machine), options.out / "cells.jsonl", machine, end)


def alive(device) -> int:
    import torch

    a = torch.ones(64, 64, device=device)
    return 0 if (a @ a).sum().item() == 64**3 else 1


def run(stage: str, cells: dict, file: Path, machine, end: float) -> int:
    known = {line["cell"] for line in lines_of(file) if line["stage"] == stage}
    failed = left = 0
    with open(file, "a") as lines:

        def write(cell, **values):
            lines.write(json.dumps({"stage": stage, "cell": cell, **values}) + "\n")
            lines.flush()

        for name, cell in cells.items():
            if name in known:
                continue
            if time.monotonic() > end:
                left += 1
                continue
            write(name)
            begun = time.monotonic()
            try:
                result = {"status": "ok", **(cell() or {})}
            except Exception as error:
                traceback.print_exc()
                said = f"{type(error).__name__}: {error}"[:2000]
                # What was measured in spite of it.
                result, failed = {"status": "failed", **getattr(error, "figures", {}), "error": said}, failed + 1
            lost = result["status"] != "ok" and not machine.answers()
            if lost:
                result["status"] = "crashed"
            write(name, seconds=round(time.monotonic() - begun, 2), **result)
            print(name, json.dumps(result), flush=True)
            if lost:
                print("the device does not answer this process any more", flush=True)
                os.abort()
            machine.forget()
    if left:
        print(f"time ran out before {left} of {len(cells)} cells", flush=True)
    return LEFT if left else 1 if failed else 0


def load_bounded() -> None:
    """Takes the extension that build.py built with --bound-spins for that of the package."""
    import importlib.util

    from bench.gpu import build

    spec = importlib.util.spec_from_file_location("nlora_kernels._C", build.bounded_extension())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["nlora_kernels._C"] = module


def lines_of(file: Path) -> list[dict]:
    """The lines of a file of JSON; one that was cut short is none."""
    found = []
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
