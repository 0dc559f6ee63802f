"""Reports on a comparison of methods: a table, curves of the loss with bands, and a forest plot.

A study is what examples/compare.py writes: {"metric": name, "higher_is_better": bool, "cells": {key: cell}}. A cell is
one run with "method", "rank", "lr", "seed", "metrics", "trained", "seconds", "tokens_per_second", "peak_bytes" and
"curve"; "kept" of the trained parameters are left after pruning. Its times are figures only where it says that
"others", the cores that other programs kept busy meanwhile, were none; "machine" is what it ran on.
"""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from . import plotting, saved

BASELINE = "lora"
HEADER = ["method", "rank", "lr", "rates", "n", "mean", "sd", f"less {BASELINE}'s"]
HEADER += ["trained", "kept", "seconds", "tokens/s", "peak MiB"]
# Cores that others may keep busy while a time is measured.
QUIET = 0.1
# What every run holds that is read here.
_CELL = {"method", "rank", "lr", "seed", "metrics", "curve", "trained", "seconds", "tokens_per_second", "peak_bytes"}


class Row(NamedTuple):
    """A method at a rank, with the learning rate of the best mean over seeds."""

    method: str
    rank: int
    lr: float
    rates: dict[float, int]  # that were tried, on so many seeds
    values: list[float]  # of the metric, by seed
    cells: list[dict[str, Any]]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def sd(self) -> float:
        """Of a sample; not a number of one run."""
        return _sd(self.values)

    def mean_of(self, name: str) -> float:
        return statistics.fmean(cell[name] for cell in self.cells)

    @property
    def quiet(self) -> bool:
        """Whether its times are of a machine that did nothing else."""
        return all(cell.get("others") is not None and cell["others"] <= QUIET for cell in self.cells)

    @property
    def edge(self) -> str:
        """A mark where the best rate is the largest or the smallest tried: one beyond it may be better."""
        if len(self.rates) < 2:
            return ""
        return {max(self.rates): " ↑", min(self.rates): " ↓"}.get(self.lr, "")

    def less(self, other: "Row") -> list[float]:
        """The differences to another row on the seeds of both."""
        theirs = {cell["seed"]: value for cell, value in zip(other.cells, other.values, strict=True)}
        ours = {cell["seed"]: value for cell, value in zip(self.cells, self.values, strict=True)}
        return [value - theirs[seed] for seed, value in ours.items() if seed in theirs]

    def cells_of_table(self, baseline: "Row | None" = None) -> list[str]:
        differences = self.less(baseline) if baseline and baseline is not self else []
        times = [f"{self.mean_of('seconds'):.1f}", f"{self.mean_of('tokens_per_second'):.0f}"]
        kept = self.mean_of("kept") if all("kept" in cell for cell in self.cells) else self.mean_of("trained")
        return [
            self.method,
            str(self.rank),
            f"{self.lr:g}{self.edge}",
            str(len(self.rates)),
            str(len(self.values)),
            f"{self.mean:.4f}",
            "" if len(self.values) < 2 else f"{self.sd:.4f}",
            f"{statistics.fmean(differences):+.4f} ± {_sd(differences):.4f}" if len(differences) > 1 else "",
            f"{self.mean_of('trained'):,.0f}",
            f"{kept:,.0f}",
            *(times if self.quiet else ["", ""]),
            f"{self.mean_of('peak_bytes') / 2**20:.0f}",
        ]


def _sd(values: list[float]) -> float:
    whole = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if whole else math.nan


