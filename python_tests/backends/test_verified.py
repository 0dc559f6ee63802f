"""The record of what was verified on a GPU, and what is chosen because of it: over a device that is not there."""

import contextlib
import json
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nlora_kernels as nk
from nlora_kernels import backends, cache
from nlora_kernels.backends import TABLE, Call, Dropout, verified
from nlora_kernels.backends.quantised import Coded
from nlora_kernels.backends.triton.tuning import tables
from python_tests import ROOT

GPU = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
cuda, triton, lean = (TABLE[name] for name in ("cuda", "triton", "lean"))
LARGE, SMALL = (2048, 4096, 4096, 16), (16, 768, 768, 8)


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path, prefer):
    """A GPU on which both backends of ours could run, and an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    prefer(None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: GPU.name)
    monkeypatch.setattr(verified, "driver", lambda: "580.65.06, CUDA 13.0")
    for module in (cuda, triton):
        monkeypatch.setattr(module, "unavailable", lambda: None)
        monkeypatch.setattr(module, "unsupported", lambda *call: None)
    again()
    yield
    monkeypatch.undo()
    again()


def again():
    backends.forget()
    verified.warn_once.cache_clear()


def tensor(*shape, dtype=BF16):
    return SimpleNamespace(shape=shape, dtype=dtype, device=torch.device("cuda", 0), is_cpu=False)


def chosen(shape=LARGE, operation="forward", dtype=BF16, adapter=FP32, dropout=None):
    M, K, N, R = shape
    first = tensor(M, K, dtype=dtype)
    weight, adapters = tensor(N, K, dtype=dtype), (tensor(*shape, dtype=adapter) for shape in ((R, K), (N, R)))
    call = Call(first, weight, *adapters, dropout=dropout)
    return backends.select(None, first, call, operation)


def time(backend, ratio, shape=LARGE, operation="forward", dtype="bfloat16", adapter="float32"):
    entry = {"backend": backend, "dtype": dtype, "operation": operation, "adapter": adapter, "shape": list(shape)}
    return entry | {"us": 100.0 * ratio, "lean_us": 100.0}


def result(backend, status="passed", dtype="bfloat16"):
    return {"backend": backend, "dtype": dtype, "status": status, "reason": "", "seconds": 1.0}


def store(results, times, **changed):
    identity = verified.identity(0) | changed
    record = {"identity": identity, "written": "2026-11-27T12:00:00", "results": results, "times": times}
    file = verified.file_of(identity)
    cache.write(file, json.dumps(record))
    again()
    return file


def test_what_passed_and_is_faster_is_chosen():
    store([result("cuda")], [time("cuda", 0.8)])
    assert chosen() is cuda


@pytest.mark.parametrize("status", ["failed", "timeout", "crashed", "unproven"])
def test_what_did_not_pass_is_not_chosen(status):
    store([result("cuda", status)], [time("cuda", 0.8)])
    assert chosen() is lean
    # Times without a result prove nothing either.
    store([], [time("cuda", 0.8)])
    assert chosen() is lean


def test_what_is_slower_is_not_chosen():
    store([result("cuda")], [time("cuda", 1.01)])
    assert chosen() is lean


def test_the_faster_of_two_is_chosen_and_the_other_where_it_cannot(monkeypatch):
    store([result("cuda"), result("triton")], [time("cuda", 0.8), time("triton", 0.9)])
    assert chosen() is cuda
    monkeypatch.setattr(cuda, "unsupported", lambda *call: "out must be a multiple of 8")
    assert chosen() is triton
    monkeypatch.setattr(triton, "unsupported", lambda *call: "no")
    assert chosen() is lean


def test_what_cannot_run_any_more_is_not_chosen(monkeypatch):
    store([result("cuda")], [time("cuda", 0.8)])
    monkeypatch.setattr(cuda, "unavailable", lambda: "the package was built without nvcc")
    again()
    assert chosen() is lean


@pytest.mark.parametrize(
    "changed",
    [
        {"driver": "581.00"},
        {"torch": "2.14.0"},
        {"triton": "3.9"},
        {"nlora_kernels": "0.2"},
        {"extension": "0123456789abcdef"},
        {"kernels": "0123456789abcdef"},
        {"gpu": "NVIDIA H100"},
        {"capability": "8.0"},
        {"processors": 78},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_record_of_something_else_is_none(changed):
    file = store([result("cuda")], [time("cuda", 0.8)], **changed)
    with pytest.warns(UserWarning, match="fused kernels await"):
        assert chosen() is lean
    # Nor where somebody renames it.
    file.rename(verified.file_of(verified.identity(0)))
    again()
    with pytest.warns(UserWarning, match="fused kernels await"):
        assert chosen() is lean


def test_environments_keep_records_beside_each_other():
    store([result("cuda")], [time("cuda", 0.8)])
    store([result("cuda", "failed")], [], torch="another")
    assert chosen() is cuda and len(verified.records()) == 2


def test_other_sources_are_another_identity(monkeypatch, tmp_path):
    before = verified.identity(0)
    (tmp_path / "backends").mkdir()
    kernel = tmp_path / "backends" / "kernel.py"
    kernel.write_text("x = 1")
    monkeypatch.setattr(verified, "PACKAGE", tmp_path)
    one = verified.identity(0)
    kernel.write_text("x = 2")
    two = verified.identity(0)
    assert len({identity["kernels"] for identity in (before, one, two)}) == 3
    assert {**one, "kernels": 0} == {**before, "kernels": 0}
    # Measured tiles make other kernels.
    cache.write(tables.folders()[0] / tables.file_name(GPU.name), '{"entries": []}')
    assert verified.identity(0)["kernels"] != two["kernels"]


def test_the_nearest_shape_decides_for_each_operation_and_dtype():
    times = [
        time("cuda", 0.8, LARGE),
        time("cuda", 1.5, SMALL),
        time("triton", 0.9, SMALL),
        time("triton", 0.7, LARGE, "backward"),
        time("triton", 0.7, LARGE, dtype="float16"),
        time("cuda", 0.6, LARGE, adapter="bfloat16"),
    ]
    store([result("cuda"), result("triton"), result("triton", dtype="float16")], times)
    assert chosen(LARGE) is cuda and chosen((3000, 4096, 11008, 64)) is cuda
    assert chosen(SMALL) is triton and chosen((1, 768, 768, 4)) is triton
    # Only triton has a time of backward, and of many rows.
    assert chosen(LARGE, "backward") is triton and chosen(SMALL, "backward") is lean
    assert chosen(LARGE, dtype=FP16) is triton
    assert chosen(LARGE, adapter=BF16) is cuda and chosen(LARGE, adapter=FP16) is lean
    assert chosen(LARGE, dtype=FP32) is lean
    assert chosen((0, 768, 768, 8)) is triton


def test_times_of_many_rows_do_not_decide_for_decoding():
    for M in (1, 16, 48, 64):
        decode, few, many = (M, 4096, 4096, 16), (16, 4096, 4096, 64), (128, 4096, 4096, 16)
        # Nothing is known of "cuda" at few rows: the library decodes.
        store([result("cuda")], [time("cuda", 0.7, many)])
        assert chosen(decode) is lean and chosen((65, 4096, 4096, 16)) is cuda
        # It is slow there.
        store([result("cuda")], [time("cuda", 0.7, many), time("cuda", 2.9, few)])
        assert chosen(decode) is lean and chosen(many) is cuda
        # Triton reads the weight fast enough.
        times = [time("cuda", 0.7, many), time("cuda", 2.9, few), time("triton", 0.8, many), time("triton", 0.9, few)]
        store([result("cuda"), result("triton")], times)
        assert chosen(decode) is triton and chosen(many) is cuda
        # Nor is the time of few rows one of many.
        store([result("triton")], [time("triton", 0.5, few)])
        assert chosen(decode) is triton and chosen(many) is lean


def test_operations_without_a_shape_go_by_all_their_times():
    times = [time("triton", 0.5, (8, 8, 1, 1), "lora2_core", adapter="bfloat16")]
    times += [time("triton", 1.5, (64, 64, 1, 1), "lora2_core", adapter="bfloat16")]
    store([result("triton")], times)
    E = tensor(8)
    assert backends.select(None, E, operation="lora2_core") is triton
    assert backends.select(None, E, operation="initialisation") is lean
    store([result("triton")], [*times, time("triton", 3.0, (64, 64, 1, 1), "lora2_core", adapter="bfloat16")])
    assert backends.select(None, E, operation="lora2_core") is lean


def test_dropout_goes_where_the_mask_is_no_tensor():
    drop = Dropout(0.1, torch.tensor(1))
    store([result("cuda"), result("triton")], [time("cuda", 0.8), time("triton", 0.9)])
    assert chosen(dropout=drop) is triton and chosen(dropout=drop, adapter=BF16) is triton
    assert chosen(dropout=drop, adapter=FP16) is lean
    device = torch.device("cuda", 0)
    assert not backends.drops_inside(device, BF16)
    store([result("triton")], [time("triton", 0.9, operation="dropout")])
    assert backends.drops_inside(device, BF16) and not backends.drops_inside(device, FP16)
    assert chosen(dropout=drop) is triton and chosen() is lean
    store([result("triton", "failed")], [time("triton", 0.9, operation="dropout")])
    assert not backends.drops_inside(device, BF16) and chosen(dropout=drop) is lean


def test_tf32_was_not_verified():
    times = [time("triton", 0.8, dtype="float32"), time("triton", 0.8, operation="dropout", dtype="float32")]
    store([result("triton", dtype="float32")], times)
    device = torch.device("cuda", 0)
    assert chosen(dtype=FP32) is triton and backends.drops_inside(device, FP32)
    torch.set_float32_matmul_precision("high")
    try:
        assert chosen(dtype=FP32) is lean and not backends.drops_inside(device, FP32)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert chosen(dtype=FP32) is triton


def test_forward_and_backward_ask_each_for_their_own_times(monkeypatch):
    asked, select = [], backends.select

    def recorded(name, first, call=None, operation="forward"):
        asked.append(operation)
        return select(name, first, call, operation)

    monkeypatch.setattr(backends, "select", recorded)
    # Off the CPU, where backward asks anew; and by the operators, as a graph or a profile has them.
    for device, mode in (("meta", contextlib.nullcontext()), ("cpu", FlopCounterMode(display=False))):
        shapes = ((5, 12), (9, 12), (3, 12), (9, 3))
        with mode:
            nk.lora_linear(*(torch.zeros(s, device=device, requires_grad=True) for s in shapes)).sum().backward()
    assert asked == ["forward", "backward"] * 2


def test_a_name_goes_before_the_record(monkeypatch, prefer):
    store([result("cuda")], [time("cuda", 0.8)])
    prefer("reference")
    assert chosen() is TABLE["reference"]


def test_an_unverified_gpu_is_told_once():
    with pytest.warns(UserWarning) as caught:
        assert chosen() is lean and chosen(SMALL) is lean
    assert [str(w.message) for w in caught] == [
        "fused kernels await `python -m nlora_kernels verify` on NVIDIA H200: until it has passed, library calls "
        "compute there"
    ]
    store([result("cuda")], [], driver="550.1", torch="2.12")
    since = f"driver was 550.1 and is 580.65.06, CUDA 13.0, torch was 2.12 and is {torch.__version__}"
    with pytest.warns(UserWarning, match=re.escape(f"again on NVIDIA H200: since the last time {since}")):
        chosen()


def test_nothing_is_said_where_nothing_can_be_done(monkeypatch):
    store([result("cuda", "failed")], [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The verification was made, and failed.
        assert chosen() is lean
        # There is nothing to verify.
        verified.file_of(verified.identity(0)).unlink()
        for module in (cuda, triton):
            monkeypatch.setattr(module, "unavailable", lambda: "no nvcc, no triton")
        again()
        assert chosen() is lean
        # CPU tensors, whatever the GPU is.
        monkeypatch.setattr(triton, "unavailable", lambda: None)
        again()
        x = torch.randn(3, 4)
        assert "cpu" in backends.select(None, x, Call(x, x, x, x)).verified_on


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '{"identity": {}, "written": "", "results": [], "times": [{}]}',
        '{"identity": {}, "written": "", "results": [7], "times": []}',
        '{"identity": 1, "written": "", "results": [], "times": []}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_record_is_none(text):
    file = verified.file_of(verified.identity(0))
    file.parent.mkdir(parents=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning):
        assert chosen() is lean
    assert verified.records() == {}


@pytest.mark.parametrize("us", [0, -1.0, float("nan"), float("inf"), "1", None])
def test_a_record_with_impossible_times_is_none(us):
    store([result("cuda")], [time("cuda", 0.8) | {"us": us}])
    with pytest.warns(UserWarning):
        assert chosen() is lean


def test_the_record_is_read_once(monkeypatch):
    store([result("cuda")], [time("cuda", 0.8)])
    read = []
    right = verified.read
    monkeypatch.setattr(verified, "read", lambda file: read.append(file) or right(file))
    for M in range(1, 50):
        chosen((M, 4096, 4096, 16))
    assert len(read) == 1
    # It holds although the file is gone, until it is asked for anew.
    read[0].unlink()
    assert chosen() is cuda


def test_without_a_home_there_is_no_record_and_no_error(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folders/do/not/count")
    monkeypatch.setattr(cache.os.path, "expanduser", lambda path: path)
    again()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chosen() is lean
    with pytest.raises(FileNotFoundError, match="neither XDG_CACHE_HOME nor HOME"):
        cache.folder()
    assert tables.folders() == [tables.TUNED]


def test_the_folder_follows_the_platform(monkeypatch, tmp_path):
    assert cache.folder() == tmp_path / "nlora_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.folder() == Path("/home/someone/.cache/nlora_kernels")


def test_writers_and_readers_meet_whole_files_alone(tmp_path):
    file, texts = tmp_path / "record.json", {str(n) * 100_000 for n in range(8)}
    writers = [threading.Thread(target=lambda t=t: [cache.write(file, t) for _ in range(50)]) for t in texts]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if file.is_file():
            assert file.read_text() in texts
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "record.json"
    cache.write(file, "old")

    def full(self, text):
        self.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError):
        cache.write(file, "new")
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"] and file.read_text() == "old"


def test_processes_read_and_write_at_once(tmp_path):
    """A record that one process replaces is a whole one for those that read it."""
    code = """
