"""The gated MLP as one operation: held to the budget of its parts, and to what it promises to keep."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.ops.mlp import ACTIVATIONS

PARTS = ("gate", "up", "down")
NAMES = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def problem(*, M=7, K=24, width=40, ranks=(4, 3, 5), dtype=torch.float32, adapter=torch.float32, core=True, bias=True):
    """(tensors by name, dy): weight_gate, lora_A_gate, …"""
    tensors = {}
    for i, (name, R) in enumerate(zip(PARTS, ranks, strict=True)):
        sizes = (M, width, K) if name == "down" else (M, K, width)
        p = testing.problem(*sizes, R or 1, dtype=dtype, adapter_dtype=adapter, core=core, bias=bias, seed=i)
        tensors.setdefault("x", p.x)
        for field in testing.TENSORS[1:]:
            t = getattr(p, field)
            if t is not None and (R or not field.startswith("lora")):
                tensors[f"{field}_{name}"] = t
    return tensors, p.dy


def projection(tensors, name, scaling):
    names = [f"{part}_{name}" for part in ("lora_A", "lora_B", "lora_N")]
    adapter = [tensors[each] for each in names if each in tensors]
    return tensors[f"weight_{name}"], adapter or None, tensors.get(f"bias_{name}"), scaling


def ours(activation, scalings=(0.5, 1.0, 2.0), **options):
    def function(x, **tensors):
        parts = [projection(tensors, name, s) for name, s in zip(PARTS, scalings, strict=True)]
        return nk.lora_mlp(x, *parts, activation, **options)

    return function


def plain(activation, scalings=(0.5, 1.0, 2.0)):
    def layer(x, weight, adapter, bias, scaling):
        return (
            testing.plain_linear(x, weight, *adapter, *[None] * (3 - len(adapter)), bias, scaling=scaling)
            if (adapter)
            else F.linear(x, weight, bias)
        )

    def function(x, **tensors):
        gate, up, down = [projection(tensors, name, s) for name, s in zip(PARTS, scalings, strict=True)]
        return layer(NAMES[activation](layer(x, *gate)) * layer(x, *up), *down)

    return function


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("backend", [None, "reference", "lean"])
@pytest.mark.parametrize(
    "activation, options",
    [
        ("silu", {}),
        ("silu", {"M": 70, "ranks": (4, 0, 8), "core": False}),
        ("silu", {"M": 0}),
        ("gelu", {"bias": False, "ranks": (0, 0, 5)}),
        ("gelu_tanh", {"dtype": torch.bfloat16, "M": 33}),
        ("silu", {"dtype": torch.float16, "ranks": (40, 4, 0)}),
    ],
)
def test_it_keeps_the_budget_of_its_parts(activation, options, backend, recompute):
    tensors, dy = problem(**options)
    budget = testing.Budget(plain(activation), plain(activation, (0.0, 0.0, 0.0)), tensors, dy)
    budget.check(testing.outputs(ours(activation, backend=backend, recompute=recompute), tensors, dy))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "wrt", [["x"], ["lora_N_gate"], ["lora_A_down", "x"], ["lora_B_down"], ["lora_N_down", "lora_B_up"]]
)
def test_gradients_are_those_asked_for(wrt, recompute):
    tensors, dy = problem()
    expected = testing.outputs(plain("silu"), tensors, dy, wrt)
    for name, value in testing.outputs(ours("silu", recompute=recompute), tensors, dy, wrt).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("trained", ["lora_", "lora_N"])
def test_backward_keeps_x_and_what_gate_and_up_made(trained, recompute):
    tensors, _ = problem(M=50, K=24, width=40, ranks=(2, 2, 2))
    leaves = {name: t.requires_grad_(name.startswith(trained)) for name, t in tensors.items()}
    known = {t.data_ptr() for t in leaves.values()}
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        ours("silu", recompute=recompute)(**leaves)
    made = sorted(tuple(t.shape) for place, t in kept.items() if place not in known)
    assert made == ([] if recompute else [(50, 2)] * 3 + [(50, 40)] * 2)
    assert (leaves["x"].data_ptr() in kept) == (recompute or trained == "lora_")


def test_second_derivatives_and_transforms_are_those_of_plain_pytorch():
    tensors, _ = problem(M=3, K=4, width=5, ranks=(2, 0, 1), dtype=torch.float64, adapter=torch.float64)
    leaves = tuple(t.requires_grad_() for t in tensors.values())

    def function(*flat):
        return ours("silu")(**dict(zip(tensors, flat, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    torch.testing.assert_close(torch.func.jacrev(function)(*leaves), torch.func.jacfwd(function)(*leaves))


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_it_is_what_it_is_in_eager_mode(recompute):
    tensors, dy = problem()
    wrt, function = ["x", "lora_A_gate", "lora_N_up", "lora_B_down"], ours("silu", recompute=recompute)
    eager = testing.outputs(function, tensors, dy, wrt)
    compiled = testing.outputs(torch.compile(function, fullgraph=True, backend="aot_eager"), tensors, dy, wrt)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)


def test_under_autocast_it_computes_in_its_dtype():
    tensors, dy = problem(M=70)
    wrt = ["x", "weight_down", "bias_up", "lora_A_gate"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results, theirs = (testing.outputs(f("silu"), tensors, dy.bfloat16(), wrt) for f in (ours, plain))
    exact = testing.outputs(plain("silu"), {n: t.double() for n, t in tensors.items()}, dy.double(), wrt)
    for name, value in results.items():
        assert value.dtype == theirs[name].dtype
        error, allowed = (testing.error_norm(t, exact[name]) for t in (value, theirs[name]))
        assert error <= 2 * allowed, name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "relu"}, "activation must be one of silu, gelu, gelu_tanh, got 'relu'"),
        ({"activation": ["silu"]}, r"activation must be one of silu, gelu, gelu_tanh, got \['silu'\]"),
        ({"gate": torch.ones(4, 6)[0:0]}, "gate must be"),
        ({"up": (torch.ones(5, 6),)}, "weight of up must have as many rows as that of gate, 4, got 5"),
        ({"down": (torch.ones(6, 5),)}, r"weight of down must have shape \(out, 4\), got \(6, 5\)"),
        (
            {"down": (torch.ones(6, 4), (torch.ones(2, 3), torch.ones(6, 2)))},
            r"lora_A of down must have shape \(r, 4\)",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    assert set(ACTIVATIONS) == set(NAMES)
    given = {"gate": (torch.ones(4, 6),), "up": (torch.ones(4, 6),), "down": (torch.ones(6, 4),)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        nk.lora_mlp(torch.ones(3, 6), **given)
