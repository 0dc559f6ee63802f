"""`make gpu-proof` without a GPU: what it runs, how it takes stages that hang and crash, and what a cut leaves."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from bench import pictures
from bench import runs as bench_runs
from bench import tables as bench_tables
from bench.gpu import bench, build, device, layers, proof, publish, stage, stress, tune
from nlora_kernels.backends import native
from python_tests import ROOT
from python_tests.cuda import emulator

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is for machines with CUDA, and needs their kernel")


def start(out, *arguments):
    command = [sys.executable, "-m", "bench.gpu.proof", "--rehearse", "--out", out, *arguments]
    return subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(out, *arguments):
    process = start(out, *arguments)
    said = process.communicate(timeout=300)[0]
    return process.returncode, said, json.loads((out / "proof.json").read_text())


def left_of(out) -> list[str]:
    """The command lines of processes that name a folder."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(out) in words:
            found.append(words)
    return found


def test_every_stage_has_cells_that_need_no_gpu_to_be_listed(tmp_path):
    class Absent(device.Gpu):
        def __init__(self):
            self.out = tmp_path

    for each in proof.STAGES:
        module, function = each.cells.split(":")
        cells = getattr(importlib.import_module(f"bench.gpu.{module}"), function)(Absent())
        assert cells and all(map(callable, cells.values())), each.name
        assert set(each.needs) <= proof.BUILDS.keys()
    names = [each.name for each in proof.STAGES]
    assert len(set(names)) == len(names)


def test_the_runner_itself_never_imports_torch():
    code = "import sys\nfrom bench.gpu import proof\nassert 'torch' not in sys.modules and proof.process.STATUSES"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_environment_names_the_folder_of_the_results():
    command = ["make", "-n", "gpu-proof", f"PYTHON={sys.executable}"]
    for out, expected in (({"OUT": "/somewhere"}, "--out /somewhere"), ({}, "--out gpu-results")):
        environment = {name: value for name, value in os.environ.items() if name != "OUT"} | out
        said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
        assert expected in said and "build_ext" not in said


def test_a_hang_and_a_crash_cost_one_cell_each(tmp_path):
    status, said, record = run(tmp_path, "--only", "hang,crash")
    assert status == 0, said
    stages = record["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {"hang": "timeout", "crash": "crashed"}
    for name, hit in (("hang", "spins"), ("crash", "dies")):
        cells = {cell: result["status"] for cell, result in stages[name]["cells"].items()}
        assert stages[name]["cells"]["before"].get("core", 0) == 0
        assert cells == {"before": "ok", hit: stages[name]["status"], "behind": "ok"}
        assert stages[name]["alive"] and stages[name]["seconds"] > 0
    assert "spinning" in stages["hang"]["last"] and "dying" in stages["crash"]["last"]
    assert not left_of(tmp_path)
    # Few files: what brings them back may take no more.
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cells.jsonl", "proof.json", "proof.log"]


def test_a_stage_that_ends_otherwise_than_it_should_fails_the_whole(tmp_path, monkeypatch):
    stages = [stage._replace(ends="ok") for stage in proof.FAULTS if stage.name == "crash"]
    options = proof.arguments(["--rehearse", "--out", str(tmp_path)])
    assert proof.Proof(options).run(stages) == 1


def test_what_does_not_fit_is_skipped(tmp_path):
    status, _, record = run(tmp_path, "--only", "hang,crash", "--limit", "5")
    assert status == 1
    assert all(stage["status"] == "skipped" and "time" in stage["why"] for stage in record["stages"].values())


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_leaves_a_record_that_can_be_read_and_gone_on_with(tmp_path, seed):
    process = start(tmp_path, "--only", "probes,hang")
    while not (tmp_path / "proof.json").is_file():
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0, 12))
    process.kill()
    process.communicate()
    record = json.loads((tmp_path / "proof.json").read_text())
    assert record["rehearsal"] and set(record["stages"]) <= {"probes", "hang"}
    # Logs of what ran are none of them: a machine may give back only a few files.
    left = {"cells.jsonl", "proof.json", "proof.partial", "proof.log", "golden"}
    assert {file.name for file in tmp_path.iterdir()} <= left
    for _ in range(100):
        if not left_of(tmp_path):
            break
        time.sleep(0.05)
    assert not left_of(tmp_path)
    if seed:
        return
    done = [line for line in (tmp_path / "cells.jsonl").read_text().splitlines() if '"status": "ok"' in line]
    status, said, record = run(tmp_path, "--only", "probes", "--resume")
    assert status == 0, said
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert lines[: len(done)] == done
    assert all(cell["status"] == "ok" for cell in record["stages"]["probes"]["cells"].values())


