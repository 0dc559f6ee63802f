"""Markdown tables of a run."""

from collections import Counter
from typing import Any

from bench import runs
from bench.runs import LABELS, METHODS, OPS, Results

# What gains are against, for a heading.
AGAINST = {
    "floor": "the frozen layer",
    "peft": "PEFT",
    "apart": "layer by layer",
    "dense_fused": "ours on a dense weight",
    "self_again": "itself again (noise)",
}


def markdown(results: Results) -> str:
    """Every row in tables: time as a ratio to the frozen layer alone, initialisation, training steps."""
    about = results.provenance
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items() if version)
    device = f"{about.get('device')}, {about.get('threads')} threads, kernels for {about.get('kernels_use')}"
    earlier = Counter("{commit}, {date}".format(**results.source(row)) for row in results.rows if "commit" in row)
    kept = "".join(f"; {count} of {len(results.rows)} rows of commit {source}" for source, count in earlier.items())
    parts = [f"{device}; {versions}; {about.get('date')}, commit {about.get('commit')}{kept}."]
    if layers := results.layers():
        parts += [
            "Time of one layer as a ratio to the frozen layer alone, median of interleaved rounds (20th to 80th "
            "percentile). The bound counts multiplications. The last column is the speed of the backend that is chosen "
            "by itself against PEFT as its users have it, LoRA of the same rank: below 1 it is slower.",
            _layer_table(layers),
        ]
    if steps := results.of("step"):
        parts += [
            "A whole training step, forward, backward and optimizer, as a ratio to forward and backward of the frozen "
            "model; peak is what tensors hold above model and optimizer, saved is what autograd keeps for backward. "
            "Each row was timed in rounds of its own: compare ratios, not ms; rows of NF4 are against PEFT on the same "
            "base.",
            _step_table(steps),
        ]
    others = {
        "Experts, weights in few bits, layers that share x, and the smallest layer.": results.other_layers(),
        "Initialisation.": results.of("init"),
        "LoRA² training.": results.of("allocator", "penalty"),
    }
    for title, rows in others.items():
        if rows:
            parts += [title, _gain_table(rows)]
    if papers := results.of("paper"):
        parts += [
            "The papers' own timings: the ratio of two methods' times here, beside what the paper measured for the "
            "two on a GPU and a larger model. Held is what model, optimizer and one step hold.",
            _papers_table(papers),
        ]
    return "\n\n".join(parts) + "\n"


def _layer_table(rows: list[dict[str, Any]]) -> str:
    cells = runs.cells([row for row in rows if "ratio_to_floor" in row])
    impls = [name for name in LABELS if name != "floor" and any(name in cell for cell in cells.values())]
    lines = []
    for cell in cells.values():
        row = next(iter(cell.values()))
        what = [row["shape"], str(row["r"]), row["dtype"], METHODS[row["method"]], OPS[row["op"]]]
        floor = f"{cell['floor']['ms']:.3g}" if "floor" in cell else ""
        ratios = [_ratio(cell[name]) if name in cell else "" for name in impls]
        chosen = runs.chosen(cell) or {}
        gain = chosen.get("speedup_vs_peft")
        lines.append([*what, floor, f"{row['flop_bound']:.2f}", *ratios, f"{gain:.2f}" if gain else ""])
    header = ["layer", "r", "dtype", "method", "pass", "frozen, ms", "bound", *(LABELS[n] for n in impls), "vs PEFT"]
    return _table(header, lines)


def _step_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        ratio, gain = _ratio(row) if "ratio_to_floor" in row else "", row.get("speedup_vs_peft")
        figures = [f"{row['ms']:.0f}", ratio, f"{gain:.2f}" if gain else ""]
        memory = [f"{row[name] / 2**20:.1f}" if name in row else "" for name in ("peak_bytes", "saved_bytes")]
        label = "frozen model alone" if row["impl"] == "floor" else LABELS.get(row["impl"], row["impl"])
        lines.append([row["shape"], str(row["r"]), runs.method(row), label, *figures, *memory])
    header = ["model", "r", "method", "implementation", "ms", "to frozen", "vs PEFT", "peak, MiB", "saved, MiB"]
    return _table(header, lines)


def _gain_table(rows: list[dict[str, Any]]) -> str:
    """How many times as fast each row is as what it was timed in turn with."""
    against = sorted({name for row in rows for name in _against(row)})
    lines = []
    for row in rows:
        gains = [f"{1 / row[f'ratio_to_{name}']:.3g}" if f"ratio_to_{name}" in row else "" for name in against]
        what = [row["op"], row["shape"], str(row["r"]), row["impl"].replace("_", " ")]
        lines.append([*what, f"{row['ms']:.4g}", *gains])
    names = [f"times as fast as {AGAINST.get(name, name.replace('_', ' '))}" for name in against]
    return _table(["what", "where", "r", "implementation", "ms", *names], lines)


def _papers_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        what = [row["table"], row["op"].partition(", ")[2], row["shape"], str(row["r"]), row["impl"].replace("_", " ")]
        for name in _against(row):
            paper = f"{row['paper_ratio']:.4g}" if name == row.get("paper_against") else ""
            lines.append([*what, f"{row['ms']:.4g} ms", name, _ratio(row, name, ".3g"), paper])
        if "held_bytes" in row:
            what[1], held, paper = "held", f"{row['held_bytes'] / 2**20:.0f} MiB", row.get("paper_held_ratio")
            ratios = [f"{row['held_ratio_to_peft']:.2f}", f"{paper:.2f}" if paper else ""]
            lines.append([*what, held, "peft", *ratios])
    return _table(["of", "what", "where", "r", "method", "here", "against", "ratio here", "ratio there"], lines)


def _against(row: dict[str, Any]) -> list[str]:
    """What a row was timed in turn with."""
    return [name.removeprefix("ratio_to_") for name in row if name.startswith("ratio_to_") and "p20" not in name]


def _ratio(row: dict[str, Any], to: str = "floor", form: str = ".2f") -> str:
    middle, low, high = (format(value, form) for value in (row[f"ratio_to_{to}"], *row[f"ratio_to_{to}_p20_p80"]))
    return f"{middle} ({low}–{high})"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
