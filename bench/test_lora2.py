"""LoRA² training over the 72 matrices of DeBERTa-v3-base at r = k = 8: the allocator's step, and the penalty.

The baselines are a loop over the same small tensors, PEFT's AdaLoRA on the same layers, and eager autograd through the
penalty's definition. What is timed is checked first.
"""

import itertools
import statistics

import peft
import pytest
import torch
from torch import nn

import nlora_kernels as nk
from bench import cells, rows
from nlora_kernels.backends.cpu import lora2 as native
from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty

SHAPES = {name.replace(".", "_"): shape for name, shape in cells.MODELS["DeBERTa-v3-base"].items()}
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


def row(benchmark, request, ours, others, impl, prepare=lambda: None, **info):
    info |= {"impl": impl, "shape": f"DeBERTa-v3-base x{BLOCKS * len(SHAPES)}", "r": R, "k": K, "dtype": "float32"}
    times = rows.record(benchmark, ours, others, info, request, prepare=prepare)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def assert_at_most(benchmark, limit, name):
    info = benchmark.extra_info
    ratio, spread = info[f"ratio_to_{name}"], info[f"ratio_to_{name}_p20_p80"]
    assert ratio <= limit, f"{ratio:.4f} of {name}, 20th to 80th percentile {spread}"


@pytest.mark.parametrize("impl", IMPLS, indirect=True)
def test_allocator_step(impl, benchmark, request):
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
    scored = {"self": sum(t.numel() for la in allocator.layers for t in la.scored)}
    scored["peft"] = sum(p.numel() for name, p in adalora.named_parameters() if "lora_" in name and p.requires_grad)

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
        peft_adalora()
        for a, b in zip(model, twin, strict=True):
            torch.testing.assert_close(a.lora_E, b.lora_E, rtol=0, atol=0)
    for score, expected in zip(allocator.importance().values(), loop.scores(), strict=True):
        torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-12)

    others = {"python_loop": python_loop, "peft": peft_adalora}
    ms = row(benchmark, request, ours, others, impl, op="allocator", steps=DELTA_T)
    for name, count in scored.items():
        benchmark.extra_info[f"values_scored_{name}"] = count
        benchmark.extra_info[f"ns_per_value_{name}"] = 1e6 * ms[name] / DELTA_T / count
    if impl == "cpu" and benchmark.enabled:
        assert_at_most(benchmark, 1 / 15, "python_loop")
        assert_at_most(benchmark, 1 / 20, "peft")


def eager_penalty(model, form):
    def off(m):
        return m - torch.eye(len(m), dtype=m.dtype)

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
def test_penalty_with_its_gradient(impl, form, benchmark, request):
    model, twin, exact = lora2_model(), lora2_model(), lora2_model().double()
    exact.zero_grad()

    def run(model, penalty):
        value = penalty(model, form)
        value.backward()
        return value.item()

    def forget():
        # Untimed: a loop does it once a step, whatever it trains.
        model.zero_grad()
        twin.zero_grad()

    def ours():
        return run(model, orthogonal_penalty)

    def eager():
        return run(twin, eager_penalty)

    forget()
    assert ours() == pytest.approx(eager(), rel=1e-6)
    run(exact, eager_penalty)
    for p, q, fp64 in zip(model.parameters(), twin.parameters(), exact.parameters(), strict=True):
        if fp64.grad is not None:
            error, allowed = ((t.grad - fp64.grad).norm() for t in (p, q))
            assert error <= 2 * allowed + torch.finfo(p.dtype).eps * fp64.grad.norm()
    forget()
    row(benchmark, request, ours, {"eager": eager}, impl, op=f"penalty, {form}", prepare=forget)
    if impl == "cpu" and benchmark.enabled:
        assert_at_most(benchmark, 1 / 4, "eager")