def test_a_stage_that_has_passed_is_not_begun_again(tmp_path, monkeypatch):
    stages = proof.STAGES + proof.FAULTS
    passed = {stage.name: {"status": stage.ends, "cells": {}} for stage in stages}
    begun = []
    monkeypatch.setattr(proof.Proof, "start", lambda self, name, *_, **__: begun.append(name) or 1 / 0)
    options = proof.arguments(["--rehearse", "--resume", "--out", str(tmp_path)])
    (tmp_path / "proof.json").write_text(json.dumps({"stages": passed}))
    assert proof.Proof(options).run(stages) == 0 and not begun
    passed["gemm"]["status"] = "failed"
    (tmp_path / "proof.json").write_text(json.dumps({"stages": passed}))
    with pytest.raises(ZeroDivisionError):
        proof.Proof(options).run(stages)
    assert begun == ["build-device"]


def test_an_interrupt_takes_the_stages_with_it(tmp_path):
    process = start(tmp_path, "--only", "hang")
    while not (tmp_path / "cells.jsonl").is_file() or "spins" not in (tmp_path / "cells.jsonl").read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert not left_of(tmp_path)


def test_a_line_that_was_cut_short_is_passed_over(tmp_path):
    file = tmp_path / "cells.jsonl"
    file.write_text('{"stage": "a", "cell": "b"}\n{"stage": "a", "ce')
    assert stage.lines_of(file) == [{"stage": "a", "cell": "b"}]


def test_a_folder_may_hold_an_extension_in_place_of_the_packages_own(tmp_path):
    """The stages that check kernels load the build in which every wait ends."""
    own = pytest.importorskip("nlora_kernels._C").__file__
    other = str(shutil.copy(own, tmp_path / "_C.so"))
    code = f"""
from bench.gpu import build, stage
build.bounded_extension = lambda: {other!r}
stage.load_bounded()
from nlora_kernels.backends import native
assert native._C.__file__ == {other!r}, native._C.__file__
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_the_extension_is_built_without_reading_pyproject():
    """An older setuptools refuses what it says of the licence."""
    code = """
import setup, setuptools
from bench.gpu import build
built = []
setup.NinjaBuild.build_extension = lambda self, extension: built.append(extension.name)
setup.NinjaBuild.copy_extensions_to_source = lambda self: None

def refuse(*_, **__):
    raise AssertionError("pyproject.toml was read")

setuptools.Distribution.parse_config_files = refuse
build.loads = lambda *_: False
build.extension(rehearse=True)
assert built == ["nlora_kernels._C"], built
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("known, built", [("these sources", False), ("other sources", True), (None, True)])
def test_an_extension_of_other_sources_is_built_anew(tmp_path, known, built):
    """What is taken to another machine has no times that say so."""
    code = f"""
import os
from pathlib import Path
import setup
from bench.gpu import build
build.ROOT, ran = Path({str(tmp_path)!r}), []
target, stamp = build.ROOT / "nlora_kernels" / f"_C{{build.SUFFIX}}", build.ROOT / "build" / "extension.sources"
for file, text in ((target, "code"), (stamp, {known!r})):
    file.parent.mkdir()
    if text:
        file.write_text(text)
setup.sources_digest, setup.extensions = lambda: "these sources", lambda: []
setup.NinjaBuild.run = lambda self: ran.append(self.inplace)
build.loads = lambda *_: True
build.extension(rehearse=False)
assert ran == [True] * {built}, ran
assert stamp.read_text() == "these sources"
"""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_what_is_taken_along_is_all_that_is_built_before():
    for build_ in (build.bounded_extension(), build.BOUNDED / "sources", emulator.BUILD / "libdevice.so"):
        assert any((ROOT / path) in (build_, *build_.parents) for path in build.PREBUILT), build_


