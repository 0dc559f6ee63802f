"""What runs on the device, in a process that may hang or crash: `start(TASK, REPORT)`.

TASK is JSON: {"nonce", "gpu", "rehearse"} asks what the machine is; with "backend" and "dtype" the cases are run; with
"compile", pairs of those, and "slice" [i, n] every n-th of their cases is, once and without a look at the results, so
that its kernels are compiled. REPORT gets one line of JSON at a time: the nonce and the machine, then each case when it
is done. What the figures mean is the parent's to decide.
"""

import base64
import contextlib
import copy
import functools
import json
import math
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import backends, init, ops, testing
from ...backends import Call, Dropout, ExpertsCall, Needs, verified
from ...backends.quantised import Coded
from ...layers import LoRA2Linear
from ...layers.branch import Branch
from ...lora2 import RankAllocator, orthogonal_penalty
from ...lora2.penalty import FORMS
from .cases import EXPERTS, METHODS, NORMS_AND_SOLVES, REAL, REHEARSED, RESULTS_OF, Case, Sizes, cases_of, dtype_of

SCALING, P_DROPPED, SEED = 0.7, 0.3, 2**40 + 7
# Milliseconds that a timed batch of calls takes about, and how many calls it has at the most.
BATCH_MS, LONGEST_BATCH = 2.0, 50
# Rows at either end of a large result that are held to fp64.
SAMPLED_ROWS = 32
# Of a captured graph.
REPLAYS = 3
# More steps than any timing has.
MANY = 10**6
ADAPTER = Needs(x=True, weight=False, lora_A=True, lora_B=True, lora_N=True, bias=False)


