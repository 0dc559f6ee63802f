"""What is timed beside "lean", and how; what is timed is checked.

An operation is (the calls of a backend, those of "lean"), which are made by turns, and the errors of their results.
"""

import contextlib
import copy
import functools
import math
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backends, init, ops, testing
from ...backends import Call, ExpertsCall, Needs
from ...backends.quantised import Coded
from ...layers import LoRA2Linear
from ...layers.branch import Branch
from ...lora2 import RankAllocator, orthogonal_penalty
from ...lora2.penalty import FORMS
from .cases import NORMS_AND_SOLVES, RESULTS_OF, Case, dtype_of
from .layers import P_DROPPED, SCALING, layer_of, mask
from .machine import Machine

# Milliseconds that a timed batch of calls takes about, and how many calls it has at the most.
BATCH_MS, LONGEST_BATCH = 2.0, 50
# Rows at either end of a large result that are held to fp64.
SAMPLED_ROWS = 32
# More steps than any timing has.
MANY = 10**6
ADAPTER = Needs(x=True, weight=False, lora_A=True, lora_B=True, lora_N=True, bias=False)
NORMS = math.inf, 2
# {(result, norm): (error, bound)}
Errors = dict[tuple[str, float], tuple[float, float]]


def _forward_calls(case, backend, dtype, machine, coded=False):
    p, weights = _large(case, dtype, machine, coded)
    adapter = p.lora_A, p.lora_B, p.lora_N

    def calls(by):
        read = _reader(by, backend, p.weight)
        return [lambda w=w: by.forward(Call(p.x, read(w), *adapter, scaling=SCALING)) for w in weights]

    ours, lean = calls(backend), calls(backends.TABLE["lean"])
    rows = _sampled(p.x)
    wide = [t.double() for t in (p.x[rows], p.weight, *adapter)]
    exact = testing.plain_linear(*wide, scaling=SCALING)
    return (ours, lean), _against(p.x.dtype, {"y": (ours[0]()[0][rows], lean[0]()[0][rows], exact)})


def _backward_calls(case, backend, dtype, machine, coded=False):
    p, weights = _large(case, dtype, machine, coded)
    adapter = p.lora_A, p.lora_B, p.lora_N
    _, T = backends.TABLE["lean"].forward(Call(p.x, p.weight, *adapter, scaling=SCALING))

    def calls(by):
        read = _reader(by, backend, p.weight)
        return [
            lambda w=w: by.backward(Call(p.x, read(w), *adapter, scaling=SCALING), p.dy, T, ADAPTER) for w in weights
        ]

    ours, lean = calls(backend), calls(backends.TABLE["lean"])
    rows = _sampled(p.x)
    x, dy, weight, A, B, N = (t.double() for t in (p.x, p.dy, p.weight, *adapter))
    G, exact_T = dy @ B, x @ A.T
    H = SCALING * G @ N
    exact = {
        "x": dy[rows] @ weight + H[rows] @ A,
        "lora_A": H.T @ x,
        "lora_B": SCALING * dy.T @ (exact_T @ N.T),
        "lora_N": SCALING * G.T @ exact_T,
    }
    got, plain = ours[0](), lean[0]()
    compared = {
        f"d{name}": tuple(getattr(g, name)[rows] if name == "x" else getattr(g, name) for g in (got, plain)) + (true,)
        for name, true in exact.items()
    }
    return (ours, lean), _against(p.x.dtype, compared)


def _reader(by, backend, like: Tensor) -> Callable:
    """What makes of a weight that which a backend gets: codes are decoded as a whole for another than `backend`."""
    memory = torch.empty_like(like)
    return lambda w: w if by is backend or isinstance(w, Tensor) else backend.decode(w, memory)


def _decode_calls(case, backend, dtype, machine):
    """A weight in four bits as a whole, by the backend's kernel and by PyTorch's operations; the same bits."""
    _, K, N, _ = case.shape
    codes = testing.four_bits(N, K, dtype_of(dtype), nested=True, device=machine.device)
    out = torch.empty(N, K, dtype=codes.dtype, device=machine.device)
    errors = _equal({"weight": (backend.decode(codes, out.fill_(math.nan)), codes.composed())})
    plain = backends.REFERENCE.decode
    return ([lambda: backend.decode(codes, out)], [lambda: plain(codes, out)]), errors


def _dropout_calls(case, backend, dtype, machine):
    """A step of a layer with the mask inside the operation, and with PyTorch's before the adapter."""
    p, _ = _large(case, dtype, machine)
    trained = {name: getattr(p, name).requires_grad_() for name in ADAPTER._fields if getattr(ADAPTER, name)}

    def step(y):
        return torch.autograd.grad(y, list(trained.values()), p.dy)

    def inside():
        options = {"scaling": SCALING, "dropout": P_DROPPED, "backend": backend.name}
        return step(ops.lora_linear(weight=p.weight, **trained, **options))

    def outside():
        branch = Branch(p.lora_A, p.lora_N, p.lora_B, SCALING, P_DROPPED)(p.x)
        return step(F.linear(p.x, p.weight) + branch.to(p.x.dtype))

    return ([inside], [outside]), {}


