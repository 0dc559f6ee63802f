"""Whole layers on the device: every result against fp64, the same bits again, CUDA graphs, initialisation, training."""

import contextlib
import copy
import functools
import importlib

import torch
import torch.nn.functional as F

import nlora_kernels as nk
from bench.gpu import groups
from bench.gpu.groups import Group
from nlora_kernels import testing
from nlora_kernels.backends import Dropout
from nlora_kernels.lora2 import RankAllocator, orthogonal_penalty

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
METHODS = {"lora": ("x", "lora_A", "lora_B"), "nlora": None, "inttune": ("x", "lora_N"), "lora2": None}
# M, K, N, R: one token, decode, ragged rows, the edges of ranks and tiles, and the layers of Llama-2-7B and BERT, in
# rows that are no multiple of any tile.
CUDA = [
    (1, 4096, 4096, 16),
    (16, 4096, 11008, 64),
    (100, 768, 768, 104),
    (333, 1000, 520, 256),
    (2048, 768, 768, 8),
    (2500, 768, 3072, 64),
    (2100, 4096, 4096, 16),
    (2100, 4096, 4096, 128),
    (2100, 4096, 4096, 256),
    (4100, 4096, 11008, 64),
    (2100, 11008, 4096, 64),
]
CUDA_REHEARSED = [(1, 8, 8, 8), (37, 72, 136, 16), (70, 200, 64, 24)]
# q, k and v of Llama-2-7B, and of Llama-3-8B with large ranks, gate and up, and ragged ones.
GROUPS = [
    Group(2100, 4096, (4096, 4096, 4096), (64, 64, 64)),
    Group(2100, 4096, (4096, 1024, 1024), (256, 128, 128)),
    Group(4100, 4096, (11008, 11008), (16, 16)),
    Group(333, 520, (264, 1000, 8, 72), (24, 0, 104, 8)),
]
GROUPS_REHEARSED = [Group(37, 72, (136, 40, 40), (16, 16, 16)), Group(70, 64, (72, 136), (24, 0))]
# Beside these Triton takes odd sizes, any strides and fp32. Every shape here compiles kernels of its own.
TRITON = [(16, 4096, 4096, 64), (2100, 4096, 4096, 64), (2100, 4096, 4096, 256), (2500, 768, 3072, 8)]
TRITON_ODD = [(0, 64, 48, 8), (1, 33, 17, 5), (70, 513, 641, 300)]
# Of every method; with dropout; of captured graphs.
METHODS_SHAPE = (2100, 4096, 4096, 64)
DROPPED = [(0, 64, 48, 8), (7, 65, 31, 13), (2048, 4096, 4096, 16)]
GRAPHS, DROPPED_GRAPH = [(16, 4096, 4096, 64), (2048, 4096, 4096, 64)], (256, 1024, 1024, 16)
# With a weight in four bits: where a product decodes it, ragged too, and where it is decoded as a whole.
QUANTISED = [(16, 4096, 4096, 64), (64, 4096, 11008, 16), (33, 777, 333, 13), (512, 768, 768, 8)]
QUANTISED_REHEARSED = [(7, 64, 32, 8), (5, 33, 17, 3)]
# Of Nyström: out and in, and r; and r and k of the core of LoRA².
INITIALISED, INITIALISED_REHEARSED = [((4096, 4096), 128), ((1000, 776), 13)], [((75, 50), 7)]
CORES = [(8, 8), (100, 40)]
TRITON_REHEARSED = [(0, 12, 8, 3), (7, 65, 31, 13)]


def cuda(machine) -> dict:
    emulate(machine)
    found = {}
    for shape in machine.pick(CUDA, CUDA_REHEARSED):
        # fp32 adapters are what PEFT has on any base.
        for dtype, adapter_dtype in ((BF16, FP32), (FP16, FP16)):
            name = f"{short(dtype)} {size(shape)} {short(adapter_dtype)} adapter"
            found[name] = functools.partial(layer, machine, "cuda", dtype, shape, "nlora", adapter_dtype)
    for method in METHODS:
        shape = machine.pick(METHODS_SHAPE, (37, 72, 136, 16))
        found[f"{method} bf16 {size(shape)}"] = functools.partial(layer, machine, "cuda", BF16, shape, method, FP32)
    for each in machine.pick(GROUPS, GROUPS_REHEARSED):
        for dtype, adapter_dtype in ((BF16, FP32), (FP16, FP16)):
            found[f"group {short(dtype)} {each}"] = functools.partial(
                group, machine, "cuda", dtype, each, adapter_dtype
            )
    for shape, r in machine.pick([((4096, 4096), 128), ((1000, 776), 13), ((11008, 4096), 256)], [((75, 136), 3)]):
        for dtype in (BF16, FP32):
            found[f"nystrom {short(dtype)} {size(shape)} r{r}"] = functools.partial(
                initialise, machine, "cuda", dtype, shape, r
            )
    for r, k in CORES:
        found[f"core {r}x{k}"] = functools.partial(core, machine, "cuda", FP32, r, k)
    return found