class Gpu:
    """A device, and what only it does: work beside other work, graphs, and time."""

    def __init__(self, index: int):
        torch.cuda.set_device(index)
        self.device = torch.device("cuda", index)
        self.cache_bytes = torch.cuda.get_device_properties(index).L2_cache_size
        self.busy = torch.cuda.Stream()
        self.noise = [torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for n in (512, 2048, 3072)]

    def identity(self) -> dict:
        return verified.identity(self.device.index)

    def load(self, turn: int) -> None:
        """Keeps another stream busy for a while, with products of varying size."""
        with torch.cuda.stream(self.busy):
            self.noise[turn % 3] @ self.noise[turn % 3]

    def capture(self, step: Callable, prepare: Callable = tuple) -> tuple[Callable, Sequence[Tensor]]:
        """A replay of `step`, which gets what `prepare` returns, and the tensors that it writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # NOTE: a backward runs on the stream of its forward, which has to be that of the capture.
            arguments = prepare()
            for _ in range(3):
                step(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = step(*arguments)
        return graph.replay, outputs

    def milliseconds(self, calls: Sequence[Callable]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


class Host:
    """The CPU in the place of a GPU, for rehearsal."""

    def __init__(self):
        self.device = torch.device("cpu")
        self.cache_bytes = 0

    def identity(self) -> dict:
        return verified.identity_of(SimpleNamespace(name="rehearsal", major=0, minor=0, multi_processor_count=0))

    def load(self, turn: int) -> None:
        pass

    def capture(self, step: Callable, prepare: Callable = tuple) -> tuple[Callable, Sequence[Tensor]]:
        arguments = prepare()
        outputs = [t.detach().clone() for t in step(*arguments)]

        def replay():
            for old, new in zip(outputs, step(*arguments), strict=True):
                old.copy_(new.detach())

        return replay, outputs

    def milliseconds(self, calls: Sequence[Callable]) -> float:
        begun = time.perf_counter()
        for call in calls:
            call()
        return 1000 * (time.perf_counter() - begun)


class Layer(NamedTuple):
    """One call of a method: tensors by name, which of them train, the gradient that comes back; and by whom."""

    tensors: dict[str, Tensor]
    trains: tuple[str, ...]
    dy: Tensor
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    # The base layer alone.
    base: Callable[..., Tensor]

    def results(self) -> dict[str, Tensor]:
        return testing.outputs(self.ours, self.tensors, self.dy, self.trains)

    def budget(self) -> testing.Budget:
        return testing.Budget(self.plain, self.base, self.tensors, self.dy, self.trains)


def layer_of(case: Case, backend: str, dtype: str, device: torch.device, seed: int = 0) -> Layer:
    """The call of a case, with data of a seed; the same in the parent where the device is the CPU."""
    method, (M, K, N, R) = case.detail, case.shape
    of_x, of_adapter = dtype_of(dtype), dtype_of(case.adapter)
    with_bias = method in ("slora", "dropout")
    p = testing.problem(
        M,
        K,
        N,
        R,
        dtype=of_x,
        adapter_dtype=of_adapter,
        core=method != "lora",
        bias=with_bias,
        device=device,
        seed=seed,
    )
    tensors = {name: t for name in testing.TENSORS if (t := getattr(p, name)) is not None}
    options = {"scaling": SCALING, "backend": backend}
    if method in ("nlora", "inttune"):
        # As `init.nystrom` takes them from W.
        parts = {"lora_A": p.weight[:R], "lora_N": p.weight[:R, :R], "lora_B": p.weight[:, :R]}
        tensors |= {name: part.to(of_adapter).contiguous() for name, part in parts.items()}
    if method == "lora2":
        return _lora2_layer(tensors, p.dy, R, options)
    if method == "experts":
        return _mixture(tensors, p.dy, options)
    if method == "group":
        return _group(tensors, p.dy, options)
    if method == "four_bits":
        return _four_bits(tensors, p.dy, options)
    plain = testing.plain_linear
    if method == "dropout":
        drop = Dropout(P_DROPPED, torch.tensor(SEED, device=device))
        plain, options = functools.partial(_dropped, drop), options | {"dropout": P_DROPPED, "seed": SEED}
    return Layer(
        tensors,
        METHODS[method],
        p.dy,
        functools.partial(ops.lora_linear, **options),
        functools.partial(plain, scaling=SCALING),
        functools.partial(plain, scaling=0.0),
    )


def _dropped(drop: Dropout, x, weight, lora_A, lora_B, lora_N, bias, scaling) -> Tensor:
    none = torch.zeros_like(weight)
    return F.linear(x, weight, bias) + testing.plain_linear(drop(x), none, lora_A, lora_B, lora_N, scaling=scaling)


def _lora2_layer(tensors: dict[str, Tensor], dy: Tensor, k: int, options: dict) -> Layer:
    v, V = tensors["lora_A"], tensors["lora_B"]
    r = k // 2 + 1
    generator = torch.Generator(v.device).manual_seed(k)
    u, E, U = (
        torch.randn(shape, generator=generator, device=v.device).mul_(std).to(v.dtype)
        for shape, std in (((r, k), k**-0.5), ((r,), 1.0), ((k, r), r**-0.5))
    )
    mask = torch.arange(r, device=v.device) % 3 != 1

    def plain(x, weight, lora_v, lora_u, lora_E, lora_U, lora_V, scaling):
        core = (lora_U * (lora_E * mask)) @ lora_u
        return testing.plain_linear(x, weight, lora_v, lora_V, core, scaling=scaling)

    parts = {"lora_v": v, "lora_u": u, "lora_E": E, "lora_U": U, "lora_V": V}
    return Layer(
        {"x": tensors["x"], "weight": tensors["weight"], **parts},
        METHODS["lora2"],
        dy,
        functools.partial(ops.lora2_linear, mask=mask, **options),
        functools.partial(plain, scaling=options["scaling"]),
        functools.partial(plain, scaling=0.0),
    )


def _rolled(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The matrices of so many layers, which have those of one in another order of rows each."""
    return {name: torch.stack([t.roll(i, 0) for i in range(count)]) for name, t in tensors.items() if name != "x"}


def _group(tensors: dict[str, Tensor], dy: Tensor, options: dict) -> Layer:
    """Two layers that share x, their outputs side by side."""

    def ours(x, weight, lora_A, lora_B, lora_N):
        adapters = list(zip(lora_A.unbind(), lora_B.unbind(), lora_N.unbind(), strict=True))
        return torch.cat(ops.lora_group_linear(x, list(weight.unbind()), adapters, **options), 1)

    def plain(x, weight, lora_A, lora_B, lora_N, scaling):
        layers = zip(weight, lora_A, lora_B, lora_N, strict=True)
        return torch.cat([testing.plain_linear(x, *layer, scaling=scaling) for layer in layers], 1)

    return Layer(
        {"x": tensors["x"], **_rolled(tensors, 2)},
        METHODS["group"],
        torch.cat([dy, dy.roll(1, 0)], 1),
        ours,
        functools.partial(plain, scaling=options["scaling"]),
        functools.partial(plain, scaling=0.0),
    )


