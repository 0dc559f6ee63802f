"""Reports on benchmark results: Markdown tables, and charts where matplotlib is installed.

    python -m nlora_kernels plot bench run.json      tables and charts of a run
    python -m bench.report save run.json ...         into bench/results/<device>.json; rows not measured again stay
    python -m bench.report docs                      what README.md and docs/ show of bench/results, charts included

Reads what `pytest bench --benchmark-json=FILE` writes, and the shorter files that `save` makes of it.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import charts
from nlora_kernels import study
from nlora_kernels.plotting import made_folder, text_without_matplotlib

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
ROOT = Path(__file__).resolve().parents[1]
# How the files of studies, which examples/compare.py writes, begin in bench/results.
STUDY = "quality-"
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
            "model; peak is what tensors hold above model and optimizer, saved is what autograd keeps for backward.",
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


def insert(text: str, shown: str, marker: str) -> str:
    """`text` with `shown` between <!-- marker --> and <!-- /marker -->; ValueError unless both are there once."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if text.count(begin) != 1 or end not in text.partition(begin)[2]:
        raise ValueError(f"the text must hold {begin} once and {end} after it, got {text.count(begin)} of the first")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{shown}\n{end}{rest.partition(end)[2]}"


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every file of README.md and docs/ that shows results of `root`/bench/results, with what it must hold."""
    files = sorted(path for path in (root / "bench" / "results").glob("*.json"))
    measured = {path.stem: load(path) for path in files if not path.name.startswith(STUDY)}
    studies = {path.stem: study.load(path) for path in files if path.name.startswith(STUDY)}
    found, tables = {}, []
    for stem, results in measured.items():
        pictures = {
            name: _picture(root / "docs" / "charts", f"{stem}-{name}", *picture)
            for name, picture in _pictures(results).items()
        }
        found |= {path: text for picture in pictures.values() for path, text in picture.items()}
        shown = [_embedded(f"charts/{stem}-{name}", _pictures(results)[name][0]) for name in pictures]
        tables.append("\n\n".join([f"## {_where(results)}", *shown, markdown(results)]))
    found[root / "docs" / "results.md"] = insert(
        (root / "docs" / "results.md").read_text(), "\n".join(tables), "results"
    )
    quality = root / "docs" / "quality.md"
    shown = [f"## {stem.removeprefix(STUDY)}\n\n{study.markdown(one)}" for stem, one in studies.items()]
    found[quality] = insert(quality.read_text(), "\n".join(shown) or "No study is kept yet.\n", "studies")
    return found


def _pictures(results: Results) -> dict[str, tuple]:
    """{name: (title, where, axis, heading of the column, reference, lines)} of those that results have rows for."""
    where = f"{_where(results)}, {results.provenance.get('threads')} threads"
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


def _where(results: Results) -> str:
    return f"{results.provenance.get('device')}, kernels for {results.provenance.get('kernels_use')}"


def _picture(folder: Path, name: str, *picture) -> dict[Path, str]:
    drawn = {theme: charts.dumbbells(*picture, colours) for theme, colours in charts.THEMES.items()}
    return {folder / f"{name}-{theme}.svg": charts.svg(figure) for theme, figure in drawn.items()}


def _embedded(stem: str, title: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{stem}-dark.svg">'
        f'<img alt="{title}" src="{stem}-light.svg"></picture>'
    )


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
        for (method, op), rows in _groups(results.layers()).items():
            file = stem.with_name(f"{stem.name}-{method}-{op}.png")
            draw_bars(rows, file)
            written.append(file)
        if any(row["impl"] == "read" for row in results.of("roof")):
            file = stem.with_name(f"{stem.name}-roofline.png")
            draw_roofline(results, file)
            written.append(file)
    print("wrote " + ", ".join(map(str, written)))


def draw_bars(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Horizontal bars of time over floor for every cell, with the 20th to 80th percentile and the FLOP bound."""
    cells = _cells(rows).values()
    impls = {name: LABELS[name] for name in LABELS if name != "floor" and any(name in cell for cell in cells)}
    names = [_cell_name(next(iter(cell.values()))) for cell in cells]
    title = f"{METHODS[rows[0]['method']]}, {OPS[rows[0]['op']]}"
    charts.bars(list(cells), names, impls, title).savefig(path)


def draw_roofline(results: Results, path: str | Path) -> None:
    """GFLOP/s over FLOP per byte for every row of one layer, under the ceilings that the same run measured."""
    rows = [row for row in results.layers() if "flop_per_byte" in row]
    charts.roofline(rows, results.of("roof"), LABELS).savefig(path)


def layer_lines(results: Results) -> list[charts.Line]:
    """NLoRA, forward and backward: a line for each layer that PEFT and ours were timed on, under its model's name."""
    rows = [row for row in results.layers() if row["op"] == "both" and row["method"] == "nlora"]
    lines, model = [], None
    for cell in _cells([row for row in rows if "ratio_to_floor" in row]).values():
        ours = _chosen(cell)
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
            lines += [_compared(_method(row), peft, row) for row in ours]
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
                lines.append(charts.Line(_method(row), values, column))
    return lines


def _method(row: dict[str, Any]) -> str:
    """The method's name; behind a comma, whether layers that share x are one operation."""
    name, comma, way = row["method"].partition(",")
    return METHODS.get(name, "none") + comma + way


def _steps(results: Results) -> dict[tuple, tuple]:
    """{(model, rank): (the frozen one, PEFT's LoRA, the methods by the backend that is chosen)}"""
    groups: dict[tuple, list] = {}
    for row in results.of("step"):
        groups.setdefault((row["shape"], row["r"]), []).append(row)
    found = {}
    for key, rows in groups.items():
        one = {name: next((row for row in rows if row["impl"] == name), None) for name in ("floor", "peft")}
        methods = dict.fromkeys(row["method"] for row in rows if row["impl"] in OURS)
        chosen = [_chosen({row["impl"]: row for row in rows if row["method"] == method}) for method in methods]
        found[key] = one["floor"], one["peft"], chosen
    return found


def _compared(label: str, peft: dict[str, Any], ours: dict[str, Any]) -> charts.Line:
    values = {charts.PEFT: charts.spread(peft), charts.OURS: charts.spread(ours)}
    gain = ours.get("speedup_vs_peft")
    return charts.Line(label, values, f"{gain:.2f} ×" if gain else "", gain is not None and gain < 1)


def _chosen(cell: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the backend that is chosen by itself."""
    return next((cell[name] for name in OURS if name in cell), None)


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
        chosen = _chosen(cell) or {}
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
        label = LABELS.get(row["impl"], row["impl"])
        lines.append([row["shape"], str(row["r"]), _method(row), label, *figures, *memory])
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
    saving.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    commands.add_parser("docs")
    args = parser.parse_args()
    if args.command == "save":
        for run in args.runs:
            print(save(load(run), args.out))
        if args.out != ROOT / "bench" / "results":
            return
    written = pages()
    for path, text in written.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    # Charts of results that are no longer there.
    for path in (ROOT / "docs" / "charts").glob("*.svg"):
        if path not in written:
            path.unlink()


if __name__ == "__main__":
    main()
