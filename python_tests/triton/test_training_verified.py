"""What `verify` asks of LoRA² training: on a GPU, or in Triton's interpreter where TRITON_INTERPRET=1 is set."""

import functools

import pytest

from nlora_kernels.backends import TABLE
from nlora_kernels.cli.verify import cases, machine, timing

if reason := TABLE["triton"].unavailable():
    pytest.skip(f"{reason}; TRITON_INTERPRET=1 pytest {__file__} runs these tests", allow_module_level=True)

from nlora_kernels.backends.triton import allocator, device, penalty  # noqa: E402


@pytest.mark.parametrize(
    "kernel, wrong, result",
    [
        (None, None, None),
        (
            "smooth",
            lambda right, *args, **options: right(*args, **options | {"hold": True}) or args[3].mul_(1.001),
            "mean",
        ),
        ("prune", lambda right, *args: right(*args[:-1], args[-1] + 1), "E"),
        ("penalty", lambda right, *args: (right(*args)[0] * 1.001, right(*args)[1]), "penalty"),
        ("penalty_backward", lambda right, *args: [1.001 * t for t in right(*args)], "dV"),
    ],
    ids=["right", "smooth", "prune", "penalty", "penalty_backward"],
)
def test_verify_judges_training(monkeypatch, kernel, wrong, result):
    """By the figures that a process on a GPU gives."""
    if kernel:
        module = allocator if hasattr(allocator, kernel) else penalty
        monkeypatch.setattr(module, kernel, functools.partial(wrong, getattr(module, kernel)))
    case = next(c for c in cases.cases_of("triton", "float32", cases.REHEARSED) if c.detail == "lora2_training")
    on = machine.Host() if device.interpreted() else machine.Gpu(0)
    _, errors = timing.CALLS[case.detail](case, TABLE["triton"], "float32", on)
    assert {name for name, _ in errors} == case.results
    off = {name for (name, _), (error, bound) in errors.items() if not error <= bound}
    assert off == set() if result is None else result in off