import sys, json
from pathlib import Path
from nlora_kernels import cache
from nlora_kernels.backends import verified
file = Path(sys.argv[1])
text = json.dumps({"identity": {"gpu": sys.argv[2] * 5000}, "written": "", "results": [], "times": []})
for _ in range(100):
    cache.write(file, text)
    assert verified.read(file) is not None
"""
    command = [sys.executable, "-c", code, tmp_path / "record.json"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, letter], env=environment) for letter in "ab"]
    assert [process.wait() for process in running] == [0, 0]


def test_compiled_layers_take_the_record_for_a_constant(monkeypatch):
    """Reading it is not traced: neither graph breaks nor files."""
    asked = []

    @torch.compile(backend="eager", fullgraph=True)
    def inside(x):
        return x + 1 if backends.drops_inside(x.device, x.dtype) else x - 1

    monkeypatch.setattr(backends, "_proven", lambda *key: asked.append(key) or (triton,))
    x = torch.zeros(2, dtype=BF16)
    assert inside(x)[0] == -1 and not asked
    assert backends.drops_inside(torch.device("cuda", 0), BF16) and asked == [("dropout", 0, BF16, FP32, None, False)]


def test_weights_in_few_bits_are_decoded_by_what_passed_and_is_faster(monkeypatch):
    few, many = (16, 64, 48, 8), (2048, 64, 48, 8)
    codes, scales = torch.empty(64 * 48 // 2, dtype=torch.uint8, device="meta"), torch.empty(48, device="meta")
    weight = Coded("nibbles", (48, 64), BF16, codes, torch.empty(16, device="meta"), scales, 64)
    decoded = []
    for backend in (triton, backends.REFERENCE):
        monkeypatch.setattr(backend, "decode", lambda weight, out, by=backend: decoded.append(by) or out)
    monkeypatch.setattr(backends, "shared_memory", lambda weight: tensor(*weight.shape))

    def choice(shape, operation="forward", dropout=None):
        """Who computes, and who decoded before."""
        M, K, N, R = shape
        adapter = tensor(R, K, dtype=FP32), tensor(N, R, dtype=FP32)
        decoded.clear()
        chosen, call = backends.choose(
            None, tensor(M, K), Call(tensor(M, K), weight, *adapter, dropout=dropout), operation
        )
        assert (call.weight is weight) == (not decoded)
        return chosen, *decoded

    reference = backends.REFERENCE
    store([result("triton")], [time("triton", 0.5, few)])
    assert choice(few) == (triton, reference), "what multiplies is not proved to decode"
    coded = [time("triton", 0.5, few, "coded_forward"), time("triton", 1.5, few, "coded_backward")]
    decode = time("triton", 0.1, (1, 64, 48, 1), "decode", adapter="bfloat16")
    store([result("triton")], [*coded, decode, time("cuda", 0.9, many)])
    assert choice(few) == (triton,)
    assert choice(few, "backward") == (lean, triton)
    assert choice(many) == (lean, triton), "more rows are decoded before"
    assert choice(few, dropout=Dropout(0.5, None)) == (triton, triton)
    store([result("triton", "failed")], [*coded, decode])
    assert choice(few) == (lean, reference)
