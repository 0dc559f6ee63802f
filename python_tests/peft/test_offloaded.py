"""Adapters on layers that accelerate has offloaded, to memory or to disk: as on layers that are there."""

import accelerate
import peft
import pytest
import torch
from torch import nn

from python_tests.peft.adapters import METHODS, config

OFFLOADS = {
    "memory": lambda model, folder: accelerate.cpu_offload(model, torch.device("cpu")),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, torch.device("cpu")),
}


def layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))


def adapted(model, method):
    torch.manual_seed(1)
    return peft.get_peft_model(model, config(method, target_modules=["0", "2"]))


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*cannot be fused")
def test_a_new_adapter_is_as_on_layers_that_are_there(method, offload, tmp_path):
    expected = adapted(layers(), method)
    model = adapted(offload(layers(), tmp_path), method)
    x = torch.randn(5, 16)
    parameters = dict(model.named_parameters())
    for name, there in expected.named_parameters():
        if "lora_" in name:
            assert not parameters[name].is_meta, name
            assert torch.equal(parameters[name], there), name
        else:
            assert parameters[name].is_meta, name
    y = model(x)
    torch.testing.assert_close(y, expected(x))
    y.square().sum().backward()
    expected(x).square().sum().backward()
    for name, there in expected.named_parameters():
        if there.grad is not None:
            torch.testing.assert_close(parameters[name].grad, there.grad, rtol=1e-4, atol=1e-5)
