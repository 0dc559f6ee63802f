"""Time of a layer against the base product alone and against every baseline, in one process and by turns.

A cell is a layer of bench/cells.py with every implementation of bench/implementations.py. Each is checked against fp64
first, then captured over rotated buffers larger than three times L2, and the graphs are replayed by turns with the base
layer's: base, first, second, …, base, … A figure is the median of the ratios to the base of the same round, with the
20th and 80th percentile. The same is timed eagerly, from Python, as a second figure.
"""

import functools
import importlib
import statistics
from collections.abc import Callable
from typing import NamedTuple

import peft  # noqa: F401  (so that it is there before the clock runs)
import torch
import torch.nn.functional as F

import nlora_kernels as nk
from bench import implementations
from bench.cells import MODELS, Cell
from bench.gpu import facts, groups
from bench.gpu.groups import Group
from bench.gpu.layers import emulate, named
from bench.timing import median_ratio

NAMES = ("lean", "cuda", "triton", "peft", "peft_base_dtype")
# Of a stage that a CPU stands in for.
REHEARSED = ("lean", "cuda", "peft", "peft_base_dtype")
HEADLINE = ("Llama-2-7B", "q_proj")
RANKS, ROWS = (64, 16, 128, 256), (8192, 2048)
# Of an operation that no graph can capture, in one timing.
CALLS = 8


class Wrong(AssertionError):
    """Some implementations failed; the figures are those of the others."""

    def __init__(self, problems: dict[str, str], figures: dict):
        super().__init__("; ".join(f"{name}: {problem}" for name, problem in problems.items()))
        self.figures = figures


FORWARD = [Cell(*HEADLINE, M, r, op="forward", dtype="bfloat16") for M in ROWS for r in RANKS]
BACKWARD = [
    Cell(*HEADLINE, M, r, method, "backward", "bfloat16")
    for M in ROWS
    for r in RANKS
    for method in ("nlora", "inttune")
]
LAYERS = [
    Cell(model, layer, M, 64, op=op, dtype="bfloat16")
    for model, layer, M in (
        ("Llama-2-7B", "gate_proj", 8192),
        ("Llama-2-7B", "down_proj", 8192),
        ("DeBERTa-v3-base", "query_proj", 4096),
        ("DeBERTa-v3-base", "intermediate.dense", 8192),
    )
    for op in ("forward", "backward")
] + [Cell(*HEADLINE, 16, r, op="forward", dtype="bfloat16") for r in (16, 64)]
BOTH = [Cell(*HEADLINE, 8192, r, op="both", dtype="bfloat16") for r in (64, 16)]


class GroupCell(NamedTuple):
    """Layers that share x, with fp32 adapters on bf16."""

    model: str
    layers: tuple[str, ...]
    M: int
    r: int
    method: str
    op: str

    def __str__(self) -> str:
        return f"group {self.model}.{'+'.join(self.layers)}-M{self.M}-r{self.r}-{self.method}-{self.op}"

    @property
    def group(self) -> Group:
        sizes = [MODELS[self.model][layer] for layer in self.layers]
        return Group(self.M, sizes[0][0], tuple(N for _, N in sizes), (self.r,) * len(sizes))


QKV, GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
PASSES = (("nlora", "forward"), ("nlora", "backward"), ("inttune", "backward"))
GROUPS = [
    GroupCell(model, of, M, 64, *each)
    for model, of, M in (("Llama-2-7B", QKV, 8192), ("Llama-3-8B", QKV, 8192), ("Llama-2-7B", GATE_UP, 4096))
    for each in PASSES
]
# "apart": one call of ours for each layer.
GROUP_NAMES, GROUPS_REHEARSED = ("lean", "cuda", "triton", "apart"), ("lean", "cuda")


def forward(machine) -> dict:
    return timed(machine, FORWARD)


def both(machine) -> dict:
    # Not among the facts, beside which kernels are built: on busy processors launches from Python take longer.
    return timed(machine, BOTH) | {"launch gap": functools.partial(facts.launch_gap, machine)}


def backward(machine) -> dict:
    return timed(machine, BACKWARD)


def layers(machine) -> dict:
    return timed(machine, LAYERS)


