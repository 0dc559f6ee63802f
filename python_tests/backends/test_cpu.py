"""The backend "cpu": every instruction set, every plan, ragged shapes and strides, threads and fork."""

import dataclasses
import os
import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, Call, native
from nlora_kernels.backends.base import Needs
from nlora_kernels.backends.cpu import plans
from nlora_kernels.backends.cpu.costs import allowed
from nlora_kernels.backends.cpu.plans import Plan
from python_tests import ROOT
from python_tests.tiers import capped

missing = nk.backends.available()["cpu"]
if missing:
    pytest.skip(missing, allow_module_level=True)

from nlora_kernels import _C  # noqa: E402

CPU = TABLE["cpu"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = ["whole", "adapter", "library"]
# M, K, N, R: empty, ones, odd everywhere, around the sizes of a register tile, of a block of K and of the few-rows
# kernels, a rank above the skinny kernels' limit; more than the cache holds of a block in k, in columns and, with a
# result of half precision, in rows; a rank that is a run of k of its own.
SHAPES = [
    (0, 12, 8, 3),
    (1, 1, 1, 1),
    (1, 33, 17, 5),
    (2, 1, 9, 4),
    (16, 65, 1, 8),
    (17, 31, 47, 7),
    (49, 257, 97, 8),
    (8, 48, 96, 16),
    (130, 513, 100, 33),
    (33, 40, 1600, 12),
    (150, 300, 70, 65),
    (17, 400, 1000, 5),
    (1100, 2100, 160, 3),
    (40, 500, 90, 200),
]


def short(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.fixture
def plan(request, monkeypatch):
    """A way, with the fewest pieces that a call may have, or a whole plan."""
    given = request.param

    def plan(dtype, *sizes, **way):
        return given if isinstance(given, Plan) else Plan(given, allowed(plans.setting(dtype))[-1])

    monkeypatch.setattr(type(CPU), "plan", staticmethod(plan))
    return given


@pytest.mark.usefixtures("poisoned", "tier", "plan")
@pytest.mark.parametrize("plan", PLANS[:2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=short)
def test_results_are_within_the_error_budget(shape, dtype):
    p = testing.problem(*shape, dtype=dtype)
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p)


@pytest.mark.usefixtures("poisoned", "tier", "plan")
@pytest.mark.parametrize("plan", [Plan("whole", 3)], indirect=True, ids=short)
@pytest.mark.parametrize("shape", SHAPES[5:], ids=short)
def test_bf16_that_is_converted_to_fp32_is_within_the_error_budget(shape):
    p = testing.problem(*shape, dtype=torch.bfloat16, adapter_dtype=torch.float32)
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p)


@pytest.mark.usefixtures("poisoned", "tier", "plan")
@pytest.mark.parametrize("plan", PLANS, indirect=True)
@pytest.mark.parametrize("shape", [(5, 33, 18, 3), (70, 90, 50, 9)], ids=short)
@pytest.mark.parametrize(
    "options",
    [{"strided": True}, {"core": False}, {"bias": False}, {"adapter_dtype": torch.float32}],
    ids=lambda options: next(iter(options)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_strides_absent_tensors_and_adapter_dtypes(shape, dtype, options):
    p = testing.problem(*shape, dtype=dtype, **options)
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p)


@pytest.mark.usefixtures("poisoned", "tier", "plan")
@pytest.mark.parametrize("plan", PLANS[:2], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("adapter_dtype", DTYPES, ids=short)
def test_gradients_by_packed_products_have_the_dtype_of_the_adapter(dtype, adapter_dtype):
    p = testing.problem(70, 90, 50, 37, dtype=dtype, adapter_dtype=adapter_dtype)
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p)


@pytest.mark.usefixtures("poisoned", "tier", "plan")
@pytest.mark.parametrize("plan", PLANS[:2], indirect=True)
@pytest.mark.parametrize("tensor", ["x", "dy", "weight", "lora_A", "lora_B", "lora_N"])
@pytest.mark.parametrize("M", [5, 70])
def test_rows_that_are_one_row_expanded(M, tensor):
    # As the gradient of a sum or a mean over rows is.
    p = testing.problem(M, 90, 50, 9)
    t = getattr(p, tensor)
    p = dataclasses.replace(p, **{tensor: t[:1].expand_as(t)})
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p)


@pytest.mark.usefixtures("plan")
@pytest.mark.parametrize("plan", PLANS[:2], indirect=True)
def test_gradients_of_a_mean_over_many_rows():
    p = testing.problem(20_000, 16, 24, 4)
    p = dataclasses.replace(p, dy=torch.full_like(p.dy, 0.1))
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p)


