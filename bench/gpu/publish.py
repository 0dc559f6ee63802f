"""python -m bench.gpu.publish FOLDER: times of a proof into bench/results, its tiles into tuned/ of the Triton backend.

Of layers, of layers that share x, and of training; what failed its check is not shown.
"""

import json
import re
import shutil
import sys
from pathlib import Path

from bench import runs
from bench.cells import Cell
from bench.gpu import train
from bench.implementations import PEFT, flops
from nlora_kernels.backends.triton.tuning import tables

NAME = re.compile(r"(group )?([^.]+)\.(.+)-M(\d+)-r(\d+)-(?:(b?float\d+)-)?(\w+)-(\w+)")


def results(record: dict) -> runs.Results:
    """The rows that a proof.json holds."""
    stages = {name: stage.get("cells", {}) for name, stage in record["stages"].items()}
    machine, rows = stages.get("facts", {}).get("machine", {}), []
    # "threads": that launch.
    provenance = {"device": machine.get("gpu", "unknown"), "threads": 1, "kernels_use": "sm_90"}
    provenance["versions"] = {name: machine.get(name) for name in ("python", "torch", "triton", "peft")}
    for stage, cells in stages.items():
        for name, figures in cells.items():
            if stage.startswith("train") and figures["status"] == "ok":
                rows.append(step(name, figures, stages["train"].get("peft", {}).get("ms")))
            elif match := NAME.match(name):
                rows += layers(*match.groups(), figures)
    rows = [{"device": "cuda", "threads": 1, **row} for row in rows]
    return runs.Results(provenance | {"date": record["date"][:10], "commit": record["commit"]}, rows)


def layers(group, model, layer, M, r, dtype, method, op, figures) -> list[dict]:
    found, peft = [], figures.get("peft", {}).get("ratio")
    cell = Cell(model, layer, int(M), int(r), method, op, dtype or "bfloat16")
    about = {"model": model, "layer": layer, "M": cell.M, "shape": f"{model} {layer} M={M}", "r": cell.r}
    about |= {"dtype": cell.dtype, "method": method, "op": op}
    about |= {} if group else {"K": cell.size[1], "N": cell.size[2], "flop_bound": figures.get("flop_bound")}
    floor = {"us": figures.get("base_us"), "ratio": 1.0, "p20_p80": [1.0, 1.0], "error": 0.0}
    for impl, of in {"floor": floor, **figures}.items():
        if not isinstance(of, dict) or of["error"] is None or of["us"] is None:
            continue
        row = about | {"impl": impl, "ms": of["us"] / 1000, "error": of["error"]}
        row |= {"ratio_to_floor": of["ratio"], "ratio_to_floor_p20_p80": of["p20_p80"]}
        row |= {"peak_bytes": int(of["peak_mib"] * 2**20)} if "peak_mib" in of else {}
        row |= {"speedup_vs_peft": peft / of["ratio"]} if peft else {}
        found.append(row | ({} if group else {"gflops": flops(cell, adapter=impl != "floor") / of["us"] / 1000}))
    return found


def step(impl: str, figures: dict, peft: float | None) -> dict:
    batch, length, r = train.BATCH
    about = {"impl": impl, "op": "step", "method": "lora" if impl in PEFT else "nlora", "r": r, "dtype": "bfloat16"}
    about |= {"shape": f"{train.MODEL}, {batch * length} tokens", "model": train.MODEL, "M": batch * length}
    gain = {"speedup_vs_peft": peft / figures["ms"]} if peft else {}
    return about | {"ms": figures["ms"], "peak_bytes": int(figures["peak_gib"] * 2**30)} | gain


def main(folder: str) -> None:
    record = json.loads(Path(folder, "proof.json").read_text())
    if record["rehearsal"]:
        sys.exit(f"{folder} is of a rehearsal, whose times mean nothing")
    print(runs.save(results(record), Path(runs.__file__).with_name("results")))
    tables.TUNED.mkdir(exist_ok=True)
    for file in Path(folder, "tuned").glob("*.json"):
        print(shutil.copy(file, tables.TUNED))


if __name__ == "__main__":
    main(*sys.argv[1:])
