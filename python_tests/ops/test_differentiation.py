"""Second derivatives, torch.func and forward mode: what PyTorch's own composition gives, or an error, never zeros."""

import peft
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import nlora_kernels as nk
import nlora_kernels.peft as nk_peft
from nlora_kernels import testing

METHODS = ["lora", "nlora", "lora2"]
M, K, N, R = 4, 6, 5, 3


def operation(method, **options):
    """(function, its differentiable tensors) in fp64, for one method, with every tensor requiring a gradient."""
    tensors = [torch.randn(shape, dtype=torch.double) for shape in ((2, M, K), (N, K), (N,))]
    if method == "lora2":
        tensors += [torch.randn(shape, dtype=torch.double) for shape in ((R, K), (4, R), (4,), (R, 4), (N, R))]
        mask = torch.tensor([1.0, 0, 1, 1], dtype=torch.double)

        def function(x, weight, bias, v, u, E, U, V):
            return nk.lora2_linear(x, weight, v, u, E, U, V, mask, bias, scaling=0.7, **options)
    else:
        tensors += [torch.randn(shape, dtype=torch.double) for shape in ((R, K), (N, R), (R, R))]
        tensors = tensors if method == "nlora" else tensors[:-1]

        def function(x, weight, bias, A, B, core=None):
            return nk.lora_linear(x, weight, A, B, core, bias, scaling=0.7, **options)

    return function, [t.requires_grad_() for t in tensors]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["plain", "dropout"])
def test_second_derivatives_of_every_tensor(method, dropout):
    function, tensors = operation(method, dropout=dropout, seed=3)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_second_derivatives_of_the_core():
    u, E, U = (torch.randn(s, dtype=torch.double, requires_grad=True) for s in ((4, R), (4,), (R, 4)))
    mask = torch.tensor([1.0, 0, 1, 1], dtype=torch.double)
    assert torch.autograd.gradgradcheck(lambda *tensors: nk.lora2_core(*tensors, mask), (u, E, U))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["paper", "reference"])
