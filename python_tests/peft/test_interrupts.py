"""Ctrl-C at every bytecode of what changes a weight and says so: both have happened or neither."""

import contextlib
import copy
import signal
import sys
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

import nlora_kernels as nk
from nlora_kernels.commit import commit
from nlora_kernels.lora2.layers import layers
from nlora_kernels.peft.layer import FusedLinear
from python_tests.peft.adapters import METHODS, config
from python_tests.tiny import perturb

PACKAGE = str(Path(nk.__file__).parent)


@contextlib.contextmanager
def interrupted_at(step: int):
    """KeyboardInterrupt at the step-th bytecode in code of the package; gives a list that says whether it came."""
    count, came = 0, []

    def trace(frame, event, argument):
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return trace if event == "call" else None
        frame.f_trace_opcodes = True
        if event == "opcode":
            count += 1
            if count == step:
                came.append(step)
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        yield came
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)


def check_at_every_bytecode(prepare, operate, agrees, stride: int = 1):
    """`operate` on what `prepare` makes, interrupted once at each bytecode that it runs; how often that was."""
    step = 1
    while True:
        subject = prepare()
        with interrupted_at(step) as came:
            operate(subject)
        assert agrees(subject), f"weight and flag disagree after an interrupt at bytecode {step}"
        if not came:
            return step
        step += stride