def engines(machine) -> dict:
    found = {}
    for K, N in machine.pick(sorted(set(MODELS["Llama-2-7B"].values())), [(72, 136)]):
        for M in machine.pick((2048, 8192), (37,)):
            found[f"engine {M}x{K}x{N}"] = functools.partial(engine, machine, M, K, N)
    return found


def groups_of_layers(machine) -> dict:
    from nlora_kernels.backends.triton import launch

    emulate(machine)
    rehearsed = [GroupCell("SmolLM2-135M", QKV[1:], 16, 8, *each) for each in PASSES[1:2]]
    cells = machine.pick(GROUPS, rehearsed)
    names = machine.pick(GROUP_NAMES, GROUPS_REHEARSED)
    if not launch.nests_descriptors():
        # It would compute layer by layer.
        names = [name for name in names if name != "triton"]
    return alone_if_unsound(machine, cells, names, measure_group)


def cells() -> list[Cell]:
    """All that are timed, in their order."""
    return [*FORWARD, *BOTH, *BACKWARD, *LAYERS]


def compiled(machine) -> dict:
    return timed(machine, BOTH[:1], ("peft_compiled", *NAMES), ("peft_compiled",))


def timed(machine, cells, names=NAMES, rehearsed=REHEARSED) -> dict:
    emulate(machine)
    if machine.rehearsal:
        small = ("SmolLM2-135M", "k_proj")
        cells = [cell._replace(model=small[0], layer=small[1], M=16, r=8) for cell in cells[:2]]
    cells = [cell._replace(device=machine.name) for cell in cells]
    return alone_if_unsound(machine, cells, machine.pick(names, rehearsed), measure)


def alone_if_unsound(machine, cells, names, measure: Callable) -> dict:
    """Each cell with all its implementations but those whose layers hung or crashed, which come last, one by one."""
    unsound = [name for name in names if not machine.sound(name)]
    sound = [name for name in names if name not in unsound]
    found = {str(cell): functools.partial(measure, machine, cell, sound) for cell in cells}
    for name in unsound:
        found |= {f"{cell}, {name} alone": functools.partial(measure, machine, cell, [name]) for cell in cells}
    return found


class Contender(NamedTuple):
    """An implementation of a cell: one call of it, its calls over rotated buffers as a graph, its error or what is
    wrong, and memory."""

    step: Callable
    replay: Callable
    error: float | None
    problem: str | None
    peak: int


def calls_of(machine, M, K, N) -> int:
    """How many calls touch more than three times L2."""
    return 1 + 3 * machine.cache_bytes // (2 * (M * K + N * K + M * N))


def contender(machine, name: str, cell: Cell) -> Contender:
    dy = implementations.tensors_of(cell)[1]
    first = implementations.layer(name, cell)
    step = implementations.step(first, dy, cell.op)
    error, problem = checked(first.budget, {n: t.detach() for n, t in step().items()})
    # What is compiled is compiled once.
    others = range(1, calls_of(machine, *cell.size[:3]))
    rotated = [first, *(first if name == "peft_compiled" else implementations.layer(name, cell, True) for _ in others)]

    def prepare():
        return [implementations.step(layer, dy.clone(), cell.op) for layer in rotated]

    def run(*steps):
        return [t.detach() for step in steps for t in step().values()]

    return Contender(step, machine.capture(run, prepare)[0], error, problem, machine.peak(step))


def checked(budget, results: dict) -> tuple[float | None, str | None]:
    """The largest error of results within a budget, or what is wrong with others: off by little, they are timed all the
    same. AssertionError where one is not finite."""
    wrong = [name for name, result in results.items() if not result.isfinite().all()]
    assert not wrong, f"{', '.join(wrong)} is not finite"
    try:
        return budget.check(results), None
    except AssertionError as error:
        return None, str(error)


