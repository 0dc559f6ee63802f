"""Everything that a forward goes by, changed between two calls: the second goes by it as it is then."""

import contextlib
import copy
import pickle
import threading
from types import MethodType

import peft
import pytest
import torch
from torch import nn
from torch.nn.modules import module as nn_module

from nlora_kernels.peft.layer import FusedLinear
from nlora_kernels.testing import error_norm
from python_tests.peft.adapters import close, config
from python_tests.tiny import perturb


class Doubled(torch.Tensor):
    """A weight that only PyTorch's own operations know."""


class Twice(nn.Module):
    """Dropout of another kind."""

    def forward(self, x):
        return 2 * x


def first(layer):
    return next(iter(layer.factors("default")))


def replace_weight(model, layer):
    layer.base_layer.weight = nn.Parameter(torch.randn(10, 12))


def swap_data(model, layer):
    layer.base_layer.weight.data = torch.randn(10, 12)


def swap_data_of_a_matrix(model, layer):
    first(layer).weight.data = torch.randn(4 if "lora_v" not in layer._modules else 2, 12)


def change_in_place(model, layer):
    with torch.no_grad():
        first(layer).weight.mul_(2)


def replace_a_matrix(model, layer):
    changed = copy.deepcopy(first(layer))
    nn.init.ones_(changed.weight)
    layer._modules[layer.adapter_layer_names[0]]["default"] = changed


def without_bias(model, layer):
    layer.base_layer.bias = None


def another_base(model, layer):
    layer.base_layer = nn.Linear(12, 10)


def with_hook(model, layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def with_hook_on_a_matrix(model, layer):
    first(layer).register_forward_pre_hook(lambda module, args: (2 * args[0],))


def with_forward_of_the_instance(model, layer):
    layer.base_layer.forward = MethodType(lambda linear, x: x @ linear.weight.T, layer.base_layer)


def with_a_subclass(model, layer):
    layer.base_layer.weight = nn.Parameter(2 * layer.base_layer.weight.detach().as_subclass(Doubled))


def other_adapter(model, layer):
    model.set_adapter("other")


def both_adapters(model, layer):
    model.base_model.set_adapter(["default", "other"])


def disabled(model, layer):
    model.base_model.disable_adapter_layers()


def merged(model, layer):
    model.merge_adapter()


def deleted(model, layer):
    model.set_adapter("other")
    model.delete_adapter("default")


def scaled(model, layer):
    layer.scaling["default"] *= 3


def scaled_to_nothing(model, layer):
    layer.scaling["default"] = 0


def scaled_by_a_tensor(model, layer):
    layer.scaling["default"] = torch.tensor(0.3)


def all_dropped(model, layer):
    layer.lora_dropout["default"].p = 1.0
    model.train()


def dropout_of_another_kind(model, layer):
    layer.lora_dropout["default"] = Twice()
    model.train()


def without_input_cast(model, layer):
    layer.cast_input_dtype_enabled = False


def masked(model, layer):
    if "lora_mask" not in layer._modules:
        pytest.skip("LoRA² alone has a mask")
    layer.lora_mask["default"].weight.zero_()


CHANGES = [
    replace_weight,
    swap_data,
    swap_data_of_a_matrix,
    change_in_place,
    replace_a_matrix,
    without_bias,
    another_base,
    with_hook,
    with_hook_on_a_matrix,
    with_forward_of_the_instance,
    with_a_subclass,
    other_adapter,
    both_adapters,
    disabled,
    merged,
    deleted,
    scaled,
    scaled_to_nothing,
    scaled_by_a_tensor,
    all_dropped,
    dropout_of_another_kind,
    without_input_cast,
    masked,
]


@pytest.fixture(params=["lora", "nlora", "inttune_residual", "lora2"])
def model(request):
    options = {"target_modules": ["0"], "lora_dropout": 0.5}
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 10)), config(request.param, **options))
    model.add_adapter("other", config("lora2" if request.param == "lora2" else "lora", r=3, **options))
    for name in ("other", "default"):
        model.set_adapter(name)
        perturb(model)
    return model.eval()


def results(layer, x):
    """y and what comes back to x and to the adapter's first matrix."""
    x = x.detach().requires_grad_()
    y = layer(x)
    trained = [t for t in (x, *layer.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(y.float().square().sum(), trained, allow_unused=True)
    return y, *[torch.zeros_like(t) if grad is None else grad for t, grad in zip(trained, grads, strict=True)]


@contextlib.contextmanager
def by_modules(layer):
    """Has the base layer and the modules of the adapter called, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "_fusible", lambda self, term, x: None)
        yield


def compare(layer, x):
    actual = results(layer, x)
    with by_modules(layer):
        expected = results(layer, x)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype is theirs.dtype
        close(ours.float(), theirs.float())
    return actual[0]


def compare_in_half(layer, x):
    """Output and gradients, as one vector, may be off from fp64 by twice what those of the modules are, plus eps."""
    actual = results(layer, x)
    with by_modules(layer):
        plain = results(layer, x)
        with torch.autocast("cpu", enabled=False):
            exact = results(copy.deepcopy(layer).double(), x.double())
    assert [t.dtype for t in actual] == [t.dtype for t in plain]
    for chosen in (slice(1), slice(1, None)):
        ours, theirs, right = (
            torch.cat([t.double().flatten() for t in each[chosen]]) for each in (actual, plain, exact)
        )
        eps = torch.finfo(torch.bfloat16).eps * right.norm()
        assert error_norm(ours, right, 2) <= 2 * error_norm(theirs, right, 2) + eps
    return actual[0]


@pytest.mark.parametrize("change", CHANGES)
def test_the_call_after_a_change_goes_by_it(model, change):
    layer, x = model.base_model.model[0], torch.randn(5, 12)
    before = compare(layer, x)
    change(model, layer)
    after = compare(layer, x)
    assert torch.equal(before, after) is (change is without_input_cast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_call_after_a_move_to_another_dtype(model, dtype):
    layer, x = model.base_model.model[0], torch.randn(5, 12)
    compare(layer, x)
    layer.base_layer.to(dtype)
    y = (compare_in_half if dtype is torch.bfloat16 else compare)(layer, x.to(dtype))
    assert y.dtype is dtype


def test_the_call_in_another_mode(model):
    layer, x = model.base_model.model[0], torch.randn(5, 12)
    y = compare(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert compare_in_half(layer, x).dtype is torch.bfloat16
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert layer(x).is_inference()
        close(layer(x), y)
    close(torch.func.vmap(layer)(x[:, None]).squeeze(1), y)
    hook = nn_module.register_module_forward_hook(lambda module, args, y: 2 * y if isinstance(module, nn.Linear) else y)
    try:
        assert not torch.equal(compare(layer, x), y)
    finally:
        hook.remove()
    assert torch.equal(compare(layer, x), y)


def test_copies_go_by_their_own(model):
    layer, x = model.base_model.model[0], torch.randn(5, 12)
    y = compare(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
        other.base_layer.weight.data.zero_()
        assert not torch.equal(compare(other, x), y)
        assert torch.equal(layer(x), y)


def test_threads_go_by_what_is_there(model):
    layer, x, seen = model.base_model.model[0], torch.randn(5, 12), []
    y = layer(x)

    def run():
        for _ in range(50):
            seen.append(layer(x).detach())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 150 and all(torch.equal(each, y) for each in seen)


def test_the_layers_are_fused(model):
    assert isinstance(model.base_model.model[0], FusedLinear) and model.base_model.model[0].obstacle() is None
