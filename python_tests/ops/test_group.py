"""Layers that share x, as one operation: held to the budget of the layers apart, and to all that one layer does."""

import contextlib
import functools
import random

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE
from nlora_kernels.backends.cpu.plans import Plan
from python_tests.ops.test_budget import DTYPES, capped, ways
from python_tests.ops.test_ops import OPCHECK


def problem(Ns, *, M=7, K=24, ranks=None, dtype=torch.float32, adapter=torch.float32, cores=True, biases=True, seed=0):
    """(tensors by name, dy of each): weight0, lora_A0, … of every layer; without a rank it has no adapter."""
    tensors, dys = {}, []
    for i, N in enumerate(Ns):
        R = 4 if ranks is None else ranks[i]
        p = testing.problem(M, K, N, R or 1, dtype=dtype, adapter_dtype=adapter, seed=10 * seed + i)
        tensors.setdefault("x", p.x)
        tensors[f"weight{i}"] = p.weight
        if R:
            tensors |= {f"lora_A{i}": p.lora_A, f"lora_B{i}": p.lora_B}
            if cores is True or (cores and cores[i]):
                tensors[f"lora_N{i}"] = p.lora_N
        if biases is True or (biases and biases[i]):
            tensors[f"bias{i}"] = p.bias
        dys.append(p.dy)
    return tensors, dys


def member(tensors, i):
    adapter = tuple(tensors[f"{name}{i}"] for name in ("lora_A", "lora_B", "lora_N") if f"{name}{i}" in tensors)
    return tensors[f"weight{i}"], adapter or None, tensors.get(f"bias{i}")


def ours(count, scalings, **options):
    """The layers' outputs side by side, as one function of all tensors."""

    def function(x, **tensors):
        weights, adapters, biases = zip(*[member(tensors, i) for i in range(count)], strict=True)
        return torch.cat(nk.lora_group_linear(x, weights, adapters, biases, scaling=scalings, **options), -1)

    return function


def apart(count, scalings, layer=testing.plain_linear):
    """The same by one call for each."""

    def function(x, **tensors):
        ys = []
        for i in range(count):
            weight, adapter, bias = member(tensors, i)
            A, B, N = (*adapter, None)[:3] if adapter else (None, None, None)
            ys.append(F.linear(x, weight, bias) if A is None else layer(x, weight, A, B, N, bias, scaling=scalings[i]))
        return torch.cat(ys, -1)

    return function


def configuration(seed):
    draw = random.Random(seed)

    def size(largest):
        return max(1, round(largest ** draw.random()))

    count = draw.randint(1, 5)
    M = draw.choice((0, size(200), size(200), size(200)))
    ranks = [draw.choice((0, size(48), size(48))) for _ in range(count)]
    dtype = draw.choice(DTYPES)
    options = {"M": M, "K": size(300), "ranks": ranks, "dtype": dtype, "adapter": draw.choice((torch.float32, dtype))}
    options |= {name: [draw.random() < 0.5 for _ in range(count)] for name in ("cores", "biases")}
    tensors, dys = problem([size(300) for _ in range(count)], **options, seed=seed)
    scalings = [draw.choice((1.0, 0.0, -0.5, 0.7, 16.0)) for _ in range(count)]
    wrt = [name for name in tensors if draw.random() < 0.7] or ["x"]
    said = f"seed {seed}: {count} layers of {[d.shape[1] for d in dys]}, {options}, s={scalings}, d{wrt}"
    return said, count, scalings, tensors, torch.cat(dys, -1), wrt


