"""`python -m nlora_kernels verify`: its verdict over children that are right, wrong, silent, dead or lie."""

import base64
import contextlib
import gc
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nlora_kernels import backends, cache, cli, process
from nlora_kernels.backends import REFERENCE, TABLE, verified
from nlora_kernels.cli import verify
from nlora_kernels.cli.verify import cases, child, machine, protocol, timing
from python_tests import ROOT

IDENTITY = {"gpu": "NVIDIA Fake", "capability": "9.0", "driver": "1.0", "torch": "2", "triton": "3"}
# What the stand-in of a GPU can run: "lean" in the place of kernels of ours, for it is right on every machine.
DTYPES = (torch.float32,)


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """An empty cache folder, and the sizes of rehearsal."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verify, "REAL", cases.REHEARSED)
    monkeypatch.setattr(verify, "COMPILED_AT_USE", ())
    yield
    backends.forget()


@pytest.fixture(scope="module")
def honest():
    """A task and the lines that a child truly reports for it; made once."""
    task = {"nonce": "0123456789abcdef" * 2, "gpu": 0, "rehearse": True, "backend": "lean", "dtype": "float32"}
    lines = []
    child.main(task, lines.append)
    return task, json.loads(json.dumps(lines))


def judged(task, lines, **identity):
    asked = cases.cases_of(task["backend"], task["dtype"], cases.REHEARSED)
    trial = verify.Trial(task, process.Ended("ok", 1000.0, 0, []), lines)
    return verify.judge(trial, asked, cases.REHEARSED, machine.Host().identity() | identity)


def changed(lines, kind, change):
    """The lines with one case of a kind changed."""
    lines = json.loads(json.dumps(lines))
    line = next(line for line in lines[1:] if line["case"].startswith(kind))
    change(line)
    return lines


def test_an_honest_report_passes(honest):
    task, lines = honest
    times = judged(task, lines)
    assert {t["operation"] for t in times} == {"forward", "backward", "lora2_core"}
    assert all(t["backend"] == "lean" and t["us"] > 0 and t["lean_us"] > 0 for t in times)
    methods = {line["case"].split()[1] for line in lines[1:] if line["case"].startswith("budget")}
    assert methods == set(cases.METHODS) - {"dropout", "group", "four_bits"}


def test_every_method_shape_and_kind_is_asked_for():
    for backend in backends.ON_GPU:
        for dtype in TABLE[backend].proved_for:
            asked = cases.cases_of(backend, verified.short(dtype), cases.REAL)
            assert len({case.name for case in asked}) == len(asked)
            budgets = [case for case in asked if case.kind == "budget"]
            assert len({case.shape for case in budgets}) >= 12
            able = {"dropout": TABLE[backend].drops_inside, "experts": cases.takes_experts(backend)}
            able |= {"group": cases.takes_groups(backend), "four_bits": cases.decodes(backend)}
            assert able["group"] and able["experts"] == able["four_bits"] == (backend == "triton")
            assert {case.detail for case in budgets} == {m for m in cases.METHODS if able.get(m, True)}
            assert able["experts"] == any(case.detail == "experts" and case.kind == "time" for case in asked)
            assert {case.adapter for case in budgets} == {"float32", verified.short(dtype)}
            assert {case.kind for case in asked} == {"witness", "budget", "repeats", "replay", "time"}
            # Most of it no backend may refuse.
            assert sum(not case.optional for case in budgets) >= 8 * 5
    assert cases.REAL.runs == 200


def test_what_a_backend_can_initialise_is_asked_for():
    for backend in backends.ON_GPU:
        nystrom = ROOT / "nlora_kernels" / "backends" / backend / "nystrom.py"
        more = {"rows": "squared_norms", "cols": "squared_norms", "solution": "solve_triangular"}
        there = {result for result, function in more.items() if f"def {function}(" in nystrom.read_text()}
        asked = [c for c in cases.cases_of(backend, "float16", cases.REAL) if c.detail == "initialisation"]
        assert asked and all(case.results == {"A", "N", "B", "weight"} | there for case in asked)


def test_kernels_that_train_lora2_are_asked_for_where_there_are_some():
    for backend in backends.ON_GPU:
        asked = [c for c in cases.cases_of(backend, "float16", cases.REAL) if c.detail == "lora2_training"]
        assert len(asked) == (len(cases.REAL.trained) if backend == "triton" else 0)
        # As `lora2` looks for them in the record.
        assert all(c.kind == "time" and c.adapter == "float16" and max(c.shape[:2]) <= 32 for c in asked)


def test_kernels_that_decode_four_bits_are_asked_for_as_they_are_chosen():
    """In products of few rows, nested scales too, and as a whole, where there are more."""
    from nlora_kernels.backends.triton.tuning import FEW_ROWS

    asked = [c for c in cases.cases_of("triton", "bfloat16", cases.REAL) if c.detail in ("four_bits", "decode")]
    few = [c for c in asked if c.detail == "four_bits" and c.shape[0] <= FEW_ROWS]
    assert {c.kind for c in few} == {"budget", "repeats", "replay"} and len({c.shape[0] % 2 for c in few}) == 2
    assert any(c.kind == "budget" and c.shape[0] > FEW_ROWS for c in asked)
    timed = [c for c in cases.cases_of("triton", "bfloat16", cases.REAL) if c.detail.startswith("coded_")]
    assert {(c.detail, c.adapter) for c in timed} == {
        (f"coded_{op}", adapter) for op in ("forward", "backward") for adapter in ("float32", "bfloat16")
    }
    assert all(c.shape[0] <= FEW_ROWS for c in timed) and "decode" in {c.detail for c in asked}


def test_wrong_codes_are_found(monkeypatch):
    """One value, in the product's budget and in the weight as a whole."""
    right, sizes = TABLE["lean"].decode, cases.REHEARSED

    def wrong(weight, out=None):
        found = right(weight, out)
        found[-1, -1] += 0.5
        return found

    # "lean" decodes as a whole what it is given, as a backend does that has a kernel for it.
    monkeypatch.setattr(type(TABLE["lean"]), "reads_quantised", lambda *_: False)
    shape = sizes.coded[0]
    product = cases.Case("budget", "four_bits", shape, "float32")
    whole = cases.Case("time", "decode", (1, *shape[1:3], 1), "float32")
    expected = contextlib.nullcontext(), pytest.raises(ValueError, match="is off by")
    for decode, found in zip((right, wrong), expected, strict=True):
        monkeypatch.setattr(TABLE["lean"], "decode", decode)
        for case in (product, whole):
            figures = child.run(case, "lean", "float32", machine.Host(), sizes, 0)
            with found:
                verify._judge_case(case, figures, sizes, {})


