"""Reports on benchmark results: nothing measured is lost, and losses show."""

import json
import re
import struct
import subprocess
import sys

import pytest

from bench import charts, pictures, report, runs, tables
from nlora_kernels import cli
from python_tests import ROOT


def row(impl, ratio, speedup, shape="Model q_proj M=4", r=8, dtype="float32", method="nlora", op="both"):
    return {
        "impl": impl,
        "op": op,
        "method": method,
        "shape": shape,
        "r": r,
        "dtype": dtype,
        "ms": 2.0 * ratio,
        "ratio_to_floor": ratio,
        "ratio_to_floor_p20_p80": [ratio - 0.01, ratio + 0.02],
        "speedup_vs_peft": speedup,
        "flop_bound": 1.03,
        "gflops": 50.0 / ratio,
        "flop_per_byte": 90.0,
    }


ROWS = [
    row("floor", 1.0, 1.5),
    row("peft", 1.5, 1.0),
    row("lean", 1.25, 1.2),
    row("cpu", 1.75, 0.857),
    row("peft", 1.4, 1.0, r=64),
    row("cpu", 1.1, 1.27, r=64),
    row("cpu", 1.2, 1.3, method="inttune", dtype="bfloat16"),
    {"impl": "copy", "op": "roof", "shape": "256 MiB", "dtype": "float32", "gbytes_per_second": 10.0},
    {"impl": "product", "op": "roof", "shape": "8x8x8", "dtype": "float32", "gflops": 100.0},
    {"impl": "kernels", "op": "roof", "shape": "8x8x8", "dtype": "float32", "gflops": 120.0},
    *(
        {"impl": "read", "op": "roof", "shape": f"{n} MiB", "dtype": "float32", "gbytes_per_second": 64.0 / n}
        | {"bytes": n << 20}
        for n in (1, 64)
    ),
    {"impl": "nlora_residual", "op": "init", "shape": "Model block", "r": 8, "ms": 3.0, "ratio_to_pissa_niter_16": 0.02}
    | {"ratio_to_pissa_niter_16_p20_p80": [0.01, 0.03]},
    {"impl": "cpu", "op": "penalty, paper", "shape": "Model x7", "r": 8, "ms": 4.0, "ratio_to_eager": 0.25},
    row("cpu", 1.31, 1.1, shape="Model, 4 tokens", method="lora2", op="step")
    | {"peak_bytes": 3 << 20, "saved_bytes": 1},
    *(
        row(*which, shape="Model, 4 tokens", op="step") | {"saved_bytes": 2}
        for which in [("floor", 1.0, 1.2), ("peft", 1.3, 1)]
    ),
    row("cpu", 1.37, 1.1, shape="Model, 4 tokens", method="nlora, grouped", op="step") | {"saved_bytes": 1},
    # Layers of other kinds, which say less.
    {"impl": "cpu", "op": "both", "method": "lora", "shape": "mixture", "r": 8, "ms": 6.0, "ratio_to_peft": 0.21},
    {
        "impl": "cpu",
        "op": "both",
        "method": "slora",
        "base": "nf4",
        "dtype": "bfloat16",
        "shape": "64x64",
        "r": 8,
        "ms": 7.0,
    }
    | {"ratio_to_peft": 0.41},
    {"impl": "inttune", "op": "paper, training", "table": "Paper, table 1", "shape": "Model", "r": 8, "ms": 5.0}
    | {"ratio_to_peft": 0.9, "ratio_to_peft_p20_p80": [0.8, 1.0], "ratio_to_lora": 1.1}
    | {"ratio_to_lora_p20_p80": [1.0, 1.2], "paper_ratio": 0.85, "paper_against": "peft"}
    | {"held_bytes": 7 << 20, "held_ratio_to_peft": 0.7, "paper_held_ratio": 0.9},
]
MACHINE = {"threads": 2, "cpu": {"name": "CPU (R) X", "kernels_use": "avx2"}, "versions": {"torch": "9.9"}}


