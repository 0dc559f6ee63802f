"""Whoever records what PyTorch does, in Python or below it, sees the operations and gets the right result."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import nlora_kernels as nk
from nlora_kernels import testing

LAYERS = {
    "lora": lambda base: nk.NLoraLinear.from_linear(base, 3, init="lora"),
    "nlora": lambda base: nk.NLoraLinear.from_linear(base, 3),
    "lora2": lambda base: nk.LoRA2Linear.from_linear(base, 3, 2),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    layer = LAYERS[request.param](nn.Linear(10, 8))
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return layer


def gradients(module, layer, x):
    layer.zero_grad()
    module(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_jit_trace(layer, grad):
    with torch.set_grad_enabled(grad):
        # PyTorch's own check compares two runs of the trace.
        traced = torch.jit.trace(layer, torch.randn(4, 10))
    assert "nlora_kernels::lora_linear" in str(traced.inlined_graph)
    for rows in (4, 7):
        x = torch.randn(rows, 10)
        torch.testing.assert_close(traced(x), layer(x))
    # The trace holds parameters of its own that share their memory.
    actual = gradients(traced, traced, x)
    for name, expected in gradients(layer, layer, x).items():
        torch.testing.assert_close(actual[name], expected)


def test_export_is_right_and_can_be_trained(layer):
    exported = torch.export.export(layer, (torch.randn(4, 10),)).module()
    x = torch.randn(4, 10)
    torch.testing.assert_close(exported(x), layer(x))
    actual = gradients(exported, exported, x)
    for name, expected in gradients(layer, layer, x).items():
        torch.testing.assert_close(actual[name], expected)


OPERATIONS = {
    "linear": lambda x, W, A, B, N, E: nk.lora_linear(x, W, A, B, N),
    "lora2": lambda x, W, A, B, N, E: nk.lora2_linear(x, W, A, N, E, N, B),
    "group": lambda x, W, A, B, N, E: torch.cat(nk.lora_group_linear(x, [W, W], [(A, B, N), None]), -1),
    "mlp": lambda x, W, A, B, N, E: nk.lora_mlp(x, (W, (A, B, N)), (W,), (W, (A, B))),
}
RECORDERS = {
    "export": lambda f, *ts: torch.export.export(
        Calls(f), ts, dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, *[None] * (len(ts) - 1))
    ).module(),
    "jit_trace": lambda f, *ts: torch.jit.trace(f, ts),
    "make_fx": lambda f, *ts: make_fx(f, tracing_mode="symbolic")(*ts),
}


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, W, A, B, N, E):
        return self.function(x, W, A, B, N, E)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("record", RECORDERS.values(), ids=RECORDERS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_what_is_recorded_takes_other_leading_dimensions(operation, record):
    tensors = [torch.randn(shape).double() for shape in ((10, 10), (3, 10), (10, 3), (3, 3), (3,))]
    with torch.no_grad():
        recorded = record(operation, torch.randn(2, 7, 10).double(), *tensors)
    for leading in ((2, 7), (5, 7)):
        x = torch.randn(*leading, 10).double()
        torch.testing.assert_close(recorded(x, *tensors), operation(x, *tensors))


def test_symbolic_trace():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterList([torch.randn(s) for s in ((8, 10), (3, 10), (8, 3), (3, 3))])

        def forward(self, x):
            return nk.lora_linear(x.relu(), *self.parts).tanh()

    net, x = Net(), torch.randn(4, 10)
    traced = torch.fx.symbolic_trace(net)
    assert nk.lora_linear in {node.target for node in traced.graph.nodes}
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.parametrize("method", ["lora", "nlora"])
def test_flops_are_those_of_the_products(method):
    p = testing.problem(7, 12, 10, 3, core=method == "nlora")
    tensors = {n: getattr(p, n).requires_grad_() for n in testing.TENSORS if getattr(p, n) is not None}
    with FlopCounterMode(display=False) as counter:
        nk.lora_linear(**tensors).backward(p.dy)
    with FlopCounterMode(display=False) as plain:
        testing.plain_linear(**tensors).backward(p.dy)
    # P is computed again in backward instead of being kept.
    again = 2 * 7 * 3 * 3 if method == "nlora" else 0
    assert counter.get_total_flops() == plain.get_total_flops() + again
    counts = counter.get_flop_counts()["Global"]
    assert {str(operator) for operator in counts} == {
        "nlora_kernels.lora_linear",
        "nlora_kernels.lora_linear_backward",
    }


def test_flops_of_the_core():
    u, E, U = torch.randn(4, 3, requires_grad=True), torch.randn(4), torch.randn(3, 4)
    with FlopCounterMode(display=False) as counter:
        nk.lora2_core(u, E, U).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 3 * 3 * 4


def test_modes_of_functions_and_of_dispatch(layer):
    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function))
            return function(*args, **(kwargs or {}))

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.add(str(function))
            return function(*args, **(kwargs or {}))

    x = torch.randn(4, 10)
    expected = layer(x)
    for mode in (Dispatched, Functions):
        seen = set()
        with mode():
            actual = layer(x)
        torch.testing.assert_close(actual, expected)
        assert any("nlora_kernels.lora_linear" in name for name in seen), mode


def test_the_profiler(layer):
    with torch.profiler.profile() as profile:
        layer(torch.randn(4, 10)).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"nlora_kernels::lora_linear", "nlora_kernels::lora_linear_backward"} <= names


def test_hooks_of_all_modules(layer):
    x = torch.randn(4, 10)
    expected = layer(x)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    try:
        actual = layer(x)
    finally:
        hook.remove()
    torch.testing.assert_close(actual, expected)
    assert layer.base in seen and layer.obstacle() is None


def test_hooks_of_all_modules_see_the_matrices_of_a_peft_layer():
    peft = pytest.importorskip("peft")
    config = nk.peft.NLoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 6)), config)
    seen = []
    hook = nn.modules.module.register_module_forward_pre_hook(lambda module, args: seen.append(module))
    try:
        model(torch.randn(3, 6))
    finally:
        hook.remove()
    linear = model.base_model.model[0]
    for matrix in (linear.base_layer, linear.lora_A["default"], linear.lora_N["default"], linear.lora_B["default"]):
        assert matrix in seen


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_in_the_export_to_onnx_a_trace_holds_pytorchs_own_operations(layer, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    x = torch.randn(4, 10)
    traced = torch.jit.trace(layer, torch.randn(4, 10))
    assert "nlora_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), layer(x))