def test_what_is_optional_is_what_the_backends_refuse():
    """By shape alone: a backend that refuses what it should take does not pass."""
    for case in cases.cases_of("cuda", "bfloat16", cases.REAL):
        if case.kind != "time":
            reason = child._refusal(case, "cuda", "bfloat16", torch.device("cpu"))
            by_shape = "multiple of 8" in reason or "r must be at most" in reason
            assert by_shape == case.optional, (case, reason)


LIES = {
    "nothing": lambda task, lines: [],
    "no cases": lambda task, lines: lines[:1],
    "a case is missing": lambda task, lines: lines[:4] + lines[5:],
    "a case twice": lambda task, lines: lines + lines[-1:],
    "another case": lambda task, lines: lines + [lines[-1] | {"case": "budget of something"}],
    "an old report": lambda task, lines: [lines[0] | {"nonce": "f" * 32}, *lines[1:]],
    "no nonce": lambda task, lines: [{}, *lines[1:]],
    "a list": lambda task, lines: [[], *lines[1:]],
    "lines that are no cases": lambda task, lines: [lines[0], 7, *lines[1:]],
    "a number for a name": lambda task, lines: [lines[0], {"case": 7}, *lines[1:]],
    "no figures": lambda task, lines: changed(lines, "budget", lambda line: line.pop("errors")),
    "no seconds": lambda task, lines: changed(lines, "budget", lambda line: line.pop("seconds")),
    "one result less": lambda task, lines: changed(lines, "budget", lambda line: line["errors"].pop("dx")),
    "errors of nothing": lambda task, lines: changed(lines, "budget", lambda line: line.update(errors={})),
    "an error too large": lambda task, lines: changed(lines, "budget", lambda line: line["errors"]["dx"][1].reverse()),
    "an error of NaN": lambda task, lines: changed(
        lines, "budget", lambda line: line["errors"].update(y=[[math.nan, 1.0]] * 2)
    ),
    "a budget of infinity": lambda task, lines: changed(
        lines, "budget", lambda line: line["errors"].update(y=[[1.0, math.inf]] * 2)
    ),
    "a negative error": lambda task, lines: changed(
        lines, "budget", lambda line: line["errors"].update(y=[[-1.0, 1.0]] * 2)
    ),
    "True for an error": lambda task, lines: changed(
        lines, "budget", lambda line: line["errors"].update(y=[[False, True]] * 2)
    ),
    "one norm": lambda task, lines: changed(lines, "budget", lambda line: line["errors"].update(y=[[0.0, 1.0]])),
    "errors as text": lambda task, lines: changed(lines, "budget", lambda line: line["errors"].update(y="fine")),
    "refused without need": lambda task, lines: changed(
        lines, "budget slora 23x", lambda line: line.update(refused="it does not like it")
    ),
    "fewer runs": lambda task, lines: changed(lines, "repeats", lambda line: line.update(runs=1)),
    "elements differ": lambda task, lines: changed(lines, "repeats", lambda line: line.update(differing=1)),
    "a graph differs": lambda task, lines: changed(lines, "replay", lambda line: line.update(differing=3)),
    "no time": lambda task, lines: changed(lines, "time", lambda line: line.update(us=0.0)),
    "a time of NaN": lambda task, lines: changed(lines, "time", lambda line: line.update(lean_us=math.nan)),
    "more time than there was": lambda task, lines: changed(lines, "time", lambda line: line.update(us=1e9)),
    "timed and wrong": lambda task, lines: changed(
        lines, "time forward", lambda line: line["errors"].update(y=[[2.0, 1.0]] * 2)
    ),
    "longer than it ran": lambda task, lines: changed(lines, "budget", lambda line: line.update(seconds=2000.0)),
    "no witness": lambda task, lines: changed(lines, "witness", lambda line: line.update(outputs={})),
    "a witness of zeros": lambda task, lines: changed(
        lines, "witness", lambda line: [zeroed(stored) for stored in line["outputs"].values()]
    ),
    "a witness of another shape": lambda task, lines: changed(
        lines, "witness", lambda line: line["outputs"]["y"].update(shape=[80, 37])
    ),
    "a witness of another dtype": lambda task, lines: changed(
        lines, "witness", lambda line: line["outputs"]["y"].update(dtype="int32")
    ),
    "a witness of no dtype": lambda task, lines: changed(
        lines, "witness", lambda line: line["outputs"]["y"].update(dtype="nn")
    ),
    "a witness that is no data": lambda task, lines: changed(
        lines, "witness", lambda line: line["outputs"]["y"].update(data="%%")
    ),
    "a witness of less data": lambda task, lines: changed(
        lines, "witness", lambda line: line["outputs"]["y"].update(data="AAAA")
    ),
}


