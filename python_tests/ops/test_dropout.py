"""Dropout inside the operation: its mask, its results against fp64 with that mask, and where its seed comes from."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, Dropout, triton

# With TRITON_INTERPRET=1, or on a GPU, Triton is tested too.
BACKENDS = ["reference", "lean"] + ([] if TABLE["triton"].unavailable() else ["triton"])
DEVICE = "cuda" if "triton" in BACKENDS and not triton.device.interpreted() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Empty, one row, odd everywhere, a rank of a power of two, and one that a program does not hold whole.
SHAPES = [(0, 12, 8, 3), (1, 33, 17, 5), (70, 48, 32, 24), (130, 96, 96, 8), (20, 40, 24, 257)]
SEEDS = [0, 1, -3, 2**62 + 5]


def short(value):
    return str(value).removeprefix("torch.")


def drop(p, seed):
    return Dropout(p, torch.tensor(seed, device=DEVICE))


def masked_linear(x, weight, lora_A, lora_B, lora_N=None, bias=None, *, scaling=1.0, dropout):
    """The operation in plain PyTorch with a mask that is there as a tensor."""
    kept = dropout.kept(*x.shape).to(x.dtype) * dropout.scale
    adapter = testing.plain_linear(x * kept, torch.zeros_like(weight), lora_A, lora_B, lora_N, scaling=scaling)
    return F.linear(x, weight, bias) + adapter


def assert_masked(actual, p, dropout):
    tensors = {n: t for n in testing.TENSORS if (t := getattr(p, n)) is not None}
    plain = functools.partial(masked_linear, scaling=p.scaling, dropout=dropout)
    base = functools.partial(testing.plain_linear, scaling=0.0)
    budget = testing.Budget(plain, base, tensors, p.dy)
    assert actual.keys() == budget.exact.keys()
    budget.check(actual)


# The mask


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_the_mask_looks_independent(p, seed):
    """Sums over rows, columns, neighbours and squares of four are within what independent elements give."""
    n = 1024
    centred = drop(p, seed).kept(n, n).double() - (1 - p)
    variance = p * (1 - p)
    assert abs(centred.sum()) < 5 * n * variance**0.5
    for sums in (centred.sum(0), centred.sum(1)):
        assert sums.abs().max() < 6 * (n * variance) ** 0.5
    for step in (1, 2, 64):
        for a, b in ((centred[step:], centred[:-step]), (centred[:, step:], centred[:, :-step])):
            assert abs((a * b).sum()) < 5 * n * variance
    squares = centred.view(n // 2, 2, n // 2, 2).prod(3).prod(1)
    assert abs(squares.sum()) < 5 * n / 2 * variance**2
    other = drop(p, seed ^ 1).kept(n, n).double() - (1 - p)
    assert abs((centred * other).sum()) < 5 * n * variance


def test_the_mask_is_the_hash_as_written():
    """Computed once more, one element at a time, in unbounded integers."""

    def mix(h):
        h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
        h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
        return h ^ h >> 16

    for seed in SEEDS:
        low, high = seed % 2**32, seed // 2**32 % 2**32
        a, b = mix(low ^ mix(high ^ 1)), mix(high ^ mix(low ^ 2))
        kept = drop(0.3, seed).kept(9, 11)
        for row in range(9):
            for col in range(11):
                assert kept[row, col].item() == (mix(mix(row ^ a) ^ mix(col ^ b)) // 2 >= round(0.3 * 2**31))


def test_the_mask_follows_from_row_and_column_alone():
    large = drop(0.3, 7).kept(40, 50)
    assert torch.equal(large[:13, :20], drop(0.3, 7).kept(13, 20))
    assert drop(1.0, 7).kept(50, 50).sum() == 0 and drop(1e-12, 7).kept(50, 50).all()


# Results


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
def test_results_are_within_the_error_budget(backend, dtype, shape, core):
    for seed, strided in zip(SEEDS[1:3], (False, True), strict=True):
        p = testing.problem(*shape, dtype=dtype, core=core, bias=core, strided=strided, device=DEVICE, seed=seed % 10)
        assert_masked(testing.results(p, nk.lora_linear, backend=backend, dropout=0.3, seed=seed), p, drop(0.3, seed))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_count_as_rows(backend):
    p = testing.problem(30, 24, 18, 6, device=DEVICE)
    call = {n: getattr(p, n) for n in testing.TENSORS} | {"dropout": 0.5, "seed": 3, "backend": backend}
    y = nk.lora_linear(**call)
    assert torch.equal(nk.lora_linear(**call | {"x": p.x.view(2, 5, 3, 24)}).view(30, 18), y)
    assert torch.equal(nk.lora_linear(**call | {"seed": torch.tensor(3, device=DEVICE)}), y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lora2_linear_drops_like_lora_linear_with_its_core(backend):
    x, W, v, V = (torch.randn(s, device=DEVICE) for s in ((5, 12), (9, 12), (3, 12), (9, 3)))
    u, E, U = (torch.randn(s, device=DEVICE) for s in ((4, 3), (4,), (3, 4)))
    options = {"dropout": 0.4, "seed": 1, "backend": backend}
    y = nk.lora2_linear(x, W, v, u, E, U, V, **options)
    torch.testing.assert_close(y, nk.lora_linear(x, W, v, V, nk.lora2_core(u, E, U), **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_and_nothing_but_dropout(backend):
    p = testing.problem(20, 24, 18, 6, device=DEVICE)
    without = testing.results(p, nk.lora_linear, backend=backend)
    for seed in (None, 3):
        same = testing.results(p, nk.lora_linear, backend=backend, dropout=0.0, seed=seed)
        assert all(torch.equal(without[name], same[name]) for name in without)
    nothing = testing.results(p, nk.lora_linear, backend=backend, dropout=1.0)
    torch.testing.assert_close(nothing["y"], F.linear(p.x, p.weight, p.bias))
    torch.testing.assert_close(nothing["dx"], p.dy @ p.weight)
    assert not any(nothing[f"dlora_{letter}"].any() for letter in "ANB")


def test_gradcheck():
    p = testing.problem(4, 3, 2, 2, dtype=torch.float64)
    inputs = [getattr(p, name).requires_grad_() for name in testing.TENSORS]
    assert torch.autograd.gradcheck(lambda *t: nk.lora_linear(*t, scaling=0.7, dropout=0.4, seed=2), inputs)


# The seed


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_seed_comes_from_the_generator(backend):
    p = testing.problem(20, 24, 18, 6, device=DEVICE)

    def call():
        return nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, dropout=0.5, backend=backend)

    torch.manual_seed(1)
    first, second = call(), call()
    torch.manual_seed(1)
    assert torch.equal(call(), first) and not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_has_the_same_mask(backend, use_reentrant):
    p = testing.problem(20, 24, 24, 6, device=DEVICE)
    leaves = {n: getattr(p, n).requires_grad_() for n in testing.TENSORS}

    def two_layers(x):
        arguments = {**leaves, "backend": backend, "dropout": 0.5}
        return nk.lora_linear(**arguments | {"x": nk.lora_linear(**arguments | {"x": x}).tanh()})

    torch.manual_seed(1)
    expected = torch.autograd.grad(two_layers(leaves["x"]).square().sum(), list(leaves.values()))
    torch.manual_seed(1)
    y = checkpoint(two_layers, leaves["x"], use_reentrant=use_reentrant)
    y.square().sum().backward()
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves.values(), expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend):
    torch._dynamo.reset()
    p = testing.problem(20, 24, 18, 6, device=DEVICE)
    leaves = {n: getattr(p, n).requires_grad_() for n in testing.TENSORS}

    def step(**leaves):
        return nk.lora_linear(**leaves, dropout=0.5, backend=backend)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for call in (step, compiled):
        torch.manual_seed(1)
        y = call(**leaves)
        results.append((y, *torch.autograd.grad(y, list(leaves.values()), p.dy)))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


BAD_CALLS = {
    "negative": ({"dropout": -0.1}, ValueError, r"dropout must be within \[0, 1\], got -0.1"),
    "above_1": ({"dropout": 1.5}, ValueError, r"dropout must be within \[0, 1\], got 1.5"),
    "nan": ({"dropout": float("nan")}, ValueError, r"dropout must be within \[0, 1\], got nan"),
    "text": ({"dropout": "0.1"}, TypeError, "dropout must be a real number, got str"),
    "none": ({"dropout": None}, TypeError, "dropout must be a real number, got NoneType"),
    "bool": ({"dropout": True}, TypeError, "dropout must be a real number, got bool"),
    "seed_text": ({"seed": "1"}, TypeError, "seed must be an integer, a Tensor or None, got str"),
    "seed_bool": ({"seed": True}, TypeError, "seed must be an integer, a Tensor or None, got bool"),
    "seed_large": ({"seed": 2**63}, ValueError, "seed must fit into 64 bits"),
    "seed_dtype": ({"seed": torch.tensor(1.0)}, ValueError, "seed must hold one int64 on cpu, got torch.float32"),
    "seed_shape": ({"seed": torch.tensor([1, 2])}, ValueError, r"one int64 on cpu, got torch.int64 of shape \(2,\)"),
    "seed_device": ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed must hold one int64 on cpu"),
}


@pytest.mark.parametrize("changed, error, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls(changed, error, message):
    p = testing.problem(5, 12, 9, 3)
    with pytest.raises(error, match=message):
        nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, **{"dropout": 0.1} | changed)


def test_a_backend_without_dropout_says_so():
    if nk.backends.available()["cpu"]:
        pytest.skip("the backend cpu is not built")
    p = testing.problem(5, 12, 9, 3)
    with pytest.raises(ValueError, match="'cpu' cannot take this call: it has no dropout"):
        nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, dropout=0.1, backend="cpu")


# Layers


def plain_layers(p):
    linear = torch.nn.Linear(24, 18, device=DEVICE)
    nlora = nk.NLoraLinear.from_linear(linear, 6, init="slora", dropout=p)
    lora2 = nk.LoRA2Linear.from_linear(linear, 5, 6, dropout=p)
    torch.nn.init.normal_(nlora.lora_B), torch.nn.init.normal_(lora2.lora_E)
    return {"nlora": nlora, "lora2": lora2}


def peft_layers(p):
    peft = pytest.importorskip("peft")
    from nlora_kernels.peft import LoRA2Config, NLoraConfig, fuse

    configs = {
        "peft nlora": NLoraConfig(r=6, lora_dropout=p, target_modules=["0"], init_lora_weights="nystrom"),
        "peft residual": NLoraConfig(r=6, lora_dropout=p, target_modules=["0"], residual=True),
        "peft lora2": LoRA2Config(r=5, k=6, lora_dropout=p, target_modules=["0"]),
        "peft fused lora": peft.LoraConfig(r=6, lora_dropout=p, target_modules=["0"], init_lora_weights=False),
    }
    layers = {}
    for name, config in configs.items():
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(24, 18, device=DEVICE)), config)
        layers[name] = (fuse(model) if name == "peft fused lora" else model).base_model.model[0]
        for parameter in layers[name].parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    return layers


@pytest.fixture(params=["nlora", "lora2", "peft nlora", "peft residual", "peft lora2", "peft fused lora"])
def layer(request):
    return (peft_layers if request.param.startswith("peft") else plain_layers)(0.4)[request.param]


def adapter_of(layer):
    """(the base layer, (A, N, B), scaling)"""
    if isinstance(layer, nk.NLoraLinear | nk.LoRA2Linear):
        return layer.base, layer.matrices(), layer.scaling
    return layer.base_layer, layer.matrices("default"), layer.scaling["default"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_drops_inside_where_the_backend_gains_by_it(monkeypatch, layer, backend, prefer):
    prefer(backend)
    monkeypatch.setattr(TABLE[backend], "drops_inside", True)
    base, (A, N, B), scaling = adapter_of(layer)
    x = torch.randn(7, 24, device=DEVICE)
    N = torch.eye(len(A), device=DEVICE) if N is None else N
    with torch.no_grad():
        whole = layer.eval()(x)
        torch.testing.assert_close(whole, base(x) + scaling * x @ A.T @ N.T @ B.T, rtol=1e-5, atol=1e-4)
        layer.train()
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(3)
        kept = Dropout(0.4, torch.randint(2**63 - 1, (), device=DEVICE)).kept(*x.shape)
        expected = base(x) + scaling * (x * kept / 0.6) @ A.T @ N.T @ B.T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", ["", "reference", "lean"])
def test_a_layer_drops_outside_elsewhere(monkeypatch, layer, backend, prefer):
    """With the mask of PyTorch's own dropout, as PEFT does."""
    prefer(backend)
    if not backend:
        monkeypatch.setattr(TABLE["triton"], "verified_on", frozenset())
    base, (A, N, B), scaling = adapter_of(layer.train())
    x = torch.randn(7, 24, device=DEVICE)
    N = torch.eye(len(A), device=DEVICE) if N is None else N
    with torch.no_grad():
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(3)
        expected = base(x) + scaling * F.dropout(x, 0.4) @ A.T @ N.T @ B.T
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    name = () if isinstance(layer, nk.NLoraLinear | nk.LoRA2Linear) else ("default",)
    assert "PyTorch's own dropout is as fast" in layer.obstacle(*name) and layer.eval().obstacle(*name) is None


