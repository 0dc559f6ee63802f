"""Time of the layer against the base product alone and against every baseline, in one process and by turns.

A cell captures a CUDA graph of calls over rotated buffers larger than three times L2 for each contender, checks each
result against fp64 first, then replays them by turns: base, contender, base, contender, … Figures are medians with the
20th and 80th percentile.
"""

import importlib
import itertools
import statistics
import sys

import record
import torch
import torch.nn.functional as F
from shapes import MODELS

import nlora_kernels as nk
from nlora_kernels import testing

BACKENDS = ["triton", "cuda"]
# name: K, N, M.
LAYERS = {
    "llama2-7b q": (4096, 4096, 8192),
    "llama2-7b q short": (4096, 4096, 2048),
    "llama2-7b gate": (4096, 11008, 8192),
    "llama2-7b down": (11008, 4096, 8192),
    "llama2-7b q decode": (4096, 4096, 16),
    "bert q": (768, 768, 4096),
    "bert ffn": (768, 3072, 8192),
}
RANKS = {"llama2-7b q": (16, 64, 128, 256)}
# What is timed: forward; forward and backward of all adapter matrices; of the core alone.
MODES = {"fwd": (), "fwd+bwd": ("lora_A", "lora_N", "lora_B"), "inttune": ("lora_N",)}
ROUNDS, WARM_MS = 30, 300


def base(x, weight, **_):
    return F.linear(x, weight)


def peft_linear(p: testing.Problem):
    """PEFT's LoRA layer around the weight, with its matrices as they are in p; it knows no N."""
    from peft import LoraConfig, get_peft_model

    N, K = p.weight.shape
    linear = torch.nn.Linear(K, N, bias=False, device="cuda", dtype=p.weight.dtype)
    linear.weight.data = p.weight
    config = LoraConfig(r=p.lora_A.shape[0], lora_alpha=p.scaling * p.lora_A.shape[0], target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(linear), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = p.lora_A, p.lora_B

    def call(x, lora_A, lora_B, **_):
        return layer(x)

    return call, {"lora_A": layer.lora_A["default"].weight, "lora_B": layer.lora_B["default"].weight}


def contenders(adapter_dtype):
    """{name: (dtype of the adapter, builds the callable for a problem)}"""
    compiled = torch.compile(testing.plain_linear, dynamic=False)
    ours = {b: (adapter_dtype, lambda p, b=b: (_ours(p, b), {})) for b in [*BACKENDS, "lean"]}
    return ours | {
        "eager": (torch.bfloat16, lambda p: (_plain(p, testing.plain_linear), {})),
        "compiled": (torch.bfloat16, lambda p: (_plain(p, compiled), {})),
        "peft fp32 adapter": (torch.float32, peft_linear),
        "peft bf16 adapter": (torch.bfloat16, peft_linear),
    }


def _ours(p, backend):
    return lambda x, weight, **adapter: nk.lora_linear(x, weight, **adapter, scaling=p.scaling, backend=backend)


def _plain(p, linear):
    return lambda x, weight, **adapter: linear(x, weight, **adapter, scaling=p.scaling)


class Timed:
    """A contender's calls over rotated buffers as one CUDA graph."""

    def __init__(self, build, M, K, N, R, adapter_dtype, trains, core):
        size = 2 * (M * K + N * K + M * N)
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        self.calls = 1 + 3 * l2 // size
        self.trains = trains
        self.steps = [self._step(build, seed, M, K, N, R, adapter_dtype, core) for seed in range(self.calls)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in self.steps:
                step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.steps[0]()
        self.peak = torch.cuda.max_memory_allocated() - before
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = [step() for step in self.steps]

    def _step(self, build, seed, M, K, N, R, adapter_dtype, core):
        dtype = torch.bfloat16
        p = testing.problem(
            M, K, N, R, dtype=dtype, adapter_dtype=adapter_dtype, core=core, bias=False, device="cuda", seed=seed
        )
        call, parameters = build(p)
        leaves = {n: getattr(p, n) for n in testing.TENSORS if getattr(p, n) is not None} | parameters
        for name, t in leaves.items():
            leaves[name] = t.detach().requires_grad_(name == "x" or name in self.trains) if t.is_leaf else t
        for name, t in parameters.items():
            leaves[name] = t.requires_grad_(name in self.trains)
        wanted = [leaves[n] for n in ("x", *self.trains) if n in leaves]

        def step():
            if not self.trains:
                with torch.no_grad():
                    return (call(**leaves),)
            y = call(**leaves)
            return y.detach(), *torch.autograd.grad(y, wanted, p.dy, allow_unused=True)

        if seed == 0:
            self.error = error(step()[0], p, call is base)
        return step

    def milliseconds(self) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / self.calls


def error(y, p, base_alone) -> float:
    """Relative error of the output against fp64 over some rows; fails if it is more than twice PyTorch's, plus eps."""
    rows = slice(0, min(256, len(p.x)))
    few = testing.Problem(**{**vars(p), "x": p.x[rows], "dy": p.dy[rows], "scaling": 0.0 if base_alone else p.scaling})
    exact = testing.plain_linear(**_arguments(few.to(torch.float64)))
    plain = testing.plain_linear(**_arguments(few))
    ours, allowed = testing.error_norm(y[rows], exact), testing.error_norm(plain, exact)
    size = exact.norm().item()
    assert ours <= 2 * allowed + torch.finfo(p.x.dtype).eps * size, f"off by {ours / size}, allowed {allowed / size}"
    return ours / size


def _arguments(p):
    return {n: getattr(p, n) for n in (*testing.TENSORS, "scaling")}


def time_cell(layer, R, mode, name, adapter_dtype) -> dict:
    # Dynamo gives up on a function after a few shapes, and every cell brings its own.
    torch.compiler.reset()
    K, N, M = LAYERS[layer]
    trains = MODES[mode]
    dtype, build = contenders(adapter_dtype)[name]
    core = not name.startswith("peft")
    trains = trains if core else tuple(t for t in trains if t != "lora_N")
    floor = Timed(lambda p: (base, {}), M, K, N, R, dtype, ("x",) if trains else (), core)
    timed = Timed(build, M, K, N, R, dtype, trains, core)
    warm = 0.0
    while warm < WARM_MS:
        warm += (floor.milliseconds() + timed.milliseconds()) * timed.calls
    pairs = [(floor.milliseconds(), timed.milliseconds()) for _ in range(ROUNDS)]
    ratios = [b / a for a, b in pairs]
    cuts = statistics.quantiles(ratios, n=5)
    microseconds = 1000 * statistics.median(b for _, b in pairs)
    products = 2 if trains else 1
    narrow = 1 + (mode != "fwd") + (mode == "fwd+bwd")
    flops = 2 * M * (K * N * products + R * (K + N + R) * narrow)
    return {
        "us": round(microseconds, 2),
        "base_us": round(1000 * statistics.median(a for a, _ in pairs), 2),
        "tflops": round(flops / microseconds / 1e6, 1),
        "ratio": round(statistics.median(ratios), 4),
        "ratio_p20_p80": [round(cuts[0], 4), round(cuts[3], 4)],
        "flop_floor": round(flops / (2 * M * K * N * products), 4),
        "peak_mib": round(timed.peak / 2**20, 1),
        "error": timed.error,
    }


def product_cell(K, N, M) -> dict:
    """The CUDA engine without an adapter against the library: how often as fast, in graphs by turns."""
    from nlora_kernels.backends.cuda import launch

    # Together larger than three times L2.
    size = 2 * (M * K + N * K + M * N)
    count = 1 + 3 * torch.cuda.get_device_properties(0).L2_cache_size // size
    x, weight, y = ([torch.randn(s, device="cuda").bfloat16() for _ in range(count)] for s in ((M, K), (N, K), (M, N)))
    # Small integers make every sum exact: each result has one right value.
    few = [torch.randint(-2, 3, t[0].shape, device="cuda").bfloat16() for t in (x, weight)]
    launch.run("linear", *few, None, y[0])
    assert torch.equal(y[0], F.linear(*few)), "the product is wrong"
    sets = list(zip(x, weight, y, strict=True))
    ours = [lambda a=a, b=b, c=c: launch.run("linear", a, b, None, c) for a, b, c in sets]
    library = [lambda a=a, b=b, c=c: torch.mm(a, b.T, out=c) for a, b, c in sets]
    times = alternate({"ours": ours, "library": library})
    return {
        "us": round(1000 * statistics.median(times["ours"]), 2),
        "library_us": round(1000 * statistics.median(times["library"]), 2),
        "tflops": round(2e-9 * M * N * K / statistics.median(times["ours"]), 1),
        "speed": round(statistics.median(b / a for a, b in zip(times["ours"], times["library"], strict=True)), 4),
    }


def alternate(functions) -> dict[str, list[float]]:
    """Milliseconds of a call, for each name, of lists of calls over rotated buffers that are run by turns."""
    graphs = {}
    for name, calls in functions.items():
        for call in calls:
            call()
        torch.cuda.synchronize()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for call in calls:
                call()
    times = {name: [] for name in functions}
    for _ in range(ROUNDS + 5):
        for name, graph in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) / len(functions[name]))
    return {name: values[5:] for name, values in times.items()}


