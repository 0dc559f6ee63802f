"""Charts of benchmark results: SVG pictures for the pages, light and dark, and PNG files for a run.

A picture has a row for what was measured, a dot for each contender, and its figures in columns of their own at the
right, where no line crosses them. Contenders: PEFT grey, ours blue, the frozen layer alone black or a line at 1.
"""

import functools
import io
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench import runs
from nlora_kernels.plotting import new_figure

PEFT, OURS = "PEFT", "nlora_kernels"
# PEFT's dot shows round ours where the two are equal.
SIZES = {PEFT: 7.5, OURS: 5}


class Theme(NamedTuple):
    """Colours on a page whose background shows through."""

    text: str
    faint: str
    peft: str
    ours: str
    loss: str


THEMES = {
    "light": Theme("#1f2328", "#d1d9e0", "#818b98", "#0969da", "#b35900"),
    "dark": Theme("#f0f6fc", "#3d444d", "#9198a1", "#58a6ff", "#f0883e"),
}
# Labels of a whole report, where there are more contenders than two.
COLOURS = {
    "floor": "black",
    "peft": "#818b98",
    "peft_base_dtype": "#b6bcc4",
    "peft_compiled": "#d1d9e0",
    "eager3": "#e8d9b5",
    "lean": "#9ecae1",
    "cpu": "#0969da",
    "triton": "#2ca02c",
    "cuda": "#17becf",
}


class Spread(NamedTuple):
    """A median, and the 20th and 80th percentile where there were rounds."""

    value: float
    low: float
    high: float


class Line(NamedTuple):
    """One line of a picture: a heading where it has no values."""

    label: str
    values: dict[str, Spread] = {}
    column: str = ""
    loss: bool = False


def spread(row: dict[str, Any], to: str = "floor") -> Spread:
    return Spread(row[f"ratio_to_{to}"], *row[f"ratio_to_{to}_p20_p80"])


