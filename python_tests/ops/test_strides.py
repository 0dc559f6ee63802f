"""Operands that lie in memory in every way a view can: results are those of contiguous copies."""

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels.backends import TABLE, native
from nlora_kernels.backends.cpu.costs import allowed
from nlora_kernels.backends.cpu.plans import Plan, setting
from python_tests.ops.test_budget import DTYPES

pytestmark = pytest.mark.skipif(native._C is None, reason="needs the C++ kernels")

# Of a matrix: one row for all, one value for all, windows of a series, columns, every second of a larger one, a flag.
VIEWS = {
    "one_row": lambda t: t[..., :1, :].expand_as(t),
    "one_value": lambda t: t[..., :1, :1].expand_as(t),
    "windows": lambda t: t.flatten()[: sum(t.shape[-2:]) - 1].unfold(0, t.shape[-1], 1).expand_as(t),
    "transposed": lambda t: t.mT.contiguous().mT,
    "every_second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "negative": lambda t: torch._neg_view(-t),
}
WAYS = ("whole", "adapter", "library", "folded")


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count}_threads", autouse=True)
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def results(function, operands, dy, backend):
    """The output and the gradients of all operands."""
    operands = [t.detach().requires_grad_() for t in operands]
    y = function(*operands, backend=backend)
    return [y, *torch.autograd.grad(y, operands, dy)]


def check(function, operands, dy, view):
    *operands, dy = (view(t) if t.dim() > 1 else t for t in (*operands, dy))
    actual = results(function, operands, dy, "cpu")
    expected = results(function, [t.clone(memory_format=torch.contiguous_format) for t in operands], dy.clone(), "lean")
    limit = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dy.dtype]
    for place, (ours, exact) in enumerate(zip(actual, expected, strict=True)):
        error, size = (ours - exact).abs().max(), exact.abs().max()
        assert error <= limit * (1 + size), f"{place}: {error} of {size}"


def problem(M, K, N, R, dtype, *stack):
    x, dy = torch.randn(M, K).to(dtype), torch.randn(M, N).to(dtype)
    shapes = (N, K), (R, K), (N, R), (R, R), (N,)
    return [x, *((torch.randn(*stack, *s) / s[-1] ** 0.5).to(dtype) for s in shapes)], dy


def linear(x, weight, A, B, core, bias, backend):
    return nk.lora_linear(x, weight, A, B, core, bias, scaling=0.7, backend=backend)


def group(x, weight, A, B, core, bias, backend):
    weights, adapters = [weight, weight[3:]], [(A, B, core), (A, B[3:])]
    return torch.cat(nk.lora_group_linear(x, weights, adapters, [bias, None], backend=backend), -1)[:, : len(bias)]


def experts(x, weight, A, B, core, bias, backend):
    offsets = torch.tensor([0, len(x) // 3, len(x)])
    return nk.lora_grouped_linear(x, offsets, weight, A, B, core, bias, backend=backend)


def mlp(x, weight, A, B, core, bias, backend):
    own = weight, (A, B, core), bias
    return nk.lora_mlp(x, own, own, (weight.T, (B.T, A.T)), backend=backend)


def lora2(x, weight, A, B, core, bias, backend):
    return nk.lora2_linear(x, weight, A, core, core[0], core, B, bias=bias, backend=backend)


@pytest.mark.parametrize("view", [VIEWS["transposed"], VIEWS["every_second"]], ids=["transposed", "every_second"])
@pytest.mark.parametrize("function", [linear, lora2, group, experts, mlp], ids=lambda function: function.__name__)
def test_what_was_saved_for_backward_may_come_back_in_other_strides(function, view):
    """As from a hook that packs saved tensors and gives their values back."""
    operands, dy = problem(70, 20, 24, 4, torch.float32, *([3] if function is experts else []))
    dy = dy[:, :20] if function is mlp else dy
    expected = results(function, operands, dy, "cpu")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: view(t) if t.dim() > 1 else t, lambda t: t):
        actual = results(function, operands, dy, "cpu")
    for ours, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("function", [linear, group, experts], ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_results_are_those_of_contiguous_copies(monkeypatch, dtype, function, view):
    cpu = type(TABLE["cpu"])
    ways = WAYS if dtype == torch.float32 else WAYS[:2]
    for way in ways if function is not experts else ways[:1]:

        def plan(dtype, *sizes, way=way, **backward):
            return Plan(way, allowed(setting(dtype))[-1])

        monkeypatch.setattr(cpu, "plan", staticmethod(plan))
        monkeypatch.setattr(cpu, "experts_plan", staticmethod(plan))
        # Few and many rows, one column, ranks that are not small, and k that is no multiple of a register.
        for M, K, N, R in ((5, 20, 24, 3), (16, 65, 70, 37), (70, 1, 24, 4), (70, 20, 24, 4), (90, 33, 31, 70)):
            torch.manual_seed(M + K)
            stack = (3,) if function is experts else ()
            check(function, *problem(M, K, N, R, dtype, *stack), view)