def zeroed(stored):
    stored["data"] = base64.b64encode(bytes(len(base64.b64decode(stored["data"])))).decode()


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_no_proof(honest, lie):
    task, lines = honest
    with pytest.raises(ValueError):
        judged(task, LIES[lie](task, lines))


def test_the_witness_of_other_data_is_no_proof(honest):
    """What was right for one nonce is not for the next: results cannot be prepared."""
    task, lines = honest
    task = task | {"nonce": "f" + task["nonce"][1:]}
    with pytest.raises(ValueError, match="witness .*: computed again, .* is off by"):
        judged(task, [lines[0] | {"nonce": task["nonce"]}, *lines[1:]])


def test_a_report_of_another_machine_is_no_proof(honest):
    task, lines = honest
    with pytest.raises(ValueError, match="another machine"):
        judged(task, lines, driver="2.0")


@pytest.mark.parametrize("operation, result", [("forward", 0), ("backward", "lora_A"), ("backward", "x")])
@pytest.mark.parametrize("by", [0.01, math.nan])
def test_kernels_that_are_wrong_are_found_twice(monkeypatch, operation, result, by):
    """One element, by a little: by the figures of the child, and by the parent from the witness."""
    right = getattr(REFERENCE, operation)

    def wrong(*args):
        results = right(*args)
        t = results[0] if operation == "forward" else getattr(results, result)
        t[-1, -1] += by
        return results

    monkeypatch.setattr(REFERENCE, operation, wrong)
    task = {"nonce": "a" * 32, "backend": "reference", "dtype": "float32"}
    sizes = cases.REHEARSED
    asked = cases.cases_of("reference", "float32", sizes)
    for kind in ("witness", "budget", "time"):
        case = next(c for c in asked if c.kind == kind and c.detail in ("nlora", operation))
        figures = child.run(case, "reference", "float32", machine.Host(), sizes, protocol.seed_of(task))
        with pytest.raises(ValueError, match="is off by|a finite number"):
            verify._judge_case(case, json.loads(json.dumps(figures)), sizes, task)


