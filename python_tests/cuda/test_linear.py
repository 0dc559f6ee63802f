"""The whole layer by backend "cuda", Python, host code and kernels, on the emulator against fp64."""

import functools
import itertools

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, Call, Needs
from python_tests.cuda import emulated
from python_tests.cuda.emulator import GRID_WAIT, synchronisation_calls

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ENGINES = pytest.mark.parametrize("ampere", [False, True], ids=["hopper", "ampere"])
# M, K, N, R: the smallest; ragged; a rank that has G made by a product of its own; one token; wide and low, so that
# every tile that the plan knows is taken by y and dx.
SHAPES = [
    (1, 8, 8, 8),
    (37, 72, 136, 16),
    (130, 136, 264, 24),
    (70, 200, 64, 136),
    (200, 64, 72, 64),
    (1, 264, 40, 8),
    (100, 8, 1000, 8),
    (100, 1000, 8, 8),
]


def short(value):
    return str(value).removeprefix("torch.")


@ENGINES
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_results_are_within_the_error_budget(monkeypatch, ampere, dtype, shape):
    # fp32 adapters, as PEFT has them, and those in the dtype of the base; with and without N and bias.
    for seed, (adapter_dtype, core) in enumerate([(FP32, True), (dtype, True), (FP32, False), (dtype, False)]):
        emulated.install(monkeypatch, ampere=ampere, lanes=seed == 1, resident=seed % 2)
        p = testing.problem(*shape, dtype=dtype, adapter_dtype=adapter_dtype, core=core, bias=seed % 3 == 0, seed=seed)
        actual = testing.results(p, nk.lora_linear, backend="cuda")
        assert actual["dlora_A"].dtype == adapter_dtype
        testing.assert_within_budget(actual, p)


@ENGINES
def test_a_wrong_result_is_outside_the_budget(monkeypatch, ampere):
    emulated.install(monkeypatch, ampere=ampere)
    p = testing.problem(37, 72, 136, 16, dtype=BF16)
    good = testing.results(p, nk.lora_linear, backend="cuda")
    for name, value in good.items():
        wrong = value.clone()
        wrong.view(-1)[wrong.numel() // 2] += wrong.abs().max() / 8
        with pytest.raises(AssertionError, match=name):
            testing.assert_within_budget({**good, name: wrong}, p)


@ENGINES
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
def test_each_gradient_is_the_same_whatever_else_is_wanted(monkeypatch, ampere, core):
    emulated.install(monkeypatch, ampere=ampere)
    p = testing.problem(37, 72, 136, 16, dtype=BF16, adapter_dtype=FP32, core=core)
    call = Call(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, p.scaling)
    _, T = TABLE["cuda"].forward(call)
    everything = TABLE["cuda"].backward(call, p.dy, T, Needs(*[True] * 4, core, True))
    for wanted in itertools.product([False, True], repeat=4 if core else 3):
        dx, dA, dB, dN = wanted if core else (*wanted, False)
        # What is not needed is not there.
        x = p.x if dA else None
        saved = T if dB or dN else None
        grads = TABLE["cuda"].backward(call._replace(x=x), p.dy, saved, Needs(dx, False, dA, dB, dN, False))
        for name, needed in zip(Needs._fields, (dx, False, dA, dB, dN, False), strict=True):
            ours = getattr(grads, name)
            assert (ours is not None) == needed
            if needed:
                expected = getattr(everything, name)
                # Without dx, H and G come from tiles of another shape.
                same = torch.equal(ours, expected) if dx else (ours - expected).norm() <= 2**-7 * expected.norm()
                assert same, f"{name} differs where {wanted} are wanted"


@ENGINES
@pytest.mark.parametrize("r", [128, 256])
def test_inttune_with_a_large_rank(monkeypatch, ampere, r):
    emulated.install(monkeypatch, ampere=ampere)
    p = testing.problem(130, 136, 72, r, dtype=BF16, adapter_dtype=FP32)
    call = {n: getattr(p, n) for n in testing.TENSORS}
    ours = functools.partial(nk.lora_linear, scaling=p.scaling, backend="cuda")
    plain, base = (functools.partial(testing.plain_linear, scaling=scaling) for scaling in (p.scaling, 0.0))
    wrt = ["x", "lora_N"]
    testing.Budget(plain, base, call, p.dy, wrt).check(testing.outputs(ours, call, p.dy, wrt))


@ENGINES
def test_results_are_the_same_bits_on_every_schedule(monkeypatch, ampere):
    p = testing.problem(200, 136, 264, 24, dtype=FP16)
    results = []
    for resident in (0, 1, 2):
        emulated.install(monkeypatch, ampere=ampere, resident=resident)
        results.append(testing.results(p, nk.lora_linear, backend="cuda"))
    assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in results[0])


