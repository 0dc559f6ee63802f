"""Layers that share x: as one operation, beside the same layers one by one, PEFT's, and the frozen ones.

python -m pytest bench/test_group.py --benchmark-json=group.json
"""

import functools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import nlora_kernels as nk
from bench import cells, rows
from nlora_kernels import testing


class Case(NamedTuple):
    model: str
    layers: tuple[str, ...]
    M: int
    r: int
    smoke: bool = False

    def __str__(self) -> str:
        return f"{'smoke-' if self.smoke else ''}{self.model}-{'+'.join(self.layers)}-M{self.M}-r{self.r}"


QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
CASES = [
    Case("SmolLM2-135M", QKV, 512, 8, smoke=True),
    Case("SmolLM2-135M", GATE_UP, 512, 8),
    Case("DeBERTa-v3-base", ("query_proj", "key_proj", "value_proj"), 512, 8),
    Case("Llama-3-8B", QKV, 256, 64),
    Case("Llama-3-8B", QKV, 256, 16),
    Case("Llama-2-7B", QKV, 256, 64),
]
ROWS = [(case, method, op) for case in CASES for method in ("nlora", "inttune") for op in ("forward", "backward")]


class Layers:
    """The layers of a case, all of one x, and the parts of their training step."""

    def __init__(self, case: Case, method: str):
        sizes = [cells.MODELS[case.model][name] for name in case.layers]
        bias = case.model in cells.WITH_BIAS
        self.problems = [testing.problem(case.M, K, N, case.r, bias=bias, seed=i) for i, (K, N) in enumerate(sizes)]
        self.x = self.problems[0].x.requires_grad_()
        trained = ("lora_A", "lora_N", "lora_B") if method == "nlora" else ("lora_N",)
        self.trained = [getattr(p, name).requires_grad_() for p in self.problems for name in trained]
        self.dys = [p.dy for p in self.problems]

    def grouped(self):
        adapters = [(p.lora_A, p.lora_B, p.lora_N) for p in self.problems]
        weights, biases = [p.weight for p in self.problems], [p.bias for p in self.problems]
        return nk.lora_group_linear(self.x, weights, adapters, biases, scaling=0.7)

    def apart(self):
        return tuple(
            nk.lora_linear(self.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, scaling=0.7) for p in self.problems
        )

    def plain(self):
        return tuple(
            testing.plain_linear(self.x, p.weight, p.lora_A, p.lora_B, p.lora_N, p.bias, scaling=0.7)
            for p in self.problems
        )

    def peft(self):
        """Plain LoRA, which has no core."""
        return tuple(
            testing.plain_linear(self.x, p.weight, p.lora_A, p.lora_B, None, p.bias, scaling=0.7) for p in self.problems
        )

    def floor(self):
        return tuple(F.linear(self.x, p.weight, p.bias) for p in self.problems)

    def run(self, name: str, op: str):
        """The forward or the backward, as a function."""
        function = getattr(self, name)
        if op == "forward":
            return function
        wrt = [self.x] if name == "floor" else [self.x, *self.trained]
        ys = function()
        return lambda: torch.autograd.grad(ys, wrt, self.dys, retain_graph=True, allow_unused=True)

    def results(self, function) -> list[torch.Tensor]:
        ys = function()
        return [*ys, *torch.autograd.grad(ys, [self.x, *self.trained], self.dys)]

    def check(self) -> float:
        """The outputs and gradients of the group against fp64, within twice the error of plain PyTorch."""
        found, plain = self.results(self.grouped), self.results(self.plain)
        wide = Layers.__new__(Layers)
        wide.problems = [p.to(torch.double) for p in self.problems]
        wide.x = self.x.detach().double().requires_grad_()
        names = [n for n in ("lora_A", "lora_N", "lora_B") if getattr(self.problems[0], n).requires_grad]
        for p in wide.problems:
            for name in names:
                setattr(p, name, getattr(p, name).detach().requires_grad_())
        wide.trained = [getattr(p, name) for p in wide.problems for name in names]
        wide.dys = [dy.double() for dy in self.dys]
        exact = wide.results(wide.plain)
        return rows.error(*(dict(enumerate(each)) for each in (found, plain, exact)), "result ")


# Of both rows of it.
@functools.lru_cache(1)
def checked(case: Case, method: str) -> tuple[Layers, float]:
    layers = Layers(case, method)
    return layers, layers.check()


@pytest.mark.parametrize("case, method, op", ROWS, ids=[f"{case}-{method}-{op}" for case, method, op in ROWS])
def test_group(benchmark, request, case, method, op):
    layers, error = checked(case, method)
    others = {name: layers.run(name, op) for name in ("apart", "floor", *(["peft"] if method == "nlora" else []))}
    target = layers.run("grouped", op)
    for function in (target, *others.values()):
        function()
    shape = f"{case.model} {', '.join(case.layers)} M={case.M}"
    info = {"model": case.model, "layer": "+".join(case.layers), "M": case.M, "shape": shape, "r": case.r}
    info |= {"impl": "group", "op": op, "method": method, "dtype": "float32", "error": error}
    rows.record(benchmark, target, others, info, request)
