"""lora_grouped_linear against fp64, and against one layer for each expert, on every backend that can run here."""

import functools
import random

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE
from nlora_kernels.backends.cpu import plans
from nlora_kernels.backends.cpu.costs import allowed
from python_tests.ops.test_budget import hold, ways

NAMES = ("x", "weight", "lora_A", "lora_B", "lora_N", "bias")
BACKENDS = sorted({backend for backend, _ in ways()})
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
K, N, R = 33, 20, 5
# Rows of each expert: few and many, none, all to one, none at all.
COUNTS = {"ragged": (3, 0, 1, 40), "all_to_one": (0, 50, 0, 0), "one_each": (1, 1, 1, 1), "empty": (0, 0, 0, 0)}


def short(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Of the CPU at every size."""

    def plan(dtype, *sizes, **way):
        return plans.Plan("whole", allowed(plans.setting(dtype))[-1])

    monkeypatch.setattr(type(TABLE["cpu"]), "experts_plan", staticmethod(plan))


def problem(counts, dtype=torch.float32, K=K, N=N, R=R, *, adapter=None, core=True, bias=True, seed=0, tail=0):
    """(offsets, the tensors of a call by name, dy)"""
    adapter, generator = adapter or dtype, torch.Generator().manual_seed(seed)
    E, M = len(counts), sum(counts) + tail

    def normal(*shape, std=1.0, to=dtype):
        return (torch.randn(shape, generator=generator) * std).to(to)

    tensors = {"x": normal(M, K), "weight": normal(E, N, K, std=K**-0.5)}
    tensors |= {"lora_A": normal(E, R, K, std=K**-0.5, to=adapter), "lora_B": normal(E, N, R, std=R**-0.5, to=adapter)}
    if core:
        tensors["lora_N"] = normal(E, R, R, std=R**-0.5, to=adapter)
    if bias:
        tensors["bias"] = normal(E, N)
    return torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32), tensors, normal(M, N)


def plain(x, weight, lora_A, lora_B, lora_N=None, bias=None, *, offsets, scaling=0.7):
    """The layer of each expert in plain PyTorch."""
    parts, first = [], 0
    for e, last in enumerate(offsets.tolist()):
        stacks = [None if t is None else t[e] for t in (weight, lora_A, lora_B, lora_N, bias)]
        parts.append(testing.plain_linear(x[first:last], *stacks, scaling=scaling))
        first = last
    return torch.cat([*parts, x.new_zeros(x.shape[0] - first, weight.shape[1])])


def budget_of(offsets, tensors, dy, wrt=None):
    own, base = (functools.partial(plain, offsets=offsets, scaling=scaling) for scaling in (0.7, 0.0))
    return testing.Budget(own, base, tensors, dy, wrt)


def ours(offsets, **options):
    def function(x, **tensors):
        return nk.lora_grouped_linear(x, offsets, **tensors, scaling=0.7, **options)

    return function


def configuration(seed, dtypes=DTYPES, multiple=1, device="cpu"):
    """As that of `test_budget`, of experts who have no row, one, a few or all, in whatever layouts and dtypes."""
    draw = random.Random(seed)

    def size(largest):
        # As many small sizes as large ones.
        return max(1, round(largest ** draw.random()))

    counts = [draw.choice((0, 1, size(9), size(60))) for _ in range(size(24))]
    if draw.random() < 0.2:
        counts = [0] * len(counts)
        counts[draw.randrange(len(counts))] = size(200)
    dtype, sizes = draw.choice(dtypes), [-(-size(n) // multiple) * multiple for n in (120, 120, 48)]
    adapter = torch.float32 if draw.random() < 0.5 else dtype
    core, bias, tail = draw.random() < 0.7, draw.random() < 0.5, draw.choice((0, 0, 3))
    options = {"adapter": adapter, "core": core, "bias": bias, "tail": tail, "seed": seed}
    offsets, tensors, dy = problem(counts, dtype, *sizes, **options)
    offsets, tensors, dy = offsets.to(device), {name: t.to(device) for name, t in tensors.items()}, dy.to(device)
    if draw.random() < 0.3:
        offsets = offsets.long()
    packed = draw.random() < 0.5
    if packed:
        tensors = as_peft_packs(tensors)
    trained = draw.choice((list(tensors), ["x", "lora_A", "lora_B"], ["lora_A", "lora_B"], ["x", "lora_N"][: 1 + core]))
    scaling = draw.choice((1.0, 0.0, -0.5, 0.7, 16.0))
    said = f"seed {seed}: {short(dtype)} and {short(adapter)} rows={counts}+{tail} K, N, R={sizes} s={scaling}"
    said += " packed" * packed + f" wrt {trained}"
    own, base = (functools.partial(plain, offsets=offsets, scaling=s) for s in (scaling, 0.0))
    ours = functools.partial(nk.lora_grouped_linear, offsets=offsets, scaling=scaling)
    return said, ours, own, base, tensors, dy, trained


def as_peft_packs(tensors):
    """The same tensors with weights kept as (experts, in, out), lora_B as (out, r · experts), and x a part of more."""
    views = dict(tensors, x=torch.cat([tensors["x"]] * 2, 1)[:, : tensors["x"].shape[1]])
    views["weight"] = tensors["weight"].transpose(1, 2).contiguous().transpose(1, 2)
    views["lora_B"] = tensors["lora_B"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return views


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_results_are_within_the_error_budget(counts, dtype):
    for core, bias, wide, tail in ((True, True, False, 0), (False, False, True, 3)):
        offsets, tensors, dy = problem(
            counts, dtype, core=core, bias=bias, adapter=torch.float32 if wide else None, tail=tail
        )
        budget = budget_of(offsets, tensors, dy)
        for backend in BACKENDS:
            budget.check(testing.outputs(ours(offsets, backend=backend), tensors, dy))


@pytest.mark.usefixtures("poisoned")
def test_every_backend_and_tier_keeps_the_budget_for_random_experts(configurations):
    hold(configuration, configurations[::12])


def test_a_wrong_expert_is_outside_the_budget():
    offsets, tensors, dy = problem(COUNTS["ragged"])
    budget, shifted = budget_of(offsets, tensors, dy), offsets + torch.tensor([1, 1, 0, 0])
    with pytest.raises(AssertionError, match="is off by"):
        budget.check(testing.outputs(ours(shifted), tensors, dy))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [R, 40])
def test_any_strides_are_read_in_place(backend, rank):
    offsets, tensors, dy = problem((3, 0, 20, 40), R=rank)
    expected = testing.outputs(ours(offsets, backend="reference"), tensors, dy)
    views = as_peft_packs(tensors)
    assert not views["weight"].is_contiguous() and not views["lora_B"].is_contiguous()
    actual = testing.outputs(ours(offsets, backend=backend), views, dy.T.contiguous().T)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_bits_do_not_depend_on_which_thread_computes_an_expert(threads):
    offsets, tensors, dy = problem((30, 0, 70, 100, 3, 1, 40, 36), K=64, N=96, R=8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        first, again = (testing.outputs(ours(offsets), tensors, dy) for _ in range(2))
    finally:
        torch.set_num_threads(before)
    for name, value in testing.outputs(ours(offsets, backend="reference"), tensors, dy).items():
        assert torch.equal(first[name], again[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trains", [("lora_A", "lora_B"), ("lora_N",), ("x",), ("bias", "weight")], ids="-".join)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_trains_gets_its_gradient(backend, trains):
    offsets, tensors, dy = problem(COUNTS["ragged"])
    budget = budget_of(offsets, tensors, dy, trains)
    budget.check(testing.outputs(ours(offsets, backend=backend), tensors, dy, trains))


@pytest.mark.parametrize("trains", [("lora_N",), ("lora_A", "lora_B", "lora_N")], ids=len)
def test_x_is_kept_only_where_lora_A_trains(trains):
    offsets, tensors, _ = problem(COUNTS["ragged"])
    leaves = {name: t.requires_grad_(name in trains) for name, t in tensors.items()}
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
        ours(offsets)(**leaves)
    rows = tensors["x"].shape[0]
    assert ((rows, K) in shapes) == ("lora_A" in trains) and (rows, R) in shapes and (rows, N) not in shapes


def test_gradcheck_and_second_derivatives():
    offsets, tensors, _ = problem((2, 0, 3), torch.float64, 4, 3, 2, tail=1)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def function(*values):
        return ours(offsets)(**dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_torch_func_and_forward_mode():
    offsets, tensors, _ = problem((2, 0, 3), torch.float64, 4, 3, 2)
    x = tensors.pop("x")

    def function(x, plainly=False):
        return (plain(x, offsets=offsets, **tensors) if plainly else ours(offsets)(x, **tensors)).square().sum()

    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        torch.testing.assert_close(transform(function)(x), transform(functools.partial(function, plainly=True))(x))
    batch = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(each) for each in batch]))


def test_autocast():
    offsets, tensors, dy = problem(COUNTS["ragged"])
    with torch.autocast("cpu", torch.bfloat16):
        actual = testing.outputs(ours(offsets), tensors, dy.bfloat16())
    assert actual["y"].dtype == torch.bfloat16
    assert all(actual[f"d{name}"].dtype == torch.float32 for name in tensors)
    exact = testing.outputs(functools.partial(plain, offsets=offsets), tensors, dy)
    for name, value in exact.items():
        assert (actual[name] - value).norm() <= 0.02 * value.norm(), name


def test_recorders_see_the_operator_and_count_its_multiplications():
    offsets, tensors, dy = problem(COUNTS["ragged"])
    with FlopCounterMode(display=False) as counter:
        testing.outputs(ours(offsets), tensors, dy, ["x", "lora_A", "lora_B", "lora_N"])
    M = tensors["x"].shape[0]
    forward = K * N + R * (K + N + R)
    backward = forward + R * (K + N + 2 * R)
    assert counter.get_total_flops() == 2 * M * (forward + backward)


def test_opcheck_and_compile():
    offsets, tensors, dy = problem(COUNTS["ragged"])
    x, *rest = tensors.values()
    operators = torch.ops.nlora_kernels
    torch.library.opcheck(operators.lora_grouped_linear, (x, offsets, *rest, 0.7, None))
    T, stacks = torch.randn(x.shape[0], R), rest[:4]
    torch.library.opcheck(operators.lora_grouped_linear_backward, (dy, x, T, offsets, *stacks, 0.7, [True] * 6, None))
    compiled = torch.compile(ours(offsets), fullgraph=True, backend="aot_eager")
    expected = testing.outputs(ours(offsets), tensors, dy)
    for name, value in testing.outputs(compiled, tensors, dy).items():
        torch.testing.assert_close(value, expected[name])


WRONG = {
    "x must have shape (rows, 33)": {"x": torch.randn(3, 4)},
    "weight must have shape (experts, out, in)": {"weight": torch.randn(20, 33)},
    "lora_A must have shape (4, r, 33) with r >= 1, got (4, 33, 5)": {"lora_A": torch.randn(4, 33, 5)},
    "lora_B must have shape (4, 20, 5), got (4, 5, 20)": {"lora_B": torch.randn(4, 5, 20)},
    "lora_N must have shape (4, 5, 5)": {"lora_N": torch.randn(4, 5, 4)},
    "bias must have shape (4, 20)": {"bias": torch.randn(20)},
    "offsets must have shape (4,), got (5,)": {"offsets": torch.tensor([0, 1, 2, 3, 44])},
    "offsets must be int32 or int64, got torch.float32": {"offsets": torch.zeros(4)},
    "offsets must be a Tensor, got list": {"offsets": [3, 3, 4, 44]},
    "offsets must rise from 0 to at most the 44 rows of x, got [3, 2, 4, 44]": {"offsets": torch.tensor([3, 2, 4, 44])},
    "offsets must rise from 0 to at most the 44 rows of x, got [3, 3, 4, 45]": {"offsets": torch.tensor([3, 3, 4, 45])},
    "weight must have x's dtype torch.float32, got torch.bfloat16": {"weight": torch.randn(4, N, K).bfloat16()},
    "scaling must be a real number, got str": {"scaling": "2"},
    "backend must be one of": {"backend": "fast"},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_named(message):
    offsets, tensors, _ = problem(COUNTS["ragged"])
    arguments = {"offsets": offsets, **tensors} | WRONG[message]
    with pytest.raises((TypeError, ValueError)) as caught:
        nk.lora_grouped_linear(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("wrong", [[3, 2, 5, 5], [0, 0, 9, 9], [-1, 2, 5, 5]], ids=str)
def test_offsets_that_compiled_code_is_given_are_checked_where_they_are_read(wrong):
    offsets, tensors, dy = problem((1, 1, 2, 1))
    compiled = torch.compile(lambda offsets: nk.lora_grouped_linear(offsets=offsets, **tensors), backend="eager")
    compiled(offsets)
    wrong = torch.tensor(wrong, dtype=torch.int32)
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most the 5 rows of x"):
        compiled(wrong)
    operands = (tensors["weight"], tensors["lora_A"], tensors["lora_B"], tensors["lora_N"])
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most the 5 rows of x"):
        torch.ops.nlora_kernels.lora_grouped_linear_backward(
            dy, tensors["x"], None, wrong, *operands, 1.0, [True] * 3 + [False] * 3, None
        )
