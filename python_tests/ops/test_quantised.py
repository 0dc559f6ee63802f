"""Weights in few bits as operands: decoded as their libraries do, within the error budget, no dense copy of any."""

import copy
import functools
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, native, quantised
from nlora_kernels.backends.cpu import plans
from nlora_kernels.backends.cpu.costs import allowed
from nlora_kernels.backends.quantised import Coded, Opaque, Unreadable
from nlora_kernels.layers import branch as branches
from nlora_kernels.ops.api import frozen_linear
from python_tests.tiers import TIERS, capped

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def four_bit(weight, kind="nf4", block=64, nested=False):
    bnb = pytest.importorskip("bitsandbytes")
    options = {"quant_type": kind, "blocksize": block, "compress_statistics": nested}
    return bnb.nn.Params4bit(weight.clone(), requires_grad=False, **options).to("cpu")


def packed_for_cpu(weight, **options):
    """As the first inference on a CPU with avx512_bf16 leaves it."""
    bnb = pytest.importorskip("bitsandbytes")
    plain = four_bit(weight, **options)
    data, state = bnb.functional._convert_weight_packed_for_cpu(plain.data, copy.copy(plain.quant_state))
    options = {"quant_state": state, "blocksize": plain.blocksize, "quant_type": plain.quant_type}
    return bnb.nn.Params4bit(data, requires_grad=False, bnb_quantized=True, **options)


def int8(weight):
    bnb = pytest.importorskip("bitsandbytes")
    return bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")


def by_torchao(name, weight, **options):
    quantization = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data = weight.clone()
    quantization.quantize_(linear, getattr(quantization, name)(**options))
    return linear.weight.requires_grad_(False)


def nf4_of_torchao(weight):
    quantization = pytest.importorskip("torchao.quantization")
    return quantization.NF4Tensor.from_tensor(weight, 64, 32)


def int4_of_torchao(weight):
    quantization = pytest.importorskip("torchao.quantization")
    return by_torchao("IntxWeightOnlyConfig", weight, weight_dtype=torch.int4, granularity=quantization.PerGroup(32))


# Of a weight, and the multiples that its shape must be of.
FORMATS = {
    "nf4": (four_bit, 1, 1),
    "nf4_nested": (functools.partial(four_bit, nested=True), 1, 1),
    "fp4": (functools.partial(four_bit, kind="fp4"), 1, 1),
    "fp4_nested_256": (functools.partial(four_bit, kind="fp4", block=256, nested=True), 1, 1),
    "nf4_packed_for_cpu": (packed_for_cpu, 32, 64),
    "fp4_nested_packed_for_cpu": (functools.partial(packed_for_cpu, kind="fp4", nested=True), 32, 64),
    "int8": (int8, 1, 1),
    "torchao_int8": (functools.partial(by_torchao, "Int8WeightOnlyConfig"), 1, 1),
    "torchao_float8": (functools.partial(by_torchao, "Float8WeightOnlyConfig"), 1, 1),
    "torchao_int4": (int4_of_torchao, 1, 32),
    "torchao_nf4": (nf4_of_torchao, 32, 64),
}


def exactly(weight, shape) -> torch.Tensor:
    """What bitsandbytes' formula makes of a weight as it stores it, in fp32."""
    state = weight.quant_state
    scales = state.absmax
    if state.nested:
        inner = state.state2
        place = torch.arange(len(scales)) // inner.blocksize
        scales = inner.code[scales.long()] * inner.absmax[place] + state.offset
    codes = weight.data.view(-1)
    values = state.code[torch.stack([codes >> 4, codes & 15], 1).view(-1).long()][: shape[0] * shape[1]]
    place = torch.arange(len(values)) // state.blocksize
    return (values * scales[place]).view(shape)