def test_kernels_that_do_not_repeat_are_found(monkeypatch):
    right, calls = TABLE["lean"].forward, []

    def unsteady(call):
        y, T = right(call)
        calls.append(None)
        # Below every budget, and only sometimes.
        if len(calls) % 3 == 0:
            y.view(-1)[0] = torch.nextafter(y.view(-1)[0], torch.tensor(math.inf))
        return y, T

    monkeypatch.setattr(TABLE["lean"], "forward", unsteady)
    sizes = cases.REHEARSED._replace(runs=6)
    for kind in ("repeats", "replay"):
        case = next(case for case in cases.cases_of("lean", "float32", sizes) if case.kind == kind)
        figures = child.run(case, "lean", "float32", machine.Host(), sizes, 0)
        assert figures["differing"] > 0
        with pytest.raises(ValueError, match="elements differ"):
            verify._judge_case(case, figures, sizes, {})


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1000 * (end.at - self.at)


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def stubbed(monkeypatch):
    """`machine.Gpu` over the CPU: torch.cuda records what it is asked. A replayed graph does nothing."""
    asked = []

    @contextlib.contextmanager
    def entered(what):
        asked.append(type(what).__name__)
        yield

    class CUDAGraph:
        def replay(self):
            asked.append("replay")

    properties = SimpleNamespace(name="NVIDIA X", major=9, minor=0, multi_processor_count=1, L2_cache_size=2**15)
    for name, stub in {
        "set_device": lambda index: asked.append(index),
        "get_device_properties": lambda index: properties,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_stream": Stream,
        "Stream": Stream,
        "stream": entered,
        "graph": lambda graph, stream: entered(graph),
        "CUDAGraph": CUDAGraph,
        "Event": Event,
    }.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stub)
    right = torch.device
    with monkeypatch.context() as inside:
        inside.setattr(torch, "device", lambda kind, index: right("cpu"))
        gpu = machine.Gpu(0)
    monkeypatch.setattr(child, "Gpu", lambda index: gpu)
    monkeypatch.setattr(child, "REAL", cases.REHEARSED)
    return asked


def test_the_cases_of_a_gpu_run_beside_load_and_in_graphs(stubbed):
    gpu = child.Gpu(0)
    ran = {}
    for case in cases.cases_of("lean", "float32", cases.REHEARSED):
        stubbed.clear()
        figures = child.run(case, "lean", "float32", gpu, cases.REHEARSED, 0)
        assert set(figures) in ({"outputs"}, {"errors"}, {"runs", "differing"}, {"us", "lean_us", "errors"})
        ran[case.kind] = figures
        if case.kind == "repeats":
            assert stubbed.count("Stream") == cases.REHEARSED.runs and figures["differing"] == 0
        if case.kind == "replay":
            assert stubbed.count("CUDAGraph") == 1 and stubbed.count("replay") == cases.REPLAYS
            # A graph that does not run leaves the old results.
            assert figures["differing"] > 0
    assert set(ran) == {"witness", "budget", "repeats", "replay", "time"}
    # The weight lies in memory more often than the cache can hold it.
    timed = next(case for case in cases.cases_of("lean", "float32", cases.REHEARSED) if case.kind == "time")
    p, weights = timing._large(timed, "float32", gpu)
    assert sum(weight.nbytes for weight in weights) > 3 * gpu.cache_bytes
    assert len({weight.data_ptr() for weight in weights}) == len(weights)


def test_a_captured_graph_keeps_what_it_reads(stubbed):
    made = []

    def captured():
        """As a caller does that keeps the replay alone: of a tensor of its step, and of one that is prepared."""
        made.append(torch.ones(2))
        weight = made[0]

        def prepare():
            made.append(torch.ones(2))
            return [made[1]]

        return child.Gpu(0).capture(lambda x: [x * weight], prepare)[0]

    replay = captured()
    kept = [weakref.ref(made.pop()) for _ in range(2)]
    gc.collect()
    assert all(of() is not None for of in kept)
    stubbed.clear()
    replay()
    assert stubbed == ["replay"]
    del replay
    gc.collect()
    assert all(of() is None for of in kept)


