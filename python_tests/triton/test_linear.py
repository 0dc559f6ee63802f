"""The Triton backend against fp64: on a GPU, or in Triton's interpreter on the CPU where TRITON_INTERPRET=1 is set."""

import dataclasses
import os
import signal
import subprocess
import sys

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, Call, Dropout, Needs

# The interpreter has to be chosen before triton is imported, and then holds for the whole process.
if TABLE["triton"].unavailable():
    reason = f"{TABLE['triton'].unavailable()}; `TRITON_INTERPRET=1 pytest {__file__}` runs these tests"
    pytest.skip(reason, allow_module_level=True)

from nlora_kernels.backends import triton as backend  # noqa: E402
from nlora_kernels.backends.triton import device, launch, linear  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_plans")

DEVICE = "cpu" if device.interpreted() else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if device.interpreted() else [torch.bfloat16])
# M, K, N, R: empty, one row, odd everywhere, a rank that is no power of two, exceeds every size, or 256 and beyond.
SHAPES = [
    (0, 12, 8, 3),
    (1, 33, 17, 5),
    (7, 65, 31, 13),
    (3, 4, 5, 9),
    (1, 1, 1, 1),
    (130, 96, 96, 8),
    (37, 128, 300, 64),
    (20, 40, 24, 256),
    (20, 40, 24, 257),
]


def short(value):
    return str(value).removeprefix("torch.")


@pytest.fixture(autouse=True)
def time_limit():
    """A fault in the protocol of the single launch waits for ever."""

    def expire(*_):
        raise TimeoutError("the kernel did not end within 60 seconds of this process's own time")

    signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, 60)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
def test_results_are_within_the_error_budget(dtype, shape, core):
    for seed, (bias, strided) in enumerate([(True, False), (False, True)]):
        p = testing.problem(*shape, dtype=dtype, core=core, bias=bias, strided=strided, device=DEVICE, seed=seed)
        testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="triton"), p)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["two", "single"])
@pytest.mark.parametrize("capability", [80, 90], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("processors, splits", [(1, 1), (4, 3)], ids=["1program", "4programs"])
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
def test_every_form_of_launch(small_tiles, form, capability, processors, splits, dtype, core):
    small_tiles(form, capability, processors, splits)
    # The strides of the first shape allow descriptors, those of the others do not.
    for M, K, N, R in [(70, 48, 32, 24), (33, 25, 37, 13), (5, 8, 20, 40)]:
        p = testing.problem(M, K, N, R, dtype=dtype, core=core, device=DEVICE)
        testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="triton"), p)


# How a matrix of any shape may lie in memory; a descriptor can describe the first alone.
LAYOUTS = {
    "plain": lambda t: t,
    "one row expanded": lambda t: t[:1].expand(t.shape),
    "one column expanded": lambda t: t[:, :1].expand(t.shape),
    "overlapping rows": lambda t: t.flatten().as_strided(t.shape, (8, 1)),
    "unaligned start": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "unaligned rows": lambda t: torch.cat([t, t[:, :1]], 1)[:, :-1],
    "transposed": lambda t: t.T.contiguous().T,
}


@pytest.fixture
def descriptors(monkeypatch):
    """Holds the matrices of which descriptors were made, each checked as cuTensorMapEncodeTiled does."""
    made = []

    class Descriptor(launch.TensorDescriptor):
        def __post_init__(self):
            super().__post_init__()
            (row, col), size = self.strides, self.base.element_size()
            assert col == 1 and row * size % 16 == 0 and row >= self.shape[1] and self.base.data_ptr() % 16 == 0
            made.append(self.base)

        from_tensor = classmethod(lambda cls, t, block: cls(t, t.shape, t.stride(), block))

    monkeypatch.setattr(launch, "TensorDescriptor", Descriptor)
    return made


@pytest.mark.parametrize("form", ["two", "single"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operand", ["x", "weight", "lora_A", "lora_B", "lora_N", "bias", "dy"])
def test_every_layout_of_every_operand(small_tiles, descriptors, form, operand, layout):
    small_tiles(form, 90)
    p = testing.problem(70, 48, 32, 16, dtype=torch.float16, device=DEVICE)
    laid = getattr(p, operand)
    laid = LAYOUTS[layout](laid.repeat(2, 1))[0] if operand == "bias" else LAYOUTS[layout](laid)
    p = dataclasses.replace(p, **{operand: laid})
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="triton"), p)
    found = any(t.data_ptr() == laid.data_ptr() and t.stride() == laid.stride() for t in descriptors)
    assert found == (layout == "plain" and operand not in ("lora_N", "bias")) and descriptors


@pytest.mark.parametrize("form", ["two", "single"])
def test_fp32_adapters_on_a_16_bit_base(small_tiles, form):
    small_tiles(form)
    for M in (9, 100):
        p = testing.problem(M, 64, 48, 8, dtype=torch.float16, adapter_dtype=torch.float32, device=DEVICE)
        actual = testing.results(p, nk.lora_linear, backend="triton")
        assert actual["dlora_A"].dtype == torch.float32 and actual["y"].dtype == torch.float16
        testing.assert_within_budget(actual, p)


