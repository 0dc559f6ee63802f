"""Only tensors of finite floating-point numbers load, whichever way is taken; nothing changes before all are seen."""

import peft
import pytest
import torch
from torch import nn

import nlora_kernels as nk
from python_tests.peft.adapters import config
from python_tests.tiny import llama

DAMAGES = {
    "integer": (lambda t: t.int(), "must be one of bfloat16, float16, float32, float64, got torch.int32"),
    "bool": (lambda t: t > 0, "got torch.bool"),
    "fp8": (lambda t: t.to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
    "complex": (lambda t: t.to(torch.complex64), "got torch.complex64"),
    "nan": (lambda t: torch.full_like(t, torch.nan), "must be finite, got NaN or inf"),
    "inf": (lambda t: torch.full_like(t, torch.inf), "must be finite, got NaN or inf"),
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damage(request):
    return request.param


def unchanged(module, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("whole", [False, True], ids=["set_peft_model_state_dict", "load_state_dict"])
@pytest.mark.parametrize("method", ["lora", "nlora", "nlora_residual", "lora2"])
def test_of_an_adapter_in_peft(method, whole, damage):
    harm, message = damage
    model = peft.get_peft_model(llama(layers=1), config(method))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = model.state_dict() if whole else peft.get_peft_model_state_dict(model)
    last = [name for name in tensors if ".lora_" in name][-1]
    tensors = {name: harm(tensor) if name == last else tensor + 1 for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=rf"state_dict: .*lora_.*{message}"):
        model.load_state_dict(tensors) if whole else peft.set_peft_model_state_dict(model, tensors)
    assert unchanged(model, before)


PLAIN = {
    "nlora": lambda linear: nk.NLoraLinear.from_linear(linear, 4),
    "residual": lambda linear: nk.NLoraLinear.from_linear(linear, 4, residual=True),
    "lora2": lambda linear: nk.LoRA2Linear.from_linear(linear, 4, 2),
}


@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN)
def test_of_a_layer_without_peft(make, damage):
    harm, message = damage
    layer = make(nn.Linear(16, 24))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for harmed in [name for name in before if name.startswith("lora_")]:
        # What is not harmed is not what the layer has: it would be seen, were it loaded.
        tensors = {name: harm(tensor) if name == harmed else tensor + 1 for name, tensor in before.items()}
        alone = {name: tensor for name, tensor in tensors.items() if name.startswith("lora_")}
        for state in (tensors, alone):
            with pytest.raises(ValueError, match=f"state_dict: {harmed} {message if 'must' in message else 'must'}"):
                layer.load_state_dict(state, strict=False)
            assert unchanged(layer, before)