def test_what_a_device_takes_is_launched_while_it_is_busy(stubbed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: stubbed.append("busy"))
    monkeypatch.setattr(Event, "record", lambda self: stubbed.append("event") or setattr(self, "at", 0.0))
    for queued in (False, True):
        stubbed.clear()
        child.Gpu(0).milliseconds([lambda: stubbed.append("call")] * 2, queued)
        assert stubbed == ["busy"] * queued + ["event", "call", "call", "event"]


def test_kernels_are_compiled_by_each_process_in_part(stubbed, monkeypatch):
    lines, compiled = [], []
    monkeypatch.setattr(
        child, "_compile", lambda case, backend, dtype, machine: compiled.append((case, backend, dtype))
    )
    monkeypatch.setattr(child.Gpu(0), "identity", dict)
    pairs = [["triton", "float32"], ["triton", "float16"]]
    for i in range(3):
        task = {"nonce": "0" * 32, "gpu": 0, "rehearse": False, "compile": pairs, "slice": [i, 3]}
        child.main(task, lines.append)
    every = [(case, *pair) for pair in pairs for case in cases.cases_of(*pair, cases.REHEARSED)]
    assert sorted(compiled) == sorted(every) and lines == []


def test_what_does_not_fit_is_not_timed_and_nothing_else(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    for kind in ("time", "budget"):
        case = next(case for case in cases.cases_of("lean", "float32", cases.REHEARSED) if case.kind == kind)
        monkeypatch.setitem(child.KINDS, kind, full)
        figures = child.run(case, "lean", "float32", machine.Host(), cases.REHEARSED, 0)
        assert figures == {"refused": "memory: tried to allocate 2 GiB"}


@pytest.mark.parametrize("gpu, available, said", [(3, True, "sees 1, numbered from 0, got 3"), (0, False, "torch")])
def test_a_gpu_that_is_not_there_is_named(stubbed, monkeypatch, gpu, available, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    lines = []
    child.main({"nonce": "0" * 32, "gpu": gpu, "rehearse": False}, lines.append)
    assert said in lines[0]["missing"] and len(lines) == 1


# Children in place of the package's own, over a GPU that is not there.

CHILD = """
import json, os, signal, sys, time
task, report = json.loads(sys.argv[1]), sys.argv[2]
identity, ways = {identity!r}, {ways!r}
def say(**line):
    with open(report, "a") as file:
        print(json.dumps(line), file=file, flush=True)
if "backend" not in task:
    if ways.get("asked") == "hang" or ways.get("asked again") == "hang" and os.path.exists({flag!r}):
        time.sleep(600)
    if ways.get("asked") == "crash":
        os.kill(os.getpid(), signal.SIGABRT)
    open({flag!r}, "w").close()
    say(nonce=task["nonce"], **({{"missing": ways["missing"]}} if "missing" in ways else {machine!r}))
    sys.exit()
way = ways[task["backend"] + " " + task["dtype"]]
if way == "honest":
    from nlora_kernels.cli.verify import child
    child.Host.identity = lambda self: identity
    child.start(json.dumps(task | {{"rehearse": True, "backend": "lean"}}), report)
    sys.exit()
say(nonce=task["nonce"], identity=identity)
print("about to", way, flush=True)
if way == "hang":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if way == "crash":
    os.kill(os.getpid(), signal.SIGABRT)
if way == "fail":
    raise AssertionError("wrong results")
if way == "half a line":
    open(report, "a").write('{{"case": "wit')
if way == "no report":
    os.unlink(report)
"""
EXACT = float((torch.arange(64.0).view(8, 8) @ torch.arange(64.0).view(8, 8)).sum())


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """fake({"cuda bfloat16": how its child behaves, ...}) is (file, results, what was said)."""

    def run(ways, reasons=(), alive=EXACT, **options):
        named = [key.split() for key in ways if key.split()[0] in TABLE]
        for name in backends.ON_GPU:
            dtypes = tuple(getattr(torch, dtype) for backend, dtype in named if backend == name)
            monkeypatch.setattr(TABLE[name], "proved_for", dtypes)
        reasons = dict.fromkeys(TABLE) | dict(reasons)
        machine = {"identity": IDENTITY, "backends": reasons, "alive": alive}
        code = CHILD.format(identity=IDENTITY, ways=ways, machine=machine, flag=str(tmp_path / "asked"))
        monkeypatch.setattr(verify, "command", lambda task, file: [sys.executable, "-c", code, json.dumps(task), file])
        monkeypatch.setattr(verify, "cases_of", lambda backend, dtype, sizes: cases.cases_of("lean", dtype, sizes))
        said = []
        file, results = verify.verify(say=said.append, **options)
        return file, {f"{r.backend} {r.dtype}": r for r in results}, "\n".join(said)

    return run


@pytest.mark.parametrize(
    "way, status, reason",
    [
        ("crash", "crashed", "killed by signal 6: about to crash at witness"),
        ("fail", "failed", "exit status 1: AssertionError: wrong results at witness"),
        ("half a line", "failed", "reports nothing of witness"),
        ("no report", "failed", "its report is not of this run"),
        ("say nothing more", "failed", "reports nothing of witness"),
    ],
)
def test_a_child_that_proves_nothing_does_not_pass(fake, way, status, reason):
    file, results, said = fake({"cuda bfloat16": way})
    assert results["cuda bfloat16"].status == status and reason in results["cuda bfloat16"].reason
    record = verified.read(file)
    assert record.identity == IDENTITY and record.results["cuda", "bfloat16"][0] == status and not record.times
    assert status in said and "no kernels passed" in said


def test_one_hangs_and_the_others_go_on(fake, monkeypatch):
    """The record holds what passed: that, and nothing else, is chosen afterwards."""
    monkeypatch.setattr(verify, "PATIENCE", 200.0)
    right = verify._Run.start

    def impatient(self, task, patience):
        return right(self, task, 3.0 if task.get("dtype") == "float16" else patience)

    monkeypatch.setattr(verify._Run, "start", impatient)
    file, results, said = fake({"cuda float16": "hang", "triton float32": "honest"}, limit=300)
    assert results["cuda float16"].status == "timeout" and "about to hang" in results["cuda float16"].reason
    assert results["triton float32"].status == "passed", results
    assert file == verified.file_of(IDENTITY) and "float32, time over that of" in said
    record = verified.read(file)
    assert {key[0] for key in record.times} == {"triton"}
    assert record.passed("triton", torch.float32) and not record.passed("cuda", torch.float16)
    times = [time for times in record.times.values() for time in times]
    assert times and all(0 < time.ratio < math.inf for time in times)


def test_a_gpu_that_answers_no_more_ends_it(fake, monkeypatch):
    monkeypatch.setattr(verify, "GREETING", 10.0)
    ways = {"cuda bfloat16": "crash", "cuda float16": "honest", "asked again": "hang"}
    _, results, _ = fake(ways)
    assert results["cuda bfloat16"].status == "crashed"
    assert results["cuda float16"].status == "failed" and "does not answer" in results["cuda float16"].reason


def test_what_cannot_run_is_said_and_is_no_failure(fake):
    _, results, said = fake({"cuda bfloat16": "crash", "triton float32": "crash"}, {"cuda": "built without nvcc"})
    assert results["cuda bfloat16"].status == "unavailable" and "built without nvcc" in said
    assert results["cuda bfloat16"].well and not results["triton float32"].well


@pytest.mark.parametrize(
    "ways, reasons, alive, said",
    [
        ({"missing": "no driver"}, {}, EXACT, "verify needs GPU 0, .*no driver"),
        ({"asked": "hang"}, {}, EXACT, "the GPU does not answer: it was ended after"),
        ({"asked": "crash"}, {}, EXACT, "the GPU does not answer: it was killed by signal 6"),
        ({}, {}, EXACT + 1, "a small product came out wrong"),
        ({}, {"cuda": "no nvcc", "triton": "no triton"}, EXACT, "there are none .cuda: no nvcc; triton: no triton"),
    ],
)
def test_a_machine_that_cannot_be_verified_says_what_is_needed(fake, monkeypatch, tmp_path, ways, reasons, alive, said):
    if "asked" in ways:
        monkeypatch.setattr(verify, "GREETING", 2.0)
    with pytest.raises(ValueError, match=said):
        fake(ways, reasons, alive)
    assert not list(tmp_path.glob("cache/**/*.json"))


def test_a_folder_that_cannot_be_written_is_found_out_first(fake, monkeypatch):
    def full(file, text):
        raise OSError("read-only file system")

    monkeypatch.setattr(cache, "write", full)
    monkeypatch.setattr(verify._Run, "prove", lambda *args: pytest.fail("work was begun"))
    with pytest.raises(OSError, match="read-only"):
        fake({"cuda bfloat16": "crash"})


@pytest.mark.parametrize("limit", [0, -1.0, math.nan])
def test_a_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match="limit must be a positive number of seconds, got"):
        verify.verify(limit=limit)


def test_an_interrupt_does_not_wait_for_compilers(fake, monkeypatch):
    """Those that run are ended; nothing is verified."""
    monkeypatch.setattr(verify, "COMPILED_AT_USE", ("triton",))
    right = verify._Run.compile

    def interrupted(self, todo):
        main = threading.main_thread().ident
        threading.Timer(3, signal.pthread_kill, (main, signal.SIGINT)).start()
        monkeypatch.setattr(
            verify, "command", lambda task, file: [sys.executable, "-c", "import time; time.sleep(600)"]
        )
        right(self, todo)

    monkeypatch.setattr(verify._Run, "compile", interrupted)
    monkeypatch.setattr(verify._Run, "prove", lambda *args: pytest.fail("it went on"))
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fake({"triton float32": "honest"}, limit=600)
    assert time.monotonic() - begun < 300


def test_what_there_is_no_time_for_is_not_tried(fake, monkeypatch):
    monkeypatch.setattr(verify, "TOO_FEW", 1e9)
    _, results, _ = fake({"cuda bfloat16": "crash"})
    assert results["cuda bfloat16"][2:4] == ("timeout", verify.NOT_TRIED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_is_needed(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nlora_kernels", "verify"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "verify: verify needs GPU 0, from compute capability 8.0 on, that torch sees: " in done.stderr
    assert done.stdout == "" and not list(tmp_path.glob("cache/**/*"))


def test_a_rehearsal_meets_all_that_can_happen(tmp_path):
    """In the child processes of the package itself; one hangs, one crashes and one lies."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "nlora_kernels", "verify", "--rehearse"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    ended = [line.split()[:3] for line in done.stdout.splitlines() if line.startswith("  ") and " s" in line[34:42]]
    assert [(a, c) for a, _, c in ended] in (
        [(name, status) for name, _, _, status in verify.REHEARSAL],
        [(name, "unavailable" if TABLE[name].unavailable() else status) for name, _, _, status in verify.REHEARSAL],
    )
    # Nothing of it is left but what a layer's first call on a CPU keeps.
    assert "no record was written" in done.stdout
    assert {file.parent.name for file in tmp_path.glob("**/*.json")} <= {"cpu"}


def test_a_result_that_is_not_as_expected_is_the_exit_status(monkeypatch, capsys):
    found = [verify.Result("cuda", "bfloat16", "passed"), verify.Result("cuda", "float16", "unavailable", "no")]
    monkeypatch.setattr(verify, "verify", lambda gpu, **options: (Path("record.json"), found))
    assert cli.main(["verify"]) == 0 and "wrote record.json" in capsys.readouterr().out
    found.append(verify.Result("triton", "float16", "failed", "dx is off"))
    assert cli.main(["verify", "--gpu", "1"]) == 1
    found[2] = found[2]._replace(expected="failed")
    assert cli.main(["verify", "--rehearse"]) == 0


def test_nothing_is_verified_unasked(monkeypatch):
    """Neither import, nor use, nor doctor starts a process."""
    code = """
    import subprocess, sys
    def refused(*args, **options):
        raise RuntimeError("a process was started")
    import torch, nlora_kernels as nk
    subprocess.Popen.__init__ = refused
    nk.lora_linear(torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2))
    assert "nlora_kernels.cli" not in sys.modules
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=environment)


def test_the_table_says_what_is_chosen():
    times = {
        ("cuda", "bfloat16", "forward", "float32"): [verified.Time((16, 64, 64, 8), 0.8)],
        ("triton", "bfloat16", "forward", "float32"): [verified.Time((16, 64, 64, 8), 0.75)],
        ("triton", "bfloat16", "backward", "float32"): [verified.Time((16, 64, 64, 8), 1.25)],
    }
    lines = verify.table(verified.Record({}, "", {}, times)).splitlines()
    assert lines[-1].split("  ") and "triton 0.75, cuda 0.80" in lines[-1] and lines[-1].endswith("triton 1.25")
