"""Initialisation of an adapter: NLoRA and plain LoRA here, PiSSA and OLoRA as PEFT computes them.

An implementation is checked before it is timed: where it takes its product out of the weight, weight and product are
to add up to the old weight; where it does not, the weight is to be as it was. Of PiSSA beside a whole block one layer
alone is checked. Weights are restored between rounds.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import nlora_kernels as nk
from bench import cells, rows
from nlora_kernels import testing


class Case(NamedTuple):
    model: str
    layers: tuple[str, ...]
    r: int
    impls: tuple[str, ...]
    compared: tuple[str, ...]  # timed in turn with every row
    smoke: bool = False

    def __str__(self) -> str:
        what = "block" if len(self.layers) > 1 else self.layers[0]
        return f"{'smoke-' if self.smoke else ''}{self.model}.{what}-r{self.r}"


CHEAP = ("lora", "slora", "nlora", "nlora_residual", "nlora_optimal_residual")
BLOCK = tuple(cells.MODELS["Llama-2-7B"])
CASES = [
    Case(
        "DeBERTa-v3-base",
        ("query_proj",),
        8,
        (*CHEAP, "olora", "pissa_niter_4", "pissa_niter_16"),
        ("pissa_niter_4",),
        True,
    ),
    Case("DeBERTa-v3-base", ("query_proj",), 128, (*CHEAP, "olora", "pissa_niter_16", "pissa"), ("pissa_niter_16",)),
    Case("Llama-2-7B", ("q_proj",), 128, (*CHEAP, "olora"), ("pissa_niter_16",)),
    # All linear layers of a block: what a user waits for, once per block.
    Case("Llama-2-7B", BLOCK, 128, ("nlora_residual",), ("pissa_niter_16",)),
]
ROWS = [rows.long(case, n, when=case.model == "Llama-2-7B", id=f"{case}-{n}") for case in CASES for n in case.impls]
# By how much the block is to be faster than PiSSA with 16 iterations.
SPEEDUP = 40


def ours(linear: nn.Linear, r: int, impl: str) -> tuple[Tensor, Tensor | None, Tensor]:
    if impl.startswith("nlora"):
        options = {"init": "nystrom", "core": "optimal" if "optimal" in impl else "sample"}
        options["residual"] = "residual" in impl
    else:
        options = {"init": impl}
    layer = nk.NLoraLinear.from_linear(linear, r, **options)
    return layer.lora_A, layer.lora_N, layer.lora_B


def peft_layer(linear: nn.Linear, r: int) -> Callable[[str], tuple[Tensor, None, Tensor]]:
    """PEFT's initialisation on a layer that stands already, so that its construction is not timed."""
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    layer = Linear(linear, "default", LoraConfig(init_lora_weights=False), r=r, lora_alpha=r)

    def initialise(impl):
        if impl == "olora":
            layer.olora_init("default")
        else:
            layer.pissa_init("default", impl)
        return layer.lora_A["default"].weight, None, layer.lora_B["default"].weight

    return initialise


class Block:
    """The linear layers of a case and their weights as they were."""

    def __init__(self, case: Case, impl: str):
        generator = torch.Generator().manual_seed(0)
        self.impl, self.r = impl, case.r
        sizes = [cells.MODELS[case.model][layer] for layer in case.layers]
        self.weights = [torch.randn(N, K, generator=generator) / math.sqrt(K) for K, N in sizes]
        self.linears = [nn.Linear(*size, bias=False, device="meta") for size in sizes]
        for linear in self.linears:
            linear.weight = nn.Parameter(torch.empty(linear.weight.shape), requires_grad=False)
        self.peft = (
            [peft_layer(linear, case.r) for linear in self.linears] if impl.startswith(("olora", "pissa")) else []
        )
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        for linear, weight in zip(self.linears, self.weights, strict=True):
            linear.weight.copy_(weight)

    def __call__(self) -> list[tuple[Tensor, Tensor | None, Tensor]]:
        if self.peft:
            return [initialise(self.impl) for initialise in self.peft]
        return [ours(linear, self.r, self.impl) for linear in self.linears]

    @torch.no_grad()
    def check(self) -> float:
        """Runs once; W' + B·N·A against W in fp64, within twice the error of plain PyTorch for the difference."""
        largest = 0.0
        exact_residual = self.peft or "residual" in self.impl
        for linear, weight, (A, N, B) in zip(self.linears, self.weights, self(), strict=True):
            if not exact_residual:
                assert torch.equal(linear.weight, weight), f"{self.impl} changed the weight"
                continue
            product = B.double() if N is None else B.double() @ N.double()
            exact = weight.double().addmm_(product, A.double(), alpha=-1)
            plain = weight - (B if N is None else B @ N) @ A
            error, allowed = (testing.error_norm(t, exact) for t in (linear.weight, plain))
            size = exact.norm().item()
            bound = 2 * allowed + torch.finfo(weight.dtype).eps * size
            assert error <= bound, f"{self.impl}: weight + B·N·A is off by {error:.3g}, the budget is {bound:.3g}"
            largest = max(largest, error / size)
        self.restore()
        return largest


# Of what every row of a case is compared with.
@functools.lru_cache(1)
def compared(case: Case, impl: str) -> Block:
    block = Block(case, impl)
    # All layers of a block take as long to check as to decompose, and one of them is a case of its own.
    if len(case.layers) == 1:
        block.check()
    return block


@pytest.mark.parametrize("case, impl", ROWS)
def test_init(benchmark, request, case, impl):
    target = Block(case, impl)
    others = {name: compared(case, name) for name in case.compared}
    error = target.check()
    sizes = [cells.MODELS[case.model][layer] for layer in case.layers]
    touched = sum(K * N for K, N in sizes)
    what = "all linear layers of a block" if len(case.layers) > 1 else case.layers[0]
    info = {"model": case.model, "layer": what, "shape": f"{case.model} {what}", "r": case.r, "dtype": "float32"}
    info |= {"impl": impl, "op": "init", "method": impl.partition("_")[0], "error": error}
    # In place the weight is read and written once; a method that takes nothing out need not touch it.
    moved = 8 * touched if impl.endswith("residual") else 0

    def prepare():
        for block in (target, *others.values()):
            block.restore()

    # PiSSA takes a second a layer and ten a block; a factor of 40 needs no third digit.
    rounds = None if case.model != "Llama-2-7B" else 2 if len(case.layers) > 1 else 3
    times = rows.record(benchmark, target, others, info, request, bytes_moved=moved, rounds=rounds, prepare=prepare)
    if "pissa_niter_16" in others and impl == "nlora_residual" and benchmark.stats:
        ratio = 1 / benchmark.extra_info["ratio_to_pissa_niter_16"]
        benchmark.extra_info["speedup_vs_pissa_niter_16"] = ratio
        print(f"\n{case}: {ratio:.0f} times as fast as PiSSA with 16 iterations, {len(times['self'])} rounds")
        if len(case.layers) > 1:
            assert ratio >= SPEEDUP
