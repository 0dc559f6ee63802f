"""The choice among the plans of the backend "cpu": its arithmetic, what it measures, and the records of that."""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import cli
from nlora_kernels.backends.base import DTYPES
from nlora_kernels.backends.cpu import measure, plans
from nlora_kernels.backends.cpu.costs import Costs, Line, Setting, allowed, builtin
from nlora_kernels.backends.cpu.plans import Plan
from nlora_kernels.cli import doctor

missing = nk.backends.available()["cpu"]
if missing:
    pytest.skip(missing, allow_module_level=True)

SETTING = Setting(torch.float32, "avx2", 2)
# As what may be chosen without measuring asks it what the CPU can.
EXTENSION = "nlora_kernels.backends.cpu.costs._C"
# As measured on an AMD EPYC (Zen 5) of two cores: the library of fp32 is slow there, that of bf16 is not.
LIBRARY_FP32, LIBRARY_BF16 = Line(2e-6, 6e-11, 1.9e-11), Line(1.5e-5, 5e-11, 4e-12)
OURS = {"few": Line(6e-6, 1e-11, 1.2e-11), "many": Line(8e-6, 1e-10, 8.5e-12)}
SLOW_BF16 = Line(1.5e-5, 5e-11, 2e-10)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of its own, and costs that `measured` finds: 1 ns more at every call."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []

    def measured(setting, limit=measure.LIMIT):
        found.append(Costs(Line(1e-9 * (len(found) + 1), 0.0, 1e-11), *OURS.values(), written="2026-01-01"))
        return found[-1]

    monkeypatch.setattr(plans, "measured", measured)
    plans.forget()
    yield tmp_path / "nlora_kernels" / "cpu"
    plans.forget()


@pytest.fixture
def now(monkeypatch):
    """The time by which calls are measured, in seconds: a test adds what a call takes."""
    now = [0.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0], strftime=time.strftime)
    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "_preemptions", lambda: 0)
    return now


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("library", "M", "R", "expected"),
    [
        # A library at half the speed of ours makes no large product, one at twice the speed makes them all.
        (LIBRARY_FP32, 512, 8, {"whole"}),
        (LIBRARY_FP32, 64, 64, {"whole"}),
        (LIBRARY_BF16, 128, 8, {"adapter"}),
        (LIBRARY_BF16, 2048, 128, {"library"}),
        (SLOW_BF16, 2048, 128, {"whole"}),
        # Few rows take what reads weight once, or what a call costs.
        (LIBRARY_BF16, 1, 8, {"whole", "adapter"}),
        (LIBRARY_FP32, 16, 8, {"whole"}),
    ],
)
def test_the_rule_follows_the_speed_of_the_library(library, M, R, expected, backward):
    assert plans.rule(Costs(library, **OURS), M, 768, 768, R, backward, False) in expected


def test_an_adapter_apart_costs_what_passing_over_x_and_y_does():
    # The library is a tenth faster, and the adapter apart takes more.
    costs = Costs(Line(1.5e-5, 5e-11, 3.6e-12), OURS["few"], Line(8e-6, 5e-11, 4e-12), pieces=1)
    for backward in (False, True):
        assert plans.rule(costs, 512, 768, 768, 8, backward, False) != "whole"
        assert plans.rule(costs._replace(apart=4e-10), 512, 768, 768, 8, backward, False) == "whole"
        near = costs._replace(library=Line(1.5e-5, 5e-11, 3.9e-12))
        assert plans.rule(near, 512, 4096, 4096, 8, backward, False) == "whole"


def test_dx_is_ours_where_the_library_is_slow_at_reading_across_rows():
    costs = Costs(Line(1.5e-5, 1e-10, 4e-12), Line(6e-6, 1e-10, 4e-12), OURS["many"])
    assert plans.rule(costs, 1, 4096, 4096, 8, True, False) == "adapter"
    slow = costs._replace(across=1e-10)
    assert plans.rule(slow, 1, 4096, 4096, 8, True, False) == "whole"
    assert plans.rule(slow, 1, 4096, 4096, 8, False, False) == plans.rule(costs, 1, 4096, 4096, 8, False, False)


