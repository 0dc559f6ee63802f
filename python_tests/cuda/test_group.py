"""Several products in one launch, and layers that share x by backend "cuda", on the emulator against fp64."""

import functools
from typing import NamedTuple

import pytest
import torch

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import TABLE, Call, Needs
from python_tests.cuda import emulated
from python_tests.cuda.emulator import SCHEDULES, TILES, check_sum, run_gemm, synchronisation_calls
from python_tests.cuda.test_gemm import REDUNDANT, slices_error
from python_tests.ops.test_group import apart, ours, problem

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ENGINES = pytest.mark.parametrize("ampere", [False, True], ids=["hopper", "ampere"])


class Member(NamedTuple):
    """Sizes of a product of product.h; t and splits of the gradient of what p holds beyond the rank."""

    n: int
    k: int
    r: int = 0
    w: int = 0
    t: int = 0
    splits: int = 0


class Launch(NamedTuple):
    m: int
    mn: bool
    members: tuple[Member, ...]

    def __str__(self) -> str:
        return f"{'sum' if self.mn else 'beside'}-{self.m}-" + "-".join("x".join(map(str, m)) for m in self.members)


# q, k and v that share a tile of p; members without an adapter; several pieces of p; four, one row.
BESIDE = [
    Launch(200, False, (Member(264, 136, 24, 24), Member(72, 136, 24, 24), Member(136, 136, 8, 8))),
    Launch(300, False, (Member(72, 72), Member(264, 72, 40, 40), Member(8, 72))),
    Launch(130, False, (Member(136, 40, 72, 72), Member(72, 40, 104, 128), Member(264, 40, 8, 8))),
    Launch(1, False, tuple(Member(n, 264, 16, 16) for n in (8, 520, 64, 72))),
]
# Sums with and without slices, of ranks that leave parts of stages, and of a member without an adapter.
SUMS = [
    Launch(200, True, (Member(264, 136, 24, 48, 24, 2), Member(264, 72, 8, 16, 8, 3), Member(264, 40, 64, 64))),
    Launch(300, True, (Member(72, 72), Member(72, 264, 40, 80, 40, 1), Member(72, 8))),
    Launch(130, True, (Member(136, 520, 72, 72), Member(136, 40, 56, 112, 56, 2))),
    Launch(1, True, tuple(Member(72, k, 16, 16) for k in (264, 8, 64, 72))),
]