def test_second_derivatives_of_the_penalty(form, dtype):
    model = nn.Sequential(nk.LoRA2Linear.from_linear(nn.Linear(5, 4), r=3, k=2)).to(dtype)
    tensors = [p for name, p in model.named_parameters() if "lora_" in name and "_E" not in name]
    for t in tensors:
        nn.init.normal_(t)
    grads = torch.autograd.grad(nk.lora2.orthogonal_penalty(model, form), tensors, create_graph=True)
    again = torch.autograd.grad(sum(g.square().sum() for g in grads), tensors)
    v, u, U, V = (getattr(model[0], f"lora_{kind}").detach().double().requires_grad_() for kind in "vuUV")

    def norm(gram):
        distance = torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=torch.double))
        return distance.square() if form == "paper" else distance / 4

    value = norm(v @ v.T) + norm(u.T @ u) + norm(U @ U.T) + norm(V.T @ V)
    if form == "paper":
        value = value + norm(u @ v @ v.T @ u.T) + norm(U.T @ V.T @ V @ U)
    by_name = dict(zip("vuUV", (v, u, U, V), strict=True))
    expected = [by_name[name[-1]] for name, _ in model.named_parameters() if "lora_" in name and "_E" not in name]
    first = torch.autograd.grad(value, expected, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), expected)
    for actual, wanted in zip((*grads, *again), (*first, *second), strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5 if dtype is torch.float32 else 1e-9, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_first_derivatives_stay_the_kernels(method, monkeypatch):
    """Only who asks for a graph of the backward pays for one."""
    called = []
    monkeypatch.setattr(nk.backends.REFERENCE, "backward", lambda *args: called.append(args))
    function, tensors = operation(method)
    function(*tensors).sum().backward()
    assert not called and tensors[0].grad is not None


def test_hessian_and_hvp_of_an_input_are_not_zero():
    layer = nk.NLoraLinear.from_linear(nn.Linear(6, 6), 3)
    x, v = torch.randn(1, 6), torch.randn(1, 6)
    dense = layer.base.weight + layer.delta_weight()

    def loss(x, through):
        return through(x).square().sum()

    def plain(x):
        return x @ dense.T + layer.base.bias

    hessian = torch.autograd.functional.hessian(lambda x: loss(x, layer), x)
    torch.testing.assert_close(hessian, torch.autograd.functional.hessian(lambda x: loss(x, plain), x))
    product = torch.autograd.functional.hvp(lambda x: loss(x, layer), x, v)[1]
    torch.testing.assert_close(product, torch.autograd.functional.hvp(lambda x: loss(x, plain), x, v)[1])


def test_inttune_raises_where_its_second_derivative_needs_x_and_is_right_elsewhere():
    layer = nk.NLoraLinear.from_linear(nn.Linear(6, 6), 3, train="core")
    first = nn.Linear(6, 6)
    (grad,) = torch.autograd.grad(layer(torch.randn(4, 6)).square().sum(), layer.lora_N, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), layer.lora_N)
    assert second.abs().max() > 0
    loss = layer(first(torch.randn(4, 6))).square().sum()
    with pytest.raises(RuntimeError, match=r"second derivatives need x.*lora_A\.requires_grad_"):
        torch.autograd.grad(loss, layer.lora_N, create_graph=True)
    # As the error says.
    layer.lora_A.requires_grad_()
    x = torch.randn(4, 6)
    (grad,) = torch.autograd.grad(layer(first(x)).square().sum(), layer.lora_N, create_graph=True)
    (actual,) = torch.autograd.grad(grad.square().sum(), first.weight)
    y = testing.plain_linear(first(x), layer.base.weight, layer.lora_A, layer.lora_B, layer.lora_N, layer.base.bias)
    (grad,) = torch.autograd.grad(y.square().sum(), layer.lora_N, create_graph=True)
    torch.testing.assert_close(actual, torch.autograd.grad(grad.square().sum(), first.weight)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_torch_func(method):
    function, (x, *others) = operation(method)
    with torch.no_grad():
        expected = torch.stack([function(row, *others) for row in x])
        torch.testing.assert_close(torch.vmap(lambda row: function(row, *others))(x), expected)

    def loss(x):
        return function(x, *others).square().sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    per_sample = torch.vmap(torch.func.grad(loss))(x)
    torch.testing.assert_close(per_sample, expected)
    tangent = torch.randn_like(x)
    y, directional = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(directional, (expected * tangent).sum())
    assert torch.func.hessian(lambda row: function(row, *others).square().sum())(x[0]).abs().max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_gradients_and_tangents_in_the_backward(method):
    function, (x, *others) = operation(method)
    tensors = [x, *others]
    one_by_one, batched = (
        torch.autograd.functional.jacobian(function, tuple(tensors), vectorize=vectorize) for vectorize in (False, True)
    )
    for actual, expected in zip(batched, one_by_one, strict=True):
        torch.testing.assert_close(actual, expected)
    y = function(*tensors)
    dy, tangent = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, tangent, retain_graph=True)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, tensors, forward_ad.make_dual(dy, tangent))
        for grad, wanted in zip(grads, expected, strict=True):
            torch.testing.assert_close(forward_ad.unpack_dual(grad).tangent, wanted)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("method", METHODS)
def test_forward_mode(method, grad):
    function, (x, *others) = operation(method)
    tangent = torch.randn_like(x)
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        y = function(forward_ad.make_dual(x.detach(), tangent), *others)
        actual = forward_ad.unpack_dual(y).tangent
    # The operation is linear in x but for its bias.
    expected = function(tangent, *others) - function(torch.zeros_like(tangent), *others)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    "config",
    [
        nk_peft.NLoraConfig(r=2, target_modules=["0", "2"]),
        nk_peft.LoRA2Config(r=2, k=2, init_lora_weights=False, target_modules=["0", "2"]),
        peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["0", "2"]),
    ],
    ids=["nlora", "lora2", "fuse"],
)
def test_a_peft_model_under_functional_call_and_twice_differentiated(config):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double(), config)
    if type(config) is peft.LoraConfig:
        nk_peft.fuse(model)
    x = torch.randn(5, 8, dtype=torch.double)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def hvp():
        loss = model(x).square().sum()
        grads = torch.autograd.grad(loss, parameters.values(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), parameters.values())

    def per_sample():
        def loss(parameters, row):
            return torch.func.functional_call(model, parameters, (row[None],)).square().sum()

        detached = {name: p.detach() for name, p in parameters.items()}
        return list(torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(detached, x).values())

    actual = [*hvp(), *per_sample()]
    # A hook that changes nothing has the layers call base and adapter one by one.
    for module in model.modules():
        if hasattr(module, "base_layer"):
            module.base_layer.register_forward_hook(lambda *args: None)
    for got, wanted in zip(actual, [*hvp(), *per_sample()], strict=True):
        torch.testing.assert_close(got, wanted)
