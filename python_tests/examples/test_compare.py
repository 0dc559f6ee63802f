"""examples/compare.py and `plot study`: the runs it makes, how it goes on, and the numbers of its report."""

import json
import statistics
import subprocess
import sys

import pytest

from nlora_kernels import cli, study
from python_tests import ROOT

pytest.importorskip("peft")
pytest.importorskip("sklearn")
sys.path.insert(0, str(ROOT / "examples"))
import compare  # noqa: E402

from .test_glue import model, write  # noqa: E402, F401


@pytest.fixture
def argv(model, tmp_path):  # noqa: F811
    data = write(tmp_path / "data", "sst2")
    own = [tmp_path / "out" / "study.json", "--methods", "lora", "sora", "--factors", "1", "3", "--seeds", "0", "1"]
    shared = ["--task", "sst2", "--data", data, "--model", model, "--steps", "2", "--batch-size", "4"]
    return list(map(str, [*own, "--ranks", "2", "--", *shared]))


def test_a_study_from_its_runs_to_its_figures(argv, tmp_path, capsys, monkeypatch):
    """Real processes, stopped after three and gone on with."""
    original, count = compare.run, 0

    def stopped(cell, args):
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return original(cell, args)

    argv[argv.index("--factors") : argv.index("--seeds")] = ["--factors", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(compare, "run", stopped)
        assert compare.main(argv) == 130
    assert "stopped with 2 of 4 runs; the same command goes on" in capsys.readouterr().err
    file = tmp_path / "out" / "study.json"
    assert len(json.loads(file.read_text())["cells"]) == 2
    assert compare.main([argv[0], "--check", "1", *argv[1:]]) == 0
    out = capsys.readouterr().out
    assert "lora rank=2 lr=0.002 seed=0: the same numbers again" in out
    kept = json.loads(file.read_text())
    # Results are published: they do not say where files were.
    assert str(tmp_path) not in file.read_text()
    assert len(kept["cells"]) == 4 and kept["metric"] == "accuracy" and kept["higher_is_better"]
    for name in ("study.md", "study-curves.png", "study-forest.png"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    # Other arguments would be another study.
    with pytest.raises(SystemExit, match="is a study with arguments .* take another"):
        compare.main([*argv, "--max-length", "9"])


def test_every_method_has_the_same_number_of_rates(argv):
    args = compare.parse_args(argv)
    every = compare.cells(args, args.seeds)
    assert len(every) == len(set(every)) == 8
    assert {cell.lr for cell in every if cell.method == "lora"} == {2e-3, 6e-3}
    # Whole methods at one seed come first.
    assert [cell.seed for cell in every] == [0] * 4 + [1] * 4


def test_rates_are_searched_on_the_first_seeds_alone(argv, tmp_path, monkeypatch, capsys):
    """The best of the search runs on the further seeds, whatever another rate would come to there."""
    ran = []

    def run(cell, args):
        ran.append(cell)
        return one(cell.method, cell.lr, cell.seed, cell.lr if cell.method == "lora" else float("nan"), rank=cell.rank)

    monkeypatch.setattr(compare, "run", run)
    argv = [argv[0], "--search-seeds", "1", *argv[1:]]
    argv[argv.index("--seeds") + 3 : argv.index("--ranks")] = ["2"]
    assert compare.main(argv) == 0
    further = [(cell.method, cell.lr, cell.seed) for cell in ran[4:]]
    assert further == [("lora", 6e-3, 1), ("sora", 2e-3, 1), ("lora", 6e-3, 2), ("sora", 2e-3, 2)]
    lora, _ = study.rows(study.load(tmp_path / "out" / "study.json"))
    assert lora.values == [6e-3] * 3 and lora.rates == {2e-3: 1, 6e-3: 3}
    text = (tmp_path / "out" / "study.md").read_text()
    assert "The rates were tried on 1 seed, the others ran at the best." in text
    # Nothing is left to run.
    assert compare.main(argv) == 0 and len(ran) == 8
    capsys.readouterr()


def test_the_oldest_runs_are_checked(argv, tmp_path, monkeypatch, capsys):
    """Those of a study that was gone on with are of what the package was before."""
    made = 0.5

    def run(cell, args):
        return one(cell.method, cell.lr, cell.seed, made, rank=cell.rank, machine={})

    monkeypatch.setattr(compare, "run", run)
    first = list(argv)
    first[first.index("lora") : first.index("--factors")] = ["sora"]
    assert compare.main(first) == 0
    made = 0.6
    assert compare.main([argv[0], "--check", "1", *argv[1:]]) == 1
    assert "sora rank=2 lr=0.002 seed=0: OTHER NUMBERS" in capsys.readouterr().out


def test_every_run_has_the_plans_that_are_built_in(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("HF_HOME", raising=False)
    found = compare.environment(1)
    assert found["HF_HOME"] == str(tmp_path / "huggingface") and found["OMP_NUM_THREADS"] == "1"
    code = "import torch; from nlora_kernels.backends.cpu import plans\n"
    code += "print(plans.costs(plans.setting(torch.float32)).written)"
    done = subprocess.run([sys.executable, "-c", code], env=found, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "None"


def one(method, lr, seed, value, **more):
    options = {"metrics": {"accuracy": value}, "trained": 1000, "seconds": 2.0, "tokens_per_second": 50.0}
    options["others"] = 0.0
    options |= {"peak_bytes": 2**20, "curve": [[1, 2.0 + seed], [2, 1.0]], "rank": 8}
    return {"method": method, "lr": lr, "seed": seed, **options, **more}


def test_the_table_has_the_best_rate_its_mean_and_its_spread(tmp_path, capsys):
    values = {1e-3: [0.5, 0.6, 0.7], 1e-2: [0.8, 0.9, 0.7], 1e-1: [0.99]}
    runs = [one("lora", lr, seed, value) for lr, found in values.items() for seed, value in enumerate(found)]
    runs.append(one("nlora", 1e-2, 0, 0.4))
    content = {"metric": "accuracy", "higher_is_better": True, "cells": dict(enumerate(runs))}
    file = tmp_path / "s.json"
    file.write_text(json.dumps(content))
    lora, nlora = study.rows(study.load(file))
    # One lucky seed of a third rate is not better than three of another.
    assert (lora.lr, lora.rates, lora.values) == (1e-2, {1e-3: 3, 1e-2: 3, 1e-1: 1}, [0.8, 0.9, 0.7])
    assert lora.mean == pytest.approx(0.8) and lora.sd == pytest.approx(statistics.stdev(values[1e-2]))
    assert nlora.values == [0.4] and nlora.cells_of_table()[6] == ""
    assert cli.main(["plot", "study", str(file), "--out", str(tmp_path / "figures")]) == 0
    table = (tmp_path / "figures" / "s.md").read_text()
    assert "| lora | 8 | 0.01 | 3 | 3 | 0.8000 | 0.1000 | 1,000 | 1,000 | 2.0 | 50 | 1 |" in table
    assert "↑" not in table
    content["higher_is_better"] = False
    lora, nlora = study.rows(content)
    # Nothing smaller was tried; of a single rate there is no more to say.
    assert lora.lr == 1e-3 and lora.cells_of_table()[2] == "0.001 ↓" and nlora.cells_of_table()[2] == "0.01"
    assert "may be better" in study.markdown(content)
    capsys.readouterr()


def test_every_method_is_set_against_lora_seed_by_seed():
    values = {"nlora": [0.6, 0.7, 0.9], "lora": [0.5, 0.6, 0.7], "inttune": [0.3, 0.3, 0.3], "lora2": [0.4, 0.65, 0.7]}
    runs = [one(name, 1e-3, seed, value) for name, found in values.items() for seed, value in enumerate(found)]
    content = {"metric": "accuracy", "higher_is_better": True, "cells": dict(enumerate(runs))}
    lora, nlora, _, lora2 = study.rows(content)
    assert (lora.method, nlora.method, lora2.method) == ("lora", "nlora", "lora2")
    assert nlora.less(lora) == pytest.approx([0.1, 0.1, 0.2])
    differences = [line[study.HEADER.index("less lora's")] for line in study.table(study.rows(content))]
    assert differences == ["", "+0.1333 ± 0.0577", "-0.3000 ± 0.1000", "-0.0167 ± 0.0764"]
    said = "Against lora, seed by seed: ahead on every seed: nlora (by more than lora's sd); behind on every seed: "
    said += "inttune (by more than lora's sd); now ahead, now behind: lora2."
    assert said in study.markdown(content)
    # Of a loss less is better.
    content["higher_is_better"] = False
    assert "ahead on every seed: inttune" in study.markdown(content)


def test_times_of_a_busy_machine_are_no_figures():
    content = {"metric": "accuracy", "higher_is_better": True}
    content["cells"] = {n: one("lora", 1e-3, n, 0.5, others=others) for n, others in enumerate((0.0, 0.4))}
    assert "| 2.0 | 50 |" not in study.markdown(content) and "Seconds are left out" in study.markdown(content)
    content["cells"][1]["others"] = 0.05
    assert "| 2.0 | 50 |" in study.markdown(content) and "Seconds" not in study.markdown(content)
    # What does not say is not known to be quiet.
    del content["cells"][0]["others"]
    assert "| 2.0 | 50 |" not in study.markdown(content)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "dora"], "argument --methods: invalid choice: 'dora'"),
        (["--script", "finetune", "--methods", "bitfit"], "argument --methods: bitfit is not for --script finetune"),
        (["--", "--task", "sst2", "--data", "x", "--lr=1"], "after -- must be what all runs share, got --lr"),
        (["--", "--task", "wnli", "--data", "x"], "argument --task: invalid choice: 'wnli'"),
        (["--jobs", "0"], "argument --jobs: must be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        compare.main([str(tmp_path / "study.json"), *argv])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_run_that_fails_is_named_and_the_others_are_kept(argv, tmp_path):
    (tmp_path / "data" / "SST-2" / "train.tsv").unlink()
    with pytest.raises(SystemExit, match=r"lora rank=2 lr=0.002 seed=0: --data must be a folder with SST-2's"):
        compare.main(argv)


def test_files_that_hold_no_study(tmp_path, capsys):
    file = tmp_path / "s.json"
    for content, message in (
        ("[]", "must hold a"),
        ('{"metric": "a", "higher_is_better": 1, "cells": {}}', "none"),
    ):
        file.write_text(content)
        assert cli.main(["plot", "study", str(file)]) == 1
        assert message in capsys.readouterr().err
