"""The doctor: useful on every machine, and never silent about what is wrong."""

import json
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import nlora_kernels as nk
from nlora_kernels import backends, cache, cli
from nlora_kernels.backends import verified
from nlora_kernels.backends.cpu import PLANS
from nlora_kernels.backends.triton.tuning import tables
from nlora_kernels.cli import doctor
from python_tests import ROOT

built = pytest.mark.skipif(backends.native._C is None, reason="the package was built without C++ kernels")


@pytest.fixture
def light(monkeypatch):
    """Leaves the import of PEFT out, which takes seconds."""
    monkeypatch.setitem(sys.modules, "peft", None)


def run_without(modules, *arguments, **environment):
    code = (
        f"import sys\nfor name in {modules!r}: sys.modules[name] = None\n"
        f"from nlora_kernels import cli\nsys.exit(cli.main(['doctor', *{list(arguments)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), **environment}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


EVERYTHING = ("nlora_kernels._C", "peft", "transformers", "safetensors", "matplotlib", "triton", "pytest_benchmark")


@pytest.mark.parametrize("blocked", [("nlora_kernels._C",), ("peft",), ("matplotlib",), ("triton",), EVERYTHING])
def test_a_report_without_what_is_missing(blocked):
    done = run_without(blocked, "--json", "--shape", "64", "48", "32", "4", PATH="")
    found = json.loads(done.stdout)
    assert done.returncode == (1 if found["problems"] else 0)
    said = "\n".join(found["notes"] + found["problems"])
    text = doctor.text(found)
    for name in blocked:
        if name == "nlora_kernels._C":
            assert "no C++ kernels" in said and "install g++ first" in said and "not built" in text
            assert found["backends"]["cpu"]["unavailable"]
            assert done.returncode == 1
        else:
            assert f"without {name}" in said and found["versions"][name] is None
    assert found["build"]["compilers"] == {} and "compilers        none" in text
    # Whatever is missing, a layer runs.
    assert found["layer"]["backend"] in ("cpu", "lean", "triton", "cuda")
    assert "a layer of M=64 K=48 N=32 R=4" in text


def test_the_text_names_every_backend_and_what_it_can(light, capsys):
    status = cli.main(["doctor"])
    out = capsys.readouterr().out
    section = out.partition("backends, in order of preference\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in section.splitlines() if line[2] != " "] == list(backends.TABLE)
    for name, reason in backends.available().items():
        line = next(line for line in section.splitlines() if line.split()[0] == name)
        assert (reason in line) if reason else ("ready on cpu: float32" in line or "ready on cuda" in line)
    assert status == (1 if "problems\n" in out else 0)


def test_a_backend_that_computes_wrong_is_found(light, monkeypatch, capsys):
    right = backends.TABLE["lean"].forward

    def wrong(call):
        y, T = right(call)
        # The last element alone, and by a little.
        y[-1, -1] += 0.01
        return y, T

    monkeypatch.setattr(backends.TABLE["lean"], "forward", wrong)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "backend 'lean' on cpu, float32: wrong results: y is off by" in out
    assert "backend 'reference'" not in out
    monkeypatch.setattr(backends.TABLE["lean"], "forward", lambda *_: 1 / 0)
    assert any("ZeroDivisionError" in problem for problem in doctor.report()["problems"])


@built
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 64, 48, 4), (512, 64, 48, 8), (512, 64, 48, 128)])
def test_the_path_of_a_layer_is_the_one_it_takes(light, monkeypatch, shape, dtype):
    layer = doctor.report(shape, dtype)["layer"]
    taken = []
    select = backends.select

    def watched(*args):
        taken.append(select(*args))
        return taken[-1]

    monkeypatch.setattr(backends, "select", watched)
    M, K, N, R = shape
    x, weight = torch.randn(M, K).to(doctor.DTYPES[dtype]), torch.randn(N, K).to(doctor.DTYPES[dtype])
    nk.lora_linear(x, weight, torch.randn(R, K), torch.randn(N, R), torch.randn(R, R))
    assert taken == [backends.TABLE[layer["backend"]]]
    assert layer["path"] in PLANS.values() and layer["passed_over"] == {}
    assert layer["adapter_dtype"] == "float32"


def test_every_plan_is_described():
    shapes = [(M, 768, 768, R) for M in (1, 16, 17, 4096) for R in (1, 32, 33, 256)]
    for dtype in ("float32", "bfloat16", "float16"):
        if backends.native._C:
            assert {backends.TABLE["cpu"].plan(doctor.DTYPES[dtype], *shape).way for shape in shapes} <= PLANS.keys()