@pytest.fixture
def run(tmp_path):
    """A file as pytest-benchmark writes it."""
    content = {
        "machine_info": MACHINE,
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "datetime": "2030-01-02T3",
    }
    content["benchmarks"] = [{"name": str(n), "extra_info": row} for n, row in enumerate([*ROWS, {"other": 1}])]
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return path


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_hold_every_row_and_where_it_comes_from(run):
    text = tables.markdown(runs.load(run))
    assert "CPU (R) X, 2 threads, kernels for avx2; torch 9.9; 2030-01-02, commit 0123456789ab (with changes)." in text
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    header = lines[0]
    assert header[-4:] == ["PEFT", "lean", "cpu", "vs PEFT"]
    small, large, core = lines[2:5]
    assert small[:7] == ["Model q_proj M=4", "8", "float32", "NLoRA", "forward and backward", "2", "1.03"]
    # The loss stands there as it is, though lean would look better.
    assert small[7:] == ["1.50 (1.49–1.52)", "1.25 (1.24–1.27)", "1.75 (1.74–1.77)", "0.86"]
    assert large[1] == "64" and large[5] == "" and large[-1] == "1.27"
    assert core[2:4] == ["bfloat16", "IntTune"]
    assert ["Model, 4 tokens", "8", "LoRA²", "cpu", "3", "1.31 (1.30–1.33)", "1.10", "3.0", "0.0"] in lines
    assert ["Model, 4 tokens", "8", "NLoRA, grouped", "cpu", "3", "1.37 (1.36–1.39)", "1.10", "", "0.0"] in lines
    assert ["lora, both", "mixture", "8", "cpu", "6", "4.76"] in lines
    assert ["slora, nf4, bfloat16, both", "64x64", "8", "cpu", "7", "2.44"] in lines
    assert ["init", "Model block", "8", "nlora residual", "3", "50"] in lines
    assert ["penalty, paper", "Model x7", "8", "cpu", "4", "4"] in lines
    table = ["Paper, table 1", "training", "Model", "8", "inttune", "5 ms"]
    held = ["Paper, table 1", "held", "Model", "8", "inttune", "7 MiB"]
    # The paper's ratio stands beside that of the same two methods alone.
    assert lines[-3:] == [
        [*table, "peft", "0.9 (0.8–1)", "0.85"],
        [*table, "lora", "1.1 (1–1.2)", ""],
        [*held, "peft", "0.70", "0.90"],
    ]