def moved(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return layer


MODULES = {
    "nlora": lambda linear: nk.NLoraLinear.from_linear(linear, 4),
    "residual": lambda linear: nk.NLoraLinear.from_linear(linear, 4, residual=True),
    "lora2": lambda linear: nk.LoRA2Linear.from_linear(linear, 4, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operation", ["merge", "unmerge"])
@pytest.mark.parametrize("kind", MODULES)
def test_merging_a_module(kind, operation, dtype):
    torch.manual_seed(0)
    made = moved(MODULES[kind](nn.Linear(12, 10).to(dtype)))
    if operation == "unmerge":
        made.merge()
    before = made.base.weight.clone()

    def agrees(layer):
        return torch.equal(layer.base.weight, before) == (layer.merged == (operation == "unmerge"))

    assert check_at_every_bytecode(lambda: copy.deepcopy(made), lambda layer: getattr(layer, operation)(), agrees) > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtracting_in_place(dtype, monkeypatch):
    monkeypatch.setattr(nk.init, "_TILE_ROWS", 2)
    W, A, N, B = (torch.randn(shape).to(dtype) for shape in ((9, 7), (3, 7), (3, 3), (9, 3)))
    after = nk.init.subtract_(W.clone(), A, N, B, 0.5)

    def agrees(weight):
        return torch.equal(weight, W) or torch.equal(weight, after)

    assert check_at_every_bytecode(W.clone, lambda weight: nk.init.subtract_(weight, A, N, B, 0.5), agrees) > 20


def effective(layer) -> Tensor:
    """What the layer's own record says that the base weight was before anything was merged or subtracted."""
    W = layer.get_base_layer().weight.detach().clone()
    for name in layer.merged_adapters:
        W -= layer.get_delta_weight(name)
    if getattr(layer, "subtracted", None) is not None:
        W += layer.initial(layer.subtracted, layer.initial_scaling[layer.subtracted]).product()
    return W


def two_adapters(method: str):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10))
    model = peft.get_peft_model(copy.deepcopy(base), config(method, target_modules=["0"]))
    model.add_adapter("second", config(method, target_modules=["0"]))
    perturb(model, 0.3)
    return model.base_model.model[0], base[0].weight.detach()


OPERATIONS = {
    "merge": (lambda layer: None, lambda layer: layer.merge()),
    "safe_merge": (lambda layer: None, lambda layer: layer.merge(safe_merge=True)),
    "merge_both": (lambda layer: None, lambda layer: layer.merge(adapter_names=["second", "default"])),
    "unmerge": (lambda layer: layer.merge(), lambda layer: layer.unmerge()),
    "unmerge_both": (lambda layer: layer.merge(adapter_names=["second", "default"]), lambda layer: layer.unmerge()),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("method", [name for name in METHODS if name in ("lora", "nlora", "nlora_residual", "lora2")])
def test_merging_a_layer_of_peft(method, operation):
    made, W = two_adapters(method)
    assert isinstance(made, FusedLinear)
    first, operate = OPERATIONS[operation]
    stride = 3 if operation.endswith("both") else 1
    first(made)

    def agrees(layer):
        return (effective(layer) - W).abs().max() < 1e-5

    with torch.no_grad():
        assert check_at_every_bytecode(lambda: copy.deepcopy(made), operate, agrees, stride) > 50


RESIDUAL = {
    "subtract": (lambda layer: layer.add_initial(), lambda layer: layer.subtract_initial()),
    "add": (lambda layer: None, lambda layer: layer.add_initial()),
    "delete": (lambda layer: None, lambda layer: layer.delete_adapter("default")),
    "unload": (lambda layer: None, lambda layer: layer.unload_and_optionally_merge_module(False, False, None)),
    "train": (lambda layer: layer.add_initial(), lambda layer: layer.train()),
}


@pytest.mark.parametrize("operation", RESIDUAL)
def test_the_product_of_a_residual_adapter(operation):
    made, W = two_adapters("nlora_residual")
    assert made.subtracted == "default"
    first, operate = RESIDUAL[operation]
    first(made)

    def agrees(layer):
        return (effective(layer) - W).abs().max() < 1e-5

    with torch.no_grad():
        assert check_at_every_bytecode(lambda: copy.deepcopy(made), operate, agrees) > 10


def test_loading_another_product():
    made, W = two_adapters("nlora_residual")
    state = {name: 1.5 * tensor for name, tensor in made.state_dict().items() if "default" in name}

    def agrees(layer):
        return (effective(layer) - W).abs().max() < 1e-5

    def load(layer):
        layer.load_state_dict(state, strict=False)

    assert check_at_every_bytecode(lambda: copy.deepcopy(made), load, agrees) > 50
    load(made)
    assert agrees(made) and torch.equal(made.lora_A0["default"].weight, state["lora_A0.default.weight"])


@pytest.mark.parametrize("of_peft", [False, True], ids=["module", "peft"])
def test_compressing(of_peft):
    """Ranks, scaling, tensors and configuration: all of the old or all of the new."""
    if of_peft:
        made = peft.get_peft_model(
            nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)), config("lora2", target_modules=["0", "1"])
        )
    else:
        made = nn.Sequential(*(nk.LoRA2Linear.from_linear(nn.Linear(*shape), 4, 3) for shape in ((12, 10), (10, 8))))
    perturb(made, 0.3)
    for name, mask in made.named_buffers():
        if "lora_mask" in name:
            mask[1] = 0
    x = torch.randn(5, 12)
    with torch.no_grad():
        before = made(x)

    def agrees(model):
        found = layers(model)
        ranks = {layer.r for layer in found}
        recorded = {layer.module.r if layer.adapter is None else layer.module.r["default"] for layer in found}
        patterns = set(model.peft_config["default"].rank_pattern.values()) if of_peft else ranks - {4}
        with torch.no_grad():
            same = (model(x) - before).abs().max() < 1e-5
        return same and ranks == recorded and (ranks, patterns) in (({4}, set()), ({3}, {3}))

    assert check_at_every_bytecode(lambda: copy.deepcopy(made), nk.lora2.compress, agrees, 7) > 50


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs signal.setitimer")
def test_many_interrupts_one_upon_the_other():
    """While an interrupt unwinds, the next ones come: in `finally` and `except` too."""
    made, W = two_adapters("nlora_residual")
    came = 0

    def interrupt(_, frame):
        nonlocal came
        # Only where code of the package is running, not in this test.
        while frame is not None:
            if frame.f_code.co_filename.startswith(PACKAGE):
                came += 1
                raise KeyboardInterrupt
            frame = frame.f_back

    handler = signal.signal(signal.SIGALRM, interrupt)
    try:
        for round in range(200):
            layer = copy.deepcopy(made)
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + 2e-5 * (round % 40), 1e-4)
            with contextlib.suppress(KeyboardInterrupt):
                layer.merge(adapter_names=["second", "default"])
                layer.unmerge()
                layer.merge()
            signal.setitimer(signal.ITIMER_REAL, 0)
            # One may have come while no_grad was being left.
            torch.set_grad_enabled(True)
            assert (effective(layer) - W).abs().max() < 1e-5
        assert came
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


@pytest.fixture(autouse=True)
def functions_are_overridden_afterwards():
    """No interrupt may leave the process without its modes and subclasses: every test after it would meet that."""
    yield
    assert torch._C._is_torch_function_enabled()


def test_a_step_that_fails_brings_the_modes_back():
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        commit(fails)
    assert torch._C._is_torch_function_enabled()
    with torch._C.DisableTorchFunction():
        assert commit(list) and not torch._C._is_torch_function_enabled()