def test_what_was_passed_over_has_a_reason(light):
    layer = doctor.report((4, 8, 8, 2), "float64")["layer"]
    assert layer["backend"] == "lean"
    assert (
        "must be float32, bfloat16 or float16" in layer["passed_over"]["cpu"] or "built" in layer["passed_over"]["cpu"]
    )


def test_a_named_backend_is_told_and_checked(light, prefer):
    prefer("reference")
    found = doctor.report((4, 8, 8, 2))
    assert found["layer"]["backend"] == "reference"
    assert found["layer"]["passed_over"]["lean"] == "NLORA_BACKEND=reference"
    assert any("NLORA_BACKEND=reference takes the choice away" in note for note in found["notes"])
    # As the variable may have it. By hand, for what monkeypatch undoes after the fixture would be preferred for good.
    backends._preferred = "fastest"
    found = doctor.report((4, 8, 8, 2))
    assert found["layer"]["backend"] is None
    assert any("must be one of cpu" in problem for problem in found["problems"])
    assert "takes            nothing" in doctor.text(found)


def test_traps(light, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "axolotl", sys)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    found = doctor.report()
    assert any("axolotl is loaded" in problem for problem in found["problems"])
    assert any("under FSDP" in note for note in found["notes"])

    config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cli.main(["doctor", "--model", str(tmp_path)]) == 1
    assert "is quantised (gptq)" in capsys.readouterr().out
    assert cli.main(["doctor", "--model", str(tmp_path / "nowhere")]) == 1
    assert "must be a folder with a config.json" in capsys.readouterr().err

    class Quantised(nn.Linear):
        pass

    model = nn.Sequential(nk.NLoraLinear.from_linear(nn.Linear(8, 8), 2), nn.ReLU())
    assert not any("cannot be fused" in problem for problem in doctor.report(model=model)["problems"])
    model[0].base.__class__ = Quantised
    assert any("layer 0 cannot be fused: its type is" in problem for problem in doctor.report(model=model)["problems"])


