"""lora_linear, lora2_core and lora2_linear against fp64, on every backend that can run here."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import nlora_kernels as nk
from nlora_kernels import testing

FP64_BACKENDS = [None, "reference", "lean"]
BACKENDS = FP64_BACKENDS + ([] if nk.backends.available()["cpu"] else ["cpu"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, K, N, R: empty, one row, odd everywhere, a rank that is no power of two or exceeds every size, a square layer.
SHAPES = [
    (0, 12, 8, 3),
    (1, 33, 17, 5),
    (7, 65, 31, 13),
    (3, 4, 5, 9),
    (1, 1, 1, 1),
    (130, 96, 96, 8),
    (37, 128, 300, 64),
]


def short(value):
    return str(value).removeprefix("torch.")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
def test_results_are_within_the_error_budget(backend, dtype, shape, core):
    for seed, (bias, strided) in enumerate([(True, False), (False, True)]):
        p = testing.problem(*shape, dtype=dtype, core=core, bias=bias, strided=strided, seed=seed)
        testing.assert_within_budget(testing.results(p, nk.lora_linear, backend=backend), p)


@pytest.mark.parametrize("backend", BACKENDS, ids=short)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=short)
def test_fp32_adapters_on_a_16_bit_base(backend, dtype):
    p = testing.problem(33, 64, 48, 8, dtype=dtype, adapter_dtype=torch.float32)
    actual = testing.results(p, nk.lora_linear, backend=backend)
    assert actual["dlora_A"].dtype == torch.float32 and actual["y"].dtype == dtype
    testing.assert_within_budget(actual, p)


@pytest.mark.parametrize("backend", BACKENDS, ids=short)
def test_a_wrong_result_is_outside_the_budget(backend):
    p = testing.problem(37, 64, 48, 8, dtype=torch.bfloat16)
    good = testing.results(p, nk.lora_linear, backend=backend)
    for name, value in good.items():
        wrong = value.clone()
        wrong.view(-1)[wrong.numel() // 2] += wrong.abs().max() / 8
        with pytest.raises(AssertionError, match=name):
            testing.assert_within_budget({**good, name: wrong}, p)
    with pytest.raises(AssertionError):
        testing.assert_within_budget({**good, "y": good["y"] * 1.02}, p)


@pytest.mark.parametrize("backend", FP64_BACKENDS, ids=short)
@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (0, 3, 2, 2), (3, 4, 5, 6)], ids=str)
def test_gradcheck(backend, shape):
    p = testing.problem(*shape, dtype=torch.float64)
    inputs = [getattr(p, name).requires_grad_() for name in testing.TENSORS]
    assert torch.autograd.gradcheck(lambda *t: nk.lora_linear(*t, scaling=0.7, backend=backend), inputs)


@pytest.mark.parametrize("mask", [None, torch.tensor([1.0, 0.0, 1.0])], ids=["unmasked", "masked"])
def test_gradcheck_of_the_lora2_core(mask):
    u, E, U = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 2), (3,), (2, 3)))
    mask = None if mask is None else mask.double()
    assert torch.autograd.gradcheck(lambda *t: nk.lora2_core(*t, mask), (u, E, U))


@pytest.mark.parametrize("backend", BACKENDS, ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_lora2_linear_is_lora_linear_with_its_core(backend, dtype, masked):
    torch.manual_seed(1)
    x, W, v, V = (torch.randn(s, dtype=dtype) for s in ((5, 12), (9, 12), (3, 12), (9, 3)))
    u, E, U = (torch.randn(s, dtype=dtype) for s in ((4, 3), (4,), (3, 4)))
    mask = torch.tensor([1, 0, 1, 1], dtype=dtype) if masked else None
    leaves = [t.requires_grad_() for t in (x, W, v, u, E, U, V)]
    y = nk.lora2_linear(*leaves, mask, scaling=0.5, backend=backend)
    core = (U * (E if mask is None else E * mask)) @ u
    y_plain = testing.plain_linear(x, W, v, V, core, scaling=0.5)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    X, W64, v64, u64, E64, U64, V64 = exact_leaves
    core64 = (U64 * (E64 if mask is None else E64 * mask.double())) @ u64
    y_exact = testing.plain_linear(X, W64, v64, V64, core64, scaling=0.5)
    dy = torch.randn_like(y)
    ours, plain = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(y_plain, leaves, dy)
    exact = torch.autograd.grad(y_exact, exact_leaves, dy.double())
    for a, b, c in zip((y, *ours), (y_plain, *plain), (y_exact, *exact), strict=True):
        bound = 2 * testing.error_norm(b, c) + torch.finfo(dtype).eps * c.norm().item()
        assert testing.error_norm(a, c) <= bound
    if masked:
        assert ours[4][1] == 0


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool], ids=short)
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_the_mask_may_be_of_another_dtype(dtype, mask_dtype):
    u, E, U = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((4, 3), (4,), (3, 4)))
    mask = torch.tensor([1, 0, 1, 1])
    core, same = (nk.lora2_core(u, E, U, mask.to(to)) for to in (mask_dtype, dtype))
    assert core.dtype == dtype and torch.equal(core, same)
    grads, same = (torch.autograd.grad(c.float().sum(), (u, E, U)) for c in (core, same))
    assert all(a.dtype == dtype and torch.equal(a, b) for a, b in zip(grads, same, strict=True))


def test_identities():
    p = testing.problem(11, 24, 18, 6, dtype=torch.float64, seed=3)
    call = {n: getattr(p, n) for n in testing.TENSORS} | {"scaling": p.scaling}
    y = nk.lora_linear(**call)
    identity = torch.eye(6, dtype=torch.float64)
    close = torch.testing.assert_close
    # N = I is LoRA.
    close(nk.lora_linear(**call | {"lora_N": identity}), nk.lora_linear(**call | {"lora_N": None}))
    # N may be folded into B or into A.
    close(nk.lora_linear(**call | {"lora_B": p.lora_B @ p.lora_N, "lora_N": None}), y)
    close(nk.lora_linear(**call | {"lora_A": p.lora_N @ p.lora_A, "lora_N": None}), y)
    # The adapter is a change of W.
    merged = p.weight + p.scaling * p.lora_B @ p.lora_N @ p.lora_A
    close(torch.nn.functional.linear(p.x, merged, p.bias), y)
    # B = 0 and s = 0 are the base alone, and s may stand in N.
    base = torch.nn.functional.linear(p.x, p.weight, p.bias)
    close(nk.lora_linear(**call | {"lora_B": torch.zeros_like(p.lora_B)}), base)
    close(nk.lora_linear(**call | {"scaling": 0.0}), base)
    close(nk.lora_linear(**call | {"lora_N": p.scaling * p.lora_N, "scaling": 1.0}), y)
    # Tokens do not see one another.
    order = torch.randperm(11)
    close(nk.lora_linear(**call | {"x": p.x[order]}), y[order])
    # Leading dimensions are tokens.
    close(nk.lora_linear(**call | {"x": p.x[:10].view(2, 1, 5, 24)}).view(10, 18), y[:10])
    close(nk.lora_linear(**call | {"x": p.x[0]}), y[0])


def test_backends_agree_bitwise_with_themselves():
    p = testing.problem(64, 96, 80, 8)
    for backend in BACKENDS:
        first, second = (testing.results(p, nk.lora_linear, backend=backend) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "needed", [("x",), ("lora_N",), ("lora_A",), ("lora_B", "bias"), ("weight",), testing.TENSORS], ids=str
)
def test_gradients_come_only_where_asked_for(needed):
    p = testing.problem(5, 12, 9, 3, dtype=torch.float64)
    leaves = {n: getattr(p, n).detach().requires_grad_(n in needed) for n in testing.TENSORS}
    nk.lora_linear(**leaves, scaling=p.scaling).backward(p.dy)
    expected = testing.results(p)
    for name, leaf in leaves.items():
        if name in needed:
            torch.testing.assert_close(leaf.grad, expected[f"d{name}"])
        else:
            assert leaf.grad is None


def test_gradients_of_an_expanded_dy():
    p = testing.problem(6, 8, 5, 2, dtype=torch.float64)
    leaves = [getattr(p, n).requires_grad_() for n in testing.TENSORS]
    ours = torch.autograd.grad(nk.lora_linear(*leaves).sum(), leaves)
    plain = torch.autograd.grad(testing.plain_linear(*leaves).sum(), leaves)
    torch.testing.assert_close(ours, plain)


def saved_bytes(M, train):
    """Bytes that depend on the data and are kept for backward."""
    K, r = 768, 8
    linear = nk.NLoraLinear.from_linear(torch.nn.Linear(K, K), r, train=train)
    fixed = {t.untyped_storage().data_ptr() for t in linear.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in fixed:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        linear(torch.randn(M, K, requires_grad=True))
    return sum(kept.values())


@pytest.mark.parametrize("train, per_token", [("core", 32), ("all", 3104)])
def test_bytes_saved_for_backward_per_token(train, per_token):
    few, many = saved_bytes(16, train), saved_bytes(80, train)
    assert (many - few) / 64 == per_token


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=short)
def test_autocast(adapter_dtype):
    p = testing.problem(9, 24, 18, 6, dtype=torch.float32)
    for name in ("lora_A", "lora_B", "lora_N"):
        setattr(p, name, getattr(p, name).to(adapter_dtype))

    def autocast_linear(**call):
        with torch.autocast("cpu", torch.bfloat16):
            return nk.lora_linear(**call)

    p.dy = p.dy.bfloat16()
    actual = testing.results(p, autocast_linear)
    assert actual["y"].dtype == torch.bfloat16
    assert all(actual[f"d{n}"].dtype == getattr(p, n).dtype for n in testing.TENSORS)
    cast = {n: getattr(p, n).bfloat16() for n in ("x", "weight", "bias")}
    p16 = testing.Problem(**{**vars(p), **cast})
    same = testing.results(p16, nk.lora_linear)
    for name, value in actual.items():
        assert torch.equal(value, same[name].to(value.dtype)), name


def test_autocast_leaves_fp64_alone():
    p = testing.problem(3, 4, 5, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias)
    assert torch.equal(y, nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias))


def test_autocast_leaves_the_core_of_lora2_alone():
    """Also where the backend that is chosen, here for its dropout, does not make it."""
    shapes = (5, 12), (9, 12), (3, 12), (4, 3), (4,), (3, 4), (9, 3)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]

    def results(backend):
        with torch.autocast("cpu", torch.bfloat16):
            y = nk.lora2_linear(*leaves, scaling=0.5, dropout=0.5, seed=1, backend=backend)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    for ours, expected in zip(results(None), results("lean"), strict=True):
        assert torch.equal(ours, expected)


OPCHECK = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")


@pytest.mark.parametrize("backend", BACKENDS, ids=short)
@pytest.mark.parametrize("core", [True, False], ids=["N", "noN"])
@pytest.mark.parametrize("dropout", [(0.0, None), (0.3, torch.tensor(5))], ids=["whole", "dropout"])
def test_opcheck(backend, core, dropout):
    if backend == "cpu" and dropout[0]:
        pytest.skip("the backend cpu has no dropout")
    backend = backend or ""
    p = testing.problem(5, 12, 9, 3, core=core)
    op = torch.ops.nlora_kernels
    call = (p.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, 0.5, *dropout, backend)
    torch.library.opcheck(op.lora_linear.default, call, test_utils=OPCHECK)
    T = p.x @ p.lora_A.T
    for needs in ([True] * 4 + [core, True], [False, False, True, True, False, False]):
        call = (p.dy, p.x, T, p.weight, p.lora_A, p.lora_B, p.lora_N, 0.5, *dropout, needs, backend)
        torch.library.opcheck(op.lora_linear_backward.default, call, test_utils=OPCHECK)
    u, E, U = torch.randn(4, 3), torch.randn(4), torch.randn(3, 4)
    for mask in (None, torch.ones(4)):
        torch.library.opcheck(op.lora2_core.default, (u, E, U, mask, backend), test_utils=OPCHECK)
        call = (torch.randn(3, 3), u, E, U, mask, backend)
        torch.library.opcheck(op.lora2_core_backward.default, call, test_utils=OPCHECK)


@pytest.mark.parametrize(
    "make",
    [
        lambda linear: nk.NLoraLinear.from_linear(linear, 4),
        lambda linear: nk.NLoraLinear.from_linear(linear, 4, train="core", residual=True),
        lambda linear: nk.LoRA2Linear.from_linear(linear, 4, 3),
    ],
    ids=["nlora", "inttune", "lora2"],
)
def test_compile_without_graph_breaks_for_any_number_of_tokens(make):
    torch._dynamo.reset()
    layer = make(torch.nn.Linear(16, 12))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for M in (5, 9, 32):
            x = torch.randn(M, 16, requires_grad=True)
            y, y_compiled = layer(x), compiled(x)
            torch.testing.assert_close(y_compiled, y)
            dy = torch.randn_like(y)
            inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
            torch.testing.assert_close(torch.autograd.grad(y_compiled, inputs, dy), torch.autograd.grad(y, inputs, dy))


def test_compile_with_inductor_and_autocast():
    torch._dynamo.reset()
    layer = nk.NLoraLinear.from_linear(torch.nn.Linear(16, 12), 4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    x = torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y, y_compiled = layer(x), compiled(x)
    assert y.dtype == y_compiled.dtype == torch.bfloat16
    torch.testing.assert_close(y_compiled, y)


@pytest.mark.parametrize("backend", BACKENDS, ids=short)
@pytest.mark.parametrize("train_bias", [True, False])
def test_autocast_casts_a_bias_whose_weight_has_the_dtype_already(backend, train_bias):
    p = testing.problem(5, 12, 9, 3)
    weight, bias = p.weight.bfloat16(), p.bias.clone().requires_grad_(train_bias)
    with torch.autocast("cpu", torch.bfloat16):
        y = nk.lora_linear(p.x, weight, p.lora_A, p.lora_B, p.lora_N, bias, backend=backend)
        plain = nk.lora_linear(p.x.bfloat16(), weight, p.lora_A, p.lora_B, p.lora_N, p.bias.bfloat16(), backend=backend)
    assert torch.equal(y, plain)
    if train_bias:
        y.sum().backward()
        assert bias.grad.dtype == torch.float32 and torch.equal(bias.grad, torch.full((9,), 5.0))


# Bad calls: what is passed instead, the error, and words of its message.
BAD_CALLS = {
    "x_columns": ({"x": torch.randn(5, 11)}, ValueError, r"x must have shape \(\.\.\., 12\), got \(5, 11\)"),
    "x_scalar": ({"x": torch.tensor(1.0)}, ValueError, "x must have shape"),
    "x_list": ({"x": [[1.0]]}, TypeError, "x must be a Tensor, got list"),
    "x_integer": ({"x": torch.ones(5, 12, dtype=torch.int64)}, TypeError, "x must be one of bfloat16"),
    "x_complex": ({"x": torch.ones(5, 12, dtype=torch.complex64)}, TypeError, "x must be one of bfloat16"),
    "x_dtype": ({"x": torch.randn(5, 12, dtype=torch.float64)}, TypeError, "weight must have x's dtype torch.float64"),
    "bias_dtype": ({"bias": torch.randn(9).double()}, TypeError, "bias must have x's dtype"),
    "weight_vector": ({"weight": torch.randn(12)}, ValueError, r"weight must have shape \(out, in\)"),
    "A_transposed": ({"lora_A": torch.randn(12, 3)}, ValueError, r"lora_A must have shape \(r, 12\)"),
    "A_empty": ({"lora_A": torch.randn(0, 12)}, ValueError, "r >= 1"),
    "B_transposed": ({"lora_B": torch.randn(3, 9)}, ValueError, r"lora_B must have shape \(9, 3\), got \(3, 9\)"),
    "N_shape": ({"lora_N": torch.randn(3, 4)}, ValueError, r"lora_N must have shape \(3, 3\), got \(3, 4\)"),
    "bias_shape": ({"bias": torch.randn(8)}, ValueError, r"bias must have shape \(9,\), got \(8,\)"),
    "device": ({"lora_N": torch.randn(3, 3, device="meta")}, ValueError, "lora_N must be on cpu"),
    "scaling_text": ({"scaling": "1"}, TypeError, "scaling must be a real number, got str"),
    "scaling_bool": ({"scaling": True}, TypeError, "scaling must be a real number, got bool"),
    "backend_list": ({"backend": ["cpu"]}, ValueError, r"backend must be one of .*lean.*, got \['cpu'\]"),
    "backend": ({"backend": "fast"}, ValueError, "backend must be one of .*lean.*, got 'fast'"),
}


@pytest.mark.parametrize("changed, error, message", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_of_lora_linear(changed, error, message):
    p = testing.problem(5, 12, 9, 3)
    call = {n: getattr(p, n) for n in testing.TENSORS} | {"scaling": 1.0}
    with pytest.raises(error, match=message):
        nk.lora_linear(**call | changed)


BAD_LORA2 = {
    "u_vector": ({"lora_u": torch.randn(4)}, ValueError, r"lora_u must have shape \(r, k\)"),
    "E_shape": ({"lora_E": torch.randn(3)}, ValueError, r"lora_E must have shape \(4,\), got \(3,\)"),
    "U_shape": ({"lora_U": torch.randn(4, 3)}, ValueError, r"lora_U must have shape \(3, 4\)"),
    "E_dtype": ({"lora_E": torch.randn(4).double()}, TypeError, "lora_E must have lora_u's dtype"),
    "mask_shape": ({"mask": torch.ones(3)}, ValueError, r"mask must have shape \(4,\)"),
    "mask_list": ({"mask": [1, 1, 1, 1]}, TypeError, "mask must be a Tensor or None"),
    "v_shape": ({"lora_v": torch.randn(3, 11)}, ValueError, r"lora_v must have shape \(r, 12\)"),
    "V_shape": ({"lora_V": torch.randn(3, 9)}, ValueError, r"lora_V must have shape \(9, 3\)"),
    "k_of_core": ({"lora_u": torch.randn(4, 2), "lora_U": torch.randn(2, 4)}, ValueError, "the core of lora_u"),
}


@pytest.mark.parametrize("changed, error, message", BAD_LORA2.values(), ids=BAD_LORA2)
def test_bad_calls_of_lora2_linear(changed, error, message):
    shapes = {"x": (5, 12), "weight": (9, 12), "lora_v": (3, 12), "lora_u": (4, 3), "lora_E": (4,), "lora_U": (3, 4)}
    call = {name: torch.randn(shape) for name, shape in shapes.items()} | {"lora_V": torch.randn(9, 3)}
    nk.lora2_linear(**call)
    with pytest.raises(error, match=message):
        nk.lora2_linear(**call | changed)


OPERATIONS = {
    "linear": lambda x, W, A, B: nk.lora_linear(x, W, A, B),
    "group": lambda x, W, A, B: nk.lora_group_linear(x, [W, W], [(A, B), None])[0],
    "mlp": lambda x, W, A, B: nk.lora_mlp(x, (W, (A, B)), (W,), (W,)),
    "lora2": lambda x, W, A, B: nk.lora2_linear(x, W, A, *LORA2_CORE, B),
}
LORA2_CORE = torch.eye(2), torch.ones(2), torch.eye(2)


@pytest.mark.parametrize("shown", [False, True], ids=["plain", "shown"])
@pytest.mark.parametrize("shape", [(3, 6), (2, 5, 6), (6,)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_result_can_be_changed_in_place_as_that_of_a_linear_layer(name, shape, shown):
    torch.manual_seed(0)
    x, W, A, B = torch.randn(shape, requires_grad=True), torch.randn(6, 6), torch.randn(2, 6), torch.randn(6, 2)
    operation, A = OPERATIONS[name], A.requires_grad_()
    y = operation(x, W, A, B)
    expected = 2 * y, *torch.autograd.grad((2 * y).square().sum(), (x, A))
    with FlopCounterMode(display=False) if shown else contextlib.nullcontext():
        y = operation(x, W, A, B).mul_(2)
        result = y, *torch.autograd.grad(y.square().sum(), (x, A))
        with torch.no_grad():
            y = operation(x, W, A, B)
        y.mul_(x.sum())
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-3)
