"""When a linear layer may be fused: the usual answer at a look, against that which gives its reasons."""

import copy
import functools
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import native
from nlora_kernels.layers import branch

CHANGES = {
    "forward hook": lambda m: m.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda m: m.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "new dictionary of hooks": lambda m: setattr(m, "_forward_hooks", {0: print}),
    "forward of the instance": lambda m: setattr(m, "forward", types.MethodType(nn.Linear.forward, m)),
    "tensor-parallel plan": lambda m: setattr(m, "_hf_tp_plan", "colwise"),
    "type": lambda m: setattr(m, "__class__", type("Other", (nn.Linear,), {})),
    "parametrization": lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
    "subclass as weight": lambda m: m._parameters.update(weight=m.weight.as_subclass(type("T", (torch.Tensor,), {}))),
    "whole numbers": lambda m: m._parameters.update(weight=m.weight.detach().to(torch.int8)),
    "8 bits": lambda m: m._parameters.update(weight=m.weight.detach().to(torch.float8_e4m3fn)),
    "complex numbers": lambda m: m._parameters.update(weight=m.weight.detach().to(torch.complex64)),
}


@pytest.mark.skipif(native._C is None, reason="the package was built without C++ kernels")
@pytest.mark.parametrize("change", CHANGES)
def test_what_stands_in_the_way_is_seen_at_a_look(change):
    linear, changed = nn.Linear(4, 4), nn.Linear(4, 4)
    CHANGES[change](changed)
    assert branch.obstacle_of(changed) is not None and branch.obstacle(changed) is not None
    assert not native._C.is_plain(changed, (nn.Linear,)) and native._C.is_plain(linear, (nn.Linear,))
    assert looked_at(linear, copy.deepcopy(linear)) is not None
    assert looked_at(linear, copy.deepcopy(linear), changed) is None
    assert looked_at(changed, linear) is None and looked_at(changed, linear, asked=False)[0] is linear.weight


def looked_at(base, *matrices, types=(nn.Linear,), asked=True) -> list[torch.Tensor] | None:
    """`plain_weights` of a layer with a base and the matrices of an adapter, which one of its mappings lacks."""
    layer = nn.Module()
    layer.base_layer, layer.empty = base, nn.ModuleDict({"other": nn.Identity()})
    for i, matrix in enumerate(matrices):
        setattr(layer, f"m{i}", nn.ModuleDict({"name": matrix}))
    names = "empty", *[f"m{i}" for i in range(len(matrices))]
    return branch.plain_weights(layer, "name", names, types, asked)


@pytest.mark.skipif(native._C is None, reason="the package was built without C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_layers_of_every_dtype_need_no_second_look(dtype):
    linear = nn.Linear(4, 4, dtype=dtype)
    first, second = nn.Linear(3, 1, dtype=dtype), nn.Linear(1, 2)
    found = looked_at(linear, first, second)
    assert branch.obstacle(linear) is None and found[0] is first.weight and found[1] is second.weight
    other = type("Other", (nn.Linear,), {})
    assert looked_at(linear, other(2, 2)) is None and looked_at(linear, other(2, 2), types=(nn.Linear, other))


@pytest.mark.skipif(native._C is None, reason="the package was built without C++ kernels")
def test_nothing_is_plain_beside_a_hook_on_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert looked_at(nn.Linear(2, 2), nn.Linear(2, 2)) is None
    finally:
        handle.remove()
    assert looked_at(nn.Linear(2, 2), nn.Linear(2, 2))


# Several branches as one

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALINGS = (0.7, -0.7, 1.5)


def tensors_of_three(dtype, adapter, M=9, K=40, N=33) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(x, weight, bias and the matrices of three adapters, of which the last has no core; dy)."""
    tensors = {}
    for i, R in enumerate((3, 3, 5)):
        p = testing.problem(M, K, N, R, dtype=dtype, adapter_dtype=adapter, core=i < 2, seed=i)
        tensors = tensors or {"x": p.x, "weight": p.weight, "bias": p.bias}
        tensors |= {f"{name}{i}": t for name in "ANB" if (t := getattr(p, f"lora_{name}")) is not None}
    return tensors, p.dy


def branches_of(tensors, scalings=SCALINGS) -> list[branch.Branch]:
    return [branch.Branch(tensors[f"A{i}"], tensors.get(f"N{i}"), tensors[f"B{i}"], s) for i, s in enumerate(scalings)]


def apart(x, weight, bias, scalings=SCALINGS, **tensors):
    y = nn.functional.linear(x, weight, bias)
    for A, N, B, s, _ in branches_of(tensors, scalings):
        T = nn.functional.linear(x, A.to(x.dtype))
        y = y + s * nn.functional.linear(T if N is None else nn.functional.linear(T, N.to(x.dtype)), B.to(x.dtype))
    return y


def together(x, weight, bias, backend=None, **tensors):
    A, N, B, scaling, _ = branch.together(branches_of(tensors))
    return nk.lora_linear(x, weight, A, B, N, bias, scaling=scaling, backend=backend)


@pytest.mark.parametrize("backend", [None, "lean", "reference"])
@pytest.mark.parametrize("adapter", ["fp32", "of x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_together_keep_the_budget_of_their_sum(dtype, adapter, backend):
    tensors, dy = tensors_of_three(dtype, torch.float32 if adapter == "fp32" else dtype)
    wrt = [name for name in tensors if name not in ("weight", "A1", "N1", "B1")]
    budget = testing.Budget(apart, functools.partial(apart, scalings=(0.0, 0.0, 0.0)), tensors, dy, wrt)
    budget.check(testing.outputs(functools.partial(together, backend=backend), tensors, dy, wrt))


def test_gradients_reach_what_requires_one_and_nothing_else():
    tensors, _ = tensors_of_three(torch.float32, torch.float32)
    trained = [tensors[name].requires_grad_() for name in ("A0", "N0", "B2")]
    together(**tensors).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == ["A0", "N0", "B2"]
    assert all(t.grad.is_contiguous() for t in trained)
    # Cores alone, as IntTune has them: neither A nor B gets a gradient.
    for name in ("A0", "B2"):
        tensors[name].requires_grad_(False)
    A, N, B, *_ = branch.together(branches_of(tensors))
    assert N.requires_grad and not A.requires_grad and not B.requires_grad


def test_one_is_itself_and_plain_lora_of_one_scaling_needs_no_core():
    tensors, _ = tensors_of_three(torch.float32, torch.float32)
    first, second, last = branches_of(tensors)
    assert branch.together([first]) is first
    A, N, B, scaling, _ = branch.together([last, last])
    assert N is None and scaling == last.scaling and A.shape[0] == B.shape[1] == 10
    assert branch.together([last, last._replace(scaling=2.0)]).N is not None
    torch.testing.assert_close(
        branch.together([first, second, last]).product(), first.product() + second.product() + last.product()
    )


def test_branches_of_lora2_and_of_several_dtypes_are_summed_too():
    tensors, _ = tensors_of_three(torch.float32, torch.float32)
    k, r = 3, 4
    of_lora2 = branch.Lora2Branch(
        tensors["A0"], torch.randn(r, k), torch.randn(r), torch.randn(k, r), tensors["B0"], torch.ones(r), 0.3
    )
    other = branch.Branch(tensors["A2"].bfloat16(), None, tensors["B2"].bfloat16(), 0.5)
    found = branch.together([of_lora2, other])
    torch.testing.assert_close(found.product(), of_lora2.collapsed.product() + other.product(torch.float32))
    assert found.A.dtype == found.B.dtype == torch.float32