def test_the_command_writes_markdown_and_pngs(run, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert cli.main(["plot", "bench", str(run), "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"run.md", "run-nlora-both.png", "run-inttune-both.png", "run-roofline.png"}
    assert (out / "run.md").read_text() in capsys.readouterr().out
    for name in names - {"run.md"}:
        header = (out / name).read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", header[16:])) > 200


def test_the_bars_show_figures_bound_and_losses(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    pictures.draw_bars(ROWS[:6], tmp_path / "x.png")
    [axes] = drawn[0].axes
    widths = [patch.get_width() for patch in axes.patches if patch.get_width()]
    assert widths == [1.5, 1.25, 1.75, 1.4, 1.1]
    said = [text.get_text().strip() for text in axes.texts]
    assert said == ["1.50", "1.25", "1.75 slower than PEFT", "1.40", "1.10"]
    # In a column of their own, where neither bars nor bounds end.
    assert {text.get_position()[0] for text in axes.texts} == {1.01}
    bounds = [line for line in axes.lines if len(line.get_xdata()) and set(line.get_xdata()) == {1.03}]
    assert len(bounds) == 2
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Model\nq_proj M=4 r=8", "Model\nq_proj M=4 r=64"]


def test_without_matplotlib_there_is_text(run):
    code = "import sys; sys.modules['matplotlib'] = None\nfrom nlora_kernels import cli\n"
    code += f"sys.exit(cli.main(['plot', 'bench', {str(run)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "1.75 (1.74–1.77)" in done.stdout and "nlora_kernels[plot]" in done.stderr
    assert run.with_suffix(".md").is_file() and not list(run.parent.glob("*.png"))


def test_results_are_kept_per_device_and_merged(run, tmp_path):
    results = runs.load(run)
    path = runs.save(results, tmp_path / "results")
    assert path.name == "cpu-r-x-avx2.json"
    assert tables.markdown(runs.load(path)) == tables.markdown(results)
    later = runs.Results(results.provenance | {"date": "2031-01-01"}, [row("cpu", 1.5, 1.01)])
    merged = runs.load(runs.save(later, tmp_path / "results"))
    assert len(merged.rows) == len(ROWS) and merged.provenance["date"] == "2031-01-01"
    # Rows that were kept say what they are of, and go on to when more are measured.
    last = runs.Results(results.provenance | {"date": "2032-01-01", "commit": "fedc"}, [row("lean", 1.3, 1.01)])
    text = tables.markdown(runs.load(runs.save(last, tmp_path / "results")))
    first, one = "0123456789ab (with changes), 2030-01-02", "0123456789ab (with changes), 2031-01-01"
    expected = f"{len(ROWS) - 2} of {len(ROWS)} rows of commit {first}; 1 of {len(ROWS)} rows of commit {one}."
    assert text.splitlines()[0].endswith("2032-01-01, commit fedc; " + expected)
    assert [r["ratio_to_floor"] for r in merged.layers() if (r["impl"], r["r"], r["op"]) == ("cpu", 8, "both")] == [
        1.5,
        1.2,
    ]
    assert str(ROOT.parent) not in path.read_text()


def test_what_is_shown_goes_between_its_markers():
    text = "before\n<!-- results -->\nstale\n<!-- /results -->\nafter\n"
    for _ in range(2):
        text = report.insert(text, "new\n", "results")
        assert text == "before\n<!-- results -->\n\nnew\n\n<!-- /results -->\nafter\n"
    with pytest.raises(ValueError, match="must hold <!-- results --> once"):
        report.insert("nothing", "new", "results")


def shown(svg):
    """The words and figures of a picture; its lines are where matplotlib puts them."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_pages_show_what_the_results_hold():
    written = report.pages()
    for path, text in written.items():
        assert path.is_file(), f"{path} is not there: python -m bench.report docs"
        same = shown(path.read_text()) == shown(text) if path.suffix == ".svg" else path.read_text() == text
        assert same, f"{path.name} is older than bench/results: python -m bench.report docs"
    assert set((ROOT / "docs" / "charts").iterdir()) == {path for path in written if path.suffix == ".svg"}


def test_a_picture_holds_every_figure_and_says_where_ours_is_slower():
    lines = pictures.layer_lines(runs.Results({}, [r | {"model": "M", "layer": "q", "M": 4} for r in ROWS[:6]]))
    assert [line.label for line in lines] == ["M", "q, 4 tokens, r = 8", "q, 4 tokens, r = 64"]
    assert [(line.column, line.loss) for line in lines] == [("", False), ("0.86 ×", True), ("1.27 ×", False)]
    small = {name: spread.value for name, spread in lines[1].values.items()}
    assert small == {charts.PEFT: 1.5, charts.OURS: 1.75}
    for theme in charts.THEMES.values():
        picture = charts.svg(charts.dumbbells("title", "where", "axis", "speed-up", "floor", lines, theme))
        assert {"title", "axis", "speed-up", "floor", "0.86 ×", "1.27 ×", "PEFT"} <= set(shown(picture))
        # The one that is slower has a colour of its own.
        assert picture.count(theme.loss) == 1 and picture.count(theme.ours) >= 2


def test_pictures_of_steps_name_layers_that_share_x():
    for lines in (pictures.step_lines(runs.Results({}, ROWS)), pictures.memory_lines(runs.Results({}, ROWS))):
        assert [line.label for line in lines] == ["Model, 4 tokens, r = 8", "LoRA²", "NLoRA, grouped"]


def test_studies_are_shown_where_there_are_any(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name, marker in (("results", "results"), ("quality", "studies")):
        (tmp_path / "docs" / f"{name}.md").write_text(f"# {name}\n<!-- {marker} -->\n<!-- /{marker} -->\n")
    quality, readme = tmp_path / "docs" / "quality.md", tmp_path / "README.md"
    readme.write_text("# name\n<!-- studies -->\n<!-- /studies -->\n")
    assert "No study is kept yet." in report.pages(tmp_path)[quality]
    cell = {"method": "nlora", "rank": 8, "lr": 1e-3, "seed": 0, "metrics": {"loss": 2.5}, "trained": 7, "seconds": 1.0}
    cell |= {"tokens_per_second": 3.0, "peak_bytes": 1 << 20, "curve": []}
    study = {"metric": "loss", "higher_is_better": False, "cells": {"one": cell}}
    (tmp_path / "bench" / "results" / "quality-tiny.json").write_text(json.dumps(study))
    text = report.pages(tmp_path)[quality]
    assert "## tiny" in text and "| nlora | 8 | 0.001 | 1 | 1 | 2.5000 |" in text
    # README shows studies that have all their seeds, and of them what all have.
    assert "nlora" not in report.pages(tmp_path)[readme]
    seeds = [cell | {"seed": seed, "metrics": {"loss": 2.0 + seed}} for seed in range(3)]
    for name, methods in {"small": ("lora", "nlora"), "smaller": ("nlora",)}.items():
        every = {f"{m} {one['seed']}": one | {"method": m} for m in methods for one in seeds}
        path = tmp_path / "bench" / "results" / f"quality-{name}.json"
        path.write_text(json.dumps(study | {"cells": every}))
    text = report.pages(tmp_path)[readme]
    assert "| method | small, loss ↓ | smaller, loss ↓ |" in text and "tiny" not in text
    assert "| nlora | 3.0000 ± 1.0000 | 3.0000 ± 1.0000 |" in text and "| lora |" not in text


def test_the_roofline_has_a_roof_for_each_size_that_was_read(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    pictures.draw_roofline(runs.Results({}, ROWS), tmp_path / "x.png")
    [axes] = drawn[0].axes
    slopes = {line.get_label(): line.get_ydata()[0] / line.get_xdata()[0] for line in axes.lines[:2]}
    assert slopes == {"1 MiB read, 64 GB/s": 64.0, "64 MiB read, 1 GB/s": 1.0}
    assert [line.get_ydata()[0] for line in axes.lines[2:]] == [100.0, 120.0]


def test_without_a_checkout_the_command_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.plot, "CHECKOUT", tmp_path)
    assert cli.main(["plot", "bench", str(run)]) == 1
    assert "plot bench needs a checkout of the repository" in capsys.readouterr().err


def test_bad_files(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["plot", "bench", str(run), "--out", str(tmp_path / "file")]) == 1
    assert f"out must be a folder, got the file {tmp_path / 'file'}" in capsys.readouterr().err
    for content, message in (("{", "must be a JSON file"), ("[]", "must hold an object"), ("{}", "must hold rows")):
        (tmp_path / "x.json").write_text(content)
        assert cli.main(["plot", "bench", str(tmp_path / "x.json")]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["plot", "bench", str(tmp_path / "nowhere.json")]) == 1