@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("block", [64, 128, 1024, 4096])
@pytest.mark.parametrize("shape", [(64, 128), (33, 77), (5, 101), (7, 4100)], ids=str)
def test_four_bits_are_decoded_bit_by_bit_as_by_bitsandbytes(tier, shape, block, nested):
    for kind in ("nf4", "fp4"):
        weight = four_bit(torch.randn(shape), kind, block, nested)
        exact = exactly(weight, shape)
        for dtype in DTYPES:
            view = quantised.view(weight).to(dtype)
            assert torch.equal(view.decode(), exact.to(dtype))
            rows, cols = slice(1, 5), slice(3, 60)
            assert torch.equal(view.decode(rows, cols), exact[rows, cols].to(dtype))
    if block == 64 and shape[1] % 64 == 0:
        # bitsandbytes itself takes a longer block than a row apart on some CPUs.
        dequantised = sys.modules["bitsandbytes"].functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(exact, dequantised)


@pytest.mark.parametrize("name", FORMATS)
def test_every_part_and_tile_is_the_plain_formula(tier, name):
    make, rows, cols = FORMATS[name]
    N, K = 3 * max(rows, 13), 5 * max(cols, 21)
    view = quantised.view(make(torch.randn(N, K)))
    assert isinstance(view, Coded) and view.shape == (N, K)
    for dtype in DTYPES:
        view = view.to(dtype)
        whole = view._plain(0, N, 0, K).to(dtype)
        assert torch.equal(view.decode(), whole)
        assert torch.equal(view.decode(slice(7, 30), slice(5, 66)), whole[7:30, 5:66])
        assert torch.equal(torch.cat([tile.clone() for _, tile in view.tiles(0)]), whole)
        assert torch.equal(torch.cat([tile.clone() for _, tile in view.tiles(1)], 1), whole)
        assert torch.equal(torch.cat(list(view.split(10, 1)), 1), whole)
        picked = torch.tensor([8, 0, 31])
        assert torch.equal(view.index_select(0, picked), whole[picked])
        assert torch.equal(view.index_select(1, picked), whole[:, picked])
    again = quantised.restored(view.description(), view.tensors)
    assert again.dtype == view.dtype and torch.equal(again.decode(), view.decode())


@pytest.mark.parametrize("shape", [(513, 64), (64, 513)], ids=str)
def test_a_last_part_of_one_line_is_no_less_a_part(shape):
    weight = testing.four_bits(*shape, torch.float32, nested=False)
    for dim in (0, 1):
        assert torch.equal(torch.cat(list(weight.split(512, dim)), dim), weight.decode())


def test_a_scale_that_is_not_finite_is_no_weight_to_start_from():
    weight = testing.four_bits(64, 64, torch.float32, nested=False)
    weight.scales[3] = torch.nan
    with pytest.raises(ValueError, match="weight must be finite"):
        nk.init.nystrom(weight, 2)


def test_a_column_of_tiles_is_cut_where_a_weight_is_large(monkeypatch):
    monkeypatch.setattr("nlora_kernels.backends.quantised.base._TILE", 1 << 12)
    view = quantised.view(four_bit(torch.randn(130, 200)))
    assert len(list(view.tiles(0))) == 3 and len(list(view.tiles(1))) == 4
    assert torch.equal(torch.cat([tile.clone() for _, tile in view.tiles(1)], 1), view.decode())


def test_packing_for_the_cpu_loses_the_bits_of_the_scales_alone():
    weight = torch.randn(64, 128)
    plain, packed = (quantised.view(make(weight)).decode() for make in (four_bit, packed_for_cpu))
    assert (plain - packed).abs().max() <= 2**-8 * plain.abs().max()


# Half of the widest step of a code, whose largest value is 1.
HALF_STEPS = {"nf4": (1 - 0.6962) / 2, "fp4": 1 / 6, "int4": 1 / 15, "float8": 16 / 448, "int8": 1 / 254}


