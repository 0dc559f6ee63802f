"""Reports on benchmark results: Markdown tables, and PNG charts where matplotlib is installed.

    python -m nlora_kernels plot bench run.json                      tables and charts of a run
    python -m bench.report save run.json ...                         into bench/results/<device>.json; rows not measured
                                                                     again stay
    python -m bench.report readme README.md bench/results/NAME.json  between <!-- bench:cpu --> and <!-- /bench -->

Reads what `pytest bench --benchmark-json=FILE` writes, and the shorter files that `save` makes of it.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nlora_kernels.plotting import made_folder, new_figure, text_without_matplotlib

# Everything that is compared, in the order of the tables, with its label and colour: ours in blue and green.
LABELS = {
    "floor": ("frozen layer alone", "black"),
    "peft": ("PEFT", "#d62728"),
    "peft_base_dtype": ("PEFT, adapter in base dtype", "#ff9896"),
    "peft_compiled": ("PEFT, compiled", "#ffbb78"),
    "eager3": ("three matrices, eager", "#c7c7c7"),
    "lean": ("lean", "#9ecae1"),
    "cpu": ("cpu", "#1f77b4"),
    "triton": ("triton", "#2ca02c"),
    "cuda": ("cuda", "#17becf"),
}
OURS = ("cuda", "triton", "cpu", "lean")
BOUND = {"color": "black", "linewidth": 1.6, "linestyle": (0, (2, 1))}
METHODS = {"nlora": "NLoRA", "inttune": "IntTune", "lora2": "LoRA²", "lora": "LoRA"}
OPS = {"forward": "forward", "backward": "backward", "both": "forward and backward", "step": "training step"}


@dataclass
class Results:
    """Rows of one run on one device, each a dict of what was measured, and where they come from."""

    provenance: dict[str, Any]
    rows: list[dict[str, Any]]

    def of(self, *ops: str) -> list[dict[str, Any]]:
        """The rows of these ops; what follows a comma in a row's op says more of it."""
        return [row for row in self.rows if row["op"].partition(",")[0] in ops]


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
    """Writes <folder>/<device>.json, taking rows that this run has not measured from the file that is there."""
    name = re.sub(r"[^a-z0-9]+", "-", results.provenance["device"].lower()).strip("-")
    path = Path(folder, f"{name}-{results.provenance.get('kernels_use') or 'library'}.json")
    rows = {_identity(row): row for row in load(path).rows} if path.is_file() else {}
    rows |= {_identity(row): _rounded(row) for row in results.rows}
    content = {"provenance": results.provenance, "rows": list(rows.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return path


def markdown(results: Results) -> str:
    """Every row in tables: time as a ratio to the frozen layer alone, initialisation, training steps."""
    about = results.provenance
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items() if version)
    device = f"{about.get('device')}, {about.get('threads')} threads, kernels for {about.get('kernels_use')}"
    parts = [f"{device}; {versions}; {about.get('date')}, commit {about.get('commit')}."]
    if layers := results.of("forward", "backward", "both"):
        parts += [
            "Time of one layer as a ratio to the frozen layer alone, median of interleaved rounds (20th to 80th "
            "percentile). The bound counts multiplications. The last column is the speed of the backend that is chosen "
            "by itself against PEFT as its users have it, LoRA of the same rank: below 1 it is slower.",
            _layer_table(layers),
        ]
    if steps := results.of("step"):
        parts += [
            "A whole training step, forward, backward and optimizer, as a ratio to forward and backward of the frozen "
            "model; peak is what tensors hold above model and optimizer, saved is what autograd keeps for backward.",
            _step_table(steps),
        ]
    for title, ops in {"Initialisation.": ("init",), "LoRA² training.": ("allocator", "penalty")}.items():
        if rows := results.of(*ops):
            parts += [title, _gain_table(rows)]
    if papers := results.of("paper"):
        parts += [
            "The papers' own timings: the ratio of two methods' times here, beside what the paper measured for the "
            "two on a GPU and a larger model. Held is what model, optimizer and one step hold.",
            _papers_table(papers),
        ]
    return "\n\n".join(parts) + "\n"


def insert(text: str, table: str, marker: str = "bench:cpu") -> str:
    """`text` with `table` between <!-- marker --> and <!-- /bench -->; ValueError unless both are there once."""
    begin, end = f"<!-- {marker} -->", "<!-- /bench -->"
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise ValueError(f"the text must hold {begin} once and {end} after it, got {text.count(begin)} of the first")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{table}\n{end}{rest.partition(end)[2]}"


def plot(path: str | Path, out: str | Path | None = None) -> None:
    """Prints the tables of a file and writes them, the bar charts and the roofline beside it or into the folder `out`.

    `out` is made if it is not there. Without matplotlib there is text alone, and a word of it on stderr. Raises
    ValueError as `load` does and for an `out` that is a file, OSError for a file that is not there.
    """
    results = load(path)
    stem = made_folder(out) / Path(path).stem if out else Path(path).with_suffix("")
    report = markdown(results)
    print(report)
    written = [stem.with_suffix(".md")]
    written[0].write_text(report)
    with text_without_matplotlib():
        for (method, op), rows in _groups(results.of("forward", "backward", "both")).items():
            file = stem.with_name(f"{stem.name}-{method}-{op}.png")
            draw_bars(rows, file)
            written.append(file)
        if results.of("roof"):
            file = stem.with_name(f"{stem.name}-roofline.png")
            draw_roofline(results, file)
            written.append(file)
    print("wrote " + ", ".join(map(str, written)))


def draw_bars(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Horizontal bars of time over floor for every cell, with the 20th to 80th percentile and the FLOP bound."""
    cells = _cells(rows)
    impls = [name for name in LABELS if name != "floor" and any(name in cell for cell in cells.values())]
    limit = max(1.5, min(4.0, 1.1 * max(row["ratio_to_floor"] for row in rows)))
    figure = new_figure(9, 1.5 + 0.17 * sum(len(cell) + 0.4 for cell in cells.values()))
    axes = figure.subplots()
    middles, top = [], 0.0
    for cell in cells.values():
        shown = [name for name in impls if name in cell]
        middles.append(top + (len(shown) - 1) / 2)
        for place, name in enumerate(shown):
            row = cell[name]
            ratio, (low, high) = row["ratio_to_floor"], row["ratio_to_floor_p20_p80"]
            end = min(ratio, limit)
            axes.barh(top + place, end, 0.92, color=LABELS[name][1])
            if high < limit:
                axes.plot([low, high], [top + place] * 2, color="black", linewidth=0.8)
                end = max(end, high)
            slower = name in OURS and row.get("speedup_vs_peft", 1) < 1
            said = f" {ratio:.2f}" + (" slower than PEFT" if slower else "")
            axes.text(end, top + place, said, va="center", fontsize=7, color="#b00000" if slower else "black")
        # A whole model's step has no bound.
        if bound := next(iter(cell.values())).get("flop_bound"):
            axes.plot([bound] * 2, [top - 0.6, top + len(shown) - 0.4], **BOUND)
        top += len(shown) + 1.2
    axes.axvline(1, color="0.4", linewidth=0.8)
    for name in impls:
        axes.barh(0, 0, color=LABELS[name][1], label=LABELS[name][0])
    axes.plot([], [], **BOUND, label="bound by multiplications")
    axes.set_yticks(middles, [_cell_name(next(iter(cell.values()))) for cell in cells.values()], fontsize=8)
    axes.set(xlim=(0, limit * 1.13), ylim=(top - 1.5, -1.1), xlabel="time / time of the frozen layer")
    axes.set_title(f"{METHODS[rows[0]['method']]}, {OPS[rows[0]['op']]}", loc="left")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_roofline(results: Results, path: str | Path) -> None:
    """GFLOP/s over FLOP per byte for every row of one layer, under the ceilings that the same run measured."""
    roofs = {(row["impl"], row["dtype"]): row for row in results.of("roof")}
    bandwidth = roofs["copy", "float32"]["gbytes_per_second"]
    rows = [row for row in results.of("forward", "backward", "both") if "flop_per_byte" in row]
    figure = new_figure(8, 5)
    axes = figure.subplots()
    lowest = min(1.0, *(row["flop_per_byte"] / 2 for row in rows))
    highest = max(row["flop_per_byte"] * 2 for row in rows)
    for (impl, dtype), row in roofs.items():
        if impl == "copy":
            continue
        peak = row["gflops"]
        line = [(lowest, lowest * bandwidth), (peak / bandwidth, peak), (max(highest, 2 * peak / bandwidth), peak)]
        style = {"float32": "-", "bfloat16": "--"}.get(dtype, ":")
        axes.plot(*zip(*line, strict=True), color="black", linewidth=1, linestyle=style)
        axes.annotate(f"{dtype} product, {peak:.0f} GFLOP/s", line[-1], ha="right", va="bottom", fontsize=8)
    markers = {"float32": "o", "bfloat16": "s"}
    for name, (label, colour) in LABELS.items():
        for dtype, marker in markers.items():
            points = [(r["flop_per_byte"], r["gflops"]) for r in rows if (r["impl"], r["dtype"]) == (name, dtype)]
            if points:
                said = label if dtype == "float32" else None
                options = {"s": 22, "marker": marker, "color": colour, "edgecolors": "black", "linewidths": 0.3}
                axes.scatter(*zip(*points, strict=True), **options, label=said, zorder=3)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    axes.set_title(f"one layer under its roof ({bandwidth:.0f} GB/s copied; circles fp32, squares bf16)", loc="left")
    axes.grid(True, which="both", linewidth=0.2)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (method, op), without those that have no floor."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if "ratio_to_floor" in row and row["impl"] in LABELS:
            groups.setdefault((row["method"], row["op"]), []).append(row)
    return groups


def _cells(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, dict[str, Any]]]:
    """{what was measured: {implementation: row}}, in the order of the rows."""
    cells: dict[tuple, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault(_identity(row)[:-1], {})[row["impl"]] = row
    return cells


def _identity(row: dict[str, Any]) -> tuple:
    return (
        *(row.get(name) for name in ("shape", "r", "dtype", "method" if row["op"] != "init" else "op", "op")),
        row["impl"],
    )


def _cell_name(row: dict[str, Any]) -> str:
    model, _, layer = row["shape"].partition(" ")
    return f"{model}\n{layer} r={row['r']}{'' if row['dtype'] == 'float32' else ' bf16'}"


def _layer_table(rows: list[dict[str, Any]]) -> str:
    cells = _cells([row for row in rows if "ratio_to_floor" in row])
    impls = [name for name in LABELS if name != "floor" and any(name in cell for cell in cells.values())]
    lines = []
    for cell in cells.values():
        row = next(iter(cell.values()))
        what = [row["shape"], str(row["r"]), row["dtype"], METHODS[row["method"]], OPS[row["op"]]]
        floor = f"{cell['floor']['ms']:.3g}" if "floor" in cell else ""
        ratios = [_ratio(cell[name]) if name in cell else "" for name in impls]
        chosen = next((cell[name] for name in OURS if name in cell), {})
        gain = chosen.get("speedup_vs_peft")
        lines.append([*what, floor, f"{row['flop_bound']:.2f}", *ratios, f"{gain:.2f}" if gain else ""])
    header = ["layer", "r", "dtype", "method", "pass", "floor, ms", "bound", *(LABELS[n][0] for n in impls), "vs PEFT"]
    return _table(header, lines)


def _step_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        ratio, gain = _ratio(row) if "ratio_to_floor" in row else "", row.get("speedup_vs_peft")
        figures = [f"{row['ms']:.0f}", ratio, f"{gain:.2f}" if gain else ""]
        memory = [f"{row[name] / 2**20:.1f}" if name in row else "" for name in ("peak_bytes", "saved_bytes")]
        label = LABELS.get(row["impl"], (row["impl"],))[0]
        lines.append([row["shape"], str(row["r"]), METHODS.get(row["method"], "none"), label, *figures, *memory])
    header = ["model", "r", "method", "implementation", "ms", "to frozen", "vs PEFT", "peak, MiB", "saved, MiB"]
    return _table(header, lines)


def _gain_table(rows: list[dict[str, Any]]) -> str:
    """How many times as fast each row is as what it was timed in turn with."""
    against = sorted({name for row in rows for name in _against(row)})
    lines = []
    for row in rows:
        gains = [f"{1 / row[f'ratio_to_{name}']:.3g}" if f"ratio_to_{name}" in row else "" for name in against]
        what = [row["op"], row["shape"], str(row["r"]), row["impl"].replace("_", " ")]
        lines.append([*what, f"{row['ms']:.3g}", *gains])
    names = [f"times as fast as {name.replace('_', ' ')}" for name in against]
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


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    saving = commands.add_parser("save")
    saving.add_argument("runs", nargs="+", type=Path)
    saving.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    readme = commands.add_parser("readme")
    readme.add_argument("text", type=Path)
    readme.add_argument("results", nargs="+", type=Path)
    readme.add_argument("--marker", default="bench:cpu")
    args = parser.parse_args()
    if args.command == "save":
        for run in args.runs:
            print(save(load(run), args.out))
        return
    table = "\n".join(markdown(load(path)) for path in args.results)
    args.text.write_text(insert(args.text.read_text(), table, args.marker))


if __name__ == "__main__":
    main()
