"""When a linear layer may be fused: the usual answer at a look, against that which gives its reasons."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

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
    assert branch.obstacle_of(changed) is not None
    assert branch.plain((linear, copy.deepcopy(linear)))
    assert not branch.plain((changed,)) and not branch.plain((linear, changed))


@pytest.mark.skipif(native._C is None, reason="the package was built without C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_layers_of_every_dtype_need_no_second_look(dtype):
    linear = nn.Linear(4, 4, dtype=dtype)
    assert branch.plain((linear, nn.Linear(3, 1, dtype=dtype))) and branch.obstacle(linear) is None
    assert not branch.plain((nn.Identity(),)) and branch.plain((nn.Linear(2, 2),), (nn.Identity, nn.Linear))