# Every way that one launch of a layer hands something to the next: F, or A too, to the product for y; [F | B], and
# A, to that for dx, or to two where the rank is large; H and G to gradients; slices to their sums.
CHAINS = {
    "bf16": {"adapter_dtype": BF16},
    "fp32": {"adapter_dtype": FP32},
    "large rank": {"R": 136, "adapter_dtype": BF16},
}
SOURCES = ("gemm.cuh", "gradient.cuh", "finish.cuh")
WAITS = [(source, line) for source in SOURCES for line in synchronisation_calls(source, GRID_WAIT)]


def reported(monkeypatch, chain, seed, **options):
    """What the emulator says of forward and then backward."""
    sizes = {"M": 70, "K": 72, "N": 72, "R": 16} | CHAINS[chain]
    extension = emulated.install(monkeypatch, lanes=seed % 2 == 1, **options)
    # The seed is their number.
    extension.launches += ["none"] * seed
    try:
        testing.results(testing.problem(**sizes, dtype=BF16), nk.lora_linear, backend="cuda")
    except AssertionError as report:
        return str(report)
    return ""


@pytest.mark.parametrize("source, line", WAITS, ids=lambda v: str(v))
def test_a_launch_that_does_not_wait_for_the_one_before_is_caught(monkeypatch, source, line):
    found = {}
    for chain, seed in itertools.product(CHAINS, range(3)):
        said = reported(monkeypatch, chain, seed, source=source, skipped_line=line)
        found.setdefault(chain, []).append(said.startswith(("race", "uninitialised read", "grid dependency")))
    # One of the chains must show it on every schedule.
    assert any(map(all, found.values())), found


@pytest.mark.parametrize("chain", CHAINS)
def test_launches_that_begin_early_are_right_on_every_schedule(monkeypatch, chain):
    for seed, resident in itertools.product(range(6), (0, 1, 3)):
        assert not reported(monkeypatch, chain, seed, resident=resident)