def _experts_calls(case, backend, dtype, machine):
    """A step of a layer of experts."""
    layer = layer_of(case, backend.name, dtype, machine.device)
    offsets = layer.ours.keywords["offsets"]
    names = ("x", "weight", "lora_A", "lora_B", "lora_N")
    operands = [layer.dy, *(layer.tensors[name] for name in names)]

    def results(by, dy, x, *stacks):
        call = ExpertsCall(x, offsets, *stacks, None, SCALING)
        y, T = by.forward_experts(call)
        grads = by.backward_experts(call, dy, T, ADAPTER)
        return y, grads.x, grads.lora_A, grads.lora_B, grads.lora_N

    ours, lean = (functools.partial(results, by, *operands) for by in (backend, backends.TABLE["lean"]))
    compared = zip(ours(), lean(), results(backends.REFERENCE, *(t.double() for t in operands)), strict=True)
    return ([ours], [lean]), _against(layer.dy.dtype, dict(zip(RESULTS_OF["experts"], compared, strict=True)))


def _initialisation_calls(case, backend, dtype, machine):
    """W − s·B·N·A in place; and what else initialises an adapter on the device, checked along with it."""
    _, K, N, r = case.shape
    generator = torch.Generator(machine.device).manual_seed(r)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=machine.device)

    weight = normal(N, K).mul_(K**-0.5).to(dtype_of(dtype))
    kernels = backend.initialisation(weight, r)
    rows, cols = (torch.randperm(size, generator=generator, device=machine.device)[:r] for size in (N, K))
    A, core, B = kernels.gather(weight, rows, cols)
    right = {"A": (A, weight[rows]), "N": (core, weight[rows][:, cols]), "B": (B, weight[:, cols])}
    exact = weight.double() - SCALING * B.double() @ core.double() @ A.double()
    ours, lean = weight.clone(), weight.clone()
    kernels.subtract_products([ours], [A], [core], [B], SCALING)
    init.subtract_(lean, A, core, B, SCALING)
    compared = {"weight": (ours, lean, exact)}
    if backend.name in NORMS_AND_SOLVES:
        triangle, many = torch.linalg.qr(normal(2 * r, r)).R, normal(r, 300)
        solution = torch.linalg.solve_triangular(triangle.double(), many.double(), upper=True)
        norms = [[w.square().sum(dim) for dim in (1, 0)] for w in (weight.float(), weight.double())]
        for name, got, plain, true in zip(("rows", "cols"), kernels.squared_norms(weight), *norms, strict=True):
            compared[name] = (got, plain.to(got.dtype), true)
        plain = torch.linalg.solve_triangular(triangle, many, upper=True)
        compared["solution"] = (kernels.solve_triangular(triangle, many), plain, solution)

    def subtract():
        kernels.subtract_products([ours], [A], [core], [B], 1e-4)

    errors = _equal(right) | _against(torch.float32, compared)
    return ([subtract], [lambda: init.subtract_(lean, A, core, B, 1e-4)]), errors


def _core_calls(case, backend, dtype, machine):
    r, k = case.shape[:2]
    generator = torch.Generator(machine.device).manual_seed(r)
    u, E, U, d_core = (
        torch.randn(shape, generator=generator, device=machine.device).to(dtype_of(case.adapter))
        for shape in ((r, k), (r,), (k, r), (k, k))
    )
    kept = mask(u, r)

    def results(by, *tensors):
        u, E, U, d_core = tensors
        return by.lora2_core(u, E, U, kept), *by.lora2_core_backward(d_core, u, E, U, kept)

    tensors = u, E, U, d_core
    exact = results(backends.REFERENCE, *(t.double() for t in tensors))
    ours, lean = (functools.partial(results, by, *tensors) for by in (backend, backends.TABLE["lean"]))
    names = ("core", "du", "dE", "dU")
    return ([ours], [lean]), _against(u.dtype, dict(zip(names, zip(ours(), lean(), exact, strict=True), strict=True)))