@pytest.mark.parametrize("shape", [(67, 96, 80, 12), (1, 33, 17, 5), (130, 40, 200, 100)], ids=str)
@pytest.mark.parametrize("method", ["lora", "slora", "inttune", "lora2"])
def test_fp32_results_to_two_millionths(shape, method):
    M, K, N, R = shape
    p = testing.problem(*shape, core=method != "lora", device=DEVICE)
    trained = {"inttune": ("lora_N",)}.get(method, ("lora_A", "lora_N", "lora_B"))
    leaves = {n: t.requires_grad_(n in (*trained, "x")) for n in testing.TENSORS if (t := getattr(p, n)) is not None}
    exact = {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}
    if method == "lora2":
        u, E, U = (torch.randn(s, device=DEVICE, requires_grad=True) for s in ((7, R), (7,), (R, 7)))
        mask = torch.tensor([1.0, 0, 1, 1, 0, 1, 1], device=DEVICE)
        leaves.pop("lora_N"), exact.pop("lora_N")
        inner = {"lora_u": u, "lora_E": E, "lora_U": U}
        exact_inner = {n: t.detach().double().requires_grad_() for n, t in inner.items()}
        outer = {"lora_A": "lora_v", "lora_B": "lora_V"}
        renamed = {outer.get(n, n): t for n, t in leaves.items()}
        y = nk.lora2_linear(**renamed, **inner, mask=mask, scaling=0.7, backend="triton")
        core = (exact_inner["lora_U"] * (exact_inner["lora_E"] * mask)) @ exact_inner["lora_u"]
        expected = testing.plain_linear(**exact, lora_N=core, scaling=0.7)
        leaves |= inner
        exact |= exact_inner
    else:
        y = nk.lora_linear(**leaves, scaling=0.7, backend="triton")
        expected = testing.plain_linear(**exact, scaling=0.7)
    wanted = [n for n, t in leaves.items() if t.requires_grad]
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], p.dy)
    exact_grads = torch.autograd.grad(expected, [exact[n] for n in wanted], p.dy.double())
    assert set(wanted) >= {
        "x",
        *(trained if method != "lora2" else ("lora_A", "lora_B", "lora_u", "lora_E", "lora_U")),
    } - {"lora_N" if method == "lora" else ""}
    for name, value, reference in zip(("y", *wanted), (y, *grads), (expected, *exact_grads), strict=True):
        assert testing.error_norm(value, reference) <= 2e-6 * reference.norm().item(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("r, k", [(1, 1), (8, 5), (70, 40), (40, 70)])
@pytest.mark.parametrize("mask_dtype", [None, torch.bool, torch.float32], ids=short)
def test_lora2_core(dtype, r, k, mask_dtype):
    u, E, U = (torch.randn(s, device=DEVICE, dtype=dtype, requires_grad=True) for s in ((r, k), (r,), (k, r)))
    kept = None if mask_dtype is None else torch.arange(r, device=DEVICE) % 3 != 1
    d_core = torch.randn(k, k, device=DEVICE, dtype=dtype)

    def results(u, E, U, d_core, mask, backend):
        core = nk.ops.autograd.core(u, E, U, mask, backend)
        return core, *torch.autograd.grad(core, (u, E, U), d_core)

    actual = results(u, E, U, d_core, None if kept is None else kept.to(mask_dtype), "triton")
    plain = results(u, E, U, d_core, kept, "reference")
    wide = [t.detach().double().requires_grad_() for t in (u, E, U)]
    exact = results(*wide, d_core.double(), kept, "reference")
    for a, b, c in zip(actual, plain, exact, strict=True):
        bound = 2 * testing.error_norm(b, c) + torch.finfo(dtype).eps * c.norm().item()
        assert a.dtype == dtype and testing.error_norm(a, c) <= bound


def test_launches_follow_one_another(small_tiles):
    small_tiles("single")
    many, few = testing.problem(120, 32, 48, 8, device=DEVICE), testing.problem(20, 16, 16, 4, device=DEVICE, seed=1)
    for p in (few, many, few, many):
        testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="triton"), p)
        # They share counters, which each leaves as it found them.
        counters = launch.counters(p.x, 1)
        assert counters is launch.counters(p.x, 1) and not counters.any()


