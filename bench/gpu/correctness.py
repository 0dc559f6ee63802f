"""Correctness on the GPU: every result against fp64, bitwise repeats, CUDA graphs, and initialisation."""

import functools
import importlib
import itertools
import sys

import record
import torch
import torch.nn.functional as F
from shapes import MODELS

import nlora_kernels as nk
from nlora_kernels import testing
from nlora_kernels.backends import Dropout

BACKENDS = ["triton", "cuda"]
# Those that take dropout.
DROPPING = ["triton"]
DROPPED = [(0, 64, 48, 8), (7, 65, 31, 13), (16, 4096, 4096, 64), (333, 1000, 520, 256), (2048, 4096, 4096, 16)]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# M, K, N, R: ragged, decode, the ranks' edges, and shapes of LLaMA-2-7B and BERT that take every form of launch.
SHAPES = [
    (0, 64, 48, 8),
    (1, 33, 17, 5),
    (7, 65, 31, 13),
    (1, 4096, 4096, 16),
    (16, 4096, 11008, 64),
    (100, 768, 768, 100),
    (100, 768, 768, 104),
    (333, 1000, 520, 256),
    (70, 512, 640, 300),
    (2048, 768, 768, 8),
    (2500, 768, 3072, 64),
    (4096, 4096, 4096, 16),
    (2048, 4096, 4096, 128),
]
# Every layer of these models; M is not a multiple of any tile.
LAYERS = {layer for model in ("Llama-2-7B", "Mistral-7B", "DeBERTa-v3-base") for layer in MODELS[model].values()}
LAYER_ROWS, LAYER_RANKS = 2100, (8, 64, 256)


def takes(backend, dtype, shape) -> bool:
    """Whether the support rule of a backend allows these sizes."""
    _, K, N, R = shape
    return backend != "cuda" or dtype != torch.float32 and R <= 256 and not any(size % 8 for size in (K, N, R))


def within_budget(backend, dtype, shape, adapter_dtype=None, core=True, strided=False) -> dict:
    p = testing.problem(
        *shape, dtype=dtype, adapter_dtype=adapter_dtype, core=core, bias=core, strided=strided, device="cuda"
    )
    first = testing.results(p, nk.lora_linear, backend=backend)
    testing.assert_within_budget(first, p)
    second = testing.results(p, nk.lora_linear, backend=backend)
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing, f"not bitwise repeatable: {', '.join(differing)}"
    return {}


def dropped(backend, dtype, shape, p=0.3) -> dict:
    """Every result against fp64 with the mask as a tensor; the mask of the device is that of the CPU."""
    problem = testing.problem(*shape, dtype=dtype, adapter_dtype=torch.float32, device="cuda")
    mask = Dropout(p, torch.tensor(2**40 + 7, device="cuda"))
    kept = mask.kept(*problem.x.shape)
    assert torch.equal(kept.cpu(), Dropout(p, mask.seed.cpu()).kept(*problem.x.shape))

    def masked(x, weight, lora_A, lora_B, lora_N, bias, scaling=problem.scaling):
        none = torch.zeros_like(weight)
        adapter = testing.plain_linear(x * kept * mask.scale, none, lora_A, lora_B, lora_N, scaling=scaling)
        return F.linear(x, weight, bias) + adapter

    tensors = {name: getattr(problem, name) for name in testing.TENSORS}
    budget = testing.Budget(masked, functools.partial(masked, scaling=0.0), tensors, problem.dy)
    first, second = (
        testing.results(problem, nk.lora_linear, backend=backend, dropout=p, seed=mask.seed) for _ in range(2)
    )
    budget.check(first)
    assert all(torch.equal(first[name], second[name]) for name in first), "not bitwise repeatable"
    return {}


def dropout_graph(backend) -> dict:
    """Each replay of a captured call draws a mask of its own."""
    p = testing.problem(256, 1024, 1024, 16, dtype=torch.bfloat16, device="cuda")

    def step():
        return nk.lora_linear(p.x, p.weight, p.lora_A, p.lora_B, dropout=0.5, backend=backend)

    step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = step()
    results = []
    for _ in range(3):
        captured.replay()
        results.append(y.clone())
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    return {}


def lora2(backend, dtype, r, k) -> dict:
    u, E, U = (torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in ((r, k), (r,), (k, r)))
    mask = torch.arange(r, device="cuda") % 3 != 1
    d_core = torch.randn(k, k, device="cuda", dtype=dtype)

    def results(u, E, U, d_core, backend):
        core = nk.ops._core(u, E, U, mask, backend)
        return core, *torch.autograd.grad(core, (u, E, U), d_core)

    wide = [t.detach().double().requires_grad_() for t in (u, E, U)]
    exact = results(*wide, d_core.double(), "reference")
    for ours, plain, true in zip(
        results(u, E, U, d_core, backend), results(u, E, U, d_core, "reference"), exact, strict=True
    ):
        bound = 2 * testing.error_norm(plain, true) + torch.finfo(dtype).eps * true.norm().item()
        assert testing.error_norm(ours, true) <= bound
    return {}