def _training_calls(case, backend, dtype, machine):
    """The orthogonality penalties of a model with their gradients, and a step of its rank allocator; every other one
    masks."""
    r, k, count, features = case.shape
    own = dtype_of(case.adapter)
    torch.manual_seed(r)
    base = torch.nn.Linear(features, features, bias=False, device=machine.device, dtype=own)
    model = torch.nn.ModuleList(LoRA2Linear.from_linear(base, r, k) for _ in range(count)).to(own)

    def scored(layers):
        return [t for layer in layers for t in (layer.lora_E, layer.lora_u, layer.lora_U)]

    for t in scored(model):
        t.data += 0.3 * torch.randn_like(t)
    gradients = [torch.randn_like(t) for t in scored(model)]

    def stepped(by: str, dtype: torch.dtype) -> Callable:
        trained = copy.deepcopy(model).to(dtype)
        for t, grad in zip(scored(trained), gradients, strict=True):
            t.grad = grad.to(dtype)
        allocator = RankAllocator(trained, target_rank=1, total_steps=2 * MANY, t_init=0, t_final=0, delta_t=2)
        # Half way, where much is masked.
        allocator.t = MANY
        vectors = [getattr(layer, f"lora_{name}") for name in ("v", "u", "V", "U") for layer in trained]

        def step():
            with _chosen(by):
                penalty = torch.stack([orthogonal_penalty(trained, form) for form in FORMS])
                grads = torch.autograd.grad(penalty.sum(), vectors)
                allocator.step()
            parts = (torch.cat([t.flatten() for t in grads[i : i + count]]) for i in range(0, 4 * count, count))
            E = torch.cat([layer.lora_E.detach() for layer in trained])
            return penalty.detach(), *parts, allocator.exp_avg, allocator.exp_unc, E

        return step

    ours, lean, exact = stepped(backend.name, own), stepped("lean", own), stepped("lean", torch.float64)
    for _ in range(2):
        compared = zip(ours(), lean(), exact(), strict=True)
    return ([ours], [lean]), _against(own, dict(zip(RESULTS_OF["lora2_training"], compared, strict=True)))


@contextlib.contextmanager
def _chosen(backend: str):
    """Has a backend chosen where a call names none, as training does."""
    before = backends.prefer(backend)
    try:
        yield
    finally:
        backends.prefer(before)


CALLS = {
    "forward": _forward_calls,
    "backward": _backward_calls,
    "coded_forward": functools.partial(_forward_calls, coded=True),
    "coded_backward": functools.partial(_backward_calls, coded=True),
    "decode": _decode_calls,
    "dropout": _dropout_calls,
    "experts": _experts_calls,
    "initialisation": _initialisation_calls,
    "lora2_core": _core_calls,
    "lora2_training": _training_calls,
}


def _large(
    case: Case, dtype: str, machine: Machine, coded: bool = False
) -> tuple[testing.Problem, list[Tensor | Coded]]:
    """A layer, and its weight, or the codes of it, as often as the cache cannot hold it: in a model other layers come
    between two calls."""
    of_x, of_adapter = dtype_of(dtype), dtype_of(case.adapter)
    p = testing.problem(*case.shape, dtype=of_x, adapter_dtype=of_adapter, bias=False, device=machine.device)
    weight, stored = p.weight, p.weight
    if coded:
        _, K, N, _ = case.shape
        weight = testing.four_bits(N, K, of_x, nested=True, device=machine.device)
        p.weight, stored = weight.composed(), weight.codes
    copies = min(64, 3 * machine.cache_bytes // stored.nbytes)
    return p, [weight, *(copy.deepcopy(weight) for _ in range(copies))]


def _sampled(x: Tensor) -> Tensor:
    """Rows of x, at both of its ends."""
    rows = torch.arange(len(x), device=x.device)
    return torch.cat([rows[:SAMPLED_ROWS], rows[SAMPLED_ROWS:][-SAMPLED_ROWS:]])


def _equal(results: dict[str, tuple[Tensor, Tensor]]) -> Errors:
    """Of (ours, the exact one) that must be equal to the bit: how many elements differ, of none that may."""
    return {
        (name, norm): (float((ours != exact).sum()), 0.0) for name, (ours, exact) in results.items() for norm in NORMS
    }


def _against(dtype: torch.dtype, results: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Errors:
    """{(result, norm): (error, bound)} of (ours, that of "lean", the exact one): twice lean's, plus eps."""
    found: Errors = {}
    for name, (ours, lean, exact) in results.items():
        assert ours.dtype == lean.dtype and ours.shape == lean.shape, f"{name} is {ours.dtype} {tuple(ours.shape)}"
        eps = max(torch.finfo(dtype).eps, torch.finfo(ours.dtype).eps)
        for norm in NORMS:
            size = testing.error_norm(exact, torch.zeros_like(exact), norm)
            found[name, norm] = (
                testing.error_norm(ours, exact, norm),
                2 * testing.error_norm(lean, exact, norm) + eps * size,
            )
    return found


def alternate(machine: Machine, ours: list[Callable], lean: list[Callable], rounds: int) -> dict[str, float]:
    """Microseconds of a call, by turns: the median, and such a time of lean's that their ratio is that of a round."""
    machine.milliseconds([*ours, *lean])
    once = machine.milliseconds([ours[0], lean[0]]) / 2
    count = min(LONGEST_BATCH, max(1, round(BATCH_MS / max(once, 1e-3))))
    batches = [[calls[i % len(calls)] for i in range(count)] for calls in (ours, lean)]
    pairs = [[machine.milliseconds(batch) for batch in batches] for _ in range(rounds + 1)][1:]
    us = 1000 * statistics.median(a for a, _ in pairs) / count
    return {"us": us, "lean_us": us / statistics.median(a / b for a, b in pairs)}
