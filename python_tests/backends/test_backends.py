"""The table of backends, the rule that picks one, and the package as it is imported."""

import os
import subprocess
import sys

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import REFERENCE, TABLE, cuda, triton


def test_available_names_every_backend(monkeypatch):
    reasons = nk.backends.available()
    assert list(reasons) == list(TABLE) and reasons["reference"] is None and reasons["lean"] is None
    monkeypatch.setattr(TABLE["lean"], "unavailable", lambda: "it has gone fishing")
    assert nk.backends.available() == reasons | {"lean": "it has gone fishing"}


def test_every_reason_why_cuda_cannot_run_is_given(monkeypatch):
    def no_driver(name):
        raise OSError("libcuda.so.1: no such file")

    def reason():
        return cuda.unavailable.__wrapped__()

    monkeypatch.setattr(cuda, "_C", object())
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(cuda.ctypes, "CDLL", no_driver)
    for part in ("built without nvcc", "was built without CUDA", "no NVIDIA driver (libcuda.so.1: no such file)"):
        assert part in reason()
    monkeypatch.setattr(cuda, "_C", type("Extension", (), {"cuda_forward": None}))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert reason() == "a device of compute capability 8.0 or newer is needed, got no device"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (6, 1))[index])
    assert reason().endswith("got 7.5, 6.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((7, 5), (8, 6))[index])
    assert reason() is None

    def forked(index):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "get_device_capability", forked)
    assert reason() == "CUDA cannot start (Cannot re-initialize CUDA in forked subprocess)"


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "fits"),
    [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True), ("3.6.1", "3.0.0", False)],
)
def test_an_interpreter_that_numpy_broke_is_said_by_versions(monkeypatch, triton_version, numpy_version, fits):
    monkeypatch.setattr(pytest.importorskip("triton"), "__version__", triton_version)
    monkeypatch.setattr(pytest.importorskip("numpy"), "__version__", numpy_version)
    monkeypatch.setattr(triton.device, "interpreted", lambda: True)
    reason = triton.unavailable.__wrapped__()
    if fits:
        assert reason is None
    else:
        assert f"triton {triton_version} needs numpy below 2.4, got {numpy_version}" in reason
        assert reason.endswith("numpy<2.4 or triton>=3.7")


@pytest.fixture
def calls(monkeypatch):
    """The names of the backends that ran."""
    ran = []
    for name, backend in TABLE.items():
        forward = backend.forward

        def recorded(*args, name=name, forward=forward):
            ran.append(name)
            return forward(*args)

        monkeypatch.setattr(backend, "forward", recorded)
    return ran


def linear(**options):
    p = testing.problem(5, 12, 9, 3)
    return nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, **options)


def test_what_is_preferred_acts_as_the_argument_where_none_is_given(calls, prefer):
    assert prefer("reference") is None
    linear()
    linear(backend="lean")
    with pytest.raises(ValueError, match="backend must be one of .*, got 'fast'"):
        prefer("fast")
    assert prefer(None) == "reference" and calls == ["reference", "lean"]


@pytest.mark.parametrize("name", ["lean", "fast", ""])
def test_the_variable_is_preferred_from_import_on(name):
    code = """
import os, torch, nlora_kernels as nk
print(nk.backends.preferred())
os.environ["NLORA_BACKEND"] = "reference"
print(nk.backends.preferred())
try:
    nk.lora_linear(*(torch.ones(2, 2) for _ in range(4)))
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "NLORA_BACKEND": name}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    said = ["backend must be one of cpu, cuda, lean, reference, triton, got 'fast'"] if name == "fast" else []
    assert ran.stdout.splitlines() == [name or "None"] * 2 + said


def test_a_named_backend_never_falls_back(monkeypatch, calls):
    monkeypatch.setattr(TABLE["lean"], "unavailable", lambda: "it has gone fishing")
    with pytest.raises(ValueError, match="'lean' cannot take this call: it has gone fishing"):
        linear(backend="lean")
    assert calls == []


def test_without_a_name_only_a_backend_verified_on_the_device_runs(monkeypatch, calls):
    for backend in TABLE.values():
        if backend is not REFERENCE:
            monkeypatch.setattr(backend, "verified_on", frozenset({"cuda"}))
    linear()
    linear(backend="lean")
    assert calls == ["reference", "lean"]


def test_without_a_name_a_backend_that_cannot_take_the_call_is_passed_over(monkeypatch, calls):
    for backend in TABLE.values():
        if backend is not REFERENCE:
            monkeypatch.setattr(backend, "unsupported", lambda *call: "too small")
    linear()
    assert calls == ["reference"]


def test_importing_the_package_imports_nothing_but_torch():
    code = """
import sys, torch
before = set(sys.modules)
import nlora_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new - set(sys.stdlib_module_names)))
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert set(eval(output)) <= {"nlora_kernels", "torch"}


def test_an_extension_that_is_not_there_is_called_that_and_missed_once():
    code = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
missing = "nlora_kernels._C"
PathFinder.find_spec = lambda name, path=None, target=None: None if name == missing else find(name, path, target)
import torch, nlora_kernels
print(nlora_kernels.backends.available()["cpu"])
for _ in range(2):
    nlora_kernels.lora_linear(*(torch.ones(2, 2) for _ in range(4)))
"""
    ran = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=True)
    expected = "the package was built without C++ kernels (install it where a C++ compiler is)"
    expected += ": No module named 'nlora_kernels._C'"
    assert ran.stdout == f"{expected}\n"
    assert ran.stderr.count("UserWarning") == ran.stderr.count(f"compute on this CPU, for {expected}") == 1


def test_unknown_attributes_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'turbo'"):
        _ = nk.turbo
    assert "peft" in dir(nk)


def test_a_mask_gets_no_gradient():
    u, E, U = torch.randn(4, 3), torch.randn(4, requires_grad=True), torch.randn(3, 4)
    mask = torch.tensor([1.0, 1.0, 0.0, 1.0], requires_grad=True)
    nk.lora2_core(u, E, U, mask).sum().backward()
    assert mask.grad is None and E.grad[2] == 0
