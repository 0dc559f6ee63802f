"""LoRA² training over the 72 matrices of DeBERTa-v3-base at r = k = 8: the allocator's step, and the penalty.

The baselines are a loop over the same small tensors, PEFT's AdaLoRA on the same layers, and eager autograd through the
penalty's definition. What is timed is checked first, and rounds of all of them alternate; figures are medians of the
ratios of single rounds.
"""

import itertools
import statistics
import time

import peft
import pytest
import torch
from torch import nn

import nlora_kernels as nk
from nlora_kernels.lora2 import RankAllocator, native, orthogonal_penalty

SHAPES = {
    "query_proj": (768, 768),
    "key_proj": (768, 768),
    "value_proj": (768, 768),
    "attention_output": (768, 768),
    "intermediate": (768, 3072),
    "output": (3072, 768),
}
BLOCKS, R, K = 12, 8, 8
DELTA_T = 10
SCHEDULE = {"target_rank": 2, "total_steps": 100_000, "t_init": 0, "t_final": 50_000, "delta_t": DELTA_T}
IMPLS = ["cpu", "lean"] if native._C else ["lean"]


def linears():
    # One set of weights for all blocks: they are not read here.
    weights = {name: nn.Parameter(torch.zeros(o, i), requires_grad=False) for name, (i, o) in SHAPES.items()}
    blocks = nn.ModuleList(nn.ModuleDict() for _ in range(BLOCKS))
    for block in blocks:
        for name, weight in weights.items():
            block[name] = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
            block[name].weight = weight
    return blocks


def with_gradients(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(0, 0.02, generator=generator)
            p.grad = torch.empty_like(p).normal_(0, 1e-3, generator=generator)
    return model


def lora2_model():
    blocks = linears()
    layers = [nk.LoRA2Linear.from_linear(linear, R, K) for block in blocks for linear in block.values()]
    return with_gradients(nn.ModuleList(layers))


@pytest.fixture
def impl(request, monkeypatch):
    if request.param == "lean":
        monkeypatch.setattr(native, "_C", None)
    return request.param


class Loop:
    """The allocator as a Python loop over the small tensors, in the manner of the published code and of AdaLoRA."""

    def __init__(self, model):
        self.layers = list(model)
        self.tensors = [t for a in self.layers for t in (a.lora_E, a.lora_u, a.lora_U)]
        self.mean = [torch.zeros_like(t) for t in self.tensors]
        self.spread = [torch.zeros_like(t) for t in self.tensors]
        self.t = 0

    @torch.no_grad()
    def step(self, budget):
        self.t += 1
        for n, p in enumerate(self.tensors):
            sensitivity = (p * p.grad).abs()
            self.mean[n] = 0.85 * self.mean[n] + 0.15 * sensitivity
            self.spread[n] = 0.85 * self.spread[n] + 0.15 * (sensitivity - self.mean[n]).abs()
        if self.t % DELTA_T:
            return
        scores = self.scores()
        threshold = torch.kthvalue(torch.cat(scores), sum(map(len, scores)) - budget).values
        for layer, own in zip(self.layers, scores, strict=True):
            layer.lora_E.masked_fill_(own <= threshold, 0)

    def scores(self):
        S = [mean * spread for mean, spread in zip(self.mean, self.spread, strict=True)]
        return [E + u.mean(1) + U.mean(0) for E, u, U in zip(S[::3], S[1::3], S[2::3], strict=True)]


def ratios(rounds, ours, **others):
    """{name: (median, lowest and highest of ours over it, its milliseconds)}, and the milliseconds of ours."""
    functions = {"ours": ours, **others}
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e3 * (time.perf_counter() - start))
    # The first round warms up.
    times = {name: values[1:] for name, values in times.items()}
    result = {}
    for name in others:
        single = sorted(a / b for a, b in zip(times["ours"], times[name], strict=True))
        result[name] = (statistics.median(single), single[0], single[-1], statistics.median(times[name]))
    return result, statistics.median(times["ours"])