@pytest.mark.parametrize("name", FORMATS)
def test_what_quantises_itself_is_close_to_what_it_was(name):
    weight = torch.randn(96, 128)
    decoded = quantised.view(FORMATS[name][0](weight)).decode().float()
    (half_step,) = (half for code, half in HALF_STEPS.items() if code in name)
    # Scales that are codes of 8 bits themselves, or rounded to 16, lose less than a step of 8 bits.
    assert (decoded - weight).abs().max() <= (half_step + 2**-7) * weight.abs().max()


# M, K, N, R as few and many rows, ragged, in more blocks than one of k and of columns, and of a rank that is not small.
SHAPES = [(1, 64, 32, 4), (5, 77, 33, 3), (33, 400, 1000, 5), (150, 320, 96, 65), (40, 1100, 90, 20)]


def ways():
    for plan in ("whole", "adapter") if native._C else ():
        for tier in TIERS:
            with capped(tier) as there:
                if there:
                    yield "cpu", tier, plan
    yield "lean", "portable", None
    yield "reference", "portable", None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", FORMATS)
def test_results_keep_the_budget_of_the_decoded_weight(monkeypatch, shape, dtype, name):
    make, rows, cols = FORMATS[name]
    M, K, N, R = shape
    N, K = -(-N // rows) * rows, -(-K // cols) * cols
    p = testing.problem(M, K, N, R, dtype=dtype, bias=N % 2 == 0, strided=R == 5)
    weight = make(p.weight.float())
    p.weight = quantised.view(weight).to(dtype).decode()
    tensors = {n: t for n in testing.TENSORS if (t := getattr(p, n)) is not None}
    wrt = [n for n in tensors if n != "weight"]
    plain, base = (functools.partial(testing.plain_linear, scaling=s) for s in (p.scaling, 0.0))
    budget = testing.Budget(plain, base, tensors, p.dy, wrt)

    def ours(backend, quantised_weight, weight, **arguments):
        return nk.lora_linear(weight=quantised_weight, scaling=p.scaling, backend=backend, **arguments)

    for backend, tier, way in ways():
        if way:

            def plan(dtype, *sizes, way=way):
                return plans.Plan(way, allowed(plans.setting(dtype))[-1])

            monkeypatch.setattr(type(TABLE["cpu"]), "decoding_plan", staticmethod(plan))
        with capped(tier):
            budget.check(testing.outputs(functools.partial(ours, backend, weight), tensors, p.dy, wrt))


@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("name", FORMATS)
def test_without_an_adapter_what_is_not_finite_goes_where_the_weight_sends_it(monkeypatch, name, M):
    """And dx = dy·W, whatever x is."""
    for backend, tier, way in ways():
        if way:
            monkeypatch.setattr(type(TABLE["cpu"]), "decoding_plan", lambda *sizes, way=way: plans.Plan(way))
        monkeypatch.setattr("nlora_kernels.backends._preferred", backend)
        for dtype in DTYPES:
            weight = quantised.view(FORMATS[name][0](torch.randn(64, 128))).to(dtype)
            x, bias, dy = (torch.randn(*shape, dtype=dtype) for shape in ((M, 128), (64,), (M, 64)))
            x[0, 3], x[-1, 70] = torch.inf, torch.nan if M > 1 else -torch.inf
            with capped(tier):
                y = frozen_linear(x.requires_grad_(), weight, bias)
                (dx,) = torch.autograd.grad(y, x, dy)
            exact, tolerance = torch.nn.functional.linear(x, weight.decode(), bias), 4 * torch.finfo(dtype).eps
            assert torch.equal(y.isnan(), exact.isnan()) and torch.equal(y.isinf(), exact.isinf())
            for ours, expected in ((y[1:-1], exact[1:-1]), (dx, dy @ weight.decode())):
                assert testing.error_norm(ours, expected.double()) <= tolerance * expected.double().norm() * 8


@pytest.mark.parametrize(
    "x, weight, bias, said",
    [
        ((5, 127), (64, 128), None, r"x must have shape \(..., 128\), got \(5, 127\)"),
        ((5, 128), (64, 128), (63,), r"bias must have shape \(64,\), got \(63,\)"),
    ],
)
def test_a_weight_without_an_adapter_is_checked_too(x, weight, bias, said):
    weight = quantised.view(four_bit(torch.randn(weight)))
    with pytest.raises(ValueError, match=said):
        frozen_linear(torch.randn(x), weight, bias and torch.randn(bias))


def problem(weight):
    p = testing.problem(6, 128, 64, 4)
    return p.x.requires_grad_(), weight, p.lora_A.requires_grad_(), p.lora_B.requires_grad_(), p.lora_N


def test_lora2_and_every_mode_see_the_same():
    weight = four_bit(torch.randn(64, 128))
    x, _, A, B, N = arguments = problem(weight)
    expected = nk.lora_linear(x, quantised.view(weight).decode(), A, B, N)
    y = nk.lora_linear(*arguments)
    torch.testing.assert_close(y, expected)
    u, E, U = torch.randn(5, 4), torch.randn(5), torch.randn(4, 5)
    inner = nk.lora2_core(u, E, U)
    torch.testing.assert_close(nk.lora2_linear(x, weight, A, u, E, U, B), nk.lora_linear(x, weight, A, B, inner))
    with FlopCounterMode(display=False) as counter:
        shown = nk.lora_linear(*arguments)
        grads = torch.autograd.grad(shown.sum(), (x, A, B))
    torch.testing.assert_close(shown, expected)
    for ours, exact in zip(grads, torch.autograd.grad(expected.sum(), (x, A, B), retain_graph=True), strict=True):
        torch.testing.assert_close(ours, exact)
    with FlopCounterMode(display=False) as dense:
        torch.autograd.grad(nk.lora_linear(x, expected.new_empty(64, 128), A, B, N).sum(), (x, A, B))
    assert counter.get_total_flops() == dense.get_total_flops() > 0
    constants = [t.detach() for t in arguments[1:]]
    constants[0] = weight
    traced = torch.jit.trace(lambda x: nk.lora_linear(x, *constants), (x.detach(),))
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-4)
    moved = torch.func.grad(lambda x: nk.lora_linear(x, *arguments[1:]).square().sum())(x)
    torch.testing.assert_close(moved, torch.autograd.grad(expected.square().sum(), x)[0], rtol=1e-4, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert nk.lora_linear(*arguments).dtype == torch.bfloat16


def test_second_derivatives():
    x, *others = problem(int8(torch.randn(64, 128)))
    grad = torch.autograd.grad(nk.lora_linear(x, *others).square().sum(), x, create_graph=True)[0]
    dense = quantised.view(others[0]).decode()
    exact = torch.autograd.grad(nk.lora_linear(x, dense, *others[1:]).square().sum(), x, create_graph=True)[0]
    ours, expected = (torch.autograd.grad(g.sum(), x)[0] for g in (grad, exact))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_as_it_is_kept_is_all_that_is_saved_of_it(name):
    x, weight, *others = problem(FORMATS[name][0](torch.randn(64, 128)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nk.lora_linear(x, weight, *others)
    assert not [t for t in saved if t.is_floating_point() and t.shape == (64, 128) and t.dtype.itemsize > 1]
    assert sum(t.dtype.itemsize * t.numel() for t in saved if t is not x) < 2 * 64 * 128


def test_a_weight_that_changes_before_backward_is_noticed():
    x, weight, *others = problem(four_bit(torch.randn(64, 128)))
    y = nk.lora_linear(x, weight, *others)
    weight.data.add_(1)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def by_copying(weight):
    weight.data = weight.data.clone()


def by_packing(weight):
    """As inference between forward and backward does."""
    weight.data, _ = sys.modules["bitsandbytes"].functional._convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )


def by_gathering_again(weight):
    """As shards are: freed after forward, and the same values in other memory before backward."""
    values, storage = weight.data.clone(), weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    # It would get the same memory back.
    taken = [torch.full_like(values, 255) for _ in range(9)]
    storage.resize_(size)
    weight.data.copy_(values)
    assert taken


@pytest.mark.parametrize("moved", [by_copying, by_packing, by_gathering_again], ids=lambda f: f.__name__)
def test_a_weight_with_new_memory_before_backward_gives_the_gradients_of_forward(moved):
    x, weight, *others = problem(four_bit(torch.randn(64, 128), nested=True))
    (expected,) = torch.autograd.grad(nk.lora_linear(x, quantised.view(weight).decode(), *others).sum(), x)
    y = nk.lora_linear(x, weight, *others)
    moved(weight)
    # What is freed is written to by others.
    written = [torch.full((64 * 64, 1), 255, dtype=torch.uint8) for _ in range(50)]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)
    assert written


@pytest.mark.parametrize("backend", [None, "lean", "reference"])
def test_a_weight_without_memory_is_said(backend):
    x, weight, *others = problem(four_bit(torch.randn(64, 128)))
    y = nk.lora_linear(x, weight, *others, backend=backend)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight has no memory: its storage was freed"):
        y.sum().backward()
    with pytest.raises(ValueError, match="weight has no memory: its storage was freed"):
        nk.lora_linear(x, weight, *others, backend=backend)


def test_a_weight_that_is_to_train_is_refused():
    weight = by_torchao("Int8WeightOnlyConfig", torch.randn(64, 128)).requires_grad_()
    with pytest.raises(
        ValueError, match=r"weight is quantised and gets no gradient: call weight.requires_grad_\(False"
    ):
        nk.lora_linear(*problem(weight))


class Halved(torch.Tensor):
    """A quantised tensor of no library that is known."""

    def dequantize(self):
        return self.as_subclass(torch.Tensor) / 2


def test_any_other_is_what_it_dequantises_to():
    x, weight, *others = problem(torch.randn(64, 128).as_subclass(Halved))
    assert isinstance(quantised.view(weight), Opaque)
    for backend in (None, "lean", "reference"):
        y = nk.lora_linear(x, weight, *others, backend=backend)
        torch.testing.assert_close(y, nk.lora_linear(x, weight.dequantize(), *others))
    y.sum().backward()
    assert x.grad is not None


def test_nf4_of_torchao_is_decoded_bit_by_bit_as_by_torchao():
    for dtype in DTYPES:
        weight = nf4_of_torchao(torch.randn(64, 128).to(dtype))
        assert torch.equal(quantised.view(weight).decode(), weight.get_original_weight())


class Tiled(torch.Tensor):
    """As torchao's weights of four bits for GPUs, of which it tells no values."""


Tiled.__module__ = "torchao.quantization"


def test_a_weight_of_torchao_without_values_is_left_to_its_layer():
    linear = torch.nn.Linear(128, 64)
    linear.weight = torch.nn.Parameter(linear.weight.detach().as_subclass(Tiled), requires_grad=False)
    assert quantised.view(linear.weight) is None
    assert "is a Parameter" in branches.obstacle(linear) or "is a Tiled" in branches.obstacle(linear)


@pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("torchao")])
def test_a_mode_leaves_nothing_behind_that_a_later_call_would_find(name):
    """Whatever was made in inference mode or as a fake."""
    make = FORMATS[name][0]
    first, second = make(torch.randn(64, 128)), make(torch.randn(64, 128))
    x, _, *others = problem(None)
    with torch.inference_mode():
        nk.lora_linear(x, first, *others)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        fake = [fakes.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in (x, *others)]
        y = nk.lora_linear(fake[0], first, *fake[1:])
        assert y.shape == (6, 64)
    y = nk.lora_linear(x, second, *others)
    y.sum().backward()
    assert type(y) is torch.Tensor and x.grad.isfinite().all()