LAUNCHED = {
    "few rows of codes": (dict(shape=(7, 64, 32, 8), coded="nested"), {"dequantise", "extended_product"}),
    "many rows of codes": (dict(shape=(512, 64, 32, 8), coded="plain"), {"dequantise", "extended_product"}),
    "a group": (dict(shape=(70, 64, 0, 16), outs=(72, 136)), {"extended_group", "extended_sum"}),
    "a core": (dict(shape=(8, 8, 1, 1), part="core"), {"core_forward", "core_backward"}),
    "the penalty and the allocator": (
        dict(shape=(0, 64, 96, 8), part="penalty"),
        {"smooth_averages", "keep_highest", "penalty_of_pair", "gradients_of_pair"},
    ),
    "one launch of few rows": (dict(shape=(70, 64, 40, 8), launches=1), {"single_launch"}),
    "two launches of many rows": (dict(shape=(4096, 64, 40, 8), launches=2), {"extended_product"}),
    "a weight": (
        dict(shape=(1, 64, 32, 8), part="nystrom"),
        {"gather_submatrices", "sum_squares", "subtract_product", "back_substitute"},
    ),
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_stages_launch_is_compiled_before(monkeypatch, name):
    pytest.importorskip("triton")
    from nlora_kernels.backends.triton import device, launch

    arguments, expected = LAUNCHED[name]
    launched = []
    monkeypatch.setattr(launch, "run", lambda kernel, *_, **arguments: launched.append((kernel.__name__, arguments)))
    monkeypatch.setattr(device, "target", lambda index: device.Device("", 90, 132, device.SHARED[90]))
    launch.forget_plans()
    try:
        build.make_call(build.Call("float16", "float16", **arguments))
    finally:
        launch.forget_plans()
    assert {kernel for kernel, _ in launched} >= expected
    products = [given["weight"] for kernel, given in launched if kernel == "extended_product"]
    assert all((type(weight) is tuple) == (name == "few rows of codes") for weight in products)


def test_every_layer_of_codes_that_is_checked_is_compiled_before():
    calls = set(build.triton_calls(False))
    for dtype in ("bfloat16", "float32"):
        for shape, nested in layers.quantised_cases(dtype == "float32", layers.QUANTISED):
            assert build.Call(dtype, dtype, shape, bias=True, coded="nested" if nested else "plain") in calls


@pytest.mark.parametrize("option", ["--kernel-name", "--kernel-regex"])
def test_a_sanitizer_looks_at_kernels_of_ours_alone(monkeypatch, option):
    monkeypatch.setattr(proof.shutil, "which", lambda *_, **__: "/bin/compute-sanitizer")
    monkeypatch.setattr(proof, "output", lambda command: f"usage: {option} FILTER")
    proof.sanitizer.cache_clear()
    try:
        assert proof.sanitizer() == ["/bin/compute-sanitizer", option, "kns=nlora"]
    finally:
        proof.sanitizer.cache_clear()


def checked_layers(out, **cells):
    stages = {"cuda layers": {"status": "failed", "cells": {cell: {"status": s} for cell, s in cells.items()}}}
    (out / "proof.json").write_text(json.dumps({"stages": stages}))


def test_a_backend_whose_layers_hung_or_crashed_is_timed_last_and_alone(tmp_path):
    machine = device.Rehearsal(tmp_path)
    assert machine.sound("cuda")
    for status in ("ok", "failed", "unfinished", "timeout", "crashed"):
        checked_layers(tmp_path, before="ok", one=status)
        assert machine.sound("cuda") == (status not in ("timeout", "crashed"))
        assert machine.sound("triton") and machine.sound("peft")
    cells = bench.alone_if_unsound(machine, ["a", "b"], ["lean", "cuda", "peft"], lambda machine, cell, names: names)
    assert {name: cell() for name, cell in cells.items()} == {
        **dict.fromkeys("ab", ["lean", "peft"]),
        **dict.fromkeys(("a, cuda alone", "b, cuda alone"), ["cuda"]),
    }
    assert list(cells)[:2] == ["a", "b"]
    assert bench.sounder(machine, ["cuda", "triton"]) == ["triton", "cuda"]


@pytest.mark.parametrize(
    "command, seconds, patience, status",
    [
        (["sleep", "60"], 0.5, 100, "unfinished"),
        (["sleep", "60"], 100, 0.5, "timeout"),
        (["sh", "-c", f"exit {stage.LEFT}"], 100, 100, "unfinished"),
        (["sh", "-c", "exit 1"], 100, 100, "failed"),
        (["sh", "-c", "kill -ABRT $$"], 100, 100, "crashed"),
    ],
)
def test_what_its_time_ends_did_not_hang(tmp_path, monkeypatch, command, seconds, patience, status):
    monkeypatch.setattr(proof, "STARTUP", 0)
    one = proof.Proof(proof.arguments(["--out", str(tmp_path)]))
    child = proof.process.start(command, open(one.out / "child.log", "w+b"), held=True)
    assert one.go(child, time.monotonic() + seconds, patience).status == status


@pytest.mark.parametrize("ends", [["ok"], ["failed"], ["crashed", "ok"]])
def test_a_stage_goes_on_behind_a_device_that_was_lost(tmp_path, monkeypatch, ends):
    """And only then another process is asked whether the device still answers."""
    one, left, asked = proof.Proof(proof.arguments(["--out", str(tmp_path)])), list(ends), []
    ended = proof.process.Ended("ok", 0.0, 0, [])

    def go(child, end, patience):
        with open(one.cells, "a") as lines:
            lines.write(json.dumps({"stage": "gemm", "cell": str(len(left)), "status": left[0]}) + "\n")
        return ended._replace(status=left.pop(0))

    monkeypatch.setattr(one, "start", lambda *_: None)
    monkeypatch.setattr(one, "go", go)
    monkeypatch.setattr(one, "alive", lambda: asked.append(True) or True)
    result = one.stage(next(each for each in proof.STAGES if each.name == "gemm"), None)
    assert not left and result["status"] == ends[0] and len(asked) == (len(ends) > 1)
    assert ("alive" in result) == (len(ends) > 1)


def test_a_cell_that_loses_the_device_crashed(tmp_path, monkeypatch):
    class Lost(device.Rehearsal):
        def answers(self):
            return False

    def fails():
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(stage.os, "abort", lambda: sys.exit("aborted"))
    file = tmp_path / "cells.jsonl"
    with pytest.raises(SystemExit):
        stage.run("a", {"fails": fails, "behind": dict}, file, Lost(tmp_path), time.monotonic() + 100)
    assert [line["status"] for line in stage.lines_of(file)[1:]] == ["crashed"]


def test_what_is_off_by_little_is_timed_all_the_same(tmp_path):
    class Budget:
        def check(self, results):
            if results["y"] > 1:
                raise AssertionError("y is off")
            return 0.25

    assert bench.checked(Budget(), {"y": torch.tensor(0.0)}) == (0.25, None)
    assert bench.checked(Budget(), {"y": torch.tensor(2.0)}) == (None, "y is off")
    with pytest.raises(AssertionError, match="y is not finite"):
        bench.checked(Budget(), {"y": torch.tensor(torch.nan)})

    def make(name, cell):
        if name == "lost":
            raise AssertionError("not finite")
        error = {"off": (None, "y is off")}.get(name, (0.25, None))
        return bench.Contender(dict, dict, *error, 0)

    with pytest.raises(bench.Wrong, match="off: y is off; lost: AssertionError: not finite") as failed:
        bench.compared(device.Rehearsal(tmp_path), make, None, ("well", "off", "lost"), 1)
    figures = failed.value.figures
    assert figures["well"]["error"] == 0.25 and figures["off"]["error"] is None and "lost" not in figures
    assert figures["off"]["us"] > 0


def test_the_residual_is_timed_without_a_graph(tmp_path, monkeypatch):
    """One of Triton's takes addresses from the host, which no graph can capture."""
    kernels = types.ModuleType("kernels")
    kernels.gather = lambda weight, rows, cols: (weight[rows], weight[rows][:, cols], weight[:, cols])
    kernels.subtract_products = lambda *_: None
    monkeypatch.setitem(sys.modules, "nlora_kernels.backends.triton.nystrom", kernels)
    machine = device.Rehearsal(tmp_path)
    monkeypatch.setattr(machine, "capture", lambda *_: pytest.fail("captured"))
    assert bench.residual(machine, "triton")["us"] > 0


def test_nvcc_is_found_where_path_does_not_name_it(monkeypatch):
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: f"{path}/{name}" if path else None)
    assert emulator.nvcc() == "/usr/local/cuda/bin/nvcc"


