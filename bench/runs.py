"""The results of a run: read, kept in bench/results, and found again by what was measured."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Everything that is compared, in the order of the tables.
LABELS = {
    "floor": "frozen layer alone",
    "peft": "PEFT",
    "peft_base_dtype": "PEFT, adapter in base dtype",
    "peft_compiled": "PEFT, compiled",
    "eager3": "three matrices, eager",
    "lean": "lean",
    "cpu": "cpu",
    "triton": "triton",
    "cuda": "cuda",
}
OURS = ("cuda", "triton", "cpu", "lean")
METHODS = {"nlora": "NLoRA", "inttune": "IntTune", "lora2": "LoRA²", "lora": "LoRA"}
PASSES = ("forward", "backward", "both")
OPS = {"forward": "forward", "backward": "backward", "both": "forward and backward", "step": "training step"}


@dataclass
class Results:
    """Rows of one run on one device, each a dict of what was measured, and where they come from."""

    provenance: dict[str, Any]
    rows: list[dict[str, Any]]

    def of(self, *ops: str) -> list[dict[str, Any]]:
        """The rows of these ops; what follows a comma in a row's op says more of it."""
        return [row for row in self.rows if row["op"].partition(",")[0] in ops]

    def layers(self) -> list[dict[str, Any]]:
        """Those of single layers with dense weights, which have a bound."""
        return [row for row in self.of(*PASSES) if "flop_bound" in row]

    def other_layers(self) -> list[dict[str, Any]]:
        """Those of other layers, named by all that tells them apart."""
        rows = [row for row in self.of(*PASSES) if "flop_bound" not in row]
        return [row | {"op": ", ".join(row[n] for n in ("method", "base", "dtype", "op") if n in row)} for row in rows]

    def source(self, row: dict[str, Any]) -> dict[str, Any]:
        """Of what commit and day a row is: its own, where it was kept from an earlier run, else those of the file."""
        return {name: row.get(name, self.provenance.get(name)) for name in ("commit", "date")}

    def where(self) -> str:
        """The device, and which kernels it takes."""
        return f"{self.provenance.get('device')}, kernels for {self.provenance.get('kernels_use')}"


def load(path: str | Path) -> Results:
    """The rows of a file of either kind. Raises ValueError if it is no such file or holds no row."""
    try:
        content = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be a JSON file of pytest-benchmark, got {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object, got {type(content).__name__}")
    if "benchmarks" in content:
        machine, commit = content.get("machine_info", {}), content.get("commit_info", {})
        cpu, versions = machine.get("cpu", {}), machine.get("versions", {})
        gpus = [gpu["name"] for gpu in machine.get("gpus", [])]
        provenance = {
            "device": gpus[0] if gpus else cpu.get("name", "unknown"),
            "instructions": cpu.get("instructions", []),
            "kernels_use": cpu.get("kernels_use"),
            "threads": machine.get("threads"),
            "versions": {name: versions.get(name) for name in ("nlora_kernels", "python", "torch", "peft")},
            "date": content.get("datetime", "")[:10],
            "commit": str(commit.get("id", "unknown"))[:12] + (" (with changes)" if commit.get("dirty") else ""),
        }
        rows = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    else:
        provenance, rows = content.get("provenance", {}), content.get("rows", [])
    rows = [row for row in rows if {"impl", "op", "shape"} <= row.keys()]
    if not rows:
        raise ValueError(f"{path} must hold rows of bench/, got none")
    return Results(provenance, rows)


def save(results: Results, folder: str | Path) -> Path:
    """Writes <folder>/<device>.json, taking rows that this run has not measured from the file that is there.

    Where those are of another commit or day, they say so themselves.
    """
    name = re.sub(r"[^a-z0-9]+", "-", results.provenance["device"].lower()).strip("-")
    path = Path(folder, f"{name}-{results.provenance.get('kernels_use') or 'library'}.json")
    rows = {}
    if path.is_file():
        kept = load(path)
        for row in kept.rows:
            own = kept.source(row)
            rows[identity(row)] = row if own == results.source({}) else row | own
    rows |= {identity(row): _rounded(row) for row in results.rows}
    content = {"provenance": results.provenance, "rows": list(rows.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def cells(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """{what was measured: {implementation: row}}, in the order of the rows."""
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(identity(row)[:-1], {})[row["impl"]] = row
    return cells


def identity(row: dict[str, Any]) -> tuple:
    return (
        *(row.get(name) for name in ("shape", "r", "dtype", "method" if row["op"] != "init" else "op", "op")),
        row["impl"],
    )


def chosen(cell: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the backend that is chosen by itself."""
    return next((cell[name] for name in OURS if name in cell), None)


def method(row: dict[str, Any]) -> str:
    """The method's name; behind a comma, whether layers that share x are one operation."""
    name, comma, way = row["method"].partition(",")
    return METHODS.get(name, "none") + comma + way