def load(file: str | Path) -> dict[str, Any]:
    """Raises ValueError if the file holds no study, or one without a finished run."""
    file = Path(file)
    study = saved.json_object(file)
    if not {"metric", "higher_is_better", "cells"} <= study.keys() or not isinstance(study["cells"], dict):
        raise ValueError(f"file must hold a study of examples/compare.py, got {file}")
    if not study["cells"]:
        raise ValueError(f"file must hold a study with at least one finished run, got none in {file}")
    for key, cell in study["cells"].items():
        if not isinstance(cell, dict) or (missing := _CELL - cell.keys()):
            lacks = "no object" if not isinstance(cell, dict) else f"without {', '.join(sorted(missing))}"
            raise ValueError(f"{file} must hold runs of examples/compare.py, got {key} {lacks}")
        if study["metric"] not in cell["metrics"]:
            known = ", ".join(cell["metrics"])
            raise ValueError(f"metric must be one of {known}, got {study['metric']!r}, which {key} has not")
    return study


def rows(study: dict[str, Any]) -> list[Row]:
    """The best learning rate of each method and rank, the baseline first, then in the order in which they were run."""
    sign = 1 if study["higher_is_better"] else -1
    groups: dict[tuple[str, int], dict[float, list[dict]]] = {}
    for cell in study["cells"].values():
        groups.setdefault((cell["method"], cell["rank"]), {}).setdefault(cell["lr"], []).append(cell)
    found = []
    for (method, rank), rates in groups.items():
        candidates = []
        tried = {lr: len(cells) for lr, cells in rates.items()}
        for lr, cells in rates.items():
            cells = sorted(cells, key=lambda cell: cell["seed"])
            values = [cell["metrics"][study["metric"]] for cell in cells]
            candidates.append(Row(method, rank, lr, tried, values, cells))
        # A rate that not all seeds have been run at does not win against one that has them, nor one whose runs diverged
        # against any.
        most = max(tried.values())
        whole = [row for row in candidates if len(row.values) == most]
        found.append(max(whole, key=lambda row: sign * row.mean if math.isfinite(row.mean) else -math.inf))
    return sorted(found, key=lambda row: row.method != BASELINE)


def is_whole(study: dict[str, Any], seeds: int = 3) -> bool:
    """Whether every method has run on as many seeds."""
    return all(len(row.values) >= seeds for row in rows(study))


def baselines(found: list[Row]) -> dict[int, Row]:
    """{rank: the row that others of the rank are compared with}"""
    return {row.rank: row for row in found if row.method == BASELINE}


def table(found: list[Row]) -> list[list[str]]:
    """The cells under HEADER."""
    return [row.cells_of_table(baselines(found).get(row.rank)) for row in found]


def verdicts(study: dict[str, Any], found: list[Row]) -> list[str]:
    """Who is ahead of the baseline and who behind, in sentences."""
    sign = 1 if study["higher_is_better"] else -1
    groups: dict[str, list[str]] = {}
    for row in found:
        base = baselines(found).get(row.rank)
        if base is None or base is row or len(differences := [sign * d for d in row.less(base)]) < 2:
            continue
        side = "ahead" if min(differences) > 0 else "behind" if max(differences) < 0 else "now ahead, now behind"
        far = f" (by more than {BASELINE}'s sd)" if abs(row.mean - base.mean) > base.sd else ""
        groups.setdefault(side, []).append(f"{row.method}{far}")
    names = {"ahead": "ahead on every seed", "behind": "behind on every seed"}
    parts = [f"{names.get(side, side)}: {', '.join(methods)}" for side, methods in groups.items()]
    return [f"Against {BASELINE}, seed by seed: {'; '.join(parts)}."] if parts else []


def machines(study: dict[str, Any]) -> list[str]:
    """What the runs ran on, each once."""
    found: dict[str, None] = {}
    for cell in study["cells"].values():
        if machine := cell.get("machine"):
            versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
            kernels = f", kernels for {machine['kernels']}" if machine["kernels"] else ""
            threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
            found[f"{machine['device']}, {threads}{kernels}; {versions}"] = None
    return list(found)