def test_many_rows_share_a_folded_weight_where_the_library_is_fastest():
    costs = Costs(LIBRARY_FP32, OURS["few"], Line(8e-6, 1e-10, 1e-10))
    assert plans.rule(costs, 8192, 768, 768, 128, False, True) == "folded"
    assert plans.rule(costs, 8192, 768, 768, 128, False, False) == "library"
    assert plans.rule(costs, 64, 768, 768, 128, False, True) == "library"


@pytest.mark.parametrize("tier", ["portable", "neon", "avx2", "avx512", "amx"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_built_in_costs_leave_a_dtype_to_whoever_multiplies_it(monkeypatch, tier, dtype):
    in_hardware = tier in ("neon", "avx512", "amx")
    monkeypatch.setattr(
        "nlora_kernels.backends.cpu.costs._C",
        types.SimpleNamespace(bfloat16=1, float32=0, cpu_multiplies=lambda dtype: True),
    )
    costs = builtin(Setting(dtype, tier, 2))
    chosen = plans.rule(costs, 1024, 1024, 1024, 8, False, False)
    if dtype == torch.bfloat16 and tier == "avx512":
        # Of few rows and many it is so, forward and backward (bench/test_plan.py).
        for M, K, N in ((1, 4096, 4096), (128, 768, 768), (512, 768, 768), (512, 768, 3072)):
            assert [plans.rule(costs, M, K, N, 8, backward, False) for backward in (False, True)] == ["whole"] * 2
    if dtype == torch.bfloat16:
        # Pairs are as fast as the library, and the adapter among them costs next to nothing.
        assert (chosen == "whole") == (not in_hardware or tier == "avx512")
    else:
        assert (chosen == "whole") == (tier != "portable")


def test_no_mode_of_the_caller_sees_what_is_measured(monkeypatch, now):
    from torch.utils.flop_counter import FlopCounterMode

    seen = []

    def linear(x, weight):
        now[0] += len(x) * weight.numel() * 1e-11
        return x @ weight.T

    def product(x, weight, *adapter, pieces=3):
        # What is not the product is made before it is timed.
        assert len(adapter) == 2 and not any(t.any() for t in adapter)
        seen.append((threading.current_thread(), x.shape, torch.is_inference_mode_enabled()))
        return linear(x, weight)

    monkeypatch.setattr(measure, "F", types.SimpleNamespace(linear=linear))
    monkeypatch.setattr(measure, "_product", product)
    monkeypatch.setattr(measure, "SPAN", 0)
    monkeypatch.setattr(measure, "AGREE", 1)
    state = torch.get_rng_state()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        costs = measure.measured(SETTING._replace(threads=torch.get_num_threads()))
    assert counter.get_total_flops() == 0 and torch.equal(state, torch.get_rng_state())
    assert seen and threading.current_thread() not in {thread for thread, _, _ in seen}
    assert not any(inference for _, _, inference in seen)
    assert all(value >= 0 for line in costs[:3] for value in line) and costs.pieces == 3


@pytest.mark.parametrize(
    ("dtype", "precision", "avx512", "amx"),
    [
        (torch.float32, "ieee", (3,), (3,)),
        (torch.float32, "none", (3,), (3,)),
        # Three products take longer than one of fp32 but on a matrix unit.
        (torch.float32, "tf32", (3,), (3, 2)),
        (torch.float32, "bf16", (3, 1), (3, 1)),
        (torch.bfloat16, None, (3, 1), (3, 1)),
        (torch.float16, None, (3,), (3,)),
    ],
)
def test_how_many_bf16_values_may_stand_for_one_of_fp32(monkeypatch, dtype, precision, avx512, amx):
    expected = {"portable": (3,), "neon": (3,), "avx2": (3,), "avx512": avx512, "amx": amx}
    monkeypatch.setattr(
        "nlora_kernels.backends.cpu.costs._C", types.SimpleNamespace(bfloat16=1, cpu_multiplies=lambda dtype: True)
    )
    assert {tier: allowed(Setting(dtype, tier, 2, precision)) for tier in expected} == expected
    monkeypatch.setattr(
        "nlora_kernels.backends.cpu.costs._C", types.SimpleNamespace(bfloat16=1, cpu_multiplies=lambda dtype: False)
    )
    assert allowed(Setting(dtype, "avx512", 2, precision)) == (3,)


def test_the_number_of_pieces_is_the_fastest_of_those_allowed(monkeypatch, now):
    takes = {3: 2e-11, 1: 1e-11}

    def product(x, weight, *adapter, pieces=3):
        now[0] += len(x) * weight.numel() * takes[pieces]

    monkeypatch.setattr(measure, "_product", product)
    monkeypatch.setattr(measure, "F", types.SimpleNamespace(linear=product))
    monkeypatch.setattr(measure, "allowed", lambda setting: (3, 1))
    setting = SETTING._replace(dtype=torch.bfloat16, threads=torch.get_num_threads())
    costs = measure.measured(setting)
    assert costs.pieces == 1 and costs.many.multiply == pytest.approx(1e-11)
    takes[1] = 4e-11
    costs = measure.measured(setting)
    assert costs.pieces == 3 and costs.many.multiply == pytest.approx(2e-11)


def test_the_precision_of_fp32_is_part_of_a_setting():
    try:
        for name, precision in (("high", "tf32"), ("medium", "bf16"), ("highest", "ieee")):
            torch.set_float32_matmul_precision(name)
            assert plans.setting(torch.float32).precision == precision
            assert plans.setting(torch.bfloat16).precision is None
    finally:
        torch.set_float32_matmul_precision("highest")


def test_times_count_only_when_several_agree():
    assert not measure._settled([1e-3]) and not measure._settled([1e-3, 2e-3, 3e-3, 4e-3])
    assert measure._settled([9e-3, 1e-3, 1.05e-3, 5e-3, 1.01e-3, 1.09e-3])
    assert measure._settled([0.4, 0.2]) and not measure._settled([0.4, 1e-3])
    # One that no other comes near does not keep a quiet machine waiting, nor is it what a product takes.
    often = [1e-3 + i * 1e-6 for i in range(99)]
    assert measure._settled([5e-4, *often]) and measure._least([5e-4, *often]) > 9e-4
    assert not measure._settled([5e-4, *often[:30]])


def test_a_time_counts_only_where_nothing_was_preempted(monkeypatch):
    switches = iter([3, 3, 3, 4])
    monkeypatch.setattr(measure, "_preemptions", lambda: next(switches))
    assert measure._undisturbed(lambda: None) < 1 and measure._undisturbed(lambda: None) is None


def test_the_time_of_a_call_is_without_what_was_before_it(now):
    """The first of each pair, after something else, takes ten seconds."""
    took = itertools.cycle([10.0, 1.0])

    def call():
        now[0] += next(took)

    assert [measure._undisturbed(call) for _ in range(3)] == [1.0] * 3


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads as Linux does")
def test_the_threads_of_a_caller_are_released_and_come_back():
    """Beside them those of the thread that measures would be more than there are cores."""
    code = (
        "import os, torch; from nlora_kernels.backends.native import _C;"
        "count = lambda: len(os.listdir('/proc/self/task'));"
        "torch.set_num_threads(3); x = torch.randn(512, 512); y = x @ x; before = count(); _C.release_team();"
        "assert count() == before - 2, (before, count()); assert (x @ x).equal(y) and count() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(measure.resource is None, reason="needs a Unix")
def test_preemptions_are_counted():
    """Two busy processes on one processor take turns."""
    code = (
        "import os, time; from nlora_kernels.backends.cpu import measure;"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); before = measure._preemptions(); child = os.fork();"
        "end = time.monotonic() + 0.5\nwhile time.monotonic() < end: pass\n"
        "if child: os.waitpid(child, 0); assert measure._preemptions() > before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_record_holds_until_it_is_renewed(folder, capsys):
    first = plans.costs(SETTING)
    assert plans.costs(SETTING) is first and first.library.call == 1e-9
    (file,) = folder.glob("float32-avx2-*.json")
    plans.forget()
    assert plans.costs(SETTING) == first
    # Another number of threads, instruction set or dtype has a record of its own.
    for change in ({"threads": 1}, {"tier": "portable"}, {"dtype": torch.bfloat16}, {"precision": "bf16"}):
        assert plans.costs(SETTING._replace(**change)) != first
    assert len(list(folder.glob("*.json"))) == 5
    setting = plans.setting(torch.float32)
    before = plans.costs(setting)
    assert cli.main(["tune"]) == 0
    assert capsys.readouterr().out.count("wrote ") == len(DTYPES)
    assert plans.costs(setting) != before
    products = doctor.report()["cpu"]["products"]["float32"]
    assert products == {"library": 200.0, "kernels": 235.3, "measured": "2026-01-01"}


@pytest.mark.parametrize(
    "spoilt",
    ["", "{", "[]", "[" * 100_000, '{"identity": 1}', "other", "negative", "huge", 4, 1.0],
    ids=lambda s: str(s)[:9],
)
def test_what_is_no_record_is_replaced(folder, spoilt):
    first = plans.costs(SETTING)
    (file,) = folder.glob("*.json")
    stored = json.loads(file.read_text())
    if spoilt == "other":
        stored["identity"]["torch"] = "1.0"
    if spoilt == "negative":
        stored["few"]["multiply"] = -1
    if spoilt == "huge":
        stored["apart"] = 10**400
    if not isinstance(spoilt, str):
        stored["pieces"] = spoilt
    file.write_text(json.dumps(stored) if spoilt in ("other", "negative", "huge", 4, 1.0) else spoilt)
    plans.forget()
    assert plans.costs(SETTING) != first and json.loads(file.read_text())["library"]["call"] == 2e-9


def test_without_a_folder_or_a_quiet_machine_the_built_in_costs_hold(folder, monkeypatch):
    expected = builtin(SETTING)
    folder.parent.mkdir()
    folder.touch()
    assert plans.costs(SETTING) == expected
    folder.unlink()
    plans.forget()
    monkeypatch.setattr(plans, "measured", lambda setting: None)
    assert plans.costs(SETTING) == expected and not list(folder.glob("*.json"))
    assert doctor.report()["cpu"]["products"]["float32"]["measured"] is None
    assert cli.main(["tune"]) == 1


def test_processes_that_start_at_once_agree(tmp_path):
    code = """
import os, sys, time
from nlora_kernels.backends.cpu import plans
from nlora_kernels.backends.cpu.costs import Costs, Line, Setting
import torch
def measured(setting):
    time.sleep(0.2)
    return Costs(*[Line(os.getpid() * 1e-9, 0.0, 1e-11)] * 3, written="now")
plans.measured = measured
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
print(plans.costs(Setting(torch.float32, "avx2", 2)).library.call)
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    start = tmp_path / "start"
    command = [sys.executable, "-c", code, str(start)]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    start.touch()
    said = {process.communicate(timeout=120)[0] for process in processes}
    assert len(said) == 1 and float(said.pop()) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_child_of_fork_has_its_parents_costs_and_measures_nothing(tmp_path):
    code = """
import os, torch
from nlora_kernels.backends.cpu import plans
from nlora_kernels.backends.cpu.costs import Costs, Line
parent = os.getpid()
def measured(setting):
    assert os.getpid() == parent
    return Costs(*[Line(1e-9, 0.0, 1e-11)] * 3, written="now")
plans.measured = measured
torch.set_num_threads(2)
known = plans.costs(plans.setting(torch.float32))
# As it is while another thread measures.
plans._measuring.acquire()
child = os.fork()
if child == 0:
    same = plans.costs(plans.setting(torch.float32)) is known and torch.get_num_threads() == 1
    other = plans.costs(plans.setting(torch.bfloat16))
    os._exit(0 if same and other.written is None else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120)


def test_experts_are_ours_where_one_call_for_all_of_them_pays(monkeypatch):
    equal = Line(1e-5, 1e-10, 1e-11)
    monkeypatch.setattr(plans, "costs", lambda setting: Costs(equal, equal, equal))
    for M, E, K, N in ((2048, 16, 512, 2048), (4096, 128, 256, 256), (4, 64, 64, 64)):
        for backward in (False, True):
            assert plans.experts_plan(torch.float32, M, E, K, N, 8, backward) == Plan("whole")
    slow = equal._replace(multiply=2e-11)
    monkeypatch.setattr(plans, "costs", lambda setting: Costs(equal, equal, slow))
    assert plans.experts_plan(torch.float32, 2048, 8, 512, 2048, 8) == Plan("library")