def test_tiles_are_kept_from_one_process_to_the_next(tmp_path):
    """Each as soon as it is measured."""
    machine, file = device.Rehearsal(tmp_path), tmp_path / "cells.jsonl"
    first, second = list(tune.cells(machine))[:2]
    with open(file, "w") as lines:
        entry = tune.cells(machine)[first]()
        lines.write(json.dumps({"stage": "tune", "cell": first, "status": "ok", **entry}) + "\n")
    (table,) = (tmp_path / "tuned").iterdir()
    assert len(json.loads(table.read_text())["entries"]) == 1
    tune.cells(machine)[second]()
    kept = json.loads(table.read_text())["entries"]
    assert [of["transposed"] for of in kept] == [True, False] and kept[0] == entry


def test_the_engine_plans_by_what_was_measured(tmp_path, monkeypatch):
    machine, told = device.Rehearsal(tmp_path), []
    monkeypatch.setattr(native, "_C", types.SimpleNamespace(cuda_set_bytes_per_cycle=told.append))
    assert machine.schedule() == {"bytes_per_cycle": "default"} and not told
    cell = {"bytes per cycle and processor": {"status": "ok", "alone": 60.0, "all": 44.5}}
    (tmp_path / "proof.json").write_text(json.dumps({"stages": {"facts": {"status": "ok", "cells": cell}}}))
    assert machine.schedule() == {"bytes_per_cycle": 44.5} and told == [44.5]