def triton(machine) -> dict:
    found = {}
    for shape in machine.pick(TRITON, TRITON_REHEARSED):
        for dtype, adapter_dtype in machine.pick(((BF16, FP32), (FP16, FP16)), ((FP16, FP32),)):
            name = f"{short(dtype)} {size(shape)} {short(adapter_dtype)} adapter"
            found[name] = functools.partial(layer, machine, "triton", dtype, shape, "nlora", adapter_dtype)
    for shape in machine.pick(TRITON_ODD, [(7, 33, 17, 5)]):
        for strided in (False, True):
            name = f"fp32 {size(shape)}{' strided' * strided}"
            found[name] = functools.partial(layer, machine, "triton", FP32, shape, "nlora", None, strided)
    dtype, shape = machine.pick((BF16, METHODS_SHAPE), (FP16, (37, 40, 24, 8)))
    for method in METHODS:
        found[f"{method} {short(dtype)} {size(shape)}"] = functools.partial(
            layer, machine, "triton", dtype, shape, method, FP32
        )
    each = machine.pick(GROUPS, GROUPS_REHEARSED)[0]
    found[f"group {short(dtype)} {each}"] = functools.partial(group, machine, "triton", dtype, each, FP32)
    for single in (False, True):
        found[f"{'one launch' if single else 'two launches'} {size(shape)}"] = functools.partial(
            launches, machine, dtype, shape, single
        )
    return found


def quantised(machine) -> dict:
    found = {}
    for dtype in machine.pick((BF16, FP32), (FP16,)):
        for shape, nested in quantised_cases(dtype is FP32, machine.pick(QUANTISED, QUANTISED_REHEARSED)):
            name = f"{short(dtype)} {size(shape)}{' nested' * nested}"
            found[name] = functools.partial(coded, machine, dtype, shape, nested)
    return found


def quantised_cases(wide: bool, shapes) -> list[tuple[tuple, bool]]:
    """(shape, whether its scales are nested): by turns, for every kind compiles kernels of its own."""
    return [(shape, (i + wide) % 2 == 0) for i, shape in enumerate(shapes)]


def dropout(machine) -> dict:
    found = {}
    dtypes, shapes = machine.pick(((BF16, FP32), DROPPED), ((FP16,), DROPPED[1:2]))
    for dtype in dtypes:
        for shape in shapes:
            found[f"{short(dtype)} {size(shape)}"] = functools.partial(dropped, machine, dtype, shape)
    return found


def training(machine) -> dict:
    found = {}
    dtypes = machine.pick((BF16, FP32), (FP16,))
    shapes = machine.pick(INITIALISED, INITIALISED_REHEARSED)
    for dtype in dtypes:
        for shape, r in shapes:
            found[f"nystrom {short(dtype)} {size(shape)} r{r}"] = functools.partial(
                initialise, machine, "triton", dtype, shape, r
            )
        for r, k in CORES:
            found[f"core {short(dtype)} {r}x{k}"] = functools.partial(core, machine, "triton", dtype, r, k)
    found["rank allocator"] = functools.partial(allocate, machine)
    for form in ("paper", "reference"):
        found[f"penalty, {form}"] = functools.partial(penalise, machine, form)
    return found


def graphs(machine) -> dict:
    emulate(machine)
    found = {}
    for backend in ("cuda", "triton"):
        dtype, shapes = machine.pick((BF16, GRAPHS), (FP16, [(37, 72, 136, 16)]))
        for shape in shapes:
            found[f"{backend} {size(shape)}"] = functools.partial(graph, machine, backend, dtype, shape)
    found["triton dropout"] = functools.partial(dropout_graph, machine)
    return found