@functools.cache
def operands(launch, dtype):
    generator = torch.Generator().manual_seed(launch.m + len(launch.members))

    def made(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    products, a = [], made(launch.m, launch.members[0].k)
    for i, (n, k, r, w, t, splits) in enumerate(launch.members):
        product = {"a": made(launch.m, k) if launch.mn else a, "b": made(n, k), "mn": launch.mn}
        if w:
            product |= {"wide": made(n, r), "shrink": made(w, k)}
        if t:
            product |= {"t": made(launch.m, t), "splits": splits}
        if i == 0 or (not launch.mn and i % 2):
            product["bias"] = made(n)
        products.append(product)
    return products


def run_all(launches, dtype=BF16, **options):
    """(ticket, products of each launch with what it made, Result)"""
    products = [[dict(product) for product in operands(launch, dtype)] for launch in launches]
    ticket, _, result = run_gemm(*products, **options)
    return ticket, products, result


def run(launch, dtype=BF16, **options):
    ticket, (products,), result = run_all([launch], dtype, **options)
    return ticket, products, result


def parts(product, magnitude):
    """(c, p) in fp64: c from the p that the launch left, and with `magnitude` the sums of absolute values."""
    exact = {n: t.double() for n, t in product.items() if isinstance(t, torch.Tensor)}
    exact = {n: t.abs() if magnitude else t for n, t in exact.items()}
    c = exact["a"] @ exact["b"].T + exact.get("bias", 0)
    if "wide" not in exact:
        return c, None
    return c + exact["p"][:, : exact["wide"].shape[1]] @ exact["wide"].T, exact["a"] @ exact["shrink"].T


def check(launch, products, result):
    exact, magnitude = ([parts(product, flag) for product in products] for flag in (False, True))
    depth = sum(member.k + member.r + 1 for member in launch.members)
    for product, (c, p), (c_size, p_size) in zip(products, exact, magnitude, strict=True):
        if launch.mn:
            c, c_size = (sum(each for each, _ in of) for of in (exact, magnitude))
        check_sum(result, product["c"], c, c_size, depth)
        if p is not None:
            check_sum(result, product["p"], p, p_size, product["a"].shape[1])
        assert "t" not in product or not slices_error(product)
        for name in ("c", "p") if "shrink" in product else ("c",):
            assert product[name]._base is None or product[name]._base[:, product[name].shape[1] :].isnan().all(), name


def tiles_for(launch):
    """Those that can make so wide a p, and a gradient."""
    widest = max(max(member.w, 2 * (member.w - member.r), 2 * member.t) for member in launch.members)
    return [tile for tile, (_, columns, _) in enumerate(TILES) if widest <= 2 * columns]


@pytest.mark.parametrize("launch", [*BESIDE, *SUMS], ids=str)
def test_products_of_one_launch(launch):
    for index, tile in enumerate(tiles_for(launch)):
        for schedule in SCHEDULES[index % 2 :: 2]:
            dtype, tall = (BF16, FP16)[index % 2], 1 + schedule["seed"]
            ticket, products, result = run(launch, dtype, tile=tile, tall=tall, **schedule)
            assert ticket == 0
            check(launch, products, result)


@pytest.mark.parametrize("launch", [BESIDE[0], SUMS[0]], ids=str)
def test_results_of_a_launch_are_the_same_bits_on_every_schedule(launch):
    results = [run(launch, tile=3, blocks=2 + 2 * (s % 2), seed=s, resident=s % 2)[1] for s in range(4)]
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert all(torch.equal(first[name], second[name]) for name in ("c", "p", "slices") if name in first)


@pytest.mark.parametrize("rows", [5, 9])
@pytest.mark.parametrize("mn", [False, True], ids=["beside", "sum"])
def test_rows_of_several_clusters_and_bands(mn, rows):
    members = (Member(72, 72, 24, 48, *((24, 3) if mn else ())), Member(72, 72, 8, 8))
    launch = Launch(256 * (rows - 1) + 8, mn, members)
    for tall in (1, 2):
        _, products, result = run(launch, tile=3, tall=tall, resident=tall % 2, seed=tall)
        check(launch, products, result)


def test_a_group_and_a_product_alone_use_the_same_control_words():
    for seed, launch in enumerate([BESIDE[0], SUMS[0]]):
        group, alone = ([dict(product) for product in operands(launch, BF16)] for _ in range(2))
        ticket, epoch, result = run_gemm(group, *alone, group, tile=2, seed=seed, epoch=2**32 - 3)
        assert (ticket, epoch) == (0, 3)
        check(launch, group, result)
        for product in alone:
            check(launch._replace(members=launch.members[:1]), [product], result)


# Enough work that slots are used again, tiles wait for p and clusters share the right operand; items of p two tiles
# high; two launches on the same control words.
MUTATED = [
    (0, 1, [Launch(300, False, (Member(264, 456, 24, 24), Member(136, 456, 24, 24)))]),
    (2, 2, [Launch(600, False, (Member(136, 72, 24, 24), Member(264, 72, 72, 72)))]),
    (0, 1, [Launch(300, True, (Member(264, 72, 24, 48, 24, 2), Member(264, 72, 24, 24)))]),
    (3, 1, [Launch(300, True, (Member(264, 264, 24, 24), Member(264, 200, 24, 24)))]),
    (0, 1, [Launch(130, False, (Member(136, 72, 24, 24), Member(136, 72, 24, 24)))] * 2),
]
CALLS = synchronisation_calls("gemm.cuh")


@functools.cache
def executed_lines(index):
    tile, tall, launches = MUTATED[index]
    return run_all(launches, tile=tile, tall=tall)[2].lines


def test_every_synchronisation_call_runs_in_a_group():
    assert {line for index in range(len(MUTATED)) for line in executed_lines(index)} >= CALLS.keys()


@pytest.mark.parametrize("line", CALLS, ids=lambda n: f"line{n}-{CALLS[n]}")
def test_deleting_a_synchronisation_call_is_caught_in_a_group(line):
    name, caught = CALLS[line], {}
    for index, (tile, tall, launches) in enumerate(MUTATED):
        if line not in executed_lines(index):
            continue
        seen = caught[index] = []
        for seed in range(1 if name in REDUNDANT else 3):
            for lanes in (False, True):
                options = {"seed": seed, "lanes": lanes, "skipped_line": line}
                ticket, products, result = run_all(launches, tile=tile, tall=tall, **options)
                try:
                    for launch, each in zip(launches, products, strict=True):
                        check(launch, each, result)
                except AssertionError:
                    seen.append(True)
                else:
                    seen.append(ticket != 0)
        if all(seen):
            break
    assert any(map(all, caught.values())) != (name in REDUNDANT), f"{name}: caught {caught}"


# Whole layers: Python, host code and kernels.


def layers_of(tensors, count):
    """(weights, adapters, biases) of a problem of python_tests/ops/test_group.py."""
    adapters = [
        tuple(tensors[f"{name}{i}"] for name in ("lora_A", "lora_B", "lora_N") if f"{name}{i}" in tensors) or None
        for i in range(count)
    ]
    return [tensors[f"weight{i}"] for i in range(count)], adapters, [tensors.get(f"bias{i}") for i in range(count)]


# out of each layer, and sizes: q, k, v of grouped-query attention; gate and up; ranks of one and two tiles; four, one
# of them without an adapter; one token.
CASES = [
    ((136, 40, 40), {"M": 70, "K": 72, "ranks": (16, 16, 16)}),
    ((264, 264), {"M": 130, "K": 136, "ranks": (24, 8), "cores": (True, False), "biases": False}),
    ((72, 136), {"M": 37, "K": 40, "ranks": (136, 72), "cores": False}),
    ((8, 72, 40, 24), {"M": 200, "K": 72, "ranks": (8, 0, 40, 16), "biases": (True, True, False, False)}),
    ((40, 8), {"M": 1, "K": 264, "ranks": (0, 8)}),
]


@ENGINES
@pytest.mark.parametrize("dtype, adapter", [(BF16, FP32), (FP16, FP16)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("outs, sizes", CASES, ids=lambda v: "x".join(map(str, v)) if type(v) is tuple else None)
def test_layers_are_within_the_error_budget(monkeypatch, ampere, dtype, adapter, outs, sizes):
    extension = emulated.install(monkeypatch, ampere=ampere, lanes=dtype is FP16, resident=len(outs) % 2)
    tensors, dys = problem(outs, dtype=dtype, adapter=adapter, **sizes)
    count, scalings, dy = len(outs), [0.5, -1.0, 2.0, 0.7][: len(outs)], torch.cat(dys, -1)
    budget = testing.Budget(apart(count, scalings), apart(count, [0.0] * count), tensors, dy)
    budget.check(testing.outputs(ours(count, scalings, backend="cuda"), tensors, dy))
    assert extension.launches == ["run_linear_forward", "run_linear_backward"]


@ENGINES
def test_each_gradient_is_the_same_whatever_else_is_wanted(monkeypatch, ampere):
    emulated.install(monkeypatch, ampere=ampere)
    tensors, dys = problem((72, 40, 24), M=70, K=64, ranks=(16, 0, 136), dtype=BF16)
    calls = [
        Call(tensors["x"], weight, *(adapter or (None,) * 2)[:2], (adapter or (None,) * 3)[2], bias, 0.5)
        for weight, adapter, bias in zip(*layers_of(tensors, 3), strict=True)
    ]
    Ts = [T for _, T in TABLE["cuda"].forward_group(calls)]
    names = "weight", "lora_A", "lora_B", "lora_N", "bias"

    def grads(*wanted):
        needs = [
            Needs(wanted[0], False, *(call.lora_A is not None and flag for flag in wanted[1:4]), True) for call in calls
        ]
        return TABLE["cuda"].backward_group(calls, dys, Ts, needs)

    all_dx, everything = grads(True, True, True, True)
    for wanted in [(True, False, False, False), (True, False, False, True), (False, True, False, True), (False,) * 4]:
        dx, found = grads(*wanted)
        assert (dx is not None) == wanted[0] and (dx is None or torch.equal(dx, all_dx))
        for of, expected, call in zip(found, everything, calls, strict=True):
            flags = dict(zip(names, (False, *wanted[1:], True), strict=True))
            for name in names:
                grad, right = getattr(of, name), getattr(expected, name)
                assert (grad is not None) == (flags[name] and getattr(call, name) is not None), name
                if grad is not None:
                    # Without dx, H and G come from tiles of another shape.
                    assert torch.equal(grad, right) or (grad - right).norm() <= 2**-7 * right.norm(), name


def test_a_layer_without_a_gradient_costs_nothing(monkeypatch):
    extension = emulated.install(monkeypatch)
    tensors, dys = problem((72, 40), M=40, K=64, ranks=(16, 8), dtype=BF16)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    weights, adapters, biases = layers_of(leaves, 2)
    ys = nk.lora_group_linear(leaves["x"], weights, adapters, biases, backend="cuda")
    grads = torch.autograd.grad(ys[1], list(leaves.values()), dys[1], allow_unused=True)
    without = {name for name, grad in zip(leaves, grads, strict=True) if grad is None}
    assert without == {name for name in leaves if name[-1] == "0"}
    assert extension.launches == ["run_linear_forward", "run_linear_backward"]


def test_what_does_not_go_in_one_launch_goes_in_several(monkeypatch):
    cases = {
        "five": (problem((8,) * 5, M=9, K=16, ranks=(8,) * 5, dtype=BF16), 5, 5),
        "unaligned": (problem((8, 20, 8), M=9, K=16, ranks=(8, 0, 8), dtype=BF16), 3, 2),
        "no tokens": (problem((8, 8), M=0, K=16, ranks=(8, 8), dtype=BF16), 2, 0),
    }
    for said, ((tensors, dys), count, launches) in cases.items():
        extension = emulated.install(monkeypatch)
        scalings, dy = [0.5] * count, torch.cat(dys, -1)
        budget = testing.Budget(apart(count, scalings), apart(count, [0.0] * count), tensors, dy)
        budget.check(testing.outputs(ours(count, scalings, backend="cuda"), tensors, dy))
        expected = ["run_linear_forward"] * launches + ["run_linear_backward"] * launches
        assert extension.launches == expected, said
    tensors, _ = problem((8, 8), M=9, K=16, ranks=(8, 4), dtype=BF16)
    with pytest.raises(ValueError, match="backend 'cuda' cannot take this call: r must be a multiple of 8, got 4"):
        nk.lora_group_linear(tensors["x"], *layers_of(tensors, 2), backend="cuda")


@ENGINES
def test_launches_of_a_group_that_begin_early_are_right_on_every_schedule(monkeypatch, ampere):
    for adapter in (BF16, FP32):
        tensors, dys = problem((72, 40), M=70, K=72, ranks=(16, 136), dtype=BF16, adapter=adapter)
        function, results = ours(2, [0.5, 2.0], backend="cuda"), []
        for seed, resident in ((0, 0), (1, 1), (2, 3), (3, 0)):
            extension = emulated.install(monkeypatch, ampere=ampere, lanes=seed % 2 == 1, resident=resident)
            # The seed is their number.
            extension.launches += ["none"] * seed
            results.append(testing.outputs(function, tensors, torch.cat(dys, -1)))
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:] for name in other)