def _four_bits(tensors: dict[str, Tensor], dy: Tensor, options: dict) -> Layer:
    """A layer whose weight is codes, with nested scales where the rows are odd in number."""
    (M, K), N, dtype = tensors["x"].shape, dy.shape[1], dy.dtype
    codes = testing.four_bits(N, K, dtype, nested=M % 2 == 1, device=dy.device)
    plain = testing.plain_linear

    def ours(x, weight, lora_A, lora_B, lora_N):
        # What the codes stand for is the others' weight.
        return ops.lora_linear(x, codes, lora_A, lora_B, lora_N, **options)

    return Layer(
        tensors | {"weight": codes.composed()},
        METHODS["four_bits"],
        dy,
        ours,
        functools.partial(plain, scaling=options["scaling"]),
        functools.partial(plain, scaling=0.0),
    )


def _mixture(tensors: dict[str, Tensor], dy: Tensor, options: dict) -> Layer:
    """A layer of experts."""
    M = dy.shape[0]
    # One without rows, and rows without one.
    ends = [M // 2, M // 2, M - M // 4, M - M // 8]
    stacks = _rolled(tensors, EXPERTS)

    def plain(x, weight, lora_A, lora_B, lora_N, scaling):
        parts, first = [], 0
        for e, last in enumerate(ends):
            matrices = weight[e], lora_A[e], lora_B[e], lora_N[e]
            parts.append(testing.plain_linear(x[first:last], *matrices, scaling=scaling))
            first = last
        return torch.cat([*parts, x.new_zeros(M - first, weight.shape[1])])

    offsets = torch.tensor(ends, dtype=torch.int32, device=dy.device)
    return Layer(
        {"x": tensors["x"], **stacks},
        METHODS["experts"],
        dy,
        functools.partial(ops.lora_grouped_linear, offsets=offsets, **options),
        functools.partial(plain, scaling=options["scaling"]),
        functools.partial(plain, scaling=0.0),
    )


def witness(case: Case, backend: str, dtype: str, machine: Gpu | Host, sizes: Sizes, seed: int) -> dict:
    """The results of a small layer as they are, for the parent to compare: data of a seed that nobody knew before."""
    layer = layer_of(case, backend, dtype, torch.device("cpu"), seed)
    moved = {name: t.to(machine.device) for name, t in layer.tensors.items()}
    layer = layer._replace(tensors=moved, dy=layer.dy.to(machine.device))
    return {"outputs": {name: encoded(t) for name, t in layer.results().items()}}


def budget(case: Case, backend: str, dtype: str, machine: Gpu | Host, sizes: Sizes, seed: int) -> dict:
    layer = layer_of(case, backend, dtype, machine.device)
    return {"errors": _by_name(layer.budget().errors(layer.results()))}


def repeats(case: Case, backend: str, dtype: str, machine: Gpu | Host, sizes: Sizes, seed: int) -> dict:
    """Forward and backward again and again beside a busy stream: how many elements are not those of the first time."""
    layer = layer_of(case, backend, dtype, machine.device)
    expected = list(layer.results().values())
    differing = torch.zeros((), dtype=torch.int64, device=machine.device)
    for turn in range(sizes.runs):
        machine.load(turn)
        for result, first in zip(layer.results().values(), expected, strict=True):
            differing += (result != first).sum()
    return {"runs": sizes.runs, "differing": differing.item()}


def replay(case: Case, backend: str, dtype: str, machine: Gpu | Host, sizes: Sizes, seed: int) -> dict:
    """A captured step replayed on new inputs against the same step run directly."""
    layer = layer_of(case, backend, dtype, machine.device)
    again, outputs = machine.capture(lambda: list(layer.results().values()))
    differing = torch.zeros((), dtype=torch.int64, device=machine.device)
    for _ in range(REPLAYS):
        layer.tensors["x"].copy_(torch.randn_like(layer.tensors["x"], dtype=torch.float32))
        again()
        for replayed, direct in zip(outputs, layer.results().values(), strict=True):
            differing += (replayed != direct).sum()
    return {"runs": REPLAYS, "differing": differing.item()}


def timed(case: Case, backend: str, dtype: str, machine: Gpu | Host, sizes: Sizes, seed: int) -> dict:
    """The time of a call and that of "lean", by turns; and the errors of what was timed."""
    (ours, lean), errors = CALLS[case.detail](case, backends.TABLE[backend], backend, dtype, machine)
    return _alternate(machine, ours, lean, sizes.rounds) | {"errors": _by_name(errors)}


def _forward_calls(case, module, backend, dtype, machine, coded=False):
    p, weights = _large(case, dtype, machine, coded)
    adapter = p.lora_A, p.lora_B, p.lora_N

    def calls(by):
        read = _reader(by, module, p.weight)
        return [lambda w=w: by.forward(Call(p.x, read(w), *adapter, scaling=SCALING)) for w in weights]

    ours, lean = calls(module), calls(backends.TABLE["lean"])
    rows = _sampled(p.x)
    wide = [t.double() for t in (p.x[rows], p.weight, *adapter)]
    exact = testing.plain_linear(*wide, scaling=SCALING)
    return (ours, lean), _against(p.x.dtype, {"y": (ours[0]()[0][rows], lean[0]()[0][rows], exact)})


def _backward_calls(case, module, backend, dtype, machine, coded=False):
    p, weights = _large(case, dtype, machine, coded)
    adapter = p.lora_A, p.lora_B, p.lora_N
    _, T = backends.TABLE["lean"].forward(Call(p.x, p.weight, *adapter, scaling=SCALING))

    def calls(by):
        read = _reader(by, module, p.weight)
        return [
            lambda w=w: by.backward(Call(p.x, read(w), *adapter, scaling=SCALING), p.dy, T, ADAPTER) for w in weights
        ]

    ours, lean = calls(module), calls(backends.TABLE["lean"])
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


def _reader(by, module, like: Tensor) -> Callable:
    """What makes of a weight that which a backend gets: codes are decoded as a whole for another than `module`."""
    memory = torch.empty_like(like)
    return lambda w: w if by is module or isinstance(w, Tensor) else module.decode(w, memory)


def _decode_calls(case, module, backend, dtype, machine):
    """A weight in four bits as a whole, by the backend's kernel and by PyTorch's operations; the same bits."""
    _, K, N, _ = case.shape
    codes = testing.four_bits(N, K, dtype_of(dtype), nested=True, device=machine.device)
    out = torch.empty(N, K, dtype=codes.dtype, device=machine.device)
    differing = float((module.decode(codes, out.fill_(math.nan)) != codes.composed()).sum())
    plain = backends.REFERENCE.decode
    errors = {("weight", norm): (differing, 0.0) for norm in (math.inf, 2)}
    return ([lambda: module.decode(codes, out)], [lambda: plain(codes, out)]), errors


def _dropout_calls(case, module, backend, dtype, machine):
    """A step of a layer with the mask inside the operation, and with PyTorch's before the adapter."""
    p, _ = _large(case, dtype, machine)
    trained = {name: getattr(p, name).requires_grad_() for name in ADAPTER._fields if getattr(ADAPTER, name)}

    def step(y):
        return torch.autograd.grad(y, list(trained.values()), p.dy)

    def inside():
        return step(ops.lora_linear(weight=p.weight, **trained, scaling=SCALING, dropout=P_DROPPED, backend=backend))

    def outside():
        branch = Branch(p.lora_A, p.lora_N, p.lora_B, SCALING, P_DROPPED)(p.x)
        return step(F.linear(p.x, p.weight) + branch.to(p.x.dtype))

    return ([inside], [outside]), {}


def _experts_calls(case, module, backend, dtype, machine):
    """A step of a layer of experts."""
    layer = layer_of(case, backend, dtype, machine.device)
    offsets = layer.ours.keywords["offsets"]
    names = ("x", "weight", "lora_A", "lora_B", "lora_N")
    operands = [layer.dy, *(layer.tensors[name] for name in names)]

    def results(by, dy, x, *stacks):
        call = ExpertsCall(x, offsets, *stacks, None, SCALING)
        y, T = by.forward_experts(call)
        grads = by.backward_experts(call, dy, T, ADAPTER)
        return y, grads.x, grads.lora_A, grads.lora_B, grads.lora_N

    ours, lean = (functools.partial(results, by, *operands) for by in (module, backends.TABLE["lean"]))
    compared = zip(ours(), lean(), results(backends.REFERENCE, *(t.double() for t in operands)), strict=True)
    return ([ours], [lean]), _against(layer.dy.dtype, dict(zip(RESULTS_OF["experts"], compared, strict=True)))


def _initialisation_calls(case, module, backend, dtype, machine):
    """W − s·B·N·A in place; and what else initialises an adapter on the device, checked along with it."""
    _, K, N, r = case.shape
    generator = torch.Generator(machine.device).manual_seed(r)

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=machine.device)

    weight = normal(N, K).mul_(K**-0.5).to(dtype_of(dtype))
    kernels = module.initialisation(weight, r)
    rows, cols = (torch.randperm(size, generator=generator, device=machine.device)[:r] for size in (N, K))
    A, core, B = kernels.gather(weight, rows, cols)
    right = {"A": (A, weight[rows]), "N": (core, weight[rows][:, cols]), "B": (B, weight[:, cols])}
    errors = {
        (name, norm): (float((got != true).sum()), 0.0) for name, (got, true) in right.items() for norm in (math.inf, 2)
    }
    exact = weight.double() - SCALING * B.double() @ core.double() @ A.double()
    ours, lean = weight.clone(), weight.clone()
    kernels.subtract_products([ours], [A], [core], [B], SCALING)
    init.subtract_(lean, A, core, B, SCALING)
    compared = {"weight": (ours, lean, exact)}
    if backend in NORMS_AND_SOLVES:
        triangle, many = torch.linalg.qr(normal(2 * r, r)).R, normal(r, 300)
        solution = torch.linalg.solve_triangular(triangle.double(), many.double(), upper=True)
        norms = [[w.square().sum(dim) for dim in (1, 0)] for w in (weight.float(), weight.double())]
        for name, got, plain, true in zip(("rows", "cols"), kernels.squared_norms(weight), *norms, strict=True):
            compared[name] = (got, plain.to(got.dtype), true)
        plain = torch.linalg.solve_triangular(triangle, many, upper=True)
        compared["solution"] = (kernels.solve_triangular(triangle, many), plain, solution)

    def subtract():
        kernels.subtract_products([ours], [A], [core], [B], 1e-4)

    return ([subtract], [lambda: init.subtract_(lean, A, core, B, 1e-4)]), errors | _against(torch.float32, compared)