def dumbbells(title: str, where: str, axis: str, column: str, reference: str, lines: Sequence[Line], theme: Theme):
    """A figure of `lines`: PEFT and ours as dots joined by a bar, `reference` at 1, `column` at the right."""
    height = 0.235 * len(lines) + 1.35
    figure = new_figure(7.6, height)
    figure.set_layout_engine("none")
    bottom, top = 0.5 / height, 1 - 0.82 / height
    axes = figure.add_axes((0.34, bottom, 0.53, top - bottom))
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    colours = {PEFT: theme.peft, OURS: theme.ours}
    values = [value for line in lines for spread in line.values.values() for value in spread]
    lowest, highest = min(0.9, *values), max(1.1, *values)
    margin = 0.04 * (highest - lowest)
    axes.set(xlim=(lowest - margin, highest + margin), ylim=(len(lines) - 0.4, -0.75))
    write = functools.partial(axes.text, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    for place, line in enumerate(lines):
        if not line.values:
            write(-0.62, place, line.label, weight="bold", color=theme.text)
            continue
        write(-0.02, place, line.label, ha="right", color=theme.text)
        ends = [spread.value for spread in line.values.values()]
        axes.plot([min(ends), max(ends)], [place] * 2, color=theme.faint, linewidth=3, solid_capstyle="round", zorder=1)
        for name, (value, low, high) in line.values.items():
            axes.plot([low, high], [place] * 2, color=colours[name], linewidth=0.8, alpha=0.6, zorder=2)
            axes.plot([value], [place], "o", color=colours[name], markersize=SIZES[name], zorder=3)
        write(1.17, place, line.column, ha="right", weight="bold", color=theme.loss if line.loss else theme.text)
    write(1.17, -1.0, column, va="bottom", ha="right", color=theme.text, fontsize=8)
    figure.text(0.012, 1 - 0.1 / height, title, color=theme.text, fontsize=10, weight="bold", va="top")
    figure.text(0.012, 1 - 0.31 / height, where, color=theme.text, fontsize=8.5, va="top")
    legend(figure, 1 - 0.6 / height, theme, colours, reference)
    axes.set_yticks([])
    axes.set_xlabel(axis, color=theme.text, fontsize=8.5)
    axes.tick_params(colors=theme.text, labelsize=8, length=0)
    # Beside the lines and not the headings, whose words they would cross.
    for first, last in stretches([bool(line.values) for line in lines]):
        ticks = [tick for tick in axes.get_xticks() if lowest - margin <= tick <= highest + margin]
        axes.vlines(ticks, first - 0.5, last + 0.5, color=theme.faint, linewidth=0.6, zorder=0)
        axes.vlines([1], first - 0.5, last + 0.5, color=theme.text, linewidth=1, zorder=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def stretches(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """First and last index of every run of true ones."""
    starts = [at for at, flag in enumerate(flags) if flag and not (at and flags[at - 1])]
    ends = [at for at, flag in enumerate(flags) if flag and not (at + 1 < len(flags) and flags[at + 1])]
    return list(zip(starts, ends, strict=True))


def legend(figure, height: float, theme: Theme, colours: dict[str, str], reference: str) -> None:
    """A row of its own: a mark and its name after the other."""
    from matplotlib.lines import Line2D

    marks = [
        Line2D([], [], marker="o", linestyle="", color=colour, markersize=SIZES[name])
        for name, colour in colours.items()
    ]
    marks.append(Line2D([], [], marker="|", linestyle="", color=theme.text, markersize=9))
    names = [*colours, reference]
    figure.legend(
        marks,
        names,
        loc="center left",
        bbox_to_anchor=(0.004, height),
        ncols=len(names),
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.text,
        handletextpad=0.3,
        columnspacing=1.6,
        borderpad=0,
    )


def svg(figure) -> str:
    """The figure as text that is the same whenever it is drawn, its letters in the reader's own font."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nlora_kernels", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def bars(cells: Sequence[dict[str, dict[str, Any]]], labels: Sequence[str], impls: dict[str, str], title: str):
    """Horizontal bars of time over the frozen layer's for every cell, with the 20th to 80th percentile and the bound.

    `impls` names the contenders in the order of the bars. The ratios stand in a column at the right, those of ours that
    are slower than PEFT say so.
    """
    ratios = [cell[name]["ratio_to_floor"] for cell in cells for name in impls if name in cell]
    limit = max(1.5, min(4.0, 1.1 * max(ratios)))
    figure = new_figure(9, 1.5 + 0.17 * sum(len(cell) + 0.4 for cell in cells))
    axes = figure.subplots()
    middles, top = [], 0.0
    for cell in cells:
        shown = [name for name in impls if name in cell]
        middles.append(top + (len(shown) - 1) / 2)
        for place, name in enumerate(shown):
            row = cell[name]
            ratio, low, high = spread(row)
            axes.barh(top + place, min(ratio, limit), 0.92, color=COLOURS[name])
            if high < limit:
                axes.plot([low, high], [top + place] * 2, color="black", linewidth=0.8)
            slower = name in runs.OURS and row.get("speedup_vs_peft", 1) < 1
            said = f"{ratio:.2f}" + (" slower than PEFT" if slower else "")
            axes.text(
                1.01,
                top + place,
                said,
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=7,
                color="#b35900" if slower else "black",
            )
        # A whole model's step has no bound.
        if bound := next(iter(cell.values())).get("flop_bound"):
            axes.plot([bound] * 2, [top - 0.6, top + len(shown) - 0.4], **BOUND)
        top += len(shown) + 1.2
    axes.axvline(1, color="0.4", linewidth=0.8)
    for name, label in impls.items():
        axes.barh(0, 0, color=COLOURS[name], label=label)
    axes.plot([], [], **BOUND, label="bound by multiplications")
    axes.set_yticks(middles, labels, fontsize=8)
    axes.set(xlim=(0, limit), ylim=(top - 1.5, -1.1), xlabel="time / time of the frozen layer")
    axes.set_title(title, loc="left")
    figure.legend(loc="outside lower center", ncols=5, fontsize=7.5, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


BOUND = {"color": "black", "linewidth": 1.6, "linestyle": (0, (2, 1))}


def roofline(rows: Sequence[dict[str, Any]], roofs: Sequence[dict[str, Any]], labels: dict[str, str]):
    """GFLOP/s over FLOP per byte, under ceilings that the same run measured.

    They are what large products reach, by the library and by our kernels, and how fast matrices of several sizes are
    read: a size that a cache holds is read faster than memory is.
    """
    levels = sorted((row["bytes"], row["shape"], row["gbytes_per_second"]) for row in roofs if row["impl"] == "read")
    peaks = sorted((row for row in roofs if row["impl"] in ("product", "kernels")), key=lambda row: row["gflops"])
    figure = new_figure(8.5, 5.4)
    axes = figure.subplots()
    lowest = min(1.0, *(row["flop_per_byte"] / 2 for row in rows))
    highest = max(row["flop_per_byte"] * 2 for row in rows)
    tallest = max(row["gflops"] for row in peaks)
    shades = [str(0.75 - 0.6 * place / max(1, len(levels) - 1)) for place in range(len(levels))]
    for (_, size, bandwidth), shade in zip(levels, shades, strict=True):
        line = [(lowest, lowest * bandwidth), (tallest / bandwidth, tallest)]
        axes.plot(*zip(*line, strict=True), color=shade, linewidth=1.2, label=f"{size} read, {bandwidth:.0f} GB/s")
    for row, above in itertools.zip_longest(peaks, peaks[1:]):
        style = {"float32": "-", "bfloat16": "--"}.get(row["dtype"], ":")
        axes.plot(
            [lowest, highest],
            [row["gflops"]] * 2,
            color="black" if row["impl"] == "product" else COLOURS["cpu"],
            linewidth=1,
            linestyle=style,
        )
        by = "library" if row["impl"] == "product" else "kernels"
        axes.annotate(
            f"{row['dtype']} product by {by}, {row['gflops']:.0f} GFLOP/s",
            (lowest, row["gflops"]),
            # Under its line where the next one would cross it.
            xytext=(3, -9 if above and above["gflops"] < 1.25 * row["gflops"] else 2),
            textcoords="offset points",
            fontsize=7.5,
        )
    for name, label in labels.items():
        for dtype, marker in {"float32": "o", "bfloat16": "s"}.items():
            points = [(r["flop_per_byte"], r["gflops"]) for r in rows if (r["impl"], r["dtype"]) == (name, dtype)]
            if points:
                options = {"s": 22, "marker": marker, "color": COLOURS[name], "edgecolors": "black", "linewidths": 0.3}
                axes.scatter(
                    *zip(*points, strict=True), **options, label=label if dtype == "float32" else None, zorder=3
                )
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s")
    axes.set_title("one layer under its roof (circles fp32, squares bf16)", loc="left")
    axes.grid(True, which="both", linewidth=0.2)
    axes.legend(fontsize=7.5, loc="lower right")
    return figure