def markdown(study: dict[str, Any]) -> str:
    found = rows(study)
    # A column of which no row has a value is left out.
    columns = [column for column in zip(HEADER, *table(found), strict=True) if any(column[1:])]
    header, *body = zip(*columns, strict=True)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    lines += [f"| {' | '.join(line)} |" for line in body]
    about = "higher" if study["higher_is_better"] else "lower"
    said = [f"{study['metric']}, {about} is better; each method at the best of its rates."]
    if any(row.edge for row in found):
        said.append("↑ and ↓: the largest or the smallest rate that was tried, so that one beyond it may be better.")
    if (fewest := min(min(row.rates.values()) for row in found)) < max(len(row.values) for row in found):
        said.append(f"The rates were tried on {fewest} seed{'s' if fewest > 1 else ''}, the others ran at the best.")
    said += verdicts(study, found)
    if not all(row.quiet for row in found):
        said.append("Seconds are left out where other programs ran beside.")
    said += [f"On {machine}." for machine in machines(study)]
    return "\n".join(lines) + f"\n\n{' '.join(said)}\n"


def extract(studies: dict[str, dict[str, Any]]) -> str:
    """mean ± sd of the methods that all of the studies have, under the studies' names; "" without a study."""
    found = {name: {(row.method, row.rank): row for row in rows(one)} for name, one in studies.items()}
    if not found:
        return ""
    heads = [f"{name}, {one['metric']} {'↑' if one['higher_is_better'] else '↓'}" for name, one in studies.items()]
    lines = [f"| {' | '.join(['method', *heads])} |", "|" + "---|" * (1 + len(heads))]
    for key in next(iter(found.values())):
        if all(key in each for each in found.values()):
            values = [f"{each[key].mean:.4f} ± {each[key].sd:.4f}" for each in found.values()]
            lines.append(f"| {' | '.join([key[0], *values])} |")
    return "\n".join(lines) + "\n"


def draw_curves(found: list[Row], path: str | Path) -> None:
    """Writes the training losses, mean and range over seeds, to a PNG."""
    figure = plotting.new_figure(6.5, 4)
    axes = figure.subplots()
    for row in found:
        # Steps that all seeds have logged.
        curves = [dict(map(tuple, cell["curve"])) for cell in row.cells]
        steps = sorted(set(curves[0]).intersection(*curves[1:]))
        values = [[curve[step] for curve in curves] for step in steps]
        [line] = axes.plot(steps, [statistics.fmean(v) for v in values], label=f"{row.method}, r = {row.rank}")
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
    axes.set(xlabel="step", ylabel="training loss")
    axes.legend(fontsize="small")
    figure.savefig(path)


def draw_forest(found: list[Row], metric: str, path: str | Path) -> None:
    """Writes every method's mean, standard deviation and seeds on one axis to a PNG."""
    figure = plotting.new_figure(6, 1.2 + 0.35 * len(found))
    axes = figure.subplots()
    for place, row in enumerate(found):
        axes.errorbar(row.mean, place, xerr=row.sd if len(row.values) > 1 else None, fmt="s", color="black", capsize=3)
        axes.scatter(row.values, [place] * len(row.values), s=12, color="tab:blue", zorder=3)
    axes.set_yticks(range(len(found)), [f"{row.method}, r = {row.rank}" for row in found])
    axes.invert_yaxis()
    axes.set(xlabel=f"{metric}: mean ± sd, and each seed")
    figure.savefig(path)


def plot(file: str | Path, out: str | Path | None = None) -> None:
    """Prints the table of a study, and writes it and its figures into the folder `out`, or beside the file.

    Without matplotlib there is text alone, and a word of it on stderr. Raises ValueError as `load` does.
    """
    study, name = load(file), Path(file).stem
    out = plotting.made_folder(out) if out else Path(file).parent
    found = rows(study)
    print(plotting.table(HEADER, table(found)))
    written = [out / f"{name}.md"]
    written[0].write_text(markdown(study), encoding="utf-8")
    with plotting.text_without_matplotlib():
        draw_curves(found, out / f"{name}-curves.png")
        draw_forest(found, study["metric"], out / f"{name}-forest.png")
        written += [out / f"{name}-curves.png", out / f"{name}-forest.png"]
    print(f"\nwrote {', '.join(map(str, written))}")