@pytest.mark.parametrize("form", ["two", "single"])
def test_results_repeat_bitwise(small_tiles, form):
    small_tiles(form)
    p = testing.problem(64, 96, 80, 8, device=DEVICE)
    first, second = (testing.results(p, nk.lora_linear, backend="triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("needed", testing.TENSORS)
def test_each_gradient_alone(needed):
    p = testing.problem(19, 24, 18, 6, device=DEVICE)
    call = Call(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, p.scaling)
    _, T = linear.forward(call)
    needs = Needs(*(name == needed for name in testing.TENSORS))
    x = p.x if needed in ("lora_A", "weight") else None
    T = T if needed in ("lora_B", "lora_N") else None
    grads = linear.backward(call._replace(x=x), p.dy, T, needs)
    expected = testing.results(p)[f"d{needed}"]
    for name, grad in zip(testing.TENSORS, grads, strict=True):
        if name == needed:
            torch.testing.assert_close(grad, expected)
        else:
            assert grad is None


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_without_output_features_the_adapter_is_still_read(p):
    x, A = torch.randn(5, 12, device=DEVICE), torch.randn(3, 12, device=DEVICE)
    weight, B = torch.empty(0, 12, device=DEVICE), torch.empty(0, 3, device=DEVICE)
    dropout = Dropout(p, torch.tensor(7, device=DEVICE)) if p else None
    call = Call(x, weight, A, B, dropout=dropout)
    torch.testing.assert_close(linear.forward(call), TABLE["reference"].forward(call))


@pytest.mark.parametrize("dropout", [(0.0, None), (0.3, torch.tensor(5, device=DEVICE))], ids=["whole", "dropout"])
def test_opcheck(dropout):
    p = testing.problem(9, 24, 18, 6, device=DEVICE)
    op = torch.ops.nlora_kernels.lora_linear.default
    torch.library.opcheck(op, (p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, 0.7, *dropout, "triton"))
    _, T = op(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, 0.7, *dropout, "triton")
    arguments = (p.dy, p.x, T, p.weight, p.lora_A, p.lora_B, p.lora_N, 0.7, *dropout, [True] * 6, "triton")
    torch.library.opcheck(torch.ops.nlora_kernels.lora_linear_backward.default, arguments)
    u, E, U = (torch.randn(s, device=DEVICE) for s in ((4, 3), (4,), (3, 4)))
    torch.library.opcheck(torch.ops.nlora_kernels.lora2_core.default, (u, E, U, None, "triton"))
    arguments = (torch.randn(3, 3, device=DEVICE), u, E, U, None, "triton")
    torch.library.opcheck(torch.ops.nlora_kernels.lora2_core_backward.default, arguments)


def test_a_module_compiles_into_one_graph(monkeypatch, prefer):
    prefer("triton")
    linear = torch.nn.Linear(24, 18, device=DEVICE)
    module = nk.NLoraLinear.from_linear(linear, 4, init="slora")
    torch.nn.init.normal_(module.lora_B)
    x = torch.randn(7, 24, device=DEVICE, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), [x, module.lora_N])
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    actual = torch.autograd.grad(compiled(x).square().sum(), [x, module.lora_N])
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_fp32_takes_tf32_only_where_the_user_allowed_it():
    before = torch.backends.cuda.matmul.fp32_precision
    for allowed, precision in (("ieee", "ieee"), ("tf32", "tf32")):
        torch.backends.cuda.matmul.fp32_precision = allowed
        try:
            for dtype, expected in ((torch.float32, precision), (torch.float16, "ieee")):
                assert launch.precision(dtype, launch.tf32(dtype)) == expected
        finally:
            torch.backends.cuda.matmul.fp32_precision = before


def test_what_cannot_run_says_why(monkeypatch):
    with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, got float64"):
        p = testing.problem(3, 4, 5, 2, dtype=torch.float64, device=DEVICE)
        testing.results(p, nk.lora_linear, backend="triton")
    u, E, U = (torch.randn(s, device=DEVICE, dtype=torch.float64) for s in ((4, 3), (4,), (3, 4)))
    with pytest.raises(ValueError, match="lora_u must be float32, bfloat16 or float16, got float64"):
        nk.ops.autograd.core(u, E, U, None, "triton")
    if device.interpreted():
        with pytest.raises(ValueError, match="interpreter computes bfloat16 wrongly"):
            testing.results(testing.problem(3, 4, 5, 2, dtype=torch.bfloat16), nk.lora_linear, backend="triton")
    backend.unavailable.cache_clear()
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert nk.backends.available()["triton"] == "compute capability 8.0 or newer is needed, got 7.5"
    backend.unavailable.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        testing.results(testing.problem(3, 4, 5, 2), nk.lora_linear, backend="triton")
    with pytest.raises(ValueError, match="lora_u must be on a GPU, got cpu"):
        nk.ops.autograd.core(torch.randn(4, 3), torch.randn(4), torch.randn(3, 4), None, "triton")
    backend.unavailable.cache_clear()


def test_without_gpu_and_interpreter_the_reason_is_given():
    code = """
import nlora_kernels as nk, torch
print(nk.backends.available()["triton"])
try:
    nk.lora_linear(torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1), backend="triton")
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    reason, error = ran.stdout.splitlines()
    assert "torch sees no GPU" in reason and error.endswith(reason)