@pytest.mark.usefixtures("poisoned", "tier", "plan")
@pytest.mark.parametrize("plan", PLANS[:2], indirect=True)
@pytest.mark.parametrize("width", [1, 7])
def test_no_rows_in_every_stride(width):
    for strides in ((width, 1), (1, 0), (1, 1)):
        p = testing.problem(4, width, 9, 3)
        p = dataclasses.replace(p, x=torch.empty_strided((0, width), strides), dy=p.dy[:0])
        for name, value in testing.results(p, nk.lora_linear, backend="cpu").items():
            assert not value.any(), name


@pytest.mark.usefixtures("poisoned", "tier", "plan")
@pytest.mark.parametrize("plan", PLANS[:2], indirect=True)
@pytest.mark.parametrize("shape", [(3, 0, 4, 2), (70, 0, 4, 2), (3, 8, 0, 2), (70, 8, 0, 2)], ids=short)
def test_layers_of_no_width(shape):
    M, K, N, R = shape
    sizes = (M, K), (N, K), (R, K), (N, R), (R, R), (N,), (M, N)
    p = testing.Problem(*[torch.randn(size) for size in sizes])
    for name, value in testing.results(p, nk.lora_linear, backend="cpu").items():
        expected = (
            p.bias.expand(shape[0], -1) if name == "y" else p.dy.sum(0) if name == "dbias" else torch.zeros_like(value)
        )
        torch.testing.assert_close(value, expected)


@pytest.mark.usefixtures("poisoned", "plan")
@pytest.mark.parametrize("plan", ["folded"], indirect=True)
@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("shape", [(200, 96, 64, 40), (65, 33, 18, 3), (0, 4, 5, 2)], ids=short)
def test_the_folded_plan_is_within_the_error_budget(shape, core):
    p = testing.problem(*shape, core=core, adapter_dtype=torch.bfloat16)
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p)


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_half_precision_is_read_and_rounded_as_torch_does(dtype):
    one, B = torch.ones(1, 1, dtype=dtype), torch.zeros(1, 1)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    _, T = CPU.forward(Call(every, one, torch.ones(1, 1), B), Plan("whole"))
    torch.testing.assert_close(T, every, rtol=0, atol=0, equal_nan=True)

    # T = 1·Aᵀ rounds the fp32 values of A: ordinary, subnormal, overflowing and halfway ones.
    halves = every.float()[:, 0]
    values = [torch.randn(4000) * 2.0**e for e in range(-30, 20)]
    values = torch.cat([*values, torch.nextafter(halves, torch.tensor(9.0)), halves * (1 + 2**-10)])
    _, T = CPU.forward(Call(one, one, values[:, None], torch.zeros(1, len(values))), Plan("whole"))
    torch.testing.assert_close(T[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)


def product_by(tier, x, weight, pieces=3):
    """x·Wᵀ on an instruction set, as a layer whose adapter is zero."""
    A, B = torch.zeros(1, x.shape[1]), torch.zeros(weight.shape[0], 1)
    with capped(tier):
        return CPU.forward(Call(x, weight, A, B), Plan("whole", pieces))[0]


@pytest.fixture
def precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("poisoned", "tier", "plan", "precision")
@pytest.mark.parametrize("plan", PLANS[:1], indirect=True)
@pytest.mark.parametrize("precision", ["high", "medium"], indirect=True)
@pytest.mark.parametrize("shape", SHAPES[5:], ids=short)
def test_fp32_of_the_precision_that_is_asked_for_has_the_error_that_is_stated(shape):
    p, fewest = testing.problem(*shape, strided=shape[0] % 2 == 1), allowed(plans.setting(torch.float32))[-1]
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cpu"), p, fewest)


@pytest.fixture
def has_pairs():
    if not (_C.cpu_tier() in ("avx512", "amx") and _C.cpu_multiplies(_C.bfloat16)):
        pytest.skip("this CPU multiplies no bf16")


@pytest.mark.usefixtures("has_pairs")
@pytest.mark.parametrize("shape", [(17, 31, 47), (49, 257, 97), (64, 800, 130), (130, 513, 100)], ids=short)
@pytest.mark.parametrize("strided", [False, True], ids=["rows", "columns"])
def test_of_one_piece_a_product_is_that_of_rounded_operands(shape, strided):
    M, K, N = shape
    p = testing.problem(M, K, N, 1)
    x, weight = (t.T.contiguous().T if strided else t for t in (p.x, p.weight))
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    bound = 2 * testing.error_norm(x.bfloat16().float() @ weight.bfloat16().float().T, exact) + 1e-6
    for tier in {_C.cpu_tier(), "avx512"}:
        y = product_by(tier, x, weight, 1)
        assert testing.error_norm(y, exact) <= bound
        # Of bf16 nothing is left to round.
        assert torch.equal(product_by(tier, x.bfloat16().float(), weight.bfloat16().float(), 1), y)
        half = product_by(tier, x.bfloat16(), weight.bfloat16(), 1)
        assert torch.equal(half, y.bfloat16())


@pytest.mark.usefixtures("has_pairs")
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 3.4e38, 3e38, 1e-42, 1e-30], ids=str)
def test_of_one_piece_what_bf16_cannot_hold_is_infinite_or_zero(value):
    p = testing.problem(64, 40, 96, 8)
    p.x[5, 7] = p.weight[9, 4] = value
    p.x[6] *= value if abs(value) < 1 else 0
    for tier in {_C.cpu_tier(), "avx512"}:
        for a, b in ((p.x, p.weight), (p.weight, p.x)):
            left, right = (t.bfloat16().float() for t in (a, b))
            if value < 1:
                left, right = (t.where(t.abs() >= torch.finfo(t.dtype).tiny, 0.0) for t in (left, right))
            with capped(tier):
                # Without an adapter, in which infinity times zero would be NaN.
                ((y, _),) = _C.cpu_forward_group(a, [b], *[[None]] * 4, [1.0], 2, 1)
            torch.testing.assert_close(y, left @ right.T, rtol=1e-4, atol=1e-5, equal_nan=True)
            if value == 1e-42:
                assert not (y[6] if a is p.x else y[:, 6]).any()


