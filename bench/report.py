"""Reports on benchmark results: Markdown tables, and charts where matplotlib is installed.

    python -m nlora_kernels plot bench run.json      tables and charts of a run
    python -m bench.report save run.json ...         into bench/results/<device>.json; rows not measured again stay
    python -m bench.report docs                      what README.md and docs/ show of bench/results, charts included

Reads what `pytest bench --benchmark-json=FILE` writes, and the shorter files that `save` makes of it.
"""

import argparse
from pathlib import Path

from bench import charts
from bench.pictures import draw_bars, draw_roofline, groups, pictures
from bench.runs import load, save
from bench.tables import markdown
from nlora_kernels import study
from nlora_kernels.plotting import made_folder, text_without_matplotlib

ROOT = Path(__file__).resolve().parents[1]
# How the files of studies, which examples/compare.py writes, begin in bench/results.
STUDY = "quality-"


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
        shown = []
        for name, (title, *picture) in pictures(results).items():
            found |= _drawn(root / "docs" / "charts" / f"{stem}-{name}", title, *picture)
            shown.append(_embedded(f"charts/{stem}-{name}", title))
        tables.append("\n\n".join([f"## {results.where()}", *shown, markdown(results)]))
    found[root / "docs" / "results.md"] = insert(
        (root / "docs" / "results.md").read_text(), "\n".join(tables), "results"
    )
    quality = root / "docs" / "quality.md"
    shown = [f"## {stem.removeprefix(STUDY)}\n\n{study.markdown(one)}" for stem, one in studies.items()]
    found[quality] = insert(quality.read_text(), "\n".join(shown) or "No study is kept yet.\n", "studies")
    whole = {stem.removeprefix(STUDY): one for stem, one in studies.items() if study.is_whole(one)}
    readme = root / "README.md"
    found[readme] = insert(readme.read_text(), study.extract(whole), "studies")
    return found


def _drawn(stem: Path, *picture) -> dict[Path, str]:
    drawn = {theme: charts.dumbbells(*picture, colours) for theme, colours in charts.THEMES.items()}
    return {stem.with_name(f"{stem.name}-{theme}.svg"): charts.svg(figure) for theme, figure in drawn.items()}


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
        for (method, op), rows in groups(results.layers()).items():
            file = stem.with_name(f"{stem.name}-{method}-{op}.png")
            draw_bars(rows, file)
            written.append(file)
        if any(row["impl"] == "read" for row in results.of("roof")):
            file = stem.with_name(f"{stem.name}-roofline.png")
            draw_roofline(results, file)
            written.append(file)
    print("wrote " + ", ".join(map(str, written)))


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