def test_scattered_and_shifted_rows_are_copied(monkeypatch):
    emulated.install(monkeypatch)
    p = testing.problem(40, 72, 48, 8, dtype=BF16)
    expected = testing.results(p, nk.lora_linear, backend="cuda")

    def shifted(t):
        storage = torch.empty(t.numel() + 1, dtype=t.dtype)
        return storage[1:].view(t.shape).copy_(t)

    wide = torch.zeros(80, 144, dtype=BF16)
    wide[::2, ::2] = p.x
    moved = testing.Problem(**{**vars(p), "x": wide[::2, ::2], "dy": p.dy.T.contiguous().T, "bias": shifted(p.bias)})
    moved.lora_A = shifted(p.lora_A)
    actual = testing.results(moved, nk.lora_linear, backend="cuda")
    # The gradient of the weight is the library's, which multiplies other strides in another order.
    assert all(torch.equal(actual[name], expected[name]) for name in expected if name not in ("dweight", "dbias"))
    # One row is contiguous whatever its stride.
    single = testing.problem(1, 72, 48, 8, dtype=BF16)
    odd = testing.Problem(**{**vars(single), "x": single.x.as_strided((1, 72), (7, 1))})
    ours, plain = (testing.results(q, nk.lora_linear, backend="cuda") for q in (odd, single))
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    # What the sum of y hands back is one row, or one number, many times.
    for dy in (p.dy[:1].expand(40, 48), p.dy[:1, :1].expand(40, 48)):
        expanded, copied = (testing.Problem(**{**vars(p), "dy": t}) for t in (dy, dy.contiguous()))
        grads = [testing.results(q, nk.lora_linear, backend="cuda") for q in (expanded, copied)]
        assert all(torch.equal(grads[0][name], grads[1][name]) for name in ("dx", "dlora_A", "dlora_B", "dlora_N"))


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_lora2(monkeypatch, masked):
    extension = emulated.install(monkeypatch)
    p = testing.problem(37, 72, 136, 8, dtype=BF16, adapter_dtype=FP32)
    u, E, U = (torch.randn(s, requires_grad=True) for s in ((12, 8), (12,), (8, 12)))
    mask = torch.arange(12) % 3 != 1 if masked else None

    def grads(backend):
        y = nk.lora2_linear(p.x, p.weight, p.lora_A, u, E, U, p.lora_B, mask, backend=backend)
        return y, *torch.autograd.grad(y, (u, E, U), p.dy)

    for ours, plain in zip(grads("cuda"), grads("reference"), strict=True):
        assert (ours - plain).norm() <= 2**-7 * plain.norm()
    assert extension.launches == ["lora2_core", "run_linear_forward", "run_linear_backward", "lora2_core_backward"]


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=short)
@pytest.mark.parametrize("core", ["sample", "optimal"])
@pytest.mark.parametrize("how", ["leading", "norm"])
def test_initialisation_by_name(monkeypatch, dtype, core, how, prefer):
    weight = torch.randn(72, 96).to(dtype)
    expected = nk.init.nystrom(weight, 9, core=core, select=how)
    moved = nk.init.subtract_(weight.clone(), *expected, 0.5)
    extension = emulated.install(monkeypatch)
    prefer("cuda")
    ours = nk.init.nystrom(weight, 9, core=core, select=how)
    assert all(map(torch.equal, ours, expected)) and extension.launches == ["gather"]
    assert nk.init.subtract_(weight, *ours, 0.5) is weight and extension.launches[1:] == ["residual"]
    assert testing.error_norm(weight, moved.double()) <= 2 * torch.finfo(dtype).eps * moved.norm().item()
    # What the kernels cannot take goes the library's way.
    nk.init.nystrom(weight.T, 9)
    assert len(extension.launches) == 2


def test_no_tokens(monkeypatch):
    extension = emulated.install(monkeypatch)
    p = testing.problem(0, 16, 24, 8, dtype=BF16, adapter_dtype=FP32)
    testing.assert_within_budget(testing.results(p, nk.lora_linear, backend="cuda"), p)
    assert extension.launches == []


REFUSED = {
    "fp32": (dict(dtype=FP32), "x must be bfloat16 or float16, got float32"),
    "fp64 adapter": (dict(adapter_dtype=torch.float64), "lora_A must be float32, bfloat16 or float16, got float64"),
    "in": (dict(K=20), "in must be a multiple of 8, got 20"),
    "out": (dict(N=20), "out must be a multiple of 8, got 20"),
    "r": (dict(R=12), "r must be a multiple of 8, got 12"),
    "large r": (dict(R=264), "r must be at most 256, got 264"),
    "strided": (
        dict(strided=True),
        r"rows of weight must be contiguous and aligned to 16 bytes, got strides \(96, 2\)",
    ),
}


@pytest.mark.parametrize("changed, reason", REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_name(monkeypatch, changed, reason):
    emulated.install(monkeypatch)
    sizes = {name: changed.pop(name, size) for name, size in dict(M=8, K=24, N=24, R=8).items()}
    p = testing.problem(*sizes.values(), **{"dtype": BF16, **changed})
    with pytest.raises(ValueError, match=f"backend 'cuda' cannot take this call: {reason}"):
        nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, backend="cuda")


def test_a_tensor_of_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(TABLE["cuda"], "unavailable", lambda: None)
    p = testing.problem(8, 24, 24, 8, dtype=BF16)
    with pytest.raises(ValueError, match="x must be on a GPU, got cpu"):
        nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, backend="cuda")
    assert not TABLE["cuda"].verified_on