def sanitized(machine) -> dict:
    """Small, for a sanitizer slows a layer down a hundredfold."""
    emulate(machine)
    shape = machine.pick((260, 264, 520, 24), (37, 72, 136, 16))
    return {
        f"bf16 {size(shape)}": functools.partial(layer, machine, "cuda", BF16, shape, "nlora", FP32),
        "nystrom bf16 75x136 r3": functools.partial(initialise, machine, "cuda", BF16, (75, 136), 3),
    }


def emulate(machine) -> None:
    """In a rehearsal backend "cuda" runs on the emulator."""
    if machine.rehearsal:
        import pytest

        from python_tests.cuda import emulated

        emulated.install(pytest.MonkeyPatch())


def layer(machine, backend, dtype, shape, method, adapter_dtype, strided=False) -> None:
    p = testing.problem(
        *shape,
        dtype=dtype,
        adapter_dtype=adapter_dtype,
        core=method in ("nlora", "inttune"),
        bias=method == "nlora",
        # NOTE: the CUDA kernels read the weight where its rows are contiguous.
        strided=strided,
        device=machine.name,
    )
    tensors = {name: t for name in testing.TENSORS if (t := getattr(p, name)) is not None}
    ours, plain = nk.lora_linear, testing.plain_linear
    if method == "lora2":
        k, r = shape[3], shape[3] // 2 + 1
        inner = {"lora_u": (r, k), "lora_E": (r,), "lora_U": (k, r)}
        tensors |= {name: random(machine, *s, dtype=adapter_dtype or dtype) for name, s in inner.items()}
        tensors["lora_U"] /= r
        tensors["lora_v"], tensors["lora_V"] = tensors.pop("lora_A"), tensors.pop("lora_B")
        ours, plain = nk.lora2_linear, plain_lora2
    wrt = METHODS[method]
    base = functools.partial(plain, scaling=0.0)
    budget = testing.Budget(functools.partial(plain, scaling=p.scaling), base, tensors, p.dy, wrt)
    function = functools.partial(ours, scaling=p.scaling, backend=backend)
    first, second = (testing.outputs(function, tensors, p.dy, wrt) for _ in range(2))
    budget.check(first)
    same(first, second)


def group(machine, backend, dtype, of: Group, adapter_dtype) -> None:
    """Layers that share x, by one call."""
    tensors, dys = of.tensors(dtype, adapter_dtype, machine.name)
    function = functools.partial(groups.beside, functools.partial(groups.together, backend=backend))
    first, second = (testing.outputs(function, tensors, torch.cat(dys, -1)) for _ in range(2))
    groups.budget(tensors, dys).check(first)
    same(first, second)


def plain_lora2(x, weight, lora_u, lora_E, lora_U, lora_v, lora_V, scaling):
    core = (lora_U * lora_E) @ lora_u
    return testing.plain_linear(x, weight, lora_v, lora_V, core, scaling=scaling)


def coded(machine, dtype, shape, nested) -> None:
    """A weight of random codes is decoded as by the formula, and its layer is that of the decoded weight."""
    _, K, N, _ = shape
    p = testing.problem(*shape, dtype=dtype, device=machine.name)
    weight = testing.four_bits(N, K, dtype, nested=nested, device=machine.name)
    p.weight = weight.composed()
    assert torch.equal(nk.backends.TABLE["triton"].decode(weight), p.weight)
    tensors = {name: t for name in testing.TENSORS if (t := getattr(p, name)) is not None}
    plain, base = (functools.partial(testing.plain_linear, scaling=s) for s in (p.scaling, 0.0))
    wrt = [name for name in tensors if name != "weight"]
    budget = testing.Budget(plain, base, tensors, p.dy, wrt)
    others = {name: tensors[name] for name in wrt}
    function = functools.partial(nk.lora_linear, weight=weight, scaling=p.scaling, backend="triton")
    first, second = (testing.outputs(function, others, p.dy) for _ in range(2))
    budget.check(first)
    same(first, second)


def same(first: dict, second: dict) -> None:
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"not the same bits again: {', '.join(differing)}"