def test_what_is_left_of_an_initial_product_leaves_the_dropout_in_place(monkeypatch, prefer):
    """Beside a residual weight whose scaling was changed, of which the rest is not dropped."""
    prefer("lean")
    monkeypatch.setattr(TABLE["lean"], "drops_inside", True)
    layer = nk.NLoraLinear.from_linear(torch.nn.Linear(24, 18), 6, residual=True, dropout=0.4)
    layer.scaling = 3.0
    x = torch.randn(7, 24)
    (A, N, B), (A0, N0, B0) = layer.matrices(), (layer.lora_A0, layer.lora_N0, layer.lora_B0)
    with torch.no_grad():
        torch.manual_seed(3)
        y = layer(x)
        torch.manual_seed(3)
        dropped = F.dropout(x, 0.4)
        expected = layer.base(x) + 3 * dropped @ A.T @ N.T @ B.T + (1 - 3) * x @ A0.T @ N0.T @ B0.T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dropout, error", [(1.5, ValueError), ("0.1", TypeError), (True, TypeError)])
def test_layers_refuse_a_bad_dropout(dropout, error):
    with pytest.raises(error, match="dropout must be"):
        nk.NLoraLinear.from_linear(torch.nn.Linear(24, 18), 4, dropout=dropout)
    with pytest.raises(error, match="dropout must be"):
        nk.LoRA2Linear.from_linear(torch.nn.Linear(24, 18), 4, 3, dropout=dropout)