def graph(backend, dtype, shape) -> dict:
    """A captured step replayed on new inputs equals the same step run directly, bit by bit."""
    p, other = (testing.problem(*shape, dtype=dtype, device="cuda", seed=seed) for seed in (0, 1))
    leaves = {n: getattr(p, n).detach().requires_grad_() for n in testing.TENSORS}

    def step():
        y = nk.lora_linear(**leaves, scaling=p.scaling, backend=backend)
        return y.detach(), *torch.autograd.grad(y, list(leaves.values()), p.dy)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = step()
    with torch.no_grad():
        leaves["x"].copy_(other.x)
    expected = [t.clone() for t in step()]
    for _ in range(3):
        captured.replay()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    return {}


def initialise(backend, dtype, shape, r) -> dict:
    nystrom = importlib.import_module(f"nlora_kernels.backends.{backend}.nystrom")
    weight = torch.randn(shape, device="cuda").to(dtype) / shape[1] ** 0.5
    for how in nk.init.SELECTIONS:
        rows, cols = nk.init.select(weight, r, how)
        A, N, B = nystrom.gather(weight, rows, cols)
        assert torch.equal(A, weight[rows]) and torch.equal(B, weight[:, cols]) and torch.equal(N, A[:, cols])
    if hasattr(nystrom, "squared_norms"):
        for dim, squares in zip((1, 0), nystrom.squared_norms(weight), strict=True):
            exact = weight.double().square().sum(dim)
            assert (squares - exact).abs().max() <= 1e-6 * exact.max()
    exact = weight.double() - 0.5 * B.double() @ N.double() @ A.double()
    plain = nk.init.subtract_(weight.clone(), A, N, B, 0.5)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nystrom.subtract_([weight], [A], [N], [B], 0.5)
    extra = torch.cuda.max_memory_allocated() - before
    bound = 2 * testing.error_norm(plain, exact) + torch.finfo(dtype).eps * exact.norm().item()
    assert testing.error_norm(weight, exact) <= bound
    # A fraction of the weight, or what A and B have in fp32, and a half more.
    assert extra <= max(weight.nbytes // 8, 8 * r * sum(shape)), f"subtract_ allocated {extra} B"
    if hasattr(nystrom, "solve_triangular"):
        R = torch.linalg.qr(torch.randn(2 * r, r, device="cuda")).R
        C = torch.randn(r, 300, device="cuda")
        true = torch.linalg.solve_triangular(R.double(), C.double(), upper=True)
        assert testing.error_norm(nystrom.solve_triangular(R, C), true) <= 1e-4 * true.norm().item()
    return {"allocated": extra}


def cells():
    found = {}
    for backend, (name, dtype), shape in itertools.product(BACKENDS, DTYPES.items(), SHAPES):
        if not takes(backend, dtype, shape):
            continue
        prefix = f"{backend} {name} {'x'.join(map(str, shape))}"
        found[prefix] = lambda b=backend, d=dtype, s=shape: within_budget(b, d, s)
        # CUDA reads the weight where its rows are contiguous.
        strided = backend != "cuda"
        key = f"{prefix} noN{' strided' * strided}"
        found[key] = lambda b=backend, d=dtype, s=shape, t=strided: within_budget(b, d, s, None, False, t)
        if dtype != torch.float32 and shape[0]:
            found[f"{prefix} fp32 adapter"] = lambda b=backend, d=dtype, s=shape: within_budget(b, d, s, torch.float32)
    for backend, (K, N), r in itertools.product(BACKENDS, sorted(LAYERS), LAYER_RANKS):
        shape = LAYER_ROWS, K, N, r
        key = f"{backend} bf16 {'x'.join(map(str, shape))} fp32 adapter"
        found[key] = lambda b=backend, s=shape: within_budget(b, torch.bfloat16, s, torch.float32)
    for backend, (name, dtype) in itertools.product(BACKENDS, DTYPES.items()):
        for r, k in ((8, 1), (8, 8), (100, 40)):
            found[f"{backend} {name} lora2 {r}x{k}"] = lambda b=backend, d=dtype, r=r, k=k: lora2(b, d, r, k)
        for shape in ((16, 4096, 4096, 64), (2048, 4096, 4096, 64)):
            if not takes(backend, dtype, shape):
                continue
            key = f"{backend} {name} graph {'x'.join(map(str, shape))}"
            found[key] = lambda b=backend, d=dtype, s=shape: graph(b, d, s)
    for backend, (name, dtype), shape in itertools.product(DROPPING, DTYPES.items(), DROPPED):
        key = f"{backend} {name} dropout {'x'.join(map(str, shape))}"
        found[key] = lambda b=backend, d=dtype, s=shape: dropped(b, d, s)
    for backend in DROPPING:
        found[f"{backend} bf16 dropout graph"] = lambda b=backend: dropout_graph(b)
    for backend, (name, dtype) in itertools.product(BACKENDS, DTYPES.items()):
        for shape, r in (((4096, 4096), 128), ((1000, 776), 13), ((11008, 4096), 256)):
            key = f"{backend} {name} nystrom {'x'.join(map(str, shape))} r{r}"
            found[key] = lambda b=backend, d=dtype, s=shape, r=r: initialise(b, d, s, r)
    return found


if __name__ == "__main__":
    sys.exit(record.run("correctness", cells))