def launches(machine, dtype, shape, single) -> None:
    """y of the extended product in one launch or in two, against fp64."""
    from nlora_kernels.backends.triton import extended

    p = testing.problem(*shape, dtype=dtype, device=machine.name)
    *_, y = extended.product(
        p.x, p.weight, p.lora_A, p.lora_N, p.lora_B, p.bias, p.scaling, transposed=True, single=single
    )
    arguments = {n: getattr(p, n) for n in testing.TENSORS}
    within(y, functools.partial(testing.plain_linear, scaling=p.scaling), arguments)


def within(ours, plain, arguments: dict) -> None:
    """Twice the error of plain PyTorch in the same dtype, plus eps."""
    exact = plain(**{name: t.double() for name, t in arguments.items()})
    allowed = 2 * testing.error_norm(plain(**arguments), exact) + torch.finfo(ours.dtype).eps * exact.norm().item()
    off = testing.error_norm(ours, exact)
    assert off <= allowed, f"off by {off:.3g}, the budget is {allowed:.3g}"


def dropped(machine, dtype, shape, p=0.3) -> None:
    """Every result against fp64 with the mask as a tensor; the mask of the device is that of the CPU."""
    problem = testing.problem(*shape, dtype=dtype, adapter_dtype=FP32, device=machine.name)
    mask = Dropout(p, torch.tensor(2**40 + 7, device=machine.name))
    kept = mask.kept(*problem.x.shape)
    assert torch.equal(kept.cpu(), Dropout(p, mask.seed.cpu()).kept(*problem.x.shape))

    def masked(x, weight, lora_A, lora_B, lora_N, bias, scaling=problem.scaling):
        none = torch.zeros_like(weight)
        adapter = testing.plain_linear(x * kept * mask.scale, none, lora_A, lora_B, lora_N, scaling=scaling)
        return F.linear(x, weight, bias) + adapter

    tensors = {name: getattr(problem, name) for name in testing.TENSORS}
    budget = testing.Budget(masked, functools.partial(masked, scaling=0.0), tensors, problem.dy)
    first, second = (
        testing.results(problem, nk.lora_linear, backend="triton", dropout=p, seed=mask.seed) for _ in range(2)
    )
    budget.check(first)
    same(first, second)


def dropout_graph(machine) -> None:
    """Each replay of a captured call draws a mask of its own."""
    dtype, shape = machine.pick((BF16, DROPPED_GRAPH), (FP16, (7, 65, 31, 13)))
    p = testing.problem(*shape, dtype=dtype, device=machine.name)

    def step():
        return [nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, dropout=0.5, backend="triton")]

    replay, (y,) = machine.capture(step)
    results = []
    for _ in range(3):
        replay()
        results.append(y.clone())
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])


def graph(machine, backend, dtype, shape) -> None:
    """A captured step replayed on new inputs equals the same step run directly, bit by bit."""
    p, other = (testing.problem(*shape, dtype=dtype, device=machine.name, seed=seed) for seed in (0, 1))
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in testing.TENSORS}

    def step():
        y = nk.lora_linear(**leaves, scaling=p.scaling, backend=backend)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), p.dy)

    replay, outputs = machine.capture(step)
    with torch.no_grad():
        leaves["x"].copy_(other.x)
    expected = [t.clone() for t in step()]
    for _ in range(3):
        replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def core(machine, backend, dtype, r, k) -> None:
    """The core of LoRA² and its gradients."""
    parts = {"u": (r, k), "E": (r,), "U": (k, r)}
    tensors = {name: random(machine, *s, dtype=dtype) for name, s in parts.items()}
    mask = torch.arange(r, device=machine.name) % 3 != 1
    d_core = random(machine, k, k, dtype=dtype)

    def results(backend, **tensors):
        leaves = [t.detach().requires_grad_() for t in tensors.values()]
        made = nk.ops.autograd.core(*leaves, mask, backend)
        return [made, *torch.autograd.grad(made, leaves, d_core.to(made.dtype))]

    ours = results(backend, **tensors)
    for i, result in enumerate(ours):
        within(result, lambda i=i, **tensors: results("reference", **tensors)[i], tensors)