def _core_calls(case, module, backend, dtype, machine):
    r, k = case.shape[:2]
    generator = torch.Generator(machine.device).manual_seed(r)
    u, E, U, d_core = (
        torch.randn(shape, generator=generator, device=machine.device).to(dtype_of(case.adapter))
        for shape in ((r, k), (r,), (k, r), (k, k))
    )
    mask = torch.arange(r, device=machine.device) % 3 != 1

    def results(by, *tensors):
        u, E, U, d_core = tensors
        return by.lora2_core(u, E, U, mask), *by.lora2_core_backward(d_core, u, E, U, mask)

    tensors = u, E, U, d_core
    exact = results(backends.REFERENCE, *(t.double() for t in tensors))
    ours, lean = (functools.partial(results, by, *tensors) for by in (module, backends.TABLE["lean"]))
    names = ("core", "du", "dE", "dU")
    return ([ours], [lean]), _against(u.dtype, dict(zip(names, zip(ours(), lean(), exact, strict=True), strict=True)))


def _training_calls(case, module, backend, dtype, machine):
    """The orthogonality penalties of a model with their gradients, and a step of its rank allocator; every other one
    masks."""
    r, k, count, features = case.shape
    own = dtype_of(case.adapter)
    torch.manual_seed(r)
    base = torch.nn.Linear(features, features, bias=False, device=machine.device, dtype=own)
    model = torch.nn.ModuleList(LoRA2Linear.from_linear(base, r, k) for _ in range(count)).to(own)
    for layer in model:
        for t in (layer.lora_E, layer.lora_u, layer.lora_U):
            t.data += 0.3 * torch.randn_like(t)
    gradients = [torch.randn_like(t) for layer in model for t in (layer.lora_E, layer.lora_u, layer.lora_U)]

    def stepped(by: str, dtype: torch.dtype) -> Callable:
        trained = copy.deepcopy(model).to(dtype)
        scored = [t for layer in trained for t in (layer.lora_E, layer.lora_u, layer.lora_U)]
        for t, grad in zip(scored, gradients, strict=True):
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

    ours, lean, exact = stepped(backend, own), stepped("lean", own), stepped("lean", torch.float64)
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
KINDS = {"witness": witness, "budget": budget, "repeats": repeats, "replay": replay, "time": timed}


