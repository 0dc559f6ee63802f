"""What the charts of a run show: lines, bars and points made of its rows."""

from pathlib import Path
from typing import Any

from bench import charts, runs
from bench.runs import LABELS, METHODS, OPS, OURS, Results


def pictures(results: Results) -> dict[str, tuple]:
    """{name: (title, where, axis, heading of the column, reference, lines)} of those that results have rows for."""
    where = f"{results.where()}, {results.provenance.get('threads')} threads"
    spread = "median; thin lines: 20th to 80th percentile"
    possible = {
        "layers": (
            "One layer, forward and backward: NLoRA against PEFT's LoRA",
            where,
            f"time / time of the frozen layer alone ({spread})",
            "speed-up",
            "the frozen layer alone",
            layer_lines(results),
        ),
        "steps": (
            "A whole training step against PEFT's LoRA",
            where,
            f"time / forward and backward of the frozen model ({spread})",
            "speed-up",
            "the frozen model",
            step_lines(results),
        ),
        "memory": (
            "What autograd keeps for backward of a training step, against PEFT's LoRA",
            where,
            "bytes / bytes kept of the frozen model",
            "kept",
            "the frozen model",
            memory_lines(results),
        ),
    }
    return {name: picture for name, picture in possible.items() if picture[-1]}


def layer_lines(results: Results) -> list[charts.Line]:
    """NLoRA, forward and backward: a line for each layer that PEFT and ours were timed on, under its model's name."""
    rows = [row for row in results.layers() if row["op"] == "both" and row["method"] == "nlora"]
    lines, model = [], None
    for cell in runs.cells([row for row in rows if "ratio_to_floor" in row]).values():
        ours = runs.chosen(cell)
        if not ours or "peft" not in cell:
            continue
        if ours["model"] != model:
            model = ours["model"]
            lines.append(charts.Line(model))
        dtype = "" if ours["dtype"] == "float32" else ", bf16"
        lines.append(_compared(f"{ours['layer']}, {ours['M']} tokens, r = {ours['r']}{dtype}", cell["peft"], ours))
    return lines


def step_lines(results: Results) -> list[charts.Line]:
    """Whole training steps: a line for each method, against PEFT's LoRA of the same rank."""
    lines = []
    for (shape, r), (floor, peft, ours) in _steps(results).items():
        if floor and peft:
            lines.append(charts.Line(f"{shape}, r = {r}"))
            lines += [_compared(runs.method(row), peft, row) for row in ours]
    return lines


def memory_lines(results: Results) -> list[charts.Line]:
    """What autograd keeps for backward of a whole step, over what it keeps of the frozen model."""
    lines = []
    for (shape, r), (floor, peft, ours) in _steps(results).items():
        if floor and peft and "saved_bytes" in floor:
            lines.append(charts.Line(f"{shape}, r = {r}"))
            for row in ours:
                kept = [charts.Spread(*[each["saved_bytes"] / floor["saved_bytes"]] * 3) for each in (peft, row)]
                values = dict(zip((charts.PEFT, charts.OURS), kept, strict=True))
                column = f"{row['saved_bytes'] / 2**20:.1f} MiB"
                lines.append(charts.Line(runs.method(row), values, column))
    return lines


def _steps(results: Results) -> dict[tuple, tuple]:
    """{(model, rank): (the frozen one, PEFT's LoRA, the methods by the backend that is chosen)}"""
    groups: dict[tuple, list] = {}
    for row in results.of("step"):
        groups.setdefault((row["shape"], row["r"]), []).append(row)
    found = {}
    for key, rows in groups.items():
        one = {name: next((row for row in rows if row["impl"] == name), None) for name in ("floor", "peft")}
        methods = dict.fromkeys(row["method"] for row in rows if row["impl"] in OURS)
        chosen = [runs.chosen({row["impl"]: row for row in rows if row["method"] == method}) for method in methods]
        found[key] = one["floor"], one["peft"], chosen
    return found


def _compared(label: str, peft: dict[str, Any], ours: dict[str, Any]) -> charts.Line:
    values = {charts.PEFT: charts.spread(peft), charts.OURS: charts.spread(ours)}
    gain = ours.get("speedup_vs_peft")
    return charts.Line(label, values, f"{gain:.2f} ×" if gain else "", gain is not None and gain < 1)


def draw_bars(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Horizontal bars of time over floor for every cell, with the 20th to 80th percentile and the FLOP bound."""
    cells = runs.cells(rows).values()
    impls = {name: LABELS[name] for name in LABELS if name != "floor" and any(name in cell for cell in cells)}
    names = [_cell_name(next(iter(cell.values()))) for cell in cells]
    title = f"{METHODS[rows[0]['method']]}, {OPS[rows[0]['op']]}"
    charts.bars(list(cells), names, impls, title).savefig(path)


def _cell_name(row: dict[str, Any]) -> str:
    model, _, layer = row["shape"].partition(" ")
    return f"{model}\n{layer} r={row['r']}{'' if row['dtype'] == 'float32' else ' bf16'}"


def draw_roofline(results: Results, path: str | Path) -> None:
    """GFLOP/s over FLOP per byte for every row of one layer, under the ceilings that the same run measured."""
    rows = [row for row in results.layers() if "flop_per_byte" in row]
    charts.roofline(rows, results.of("roof"), LABELS).savefig(path)


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (method, op), without those that have no floor."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "ratio_to_floor" in row and row["impl"] in LABELS:
            groups.setdefault((row["method"], row["op"]), []).append(row)
    return groups
