"""The error budget over random configurations: every method, dtype, backend and tier of the CPU, down to one element.

--configurations says how many, --seed where to begin; the worst ratio of an error to its budget is printed.
"""

import contextlib
import functools
import random
from collections.abc import Callable, Iterable

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import native
from python_tests.tiers import TIERS, capped

METHODS = ("lora", "nlora", "inttune", "lora2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain_lora2(x, weight, lora_v, lora_u, lora_E, lora_U, lora_V, bias=None, *, mask, scaling):
    E = lora_E * mask.to(lora_E.dtype)
    return testing.plain_linear(x, weight, lora_v, lora_V, (lora_U * E) @ lora_u, bias, scaling=scaling)


def configuration(seed: int):
    """(description, operation, its plain form, that without the adapter, tensors, dy, tensors that want a gradient)"""
    draw = random.Random(seed)

    def size(largest: int) -> int:
        # As many small sizes as large ones.
        return max(1, round(largest ** draw.random()))

    M, K, N, R = size(200), size(300), size(300), size(48)
    dtype, method = draw.choice(DTYPES), draw.choice(METHODS)
    wide = draw.random() < 0.5
    p = testing.problem(
        M,
        K,
        N,
        R,
        dtype=dtype,
        adapter_dtype=torch.float32 if wide else dtype,
        core=method != "lora",
        bias=draw.random() < 0.5,
        strided=draw.random() < 0.3,
        seed=seed,
    )
    scaling = draw.choice((1.0, 0.0, -0.5, 0.7, 2.0, 16.0))
    tensors = {name: getattr(p, name) for name in testing.TENSORS if getattr(p, name) is not None}
    ours, plain, options = nk.lora_linear, testing.plain_linear, {}
    wrt = [name for name in tensors if method != "inttune" or name in ("x", "lora_N")]
    if method == "lora2":
        r = size(48)
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("lora_u", (r, R)), ("lora_E", (r,)), ("lora_U", (R, r))):
            tensors[name] = torch.randn(shape, generator=generator).div_(R**0.5).to(p.lora_A.dtype)
        tensors["lora_v"], tensors["lora_V"] = tensors.pop("lora_A"), tensors.pop("lora_B")
        del tensors["lora_N"]
        ours, plain, wrt = nk.lora2_linear, plain_lora2, list(tensors)
        options = {"mask": torch.rand(r, generator=generator).round()}
    said = (
        f"seed {seed}: {method} {str(dtype)[6:]}{' fp32 adapter' if wide else ''} M={M} K={K} N={N} R={R} s={scaling}"
    )
    plain, base = (functools.partial(plain, scaling=s, **options) for s in (scaling, 0.0))
    return said, functools.partial(ours, scaling=scaling, **options), plain, base, tensors, p.dy, wrt


def runs(tier: str) -> bool:
    with capped(tier) as there:
        return there


def ways() -> list[tuple[str, str]]:
    """(backend, tier of the CPU) of every way that there is here."""
    if native._C is None:
        return [("reference", ""), ("lean", "")]
    return [("reference", ""), ("lean", ""), *(("cpu", tier) for tier in TIERS if runs(tier))]


def hold(configuration: Callable[[int], tuple], seeds: Iterable[int]) -> None:
    """Every backend and tier within the error budget of these configurations, each as `configuration` here tells it."""
    worst = dict.fromkeys(ways(), (0.0, ""))
    broken = []
    for seed in seeds:
        said, ours, plain, base, tensors, dy, wrt = configuration(seed)
        budget = testing.Budget(plain, base, tensors, dy, wrt)
        for backend, tier in worst:
            with capped(tier) if tier else contextlib.nullcontext():
                results = testing.outputs(functools.partial(ours, backend=backend), tensors, dy, wrt)
            for (name, norm), (error, bound) in budget.errors(results).items():
                ratio = error / bound if bound else float(error > 0) * float("inf") if error else 0.0
                worst[backend, tier] = max(worst[backend, tier], (ratio, f"{name} in the {norm}-norm, {said}"))
                if not error <= bound:
                    broken.append(f"{backend} {tier}: {name} is {ratio:.2f} of its budget in the {norm}-norm, {said}")
    for (backend, tier), (ratio, where) in worst.items():
        print(f"{backend} {tier}: at most {ratio:.2f} of the budget: {where}")
    assert not broken, "\n".join(broken)


def test_every_backend_and_tier_keeps_the_budget(configurations):
    hold(configuration, configurations)


@pytest.mark.parametrize("M, K, N, R", [(1, 1, 1, 1), (1, 40, 30, 1), (40, 1, 1, 1), (7, 12, 10, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_a_budget_for_few_elements_still_finds_what_is_wrong(M, K, N, R, dtype):
    wrong_by = 128 * torch.finfo(dtype).eps
    caught = {}
    for seed in range(20):
        p = testing.problem(M, K, N, R, dtype=dtype, seed=seed)
        tensors = {name: getattr(p, name) for name in testing.TENSORS}
        plain, base = (functools.partial(testing.plain_linear, scaling=s) for s in (p.scaling, 0.0))
        budget = testing.Budget(plain, base, tensors, p.dy)
        off = functools.partial(testing.plain_linear, scaling=p.scaling * (1 + wrong_by))
        for (name, _), (error, bound) in budget.errors(testing.outputs(off, tensors, p.dy)).items():
            caught[name, seed] = caught.get((name, seed), False) or error > bound
    for name in ("dlora_A", "dlora_B", "dlora_N"):
        # Not where the terms of a sum cancel, whose rounding weighs as much.
        assert sum(caught[name, seed] for seed in range(20)) >= 16, name


@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["mixed_signs", "one_sign"])
def test_a_sum_in_any_order_is_as_uncertain_as_adding_one_after_the_other(mean):
    generator = torch.Generator().manual_seed(0)
    terms = torch.randn(200, generator=generator) + mean
    shuffled = torch.stack([terms[torch.randperm(200, generator=generator)] for _ in range(2000)])
    added = torch.zeros(2000)
    for column in shuffled.T:
        added += column
    measured = (added.double() - terms.double().sum()).square().mean().sqrt()
    with testing.AnyOrder(generator):
        drawn = torch.stack([torch.ones(1, 200) @ terms[:, None] for _ in range(2000)])
    # Around what the library itself makes of it.
    stated = drawn.double().std()
    # A rounding error is largest where a binade begins: on average over a binade its variance is half of that.
    assert measured <= 1.1 * stated <= 2.5 * measured