def group_contender(machine, name: str, cell: GroupCell) -> Contender:
    of = cell.group
    tensors, dys = of.tensors(torch.bfloat16, torch.float32, machine.name)
    trained = "lora_N" if cell.method == "inttune" else "lora_"
    wrt = ["x", *(n for n in tensors if name != "floor" and n.startswith(trained))]
    if name == "floor":
        function = groups.frozen
    elif name == "apart":
        function = functools.partial(groups.apart, layer=functools.partial(nk.lora_linear, backend="cuda"))
    else:
        function = functools.partial(groups.together, backend=name)

    def part():
        """What is timed, on copies of the tensors."""
        leaves = {n: t.clone().requires_grad_(n in wrt) for n, t in tensors.items()}
        own = [dy.clone() for dy in dys]
        if cell.op == "forward":
            return lambda: function(**leaves)
        ys = function(**leaves)
        return lambda: torch.autograd.grad(ys, [leaves[n] for n in wrt], own, retain_graph=True)

    step, error, problem = part(), 0.0, None
    if name != "floor":
        made = step()
        made = [torch.cat(made, -1).detach()] if cell.op == "forward" else made
        results = dict(zip(["y"] if cell.op == "forward" else [f"d{n}" for n in wrt], made, strict=True))
        error, problem = checked(groups.budget(tensors, dys, wrt), results)

    def prepare():
        return [part() for _ in range(calls_of(machine, of.M, of.K, sum(of.outs)))]

    def run(*steps):
        return [t.detach() for step in steps for t in step()]

    return Contender(step, machine.capture(run, prepare)[0], error, problem, machine.peak(step))


def measure_group(machine, cell: GroupCell, names) -> dict:
    of = cell.group
    figures, base = compared(
        machine, functools.partial(group_contender, machine), cell, names, calls_of(machine, of.M, of.K, sum(of.outs))
    )
    return figures | {"base_tflops": round(2 * of.M * of.K * sum(of.outs) / base / 1e9, 1)}


def measure(machine, cell: Cell, names) -> dict:
    # NOTE: Dynamo gives up on a function after a few shapes, and every cell brings its own.
    torch.compiler.reset()
    count = calls_of(machine, *cell.size[:3])
    figures, base = compared(machine, functools.partial(contender, machine), cell, names, count)
    figures["flop_bound"] = round(implementations.flop_bound(cell), 4)
    return figures | {"base_tflops": round(implementations.flops(cell, adapter=False) / base / 1e9, 1)}


def compared(machine, make: Callable, cell, names, count: int) -> tuple[dict, float]:
    """The figures of make(name, cell) for every name beside those of "floor", each of so many calls; and milliseconds
    of one of these."""
    found, problems, planned = {}, {}, machine.schedule()
    for name in ("floor", *names):
        try:
            found[name] = make(name, cell)
            if found[name].problem:
                problems[name] = found[name].problem
        except Exception as error:
            problems[name] = f"{type(error).__name__}: {str(error)[:200]}"
            if not machine.answers():
                raise
    graph = machine.by_turns({name: c.replay for name, c in found.items()}, queued=True)
    clock = machine.clock()
    eager = machine.by_turns({name: c.step for name, c in found.items()}, rounds=10, warm_ms=0)
    base = statistics.median(graph["floor"]) / count
    figures = {"base_us": round(1000 * base, 2), **clock, **planned}
    for name in names:
        if name in found:
            figures[name] = {
                **spread("ratio", graph[name], graph["floor"]),
                "us": round(1000 * statistics.median(graph[name]) / count, 2),
                "eager_us": round(1000 * statistics.median(eager[name]), 1),
                "peak_mib": round(found[name].peak / 2**20, 1),
                "error": None if found[name].problem else float(f"{found[name].error:.2g}"),
            }
    figures["base_eager_us"] = round(1000 * statistics.median(eager["floor"]), 1)
    if problems:
        raise Wrong(problems, figures)
    return figures, base


def spread(name: str, times: list[float], to: list[float]) -> dict:
    """The median of the ratios of single rounds, and the 20th and 80th percentile."""
    ratio, *percentiles = (round(value, 4) for value in median_ratio(times, to))
    return {name: ratio, "p20_p80": percentiles}


