"""Adapters on weights in few bits: a layer, forward and backward, in turn with PEFT's on the same base, with the frozen
dense layer alone and with the dense fused layer; and a step of a whole model with the memory that it takes.
"""

import copy
import gc

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import rows
from bench import test_step as steps
from bench.timing import peak_bytes, saved_bytes
from nlora_kernels.peft import NLoraConfig
from nlora_kernels.peft import base as base_weights

SIZE, RANK = 4096, 16
# In fp64 all rows would take longer than they are timed.
CHECKED = 32
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def nf4(weight: Tensor) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(*weight.shape[::-1], bias=False, quant_type="nf4", compute_dtype=weight.dtype)
    layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4").to("cpu")
    return layer


def int8(weight: Tensor) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False).to("cpu")
    return layer


def dense(weight: Tensor) -> nn.Module:
    layer = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def adapted(base: nn.Module, config: peft.LoraConfig, kind) -> nn.Module:
    net = nn.Sequential(base)
    net.is_loaded_in_4bit, net.is_loaded_in_8bit = kind is nf4, kind is int8
    model = peft.get_peft_model(net, config).train()
    with torch.no_grad():
        model.base_model.model[0].lora_B["default"].weight.normal_(std=0.02)
    return model


def step(layer: nn.Module, x: Tensor, dy: Tensor):
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), leaves, dy)


def trained(layer: nn.Module) -> dict[str, Tensor]:
    return {name.partition(".")[0]: p for name, p in layer.named_parameters() if p.requires_grad}


def results(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """What is checked of a layer: all gradients of its adapter, and CHECKED rows of y and dx."""
    y, wrt = layer(x), trained(layer)
    dx, *grads = torch.autograd.grad(y, [x, *wrt.values()], dy)
    return {"y": y.detach()[:CHECKED], "dx": dx[:CHECKED]} | dict(zip(wrt, grads, strict=True))


def by_definition(layer: nn.Module, W: Tensor, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in plain PyTorch, computed in a dtype."""
    x, dy, W = (t.detach().to(dtype) for t in (x, dy, W))
    wrt = {name: p.detach().to(dtype).requires_grad_() for name, p in trained(layer).items()}
    A, N, B = (wrt[f"lora_{name}"] for name in "ANB")
    added = layer.scaling["default"] * F.linear(F.linear(F.linear(x.requires_grad_(), A), N), B)
    dx, *grads = torch.autograd.grad(added, [x, *wrt.values()], dy)
    few = {"y": F.linear(x[:CHECKED], W) + added[:CHECKED], "dx": dy[:CHECKED] @ W + dx[:CHECKED]}
    return {name: t.detach() for name, t in (few | dict(zip(wrt, grads, strict=True))).items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "M"),
    [
        rows.long(kind, M, when=M > 512, id=f"{kind.__name__}-{M}")
        for kind, sizes in {nf4: (16, 128, 512, 2048), int8: (16, 128, 512)}.items()
        for M in sizes
    ],
)
def test_step(benchmark, request, kind, M, dtype):
    weight = (torch.randn(SIZE, SIZE) / SIZE**0.5).to(DTYPES[dtype])
    x, dy = (torch.randn(M, SIZE, dtype=DTYPES[dtype]) for _ in range(2))
    x.requires_grad_()
    options = {"r": RANK, "target_modules": ["0"]}
    ours = adapted(kind(weight), NLoraConfig(init_lora_weights="slora", **options), kind)
    layer = ours.base_model.model[0]
    assert layer.obstacle("default") is None
    W = base_weights.read(layer.base_layer)
    plain, exact = (by_definition(layer, W, x, dy, in_dtype) for in_dtype in (x.dtype, torch.float64))
    error = rows.error(results(layer, x, dy), plain, exact)
    stock = adapted(copy.deepcopy(layer.base_layer), peft.LoraConfig(**options), kind)
    fused = adapted(dense(weight), NLoraConfig(init_lora_weights="slora", **options), dense)
    floor = dense(weight)
    others = {"peft": step(stock, x, dy), "dense_fused": step(fused, x, dy), "floor": step(floor, x, dy)}
    run = step(ours, x, dy)
    for function in (run, *others.values()):
        function()
    info = {"impl": "cpu", "method": "slora", "op": "both", "base": kind.__name__, "dtype": dtype, "error": error}
    rows.record(benchmark, run, others, info | {"M": M, "shape": f"{SIZE}x{SIZE}", "r": RANK}, request)
    ratios = {name: benchmark.extra_info[f"ratio_to_{name}"] for name in others}
    print(f"\n{kind.__name__} {dtype} M={M}: " + ", ".join(f"{ratio:.2f} of {name}" for name, ratio in ratios.items()))


class FourBits(steps.Case):
    """A model whose linear layers are NF4, in whatever dtype x comes."""

    def build(self) -> nn.Module:
        model = steps.Case.build(self)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                layer = nf4(module.weight.data)
                layer.compute_dtype, layer.compute_type_is_set = None, True
                model.set_submodule(name, layer)
        model.is_loaded_in_4bit = True
        return model


def held_by(model: nn.Module) -> list[Tensor]:
    """The tensors of a model, the quantisation states' included."""
    states = [state for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None]
    states += [state.state2 for state in states if state.nested]
    found = [t for state in states for t in (state.absmax, state.code, state.offset) if t is not None]
    return [*model.parameters(), *model.buffers(), *found]


@pytest.mark.parametrize(
    ("case", "method"),
    [
        rows.long(case, method, when=not case.smoke, id=f"{case}-{method}")
        for case, methods in {
            FourBits(*steps.CASES[0]): ("lora", "nlora", "inttune", "lora2"),
            # What trains decides the time and what is kept.
            FourBits(*steps.CASES[1]): ("nlora", "inttune"),
        }.items()
        for method in methods
    ],
)
def test_model(benchmark, request, case, method):
    training, error = steps.checked.__wrapped__(case, method)
    # The dense one is checked where it is a row itself.
    others = {"peft": steps.checked(case, "peft")[0], "dense": steps.Training(steps.Case(*case), method)}
    others["dense"]()
    info = {"impl": "cpu", "method": method, "op": "step", "base": "nf4", "dtype": "float32", "error": error}
    info |= {"M": case.tokens, "shape": f"{case.model} in NF4, {case.blocks} blocks, {case.tokens} tokens", "r": case.r}
    for name, each in (("", training), *((f"{name}_", each) for name, each in others.items())):
        known = held_by(each.model)
        trained = {id(p) for p in each.trained()}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in known if id(t) not in trained}
        info |= {f"{name}base_bytes": sum(storages.values()), f"{name}saved_bytes": saved_bytes(each.output, known)}
        gc.collect()
        info[f"{name}peak_bytes"] = peak_bytes(each)
    rows.record(benchmark, training, others, info, request)
    for name in ("", "peft_", "dense_"):
        base, saved, peak = (info[f"{name}{kind}_bytes"] / 2**20 for kind in ("base", "saved", "peak"))
        print(f"\n{name or 'ours '}{method}: base {base:.1f} MiB, saved {saved:.1f}, peak {peak:.1f}", end="")