def initialise(machine, backend, dtype, shape, r) -> None:
    """Gather, norms, residual and solve."""
    nystrom = importlib.import_module(f"nlora_kernels.backends.{backend}.nystrom")
    weight = (random(machine, *shape, dtype=FP32) / shape[1] ** 0.5).to(dtype)
    for how in machine.pick(nk.init.SELECTIONS, ("leading", "norm")):
        rows, cols = nk.init.select(weight, r, how)
        A, N, B = nystrom.gather(weight, rows, cols)
        assert torch.equal(A, weight[rows]) and torch.equal(B, weight[:, cols]) and torch.equal(N, A[:, cols])
    if hasattr(nystrom, "squared_norms"):
        for dim, squares in zip((1, 0), nystrom.squared_norms(weight), strict=True):
            exact = weight.double().square().sum(dim)
            assert (squares - exact).abs().max() <= 1e-6 * exact.max()
    exact = weight.double() - 0.5 * B.double() @ N.double() @ A.double()
    plain = nk.init.subtract_(weight.clone(), A, N, B, 0.5)
    extra = machine.peak(lambda: nystrom.subtract_products([weight], [A], [N], [B], 0.5))
    bound = 2 * testing.error_norm(plain, exact) + torch.finfo(dtype).eps * exact.norm().item()
    assert testing.error_norm(weight, exact) <= bound
    # A fraction of the weight, or what A and B have in fp32, and a half more.
    assert extra <= max(weight.nbytes // 8, 8 * r * sum(shape)), f"subtract_ allocated {extra} B"
    if hasattr(nystrom, "solve_triangular"):
        R = torch.linalg.qr(random(machine, 2 * r, r, dtype=FP32)).R
        C = random(machine, r, 300, dtype=FP32)
        true = torch.linalg.solve_triangular(R.double(), C.double(), upper=True)
        assert testing.error_norm(nystrom.solve_triangular(R, C), true) <= 1e-4 * true.norm().item()


def lora2_model(machine, layers=8):
    linears = [torch.nn.Linear(64, 96, bias=False, device=machine.name) for _ in range(layers)]
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(*(nk.LoRA2Linear.from_linear(m, 8, 8, generator=generator) for m in linears))
    with torch.no_grad():
        for layer in model:
            layer.lora_E += 0.1
    return model


def allocate(machine) -> None:
    """Steps of the rank allocator by Triton make the averages and the masks that plain PyTorch makes."""
    model = lora2_model(machine)
    twin = copy.deepcopy(model)
    schedule = dict(target_rank=3, total_steps=8, t_init=1, t_final=3, delta_t=2)
    allocators = [RankAllocator(m, **schedule) for m in (model, twin)]
    for step in range(5):
        for backend, m, allocator in zip(("triton", "reference"), (model, twin), allocators, strict=True):
            generator = torch.Generator().manual_seed(step)
            for layer in m:
                for t in (layer.lora_E, layer.lora_u, layer.lora_U):
                    t.grad = torch.randn(t.shape, generator=generator).to(t)
            with named(backend):
                allocator.step()
        ours, theirs = allocators
        torch.testing.assert_close(ours.exp_avg, theirs.exp_avg, rtol=1e-6, atol=0)
        assert ours.ranks() == theirs.ranks()
        for layer, other in zip(model, twin, strict=True):
            assert torch.equal(layer.lora_E, other.lora_E) and torch.equal(layer.lora_mask, other.lora_mask)
    assert sum(allocators[0].ranks().values()) == 3 * len(model)


def penalise(machine, form) -> None:
    """The orthogonality penalty and its gradients by Triton against fp64."""
    model = lora2_model(machine)
    exact = copy.deepcopy(model).double()
    with named("triton"):
        ours = orthogonal_penalty(model, form)
        ours.backward()
    with named("reference"):
        true = orthogonal_penalty(exact, form)
        true.backward()
    assert abs(ours.item() - true.item()) <= 1e-6 * abs(true.item())
    for p, q in zip(model.parameters(), exact.parameters(), strict=True):
        if q.grad is not None:
            assert testing.error_norm(p.grad, q.grad) <= 1e-5 * q.grad.norm().item()


@contextlib.contextmanager
def named(backend):
    """Calls that name no backend take this one."""
    before = nk.backends.prefer(backend)
    try:
        yield
    finally:
        nk.backends.prefer(before)


def random(machine, *shape, dtype):
    generator = torch.Generator(machine.name).manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, device=machine.name).to(dtype)


def short(dtype: torch.dtype) -> str:
    return {BF16: "bf16", FP16: "fp16", FP32: "fp32"}[dtype]


def size(shape) -> str:
    return "x".join(map(str, shape))
