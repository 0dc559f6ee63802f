"""What `verify` asks of backend "cuda", on the emulator: all of it passes, and with a fault in a kernel does not."""

import json

import pytest

from nlora_kernels.backends import cuda
from nlora_kernels.cli import verify
from nlora_kernels.cli.verify import cases, child, machine, protocol
from python_tests.cuda import emulated

TASK = {"nonce": "0123abcd" * 4, "backend": "cuda"}


def run(case, dtype):
    figures = child.run(case, "cuda", dtype, machine.Host(), cases.REHEARSED, protocol.seed_of(TASK))
    return json.loads(json.dumps(figures))


@pytest.mark.parametrize("ampere, dtype", [(False, "bfloat16"), (False, "float16"), (True, "bfloat16")])
def test_every_case_passes(monkeypatch, ampere, dtype, prefer):
    prefer("lean")
    emulated.install(monkeypatch, ampere=ampere)
    asked = cases.cases_of("cuda", dtype, cases.REHEARSED)
    for case in asked:
        figures = run(case, dtype)
        assert ("refused" in figures) == case.optional, case
        if not case.optional:
            verify._judge_case(case, figures, cases.REHEARSED, TASK | {"dtype": dtype})
    assert {case.detail for case in asked} >= {"lora", "slora", "nlora", "inttune", "lora2", "initialisation"}


@pytest.mark.parametrize("kind", ["witness", "budget", "time"])
def test_a_launch_that_leaves_something_out_does_not_pass(monkeypatch, kind, prefer):
    prefer("lean")
    extension = emulated.install(monkeypatch)
    right = extension.cuda_backward

    def wrong(queue, *arguments):
        right(queue, *arguments)
        # dA follows dx among the results.
        dA = arguments[8]
        dA[-1] = 0

    monkeypatch.setattr(extension, "cuda_backward", wrong)
    assert cuda._C is extension
    asked = cases.cases_of("cuda", "bfloat16", cases.REHEARSED)
    case = next(c for c in asked if c.kind == kind and c.detail in ("nlora", "slora", "backward") and not c.optional)
    with pytest.raises(ValueError, match="dlora_A is off by"):
        verify._judge_case(case, run(case, "bfloat16"), cases.REHEARSED, TASK | {"dtype": "bfloat16"})