def engine(machine, M, K, N) -> dict:
    """The CUDA engine without an adapter against the library: how often as fast, in graphs by turns."""
    from nlora_kernels.backends.cuda import launch

    count, planned = calls_of(machine, M, K, N), machine.schedule()
    made = functools.partial(torch.randn, device=machine.name)
    x, weight, y = ([made(s).bfloat16() for _ in range(count)] for s in ((M, K), (N, K), (M, N)))
    # Small integers make every sum exact: each result has one right value.
    few = [torch.randint(-2, 3, t[0].shape, device=machine.name).bfloat16() for t in (x, weight)]
    product = functools.partial(launch.run, "linear") if not machine.rehearsal else library
    product(*few, None, y[0])
    assert torch.equal(y[0], F.linear(*few)), "the product is wrong"
    sets = list(zip(x, weight, y, strict=True))
    ours, _ = machine.capture(lambda: [product(a, b, None, c) for a, b, c in sets] and y)
    theirs, _ = machine.capture(lambda: [library(a, b, None, c) for a, b, c in sets] and y)
    times = machine.by_turns({"ours": ours, "library": theirs}, queued=True)
    us = {name: 1000 * statistics.median(values) / count for name, values in times.items()}
    return {
        "us": round(us["ours"], 2),
        "library_us": round(us["library"], 2),
        "tflops": round(2e-6 * M * N * K / us["ours"], 1),
        **spread("speed", times["library"], times["ours"]),
        **machine.clock(),
        **planned,
    }


def library(x, weight, bias, y):
    return torch.mm(x, weight.T, out=y)


def initialisation(machine) -> dict:
    emulate(machine)
    found = {}
    for backend in sounder(machine, machine.pick(("lean", "cuda", "triton"), ("reference",))):
        found[f"NLoRA with residual, Llama-2-7B whole, {backend}"] = functools.partial(whole, machine, backend)
    for backend in sounder(machine, machine.pick(("cuda", "triton"), ("cuda",))):
        found[f"residual {backend}"] = functools.partial(residual, machine, backend)
    return found


def sounder(machine, backends) -> list[str]:
    """Those whose layers hung or crashed last."""
    return sorted(backends, key=lambda backend: not machine.sound(backend))


def whole(machine, backend) -> dict:
    """A, N, B and the residual of every linear layer of the model, and how long a copy of its weights takes."""
    model, layers, r = machine.pick(("Llama-2-7B", 32, 128), ("SmolLM2-135M", 1, 4))
    shapes = [size for _ in range(layers) for size in MODELS[model].values()]
    dtype = machine.pick(torch.bfloat16, torch.float32)
    weights = [torch.randn(N, K, device=machine.name, dtype=dtype).mul_(K**-0.5) for K, N in shapes]

    def initialise():
        with named(backend):
            for weight in weights:
                A, N, B = nk.init.nystrom(weight, r)
                nk.init.subtract_(weight, A, N, B, 1 / r)

    def copy():
        for weight in weights:
            weight.clone()

    initialise()
    copy()
    machine.synchronize()
    times = {name: machine.milliseconds([f]) for name, f in (("initialise", initialise), ("copy", copy))}
    return {"ms": round(times["initialise"], 1), "copy_ms": round(times["copy"], 1), "layers": len(weights)}


def residual(machine, backend) -> dict:
    """Eight weights in one launch, as a share of copy bandwidth."""
    nystrom = importlib.import_module(f"nlora_kernels.backends.{backend}.nystrom")
    shape, r, many = machine.pick(((4096, 4096), 128, 8), ((75, 136), 3, 1))
    weights = [torch.randn(shape, device=machine.name).bfloat16() for _ in range(many)]
    parts = [nystrom.gather(w, *nk.init.select(w, r, "leading")) for w in weights]
    copies = [w.clone() for w in weights]

    def subtract():
        nystrom.subtract_products(weights, *([p[i] for p in parts] for i in range(3)), 1e-4)

    def copy():
        for source, target in zip(weights, copies, strict=True):
            target.copy_(source)

    # NOTE: no graph, which Triton's call refuses, for it takes addresses from the host. Of several calls in a row the
    # host prepares one while the device computes another.
    def several(call):
        return lambda: [call() for _ in range(CALLS)]

    times = machine.by_turns({"ours": several(subtract), "copy": several(copy)}, queued=True)
    us = {name: 1000 * statistics.median(values) / CALLS for name, values in times.items()}
    share = spread("of_copy_bandwidth", times["copy"], times["ours"])
    return {"us": round(us["ours"], 1), "copy_us": round(us["copy"], 1), **share}