def test_memory_that_is_shared_first_in_inference_mode_can_be_written_to_later(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr("nlora_kernels.backends.quantised.base._shared", {})
    weight = quantised.view(four_bit(torch.randn(64, 128)))
    with torch.inference_mode():
        first = quantised.shared_memory(weight)
    again = quantised.shared_memory(weight)
    assert again.data_ptr() == first.data_ptr() and again.shape == (64, 128)
    again.zero_()


def broken(weight, **attributes):
    for name, value in attributes.items():
        setattr(weight.quant_state, name, value(weight.quant_state))
    return weight


@pytest.mark.parametrize(
    "attributes, said",
    [
        ({"quant_type": lambda s: "nf5"}, "must be of nf4 or fp4, got 'nf5'"),
        ({"absmax": lambda s: s.absmax[1:]}, "there must be 128 scales, got 127"),
        ({"absmax": lambda s: s.absmax.int()}, "scales must be of float32 or bfloat16 or float16, got int32"),
        ({"absmax": lambda s: None}, "scales must be a tensor, got NoneType"),
        ({"code": lambda s: s.code[:8]}, "there must be 16 values of the codes, got 8"),
        ({"shape": lambda s: (64,)}, r"must say a shape \(out, in\), got \(64,\)"),
        ({"shape": lambda s: (64, 256)}, "there must be 8192 codes, got 4096"),
        ({"blocksize": lambda s: 0}, "must be a positive integer, got 0"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_a_state_that_does_not_fit_is_said(attributes, said):
    weight = broken(four_bit(torch.randn(64, 128)), **attributes)
    with pytest.raises(Unreadable, match=said):
        nk.lora_linear(*problem(weight))


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("state2", None, "block size of the scales must be a positive integer, got None"),
        ("offset", None, "offset of the scales must be a tensor, got NoneType"),
        ("offset", 0.5, "offset of the scales must be a tensor, got float"),
        ("dtype", None, "must say the dtype of the values, got None"),
        ("shape", (64, 128.0), r"must say a shape \(out, in\), got \(64, 128.0\)"),
        ("code", None, "values of the codes must be a tensor, got NoneType"),
        ("blocksize", True, "must be a positive integer, got True"),
    ],
)
def test_a_nested_state_that_lacks_something_is_said(name, value, said):
    weight = four_bit(torch.randn(64, 128), nested=True)
    setattr(weight.quant_state, name, value)
    with pytest.raises(Unreadable, match=said):
        nk.lora_linear(*problem(weight))


def test_nested_scales_that_do_not_fit_are_said():
    weight = four_bit(torch.randn(64, 128), nested=True)
    weight.quant_state.state2.absmax = torch.ones(3)
    with pytest.raises(Unreadable, match="there must be 1 scales of the scales, got 3"):
        nk.lora_linear(*problem(weight))


MEMORY = """
import pathlib, torch, bitsandbytes as bnb, nlora_kernels as nk

def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10

def step(K, N, dtype):
    weight = bnb.nn.Params4bit(torch.empty(N, K // 2, dtype=torch.uint8).fill_(87).view(-1, 1), bnb_quantized=True)
    state = bnb.functional.quantize_4bit(torch.ones(64, 64), quant_type="nf4")[1]
    state.shape, state.absmax = torch.Size((N, K)), torch.ones(N * K // 64)
    weight.quant_state = state
    x, A, B = torch.randn(64, K, dtype=dtype, requires_grad=True), torch.randn(4, K), torch.randn(N, 4)
    call = lambda: nk.lora_linear(x, weight, A.requires_grad_(), B.requires_grad_()).sum().backward()
    before = peak()
    call()
    return peak() - before

for dtype in (torch.float32, torch.bfloat16):
    step(256, 256, dtype)
    print(step(8192, 8192, dtype))
"""


@pytest.mark.skipif(native._C is None or sys.platform != "linux", reason="needs the C++ kernels and /proc")
def test_a_training_step_makes_no_dense_copy():
    pytest.importorskip("bitsandbytes")
    lines = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout.split()
    # Of 128 and 256 MiB in bf16 and fp32, where the packed weight has 32.
    assert len(lines) == 2 and all(int(grown) < 64 << 20 for grown in lines), lines