@pytest.mark.parametrize("first", [0, 12, 24])
def test_every_backend_and_tier_keeps_the_budget(first):
    broken = []
    for seed in range(first, first + 12):
        said, count, scalings, tensors, dy, wrt = configuration(seed)
        plain, base = apart(count, scalings), apart(count, [0.0] * count)
        budget = testing.Budget(plain, base, tensors, dy, wrt)
        for backend, tier in ways():
            with capped(tier) if tier else contextlib.nullcontext():
                results = testing.outputs(ours(count, scalings, backend=backend), tensors, dy, wrt)
            for (name, norm), (error, bound) in budget.errors(results).items():
                if not error <= bound:
                    broken.append(f"{backend} {tier}: {name} is off by {error:.3g} of {bound:.3g} ({norm}), {said}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("plan", ["whole", "adapter", "library", "folded"])
@pytest.mark.parametrize("M", [0, 3, 40])
@pytest.mark.parametrize("ranks", [[4, 0, 40], [0, 0, 0]], ids=["adapters", "none"])
def test_every_plan_of_the_cpu_keeps_the_budget(monkeypatch, plan, M, ranks):
    if TABLE["cpu"].unavailable():
        pytest.skip(TABLE["cpu"].unavailable())
    monkeypatch.setattr(type(TABLE["cpu"]), "plan", staticmethod(lambda *args, **kwargs: Plan(plan)))
    tensors, dys = problem([24, 16, 8], M=M, ranks=ranks)
    scalings, dy = [0.5, 1.0, 2.0], torch.cat(dys, -1)
    budget = testing.Budget(apart(3, scalings), apart(3, [0.0] * 3), tensors, dy)
    budget.check(testing.outputs(ours(3, scalings, backend="cpu"), tensors, dy))


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tier", [tier for backend, tier in ways() if backend == "cpu"])
def test_a_share_of_the_columns_may_be_one_block_where_all_of_them_are_two(monkeypatch, tier, dtype, pieces):
    """Threads have parts of members that no other cut leaves, and each keeps sums of 16-bit results for its part."""
    monkeypatch.setattr(type(TABLE["cpu"]), "plan", staticmethod(lambda *args, **kwargs: Plan("whole", pieces)))
    before = torch.get_num_threads()
    try:
        with capped(tier):
            for K, Ns in ((896, (896, 128, 128)), (576, (576, 192, 192)), (2048, (200, 1000)), (1400, (500, 300, 700))):
                tensors, _ = problem(Ns, M=60, K=K, dtype=dtype)
                results = []
                for threads in (1, 2, 3, 5, 8):
                    torch.set_num_threads(threads)
                    results += [ours(len(Ns), [0.5] * len(Ns), backend="cpu")(**tensors) for _ in range(2)]
                exact = apart(len(Ns), [0.5] * len(Ns))(**{name: t.double() for name, t in tensors.items()})
                # Roundings of half an eps: of y, of A, N and B where they are in fp32, and of T and P.
                assert (results[0] - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()
                assert all(torch.equal(result, results[0]) for result in results[1:]), (K, Ns)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", [None, "reference", "lean", "cpu"])
def test_a_layer_without_a_gradient_costs_nothing(backend):
    tensors, dys = problem([8, 6, 4], ranks=[2, 0, 3])
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    weights, adapters, biases = zip(*[member(leaves, i) for i in range(3)], strict=True)
    ys = nk.lora_group_linear(leaves["x"], weights, adapters, biases, backend=backend)
    grads = torch.autograd.grad(ys[2], list(leaves.values()), dys[2], allow_unused=True)
    alone = testing.outputs(
        apart(1, [1.0]),
        {"x": tensors["x"].detach()} | {f"{n[:-1]}0": t for n, t in tensors.items() if n[-1] == "2"},
        dys[2],
    )
    for (name, _), grad in zip(leaves.items(), grads, strict=True):
        if name[-1] in "01":
            assert grad is None, name
        else:
            expected = alone["dx" if name == "x" else f"d{name[:-1]}0"]
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_x_is_kept_once_and_only_where_a_gradient_needs_it():
    tensors, _ = problem([8, 6, 4], ranks=[2, 2, 2])
    kept = []

    def run(trained):
        leaves = {name: t.detach().requires_grad_(name.startswith(trained)) for name, t in tensors.items()}
        kept.clear()
        with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            ours(3, [1.0] * 3)(**leaves)
        return sum(t.data_ptr() == leaves["x"].data_ptr() for t in kept)

    assert run("lora_") == 1
    assert run("lora_N") == 0


@pytest.mark.parametrize("backend", [None, "reference", "lean"])
def test_dropout_is_that_of_each_layer_by_itself(backend):
    tensors, dys = problem([8, 6, 4], ranks=[2, 0, 3], M=40)
    wrt = [name for name in tensors if name != "x"] + ["x"]
    seeds, drops = [11, 12, 13], [0.3, 0.5, 0.6]
    grouped = ours(3, [1.0, 2.0, 0.5], dropout=drops, seed=seeds, backend=backend)

    def each(x, **named):
        ys = []
        for i in range(3):
            weight, adapter, bias = member(named, i)
            options = {"dropout": drops[i], "seed": seeds[i], "scaling": [1.0, 2.0, 0.5][i], "backend": "reference"}
            ys.append(nk.lora_linear(x, weight, *adapter, bias, **options) if adapter else F.linear(x, weight, bias))
        return torch.cat(ys, -1)

    dy = torch.cat(dys, -1)
    expected = testing.outputs(each, tensors, dy, wrt)
    for name, value in testing.outputs(grouped, tensors, dy, wrt).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    # Without seeds every adapter draws a mask of its own.
    x, weight, A, B = torch.ones(50, 8), torch.zeros(4, 8), torch.eye(8)[:4], torch.eye(4)
    first, second = nk.lora_group_linear(x, [weight] * 2, [(A, B)] * 2, dropout=0.5)
    assert not torch.equal(first, second)


def test_second_derivatives_and_transforms_are_those_of_plain_pytorch():
    tensors, _ = problem([5, 3], ranks=[2, 0], M=4, K=6, dtype=torch.float64, adapter=torch.float64)
    leaves = tuple(t.requires_grad_() for t in tensors.values())

    def function(*flat):
        return ours(2, [0.5, 1.0])(**dict(zip(tensors, flat, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)
    jacobians = torch.func.jacrev(function)(*leaves), torch.func.jacfwd(function)(*leaves)
    torch.testing.assert_close(*jacobians)


def test_second_derivatives_without_x_are_refused():
    tensors, dys = problem([5, 3], ranks=[2, 2])
    x, N = tensors["x"].requires_grad_(), tensors["lora_N0"].requires_grad_()
    y = ours(2, [1.0, 1.0])(**tensors)
    with pytest.raises(RuntimeError, match="second derivatives need x"):
        torch.autograd.grad(y, (x, N), torch.cat(dys, -1), create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_and_counted_it_is_the_registered_operators(autocast):
    tensors, dys = problem([8, 6, 4], ranks=[2, 0, 3], M=5)
    wrt, dy = ["x", "lora_A0", "bias1", "lora_N2"], torch.cat(dys, -1)
    function = ours(3, [0.5, 1.0, 2.0])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        eager = testing.outputs(function, tensors, dy.bfloat16() if autocast else dy, wrt)
        compiled = testing.outputs(
            torch.compile(function, fullgraph=True, backend="aot_eager"),
            tensors,
            dy.bfloat16() if autocast else dy,
            wrt,
        )
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value)
    if autocast:
        return
    counted = []
    for f in (function, apart(3, [0.5, 1.0, 2.0], functools.partial(nk.lora_linear))):
        with FlopCounterMode(display=False) as counter:
            testing.outputs(f, tensors, dy, wrt)
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1]


@pytest.mark.parametrize("M", [5, 0])
def test_the_operators_pass_opcheck(M):
    tensors, dys = problem([8, 6], ranks=[2, 0], M=M)
    names = ("weight", "lora_A", "lora_B", "lora_N", "bias")
    weights, *columns, biases = [[tensors.get(f"{name}{i}") for i in range(2)] for name in names]
    options, operators = ([0.5, 1.0], [0.0, 0.0], [None, None]), torch.ops.nlora_kernels
    # Detached: x·Aᵀ is a result that has no derivative.
    args = tensors["x"], weights, *columns, biases, *options, None
    torch.library.opcheck(operators.lora_group_linear.default, args, test_utils=OPCHECK)
    Ts = [tensors["x"] @ tensors["lora_A0"].T, None]
    for needs in ([True] * 6 + [True, False, False, False, True], [False, False, True] + [False] * 8):
        args = dys, tensors["x"], Ts, weights, *columns, *options, needs, None
        torch.library.opcheck(operators.lora_group_linear_backward.default, args, test_utils=OPCHECK)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": []}, "weights must be a list of at least one tensor"),
        ({"adapters": [None]}, "adapters must have one for each of the 2 weights, got 1"),
        ({"scaling": [1.0]}, "scaling must be one for each of the 2 weights or one for all, got 1"),
        ({"biases": [None, torch.ones(3)]}, r"biases\[1\] must have shape \(4,\), got \(3,\)"),
        (
            {"adapters": [None, (torch.ones(2, 5), torch.ones(4, 2))]},
            r"lora_A of adapters\[1\] must have shape \(r, 6\)",
        ),
        ({"adapters": [None, torch.ones(2)]}, r"adapters\[1\] must be \(lora_A, lora_B\)"),
        ({"weights": [torch.ones(4, 6), torch.ones(4, 5)]}, r"x must have shape \(\.\.\., 5\)"),
        ({"weights": [torch.ones(4, 6), torch.ones(4, 6).double()]}, r"weights\[1\] must have x's dtype"),
        ({"backend": "none"}, "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    given = {"weights": [torch.ones(4, 6)] * 2, "adapters": [None, None], "biases": None} | change
    with pytest.raises((TypeError, ValueError), match=message):
        nk.lora_group_linear(torch.ones(3, 6), **given)