@pytest.fixture
def has_tiles():
    if _C.cpu_tier() != "amx":
        pytest.skip("this CPU has no amx")


@pytest.mark.usefixtures("has_tiles")
def test_tiles_multiply_every_bit_of_fp32():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 96, generator=generator) * 2.0 ** torch.randint(-40, 40, (64, 96), generator=generator)
    x[0, :3] = torch.tensor([1 + 2**-23, 2 - 2**-23, 1 + 2**-8 + 2**-9])
    assert torch.equal(product_by("amx", x, torch.eye(96)), x)
    assert torch.equal(product_by("amx", torch.eye(64), x.T), x)
    weight = torch.randn(80, 96, generator=generator)
    assert torch.equal(product_by("amx", x * 2.0**20, weight), product_by("amx", x, weight) * 2.0**20)


@pytest.mark.usefixtures("has_tiles")
@pytest.mark.parametrize("K", [64, 768, 4096])
def test_tiles_lose_no_more_than_products_of_fp32(K):
    p = testing.problem(64, K, 96, 8)
    exact = p.x.double() @ p.weight.double().T

    def error(y):
        return float((y.double() - exact).norm() / exact.norm())

    assert error(product_by("amx", p.x, p.weight)) <= error(p.x @ p.weight.T)


@pytest.mark.usefixtures("has_tiles")
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 3e38, 1e-42], ids=str)
def test_what_tiles_cannot_take_goes_to_the_other_kernels(value):
    p = testing.problem(64, 40, 96, 8)
    x = p.x * (value if value < 1 else 1)
    x[5, 7] = value
    for a, b in ((x, p.weight), (p.weight, x)):
        y = product_by("amx", a, b)
        torch.testing.assert_close(y, product_by("avx512", a, b), rtol=0, atol=0, equal_nan=True)
    # A product that is added in place is refused before anything is added.
    left, sums = x.T[:, :48].contiguous(), []
    for tier in ("amx", "avx512"):
        sums.append(p.x.new_ones(40, 70))
        with capped(tier):
            assert _C.cpu_add_product(sums[-1], left, torch.ones(48, 70), 2)
    torch.testing.assert_close(*sums, rtol=0, atol=0, equal_nan=True)
    # Zeros are in range, whatever they are multiplied by.
    assert not product_by("amx", x * 0 if value < 1 else torch.zeros_like(x), p.weight).any()