def test_tuned_tables_are_listed(light, monkeypatch, tmp_path):
    """Those of the user's cache folder, then those of the package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    mine = tmp_path / "nlora_kernels" / "tuned" / "nvidia-x.json"
    mine.parent.mkdir(parents=True)
    mine.write_text(json.dumps({"device": "NVIDIA X", "entries": [{}, {}]}))
    (tmp_path / "nvidia-x.json").write_text(json.dumps({"device": "NVIDIA X", "entries": [{}]}))
    monkeypatch.setattr(tables, "TUNED", tmp_path)
    found = doctor.report()
    assert [(t["device"], t["entries"], t["in_use"]) for t in found["tuned"]] == [
        ("NVIDIA X", 2, False),
        ("NVIDIA X", 1, False),
    ]
    assert "NVIDIA X: 2 entries" in doctor.text(found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA Y")
    notes = []
    doctor._tuned(notes, [])
    assert notes == ["no measured tiles for NVIDIA Y: the rule chooses"]


@pytest.fixture
def gpu(light, monkeypatch, tmp_path):
    """A GPU on which backends of ours could run; no tensor is made there."""
    properties = SimpleNamespace(
        name="NVIDIA X", major=9, minor=0, multi_processor_count=132, total_memory=2**37, L2_cache_size=0
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA X")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    for name in backends.ON_GPU:
        monkeypatch.setattr(backends.TABLE[name], "unavailable", lambda: None)
    monkeypatch.setattr(doctor, "_backends", lambda problems: {})
    backends.forget()
    yield
    monkeypatch.undo()
    backends.forget()


def store_record(results, **changed):
    identity = verified.identity(0) | changed
    record = {"identity": identity, "written": "2026-11-27T12:00:00+00:00", "results": results, "times": []}
    cache.write(verified.file_of(identity), json.dumps(record))
    backends.forget()


def test_fused_kernels_await_verify_in_one_line(gpu):
    found = doctor.report()
    await_it = [line for line in doctor.text(found).splitlines() if "await" in line]
    assert await_it == [
        "  - fused kernels await `python -m nlora_kernels verify` on NVIDIA X: until it has passed, library calls "
        "compute there"
    ]
    assert found["verified"] == []


def test_the_record_of_a_gpu_is_shown(gpu):
    results = [
        {"backend": "cuda", "dtype": "bfloat16", "status": "passed", "reason": "", "seconds": 9.0},
        {
            "backend": "triton",
            "dtype": "float16",
            "status": "timeout",
            "reason": "it was ended after 40 s",
            "seconds": 40,
        },
    ]
    store_record(results, driver="550.1")
    found = doctor.report()
    assert [entry["holds"] for entry in found["verified"]] == [False]
    assert any("again on NVIDIA X: since the last time driver was 550.1" in note for note in found["notes"])
    store_record(results)
    found = doctor.report()
    assert sorted(entry["holds"] for entry in found["verified"]) == [False, True]
    assert not any("await" in note for note in found["notes"])
    text = doctor.text(json.loads(json.dumps(found)))
    assert "  NVIDIA X, 2026-11-27T12:00:00+00:00\n" in text
    assert "  NVIDIA X, 2026-11-27T12:00:00+00:00, of another driver or package: not in force\n" in text
    assert "    cuda bfloat16: passed\n" in text and "    triton float16: timeout, it was ended after 40 s\n" in text


def test_damaged_files_are_named(gpu, tmp_path):
    verified.file_of(verified.identity(0)).parent.mkdir(parents=True)
    verified.file_of(verified.identity(0)).write_text("{")
    table = tmp_path / "nlora_kernels" / "tuned" / "nvidia-x.json"
    for text in ("[]", '{"entries": 7}', "{"):
        cache.write(table, text)
        found = doctor.report()
        assert any(f"{table} is no table of tiles, and is passed over" in problem for problem in found["problems"])
        tables.entries.cache_clear()
        with pytest.warns(UserWarning, match="is no table of tiles"):
            assert tables.entries("NVIDIA X") == ()
    tables.entries.cache_clear()
    assert any("is no record of `verify`, and is passed over" in note for note in found["notes"])
    assert any("await" in note for note in found["notes"])


def test_without_kernels_for_a_gpu_nothing_awaits_verify(gpu, monkeypatch):
    for name in backends.ON_GPU:
        monkeypatch.setattr(backends.TABLE[name], "unavailable", lambda: "not built")
    assert not any("await" in note for note in doctor.report()["notes"])


def test_bad_arguments(capsys):
    assert cli.main(["doctor", "--shape", "4", "8", "8", "0"]) == 1
    assert "R must be at least 1, got 0" in capsys.readouterr().err
    assert cli.main(["doctor", "--shape", "4", "8", "8", "2", "--dtype", "int8"]) == 1
    assert "dtype must be one of float32" in capsys.readouterr().err
    assert cli.main(["doctor", "--dtype", "foo"]) == 1
    assert "--dtype is that of a layer: give its --shape too" in capsys.readouterr().err
    with pytest.raises(ValueError, match="dtype must be one of float32"):
        doctor.report(dtype="foo")
    with pytest.raises(SystemExit) as exit:
        cli.main(["doctor", "--shape", "4"])
    assert exit.value.code == 2


def test_an_old_or_broken_package_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "0.20.9" if name == "peft" else "99")

    def broken(name):
        raise RuntimeError("no such symbol")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    problems = []
    doctor._versions([], problems)
    assert "peft must be 0.21 or newer, got 0.20.9" in problems
    assert "nlora_kernels.peft cannot be imported: RuntimeError: no such symbol" in problems


def test_the_oldest_versions_are_those_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    stated = " ".join(extras["peft"] + extras["triton"])
    required = dict(re.findall(r"(\w+)>=([\d.]+)", stated))
    assert {name: oldest for name, oldest in doctor.OLDEST.items() if name != "torch"} == required
    assert f"torch {doctor.OLDEST['torch']} to" in (ROOT / "README.md").read_text()


def test_the_path_of_a_layer_through_triton():
    pytest.importorskip("triton")
    variables = {"TRITON_INTERPRET": "1", "NLORA_BACKEND": "triton"}
    done = run_without(("peft",), "--json", "--shape", "64", "48", "32", "4", **variables)
    layer = json.loads(done.stdout)["layer"]
    assert layer["backend"] == "triton" and "launches, tiles of" in layer["path"]
    # Those before it in the table could run, or say why they cannot.
    assert list(layer["passed_over"]) == ["cpu", "cuda"]
    assert layer["passed_over"]["cpu"] == "NLORA_BACKEND=triton" or "built" in layer["passed_over"]["cpu"]
