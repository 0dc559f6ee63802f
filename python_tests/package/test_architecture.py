"""docs/architecture.md against the code: what it names is there, and a call on the CPU takes the way that it tells."""

import ast
import itertools
import re
import sys

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from python_tests import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()


def ways() -> dict[str, list[tuple[str, list[str]]]]:
    """{"CPU, forward": [(file, functions), ...], ...}"""
    found = {}
    for section in TEXT.split("\n### ")[1:]:
        rows = re.findall(r"^\| `([^`]+)` \| (`[^|]+`) \|$", section.partition("\n## ")[0], re.MULTILINE)
        found[section.partition("\n")[0]] = [(file, re.findall("`([^`]+)`", names)) for file, names in rows]
    return found


def defines(file: str, function: str) -> bool:
    text = (ROOT / file).read_text()
    if file.endswith(".py"):
        return any(isinstance(n, ast.FunctionDef) and n.name == function for n in ast.walk(ast.parse(text)))
    return re.search(rf'[ "]{function}["(]', text) is not None


@pytest.mark.parametrize("backend", ["CPU", "Triton", "CUDA"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_way_passes_seven_files_at_most_that_hold_its_functions(backend, direction):
    *way, (kernel, name) = ways()[f"{backend}, {direction}"]
    assert 3 <= len(dict(way)) <= 7 and name and kernel
    for file, functions in (*way, (kernel, name)):
        for function in functions:
            assert defines(file, function), f"{file} has no {function}"
    for (file, _), (_, (called, *_)) in itertools.pairwise((*way, (kernel, name))):
        # Python's steps are watched below, or go through Triton's launcher, which names no kernel.
        if not file.endswith(".py"):
            assert re.search(rf"\b{called}\b", (ROOT / file).read_text()), f"{file} does not call {called}"


def test_every_file_that_is_named_is_there():
    for name in re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|h|cu|cuh|cpp|md)|(?:\w+/)+)`|\(([\w.]+\.md)\)", TEXT):
        name = "".join(name)
        places = (
            ROOT,
            ROOT / "nlora_kernels",
            ROOT / "docs",
            ROOT / "csrc",
            ROOT / "csrc" / "cuda",
            ROOT / "csrc/cuda/sm90",
        )
        extra = (ROOT / "nlora_kernels" / "ops", ROOT / "nlora_kernels" / "backends")
        assert any((place / name).exists() for place in (*places, *extra)), name


@pytest.mark.skipif(nk.backends.native._C is None, reason="the package was built without C++ kernels")
def test_a_call_on_the_cpu_goes_that_way():
    p = testing.problem(1, 64, 64, 8)
    trained = [t.requires_grad_() for t in (p.lora_A, p.lora_B, p.lora_N)]
    stacks = {}

    def watch(frame, event, argument):
        name = getattr(argument, "__name__", "")
        if event == "c_call" and name in ("cpu_forward", "cpu_backward"):
            stack = []
            while frame:
                file = frame.f_code.co_filename
                if file.startswith(str(ROOT / "nlora_kernels")):
                    stack.insert(0, (file.removeprefix(f"{ROOT}/"), frame.f_code.co_name))
                frame = frame.f_back
            stacks[name] = stack

    def step():
        y = nk.lora_linear(p.x, p.weight, *trained, p.bias, scaling=0.5, backend="cpu")
        torch.autograd.grad(y, trained, p.dy)

    step()
    sys.setprofile(watch)
    try:
        step()
    finally:
        sys.setprofile(None)
    for direction in ("forward", "backward"):
        way = [(file, function) for file, names in ways()[f"CPU, {direction}"] for function in names]
        assert stacks[f"cpu_{direction}"] == [step for step in way if step[0].endswith(".py")]