@pytest.mark.parametrize("together", [True, False])
def test_layers_that_share_x_are_timed_with_triton_where_they_are_one_call(tmp_path, monkeypatch, together):
    launch = pytest.importorskip("nlora_kernels.backends.triton.launch")
    monkeypatch.setattr(launch, "nests_descriptors", lambda: together)
    monkeypatch.setattr(bench, "emulate", lambda machine: None)
    monkeypatch.setattr(bench, "measure_group", lambda machine, cell, names: names)
    machine = device.Rehearsal(tmp_path)
    monkeypatch.setattr(machine, "pick", lambda real, rehearsed: real)
    assert all(("triton" in cell()) == together for cell in bench.groups_of_layers(machine).values())


def test_what_the_stages_have_triton_launch_alone_is_compiled_before():
    calls = set(build.triton_calls(False))
    for dtype, shape in zip(("bfloat16", "bfloat16", "float16"), stress.SHAPES, strict=True):
        assert build.Call(dtype, dtype, shape, bias=True, launches=1) in calls
    for shape in layers.TRITON_ODD:
        assert build.Call("float32", "float32", shape, bias=True) in calls


def test_what_was_measured_is_published_as_the_tables_take_it(tmp_path, monkeypatch, capsys):
    of = {"ratio": 1.05, "p20_p80": [1.04, 1.06], "us": 105.0, "eager_us": 120.0, "peak_mib": 1.5, "error": 0.001}
    layer = {"status": "failed", "base_us": 100.0, "bytes_per_cycle": 44.5, "cuda": of, "lean": of | {"error": None}}
    trained = {"status": "ok", "ms": 100.0, "ms_least_most": [99.0, 101.0], "peak_gib": 9.5}
    stages = {
        "facts": {"machine": {"status": "ok", "gpu": "NVIDIA X", "torch": "2.9"}, "copy": {"status": "failed"}},
        "bench both": {
            str(bench.BOTH[0]): {**layer, "peft": of | {"ratio": 2.1}, "flop_bound": 1.02},
            f"{bench.BOTH[1]}, cuda alone": {"status": "crashed"},
        },
        "bench groups": {str(bench.GROUPS[0]): layer},
        "train": {"peft": trained, "cuda": trained | {"ms": 50.0}, "triton": {"status": "timeout"}},
    }
    record = {"rehearsal": False, "date": "2030-01-02T03:04:05Z", "commit": "abc"}
    record["stages"] = {name: {"status": "ok", "cells": cells} for name, cells in stages.items()}
    record["stages"]["verify"] = {"status": "skipped", "why": "no time was left"}
    found = publish.results(record)
    rows = {(row["op"], row["impl"], row["shape"]): row for row in found.rows}
    shape, trio = "Llama-2-7B q_proj M=8192", "Llama-2-7B q_proj+k_proj+v_proj M=8192"
    step = "Llama-3.2-1B, 4096 tokens"
    assert set(rows) == {
        *(("both", impl, shape) for impl in ("floor", "cuda", "peft")),
        *(("forward", impl, trio) for impl in ("floor", "cuda")),
        *(("step", impl, step) for impl in ("peft", "cuda")),
    }
    assert rows["both", "cuda", shape]["speedup_vs_peft"] == rows["step", "cuda", step]["speedup_vs_peft"] == 2
    assert rows["both", "floor", shape]["gflops"] == pytest.approx(2 * 2 * 8192 * 4096**2 / 1e-4 / 1e9)
    # The tables and charts take it.
    text = bench_tables.markdown(found)
    assert "NVIDIA X" in text and "1.05 (1.04–1.06)" in text and step in text
    assert len(pictures.layer_lines(found)) == 2
    monkeypatch.setattr(publish.tables, "TUNED", tmp_path / "tiles")
    monkeypatch.setattr(publish.runs, "__file__", str(tmp_path / "runs.py"))
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "nvidia-x.json").write_text("{}")
    (tmp_path / "proof.json").write_text(json.dumps(record))
    publish.main(str(tmp_path))
    assert (tmp_path / "tiles" / "nvidia-x.json").is_file()
    assert len(bench_runs.load(tmp_path / "results" / "nvidia-x-sm_90.json").rows) == len(rows)
    (tmp_path / "proof.json").write_text(json.dumps({"rehearsal": True}))
    with pytest.raises(SystemExit, match="rehearsal"):
        publish.main(str(tmp_path))