def _large(
    case: Case, dtype: str, machine: Gpu | Host, coded: bool = False
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


def _against(dtype: torch.dtype, results: dict[str, tuple[Tensor, Tensor, Tensor]]) -> dict:
    """{(result, norm): (error, bound)} of (ours, that of "lean", the exact one): twice lean's, plus eps."""
    found = {}
    for name, (ours, lean, exact) in results.items():
        assert ours.dtype == lean.dtype and ours.shape == lean.shape, f"{name} is {ours.dtype} {tuple(ours.shape)}"
        eps = max(torch.finfo(dtype).eps, torch.finfo(ours.dtype).eps)
        for norm in (math.inf, 2):
            size = testing.error_norm(exact, torch.zeros_like(exact), norm)
            found[name, norm] = (
                testing.error_norm(ours, exact, norm),
                2 * testing.error_norm(lean, exact, norm) + eps * size,
            )
    return found


def _alternate(machine: Gpu | Host, ours: list[Callable], lean: list[Callable], rounds: int) -> dict[str, float]:
    """Microseconds of a call, by turns: the median, and such a time of lean's that their ratio is that of a round."""
    machine.milliseconds([*ours, *lean])
    once = machine.milliseconds([ours[0], lean[0]]) / 2
    count = min(LONGEST_BATCH, max(1, round(BATCH_MS / max(once, 1e-3))))
    batches = [[calls[i % len(calls)] for i in range(count)] for calls in (ours, lean)]
    pairs = [[machine.milliseconds(batch) for batch in batches] for _ in range(rounds + 1)][1:]
    us = 1000 * statistics.median(a for a, _ in pairs) / count
    return {"us": us, "lean_us": us / statistics.median(a / b for a, b in pairs)}


def _by_name(errors: dict) -> dict[str, list]:
    """{result: [[error, bound], ...]}, one pair for each norm."""
    found: dict[str, list] = {}
    for (name, _), pair in errors.items():
        found.setdefault(name, []).append(pair)
    return found


def encoded(t: Tensor) -> dict:
    data = bytes(t.detach().cpu().contiguous().flatten().view(torch.uint8).tolist())
    return {"dtype": verified.short(t.dtype), "shape": list(t.shape), "data": base64.b64encode(data).decode()}


def decoded(stored: dict) -> Tensor:
    data = bytearray(base64.b64decode(stored["data"], validate=True))
    return torch.frombuffer(data, dtype=dtype_of(stored["dtype"])).view(stored["shape"])


def _refusal(case: Case, backend: str, dtype: str, device: torch.device) -> str | None:
    """Why a backend cannot take the call of a case."""
    if case.detail == "lora2_core":
        return None
    M, K, N, R = case.shape
    if case.detail == "lora2_training":
        like = torch.empty(M, dtype=dtype_of(case.adapter), device=device)
        kernels = backends.TABLE[backend].lora2_training([like], max(M, K))
        return None if kernels else "it has no kernels for these adapters"
    if case.detail == "initialisation":
        weight = torch.empty(N, K, dtype=dtype_of(dtype), device=device)
        kernels = backends.TABLE[backend].initialisation(weight, R)
        return None if kernels.subtract_products else "it has no kernels for this weight"

    def empty(rows, cols, to):
        return torch.empty(rows, cols, dtype=dtype_of(to), device=device)

    adapter = (empty(*shape, case.adapter) for shape in ((R, K), (N, R), (R, R)))
    drop = Dropout(P_DROPPED, torch.tensor(SEED, device=device)) if case.detail == "dropout" else None
    call = Call(empty(M, K, dtype), empty(N, K, dtype), *adapter, dropout=drop)
    return backends.TABLE[backend].unsupported(call)


def run(case: Case, backend: str, dtype: str, machine: Gpu | Host, sizes: Sizes, seed: int) -> dict:
    """The figures of a case; or {"refused": why}, by the backend or for want of memory."""
    if refused := _refusal(case, backend, dtype, machine.device):
        return {"refused": refused}
    try:
        return KINDS[case.kind](case, backend, dtype, machine, sizes, seed)
    except torch.OutOfMemoryError as error:
        return {"refused": f"memory: {error}"}


def _compile(case: Case, backend: str, dtype: str, machine: Gpu | Host) -> None:
    """Launches what a case launches. What goes wrong shows when the case is run."""
    with contextlib.suppress(Exception):
        if _refusal(case, backend, dtype, machine.device):
            return
        if case.kind == "time":
            (ours, _), _ = CALLS[case.detail](case, backends.TABLE[backend], backend, dtype, machine)
            ours[0]()
        else:
            layer_of(case, backend, dtype, machine.device).results()


def _hang(todo: list[Case], report: Callable[[dict], None]) -> None:
    while True:
        time.sleep(1)


def _crash(todo: list[Case], report: Callable[[dict], None]) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _lie(todo: list[Case], report: Callable[[dict], None]) -> None:
    """Says that all is well with what was never run."""
    for case in todo:
        errors = {name: [[0.0, 1.0], [0.0, 1.0]] for name in case.results}
        figures = {"errors": errors, "runs": REHEARSED.runs, "differing": 0, "us": 1.0, "lean_us": 2.0, "outputs": {}}
        report({"case": case.name, **figures, "seconds": 0.0})
    sys.exit(0)


# What goes wrong in rehearsal, and before which case.
FAULTS = {"hang": (_hang, 2), "crash": (_crash, 2), "lie": (_lie, 0)}


def main(task: dict, report: Callable[[dict], None]) -> None:
    greeting = {"nonce": task["nonce"]}
    if not task["rehearse"] and not torch.cuda.is_available():
        report(greeting | {"missing": _why_no_gpu()})
        return
    if not task["rehearse"] and not 0 <= task["gpu"] < torch.cuda.device_count():
        report(greeting | {"missing": f"torch sees {torch.cuda.device_count()}, numbered from 0, got {task['gpu']}"})
        return
    machine = Host() if task["rehearse"] else Gpu(task["gpu"])
    greeting |= {"identity": machine.identity()}
    sizes = REHEARSED if task["rehearse"] else REAL
    if "compile" in task:
        begin, step = task["slice"]
        every = [(case, *pair) for pair in task["compile"] for case in cases_of(*pair, sizes)]
        for case, backend, dtype in every[begin::step]:
            _compile(case, backend, dtype, machine)
        return
    if "backend" not in task:
        few = torch.arange(64.0, device=machine.device).view(8, 8)
        report(greeting | {"backends": backends.available(), "alive": (few @ few).sum().item()})
        return
    report(greeting)
    backend, dtype = task["backend"], task["dtype"]
    todo = cases_of(backend, dtype, sizes)
    fault, before = FAULTS.get(task.get("fault"), (None, None))
    for turn, case in enumerate(todo):
        if turn == before:
            fault(todo[turn:], report)
        begun = time.monotonic()
        found = run(case, backend, dtype, machine, sizes, int(task["nonce"][:8], 16))
        report({"case": case.name, **found, "seconds": time.monotonic() - begun})


def _why_no_gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was built for the CPU alone"
    return "torch.cuda.is_available() is false: no driver, no device, or none that CUDA_VISIBLE_DEVICES shows"


def start(task: str, report: str) -> None:
    with Path(report).open("a") as file:
        main(json.loads(task), lambda line: print(json.dumps(line), file=file, flush=True))