def record(benchmark, function, op, impl, own, against):
    info = {"impl": impl, "op": op, "shape": "DeBERTa-v3-base x72", "r": R, "k": K, "dtype": "float32", "device": "cpu"}
    info |= {"threads": torch.get_num_threads(), "ms": own}
    for name, (ratio, low, high, ms) in against.items():
        info |= {f"ratio_to_{name}": ratio, f"range_to_{name}": (low, high), f"ms_{name}": ms}
        print(f"\n{op} ({impl}) {own:.3f} ms, {name} {ms:.3f} ms: ratio {ratio:.4f} ({low:.4f} to {high:.4f})", end="")
    benchmark.extra_info.update(info)
    benchmark.pedantic(function, rounds=3)


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_allocator_step(impl, benchmark):
    model, twin = lora2_model(), lora2_model()
    allocator, loop = RankAllocator(model, **SCHEDULE), Loop(twin)

    config = peft.AdaLoraConfig(
        init_r=R,
        target_r=2,
        tinit=0,
        tfinal=50_000,
        deltaT=DELTA_T,
        total_step=100_000,
        target_modules=list(SHAPES),
    )
    holder = nn.Module()
    holder.blocks, holder.forward = linears(), None
    adalora = with_gradients(peft.get_peft_model(holder, config)).base_model
    scored = {"ours": sum(t.numel() for la in allocator.layers for t in la.scored)}
    scored["adalora"] = sum(p.numel() for name, p in adalora.named_parameters() if "lora_" in name and p.requires_grad)

    # Ten steps, one of them with a masking.
    def ours():
        return [allocator.step() for _ in range(DELTA_T)]

    def python_loop():
        for _ in range(DELTA_T):
            loop.step(allocator.budget(loop.t + 1))

    steps = itertools.count(1)

    def peft_adalora():
        for _ in range(DELTA_T):
            adalora.update_and_allocate(next(steps))

    for _ in range(2):
        ours()
        python_loop()
        for a, b in zip(model, twin, strict=True):
            torch.testing.assert_close(a.lora_E, b.lora_E, rtol=0, atol=0)
    for score, expected in zip(allocator.importance().values(), loop.scores(), strict=True):
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-12)

    against, own = ratios(8, ours, python_loop=python_loop, peft_adalora=peft_adalora)
    for name, count in (("ours", scored["ours"]), ("peft_adalora", scored["adalora"])):
        ms = own if name == "ours" else against[name][3]
        benchmark.extra_info[f"ns_per_scored_value_{name}"] = 1e6 * ms / DELTA_T / count
        print(f"\n{name}: {count} values scored, {1e6 * ms / DELTA_T / count:.2f} ns each and step", end="")
    record(benchmark, ours, f"allocator, {DELTA_T} steps", impl, own, against)
    if impl == "cpu":
        assert against["python_loop"][0] <= 1 / 15
        assert against["peft_adalora"][0] <= 1 / 20


def eager_penalty(model, form):
    def off(m):
        return m - torch.eye(len(m))

    total = 0
    for a in model:
        v, u, U, V = a.lora_v, a.lora_u, a.lora_U, a.lora_V
        grams = [v @ v.T, u.T @ u, U @ U.T, V.T @ V]
        if form == "paper":
            grams += [u @ v @ v.T @ u.T, U.T @ V.T @ V @ U]
            total = total + sum(off(m).square().sum() for m in grams)
        else:
            total = total + sum(torch.linalg.matrix_norm(off(m)) for m in grams) / (4 * len(model))
    return total


@pytest.mark.parametrize("form", ["paper", "reference"])
@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_penalty_with_its_gradient(impl, form, benchmark):
    model, twin = lora2_model(), lora2_model()

    def run(model, penalty):
        model.zero_grad()
        value = penalty(model, form)
        value.backward()
        return value.item()

    def ours():
        return run(model, orthogonal_penalty)

    def eager():
        return run(twin, eager_penalty)

    assert ours() == pytest.approx(eager(), rel=1e-6)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * q.grad.abs().max().item())
    against, own = ratios(8, ours, eager=eager)
    record(benchmark, ours, f"penalty with gradient, {form}", impl, own, against)
    if impl == "cpu":
        assert against["eager"][0] <= 1 / 4