def subtract_cell(backend, shape, R) -> dict:
    """The residual of Nyström in place, as a share of copy bandwidth."""
    nystrom = importlib.import_module(f"nlora_kernels.backends.{backend}.nystrom")
    weights = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    parts = [nystrom.gather(w, *nk.init.select(w, R, "leading")) for w in weights]
    copies = [w.clone() for w in weights]

    def subtract():
        nystrom.subtract_(weights, *([p[i] for p in parts] for i in range(3)), 1e-4)

    def copy():
        for source, target in zip(weights, copies, strict=True):
            target.copy_(source)

    times = alternate({"subtract": [subtract], "copy": [copy]})
    ours, plain = (statistics.median(times[name]) for name in ("subtract", "copy"))
    return {"us": round(1000 * ours, 1), "copy_us": round(1000 * plain, 1), "of_copy_bandwidth": round(plain / ours, 3)}


def cells():
    found = {}
    for layer, mode in itertools.product(LAYERS, MODES):
        for R in RANKS.get(layer, (64,)):
            for name in contenders(None):
                if not (name.startswith("peft") and mode == "inttune"):
                    dtype = torch.bfloat16
                    found[f"{layer} r{R} {mode} {name}"] = lambda la=layer, r=R, m=mode, n=name, d=dtype: time_cell(
                        la, r, m, n, d
                    )
    for backend in BACKENDS:
        found[f"llama2-7b q r64 fwd+bwd {backend} fp32 adapter"] = lambda b=backend: time_cell(
            "llama2-7b q", 64, "fwd+bwd", b, torch.float32
        )
        found[f"subtract {backend} 4096x4096 r128"] = lambda b=backend: subtract_cell(b, (4096, 4096), 128)
    for (K, N), M in itertools.product(sorted(set(MODELS["Llama-2-7B"].values())), (2048, 4096, 8192, 16384)):
        found[f"product cuda {M}x{K}x{N}"] = lambda k=K, n=N, m=M: product_cell(k, n, m)
    return found


if __name__ == "__main__":
    sys.exit(record.run("bench", cells, seconds_per_cell=15))