@pytest.mark.usefixtures("plan", "precision")
@pytest.mark.parametrize("plan", PLANS[:2], indirect=True)
@pytest.mark.parametrize("precision", ["highest", "medium"], indirect=True)
@pytest.mark.parametrize("shape", [(16, 96, 200, 8), (300, 96, 200, 8), (100, 64, 70, 40)], ids=short)
def test_results_repeat_bitwise_under_any_number_of_threads(shape):
    p, before = testing.problem(*shape), torch.get_num_threads()
    fewest = allowed(plans.setting(torch.float32))[-1]
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            first, second = (testing.results(p, nk.lora_linear, backend="cpu") for _ in range(2))
            assert all(torch.equal(first[name], second[name]) for name in first)
            testing.assert_within_budget(first, p, fewest)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
def test_a_forked_child_takes_the_same_plan_to_the_same_bits(tier):
    # NOTE: in a process of its own: OpenMP's threads are running when it forks, and a child that hangs is ended.
    code = """
import os, sys, torch, nlora_kernels as nk
from nlora_kernels import _C, backends, testing
from nlora_kernels.backends.cpu import plans as home
cpu = backends.TABLE["cpu"]
_C.cap_cpu_tier(sys.argv[1])
problems = [
    testing.problem(*shape, dtype=dtype)
    for shape in ((2, 96, 96, 8), (64, 96, 96, 8), (300, 256, 256, 8), (64, 300, 260, 48), (700, 128, 128, 100))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
]
torch.set_num_threads(2)
nk.lora_linear(*(torch.randn(300, 300) for _ in range(4)))
# The child has one thread and takes the plans of two, which on some CPUs are others than those of one.
torch.set_num_threads(1)
threads, home.threads = home.threads, lambda: 2
expected = [testing.results(p, nk.lora_linear, backend="cpu") for p in problems]
home.threads = threads
torch.set_num_threads(2)

def plans():
    sizes = [(p.x.dtype, *p.x.shape, len(p.weight), len(p.lora_A), way) for p in problems for way in (False, True)]
    return [cpu.plan(*size) for size in sizes]

chosen = plans()
child = os.fork()
if child == 0:
    same = plans() == chosen and torch.get_num_threads() == 1 and _C.forked()
    for p, wanted in zip(problems, expected):
        actual = testing.results(p, nk.lora_linear, backend="cpu")
        same &= all(torch.equal(t, wanted[name]) for name, t in actual.items())
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and not _C.forked()
assert len({plan.way for plan in chosen}) > 1, chosen
"""
    subprocess.run([sys.executable, "-c", code, tier], check=True, timeout=120)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_teams_are_of_the_one_openmp_runtime_that_torch_has_loaded():
    # NOTE: in a process of its own, for any other test may load one. Torch itself runs on one thread there.
    code = """
import os, re, torch

def runtimes():
    with open("/proc/self/maps") as maps:
        return set(re.findall(r"/\\S*lib(?:gomp|omp|iomp5)[^/\\s]*", maps.read()))

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)
torch.randn(300, 300) @ torch.randn(300, 300)
before = runtimes()
from nlora_kernels import _C, testing
p = testing.problem(300, 256, 256, 8)
alone = tasks()
_C.cpu_forward(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, p.scaling, 3, 3)
assert tasks() == alone + 2, (alone, tasks())
assert runtimes() == before and len(before) == 1, (before, runtimes())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


class Within(TorchDispatchMode):
    """New tensors lie inside larger storages that are full of sevens."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        new = function(*args, **(kwargs or {}))
        if function not in (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default):
            return new
        self.storages.append((torch.full((new.numel() + 128,), 7.0, dtype=new.dtype), new.numel()))
        return self.storages[-1][0][64:-64].view(new.shape)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_that_one_large_call_needed_is_given_back():
    code = """
import torch
from nlora_kernels import _C
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 >> 20
def call(M):
    x, W, A, B = torch.ones(M, 16), torch.ones(16, 16), torch.ones(64, 16), torch.ones(16, 64)
    y, T = _C.cpu_forward(x, W, A, B, None, None, 1.0, 1, 3)
    _C.cpu_backward(y, x, T, W, A, B, None, (True, False, True, True, False, False), 1.0, 1, 3)
call(100)
before = resident()
call(1 << 18)
assert resident() - before < 160, f"{resident() - before} MiB were kept"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


class Made(TorchDispatchMode):
    """The largest tensor that PyTorch makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        new = function(*args, **(kwargs or {}))
        self.largest = max(self.largest, new.untyped_storage().nbytes() // new.itemsize)
        return new


@pytest.mark.usefixtures("poisoned", "tier")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("M", [0, 1, 7, 16, 17, 40])
@pytest.mark.parametrize("R", [5, 37])
def test_a_weight_stored_by_columns_is_read_in_place(M, R, dtype):
    """As that of GPT-2's Conv1D, of which a layer has a transposed view."""
    p = testing.problem(M, 70, 90, R, dtype=dtype)
    p = dataclasses.replace(p, weight=p.weight.T.contiguous().T)
    call = Call(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, 0.7)
    needs = Needs(x=True, weight=False, lora_A=True, lora_B=True, lora_N=True, bias=False)
    for pieces in allowed(plans.setting(dtype)):
        plan = Plan("whole", pieces)
        with Made() as made:
            y, T = CPU.forward(call, plan)
            grads = CPU.backward(call, p.dy, T, needs, plan)
            ((group_y, group_T),) = CPU.forward_group([call], plan)
            group_dx, _ = CPU.backward_group([call], [p.dy], [group_T], [needs], plan)
        assert made.largest < p.weight.numel()
        by_rows = call._replace(weight=p.weight.contiguous())
        y_by_rows, T_by_rows = CPU.forward(by_rows, plan)
        dx_by_rows = CPU.backward(by_rows, p.dy, T, needs, plan).x
        actual, expected = (y, T, grads.x, group_y, group_dx), (y_by_rows, T_by_rows, dx_by_rows, y_by_rows, dx_by_rows)
        for ours, exact in zip(actual, expected, strict=True):
            error, size = ((t.double()).norm() for t in (ours.double() - exact, exact))
            assert error <= 4 * torch.finfo(dtype).eps * size


@pytest.mark.usefixtures("tier")
@pytest.mark.parametrize("shape", [(21, 37, 29, 5), (70, 101, 83, 49)], ids=short)
def test_nothing_past_a_tensor_is_written(shape):
    """Every result lies inside a larger storage whose rest must stay as it was."""
    M, K, N, R = shape
    for dtype, pieces in [(torch.float32, 3), (torch.float32, 1), (torch.bfloat16, 3), *((d, 1) for d in DTYPES[1:])]:
        p = testing.problem(M, K, N, R, dtype=dtype)
        with Within() as within:
            _, T = _C.cpu_forward(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, p.scaling, 2, pieces)
            matrices = (p.dy.contiguous(), p.x, T, p.weight, p.lora_A, p.lora_B, p.lora_N)
            _C.cpu_backward(*matrices, (True,) * 6, p.scaling, 2, pieces)
        assert len(within.storages) == 7
        for storage, size in within.storages:
            assert (storage[:64] == 7).all() and (storage[64 + size :] == 7).all()
            assert not (storage[64 : 64 + size] == 7).all()


@pytest.mark.parametrize("mask", [None, torch.float32, torch.bool], ids=short)
@pytest.mark.parametrize("r,k", [(8, 8), (1, 1), (5, 3), (3, 7)])
def test_lora2_core_and_its_gradients(r, k, mask):
    generator = torch.Generator().manual_seed(r * k)
    u, E, U = (torch.randn(*shape, generator=generator) for shape in ((r, k), (r,), (k, r)))
    mask = None if mask is None else (torch.rand(r, generator=generator) < 0.7).to(mask)
    d_core = torch.randn(k, k, generator=generator)
    exact = TABLE["reference"]
    doubles = u.double(), E.double(), U.double(), mask
    torch.testing.assert_close(CPU.lora2_core(u, E, U, mask).double(), exact.lora2_core(*doubles), rtol=1e-5, atol=1e-5)
    actual = CPU.lora2_core_backward(d_core, u, E, U, mask)
    for grad, expected in zip(actual, exact.lora2_core_backward(d_core.double(), *doubles), strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("poisoned", "plan")
@pytest.mark.parametrize("plan", [*PLANS, "folded"], indirect=True)
@pytest.mark.parametrize("mask", [None, torch.float32, torch.bool], ids=short)
@pytest.mark.parametrize("M", [1, 40])
def test_lora2_makes_its_core_inside_the_call(M, mask):
    generator = torch.Generator().manual_seed(M)
    K, N, r, k = 20, 12, 5, 3
    shapes = {"x": (M, K), "weight": (N, K), "lora_v": (k, K), "lora_u": (r, k), "lora_E": (r,), "lora_U": (k, r)}
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in (shapes | {"lora_V": (N, k)}).items()}
    kept = None if mask is None else (torch.rand(r, generator=generator) < 0.7).to(mask)
    dy = torch.randn(M, N, generator=generator)

    def linear(**t):
        return nk.lora2_linear(**t, mask=kept, scaling=0.5)

    def composed(lora_v, lora_u, lora_E, lora_U, lora_V, **t):
        core = TABLE["reference"].lora2_core(lora_u, lora_E, lora_U, kept)
        return testing.plain_linear(**t, lora_A=lora_v, lora_B=lora_V, lora_N=core, scaling=0.5)

    actual = testing.outputs(linear, tensors, dy)
    exact = testing.outputs(composed, {n: t.double() for n, t in tensors.items()}, dy.double())
    for name, expected in exact.items():
        torch.testing.assert_close(actual[name].double(), expected, rtol=1e-4, atol=1e-4)
    # What wants to see operators sees the core, what kept factors goes on from them.
    y = linear(**{n: t.requires_grad_() for n, t in tensors.items()})
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        grads = torch.autograd.grad(y, list(tensors.values()), dy)
    assert "nlora_kernels::lora2_core_backward" in {event.key for event in profile.key_averages()}
    for name, grad in zip(tensors, grads, strict=True):
        torch.testing.assert_close(grad.double(), exact[f"d{name}"], rtol=1e-4, atol=1e-4)


def test_a_call_it_cannot_take_is_refused_by_name():
    p = testing.problem(4, 3, 2, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, got float64"):
        nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, backend="cpu")
    with pytest.raises(ValueError, match="name must be one of portable, neon, avx2, avx512, amx, got 'sse'"):
        _C.cap_cpu_tier("sse")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_a_cpu_without_half_precision_products_converts_to_fp32(tier, dtype):
    way, pieces = CPU.plan(dtype, 512, 768, 768, 8)
    if not _C.cpu_multiplies(getattr(_C, short(dtype))):
        assert (way, pieces) == ("whole", 3)
    elif tier == "avx512" and dtype == torch.bfloat16:
        # By pairs, as fast as the library, and the adapter among them.
        assert (way, pieces) == ("whole", 1)
    else:
        assert way != "whole"


def test_without_the_extension_the_backend_says_why(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_IMPORT_ERROR", ModuleNotFoundError("no module named _C"), raising=False)
    assert "without C++ kernels" in nk.backends.available()["cpu"]
    p = testing.problem(4, 3, 2, 2)
    nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B)
    with pytest.raises(ValueError, match="'cpu' cannot take this call: .*C\\+\\+ compiler.*no module named _C"):
        nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, backend="cpu")
    # There, but not for this PyTorch: a compiler would not help.
    monkeypatch.setattr(native, "_IMPORT_ERROR", ImportError("torch must be 2.11 or newer"))
    assert nk.backends.available()["cpu"] == "the C++ kernels cannot be loaded: torch must be 2.11 or newer"


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs a compiler for Arm and QEMU (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_the_kernels_built_for_arm_compute_the_same_under_an_emulator():
    ran = subprocess.run([sys.executable, "setup.py", "-q", "arm"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    # On a CPU with products of bf16 and on one without.
    assert ran.stdout.count(", 0 failures") == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers():
    ran = subprocess.run([sys.executable, "setup.py", "-q", "sanitize"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
