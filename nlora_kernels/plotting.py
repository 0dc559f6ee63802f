"""Reports on trained adapters: text for a terminal, and PNG where matplotlib is installed."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import saved

LOG = "trainer_state.json"


@dataclass
class RankMap:
    """How many singular values each LoRA² layer keeps: `kept[row][column]`, None where a row has no such projection."""

    rows: list[str]
    columns: list[str]
    kept: list[list[int | None]]

    @property
    def values(self) -> list[int]:
        return [value for row in self.kept for value in row if value is not None]

    def __str__(self) -> str:
        cells = [["" if value is None else str(value) for value in row] for row in self.kept]
        lines = table(["layer", *self.columns], [[name, *row] for name, row in zip(self.rows, cells, strict=True)])
        values = self.values
        return f"{lines}\n{sum(values)} singular values in {len(values)} matrices, {sum(values) / len(values):.2f} each"


def rank_map(checkpoint: str | Path) -> RankMap:
    """The kept ranks of a checkpoint, a folder or a safetensors file, over layers × projections.

    Rows are numbered blocks of the model, columns the linear layers in them (LoRA², arXiv 2408.06854, fig. 3).

    Raises:
        FileNotFoundError: there is no such folder, or no safetensors file in it.
        ValueError: none of them holds a LoRA² adapter, or one cannot be read.
    """
    checkpoint = Path(checkpoint)
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"checkpoint must be a safetensors file or a folder with one, got {checkpoint}")
    ranks = {}
    for file in files:
        with saved.naming(file) as safetensors, safetensors.safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                name, found, _ = f".{key}".partition(".lora_mask")
                if found:
                    ranks[name[1:] or "layer"] = int(tensors.get_tensor(key).count_nonzero())
    if not ranks:
        raise ValueError(f"checkpoint must hold a LoRA² adapter (lora_mask), got none in {checkpoint}")
    return arrange(ranks)


def arrange(ranks: dict[str, int]) -> RankMap:
    """{module name: rank} as a map: the first number in a name is its block, what follows is the projection."""
    places = {}
    for name, rank in ranks.items():
        words = name.split(".")
        at = next((at for at, word in enumerate(words) if word.isdigit()), None)
        # A layer outside of all blocks comes first, in a row of its own.
        block = ("", -1) if at is None else (".".join(words[:at]), int(words[at]))
        projection = name if at is None else ".".join(words[at + 1 :])
        places[block, projection] = rank
    blocks = sorted({block for block, _ in places})
    projections = sorted({projection for _, projection in places})
    stacks = {stack for stack, number in blocks if number >= 0}
    rows = ["-" if n < 0 else str(n) if len(stacks) == 1 else f"{stack}.{n}" for stack, n in blocks]
    return RankMap(rows, _short(projections), [[places.get((block, p)) for p in projections] for block in blocks])


def training_log(checkpoint: str | Path) -> list[dict]:
    """The entries of a Trainer's log that have a loss: dicts with "step", "loss" and, with pruning, "rank_budget"."""
    path = Path(checkpoint, LOG)
    if not path.is_file():
        return []
    return [entry for entry in saved.json_object(path).get("log_history", ()) if "loss" in entry]


def table(header: list[str], rows: list[list[str]]) -> str:
    """Text in columns, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(row: list[str]) -> str:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        return "  ".join([row[0].ljust(widths[0]), *cells])

    return "\n".join(map(line, (header, *rows)))


def draw_ranks(ranks: RankMap, path: str | Path) -> None:
    """Writes the heat map of kept ranks to a PNG."""
    figure = new_figure(1.5 + 0.7 * len(ranks.columns), 1.5 + 0.35 * len(ranks.rows))
    axes = figure.subplots()
    cells = [[float("nan") if value is None else value for value in row] for row in ranks.kept]
    image = axes.imshow(cells, cmap="viridis", aspect="auto", vmin=0)
    top = max(ranks.values)
    for y, row in enumerate(ranks.kept):
        for x, value in enumerate(row):
            if value is not None:
                axes.text(x, y, value, ha="center", va="center", color="black" if value > top * 0.6 else "white")
    axes.set_xticks(range(len(ranks.columns)), ranks.columns, rotation=35, ha="right")
    axes.set_yticks(range(len(ranks.rows)), ranks.rows)
    axes.set(ylabel="layer", title="singular values kept")
    figure.colorbar(image)
    figure.savefig(path)


def draw_training(log: list[dict], path: str | Path) -> None:
    """Writes the curves of loss and, where it was logged, of the rank budget to a PNG."""
    figure = new_figure(6, 3.5)
    axes = figure.subplots()
    [loss] = axes.plot([entry["step"] for entry in log], [entry["loss"] for entry in log], color="tab:blue")
    axes.set(xlabel="step", ylabel="training loss")
    axes.yaxis.label.set_color(loss.get_color())
    if budgets := [(entry["step"], entry["rank_budget"]) for entry in log if "rank_budget" in entry]:
        right = axes.twinx()
        [line] = right.step(*zip(*budgets, strict=True), where="post", color="tab:orange")
        right.set(ylabel="singular values kept", ylim=(0, None))
        right.yaxis.label.set_color(line.get_color())
    figure.savefig(path)


def plot_ranks(checkpoint: str | Path, out: str | Path | None = None) -> None:
    """Prints the kept ranks and the training log of a checkpoint, and draws both into the folder `out`.

    `out` is made if it is not there; without it they are drawn into the checkpoint's folder. Without matplotlib there
    is text alone, and a word of it on stderr.

    Raises FileNotFoundError and ValueError as `rank_map` does, and ValueError for an `out` that is a file.
    """
    checkpoint = Path(checkpoint)
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    ranks, log = rank_map(checkpoint), training_log(folder)
    print(ranks)
    if log:
        # Twenty rows, the last among them, show the course of a run.
        some = log[:: -max(1, len(log) // 20)][::-1]
        cells = [[str(e["step"]), f"{e['loss']:.4f}", str(e.get("rank_budget", ""))] for e in some]
        print("", table(["step", "loss", "budget"], cells), sep="\n")
    out = made_folder(out) if out else folder
    with text_without_matplotlib():
        draw_ranks(ranks, out / "ranks.png")
        if log:
            draw_training(log, out / "training.png")
        print(f"\nwrote {out / 'ranks.png'}" + (f" and {out / 'training.png'}" if log else ""))


@contextlib.contextmanager
def text_without_matplotlib() -> Iterator[None]:
    """Where matplotlib is not installed, what is drawn within is left out, with a word of it on stderr."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        print("no PNG without matplotlib: pip install 'nlora_kernels[plot]'", file=sys.stderr)


def made_folder(out: str | Path) -> Path:
    """The folder `out`, made if it is not there; ValueError if it is a file."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    return out


def new_figure(width: float, height: float) -> Any:
    # NOTE: not through pyplot, which opens displays and keeps every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _short(names: list[str]) -> list[str]:
    """Each name's shortest ending in whole words that no other of them has."""

    def shorten(name: str) -> str:
        words = name.split(".")
        for count in range(1, len(words)):
            ending = ".".join(words[-count:])
            if not any(other != name and f".{other}".endswith(f".{ending}") for other in names):
                return ending
        return name

    return [shorten(name) for name in names]
